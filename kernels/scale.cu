// y_i = x_i numerator / denominator as a T, with numbers that lie in memory.
//
// Shapes: y, x [n], packed; numerator [1]; denominator [1] or none, which is 1. T: f32, f64, bf16, f16; x and the
// numerator in f32 (f64 for f64), the denominator in f64.
// Variants: DTYPE=FLOATS
//
// The quotient is rounded, then the product, then the result. Each thread takes packets a grid apart, 16 bytes of x.
// Moves sizeof(T) + sizeof(Acc) per element; limited by memory bandwidth.

#include "common.cuh"

typedef Element<T>::Acc Acc;

extern "C" __global__ void scale_elements(T* y, const Acc* x, const Acc* numerator, const f64* denominator, i64 n) {
    const Acc factor = denominator == nullptr ? numerator[0] : numerator[0] / (Acc)denominator[0];
    for_elements<16 / sizeof(Acc)>(n, aligned(y) && aligned(x), [&](i64 i, auto lanes) {
        const auto from = load<lanes.COUNT>(x + i);
        Packet<lanes.COUNT> to;
#pragma unroll
        for (int lane = 0; lane < lanes.COUNT; ++lane) to.lane[lane] = Element<T>::from_acc(from.lane[lane] * factor);
        store(y + i, to);
    });
}
