// Functions of one number.
//
//   forward:  y_i = f(x_i)
//   backward: dx_i = g_i f'(kept_i), kept being x or y, whichever the derivative is written in
//
// Shapes: all [n], packed. T: f32, f64, bf16, f16, computed in f32 (f64 for f64). FUNCTION names a row below, one for
// each row of the table in src/ops/pointwise.rs.
// Variants: DTYPE=f32,f64,bf16,f16 FUNCTION=neg,exp,ln,sqrt,square,sigmoid,tanh,relu,relu_squared,gelu
//
// Each thread takes packets a grid apart. Moves 2 sizeof(T) per element forward, 3 backward. Limited by memory
// bandwidth, except for transcendental functions of f64.

#include "common.cuh"

typedef Element<T>::Acc Acc;

// max(x, 0), keeping NaN.
__device__ __forceinline__ Acc positive(Acc x) { return x < 0 ? 0 : x; }

// Distribution and density of the standard normal.
__device__ __forceinline__ Acc normal_cdf(Acc x) { return Acc(0.5) * (1 + erf(x * Acc(0.70710678118654752))); }
__device__ __forceinline__ Acc normal_pdf(Acc x) { return Acc(0.39894228040143268) * exp(Acc(-0.5) * x * x); }

// Name, value at x, derivative in the number that is kept. In a namespace, as some have the names of functions.
#define ROW(name, value_at_x, derivative) \
    struct name { \
        static __device__ __forceinline__ Acc value(Acc x) { return value_at_x; } \
        static __device__ __forceinline__ Acc slope(Acc kept) { return derivative; } \
    };

namespace function {
ROW(neg, -x, -1)
ROW(exp, ::exp(x), kept)
ROW(ln, ::log(x), 1 / kept)
ROW(sqrt, ::sqrt(x), Acc(0.5) / kept)
ROW(square, x * x, kept + kept)
ROW(sigmoid, 1 / (1 + ::exp(-x)), kept * (1 - kept))
ROW(tanh, ::tanh(x), 1 - kept * kept)
ROW(relu, positive(x), kept > 0 ? 1 : 0)
ROW(relu_squared, positive(x) * positive(x), 2 * positive(kept))
ROW(gelu, x * normal_cdf(x), normal_cdf(kept) + kept * normal_pdf(kept))
} // namespace function

extern "C" __global__ void unary_fwd(T* y, const T* x, i64 n) {
    for_elements(n, aligned(y) && aligned(x), [&](i64 i, auto lanes) {
        auto values = load<lanes.COUNT>(x + i);
#pragma unroll
        for (T& value : values.lane) value = Element<T>::from_acc(function::FUNCTION::value(Element<T>::to_acc(value)));
        store(y + i, values);
    });
}

extern "C" __global__ void unary_bwd(T* dx, const T* kept, const T* g, i64 n) {
    for_elements(n, aligned(dx) && aligned(kept) && aligned(g), [&](i64 i, auto lanes) {
        const auto at = load<lanes.COUNT>(kept + i);
        auto gradients = load<lanes.COUNT>(g + i);
#pragma unroll
        for (int lane = 0; lane < lanes.COUNT; ++lane) {
            const Acc slope = function::FUNCTION::slope(Element<T>::to_acc(at.lane[lane]));
            gradients.lane[lane] = Element<T>::from_acc(Element<T>::to_acc(gradients.lane[lane]) * slope);
        }
        store(dx + i, gradients);
    });
}
