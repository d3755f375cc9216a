// Attention, forward: out = dropout(softmax(scale q kᵀ + biases)) v, see src/ops/attention/mod.rs for the semantics.
//
// Shapes: q [batch, heads, query, d], k [batch, kv_heads, key, d], v [batch, kv_heads, key, e], out like q with e
// features, each with its own strides and packed features; statistics [batch, heads, query]; residual like out, or
// null: the rounding error of the output. Head h uses key head h / (heads / kv_heads).
// T: f32, f64, bf16, f16; products, statistics and sums in f32 (f64 for f64).
//
// A block owns TILE queries of a head and up to GROUPS · TILE features of the values. It walks over the tiles of keys
// that causality and the maximum past leave, with a running maximum and sum per query (Dao et al., "FlashAttention",
// 2022, and "FlashAttention-2", 2023), so that scores exist only in registers and shared memory. Blocks of one head
// are neighbours, because they share keys; the last queries come first, because causality leaves them the most work.
// 2 (d + e) operations per score and 2 sizeof(T) (d + e) bytes of keys and values per TILE scores, from the caches:
// limited by multiply-adds.
//
// Variants: DTYPE=FLOATS

#include "common.cuh"
#include "attention.cuh"
#include "attention_tile.cuh"

// Tiles of features that a block accumulates.
constexpr i32 GROUPS = 2;

extern "C" __global__ void __launch_bounds__(TILE_THREADS, 2) attention_fwd(
    T* out, Statistics* statistics, T* residual, const T* q, const T* k, const T* v, SPEC_INPUTS, Layout out_at,
    Layout q_at, Layout k_at, Layout v_at, SPEC_VALUES) {
    __shared__ Shared shared;
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
    }
    __syncthreads();
    const Scores& scores = shared.of_head;

    Square acc[GROUPS] = {};
    const auto add_values = [&](const Square& weights, i32 key) {
        put_scores(shared, weights);
        if (scores.drops) drop_scores(shared, query, key);
#pragma unroll
        for (i32 group = 0; group < GROUPS; ++group) {
            if (column + group * TILE < shared.v.features) {
                add_product<false>(acc[group], shared, queries - query, shared.v, key, column + group * TILE);
            }
        }
    };

    Acc max[SIDE], sum[SIDE];
#pragma unroll
    for (i32 r = 0; r < SIDE; ++r) {
        // One thread of the row has the sink.
        max[r] = scores.sink, sum[r] = max[r] > -infinity() && thread_column() == 0 ? scores.part : 0;
    }
    const Span seen = scores.keys_of(query, min(query + TILE, queries) - 1);
    for (i32 key = seen.start / TILE * TILE; key < seen.end; key += TILE) {
        if (!scores.any_key(key, TILE)) continue;
        Square s;
        multiply_rows(s, shared, shared.q, query, shared.k, key);
        finish_scores(s, shared, query, key);
#pragma unroll
        for (i32 r = 0; r < SIDE; ++r) {
            Acc larger = max[r], total = 0;
#pragma unroll
            for (i32 c = 0; c < SIDE; ++c) larger = fmax(larger, s[r][c]);
            larger = reduce_tile_row(larger, [](Acc a, Acc b) { return fmax(a, b); });
            // If no key was kept so far, every exponential must be 0, not NaN.
            const Acc base = larger == -infinity() ? 0 : larger;
#pragma unroll
            for (i32 c = 0; c < SIDE; ++c) total += s[r][c] = exp(s[r][c] - base) * scores.part;
            const Acc correction = exp(max[r] - base);
            // Each thread sums its own columns; the row is combined after the last tile.
            sum[r] = sum[r] * correction + total;
            max[r] = larger;
#pragma unroll
            for (i32 group = 0; group < GROUPS; ++group) {
#pragma unroll
                for (i32 c = 0; c < SIDE; ++c) acc[group][r][c] *= correction;
            }
        }
        add_values(s, key);
    }

    bool empty = false;
#pragma unroll
    for (i32 r = 0; r < SIDE; ++r) {
        sum[r] = reduce_tile_row(sum[r], [](Acc a, Acc b) { return a + b; });
        empty |= sum[r] == 0 && query + thread_row() * SIDE + r < queries;
        // Where a score is infinite, the sum is NaN.
        if (sum[r] != sum[r]) max[r] = sum[r];
    }
    if (__syncthreads_or(empty)) {
        bool blind[SIDE];
#pragma unroll
        for (i32 r = 0; r < SIDE; ++r) {
            const i32 row = query + thread_row() * SIDE + r;
            const bool none = sum[r] == 0 && row < queries;
            u32 left = none ? scores.left_to(row, thread_column(), ACROSS) : 0;
            left = reduce_tile_row(left, [](u32 a, u32 b) { return a | b; });
            blind[r] = none && left == 0;
            if (!none) continue;
            max[r] = left == 0 ? infinity() : left == 1 ? 0 : infinity() - infinity();
            // Queries without weights have a sum that divides nothing.
            sum[r] = left == 0 ? scores.part * scores.keys : left == 1 ? infinity() : max[r];
        }
        for (i32 key = 0; key < keys; key += TILE) {
            Square s;
#pragma unroll
            for (i32 r = 0; r < SIDE; ++r) {
#pragma unroll
                for (i32 c = 0; c < SIDE; ++c) s[r][c] = blind[r] ? scores.part : 0;
            }
            add_values(s, key);
        }
    }
#pragma unroll
    for (i32 r = 0; r < SIDE; ++r) {
        const i32 row = query + thread_row() * SIDE + r;
        if (row < queries && thread_column() == 0 && blockIdx.y == 0) {
            const bool blind = max[r] == infinity();
            statistics[(i64)index * queries + row] = {max[r], blind ? 0 : scores.part / sum[r]};
        }
        const Acc factor_of_row = 1 / (row < queries ? sum[r] : 1);
#pragma unroll
        for (i32 group = 0; group < GROUPS; ++group) {
#pragma unroll
            for (i32 c = 0; c < SIDE; ++c) {
                Acc& value = acc[group][r][c];
                value = scores.drops ? value * factor_of_row : mean_of(value, factor_of_row);
            }
        }
    }
#pragma unroll
    for (i32 group = 0; group < GROUPS; ++group) {
        write_rows(out, out_at, batch, head, query, column + group * TILE, acc[group], 1, residual);
    }
}
