// y_i = x_i multiplier + summand, with constants.
//
// Shapes: y, x [n], packed. T: f32, f64, bf16, f16, computed in f32 (f64 for f64).
// Variants: DTYPE=FLOATS
//
// Each thread takes packets a grid apart. Moves 2 sizeof(T) per element; limited by memory bandwidth.

#include "common.cuh"

typedef Element<T>::Acc Acc;

extern "C" __global__ void affine_fwd(T* y, const T* x, i64 n, f64 multiplier, f64 summand) {
    const Acc a = multiplier, b = summand;
    for_elements(n, aligned(y) && aligned(x), [&](i64 i, auto lanes) {
        auto values = load<lanes.COUNT>(x + i);
#pragma unroll
        for (T& value : values.lane) value = Element<T>::from_acc(Element<T>::to_acc(value) * a + b);
        store(y + i, values);
    });
}
