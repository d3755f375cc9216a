// Attention, forward, on tensor cores; shapes and results as in attention_fwd.cu, for rows of up to HEAD features.
//
// A block of four warps owns 64 M queries of a head, 16 M per warp, and walks over tiles of N keys: scores by
// mma.m16n8k16, the running maximum and sum of FlashAttention-2 (Dao, 2023), then the product with the values, whose
// operand is the registers of the weights. Exponentials are to base 2, with the scale folded in.
// M = 2 reads each fragment of keys and values for two products, which halves the traffic of shared memory; that, and
// not the tensor cores, limits M = 1. N is what registers allow without spills.
//
// Variants: DTYPE=bf16,f16 HEAD=32,64,128

#include "common.cuh"
#include "attention.cuh"
#include "attention_mma.cuh"

extern "C" __global__ void __launch_bounds__(MMA_THREADS, 2) attention_mma_fwd(
    T* out, f32* log_sums, const T* q, const T* k, const T* v, const bool* mask, const bool* query_mask,
    const bool* key_mask, const T* bias, const f32* curves, Layout out_at, Layout q_at, Layout k_at, Layout v_at,
    Layout mask_at, Layout bias_at, i32 unmasked, i32 mem_keys, i32 past, i32 causal, f64 scale, u64 seed, u64 stream,
    u64 threshold, f64 factor) {
#if __CUDA_ARCH__ >= 800
    constexpr i32 M = 2, N = HEAD == 128 ? 32 : 64, ROWS = 16 * M * WARPS;
    extern __shared__ uint4 memory[];
    __shared__ Scores scores;
    __shared__ Rows q_rows, k_rows, v_rows;
    const i32 heads = q_at.dims[1], queries = q_at.dims[2], keys = k_at.dims[2];
    const i32 tiles = ceil_div(queries, ROWS), index = blockIdx.x / tiles;
    const i32 batch = index / heads, head = index % heads, first = (tiles - 1 - blockIdx.x % tiles) * ROWS;
    if (threadIdx.x == 0) {
        const Spec spec = {mask,     query_mask, key_mask, bias,  curves, mask_at, bias_at,   unmasked,
                           mem_keys, past,       causal,   scale, seed,   stream,  threshold, factor};
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
    acc.clear();
    f32 max[2 * M], sum[2 * M];
#pragma unroll
    for (i32 r = 0; r < 2 * M; ++r) max[r] = -infinity(), sum[r] = 0;
    i32 key = next(seen.start / N * N), stage = 0;
    copy_rows<ROWS>(q_tile, q_rows, first);
    copy_keys(key, 0);
    while (key < seen.end) {
        const i32 following = next(key + N);
        copy_keys(following, stage ^ 1);
        ptx_cp_async_wait<1>();
        __syncthreads();
        ScoreSums<M, N, false> s;
        s.clear();
        s.add_rows(q_tile, warp_row(16 * M), k_tile(stage));
        const f32 to_log2 = s.finish(scores, query, key);
#pragma unroll
        for (i32 r = 0; r < 2 * M; ++r) {
            f32 larger = -infinity();
#pragma unroll
            for (i32 c = 0; c < s.COLUMNS; ++c) larger = fmax(larger, s.at(r, c));
            larger = fmax(larger, __shfl_xor_sync(0xFFFFFFFF, larger, 1));
            larger = fmax(larger, __shfl_xor_sync(0xFFFFFFFF, larger, 2));
            larger = fmax(max[r], larger * to_log2);
            // With no key kept so far, every exponential must be 0 and not NaN.
            const f32 base = larger == -infinity() ? 0 : larger;
            f32 total = 0;
#pragma unroll
            for (i32 c = 0; c < s.COLUMNS; ++c) total += s.at(r, c) = ptx_exp2(s.at(r, c) * to_log2 - base);
            const f32 correction = ptx_exp2(max[r] - base);
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

    bool blind[2 * M], any_blind = false;
#pragma unroll
    for (i32 r = 0; r < 2 * M; ++r) {
        const i32 row = query + acc.row(r);
        sum[r] += __shfl_xor_sync(0xFFFFFFFF, sum[r], 1);
        sum[r] += __shfl_xor_sync(0xFFFFFFFF, sum[r], 2);
        blind[r] = sum[r] == 0;
        any_blind |= blind[r] && row < queries;
        if (row < queries && threadIdx.x % 4 == 0) {
            log_sums[(i64)index * queries + row] = blind[r] ? infinity() : (max[r] + log2(sum[r])) * LN_2;
        }
    }
    if (__syncthreads_or(any_blind)) {
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
                for (i32 c = 0; c < s.COLUMNS; ++c) s.at(r, c) = blind[r] ? 1 : 0;
            }
            if (scores.drops) s.drop(s.undropped(scores, query, at));
            acc.add_product(s, v_tile(0));
        }
    }
#pragma unroll
    for (i32 r = 0; r < 2 * M; ++r) {
        const f32 divisor = scores.factor / (blind[r] ? keys : sum[r]);
#pragma unroll
        for (i32 c = 0; c < acc.COLUMNS; ++c) acc.at(r, c) *= divisor;
    }
    write_rows(out, out_at, batch, head, first, acc, 1, q_tile);
#endif
}
