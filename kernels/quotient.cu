// The gradient of a quotient by its divisor, with broadcasting: y_i = -g_i a_i / b_i^2.
//
// Shapes: y [n] packed; g, a and b any layouts of its shape, with step 0 along the dimensions in which they repeat, as
// the host has merged them. T: f32, f64, bf16, f16, computed in f64.
// Variants: DTYPE=f32,f64,bf16,f16
//
// No factor leaves the range of its type where the result does not: f64 holds the square of every f32, and exponents of
// f64 are added up beside the numbers. Each thread takes packets a grid apart where the last dimension of each operand
// is packed or repeated, else single elements. Moves 4 sizeof(T) per element; limited by memory bandwidth, on consumer
// cards by their few units for f64.

#include "common.cuh"
#include "strided.cuh"

__device__ __forceinline__ f64 by_divisor(f32 g, f32 a, f32 b) { return -((f64)g * a) / ((f64)b * b); }

__device__ __forceinline__ bool has_exponent(f64 x) { return x != 0 && x - x == 0; }

__device__ __forceinline__ f64 by_divisor(f64 g, f64 a, f64 b) {
    if (!has_exponent(g) || !has_exponent(a) || !has_exponent(b)) return -g * (a / b / b);
    int g_power, a_power, b_power;
    g = frexp(g, &g_power);
    a = frexp(a, &a_power);
    b = frexp(b, &b_power);
    return ldexp(-(g * a) / (b * b), g_power + a_power - 2 * b_power);
}

extern "C" __global__ void quotient_bwd(T* y, const T* g, const T* a, const T* b, Layout g_layout, Layout a_layout,
                                        Layout b_layout, i64 n) {
    const i64 g_step = last_step(g_layout), a_step = last_step(a_layout), b_step = last_step(b_layout);
    const bool packed = aligned(y) && in_packets(g, g_layout) && in_packets(a, a_layout) && in_packets(b, b_layout);
    for_elements(n, packed, [&](i64 i, auto lanes) {
        const auto at = positions(i, g_layout, a_layout, b_layout);
        const auto gradient = gather<lanes.COUNT>(g, at.of[0], g_step);
        const auto numerator = gather<lanes.COUNT>(a, at.of[1], a_step);
        auto result = gather<lanes.COUNT>(b, at.of[2], b_step);
#pragma unroll
        for (int lane = 0; lane < lanes.COUNT; ++lane) {
            const auto of = [](T x) { return Element<T>::to_acc(x); };
            const f64 y = by_divisor(of(gradient.lane[lane]), of(numerator.lane[lane]), of(result.lane[lane]));
            result.lane[lane] = Element<T>::from_acc((Element<T>::Acc)y);
        }
        store(y + i, result);
    });
}
