// Attention, backward, on the tensor cores of sm_90a; formulas, shapes and results as in attention_bwd.cu, for rows
// of up to HEAD features. The kernels divide their work like those of attention_mma_bwd.cu, with warpgroup products.
//
//   attention_wgmma_bwd_queries  blocks own 128 queries, tiles of keys and values pass by: dq
//   attention_wgmma_bwd_keys     blocks own 128 keys, tiles of queries and output gradients pass by: dk, dv
//
// Products with operands in registers run while the weights of the next tile are computed: their tiles stay in one of
// three stages. The gradient of position biases is computed by attention_mma_bwd.cu.
//
// Variants: DTYPE=HALVES HEAD=64,128

#include "common.cuh"

#define SPANS true
#define EXTENDED false

#include "attention.cuh"
#include "attention_mma.cuh"
#include "wgmma.cuh"

constexpr i32 BACKWARD_THREADS = 256;

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

constexpr i32 ROWS = BACKWARD_THREADS / 2;

typedef WgmmaTile<ROWS, HEAD> OwnTile;

// Only a soft clamp needs those of a query.
__device__ __forceinline__ Statistics no_statistics(i32) { return {0, 0}; }

// Makes the copies of all threads visible to the products.
__device__ __forceinline__ void landed() {
    ptx_cp_async_wait<0>();
    ptx_fence_async();
    __syncthreads();
}

// A block's head and its tile, for `tiles` per head: the first tiles of GROUP heads come first, whose rows stay
// in the second-level cache.
struct Place {
    i32 head, tile;

    __device__ __forceinline__ explicit Place(i32 tiles) {
        constexpr i32 GROUP = 16;
        const i32 group = blockIdx.x / (GROUP * tiles) * GROUP, members = min(GROUP, (i32)gridDim.x / tiles - group);
        const i32 place = blockIdx.x - group * tiles;
        head = group + place % members, tile = place / members;
    }
};

#endif

extern "C" __global__ void __launch_bounds__(BACKWARD_THREADS, 1) attention_wgmma_bwd_queries(
    T* dq, f32* position, const T* grad, const T* q, const T* k, const T* v, const Statistics* statistics, const f32*
    delta, const i64* bucket_of, SPEC_INPUTS, Layout dq_at, Layout grad_at, Layout q_at, Layout k_at, Layout v_at, i32
    parameters, i32 reach, i32 behind, SPEC_VALUES) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    constexpr i32 N = 64;
    typedef WgmmaTile<N, HEAD> PassingTile;
    extern __shared__ uint4 memory[];
    __shared__ Scores scores;
    __shared__ Rows q_rows, k_rows, v_rows, grad_rows;
    __shared__ f32 common[HEAD];
    const i32 heads = q_at.dims[1], queries = q_at.dims[2], keys = k_at.dims[2];
    const i32 tiles = ceil_div(queries, ROWS);
    const Place place(tiles);
    const i32 index = place.head, batch = index / heads, head = index % heads, first = (tiles - 1 - place.tile) * ROWS;
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
    T* const start = wgmma_memory(memory);
    const OwnTile q_tile = {start}, grad_tile = {start + ROWS * HEAD};
    const auto k_tile = [&](i32 stage) { return PassingTile{start + (2 * ROWS + N * stage) * HEAD}; };
    const auto v_tile = [&](i32 stage) { return PassingTile{start + (2 * ROWS + N * (3 + stage)) * HEAD}; };

    typedef ScoreSums<1, N, false> Tiles;
    const i32 own = warp_row(16), query = first + own, group_row = own / 64 * 64;
    // Of the thread's two rows.
    Statistics rows[2];
    f32 bases[2], means[2];
    bool large = false, sharp = false;
#pragma unroll
    for (i32 r = 0; r < 2; ++r) {
        const i32 row = query + Tiles::query(r);
        const bool exists = row < queries;
        rows[r] = exists ? statistics[(i64)index * queries + row] : Statistics{0, 0};
        means[r] = exists ? delta[(i64)index * queries + row] : 0;
        bases[r] = Tiles::exponent_base(rows[r]);
        large |= Tiles::is_large(rows[r]), sharp |= Tiles::is_sharp(rows[r]);
    }
    large = __any_sync(0xFFFFFFFF, large), sharp = __any_sync(0xFFFFFFFF, sharp);

    const Span seen = scores.keys_of(first, min(first + ROWS, queries) - 1);
    const Span plain = scores.plain_keys(query, query + 15);
    const auto next = [&](i32 key) {
        while (key < seen.end && !scores.any_key(key, N)) key += N;
        return key;
    };
    const auto copy_keys = [&](i32 key, i32 k_stage, i32 v_stage) {
        if (key < seen.end) {
            copy_rows<N, BACKWARD_THREADS>(k_tile(k_stage), k_rows, key);
            copy_rows<N, BACKWARD_THREADS>(v_tile(v_stage), v_rows, key);
        }
        ptx_cp_async_commit();
    };
    Sums<1, HEAD> acc;
    WgmmaOperand<N> gradients;
    acc.clear(), gradients.clear();
    copy_rows<ROWS, BACKWARD_THREADS>(q_tile, q_rows, first);
    copy_rows<ROWS, BACKWARD_THREADS>(grad_tile, grad_rows, first);
    // The product before that of the first tile is with zeros, and its result is overwritten.
    i32 key = next(seen.start / N * N), count = 0, stage = 0, before = 0;
    copy_keys(key, 0, 0);
    landed();
    const bool has_common = key < seen.end && common_part<N>(common, k_tile(0), scores, key);
    f32 gradient_sums[2] = {};
    while (key < seen.end) {
        const i32 following = next(key + N), after = stage == 2 ? 0 : stage + 1;
        landed();
        copy_keys(following, after, (count + 1) % 2);
        Tiles p, ds;
        wgmma_rows(p, q_tile, group_row, k_tile(stage));
        wgmma_rows(ds, grad_tile, group_row, v_tile(count % 2));
        wgmma_product(acc, gradients, k_tile(before), count > 1);
        ptx_wgmma_wait<2>();
        wgmma_settle(p);
        const f32 unit = p.finish(scores, query, key, plain, key, N);
        if (large || sharp) {
            p.weigh(unit, large, [&](i32 r) { return rows[r]; });
        } else {
            p.weigh_plainly(unit, [&](i32 r) { return bases[r]; });
        }
        ptx_wgmma_wait<1>();
        wgmma_settle(ds);
        ds.to_score_gradients(p, scores, sharp, [&](i32 r) { return means[r]; }, no_statistics, query, key);
        wgmma_settle(ds);
        ptx_wgmma_wait<0>();
        wgmma_settle(acc);
        gradients.settle();
        gradients.set(ds);
        if (has_common) gradients.add_to(gradient_sums);
        before = stage, stage = after, key = following, ++count;
    }
    landed();
    if (count > 0) {
        wgmma_product(acc, gradients, k_tile(before), count > 1);
        ptx_wgmma_wait<0>();
        wgmma_settle(acc);
        gradients.settle();
    }
    __syncthreads();
    if (has_common) take_common(acc, gradient_sums, common);
    write_rows(dq, dq_at, batch, head, first, acc, scores.scale, q_tile);
#endif
}

extern "C" __global__ void __launch_bounds__(BACKWARD_THREADS, 1) attention_wgmma_bwd_keys(
    T* dk, T* dv, const T* grad, const T* q, const T* k, const T* v, const Statistics* statistics, const f32* delta,
    SPEC_INPUTS, Layout dk_at, Layout dv_at, Layout grad_at, Layout q_at, Layout k_at, Layout v_at, SPEC_VALUES) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    // Wide heads leave no registers for operands of products that overlap the next tile.
    constexpr i32 N = 64, STAGES = 3;
    constexpr bool OVERLAP = HEAD == 64;
    typedef WgmmaTile<N, HEAD> PassingTile;
    extern __shared__ uint4 memory[];
    __shared__ Scores scores;
    __shared__ Rows q_rows, k_rows, v_rows, grad_rows;
    // Per query of a step, read by every thread: the arguments of `weigh` and of `weigh_plainly`, and delta.
    __shared__ Statistics row_statistics[2][N];
    __shared__ float2 row_terms[2][N];
    // Per warp, the queries whose scores need no check.
    __shared__ Span plain[BACKWARD_THREADS / 32];
    // Per warp that reads them: whether one has large scores, or a weight that may be the whole weight.
    __shared__ bool row_large[2][N / 32], row_sharp[2][N / 32];
    // Of the first head.
    __shared__ const Statistics* all_statistics;
    __shared__ const f32* all_delta;
    const i32 heads = q_at.dims[1], queries = q_at.dims[2], kv_heads = k_at.dims[1], keys = k_at.dims[2];
    const i32 tiles = ceil_div(keys, ROWS), members = heads / kv_heads;
    const Place place(tiles);
    const i32 index = place.head, batch = index / kv_heads, kv_head = index % kv_heads, first = place.tile * ROWS;
    const i32 first_head = kv_head * members;
    // Recomputes values derived from a position where they are used instead of keeping them in registers.
    const auto here = [](i32 position) { return (i32)ptx_opaque(position); };
    const auto set_head = [&](i32 head) {
        __syncthreads();
        if (threadIdx.x == 0) {
            const Spec spec = SPEC;
            scores.set(spec, here(batch), head, heads, queries, keys);
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
    T* const start = wgmma_memory(memory);
    const OwnTile k_tile = {start}, v_tile = {start + ROWS * HEAD};
    const auto q_tile = [&](i32 stage) { return PassingTile{start + (2 * ROWS + 2 * N * stage) * HEAD}; };
    const auto grad_tile = [&](i32 stage) { return PassingTile{start + (2 * ROWS + 2 * N * stage + N) * HEAD}; };

    typedef ScoreSums<1, N, true> Tiles;
    const i32 own = warp_row(16), key = first + own, group_row = own / 64 * 64;
    // Steps are tiles of queries that see one of the keys, of all heads that share them.
    const Span seen = scores.queries_of(first, min(first + ROWS, keys) - 1);
    if (threadIdx.x % 32 == 0) plain[threadIdx.x / 32] = scores.plain_queries(key, key + 15);
    const i32 first_query = seen.start / N * N;
    const auto advance = [&](i32& member, i32& query) {
        if ((query += N) >= seen.end) query = first_query, ++member;
    };
    // The step after one, recomputed on each use.
    const auto copy_next = [&](i32 member, i32 query, i32 stage) {
        advance(member, query);
        if (member < members) {
            copy_rows<N, BACKWARD_THREADS>(q_tile(stage), q_rows, query, member * q_at.strides[1]);
            copy_rows<N, BACKWARD_THREADS>(grad_tile(stage), grad_rows, query, member * grad_at.strides[1]);
        }
        ptx_cp_async_commit();
    };
    // The thread's query of a step: read early, written to shared memory late.
    Statistics its_statistics = {0, 0};
    f32 its_delta = 0;
    const auto read_next = [&](i32 member, i32 query) {
        advance(member, query);
        its_statistics = {0, 0}, its_delta = 0;
        if (member >= members || threadIdx.x >= N) return;
        const i32 row = query + threadIdx.x;
        const i64 at = (i64)member * queries + row;
        if (row < queries) its_statistics = all_statistics[at], its_delta = all_delta[at];
    };
    const auto write_query = [&](i32 slot) {
        if (threadIdx.x >= N) return;
        row_statistics[slot][threadIdx.x] = its_statistics;
        row_terms[slot][threadIdx.x] = {Tiles::exponent_base(its_statistics), its_delta};
        const bool large = __any_sync(0xFFFFFFFF, Tiles::is_large(its_statistics));
        const bool sharp = __any_sync(0xFFFFFFFF, Tiles::is_sharp(its_statistics));
        if (threadIdx.x % 32 == 0) row_large[slot][threadIdx.x / 32] = large, row_sharp[slot][threadIdx.x / 32] = sharp;
    };
    Sums<1, HEAD> dk_sums, dv_sums;
    WgmmaOperand<N> weights, gradients;
    dk_sums.clear(), dv_sums.clear(), weights.clear(), gradients.clear();
    copy_rows<ROWS, BACKWARD_THREADS>(k_tile, k_rows, first);
    copy_rows<ROWS, BACKWARD_THREADS>(v_tile, v_rows, first);
    // Before the first step.
    i32 member = scores.any_key(first, ROWS) && seen.start < seen.end ? 0 : members, query = first_query - N;
    copy_next(member, query, 0);
    read_next(member, query);
    write_query(0);
    query = first_query;
    i32 stage = 0, before = 0, step = 0;
    for (; member < members; advance(member, query), ++step) {
        const i32 after = stage == STAGES - 1 ? 0 : stage + 1, slot = step % 2;
        if (step > 0 && query == first_query) set_head(first_head + member);
        landed();
        copy_next(member, query, after);
        if constexpr (OVERLAP) read_next(member, query);
        const bool large = row_large[slot][0] || row_large[slot][1], sharp = row_sharp[slot][0] || row_sharp[slot][1];
        Tiles p, ds;
        wgmma_rows(p, k_tile, group_row, q_tile(stage));
        wgmma_rows(ds, v_tile, group_row, grad_tile(stage));
        if constexpr (OVERLAP) {
            wgmma_product(dv_sums, weights, grad_tile(before), step > 1);
            wgmma_product(dk_sums, gradients, q_tile(before), step > 1);
            ptx_wgmma_wait<3>();
        } else {
            ptx_wgmma_wait<1>();
        }
        wgmma_settle(p);
        const f32 unit = p.finish(scores, query, here(key), plain[threadIdx.x / 32], query, N);
        if (large || sharp) {
            p.weigh(unit, large, [&](i32 q) { return row_statistics[slot][Tiles::query(q)]; });
        } else {
            p.weigh_plainly(unit, [&](i32 q) { return row_terms[slot][Tiles::query(q)].x; });
        }
        const auto delta_of = [&](i32 q) { return row_terms[slot][Tiles::query(q)].y; };
        if constexpr (OVERLAP) {
            ptx_wgmma_wait<2>();
            wgmma_settle(ds);
            ds.to_score_gradients(p, scores, sharp, delta_of, no_statistics, query, here(key));
            wgmma_settle(p), wgmma_settle(ds);
            ptx_wgmma_wait<0>();
            wgmma_settle(dv_sums), wgmma_settle(dk_sums);
            weights.settle(), gradients.settle();
            weights.set(p), gradients.set(ds);
        } else {
            ptx_wgmma_wait<0>();
            wgmma_settle(ds);
            ds.to_score_gradients(p, scores, sharp, delta_of, no_statistics, query, here(key));
            weights.set(p), gradients.set(ds);
            wgmma_product(dv_sums, weights, grad_tile(stage));
            wgmma_product(dk_sums, gradients, q_tile(stage));
            read_next(member, query);
            ptx_wgmma_wait<0>();
            wgmma_settle(dv_sums), wgmma_settle(dk_sums);
            weights.settle(), gradients.settle();
        }
        write_query(slot ^ 1);
        before = stage, stage = after;
    }
    landed();
    if constexpr (OVERLAP) {
        if (step > 0) {
            wgmma_product(dv_sums, weights, grad_tile(before), step > 1);
            wgmma_product(dk_sums, gradients, q_tile(before), step > 1);
            ptx_wgmma_wait<0>();
            wgmma_settle(dv_sums), wgmma_settle(dk_sums);
            weights.settle(), gradients.settle();
        }
    }
    // Queries without keys spread their gradient over all values.
    const bool may_be_blind = dv && (mask || query_mask || key_mask || (causal && keys < queries));
    if (may_be_blind) {
        const auto blind = [&](i64 row) { return all_statistics[row].largest == infinity(); };
        for (member = 0; member < members; ++member) {
            set_head(first_head + member);
            for (query = 0; query < queries; query += N) {
                const i32 row = query + threadIdx.x;
                const bool any = threadIdx.x < N && row < queries && blind((i64)member * queries + row);
                if (!__syncthreads_or(any)) continue;
                copy_rows<N, BACKWARD_THREADS>(grad_tile(0), grad_rows, query, member * grad_at.strides[1]);
                ptx_cp_async_commit();
                if (threadIdx.x < N) row_statistics[0][threadIdx.x] = {any ? infinity() : 0, 0};
                landed();
                Tiles p;
                p.clear();
                p.spread(scores, row_statistics[0], query, key);
                weights.set(p);
                wgmma_product(dv_sums, weights, grad_tile(0));
                ptx_wgmma_wait<0>();
                wgmma_settle(dv_sums);
                weights.settle();
            }
        }
    }
    __syncthreads();
    if (dk) write_rows(dk, dk_at, batch, kv_head, first, dk_sums, scores.scale, k_tile);
    if (dv) write_rows(dv, dv_at, batch, kv_head, first, dv_sums, scores.factor, v_tile);
#endif
}
