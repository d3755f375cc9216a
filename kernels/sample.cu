// The next token of each row of logits: filter, temperature and draw (src/ops/sample.rs describes the filters).
//
//   weight_j = round(unit exp((x_j - max x) scale)),  token = first j with weight_0 + … + weight_j > draw · all weights
//
// Shapes: token [rows], x [rows, columns]. T: f32, f64, bf16, f16.
// Variants: DTYPE=FLOATS
//
// Weights are integers: their sums do not depend on the order, so that any number of threads, and the CPU, choose the
// same token. Nothing is sorted: logits become unsigned keys of the same order, and the key where the filter ends is
// found two bits per pass, from the sums over the keys not below each of three candidates. A block takes a row, at once
// or a grid apart.
// Reads a row from memory once and from the caches 5 times without a filter, 5 + 4 sizeof(T) times with top-k and
// top-p. Limited by the latency of the reductions, and by the single multiprocessor of a row.

#include "common.cuh"
#include "exact.cuh"
#include "philox.cuh"

constexpr u32 THREADS = 512, WARPS = THREADS / 32;

// Thresholds of entmax go from -1 on in this many steps per unit.
constexpr u32 THRESHOLD_STEPS = 1 << 24;

// The constants of src/ops/sample.rs.
enum Filter { ALL, BEST, MASS, TOP_A, MIN_P, ENTMAX };

template <int BYTES> struct Unsigned;
template <> struct Unsigned<2> { typedef unsigned short Type; };
template <> struct Unsigned<4> { typedef u32 Type; };
template <> struct Unsigned<8> { typedef u64 Type; };
typedef Unsigned<sizeof(T)>::Type Key;
typedef Element<T>::Acc Acc;

constexpr int BITS = 8 * sizeof(T);
constexpr Key SIGN = Key(1) << (BITS - 1);

// Ordered as the numbers are, -0 before 0.
__device__ __forceinline__ Key key_of(T x) {
    Key bits;
    memcpy(&bits, &x, sizeof(bits));
    return bits & SIGN ? ~bits : bits | SIGN;
}

// Tokens that may be chosen: keys above `key`, and those equal to it up to a position.
struct Cut {
    Key key;
    u32 position;

    __device__ __forceinline__ bool keeps(Key of, u32 j) const { return of > key || (of == key && j <= position); }
};

// One row, and the values that all its threads share.
struct Row {
    const T* x;
    u32 columns;
    // Of the largest logit.
    Key best;
    Acc max;
    f64 scale;
    f32 unit;

    // (x_j - max) scale, at most 0.
    __device__ __forceinline__ f32 scaled(u32 j, f64 by) const {
        const Acc below = Element<T>::to_acc(x[j]) - max;
        return (f32)(exact(below) * exact((Acc)by)).value;
    }

    __device__ __forceinline__ u64 weight(u32 j, f64 by) const {
        return (u64)rint((exact(exact_exp(scaled(j, by))) * exact(unit)).value);
    }

    // unit max(0, z_j - threshold)^(1 / (alpha - 1)) with z = (alpha - 1) times the scaled logits and alpha = 1.3.
    __device__ __forceinline__ u64 entmax_weight(u32 j, u32 steps) const {
        const f32 threshold = (f32)((i32)steps - (i32)THRESHOLD_STEPS) * (1.0f / THRESHOLD_STEPS);
        const Exact<f32> above = exact(scaled(j, scale)) * exact(0.3f) - exact(threshold);
        if (!(above.value > 0)) return 0;
        const Exact<f32> raised = above * above * above * exact(exact_cbrt(above.value));
        return (u64)rint((raised * exact(unit)).value);
    }
};

// The sum of a measure over the positions, for every thread.
template <typename Measure> __device__ __forceinline__ u64 total(u32 columns, Measure measure) {
    u64 sum = 0;
    for (u32 j = threadIdx.x; j < columns; j += THREADS) sum += measure(j);
    return sum_row(sum);
}

// The sums of three numbers of each thread, for every thread.
__device__ __forceinline__ void sum_rows(u64 (&sums)[3]) {
    __shared__ u64 of_warp[3][WARPS];
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const auto add = [](u64 a, u64 b) { return a + b; };
    // All threads have read the result of an earlier call.
    __syncthreads();
#pragma unroll
    for (int which = 0; which < 3; ++which) {
        const u64 sum = reduce_warp(sums[which], add);
        if (lane == 0) of_warp[which][warp] = sum;
    }
    __syncthreads();
#pragma unroll
    for (int which = 0; which < 3; ++which) sums[which] = reduce_warp(lane < WARPS ? of_warp[which][lane] : 0, add);
}

// The first position at which the measures so far add up to more than `target`; `columns` if there is none.
template <typename Measure> __device__ __forceinline__ u32 locate(u32 columns, u64 target, Measure measure) {
    __shared__ u64 sums[WARPS];
    __shared__ u32 found;
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    // A range of neighbours for each warp.
    const u32 length = (columns + WARPS - 1) / WARPS, begin = min(warp * length, columns);
    const u32 end = min(begin + length, columns);
    u64 sum = 0;
    for (u32 j = begin + lane; j < end; j += 32) sum += measure(j);
    sum = reduce_warp(sum, [](u64 a, u64 b) { return a + b; });
    // All threads have read the result of an earlier call.
    __syncthreads();
    if (lane == 0) sums[warp] = sum;
    if (threadIdx.x == 0) found = columns;
    __syncthreads();
    u64 before = 0;
    for (u32 other = 0; other < warp; ++other) before += sums[other];
    if (before <= target && target - before < sum) {
        for (u32 first = begin; first < end; first += 32) {
            u64 prefix = first + lane < end ? measure(first + lane) : 0;
#pragma unroll
            for (u32 step = 1; step < 32; step *= 2) {
                const u64 other = __shfl_up_sync(0xFFFFFFFF, prefix, step);
                if (lane >= step) prefix += other;
            }
            const u32 beyond = __ballot_sync(0xFFFFFFFF, before + prefix > target);
            if (beyond != 0) {
                if (lane == 0) found = first + __ffs(beyond) - 1;
                break;
            }
            before += __shfl_sync(0xFFFFFFFF, prefix, 31);
        }
    }
    __syncthreads();
    return found;
}

// The best entries until their measures add up to `bound`, the earlier of equal ones first; all if they do not.
template <typename Measure>
__device__ __forceinline__ Cut select(const T* x, u32 columns, u64 bound, Measure measure) {
    // The largest key that entries with at least `bound` reach.
    Key key = 0;
    for (int shift = BITS - 2; shift >= 0; shift -= 2) {
        u64 sums[3] = {};
        for (u32 j = threadIdx.x; j < columns; j += THREADS) {
            const Key of = key_of(x[j]);
            const u64 adds = measure(j);
#pragma unroll
            for (u32 digit = 1; digit < 4; ++digit) {
                sums[digit - 1] += of >= (Key)(key | (Key)digit << shift) ? adds : 0;
            }
        }
        sum_rows(sums);
        const u32 digit = (sums[0] >= bound) + (sums[1] >= bound) + (sums[2] >= bound);
        key |= (Key)digit << shift;
    }
    const u64 above = total(columns, [&](u32 j) { return key_of(x[j]) > key ? measure(j) : 0; });
    const u32 last = locate(columns, bound - above - 1, [&](u32 j) { return key_of(x[j]) == key ? measure(j) : 0; });
    return {key, last};
}

// The largest logit; false if it is not finite or there is a NaN.
__device__ __forceinline__ bool find_best(Row& row) {
    Key best = 0;
    bool broken = false;
    for (u32 j = threadIdx.x; j < row.columns; j += THREADS) {
        const Acc value = Element<T>::to_acc(row.x[j]);
        broken |= value != value;
        best = max((u64)best, (u64)key_of(row.x[j]));
    }
    best = (Key)reduce_row((u64)best, (u64)0, [](u64 a, u64 b) { return a > b ? a : b; });
    broken = sum_row((u32)broken) != 0;
    const Key bits = best & SIGN ? best ^ SIGN : (Key)~best;
    T value;
    memcpy(&value, &bits, sizeof(value));
    row.best = best;
    row.max = Element<T>::to_acc(value);
    return !broken && isfinite(row.max);
}

// The sum of the weights of each row, without filter and temperature; the largest u64 where logits are broken.
extern "C" __global__ void __launch_bounds__(512, 2)
sample_totals(u64* totals, const T* x, i64 rows, u32 columns, f32 unit) {
    for (i64 at = blockIdx.x; at < rows; at += gridDim.x) {
        Row row = {x + at * columns, columns, 0, 0, 1, unit};
        const bool whole = find_best(row);
        const u64 sum = total(columns, [&](u32 j) { return whole ? row.weight(j, 1) : 0; });
        if (threadIdx.x == 0) totals[at] = whole ? sum : ~(u64)0;
    }
}

// limit: for MASS the probability that ends it, for MIN_P and TOP_A the ratio. `closed`, for MASS: if true, a token is
// kept if the better ones have exactly `limit`. scale: 1 / temperature, 0 for the best token. totals: null except for
// TOP_A.
extern "C" __global__ void __launch_bounds__(512, 2)
sample_token(i64* token, i64* fault, const T* x, const u64* totals, const i64* step, i64 rows, u32 columns, u32 filter,
             u32 closed, u64 count, u64 seed, f64 scale, f64 limit, f64 power, f32 unit) {
    for (i64 at = blockIdx.x; at < rows; at += gridDim.x) {
        Row row = {x + at * columns, columns, 0, 0, scale, unit};
        const T* from = row.x;
        if (!find_best(row)) {
            if (threadIdx.x == 0) {
                token[at] = 0;
                report_fault(fault, FAULT_LOGITS, at, rows);
            }
            continue;
        }
        // Condition of the tokens that stay: they are within the cut, or have at least this weight at temperature 1.
        Cut cut = {0, columns};
        f64 least = 0;
        u32 steps = 0;
        if (filter == BEST || filter == MASS) {
            u64 bound = count;
            if (filter == MASS) {
                const u64 sum = total(columns, [&](u32 j) { return row.weight(j, 1); });
                const f64 ends = (exact(limit) * exact((f64)sum)).value;
                // The best token always stays.
                bound = max((u64)1, closed ? (u64)floor(ends) + 1 : (u64)ceil(ends));
            }
            cut = select(from, columns, bound, [&](u32 j) { return filter == MASS ? row.weight(j, 1) : (u64)1; });
        } else if (filter == MIN_P) {
            least = (exact(limit) * exact((f64)unit)).value;
        } else if (filter == TOP_A) {
            u64 least_sum = ~(u64)0;
            for (i64 other = threadIdx.x; other < rows; other += THREADS) least_sum = min(least_sum, totals[other]);
            least_sum = reduce_row(least_sum, ~(u64)0, [](u64 a, u64 b) { return a < b ? a : b; });
            const f64 highest = (exact((f64)unit) / exact((f64)least_sum)).value;
            const f64 exponent = (exact(power) * exact(exact_log(highest))).value;
            const f64 share = (exact((f64)exact_exp((f32)exponent)) * exact(limit)).value;
            least = (exact(share) * exact((f64)totals[at])).value;
        } else if (filter == ENTMAX) {
            // The largest threshold, in steps from -1, at which the weights add up to `unit`.
            for (u32 bit = THRESHOLD_STEPS / 2; bit != 0; bit >>= 1) {
                const u64 sum = total(columns, [&](u32 j) { return row.entmax_weight(j, steps | bit); });
                if (sum >= (u64)unit) steps |= bit;
            }
        }
        const auto weight = [&](u32 j) -> u64 {
            if (filter == ENTMAX) return row.entmax_weight(j, steps);
            const bool reaches = least == 0 || (f64)row.weight(j, 1) >= least;
            if (!reaches || !cut.keeps(key_of(from[j]), j)) return 0;
            return filter == TOP_A ? 1 : row.weight(j, scale);
        };
        const u64 sum = scale == 0 ? 0 : total(columns, weight);
        u32 chosen;
        if (sum == 0) {
            // No temperature, or another row of the batch has put the limit out of reach.
            chosen = locate(columns, 0, [&](u32 j) { return (u64)(key_of(from[j]) == row.best); });
        } else {
            // 53 bits, as Philox::uniform has them.
            const u64 index = step[0];
            const Words words = philox_block(seed, at, index / 2);
            const bool odd = index % 2 != 0;
            const u64 bits = (u64)(odd ? words.word[2] : words.word[0]) << 32 | (odd ? words.word[3] : words.word[1]);
            chosen = locate(columns, __umul64hi(bits >> 11 << 11, sum), weight);
        }
        if (threadIdx.x == 0) token[at] = chosen;
    }
}
