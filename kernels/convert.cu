// Conversion between dtypes: y_i = x_i as a T.
//
// Shapes: y, x [n], packed. T and FROM: every dtype. Floats round to nearest even, once; to integers they truncate and
// saturate, with NaN becoming 0; to bool, any number but 0 is true.
// Variants: DTYPE=FLOATS,i64,bool FROM=FLOATS,i64,bool
//
// Each thread takes packets a grid apart, 16 bytes of the wider type. Moves sizeof(T) + sizeof(FROM) per element.
// Limited by memory bandwidth; from and to integers on consumer GPUs by their few f64 units.

#include "common.cuh"

constexpr int WIDTH = 16 / (sizeof(T) > sizeof(FROM) ? sizeof(T) : sizeof(FROM));

// f32 represents every bf16, f16 and bool; f64 the rest, with integers up to 2^53.
__device__ __forceinline__ f32 widen(f32 x) { return x; }
__device__ __forceinline__ f32 widen(bf16 x) { return Element<bf16>::to_acc(x); }
__device__ __forceinline__ f32 widen(f16 x) { return Element<f16>::to_acc(x); }
__device__ __forceinline__ f32 widen(bool x) { return x; }
__device__ __forceinline__ f64 widen(f64 x) { return x; }
__device__ __forceinline__ f64 widen(i64 x) { return (f64)x; }

__device__ __forceinline__ T narrow(f64 x) { return from_f64<T>(x); }
__device__ __forceinline__ T narrow(f32 x) {
    if constexpr (sizeof(T) == 2 || sizeof(T) == 4) {
        return Element<T>::from_acc(x);
    } else {
        return from_f64<T>(x);
    }
}

extern "C" __global__ void convert_elements(T* y, const FROM* x, i64 n) {
    for_elements<WIDTH>(n, aligned(y) && aligned(x), [&](i64 i, auto lanes) {
        const auto from = load<lanes.COUNT>(x + i);
        Packet<lanes.COUNT> to;
#pragma unroll
        for (int lane = 0; lane < lanes.COUNT; ++lane) to.lane[lane] = narrow(widen(from.lane[lane]));
        store(y + i, to);
    });
}
