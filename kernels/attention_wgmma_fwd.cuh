// The body of attention_wgmma_fwd.cu, parameterized by tile sizes.

#include "common.cuh"

#define SPANS true
#define EXTENDED false

#include "attention.cuh"
#include "attention_mma.cuh"
#include "wgmma.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// Forward pass of blocks of WARPGROUPS · 64 queries over tiles of KEYS keys. If OVERLAP, the product with the values of
// a tile runs while the weights of the next one are computed.
template <i32 WARPGROUPS, i32 KEYS, bool OVERLAP> struct WgmmaForward {
    static constexpr i32 ROWS = 64 * WARPGROUPS, THREADS = WARPGROUP * WARPGROUPS;
    typedef WgmmaTile<ROWS, HEAD> QueryTile;
    typedef WgmmaTile<KEYS, HEAD> KeyTile;

    Sums<1, HEAD> acc;
    WgmmaOperand<KEYS> weights;
    // Of the thread's two rows.
    f32 max[2], sum[2];

    // Turns scores into exponentials of their differences from the largest so far; `correction` receives the factors
    // for the sums so far.
    __device__ __forceinline__ void exponentials(
        ScoreSums<1, KEYS, false>& s, f32 unit, f32 lower, f32 (&correction)[2]) {
#pragma unroll
        for (i32 r = 0; r < 2; ++r) {
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
            correction[r] = ptx_exp2((max[r] - base) * LOG2_E);
            sum[r] = sum[r] * correction[r] + total;
            max[r] = larger;
        }
    }

    __device__ __forceinline__ void rescale(const f32 (&correction)[2]) {
#pragma unroll
        for (i32 r = 0; r < 2; ++r) {
#pragma unroll
            for (i32 c = 0; c < acc.COLUMNS; ++c) acc.at(r, c) *= correction[r];
        }
    }

    // `spec` and layouts are those of the kernel's parameters.
    __device__ __forceinline__ void run(
        T* out, Statistics* statistics, T* residual, const T* q, const T* k, const T* v, const Layout& out_at,
        const Layout& q_at, const Layout& k_at, const Layout& v_at, const Spec& spec) {
        extern __shared__ uint4 memory[];
        __shared__ Scores scores;
        __shared__ Rows q_rows, k_rows, v_rows;
        // Per warp, the keys whose scores need no check.
        __shared__ Span plain[THREADS / 32];
        // Subtracted from exponents of 2.
        __shared__ f32 lower;
        const i32 heads = q_at.dims[1], queries = q_at.dims[2], keys = k_at.dims[2];
        const i32 tiles = ceil_div(queries, ROWS);
        // Blocks with many keys first, of GROUP heads at a time, whose keys and values stay in the second-level cache.
        constexpr i32 GROUP = 16;
        const i32 group = blockIdx.x / (GROUP * tiles) * GROUP, members = min(GROUP, (i32)gridDim.x / tiles - group);
        const i32 place = blockIdx.x - group * tiles, index = group + place % members;
        const i32 first = (tiles - 1 - place / members) * ROWS;
        if (threadIdx.x == 0) {
            lower = 0;
            const i32 batch = index / heads, head = index % heads;
            const i32 kv_head = head / (heads / (i32)k_at.dims[1]);
            scores.set(spec, batch, head, heads, queries, keys);
            q_rows.set(q, q_at, batch, head);
            k_rows.set(k, k_at, batch, kv_head);
            v_rows.set(v, v_at, batch, kv_head);
        }
        __syncthreads();
        T* const start = wgmma_memory(memory);
        const QueryTile q_tile = {start};
        const auto k_tile = [&](i32 stage) { return KeyTile{start + (ROWS + KEYS * stage) * HEAD}; };
        const auto v_tile = [&](i32 stage) { return KeyTile{start + (ROWS + KEYS * (2 + stage)) * HEAD}; };

        const i32 own = warp_row(16), query = first + own, group_row = own / 64 * 64;
        const Span seen = scores.keys_of(first, min(first + ROWS, queries) - 1);
        if (threadIdx.x % 32 == 0) plain[threadIdx.x / 32] = scores.plain_keys(query, query + 15);
        const auto next = [&](i32 key) {
            while (key < seen.end && !scores.any_key(key, KEYS)) key += KEYS;
            return key;
        };
        // Makes the copies of all threads visible to the products.
        const auto landed = [&] {
            ptx_cp_async_wait<0>();
            ptx_fence_async();
            __syncthreads();
        };
        // Recomputes values derived from a position where they are used instead of keeping them in registers.
        const auto here = [](i32 position) { return (i32)ptx_opaque(position); };
        copy_rows<ROWS, THREADS>(q_tile, q_rows, first);
        bool empty;
        // Repeats once if sums overflow.
        for (bool done = false; !done;) {
            acc.clear();
            max[0] = max[1] = -infinity(), sum[0] = sum[1] = 0;
            i32 key = next(seen.start / KEYS * KEYS), stage = 0;
            if (key < seen.end) copy_rows<KEYS, THREADS>(k_tile(0), k_rows, key);
            if constexpr (OVERLAP) {
                ptx_cp_async_commit();
                weights.clear();
                // Number of tiles so far. The product before the first one is with zeros, and its result is
                // overwritten.
                i32 count = 0;
                while (key < seen.end) {
                    const i32 following = next(key + KEYS);
                    landed();
                    if (following < seen.end) copy_rows<KEYS, THREADS>(k_tile(stage ^ 1), k_rows, following);
                    copy_rows<KEYS, THREADS>(v_tile(stage), v_rows, key);
                    ptx_cp_async_commit();
                    ScoreSums<1, KEYS, false> s;
                    wgmma_rows(s, q_tile, group_row, k_tile(stage));
                    wgmma_product(acc, weights, count > 0 ? v_tile(stage ^ 1) : k_tile(0), count > 1);
                    ptx_wgmma_wait<1>();
                    wgmma_settle(s);
                    f32 correction[2];
                    const f32 unit = s.finish(scores, here(query), key, plain[threadIdx.x / 32], key, KEYS);
                    exponentials(s, unit, lower, correction);
                    if (scores.drops) s.drop(s.undropped(scores, here(query), key));
                    // Computed before the wait instead of at their use.
                    wgmma_settle(s);
                    ptx_wgmma_wait<0>();
                    wgmma_settle(acc);
                    weights.settle();
                    rescale(correction);
                    weights.set(s);
                    key = following, stage ^= 1, ++count;
                }
                landed();
                if (count > 0) {
                    wgmma_product(acc, weights, v_tile(stage ^ 1), count > 1);
                    ptx_wgmma_wait<0>();
                    wgmma_settle(acc);
                    weights.settle();
                }
            } else {
                if (key < seen.end) copy_rows<KEYS, THREADS>(v_tile(0), v_rows, key);
                ptx_cp_async_commit();
                while (key < seen.end) {
                    const i32 following = next(key + KEYS);
                    landed();
                    if (following < seen.end) {
                        copy_rows<KEYS, THREADS>(k_tile(stage ^ 1), k_rows, following);
                        copy_rows<KEYS, THREADS>(v_tile(stage ^ 1), v_rows, following);
                    }
                    ptx_cp_async_commit();
                    ScoreSums<1, KEYS, false> s;
                    wgmma_rows(s, q_tile, group_row, k_tile(stage));
                    ptx_wgmma_wait<0>();
                    wgmma_settle(s);
                    f32 correction[2];
                    const f32 unit = s.finish(scores, here(query), key, plain[threadIdx.x / 32], key, KEYS);
                    exponentials(s, unit, lower, correction);
                    if (scores.drops) s.drop(s.undropped(scores, here(query), key));
                    rescale(correction);
                    weights.set(s);
                    wgmma_product(acc, weights, v_tile(stage));
                    ptx_wgmma_wait<0>();
                    wgmma_settle(acc);
                    weights.settle();
                    key = following, stage ^= 1;
                }
                ptx_cp_async_wait<0>();
            }

            bool overflown = false;
            empty = false, done = true;
#pragma unroll
            for (i32 r = 0; r < 2; ++r) {
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
                    done = false;
                }
            }
        }
        bool blind[2] = {};
        if (__syncthreads_or(empty)) {
#pragma unroll
            for (i32 r = 0; r < 2; ++r) {
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
            for (i32 at = 0; at < keys; at += KEYS) {
                __syncthreads();
                copy_rows<KEYS, THREADS>(v_tile(0), v_rows, at);
                ptx_cp_async_commit();
                landed();
                ScoreSums<1, KEYS, false> s;
#pragma unroll
                for (i32 r = 0; r < 2; ++r) {
#pragma unroll
                    for (i32 c = 0; c < s.COLUMNS; ++c) s.at(r, c) = blind[r] ? scores.part : 0;
                }
                if (scores.drops) s.drop(s.undropped(scores, query, at));
                weights.set(s);
                wgmma_product(acc, weights, v_tile(0));
                ptx_wgmma_wait<0>();
                wgmma_settle(acc);
                weights.settle();
            }
        }
#pragma unroll
        for (i32 r = 0; r < 2; ++r) {
            const i32 row = query + acc.row(r);
            if (statistics && row < queries && threadIdx.x % 4 == 0) {
                statistics[(i64)index * queries + row] = {max[r], blind[r] ? 0 : ptx_exp2(-lower) / sum[r]};
            }
            const f32 divisor = scores.factor / sum[r];
#pragma unroll
            for (i32 c = 0; c < acc.COLUMNS; ++c) {
                f32& value = acc.at(r, c);
                value = scores.drops ? value * divisor : mean_of(value, divisor);
            }
        }
        const i32 batch = here(index) / heads, head = index - batch * heads;
        write_rows(out, out_at, batch, head, first, acc, 1, q_tile);
        if (residual) {
            to_residual(acc);
            __syncwarp();
            write_rows(residual, out_at, batch, head, first, acc, 1, q_tile);
        }
    }
};

#endif
