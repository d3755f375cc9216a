// Layer norm, RMS norm and scale norm over the last dimension, of a tensor or of the sum of two.
//
//   forward:  s = x + residual, y = (s - mean) inverse weight + bias
//   backward: ds = onto + (h - mean h - n mean(h n)) inverse, dweight = sum_rows g n, dbias = sum_rows g
//             with n = (s - mean) inverse and h = g weight; onto is the gradient of s from its other uses
//
// Centred rows (Ba et al., https://arxiv.org/abs/1607.06450) have inverse = 1 / sqrt(variance + eps). Others (Zhang and
// Sennrich, https://arxiv.org/abs/1910.07467) have mean = mean h = 0 and inverse = 1 / max(sqrt(mean s^2), eps); where
// that floor acts, the divisor is a constant and mean(h n) counts as 0. Those of form MEAN_SQUARE have inverse =
// 1 / sqrt(mean s^2 + eps), and backward they are rows with a floor of 0.
//
// Shapes: y, sum, x, residual, dx, g, onto [rows, columns], packed; statistics [rows, 2] mean and inverse, or [rows, 1]
// inverse alone; weight [columns], [1] or none, bias [columns] or none; partials [chunks, 2 columns], sums for weight
// and for bias. T: f32, f64, bf16, f16; statistics and sums in f32 (f64 for f64). The norm is that of the rounded sum.
// Variants: DTYPE=FLOATS
//
// norm_fwd and norm_bwd: a row for one warp, or for all warps of a block, which hold it in registers, up to HELD
// packets per thread; the rest of a longer row is read again, from the caches if it stays there. The variance is
// computed from the deviations from the mean, so that rows far from zero lose no digits. Rows are a grid apart.
// norm_bwd_whole, for rows of at most one packet per thread of a block: threads own columns of several rows at once, so
// that the gradients of weight and bias accumulate in registers. A barrier serves ROWS rows of each group of threads. A
// block takes a chunk of neighbouring rows; reduce_chunks adds up the chunks, in order. For longer rows, or if only
// these sums are needed, norm_bwd_sums: a thread sums a few columns over every eighth row of a chunk. Moves 2 sizeof(T)
// per element forward, 4 with a residual; 3 backward, 4 with onto; 2 for norm_bwd_sums. Limited by memory bandwidth;
// for few rows by the latency of the reductions.

#include "common.cuh"
#include "columns.cuh"
#include "rows.cuh"

// Consecutive values of a weight or bias, `none` where there is no such tensor.
template <bool PACKED> struct Values {
    Acc lane[LANES];

    __device__ __forceinline__ Values(const T* from, i32 j, i32 left, Acc none) {
        if (from == nullptr) {
#pragma unroll
            for (int i = 0; i < LANES; ++i) lane[i] = none;
        } else {
            const auto packet = fetch<PACKED>(from, j, left);
#pragma unroll
            for (int i = 0; i < LANES; ++i) lane[i] = Element<T>::to_acc(packet.lane[i]);
        }
    }
};

// A weight of one element applies to all features: it is the only factor of the row.
__device__ __forceinline__ const T* weight_of_each(const T* weight, u32 weights, u32 columns, u32 first) {
    return weight != nullptr && weights == columns ? weight + first : nullptr;
}

__device__ __forceinline__ Acc weight_of_all(const T* weight, u32 weights, u32 columns) {
    return weight != nullptr && weights != columns ? Element<T>::to_acc(weight[0]) : Acc(1);
}

// Divisor of a row, from the mean square of its deviations from the mean.
constexpr u32 FLOORED = 0, CENTRED = 1;

__device__ __forceinline__ Acc divisor(u32 form, Acc square, Acc eps) {
    const Acc root = sqrt(form == FLOORED ? square : square + eps);
    // Not fmax, which would turn NaN into a number.
    return form == FLOORED && eps > root ? eps : root;
}

// A power of two for rows whose squares or whose sum overflow, and its inverse, as in src/ops/norm/forward.rs.
__device__ constexpr Acc power(int n) { return n == 0 ? Acc(1) : Acc(1099511627776.0) * power(n - 1); }
constexpr Acc GROW = power(sizeof(Acc) == 8 ? 15 : 2), SHRINK = 1 / GROW;

// Statistics that normalise a row, and the saved ones: n = (s shrink - mean) inverse.
struct Normal {
    Acc shrink, mean, inverse, saved_mean, saved_inverse;
};

// Statistics of a row whose squares or whose sum overflowed: its threads read it several times.
template <bool PACKED>
__device__ __forceinline__ Normal shrunk(const Row<PACKED>& row, u32 columns, u32 form, Acc eps) {
    const bool centred = form == CENTRED;
    Acc mean = 0;
    if (centred) {
        mean = row.sum_again([](Acc value) { return value * SHRINK; }) / columns;
        // Subtract the rounding error of the mean, or a row of equal numbers would have a non-zero deviation.
        mean += row.sum_again([=](Acc value) { return value * SHRINK - mean; }) / columns;
    }
    const auto deviation = [=](Acc value) { return value * SHRINK - mean; };
    const Acc square = row.sum_again([=](Acc value) { return deviation(value) * deviation(value); }) / columns;
    const Acc once = eps * SHRINK;
    const bool equal = centred && square == 0 && eps > 0;
    const Acc inverse = equal ? 0 : 1 / divisor(form, square, form == FLOORED ? once : once * SHRINK);
    return {SHRINK, mean, inverse, mean * GROW, equal ? 1 / sqrt(eps) : inverse * SHRINK};
}

// Number of rows that do not fill a GPU.
constexpr i64 FEW = 1024;

template <bool PACKED>
__device__ __forceinline__ void forward(T* y, T* sum, Acc* statistics, const T* x, const T* residual, const T* weight,
                                        const T* bias, i64 rows, u32 columns, u32 weights, u32 form, Acc eps) {
    const u32 first = first_column();
    const i32 left = (i32)columns - (i32)first;
    const T* each = weight_of_each(weight, weights, columns, first);
    const T* summands = bias == nullptr ? nullptr : bias + first;
    const Acc common = weight_of_all(weight, weights, columns);
    const bool centred = form == CENTRED;
    const i64 step = (i64)gridDim.x * blockDim.y;
    // With few rows, loading the weights stalls, since they are not in the caches yet.
    if (PACKED && rows <= FEW) {
        for_packets<PACKED>(left, [&](i32 j, u32) {
            if (each != nullptr) ptx_prefetch(each + j);
            if (summands != nullptr) ptx_prefetch(summands + j);
        });
    }
    for (i64 row = (i64)blockIdx.x * blockDim.y + threadIdx.y; row < rows; row += step) {
        const i64 start = row * columns + first;
        Row<PACKED> values(x + start, left);
        if (residual != nullptr) values.add(sum + start, residual + start);
        const Acc mean = centred ? values.sum([](Acc value) { return value; }) / columns : 0;
        values.forget();
        const Acc square = values.sum([=](Acc value) { return (value - mean) * (value - mean); }) / columns;
        values.forget();
        T* to = y + start;
        const auto result = [&](i32 j, Packet<LANES> packet, auto normal) {
            const Values<PACKED> factor(each, j, left, common), summand(summands, j, left, 0);
#pragma unroll
            for (int lane = 0; lane < LANES; ++lane) {
                const Acc value = normal(Element<T>::to_acc(packet.lane[lane]));
                packet.lane[lane] = Element<T>::from_acc(value * factor.lane[lane] + summand.lane[lane]);
            }
            return packet;
        };
        Acc saved_mean = mean, saved_inverse = 1 / divisor(form, square, eps);
        // The same for all threads of the row, and a row of several warps has its block to itself.
        if (isfinite(square)) {
            const Acc inverse = saved_inverse;
            const auto normal = [=](Acc value) { return (value - mean) * inverse; };
            for_packets<PACKED>(left, [&](i32 j, u32 k) {
                put<PACKED>(to, j, left, result(j, values.at(j, k), normal));
            });
        } else {
            const Normal by = shrunk<PACKED>(values, columns, form, eps);
            const auto normal = [=](Acc value) { return (value * by.shrink - by.mean) * by.inverse; };
            values.again([&](i32 j) {
                put<PACKED>(to, j, left, result(j, fetch<PACKED>(values.from, j, left), normal));
            });
            saved_mean = by.saved_mean;
            saved_inverse = by.saved_inverse;
        }
        if (threadIdx.x == 0) {
            if (centred) statistics[2 * row] = saved_mean;
            statistics[centred ? 2 * row + 1 : row] = saved_inverse;
        }
    }
}

extern "C" __global__ void __launch_bounds__(ROW_THREADS, ROW_BLOCKS)
    norm_fwd(T* y, T* sum, Acc* statistics, const T* x, const T* residual, const T* weight, const T* bias, i64 rows,
             u32 columns, u32 weights, u32 form, f64 eps) {
    const bool packed = columns % LANES == 0 && aligned(y) && aligned(sum) && aligned(x) && aligned(residual) &&
                        aligned(weight) && aligned(bias);
    if (packed && columns <= HELD * LANES * blockDim.x) {
        forward<true>(y, sum, statistics, x, residual, weight, bias, rows, columns, weights, form, (Acc)eps);
    } else {
        forward<false>(y, sum, statistics, x, residual, weight, bias, rows, columns, weights, form, (Acc)eps);
    }
}

// Statistics that normalised a row: n = (s scale - offset) slope. The scale is a power of two, 1 unless numbers are so
// far apart that a difference could overflow.
struct Statistics {
    Acc inverse, scale, offset, slope;

    __device__ __forceinline__ Statistics(Acc mean, Acc inverse) : inverse(inverse) {
        const bool far = inverse < 8 / -lowest<Acc>();
        scale = far ? Acc(0.25) : Acc(1);
        offset = mean * scale;
        slope = far ? inverse * 4 : inverse;
    }

    __device__ __forceinline__ Statistics(const Acc* of_rows, i64 row, u32 centred)
        : Statistics(centred ? of_rows[2 * row] : 0, of_rows[centred ? 2 * row + 1 : row]) {}

    __device__ __forceinline__ Acc normal(T x) const { return (Element<T>::to_acc(x) * scale - offset) * slope; }
};

// True if the floor of the divisor acted, which then was a constant.
__device__ __forceinline__ bool floored(Acc inverse, u32 centred, Acc eps) { return !centred && inverse >= 1 / eps; }

// The gradient of rows. `dx` may be `g` or `onto`: an element is read before it is written, by one thread.
template <bool PACKED>
__device__ __forceinline__ void backward(T* dx, const T* x, const T* g, const T* onto, const T* weight,
                                         const Acc* statistics, i64 rows, u32 columns, u32 weights, u32 centred,
                                         Acc eps) {
    const u32 first = first_column();
    const i32 left = (i32)columns - (i32)first;
    const T* each = weight_of_each(weight, weights, columns, first);
    const Acc common = weight_of_all(weight, weights, columns);
    const i64 step = (i64)gridDim.x * blockDim.y;
    for (i64 row = (i64)blockIdx.x * blockDim.y + threadIdx.y; row < rows; row += step) {
        const i64 start = row * columns + first;
        Row<PACKED> values(x + start, left), gradients(g + start, left);
        const Statistics of_row(statistics, row, centred);
        Acc sum = 0, dot = 0;
        for_packets<PACKED>(left, [&](i32 j, u32 k) {
            const auto value = values.at(j, k), gradient = gradients.at(j, k);
            const Values<PACKED> factor(each, j, left, common);
            for_lanes<PACKED>(j, left, [&](int lane) {
                const Acc h = Element<T>::to_acc(gradient.lane[lane]) * factor.lane[lane];
                sum += h;
                dot += h * of_row.normal(value.lane[lane]);
            });
        });
        const Acc mean = centred ? sum_row(sum) / columns : 0;
        const Acc mean_dot = sum_row(dot) / columns;
        const Acc across = floored(of_row.inverse, centred, eps) ? 0 : mean_dot;
        values.forget();
        gradients.forget();
        for_packets<PACKED>(left, [&](i32 j, u32 k) {
            const auto value = values.at(j, k);
            auto packet = gradients.at(j, k);
            Packet<LANES> summands = {};
            if (onto != nullptr) summands = fetch<PACKED>(onto + start, j, left);
            const Values<PACKED> factor(each, j, left, common);
#pragma unroll
            for (int lane = 0; lane < LANES; ++lane) {
                const Acc h = Element<T>::to_acc(packet.lane[lane]) * factor.lane[lane];
                const Acc gradient = (h - mean - of_row.normal(value.lane[lane]) * across) * of_row.inverse;
                packet.lane[lane] = Element<T>::from_acc(gradient + Element<T>::to_acc(summands.lane[lane]));
            }
            put<PACKED>(dx + start, j, left, packet);
        });
    }
}

extern "C" __global__ void __launch_bounds__(ROW_THREADS, 2)
    norm_bwd(T* dx, const T* x, const T* g, const T* onto, const T* weight, const Acc* statistics, i64 rows,
             u32 columns, u32 weights, u32 centred, f64 eps) {
    const bool packed = columns % LANES == 0 && aligned(dx) && aligned(x) && aligned(g) && aligned(onto) &&
                        aligned(weight);
    if (packed && columns <= HELD * LANES * blockDim.x) {
        backward<true>(dx, x, g, onto, weight, statistics, rows, columns, weights, centred, (Acc)eps);
    } else {
        backward<false>(dx, x, g, onto, weight, statistics, rows, columns, weights, centred, (Acc)eps);
    }
}

// Maximum threads of a block of norm_bwd_whole, and rows that each works on at once.
constexpr u32 THREADS = 512;
constexpr int ROWS = 4;

// Adds ROWS pairs up over the threads of a row; each thread receives the `sums`. Lanes add up half of their values and
// pass on the other half, until each has one sum of a part of a pair.
struct Sums {
    Acc lane[2 * ROWS];
};
static_assert(2 * ROWS == 8, "the halving below");

__device__ __forceinline__ Sums sum_rows(Sums sums, Acc (*shared)[2 * ROWS]) {
    const u32 lane = threadIdx.x % 32, warps = blockDim.x / 32;
#pragma unroll
    for (int half = ROWS; half > 0; half /= 2) {
        // Bits 2, 1 and 0 of the lane say which of the sums it ends with.
        const bool upper = lane & half;
#pragma unroll
        for (int i = 0; i < half; ++i) {
            const Acc kept = upper ? sums.lane[i + half] : sums.lane[i];
            const Acc passed = upper ? sums.lane[i] : sums.lane[i + half];
            sums.lane[i] = kept + __shfl_xor_sync(0xFFFFFFFF, passed, half);
        }
    }
    Acc total = sums.lane[0];
    total += __shfl_xor_sync(0xFFFFFFFF, total, 8);
    total += __shfl_xor_sync(0xFFFFFFFF, total, 16);
    if (lane < 2 * ROWS) shared[threadIdx.x / 32][lane] = total;
    if (warps == 1) {
        __syncwarp();
    } else {
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < 2 * ROWS; ++i) sums.lane[i] = shared[0][i];
#pragma unroll 1
    for (u32 warp = 1; warp < warps; ++warp) {
#pragma unroll
        for (int i = 0; i < 2 * ROWS; ++i) sums.lane[i] += shared[warp][i];
    }
    return sums;
}

// Chunk blockIdx.x of the rows. columns <= blockDim.x LANES, a multiple of LANES; all but the weight aligned.
extern "C" __global__ void __launch_bounds__(THREADS)
    norm_bwd_whole(T* dx, Acc* partials, const T* x, const T* g, const T* onto, const T* weight, const Acc* statistics,
                   i64 rows, i64 rows_per_chunk, u32 columns, u32 weights, u32 centred, f64 eps) {
    // Of the warps of a block, for one step and the next, so that a barrier a step is enough.
    __shared__ __align__(16) Acc of_warps[2][THREADS / 32][2 * ROWS];
    const i64 first = blockIdx.x * rows_per_chunk, last = min(first + rows_per_chunk, rows);
    const u32 column = threadIdx.x * LANES, warps = blockDim.x / 32;
    const i32 left = (i32)columns - (i32)column;
    const Values<false> factor(weight_of_each(weight, weights, columns, column), 0, left,
                               weight_of_all(weight, weights, columns));
    const Acc share = Acc(1) / columns;
    Acc dweight[LANES] = {}, dbias[LANES] = {};
    u32 step = 0;
    for (i64 start = first; start < last; start += blockDim.y * ROWS, step ^= 1) {
        const i64 top = start + threadIdx.y * ROWS;
        Raw<LANES> values[ROWS], gradients[ROWS], summands[ROWS];
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
            const bool inside = left > 0 && top + i < last;
            const i64 at = (top + i) * columns + column;
            values[i] = Raw<LANES>(x + at, inside);
            gradients[i] = Raw<LANES>(g + at, inside);
            if (onto != nullptr) summands[i] = Raw<LANES>(onto + at, inside);
        }
        Sums sums = {};
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
            if (left <= 0 || top + i >= last) continue;
            const Statistics of_row(statistics, top + i, centred);
            const Packet<LANES> value = values[i], gradient = gradients[i];
#pragma unroll
            for (int lane = 0; lane < LANES; ++lane) {
                const Acc grad = Element<T>::to_acc(gradient.lane[lane]);
                const Acc normal = of_row.normal(value.lane[lane]), h = grad * factor.lane[lane];
                dweight[lane] += grad * normal;
                dbias[lane] += grad;
                sums.lane[2 * i] += h;
                sums.lane[2 * i + 1] += h * normal;
            }
        }
        sums = sum_rows(sums, of_warps[step] + threadIdx.y * warps);
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
            if (left <= 0 || top + i >= last) continue;
            values[i].forget();
            gradients[i].forget();
            const Statistics of_row(statistics, top + i, centred);
            const Acc mean = centred ? sums.lane[2 * i] * share : 0;
            const Acc across = floored(of_row.inverse, centred, (Acc)eps) ? 0 : sums.lane[2 * i + 1] * share;
            const Packet<LANES> value = values[i], gradient = gradients[i], summand = summands[i];
            Packet<LANES> packet;
#pragma unroll
            for (int lane = 0; lane < LANES; ++lane) {
                const Acc h = Element<T>::to_acc(gradient.lane[lane]) * factor.lane[lane];
                const Acc result = (h - mean - of_row.normal(value.lane[lane]) * across) * of_row.inverse;
                packet.lane[lane] = Element<T>::from_acc(result + Element<T>::to_acc(summand.lane[lane]));
            }
            store(dx + (top + i) * columns + column, packet);
        }
    }
    // The groups of threads of a block, in order.
    __shared__ Acc of_groups[LANES][THREADS];
    Acc* partial = partials + (i64)blockIdx.x * 2 * columns;
#pragma unroll
    for (u32 which = 0; which < 2; ++which) {
        __syncthreads();
#pragma unroll
        for (int lane = 0; lane < LANES; ++lane) {
            of_groups[lane][threadIdx.y * blockDim.x + threadIdx.x] = which ? dbias[lane] : dweight[lane];
        }
        __syncthreads();
        const u32 threads = blockDim.x * blockDim.y;
        for (u32 i = threadIdx.y * blockDim.x + threadIdx.x; i < columns; i += threads) {
            Acc total = 0;
            for (u32 group = 0; group < blockDim.y; ++group) {
                total += of_groups[i % LANES][group * blockDim.x + i / LANES];
            }
            partial[which * columns + i] = total;
        }
    }
}

// Chunk blockIdx.y of the rows; a grid of any width in x.
extern "C" __global__ void norm_bwd_sums(Acc* partials, const T* x, const T* g, const Acc* statistics, i64 rows,
                                         i64 rows_per_chunk, u32 columns, u32 centred) {
    Acc* partial = partials + (i64)blockIdx.y * 2 * columns;
    const i64 first = blockIdx.y * rows_per_chunk, last = min(first + rows_per_chunk, rows);
    for_columns(columns, aligned(x) && aligned(g), [&](u32 column, auto lanes) {
        Acc dweight[lanes.COUNT] = {}, dbias[lanes.COUNT] = {};
        for (i64 row = first + threadIdx.y; row < last && column < columns; row += HEIGHT) {
            const i64 at = row * columns + column;
            const auto value = load<lanes.COUNT>(x + at), gradient = load<lanes.COUNT>(g + at);
            const Statistics of_row(statistics, row, centred);
#pragma unroll
            for (int lane = 0; lane < lanes.COUNT; ++lane) {
                const Acc grad = Element<T>::to_acc(gradient.lane[lane]);
                dweight[lane] += grad * of_row.normal(value.lane[lane]);
                dbias[lane] += grad;
            }
        }
        store_sums(partial, dweight, column, columns);
        store_sums(partial + columns, dbias, column, columns);
    });
}
