// Products with weights in eight bits: y[i, j] = scales[j] sum_k x[i, k] w[j, k] (+ bias[j]); the weights as floats.
//
// Shapes: y [count, rows], x [count, columns], w [rows, columns] integers from -127 to 127, scales [rows]
// f32, bias [rows] or none; all packed. T: f32, f64, bf16, f16; sums in f32 (f64 for f64).
// Variants: DTYPE=f32,f64,bf16,f16
//
// A warp owns a row of the weights and reads it once per input; the inputs, a few, stay in the caches. One byte per
// weight and input. Limited by memory bandwidth for one input.

#include "common.cuh"

typedef Element<T>::Acc Acc;

extern "C" __global__ void int8_linear(T* y, const T* x, const signed char* w, const f32* scales, const T* bias,
                                       i64 count, i64 rows, u32 columns) {
    const i64 step = (i64)gridDim.x * blockDim.y;
    for (i64 row = (i64)blockIdx.x * blockDim.y + threadIdx.y; row < rows; row += step) {
        const signed char* weights = w + row * columns;
        for (i64 input = 0; input < count; ++input) {
            Acc sum = 0;
            for (u32 k = threadIdx.x; k < columns; k += 32) {
                sum += (Acc)weights[k] * Element<T>::to_acc(x[input * columns + k]);
            }
            sum = reduce_warp(sum, [](Acc a, Acc b) { return a + b; }) * (Acc)scales[row];
            if (bias) sum += Element<T>::to_acc(bias[row]);
            if (threadIdx.x == 0) y[input * rows + row] = Element<T>::from_acc(sum);
        }
    }
}

extern "C" __global__ void int8_dequantize(T* y, const signed char* w, const f32* scales, i64 n, u32 columns) {
    for_elements(n, false, [&](i64 i, auto) {
        u64 row = i;
        divide(row, columns);
        y[i] = from_f64<T>((f64)w[i] * (f64)scales[row]);
    });
}
