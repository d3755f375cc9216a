// Arithmetic with the same bits as on the CPU: every operation is rounded separately, whereas the compiler would fuse
// products and sums. The functions follow src/dtype/real.rs and the crate libm (Sun's fdlibm) step by step, so that
// neither tokens nor initial weights depend on the device.

template <typename A> struct Exact {
    A value;
};

__device__ __forceinline__ Exact<f32> operator+(Exact<f32> a, Exact<f32> b) { return {__fadd_rn(a.value, b.value)}; }
__device__ __forceinline__ Exact<f32> operator-(Exact<f32> a, Exact<f32> b) { return {__fsub_rn(a.value, b.value)}; }
__device__ __forceinline__ Exact<f32> operator*(Exact<f32> a, Exact<f32> b) { return {__fmul_rn(a.value, b.value)}; }
__device__ __forceinline__ Exact<f32> operator/(Exact<f32> a, Exact<f32> b) { return {__fdiv_rn(a.value, b.value)}; }
__device__ __forceinline__ Exact<f64> operator+(Exact<f64> a, Exact<f64> b) { return {__dadd_rn(a.value, b.value)}; }
__device__ __forceinline__ Exact<f64> operator-(Exact<f64> a, Exact<f64> b) { return {__dsub_rn(a.value, b.value)}; }
__device__ __forceinline__ Exact<f64> operator*(Exact<f64> a, Exact<f64> b) { return {__dmul_rn(a.value, b.value)}; }
__device__ __forceinline__ Exact<f64> operator/(Exact<f64> a, Exact<f64> b) { return {__ddiv_rn(a.value, b.value)}; }

template <typename A> __device__ __forceinline__ Exact<A> exact(A value) { return {value}; }

// e^x for x <= 0: 2^n e^r with |r| <= ln 2 / 2 and the Taylor series of e^r.
__device__ __forceinline__ f32 exact_exp(f32 of) {
    const f32 ROUND = 12582912.0f;
    const Exact<f32> x = exact(of < -104.0f ? -104.0f : of);
    const Exact<f32> shifted = x * exact(1.44269504088896340736f) + exact(ROUND), n = shifted - exact(ROUND);
    const Exact<f32> r = x - n * exact(0.6933594f) - n * exact(-2.1219444e-4f);
    Exact<f32> p = exact(1.0f / 5040);
    p = p * r + exact(1.0f / 720);
    p = p * r + exact(1.0f / 120);
    p = p * r + exact(1.0f / 24);
    p = p * r + exact(1.0f / 6);
    p = p * r + exact(0.5f);
    p = p * r + exact(1.0f);
    p = p * r + exact(1.0f);
    // 2^n in two factors, so that results below the normal range are rounded once.
    const i32 power = (i32)(__float_as_uint(shifted.value) - __float_as_uint(ROUND)), half = power >> 1;
    const Exact<f32> first = exact(__uint_as_float((u32)(half + 127) << 23));
    return (p * first * exact(__uint_as_float((u32)(power - half + 127) << 23))).value;
}

// The cube root of a normal number above 0, by Newton's method.
__device__ __forceinline__ f32 exact_cbrt(f32 x) {
    Exact<f32> y = exact(__uint_as_float(__float_as_uint(x) / 3 + 0x2A5119F2));
#pragma unroll
    for (int step = 0; step < 3; ++step) y = (y + y + exact(x) / (y * y)) * exact(1.0f / 3);
    return y.value;
}

// The natural logarithm of a normal number above 0.
__device__ __forceinline__ f64 exact_log(f64 x) {
    const u64 bits = __double_as_longlong(x);
    if (x == 1) return 0;
    // x = 2^k (1 + f) with 1 + f between the square roots of 1/2 and 2.
    const u32 high = (u32)(bits >> 32) + (0x3FF00000 - 0x3FE6A09E);
    const Exact<f64> k = exact((f64)((i32)(high >> 20) - 0x3FF));
    const u64 mantissa = (u64)((high & 0x000FFFFF) + 0x3FE6A09E) << 32 | (bits & 0xFFFFFFFF);
    const Exact<f64> f = exact(__longlong_as_double(mantissa)) - exact(1.0);
    const Exact<f64> half_square = exact(0.5) * f * f, s = f / (exact(2.0) + f), z = s * s, w = z * z;
    const Exact<f64> even = w * (exact(3.999999999940941908e-01) +
                                 w * (exact(2.222219843214978396e-01) + w * exact(1.531383769920937332e-01)));
    const Exact<f64> odd = z * (exact(6.666666666666735130e-01) +
                                w * (exact(2.857142874366239149e-01) +
                                     w * (exact(1.818357216161805012e-01) + w * exact(1.479819860511658591e-01))));
    return (s * (half_square + (odd + even)) + k * exact(1.90821492927058770002e-10) - half_square + f +
            k * exact(6.93147180369123816490e-01))
        .value;
}

// Cosine and sine of x + y for |x| up to about pi / 4, y being what x lacks.
__device__ __forceinline__ Exact<f64> exact_small_cos(Exact<f64> x, Exact<f64> y) {
    const Exact<f64> z = x * x, w = z * z;
    const Exact<f64> r =
        z * (exact(4.16666666666666019037e-02) +
             z * (exact(-1.38888888888741095749e-03) + z * exact(2.48015872894767294178e-05))) +
        w * w * (exact(-2.75573143513906633035e-07) +
                 z * (exact(2.08757232129817482790e-09) + z * exact(-1.13596475577881948265e-11)));
    const Exact<f64> half = exact(0.5) * z, near = exact(1.0) - half;
    return near + (((exact(1.0) - near) - half) + (z * r - x * y));
}

__device__ __forceinline__ Exact<f64> exact_small_sin(Exact<f64> x, Exact<f64> y, bool whole) {
    const Exact<f64> z = x * x, w = z * z, v = z * x, first = exact(-1.66666666666666324348e-01);
    const Exact<f64> r = exact(8.33333333332248946124e-03) +
                         z * (exact(-1.98412698298579493134e-04) + z * exact(2.75573137070700676789e-06)) +
                         z * w * (exact(-2.50507602534068634195e-08) + z * exact(1.58969099521155010221e-10));
    if (whole) return x + v * (first + z * r);
    return x - ((z * (exact(0.5) * y - v * r) - y) - v * first);
}

// Cosine and sine of an angle from 0 to 2 pi.
struct Direction {
    f64 cosine, sine;
};

__device__ __forceinline__ Direction exact_direction(f64 angle) {
    const Exact<f64> x = exact(angle), none = exact(0.0);
    const u32 high = (u32)((u64)__double_as_longlong(angle) >> 32);
    if (high <= 0x3FE921FB) {
        // Below 2^-26 the sine is the angle.
        return {exact_small_cos(x, none).value, high < 0x3E500000 ? angle : exact_small_sin(x, none, true).value};
    }
    // The angle less n quarter turns, in two parts.
    const Exact<f64> QUARTER = exact(1.57079632673412561417e+00), QUARTER_REST = exact(6.07710050650619224932e-11);
    i32 n;
    Exact<f64> r, w;
    // Near whole quarters almost all bits cancel.
    const bool near = high <= 0x400F6A7A ? (high & 0xFFFFF) == 0x921FB
                                         : high == 0x4012D97C || high == 0x401921FB || high > 0x401C463B;
    if (near) {
        const Exact<f64> TO_INT = exact(6755399441055744.0);
        const Exact<f64> turns = x * exact(6.36619772367581382433e-01) + TO_INT - TO_INT;
        n = (i32)turns.value;
        r = x - turns * QUARTER;
        w = turns * QUARTER_REST;
        const i32 exponent = (i32)(high >> 20);
        const auto lost = [&](Exact<f64> y) {
            return exponent - (i32)((u64)__double_as_longlong(y.value) >> 52 & 0x7FF);
        };
        if (lost(r - w) > 16) {
            Exact<f64> t = r;
            w = turns * exact(6.07710050630396597660e-11);
            r = t - w;
            w = turns * exact(2.02226624879595063154e-21) - ((t - r) - w);
            if (lost(r - w) > 49) {
                t = r;
                w = turns * exact(2.02226624871116645580e-21);
                r = t - w;
                w = turns * exact(8.47842766036889956997e-32) - ((t - r) - w);
            }
        }
    } else {
        n = high <= 0x4002D97C ? 1 : high <= 0x400F6A7A ? 2 : high <= 0x4015FDBC ? 3 : 4;
        r = x - exact((f64)n) * QUARTER;
        w = exact((f64)n) * QUARTER_REST;
    }
    const Exact<f64> y = r - w, rest = (r - y) - w;
    const f64 cosine = exact_small_cos(y, rest).value, sine = exact_small_sin(y, rest, false).value;
    switch (n & 3) {
        case 0: return {cosine, sine};
        case 1: return {-sine, cosine};
        case 2: return {-cosine, -sine};
        default: return {sine, -cosine};
    }
}
