// Layer norm, RMS norm and scale norm over the last dimension.
//
//   forward:  y = (x - mean) inverse weight + bias
//   backward: dx = (h - mean h - n mean(h n)) inverse, dweight = sum_rows g n, dbias = sum_rows g
//             with n = (x - mean) inverse and h = g weight
//
// Centred rows (Ba et al., https://arxiv.org/abs/1607.06450) have inverse = 1 / sqrt(variance + eps). Others (Zhang and
// Sennrich, https://arxiv.org/abs/1910.07467) have mean = mean h = 0 and inverse = 1 / max(sqrt(mean x^2), eps); where
// that floor acts, the divisor is a constant and mean(h n) counts as 0.
//
// Shapes: y, x, dx, g [rows, columns], packed; statistics [rows, 2] mean and inverse, or [rows, 1] inverse alone;
// weight [columns], [1] or none, bias [columns] or none; partials [chunks, 2 columns], sums for weight and for bias.
// T: f32, f64, bf16, f16; statistics and sums in f32 (f64 for f64).
// Variants: DTYPE=f32,f64,bf16,f16
//
// One row per warp, or per block for long rows (see for_row); rows are a grid apart. The variance is that of the
// deviations from the mean: rows far from zero lose nothing. Gradients of weight and bias: a thread sums a few columns
// over every eighth row of a chunk of rows, then the block its eight threads in order; the chunks are added elsewhere.
// Moves 2 sizeof(T) per element forward, 3 for dx and 2 for the sums, as long as a row stays in the caches between its
// readings. Limited by memory bandwidth; for short rows by the latency of the reductions.

#include "common.cuh"

typedef Element<T>::Acc Acc;

// N consecutive values of a weight or bias, `none` where there is no such tensor.
template <int N> struct Values {
    Acc lane[N];

    __device__ __forceinline__ Values(const T* from, u32 j, Acc none) {
        if (from == nullptr) {
#pragma unroll
            for (Acc& value : lane) value = none;
        } else {
            const auto packet = load<N>(from + j);
#pragma unroll
            for (int i = 0; i < N; ++i) lane[i] = Element<T>::to_acc(packet.lane[i]);
        }
    }
};

// A weight of one element serves all features: it is a factor of the row then, and there are no others.
__device__ __forceinline__ const T* weight_of_each(const T* weight, u32 weights, u32 columns) {
    return weights == columns ? weight : nullptr;
}

__device__ __forceinline__ Acc weight_of_all(const T* weight, u32 weights, u32 columns) {
    return weight != nullptr && weights != columns ? Element<T>::to_acc(weight[0]) : Acc(1);
}

// The sum of f(x_j) over a row.
template <typename F> __device__ __forceinline__ Acc sum_over(const T* row, u32 columns, bool packed, F f) {
    Acc sum = 0;
    for_row(columns, packed, [&](u32 j, auto lanes) {
        const auto values = load<lanes.COUNT>(row + j);
#pragma unroll
        for (T value : values.lane) sum += f(Element<T>::to_acc(value));
    });
    return sum_row(sum);
}

extern "C" __global__ void norm_fwd(T* y, Acc* statistics, const T* x, const T* weight, const T* bias, i64 rows,
                                    u32 columns, u32 weights, u32 centred, f64 eps) {
    const T* each = weight_of_each(weight, weights, columns);
    const Acc common = weight_of_all(weight, weights, columns);
    const i64 step = (i64)gridDim.x * blockDim.y;
    for (i64 row = (i64)blockIdx.x * blockDim.y + threadIdx.y; row < rows; row += step) {
        T* to = y + row * columns;
        const T* from = x + row * columns;
        const bool packed = aligned(to) && aligned(from) && aligned(each) && aligned(bias);
        Acc mean = 0, inverse;
        if (centred) {
            mean = sum_over(from, columns, packed, [](Acc value) { return value; }) / columns;
            const auto square = [=](Acc value) { return (value - mean) * (value - mean); };
            inverse = 1 / sqrt(sum_over(from, columns, packed, square) / columns + (Acc)eps);
        } else {
            const Acc root = sqrt(sum_over(from, columns, packed, [](Acc value) { return value * value; }) / columns);
            // Not fmax, which would make NaN a number.
            inverse = 1 / ((Acc)eps > root ? (Acc)eps : root);
        }
        for_row(columns, packed, [&](u32 j, auto lanes) {
            auto values = load<lanes.COUNT>(from + j);
            const Values<lanes.COUNT> factor(each, j, common), summand(bias, j, 0);
#pragma unroll
            for (int lane = 0; lane < lanes.COUNT; ++lane) {
                const Acc normal = (Element<T>::to_acc(values.lane[lane]) - mean) * inverse;
                values.lane[lane] = Element<T>::from_acc(normal * factor.lane[lane] + summand.lane[lane]);
            }
            store(to + j, values);
        });
        if (threadIdx.x == 0) {
            if (centred) statistics[2 * row] = mean;
            statistics[centred ? 2 * row + 1 : row] = inverse;
        }
    }
}

// Without `g`, dx holds the gradient of y and is overwritten: an element is read before it is written, by one thread.
extern "C" __global__ void norm_bwd(T* dx, const T* x, const T* g, const T* weight, const Acc* statistics, i64 rows,
                                    u32 columns, u32 weights, u32 centred, f64 eps) {
    const T* each = weight_of_each(weight, weights, columns);
    const Acc common = weight_of_all(weight, weights, columns);
    const i64 step = (i64)gridDim.x * blockDim.y;
    for (i64 row = (i64)blockIdx.x * blockDim.y + threadIdx.y; row < rows; row += step) {
        T* to = dx + row * columns;
        const T *from = x + row * columns, *gradients = g == nullptr ? to : g + row * columns;
        const bool packed = aligned(to) && aligned(from) && aligned(gradients) && aligned(each);
        const Acc mean = centred ? statistics[2 * row] : 0;
        const Acc inverse = statistics[centred ? 2 * row + 1 : row];
        Acc sum = 0, dot = 0;
        for_row(columns, packed, [&](u32 j, auto lanes) {
            const auto value = load<lanes.COUNT>(from + j), gradient = load<lanes.COUNT>(gradients + j);
            const Values<lanes.COUNT> factor(each, j, common);
#pragma unroll
            for (int lane = 0; lane < lanes.COUNT; ++lane) {
                const Acc h = Element<T>::to_acc(gradient.lane[lane]) * factor.lane[lane];
                sum += h;
                dot += h * ((Element<T>::to_acc(value.lane[lane]) - mean) * inverse);
            }
        });
        const bool floored = !centred && inverse >= 1 / (Acc)eps;
        const Acc along = centred ? sum_row(sum) / columns : 0;
        const Acc across = floored ? 0 : sum_row(dot) / columns;
        for_row(columns, packed, [&](u32 j, auto lanes) {
            const auto value = load<lanes.COUNT>(from + j);
            auto result = load<lanes.COUNT>(gradients + j);
            const Values<lanes.COUNT> factor(each, j, common);
#pragma unroll
            for (int lane = 0; lane < lanes.COUNT; ++lane) {
                const Acc h = Element<T>::to_acc(result.lane[lane]) * factor.lane[lane];
                const Acc normal = (Element<T>::to_acc(value.lane[lane]) - mean) * inverse;
                result.lane[lane] = Element<T>::from_acc((h - along - normal * across) * inverse);
            }
            store(to + j, result);
        });
    }
}

// Threads of a block of norm_bwd_sums: neighbours in columns, and rows side by side.
constexpr u32 WIDTH = 32, HEIGHT = 8;

template <int N>
__device__ __forceinline__ void sum_columns(Acc* partial, const T* x, const T* g, const Acc* statistics, i64 first,
                                            i64 last, u32 columns, u32 centred) {
    __shared__ Acc sums[HEIGHT][2][N][WIDTH];
    for (u32 tile = blockIdx.x * WIDTH * N; tile < columns; tile += gridDim.x * WIDTH * N) {
        const u32 column = tile + threadIdx.x * N;
        Acc dweight[N] = {}, dbias[N] = {};
        for (i64 row = first + threadIdx.y; row < last && column < columns; row += HEIGHT) {
            const auto value = load<N>(x + row * columns + column), gradient = load<N>(g + row * columns + column);
            const Acc mean = centred ? statistics[2 * row] : 0;
            const Acc inverse = statistics[centred ? 2 * row + 1 : row];
#pragma unroll
            for (int lane = 0; lane < N; ++lane) {
                const Acc grad = Element<T>::to_acc(gradient.lane[lane]);
                dweight[lane] += grad * ((Element<T>::to_acc(value.lane[lane]) - mean) * inverse);
                dbias[lane] += grad;
            }
        }
#pragma unroll
        for (int lane = 0; lane < N; ++lane) {
            sums[threadIdx.y][0][lane][threadIdx.x] = dweight[lane];
            sums[threadIdx.y][1][lane][threadIdx.x] = dbias[lane];
        }
        __syncthreads();
        for (u32 i = threadIdx.y * WIDTH + threadIdx.x; i < 2 * N * WIDTH; i += HEIGHT * WIDTH) {
            const u32 which = i / (N * WIDTH), lane = i / WIDTH % N, thread = i % WIDTH;
            Acc sum = 0;
#pragma unroll
            for (u32 y = 0; y < HEIGHT; ++y) sum += sums[y][which][lane][thread];
            const u32 at = tile + thread * N + lane;
            if (at < columns) partial[which * columns + at] = sum;
        }
        __syncthreads();
    }
}

// Chunk blockIdx.y of the rows; a grid of any width in x.
extern "C" __global__ void norm_bwd_sums(Acc* partials, const T* x, const T* g, const Acc* statistics, i64 rows,
                                         i64 rows_per_chunk, u32 columns, u32 centred) {
    Acc* partial = partials + (i64)blockIdx.y * 2 * columns;
    const i64 first = blockIdx.y * rows_per_chunk;
    const i64 last = min(first + rows_per_chunk, rows);
    if (aligned(x) && aligned(g) && columns % LANES == 0) {
        sum_columns<LANES>(partial, x, g, statistics, first, last, columns, centred);
    } else {
        sum_columns<1>(partial, x, g, statistics, first, last, columns, centred);
    }
}
