// Layer norm, RMS norm and scale norm over the last dimension, of a tensor or of the sum of two.
//
//   forward:  s = x + residual, y = (s - mean) inverse weight + bias
//   backward: ds = onto + (h - mean h - n mean(h n)) inverse, dweight = sum_rows g n, dbias = sum_rows g
//             with n = (s - mean) inverse and h = g weight; onto is what else the gradient of s is made of
//
// Centred rows (Ba et al., https://arxiv.org/abs/1607.06450) have inverse = 1 / sqrt(variance + eps). Others (Zhang and
// Sennrich, https://arxiv.org/abs/1910.07467) have mean = mean h = 0 and inverse = 1 / max(sqrt(mean s^2), eps); where
// that floor acts, the divisor is a constant and mean(h n) counts as 0. Those of form MEAN_SQUARE have inverse =
// 1 / sqrt(mean s^2 + eps), and backward they are rows with a floor of 0.
//
// Shapes: y, sum, x, residual, dx, g, onto [rows, columns], packed; statistics [rows, 2] mean and inverse, or [rows, 1]
// inverse alone; weight [columns], [1] or none, bias [columns] or none; partials [chunks, 2 columns], sums for weight
// and for bias. T: f32, f64, bf16, f16; statistics and sums in f32 (f64 for f64). The norm is that of the rounded sum.
// Variants: DTYPE=f32,f64,bf16,f16
//
// A row for one warp or several, which hold it in registers, up to HELD packets or 16 elements a thread; the rest of a
// longer row is read again, from the caches if it stays there. The variance is that of the deviations from the mean:
// rows far from zero lose nothing. norm_bwd takes rows a grid apart. norm_bwd_whole gives each block a chunk of
// neighbours and adds up, for the columns that a thread holds, what weight and bias get; then the block adds its
// threads in order, and the chunks are added elsewhere. It is for rows that registers hold. For longer ones, or where
// these sums alone are wanted, there is norm_bwd_sums: a thread sums a few columns over every eighth row of a chunk.
// Moves 2 sizeof(T) per element forward, 4 with a residual; 3 backward, 4 with onto; 2 for norm_bwd_sums. Limited by
// memory bandwidth; for short rows by the latency of the reductions.

#include "common.cuh"
#include "columns.cuh"

typedef Element<T>::Acc Acc;

constexpr u32 HELD = 16 / LANES;

// Elements j, j + 1, … of a row as a packet, zeros behind its end; and back.
__device__ __forceinline__ Packet<LANES> fetch(const T* row, u32 j, u32 columns, bool packed) {
    if (packed && j + LANES <= columns) return load<LANES>(row + j);
    Packet<LANES> packet = {};
#pragma unroll
    for (int lane = 0; lane < LANES; ++lane) {
        if (j + lane < columns) packet.lane[lane] = row[j + lane];
    }
    return packet;
}

__device__ __forceinline__ void put(T* row, u32 j, u32 columns, bool packed, const Packet<LANES>& packet) {
    if (packed && j + LANES <= columns) {
        store(row + j, packet);
        return;
    }
#pragma unroll
    for (int lane = 0; lane < LANES; ++lane) {
        if (j + lane < columns) row[j + lane] = packet.lane[lane];
    }
}

// Calls body(j, k) for the packets of this thread, which start at column j; k counts to HELD, which those beyond have.
template <typename Body> __device__ __forceinline__ void for_packets(u32 columns, Body body) {
#pragma unroll
    for (u32 k = 0; k < HELD; ++k) {
        const u32 j = (k * blockDim.x + threadIdx.x) * LANES;
        if (j < columns) body(j, k);
    }
    for (u32 j = (HELD * blockDim.x + threadIdx.x) * LANES; j < columns; j += blockDim.x * LANES) body(j, HELD);
}

// What one thread has of a row.
struct Row {
    const T* from;
    u32 columns;
    bool packed;
    Packet<LANES> held[HELD];

    __device__ __forceinline__ Row(const T* row, u32 columns) : from(row), columns(columns), packed(aligned(row)) {
#pragma unroll
        for (u32 k = 0; k < HELD; ++k) {
            held[k] = fetch(from, (k * blockDim.x + threadIdx.x) * LANES, columns, packed);
        }
    }

    __device__ __forceinline__ Packet<LANES> at(u32 j, u32 k) const {
        return k < HELD ? held[k] : fetch(from, j, columns, packed);
    }

    // Adds another row; the sum is written, and what registers do not hold is read from there from now on, by the
    // thread that wrote it.
    __device__ __forceinline__ void add(T* sum, const T* other) {
        const bool sum_packed = aligned(sum), other_packed = aligned(other);
        for_packets(columns, [&](u32 j, u32 k) {
            auto values = at(j, k);
            const auto summands = fetch(other, j, columns, other_packed);
#pragma unroll
            for (int lane = 0; lane < LANES; ++lane) {
                const Acc total = Element<T>::to_acc(values.lane[lane]) + Element<T>::to_acc(summands.lane[lane]);
                values.lane[lane] = Element<T>::from_acc(total);
            }
            put(sum, j, columns, sum_packed, values);
            if (k < HELD) held[k] = values;
        });
        from = sum;
        packed = sum_packed;
    }

    // The sum of f(x_j) over the row.
    template <typename F> __device__ __forceinline__ Acc sum(F f) const {
        Acc total = 0;
        for_packets(columns, [&](u32 j, u32 k) {
            const auto values = at(j, k);
#pragma unroll
            for (int lane = 0; lane < LANES; ++lane) {
                if (j + lane < columns) total += f(Element<T>::to_acc(values.lane[lane]));
            }
        });
        return sum_row(total);
    }
};

// Consecutive values of a weight or bias, `none` where there is no such tensor.
struct Values {
    Acc lane[LANES];

    __device__ __forceinline__ Values(const T* from, u32 j, u32 columns, Acc none) {
        Packet<LANES> packet = {};
        if (from != nullptr) packet = fetch(from, j, columns, aligned(from));
#pragma unroll
        for (int i = 0; i < LANES; ++i) lane[i] = from == nullptr ? none : Element<T>::to_acc(packet.lane[i]);
    }
};

// A weight of one element serves all features: it is a factor of the row then, and there are no others.
__device__ __forceinline__ const T* weight_of_each(const T* weight, u32 weights, u32 columns) {
    return weights == columns ? weight : nullptr;
}

__device__ __forceinline__ Acc weight_of_all(const T* weight, u32 weights, u32 columns) {
    return weight != nullptr && weights != columns ? Element<T>::to_acc(weight[0]) : Acc(1);
}

// Divisor of a row, from the mean square of its deviations from the mean.
constexpr u32 FLOORED = 0, CENTRED = 1;

__device__ __forceinline__ Acc divisor(u32 form, Acc square, Acc eps) {
    const Acc root = sqrt(form == FLOORED ? square : square + eps);
    // Not fmax, which would make NaN a number.
    return form == FLOORED && eps > root ? eps : root;
}

// A power of two for rows whose squares or whose sum overflow, and its inverse, as in src/ops/norm/forward.rs.
__device__ constexpr Acc power(int n) { return n == 0 ? Acc(1) : Acc(1099511627776.0) * power(n - 1); }
constexpr Acc GROW = power(sizeof(Acc) == 8 ? 15 : 2), SHRINK = 1 / GROW;

extern "C" __global__ void norm_fwd(T* y, T* sum, Acc* statistics, const T* x, const T* residual, const T* weight,
                                    const T* bias, i64 rows, u32 columns, u32 weights, u32 form, f64 eps) {
    const T* each = weight_of_each(weight, weights, columns);
    const Acc common = weight_of_all(weight, weights, columns);
    const bool centred = form == CENTRED;
    const i64 step = (i64)gridDim.x * blockDim.y;
    for (i64 row = (i64)blockIdx.x * blockDim.y + threadIdx.y; row < rows; row += step) {
        Row values(x + row * columns, columns);
        if (residual != nullptr) values.add(sum + row * columns, residual + row * columns);
        Acc mean = centred ? values.sum([](Acc value) { return value; }) / columns : 0;
        Acc square = values.sum([=](Acc value) { return (value - mean) * (value - mean); }) / columns;
        Acc shrink = 1, inverse = 1 / divisor(form, square, (Acc)eps), saved = inverse;
        // The rows of a block that have several warps each add up together.
        const bool overflows = !isfinite(square);
        if (blockDim.x == 32 ? overflows : __syncthreads_or(overflows)) {
            const Acc factor = overflows ? SHRINK : Acc(1);
            Acc small = values.sum([=](Acc value) { return value * factor; }) / columns;
            // Subtract the rounding error of the mean, or a row of equal numbers would have a deviation.
            small += values.sum([=](Acc value) { return value * factor - small; }) / columns;
            small = centred ? small : 0;
            const auto deviation = [=](Acc value) { return value * factor - small; };
            square = values.sum([=](Acc value) { return deviation(value) * deviation(value); }) / columns;
            if (overflows) {
                const Acc once = (Acc)eps * SHRINK;
                const Acc of_rest = divisor(form, square, form == FLOORED ? once : once * SHRINK);
                const bool equal = centred && square == 0 && eps > 0;
                shrink = SHRINK;
                inverse = equal ? 0 : 1 / of_rest;
                saved = equal ? 1 / sqrt((Acc)eps) : inverse * SHRINK;
                mean = small;
            }
        }
        T* to = y + row * columns;
        const bool packed = aligned(to);
        for_packets(columns, [&](u32 j, u32 k) {
            auto packet = values.at(j, k);
            const Values factor(each, j, columns, common), summand(bias, j, columns, 0);
#pragma unroll
            for (int lane = 0; lane < LANES; ++lane) {
                const Acc normal = (Element<T>::to_acc(packet.lane[lane]) * shrink - mean) * inverse;
                packet.lane[lane] = Element<T>::from_acc(normal * factor.lane[lane] + summand.lane[lane]);
            }
            put(to, j, columns, packed, packet);
        });
        if (threadIdx.x == 0) {
            if (centred) statistics[2 * row] = shrink == 1 ? mean : mean * GROW;
            statistics[centred ? 2 * row + 1 : row] = saved;
        }
    }
}

// What a row was normalised by.
struct Statistics {
    Acc mean, inverse;

    __device__ __forceinline__ Statistics(const Acc* of_rows, i64 row, u32 centred)
        : mean(centred ? of_rows[2 * row] : 0), inverse(of_rows[centred ? 2 * row + 1 : row]) {}

    __device__ __forceinline__ Acc normal(T x) const {
        const Acc value = Element<T>::to_acc(x);
        // So far apart that the difference could overflow.
        return inverse < 8 / -lowest<Acc>() ? value * inverse - mean * inverse : (value - mean) * inverse;
    }
};

// The gradient of a row. `dx` may be the row of `g` or `onto`: an element is read before it is written, by one thread.
__device__ __forceinline__ void input_gradient(T* dx, const Row& x, const Row& g, const T* onto, const T* each,
                                               Acc common, const Statistics& statistics, u32 centred, f64 eps) {
    const u32 columns = x.columns;
    Acc sum = 0, dot = 0;
    for_packets(columns, [&](u32 j, u32 k) {
        const auto values = x.at(j, k), gradients = g.at(j, k);
        const Values factor(each, j, columns, common);
#pragma unroll
        for (int lane = 0; lane < LANES; ++lane) {
            if (j + lane < columns) {
                const Acc h = Element<T>::to_acc(gradients.lane[lane]) * factor.lane[lane];
                sum += h;
                dot += h * statistics.normal(values.lane[lane]);
            }
        }
    });
    const bool floored = !centred && statistics.inverse >= 1 / (Acc)eps;
    // The means first: a row of several warps adds them up together with the other rows of the block.
    const Acc mean = centred ? sum_row(sum) / columns : 0, mean_dot = sum_row(dot) / columns;
    const Acc across = floored ? 0 : mean_dot;
    const bool packed = aligned(dx), onto_packed = aligned(onto);
    for_packets(columns, [&](u32 j, u32 k) {
        const auto values = x.at(j, k);
        auto packet = g.at(j, k);
        Packet<LANES> summands = {};
        if (onto != nullptr) summands = fetch(onto, j, columns, onto_packed);
        const Values factor(each, j, columns, common);
#pragma unroll
        for (int lane = 0; lane < LANES; ++lane) {
            const Acc h = Element<T>::to_acc(packet.lane[lane]) * factor.lane[lane];
            const Acc gradient = (h - mean - statistics.normal(values.lane[lane]) * across) * statistics.inverse;
            packet.lane[lane] = Element<T>::from_acc(gradient + Element<T>::to_acc(summands.lane[lane]));
        }
        put(dx, j, columns, packed, packet);
    });
}

extern "C" __global__ void norm_bwd(T* dx, const T* x, const T* g, const T* onto, const T* weight,
                                    const Acc* statistics, i64 rows, u32 columns, u32 weights, u32 centred, f64 eps) {
    const T* each = weight_of_each(weight, weights, columns);
    const Acc common = weight_of_all(weight, weights, columns);
    const i64 step = (i64)gridDim.x * blockDim.y;
    for (i64 row = (i64)blockIdx.x * blockDim.y + threadIdx.y; row < rows; row += step) {
        const i64 at = row * columns;
        const Row values(x + at, columns), gradients(g + at, columns);
        input_gradient(dx + at, values, gradients, onto == nullptr ? nullptr : onto + at, each, common,
                       Statistics(statistics, row, centred), centred, eps);
    }
}

// Threads of a block of norm_bwd_whole.
constexpr u32 THREADS = 256;

// Chunk blockIdx.x of the rows. columns <= HELD blockDim.x LANES.
extern "C" __global__ void __launch_bounds__(THREADS)
    norm_bwd_whole(T* dx, Acc* partials, const T* x, const T* g, const T* onto, const T* weight, const Acc* statistics,
                   i64 rows, i64 rows_per_chunk, u32 columns, u32 weights, u32 centred, f64 eps) {
    const T* each = weight_of_each(weight, weights, columns);
    const Acc common = weight_of_all(weight, weights, columns);
    const i64 first = blockIdx.x * rows_per_chunk, last = min(first + rows_per_chunk, rows);
    Acc dweight[HELD][LANES] = {}, dbias[HELD][LANES] = {};
    for (i64 start = first; start < last; start += blockDim.y) {
        // The threads behind the last row go along with one that has no columns.
        const bool inside = start + threadIdx.y < last;
        const i64 row = inside ? start + threadIdx.y : last - 1, at = row * columns;
        const Row values(x + at, inside ? columns : 0), gradients(g + at, inside ? columns : 0);
        const Statistics of_row(statistics, row, centred);
#pragma unroll
        for (u32 k = 0; k < HELD && inside; ++k) {
#pragma unroll
            for (int lane = 0; lane < LANES; ++lane) {
                // 0 behind the end of the row.
                const Acc gradient = Element<T>::to_acc(gradients.held[k].lane[lane]);
                dweight[k][lane] += gradient * of_row.normal(values.held[k].lane[lane]);
                dbias[k][lane] += gradient;
            }
        }
        input_gradient(dx + at, values, gradients, onto == nullptr ? nullptr : onto + at, each, common, of_row, centred,
                       eps);
    }
    __shared__ Acc shared[LANES][THREADS];
    const u32 thread = threadIdx.y * blockDim.x + threadIdx.x;
    Acc* partial = partials + (i64)blockIdx.x * 2 * columns;
#pragma unroll
    for (u32 k = 0; k < HELD; ++k) {
        // The same for all threads.
        if (k * blockDim.x * LANES >= columns) break;
#pragma unroll
        for (u32 which = 0; which < 2; ++which) {
            __syncthreads();
#pragma unroll
            for (int lane = 0; lane < LANES; ++lane) shared[lane][thread] = which ? dbias[k][lane] : dweight[k][lane];
            __syncthreads();
            for (u32 i = thread; i < LANES * blockDim.x; i += THREADS) {
                const u32 lane = i / blockDim.x, x_thread = i % blockDim.x;
                Acc total = 0;
                for (u32 y_thread = 0; y_thread < blockDim.y; ++y_thread) {
                    total += shared[lane][y_thread * blockDim.x + x_thread];
                }
                const u32 column = (k * blockDim.x + x_thread) * LANES + lane;
                if (column < columns) partial[which * columns + column] = total;
            }
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
