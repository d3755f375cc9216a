// The gradient of a quotient with respect to its divisor, with broadcasting: y_i = -g_i a_i / b_i^2.
//
// Shapes: y [n] packed; g, a and b any layouts of its shape, with step 0 along the dimensions in which they repeat, as
// the host has merged them. T: f32, f64, bf16, f16, computed in f64.
// Variants: DTYPE=FLOATS
//
// No intermediate leaves its type's range unless the result does: f64 holds the square of every f32, and exponents of
// f64 are added separately. Each thread takes packets a grid apart where the last dimension of each operand is packed
// or repeated, else single elements. Moves 4 sizeof(T) per element; limited by memory bandwidth, on consumer GPUs by
// their few f64 units.

#include "common.cuh"
#include "strided.cuh"

__device__ __forceinline__ f64 by_divisor(f32 g, f32 a, f32 b) { return -((f64)g * a) / ((f64)b * b); }

__device__ __forceinline__ bool has_exponent(f64 x) { return x != 0 && x - x == 0; }

// x is the result, from 1 to 2, times 2^power.
__device__ __forceinline__ f64 mantissa(f64 x, i32& power) {
    const bool subnormal = fabs(x) < 2.2250738585072014e-308;
    const u64 bits = __double_as_longlong(subnormal ? x * 18014398509481984.0 : x);
    power = (i32)(bits >> 52 & 0x7FF) - 1023 - (subnormal ? 54 : 0);
    return __longlong_as_double((bits & 0x800FFFFFFFFFFFFF) | 0x3FF0000000000000);
}

__device__ __forceinline__ f64 power_of_two(i32 n) { return __longlong_as_double((u64)(n + 1023) << 52); }

__device__ __forceinline__ f64 by_divisor(f64 g, f64 a, f64 b) {
    if (!has_exponent(g) || !has_exponent(a) || !has_exponent(b)) return -g * (a / b / b);
    i32 g_power, a_power, b_power;
    g = mantissa(g, g_power);
    a = mantissa(a, a_power);
    b = mantissa(b, b_power);
    // In two factors, of which the first is exact; beyond ±2000 the result is 0 or infinite.
    const i32 power = g_power + a_power - 2 * b_power;
    const i32 bounded = power > 2000 ? 2000 : power < -2000 ? -2000 : power, half = bounded > 0 ? 1000 : -1000;
    const i32 first = bounded > 1000 || bounded < -1000 ? half : 0;
    return -(g * a) / (b * b) * power_of_two(first) * power_of_two(bounded - first);
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
