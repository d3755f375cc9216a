// Functions of one number.
//
//   forward:  y_i = f(x_i)
//   backward: dx_i = g_i f'(kept_i), kept being x or y, whichever the derivative is written in
//
// Shapes: all [n], packed. T: f32, f64, bf16, f16, computed in f32 (f64 for f64). FUNCTION is a row of functions.cuh.
// Variants: DTYPE=f32,f64,bf16,f16 FUNCTION=neg,exp,ln,sqrt,square,sigmoid,tanh,relu,relu_squared,gelu,gelu_tanh,silu
//
// Each thread takes packets a grid apart. Moves 2 sizeof(T) per element forward, 3 backward. Limited by memory
// bandwidth, except for transcendental functions of f64.

#include "common.cuh"
#include "functions.cuh"

extern "C" __global__ void unary_fwd(T* y, const T* x, i64 n) {
    for_elements(n, aligned(y) && aligned(x), [&](i64 i, auto lanes) {
        auto values = load<lanes.COUNT>(x + i);
#pragma unroll
        for (T& value : values.lane) value = Element<T>::from_acc(function::FUNCTION::value(Element<T>::to_acc(value)));
        store(y + i, values);
    });
}

// `dx` may be `g`: an element is read before it is written, by the same thread.
extern "C" __global__ void unary_bwd(T* dx, const T* kept, const T* g, i64 n) {
    for_elements(n, aligned(dx) && aligned(kept) && aligned(g), [&](i64 i, auto lanes) {
        const auto at = load<lanes.COUNT>(kept + i);
        auto gradients = load<lanes.COUNT>(g + i);
#pragma unroll
        for (int lane = 0; lane < lanes.COUNT; ++lane) {
            const Acc g = Element<T>::to_acc(gradients.lane[lane]), kept = Element<T>::to_acc(at.lane[lane]);
            gradients.lane[lane] = Element<T>::from_acc(function::FUNCTION::gradient(g, kept));
        }
        store(dx + i, gradients);
    });
}
