// Attention, backward. With P the weights, P' the weights after dropout, and D = Σ_e grad ⊙ out, with `out` before
// rounding:
//
//   dv = P'ᵀ grad    ds = P ⊙ (dropout(grad vᵀ) − D)    dq = scale ds k    dk = scale dsᵀ q
//
// times the derivatives of the soft clamp, if there is one,
// and the biases get ds summed over the dimensions they were broadcast to. A key that has the whole weight of a
// query has a ds of 0: dropout(grad vᵀ) − D would only be rounding error. Shapes and types as in attention_fwd.cu;
// delta, which is D, and statistics [batch, heads, query].
//
// The forward pass keeps only the statistics of the scores: each kernel recomputes the tiles that it needs (Dao et al.,
// "FlashAttention", 2022). Each owns its output and walks over the rest in a fixed order, without atomic additions:
//
//   attention_bwd_delta    a warp per query: delta, from the output and, for half types, its residual
//   attention_bwd_queries  a block per tile of queries and tiles of d: dq over the keys, and the block's part of the
//                          gradient of the position bias
//   attention_bwd_keys     a block per tile of keys and tiles of [e, d]: dv and dk over the queries of all heads that
//                          share the keys
//   attention_bwd_bias     a block per tile of the bias: its gradient over all tiles that it was broadcast to. A
//                          separate pass costs two more products if a bias is learned, but needs no scratch memory for
//                          any broadcast shape.
//
// Scores of one tile cost 2 d operations, their gradients 2 e more, each result 2 d or 2 e: limited by multiply-adds.
//
// Variants: DTYPE=FLOATS

#include "common.cuh"
#include "attention.cuh"
#include "attention_position.cuh"
#include "attention_tile.cuh"

// Tiles of a result that a block accumulates.
constexpr i32 GROUPS = 2;

// The weights of a tile before dropout.
__device__ __forceinline__ void weigh(Square& p, Shared& shared, i32 query, i32 key) {
    multiply_rows(p, shared, shared.q, query, shared.k, key);
    finish_scores(p, shared, query, key);
    const i32 first = thread_row() * SIDE, count = shared.q.count - query - first;
    const Statistics* of_rows = shared.statistics + query + first;
#pragma unroll
    for (i32 r = 0; r < SIDE; ++r) {
        // Queries without keys get weight 0, as do rows that do not exist.
        const Statistics of_row = r < count ? of_rows[r] : Statistics{0, 0};
#pragma unroll
        for (i32 c = 0; c < SIDE; ++c) p[r][c] = exp(p[r][c] - of_row.largest) * of_row.share;
    }
}

// The gradient of a tile's scores from its weights.
__device__ __forceinline__ void score_gradients(Square& ds, const Square& p, Shared& shared, i32 query, i32 key) {
    multiply_rows(ds, shared, shared.grad, query, shared.v, key);
    if (shared.of_head.drops) {
        put_scores(shared, ds);
        drop_scores(shared, query, key);
        take_scores(ds, shared);
    }
#pragma unroll
    for (i32 r = 0; r < SIDE; ++r) {
        const i32 row = query + thread_row() * SIDE + r;
        const Acc mean = row < shared.q.count ? shared.delta[row] : 0;
#pragma unroll
        for (i32 c = 0; c < SIDE; ++c) ds[r][c] = (p[r][c] == 1 ? 0 : p[r][c]) * (ds[r][c] - mean);
    }
    if (shared.of_head.bound == 0) return;
    // A row at a time, as unrolled logarithms would be long.
    put_scores(shared, p);
#pragma unroll 1
    for (i32 r = 0; r < SIDE; ++r) {
        const i32 row = query + thread_row() * SIDE + r;
        if (row >= shared.q.count) break;
        const Statistics of_row = shared.statistics[row];
        const Acc part = 1 / shared.of_head.bound, base = of_row.largest - log(of_row.share);
        Vector& values = score_row(shared, r);
#pragma unroll
        for (i32 c = 0; c < SIDE; ++c) values.lane[c] = clamp_slope((log(values.lane[c]) + base) * part);
    }
    Square slopes;
    take_scores(slopes, shared);
#pragma unroll
    for (i32 r = 0; r < SIDE; ++r) {
#pragma unroll
        for (i32 c = 0; c < SIDE; ++c) ds[r][c] *= slopes[r][c];
    }
}

extern "C" __global__ void attention_bwd_delta(
    Acc* delta, const T* out, const T* residual, const T* grad, Layout out_at, Layout grad_at, i64 rows) {
    const i64 step = (i64)gridDim.x * blockDim.y;
    const u32 heads = out_at.dims[1], queries = out_at.dims[2], features = out_at.dims[3];
    for (i64 row = (i64)blockIdx.x * blockDim.y + threadIdx.y; row < rows; row += step) {
        const i64 query = row % queries, head = row / queries % heads, batch = row / queries / heads;
        const auto start = [&](const Layout& at) {
            return at.offset + batch * at.strides[0] + head * at.strides[1] + query * at.strides[2];
        };
        const T* gradients = grad + start(grad_at);
        const auto product = [&](const T* outputs) {
            Acc dot = 0;
            for_row(features, aligned(outputs) && aligned(gradients), [&](u32 j, auto lanes) {
                const auto output = load<lanes.COUNT>(outputs + j), gradient = load<lanes.COUNT>(gradients + j);
#pragma unroll
                for (int lane = 0; lane < lanes.COUNT; ++lane) {
                    dot += Element<T>::to_acc(output.lane[lane]) * Element<T>::to_acc(gradient.lane[lane]);
                }
            });
            return dot;
        };
        Acc dot = product(out + start(out_at));
        if (residual) dot += product(residual + start(out_at)) / (Acc)RESIDUAL_SCALE<T>;
        dot = sum_row(dot);
        if (threadIdx.x == 0) delta[row] = dot;
    }
}

// `bucket_of` [reach + 1] and the parameters after it are those of attention_position.cu; `position` and `dq` are
// skipped if null. `position` [batch, heads, tiles of queries, parameters].
extern "C" __global__ void __launch_bounds__(TILE_THREADS, 2) attention_bwd_queries(
    T* dq, Acc* position, const T* grad, const T* q, const T* k, const T* v, const Statistics* statistics, const Acc*
    delta, const i64* bucket_of, SPEC_INPUTS, Layout dq_at, Layout grad_at, Layout q_at, Layout k_at, Layout v_at, i32
    parameters, i32 reach, i32 behind, SPEC_VALUES) {
    __shared__ Shared shared;
    __shared__ PositionTile<TILE, TILE, Acc> position_tile;
    const i32 heads = q_at.dims[1], queries = q_at.dims[2], keys = k_at.dims[2];
    const i32 tiles = ceil_div(queries, TILE), index = blockIdx.x / tiles;
    const i32 batch = index / heads, head = index % heads;
    const i32 query = (tiles - 1 - blockIdx.x % tiles) * TILE, column = blockIdx.y * GROUPS * TILE;
    if (threadIdx.x == 0) {
        const Spec spec = SPEC;
        const i32 kv_head = head / (heads / (i32)k_at.dims[1]);
        shared.of_head.set(spec, batch, head, heads, queries, keys);
        shared.q.set(q, q_at, batch, head);
        shared.k.set(k, k_at, batch, kv_head);
        shared.v.set(v, v_at, batch, kv_head);
        shared.grad.set(grad, grad_at, batch, head);
        shared.statistics = statistics + (i64)index * queries;
        shared.delta = delta + (i64)index * queries;
    }
    __syncthreads();
    const PositionTerms terms = {bucket_of, linear, parameters, reach, behind, keys - queries};
    Acc* position_sums = position && blockIdx.y == 0 ? position + ((i64)index * tiles + query / TILE) * parameters
                                                     : nullptr;
    if (position_sums) {
        for (i32 parameter = threadIdx.x; parameter < parameters; parameter += blockDim.x) position_sums[parameter] = 0;
    }

    Square acc[GROUPS] = {};
    const Span seen = shared.of_head.keys_of(query, min(query + TILE, queries) - 1);
    for (i32 key = seen.start / TILE * TILE; key < seen.end; key += TILE) {
        if (!shared.of_head.any_key(key, TILE)) continue;
        Square p, ds;
        weigh(p, shared, query, key);
        score_gradients(ds, p, shared, query, key);
        put_scores(shared, ds);
        if (position_sums) position_tile.add(position_sums, shared.scores, SCORE_PITCH, terms, key - query,
                                             max(shared.of_head.unbiased - key, 0));
#pragma unroll
        for (i32 group = 0; group < GROUPS; ++group) {
            if (dq && column + group * TILE < shared.k.features) {
                add_product<false>(acc[group], shared, queries - query, shared.k, key, column + group * TILE);
            }
        }
    }
    if (!dq) return;
#pragma unroll
    for (i32 group = 0; group < GROUPS; ++group) {
        write_rows(dq, dq_at, batch, head, query, column + group * TILE, acc[group], shared.of_head.scale);
    }
}

// `dk` and `dv` are skipped if null. blockIdx.y counts groups of tiles of dv, then those of dk.
extern "C" __global__ void __launch_bounds__(TILE_THREADS, 2) attention_bwd_keys(
    T* dk, T* dv, const T* grad, const T* q, const T* k, const T* v, const Statistics* statistics, const Acc* delta,
    SPEC_INPUTS, Layout dk_at, Layout dv_at, Layout grad_at, Layout q_at, Layout k_at, Layout v_at, SPEC_VALUES) {
    __shared__ Shared shared;
    const i32 heads = q_at.dims[1], queries = q_at.dims[2], kv_heads = k_at.dims[1], keys = k_at.dims[2];
    const i32 tiles = ceil_div(keys, TILE), index = blockIdx.x / tiles, members = heads / kv_heads;
    const i32 batch = index / kv_heads, kv_head = index % kv_heads, key = blockIdx.x % tiles * TILE;
    const i32 value_tiles = dv ? ceil_div(v_at.dims[3], TILE) : 0;
    const i32 all_tiles = value_tiles + (dk ? ceil_div(k_at.dims[3], TILE) : 0);
    const i32 first_tile = blockIdx.y * GROUPS;

    Square acc[GROUPS] = {};
    for (i32 head = kv_head * members; head < (kv_head + 1) * members; ++head) {
        __syncthreads();
        if (threadIdx.x == 0) {
            const Spec spec = SPEC;
            shared.of_head.set(spec, batch, head, heads, queries, keys);
            shared.q.set(q, q_at, batch, head);
            shared.k.set(k, k_at, batch, kv_head);
            shared.v.set(v, v_at, batch, kv_head);
            shared.grad.set(grad, grad_at, batch, head);
            shared.statistics = statistics + ((i64)batch * heads + head) * queries;
            shared.delta = delta + ((i64)batch * heads + head) * queries;
        }
        __syncthreads();
        const Scores& scores = shared.of_head;
        const Span seen = scores.queries_of(key, min(key + TILE, keys) - 1);
        const bool any_key = scores.any_key(key, TILE);
        for (i32 query = 0; query < queries; query += TILE) {
            const bool reached = any_key && query < seen.end && query + TILE > seen.start;
            const bool any_blind = first_tile < value_tiles && blind_query(shared, query);
            if (!reached && !any_blind) continue;
            Square p = {}, ds;
            if (reached) {
                weigh(p, shared, query, key);
                if (first_tile + GROUPS > value_tiles) score_gradients(ds, p, shared, query, key);
            }
            if (any_blind) spread_weights(p, shared, query, key);
#pragma unroll
            for (i32 group = 0; group < GROUPS; ++group) {
                const i32 tile = first_tile + group;
                if (tile < value_tiles) {
                    put_scores(shared, p);
                    if (scores.drops) drop_scores(shared, query, key);
                    add_product<true>(acc[group], shared, keys - key, shared.grad, query, tile * TILE);
                } else if (tile < all_tiles && reached) {
                    put_scores(shared, ds);
                    add_product<true>(acc[group], shared, keys - key, shared.q, query, (tile - value_tiles) * TILE);
                }
            }
        }
    }
#pragma unroll
    for (i32 group = 0; group < GROUPS; ++group) {
        const i32 tile = first_tile + group;
        if (tile < value_tiles) {
            write_rows(dv, dv_at, batch, kv_head, key, tile * TILE, acc[group], 1);
        } else if (tile < all_tiles) {
            write_rows(dk, dk_at, batch, kv_head, key, (tile - value_tiles) * TILE, acc[group], (Acc)scale);
        }
    }
}

// dbias [batch or 1, heads or 1, query or 1, key or 1], packed; `dbias_at` has these sizes.
extern "C" __global__ void __launch_bounds__(TILE_THREADS, 2) attention_bwd_bias(
    T* dbias, const T* grad, const T* q, const T* k, const T* v, const Statistics* statistics, const Acc* delta,
    SPEC_INPUTS, Layout dbias_at, Layout grad_at, Layout q_at, Layout k_at, Layout v_at, SPEC_VALUES) {
    __shared__ Shared shared;
    const i32 batches = q_at.dims[0], heads = q_at.dims[1], queries = q_at.dims[2], keys = k_at.dims[2];
    const i32 own_heads = dbias_at.dims[1], rows = dbias_at.dims[2], columns = dbias_at.dims[3];
    // The tiles of scores that this block sums up: those of one bias tile, or all along dimensions of size 1.
    const i32 row_tiles = ceil_div(rows, TILE), column_tiles = ceil_div(columns, TILE);
    const i32 column_tile = blockIdx.x % column_tiles, row_tile = blockIdx.x / column_tiles % row_tiles;
    const i32 slab = blockIdx.x / column_tiles / row_tiles;
    const auto along = [](i32 size, i32 own, i32 all) { return size == 1 ? Span{0, all} : Span{own, own + 1}; };
    const Span batch_span = along(dbias_at.dims[0], slab / own_heads, batches);
    const Span head_span = along(own_heads, slab % own_heads, heads);
    const Span query_tiles = along(rows, row_tile, ceil_div(queries, TILE));
    const Span key_tiles = along(columns, column_tile, ceil_div(keys, TILE));

    Square sum = {};
    for (i32 batch = batch_span.start; batch < batch_span.end; ++batch) {
        for (i32 head = head_span.start; head < head_span.end; ++head) {
            __syncthreads();
            if (threadIdx.x == 0) {
                const Spec spec = SPEC;
                const i32 kv_head = head / (heads / (i32)k_at.dims[1]);
                shared.of_head.set(spec, batch, head, heads, queries, keys);
                shared.q.set(q, q_at, batch, head);
                shared.k.set(k, k_at, batch, kv_head);
                shared.v.set(v, v_at, batch, kv_head);
                shared.grad.set(grad, grad_at, batch, head);
                shared.statistics = statistics + ((i64)batch * heads + head) * queries;
                shared.delta = delta + ((i64)batch * heads + head) * queries;
            }
            __syncthreads();
            for (i32 query = query_tiles.start * TILE; query < min(query_tiles.end * TILE, queries); query += TILE) {
                const Span seen = shared.of_head.keys_of(query, min(query + TILE, queries) - 1);
                for (i32 key = key_tiles.start * TILE; key < min(key_tiles.end * TILE, keys); key += TILE) {
                    if (key >= seen.end || key + TILE <= seen.start || !shared.of_head.any_key(key, TILE)) continue;
                    Square p, ds;
                    weigh(p, shared, query, key);
                    score_gradients(ds, p, shared, query, key);
#pragma unroll
                    for (i32 r = 0; r < SIDE; ++r) {
#pragma unroll
                        for (i32 c = 0; c < SIDE; ++c) sum[r][c] += ds[r][c];
                    }
                }
            }
        }
    }
    // Rows and columns beyond the scores have summed zeros, so whole tiles can be summed up.
    put_scores(shared, sum);
    __syncthreads();
    T* to = dbias + (i64)slab * rows * columns;
    const i32 height = rows == 1 ? TILE : 1, width = columns == 1 ? TILE : 1;
    for (i32 at = threadIdx.x; at < (TILE / height) * (TILE / width); at += TILE_THREADS) {
        const i32 row = at / (TILE / width), column = at % (TILE / width);
        if (row_tile * TILE + row >= rows || column_tile * TILE + column >= columns) continue;
        Acc total = 0;
        for (i32 r = row; r < row + height; ++r) {
            for (i32 c = column; c < column + width; ++c) total += shared.scores[r * SCORE_PITCH + c];
        }
        to[(i64)(row_tile * TILE + row) * columns + column_tile * TILE + column] = Element<T>::from_acc(total);
    }
}
