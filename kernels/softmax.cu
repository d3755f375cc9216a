// Softmax over the last dimension.
//
//   forward:  y_j = exp(x_j - max x) / sum_k exp(x_k - max x)
//   backward: dx_j = y_j (g_j - sum_k g_k y_k)
//
// Shapes: y, x, dx, g [rows, columns], packed. T: f32, f64, bf16, f16; statistics in f32 (f64 for f64).
// Variants: DTYPE=f32,f64,bf16,f16
//
// One row per warp, or per block for long rows (see for_row); rows are a grid apart. The forward pass finds maximum and
// sum in one reading, so that x is read twice and not three times.
// Moves 2 sizeof(T) per element forward and 3 backward as long as a row stays in the caches between its two readings.
// Limited by memory bandwidth; for short rows by the latency of the reductions.
//
// A row of equal values gives 1 / columns even if they are the lowest finite number, as masks make them. A row that
// holds NaN or +inf, or nothing but -inf, gives NaN, as on the CPU.

#include "common.cuh"
#include "softmax.cuh"

typedef Element<T>::Acc Acc;

extern "C" __global__ void softmax_fwd(T* y, const T* x, i64 rows, u32 columns) {
    const i64 step = (i64)gridDim.x * blockDim.y;
    for (i64 row = (i64)blockIdx.x * blockDim.y + threadIdx.y; row < rows; row += step) {
        T* to = y + row * columns;
        const T* from = x + row * columns;
        const Softmax<Acc> softmax = softmax_of_row(from, columns);
        const Acc scale = 1 / softmax.sum;
        for_row(columns, aligned(to) && aligned(from), [&](u32 j, auto lanes) {
            auto values = load<lanes.COUNT>(from + j);
#pragma unroll
            for (T& value : values.lane) {
                value = Element<T>::from_acc(exp(Element<T>::to_acc(value) - softmax.max) * scale);
            }
            store(to + j, values);
        });
    }
}

// `dx` may be `g`: an element is read before it is written, by the same thread.
extern "C" __global__ void softmax_bwd(T* dx, const T* y, const T* g, i64 rows, u32 columns) {
    const i64 step = (i64)gridDim.x * blockDim.y;
    for (i64 row = (i64)blockIdx.x * blockDim.y + threadIdx.y; row < rows; row += step) {
        T* to = dx + row * columns;
        const T *outputs = y + row * columns, *gradients = g + row * columns;
        const bool packed = aligned(to) && aligned(outputs) && aligned(gradients);
        Acc dot = 0;
        for_row(columns, packed, [&](u32 j, auto lanes) {
            const auto output = load<lanes.COUNT>(outputs + j), gradient = load<lanes.COUNT>(gradients + j);
#pragma unroll
            for (int lane = 0; lane < lanes.COUNT; ++lane) {
                dot += Element<T>::to_acc(output.lane[lane]) * Element<T>::to_acc(gradient.lane[lane]);
            }
        });
        dot = sum_row(dot);
        for_row(columns, packed, [&](u32 j, auto lanes) {
            const auto output = load<lanes.COUNT>(outputs + j);
            auto result = load<lanes.COUNT>(gradients + j);
#pragma unroll
            for (int lane = 0; lane < lanes.COUNT; ++lane) {
                const Acc gradient = Element<T>::to_acc(result.lane[lane]);
                result.lane[lane] = Element<T>::from_acc(Element<T>::to_acc(output.lane[lane]) * (gradient - dot));
            }
            store(to + j, result);
        });
    }
}
