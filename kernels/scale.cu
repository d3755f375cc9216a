// y_i = x_i numerator / denominator as a T, with numbers that lie in memory, for up to three x.
//
// Shapes: y, x [n], packed, n = 0 for none; numerator [1]; denominator [1] or none, which is 1. T: f32, f64, bf16,
// f16; x and the numerator in f32 (f64 for f64), the denominator in f64.
// Variants: DTYPE=FLOATS
//
// The quotient is rounded, then the product, then the result. Each thread takes packets a grid apart, 16 bytes of x.
// Moves sizeof(T) + sizeof(Acc) per element; limited by memory bandwidth.

#include "common.cuh"

typedef Element<T>::Acc Acc;

__device__ __forceinline__ void scale(T* y, const Acc* x, Acc factor, i64 n) {
    for_elements<16 / sizeof(Acc)>(n, aligned(y) && aligned(x), [&](i64 i, auto lanes) {
        const auto from = load<lanes.COUNT>(x + i);
        Packet<lanes.COUNT> to;
#pragma unroll
        for (int lane = 0; lane < lanes.COUNT; ++lane) to.lane[lane] = Element<T>::from_acc(from.lane[lane] * factor);
        store(y + i, to);
    });
}

extern "C" __global__ void scale_elements(T* y0, T* y1, T* y2, const Acc* x0, const Acc* x1, const Acc* x2,
                                          const Acc* numerator, const f64* denominator, i64 n0, i64 n1, i64 n2) {
    const Acc factor = denominator == nullptr ? numerator[0] : numerator[0] / (Acc)denominator[0];
    scale(y0, x0, factor, n0);
    scale(y1, x1, factor, n1);
    scale(y2, x2, factor, n2);
}
