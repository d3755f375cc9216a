// Attention, forward, on tensor cores; shapes and results as in attention_fwd.cu, for rows of up to HEAD features.
//
// A block of four warps owns 64 M queries of a head, 16 M per warp, and walks over tiles of N keys: scores by
// mma.m16n8k16, the running maximum and sum of FlashAttention-2 (Dao, 2023), then the product with the values, which
// takes the weights from registers. Exponentials are to base 2, with the scale folded in; where scores are large, they
// are subtracted first. If sums of bf16 values near the largest number overflow, everything is recomputed with weights
// smaller by a power of two.
// With M = 2 each fragment of keys and values is read for two products, which halves the traffic of shared memory, the
// bottleneck of M = 1. N is the largest size without spills.
//
// Variants: DTYPE=HALVES HEAD=32,64,128

#include "common.cuh"

#define SPANS (HEAD <= 64)

#include "attention.cuh"
#include "attention_mma.cuh"

extern "C" __global__ void __launch_bounds__(MMA_THREADS, 2) attention_mma_fwd(
    T* out, Statistics* statistics, T* residual, const T* q, const T* k, const T* v, SPEC_INPUTS, Layout out_at,
    Layout q_at, Layout k_at, Layout v_at, SPEC_VALUES) {
#if __CUDA_ARCH__ >= 800
    constexpr i32 M = 2, N = HEAD == 128 ? 32 : 64, ROWS = 16 * M * WARPS;
    extern __shared__ uint4 memory[];
    __shared__ Scores scores;
    __shared__ Rows q_rows, k_rows, v_rows;
    // Subtracted from exponents of 2.
    __shared__ f32 lower;
    const i32 heads = q_at.dims[1], queries = q_at.dims[2], keys = k_at.dims[2];
    const i32 tiles = ceil_div(queries, ROWS), index = blockIdx.x / tiles;
    const i32 batch = index / heads, head = index % heads, first = (tiles - 1 - blockIdx.x % tiles) * ROWS;
    if (threadIdx.x == 0) {
        lower = 0;
        const Spec spec = SPEC;
        const i32 kv_head = head / (heads / (i32)k_at.dims[1]);
        scores.set(spec, batch, head, heads, queries, keys);
        q_rows.set(q, q_at, batch, head);
        k_rows.set(k, k_at, batch, kv_head);
        v_rows.set(v, v_at, batch, kv_head);
    }
    __syncthreads();
    T* const start = reinterpret_cast<T*>(memory);
    const Tile q_tile = {start};
    const auto k_tile = [&](i32 stage) { return Tile{start + (ROWS + 2 * N * stage) * HEAD}; };
    const auto v_tile = [&](i32 stage) { return Tile{start + (ROWS + 2 * N * stage + N) * HEAD}; };

    const i32 query = first + warp_row(16 * M);
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
    f32 max[2 * M], sum[2 * M];
    copy_rows<ROWS>(q_tile, q_rows, first);
again:
    acc.clear();
#pragma unroll
    for (i32 r = 0; r < 2 * M; ++r) {
        // One thread of the row has the sink.
        max[r] = scores.sink, sum[r] = max[r] > -infinity() && threadIdx.x % 4 == 0 ? ptx_exp2(-lower) : 0;
    }
    i32 key = next(seen.start / N * N), stage = 0;
    copy_keys(key, 0);
    while (key < seen.end) {
        const i32 following = next(key + N);
        copy_keys(following, stage ^ 1);
        ptx_cp_async_wait<1>();
        __syncthreads();
        ScoreSums<M, N, false> s;
        s.clear();
        s.add_rows(q_tile, warp_row(16 * M), k_tile(stage));
        const f32 unit = s.finish(scores, query, key);
#pragma unroll
        for (i32 r = 0; r < 2 * M; ++r) {
            f32 larger = -infinity();
#pragma unroll
            for (i32 c = 0; c < s.COLUMNS; ++c) larger = fmax(larger, s.at(r, c));
            larger = fmax(larger, __shfl_xor_sync(0xFFFFFFFF, larger, 1));
            larger = fmax(larger, __shfl_xor_sync(0xFFFFFFFF, larger, 2));
            larger = fmax(max[r], larger * unit);
            // If no key was kept so far, every exponential must be 0, not NaN.
            const f32 base = larger == -infinity() ? 0 : larger;
            f32 to_log2 = unit * LOG2_E, shift = base * LOG2_E;
            if (fabs(base) > LARGE_SCORE) {
#pragma unroll
                for (i32 c = 0; c < s.COLUMNS; ++c) s.at(r, c) = __fsub_rn(__fmul_rn(s.at(r, c), unit), base);
                to_log2 = LOG2_E, shift = 0;
            }
            shift += lower;
            f32 total = 0;
#pragma unroll
            for (i32 c = 0; c < s.COLUMNS; ++c) total += s.at(r, c) = ptx_exp2(s.at(r, c) * to_log2 - shift);
            const f32 correction = ptx_exp2((max[r] - base) * LOG2_E);
            sum[r] = sum[r] * correction + total;
            max[r] = larger;
#pragma unroll
            for (i32 c = 0; c < acc.COLUMNS; ++c) acc.at(r, c) *= correction;
        }
        if (scores.drops) s.drop(s.undropped(scores, query, key));
        acc.add_product(s, v_tile(stage));
        __syncthreads();
        key = following, stage ^= 1;
    }
    ptx_cp_async_wait<0>();

    bool empty = false, overflown = false;
#pragma unroll
    for (i32 r = 0; r < 2 * M; ++r) {
        sum[r] += __shfl_xor_sync(0xFFFFFFFF, sum[r], 1);
        sum[r] += __shfl_xor_sync(0xFFFFFFFF, sum[r], 2);
        empty |= sum[r] == 0 && query + acc.row(r) < queries;
        // Where a score is infinite, the sum is NaN.
        if (sum[r] != sum[r]) max[r] = sum[r];
        if constexpr (!IS_F16) {
#pragma unroll
            for (i32 c = 0; c < acc.COLUMNS; ++c) overflown |= !(fabs(acc.at(r, c)) < infinity());
        }
    }
    if constexpr (!IS_F16) {
        if (__syncthreads_or(overflown) && lower == 0 && scores.part < 1) {
            __syncthreads();
            if (threadIdx.x == 0) lower = -log2(scores.part);
            __syncthreads();
            goto again;
        }
    }
    bool blind[2 * M] = {};
    if (__syncthreads_or(empty)) {
#pragma unroll
        for (i32 r = 0; r < 2 * M; ++r) {
            const i32 row = query + acc.row(r);
            const bool none = sum[r] == 0 && row < queries;
            u32 left = none ? scores.left_to(row, threadIdx.x % 4, 4) : 0;
            left |= __shfl_xor_sync(0xFFFFFFFF, left, 1);
            left |= __shfl_xor_sync(0xFFFFFFFF, left, 2);
            blind[r] = none && left == 0;
            if (!none) continue;
            max[r] = left == 0 ? infinity() : left == 1 ? 0 : infinity() - infinity();
            // Queries without weights have a sum that divides nothing.
            sum[r] = left == 0 ? scores.part * keys : left == 1 ? infinity() : max[r];
        }
        for (i32 at = 0; at < keys; at += N) {
            __syncthreads();
            copy_rows<N>(v_tile(0), v_rows, at);
            ptx_cp_async_commit();
            ptx_cp_async_wait<0>();
            __syncthreads();
            ScoreSums<M, N, false> s;
#pragma unroll
            for (i32 r = 0; r < 2 * M; ++r) {
#pragma unroll
                for (i32 c = 0; c < s.COLUMNS; ++c) s.at(r, c) = blind[r] ? scores.part : 0;
            }
            if (scores.drops) s.drop(s.undropped(scores, query, at));
            acc.add_product(s, v_tile(0));
        }
    }
#pragma unroll
    for (i32 r = 0; r < 2 * M; ++r) {
        const i32 row = query + acc.row(r);
        if (row < queries && threadIdx.x % 4 == 0) {
            statistics[(i64)index * queries + row] = {max[r], blind[r] ? 0 : ptx_exp2(-lower) / sum[r]};
        }
        const f32 divisor = scores.factor / sum[r];
#pragma unroll
        for (i32 c = 0; c < acc.COLUMNS; ++c) {
            f32& value = acc.at(r, c);
            value = scores.drops ? value * divisor : mean_of(value, divisor);
        }
    }
    write_rows(out, out_at, batch, head, first, acc, 1, q_tile);
    if (residual) {
        to_residual(acc);
        __syncwarp();
        write_rows(residual, out_at, batch, head, first, acc, 1, q_tile);
    }
#endif
}
