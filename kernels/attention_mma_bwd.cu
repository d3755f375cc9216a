// Attention, backward, on tensor cores; formulas, shapes and results as in attention_bwd.cu, for rows of up to HEAD
// features.
//
//   attention_mma_bwd_queries  blocks own 64 M queries, tiles of keys and values pass by: dq, position bias, and
//                              delta, from the output and its residual, whose rows are aligned
//   attention_mma_bwd_keys     blocks own 64 M keys, tiles of queries and output gradients pass by: dk, dv
//
// The second computes the transposed scores, k qᵀ: weights and score gradients are then operands, straight from
// registers, of the products with the output gradients and the queries. The first takes three products and the second
// four, two of which are the same: avoiding atomic additions costs 7 products instead of 5.
//
// Variants: DTYPE=HALVES HEAD=32,64,128

#include "common.cuh"

#define SPANS (HEAD != 64)

#include "attention.cuh"
#include "attention_position.cuh"
#include "attention_mma.cuh"

extern "C" __global__ void __launch_bounds__(MMA_THREADS, 2) attention_mma_bwd_queries(
    T* dq, f32* position, f32* delta, const T* grad, const T* q, const T* k, const T* v, const Statistics* statistics,
    const T* out, const T* residual, const i64* bucket_of, SPEC_INPUTS, Layout dq_at, Layout grad_at, Layout q_at,
    Layout k_at, Layout v_at, Layout out_at, i32 parameters, i32 reach, i32 behind, SPEC_VALUES) {
#if __CUDA_ARCH__ >= 800
    constexpr i32 M = HEAD == 128 ? 1 : 2, N = HEAD == 32 ? 64 : 32, ROWS = 16 * M * WARPS;
    extern __shared__ uint4 memory[];
    __shared__ Scores scores;
    __shared__ Rows q_rows, k_rows, v_rows, grad_rows;
    __shared__ PositionTile<ROWS, N, f32> position_tile;
    __shared__ f32 common[HEAD];
    // Of the block's queries; the terms are the arguments of `weigh_plainly` and delta.
    __shared__ Statistics row_statistics[ROWS];
    __shared__ float2 row_terms[ROWS];
    const i32 heads = q_at.dims[1], queries = q_at.dims[2], keys = k_at.dims[2];
    const i32 tiles = ceil_div(queries, ROWS), index = blockIdx.x / tiles;
    const i32 batch = index / heads, head = index % heads, first = (tiles - 1 - blockIdx.x % tiles) * ROWS;
    if (threadIdx.x == 0) {
        const Spec spec = SPEC;
        const i32 kv_head = head / (heads / (i32)k_at.dims[1]);
        scores.set(spec, batch, head, heads, queries, keys);
        q_rows.set(q, q_at, batch, head);
        k_rows.set(k, k_at, batch, kv_head);
        v_rows.set(v, v_at, batch, kv_head);
        grad_rows.set(grad, grad_at, batch, head);
    }
    __syncthreads();
    typedef ScoreSums<M, N, false> Tiles;
    // Neighbouring threads take the packets of a row.
    constexpr i32 PACKETS = HEAD / LANES;
    const i32 column = threadIdx.x % PACKETS * LANES;
    for (i32 row = threadIdx.x / PACKETS; row < ROWS; row += MMA_THREADS / PACKETS) {
        const bool exists = first + row < queries;
        const i64 at = (i64)index * queries + first + row;
        f32 its_delta = 0;
        if (exists && column < (i32)out_at.dims[3]) {
            const auto packet = [&](const T* of, const Layout& layout) {
                return load<LANES>(of + layout.offset + batch * layout.strides[0] + head * layout.strides[1] +
                                   (first + row) * layout.strides[2] + column);
            };
            const auto gradient = packet(grad, grad_at);
            const auto product = [&](const Packet<LANES>& of) {
                f32 dot = 0;
#pragma unroll
                for (i32 lane = 0; lane < LANES; ++lane) {
                    dot += Element<T>::to_acc(of.lane[lane]) * Element<T>::to_acc(gradient.lane[lane]);
                }
                return dot;
            };
            its_delta = product(packet(out, out_at));
            if (residual != nullptr) its_delta += product(packet(residual, out_at)) / RESIDUAL_SCALE<T>;
        }
#pragma unroll
        for (i32 step = PACKETS / 2; step > 0; step /= 2) its_delta += __shfl_xor_sync(0xFFFFFFFF, its_delta, step);
        if (column > 0) continue;
        if (exists) delta[at] = its_delta;
        const Statistics of_row = exists ? statistics[at] : Statistics{0, 0};
        row_statistics[row] = of_row;
        row_terms[row] = {Tiles::exponent_base(of_row), its_delta};
    }
    const PositionTerms terms = {bucket_of, linear, parameters, reach, behind, keys - queries};
    f32* position_sums = position ? position + ((i64)index * tiles + first / ROWS) * parameters : nullptr;
    if (position_sums) {
        for (i32 at = threadIdx.x; at < parameters; at += MMA_THREADS) position_sums[at] = 0;
    }
    T* const start = reinterpret_cast<T*>(memory);
    const Tile q_tile = {start}, grad_tile = {start + ROWS * HEAD};
    const auto k_tile = [&](i32 stage) { return Tile{start + (2 * ROWS + 2 * N * stage) * HEAD}; };
    const auto v_tile = [&](i32 stage) { return Tile{start + (2 * ROWS + 2 * N * stage + N) * HEAD}; };
    // The gradients of scores as a tile, for the sums over its diagonals; used only if `position` is requested.
    f32* const ds_tile = reinterpret_cast<f32*>(start + (2 * ROWS + 4 * N) * HEAD);
    constexpr i32 DS_PITCH = N + 4;

    const i32 warp = warp_row(16 * M), query = first + warp;
    const Span seen = scores.keys_of(first, min(first + ROWS, queries) - 1);
    const auto next = [&](i32 key) {
        while (key < seen.end && !scores.any_key(key, N)) key += N;
        return key;
    };
    const auto copy_keys = [&](i32 key, i32 stage) {
        if (key < seen.end) {
            copy_rows<N>(k_tile(stage), k_rows, key);
            copy_rows<N>(v_tile(stage), v_rows, key);
        }
        ptx_cp_async_commit();
    };
    Sums<M, HEAD> acc;
    acc.clear();
    i32 key = next(seen.start / N * N), stage = 0;
    copy_rows<ROWS>(q_tile, q_rows, first);
    copy_rows<ROWS>(grad_tile, grad_rows, first);
    copy_keys(key, 0);
    ptx_cp_async_wait<0>();
    __syncthreads();
    // A sink takes a part of the gradients, and a soft clamp changes each: their sum is not zero.
    const bool cancels = scores.bound == 0 && scores.sink == -infinity();
    const bool has_common = cancels && key < seen.end && common_part<N>(common, k_tile(0), scores, key);
    const auto of_warp = [&](auto holds) { return warp_any(warp, warp + 16 * M, holds); };
    const bool large = of_warp([&](i32 row) { return Tiles::is_large(row_statistics[row]); });
    const bool sharp = of_warp([&](i32 row) { return Tiles::is_sharp(row_statistics[row]); });
    f32 gradients[2 * M] = {};
    while (key < seen.end) {
        const i32 following = next(key + N);
        copy_keys(following, stage ^ 1);
        ptx_cp_async_wait<1>();
        __syncthreads();
        Tiles p, ds;
        p.clear();
        p.add_rows(q_tile, warp, k_tile(stage));
        const auto of_query = [&](i32 q) { return row_statistics[warp + Tiles::query(q)]; };
        const f32 unit = p.finish(scores, query, key);
        if (large || sharp) {
            p.weigh(unit, large, of_query);
        } else {
            p.weigh_plainly(unit, [&](i32 q) { return row_terms[warp + Tiles::query(q)].x; });
        }
        ds.clear();
        ds.add_rows(grad_tile, warp, v_tile(stage));
        const auto delta_of = [&](i32 q) { return row_terms[warp + Tiles::query(q)].y; };
        ds.to_score_gradients(p, scores, sharp, delta_of, of_query, query, key);
        if (position_sums) {
#pragma unroll
            for (i32 r = 0; r < ds.ROWS; ++r) {
#pragma unroll
                for (i32 c = 0; c < ds.COLUMNS; ++c) {
                    ds_tile[(warp + ds.row(r)) * DS_PITCH + ds.column(c)] = ds.at(r, c);
                }
            }
            position_tile.add(position_sums, ds_tile, DS_PITCH, terms, key - first, max(scores.unbiased - key, 0));
        }
        if (has_common) {
#pragma unroll
            for (i32 r = 0; r < ds.ROWS; ++r) {
#pragma unroll
                for (i32 c = 0; c < ds.COLUMNS; ++c) {
                    gradients[r] += Element<T>::to_acc(Element<T>::from_acc(ds.at(r, c)));
                }
            }
        }
        if (dq) acc.add_product(ds, k_tile(stage));
        __syncthreads();
        key = following, stage ^= 1;
    }
    ptx_cp_async_wait<0>();
    // The copies of all threads are complete: results reuse their memory.
    __syncthreads();
    if (has_common) take_common(acc, gradients, common);
    if (dq) write_rows(dq, dq_at, batch, head, first, acc, scores.scale, q_tile);
#endif
}

extern "C" __global__ void __launch_bounds__(MMA_THREADS, 2) attention_mma_bwd_keys(
    T* dk, T* dv, const T* grad, const T* q, const T* k, const T* v, const Statistics* statistics, const f32* delta,
    SPEC_INPUTS, Layout dk_at, Layout dv_at, Layout grad_at, Layout q_at, Layout k_at, Layout v_at, SPEC_VALUES) {
#if __CUDA_ARCH__ >= 800
    constexpr i32 M = 1, N = HEAD == 128 ? 32 : 64, ROWS = 16 * M * WARPS;
    extern __shared__ uint4 memory[];
    __shared__ Scores scores;
    __shared__ Rows q_rows, k_rows, v_rows, grad_rows;
    typedef ScoreSums<M, N, true> Tiles;
    // Per query of a step; every thread reads those of many queries. The terms are the arguments of `weigh_plainly` and
    // delta.
    __shared__ Statistics row_statistics[N];
    __shared__ float2 row_terms[N];
    // Per warp that reads them: whether one has large scores, or a weight that may be the whole weight.
    __shared__ bool row_large[N / 32], row_sharp[N / 32];
    // Those of the first head.
    __shared__ const Statistics* all_statistics;
    __shared__ const f32* all_delta;
    const i32 heads = q_at.dims[1], queries = q_at.dims[2], kv_heads = k_at.dims[1], keys = k_at.dims[2];
    const i32 tiles = ceil_div(keys, ROWS), index = blockIdx.x / tiles, members = heads / kv_heads;
    const i32 batch = index / kv_heads, kv_head = index % kv_heads, first = blockIdx.x % tiles * ROWS;
    const i32 first_head = kv_head * members;
    const auto set_head = [&](i32 head) {
        __syncthreads();
        if (threadIdx.x == 0) {
            const Spec spec = SPEC;
            scores.set(spec, batch, head, heads, queries, keys);
        }
        __syncthreads();
    };
    if (threadIdx.x == 0) {
        k_rows.set(k, k_at, batch, kv_head);
        v_rows.set(v, v_at, batch, kv_head);
        q_rows.set(q, q_at, batch, first_head);
        grad_rows.set(grad, grad_at, batch, first_head);
        const i64 first_row = ((i64)batch * heads + first_head) * queries;
        all_statistics = statistics + first_row, all_delta = delta + first_row;
    }
    set_head(first_head);
    T* const start = reinterpret_cast<T*>(memory);
    const Tile k_tile = {start}, v_tile = {start + ROWS * HEAD};
    const auto q_tile = [&](i32 stage) { return Tile{start + (2 * ROWS + 2 * N * stage) * HEAD}; };
    const auto grad_tile = [&](i32 stage) { return Tile{start + (2 * ROWS + 2 * N * stage + N) * HEAD}; };

    // Tiles of queries are counted over all heads that share the keys.
    const i32 per_head = ceil_div(queries, N), steps = members * per_head;
    const bool any_key = scores.any_key(first, ROWS);
    const Span seen = scores.queries_of(first, min(first + ROWS, keys) - 1);
    const auto reached = [&](i32 step) {
        const i32 query = step % per_head * N;
        return any_key && query < seen.end && query + N > seen.start;
    };
    // True if one of a tile's queries has no key. Uniform across a warp.
    const auto blind = [&](i32 step) {
        const i32 query = step % per_head * N;
        const Statistics* of_head = all_statistics + (i64)(step / per_head) * queries;
        return warp_any(query, min(query + N, queries), [&](i32 row) { return of_head[row].largest == infinity(); });
    };
    const auto next = [&](i32 step) {
        while (step < steps && !reached(step) && !(dv && blind(step))) ++step;
        return step;
    };
    const auto copy_queries = [&](i32 step, i32 stage) {
        if (step < steps) {
            const i32 member = step / per_head, query = step % per_head * N;
            copy_rows<N>(q_tile(stage), q_rows, query, member * q_at.strides[1]);
            copy_rows<N>(grad_tile(stage), grad_rows, query, member * grad_at.strides[1]);
        }
        ptx_cp_async_commit();
    };
    Sums<M, HEAD> dk_sums, dv_sums;
    dk_sums.clear(), dv_sums.clear();
    i32 step = next(0), stage = 0, member = 0;
    copy_rows<ROWS>(k_tile, k_rows, first);
    copy_rows<ROWS>(v_tile, v_rows, first);
    copy_queries(step, 0);
    const i32 warp = warp_row(16 * M), key = first + warp;
    while (step < steps) {
        const i32 following = next(step + 1);
        copy_queries(following, stage ^ 1);
        if (step / per_head != member) {
            member = step / per_head;
            set_head(first_head + member);
        }
        const i32 query = step % per_head * N;
        if (threadIdx.x < N) {
            const bool exists = query + (i32)threadIdx.x < queries;
            const i64 row = (i64)member * queries + query + threadIdx.x;
            const Statistics of_row = exists ? all_statistics[row] : Statistics{0, 0};
            row_statistics[threadIdx.x] = of_row;
            row_terms[threadIdx.x] = {Tiles::exponent_base(of_row), exists ? all_delta[row] : 0};
            const bool large = __any_sync(0xFFFFFFFF, Tiles::is_large(of_row));
            const bool sharp = __any_sync(0xFFFFFFFF, Tiles::is_sharp(of_row));
            if (threadIdx.x % 32 == 0) row_large[threadIdx.x / 32] = large, row_sharp[threadIdx.x / 32] = sharp;
        }
        ptx_cp_async_wait<1>();
        __syncthreads();
        Tiles p, ds;
        p.clear();
        if (reached(step)) {
            p.add_rows(k_tile, warp, q_tile(stage));
            const bool large = row_large[0] || row_large[N / 32 - 1], sharp = row_sharp[0] || row_sharp[N / 32 - 1];
            const auto of_query = [&](i32 q) { return row_statistics[Tiles::query(q)]; };
            const f32 unit = p.finish(scores, query, key);
            if (large || sharp) {
                p.weigh(unit, large, of_query);
            } else {
                p.weigh_plainly(unit, [&](i32 q) { return row_terms[Tiles::query(q)].x; });
            }
            ds.clear();
            ds.add_rows(v_tile, warp, grad_tile(stage));
            const auto delta_of = [&](i32 q) { return row_terms[Tiles::query(q)].y; };
            ds.to_score_gradients(p, scores, sharp, delta_of, of_query, query, key);
            if (dk) dk_sums.add_product(ds, q_tile(stage));
        }
        if (dv) {
            if (blind(step)) p.spread(scores, row_statistics, query, key);
            dv_sums.add_product(p, grad_tile(stage));
        }
        __syncthreads();
        step = following, stage ^= 1;
    }
    ptx_cp_async_wait<0>();
    // The copies of all threads are complete: results reuse their memory.
    __syncthreads();
    if (dk) write_rows(dk, dk_at, batch, kv_head, first, dk_sums, scores.scale, k_tile);
    if (dv) write_rows(dv, dv_at, batch, kv_head, first, dv_sums, scores.factor, v_tile);
#endif
}
