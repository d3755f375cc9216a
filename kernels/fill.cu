// Values that depend on nothing: y[i] = value, and y[i] = i.
//
// Shapes: y [n]. T: every dtype, to which `value` is rounded. Each thread takes elements a grid apart.
// Moves sizeof(T) per element, written only; limited by memory bandwidth.
// Variants: DTYPE=FLOATS,i64,bool

#include "common.cuh"

extern "C" __global__ void fill_value(T* y, i64 n, f64 value) {
    const T element = from_f64<T>(value);
    const i64 step = (i64)gridDim.x * blockDim.x;
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += step) y[i] = element;
}

extern "C" __global__ void fill_arange(T* y, i64 n) {
    const i64 step = (i64)gridDim.x * blockDim.x;
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += step) y[i] = from_f64<T>((f64)i);
}
