// Functions of one number: one row for each row of the table in src/ops/pointwise/mod.rs.

#include "fast.cuh"

typedef Element<T>::Acc Acc;

// max(x, 0), keeping NaN.
__device__ __forceinline__ Acc positive(Acc x) { return x < 0 ? 0 : x; }

// Distribution and density of the standard normal. In f64 the tail keeps its digits, as in PyTorch. Half types use a
// polynomial of 1 / (1 + 0.315 |x|) times exp(-x^2 / 2) in place of erf: errors of at most 2e-5 of the smaller tail, a
// twelfth of the error of rounding to 11 bits.
__device__ __forceinline__ Acc normal_cdf(Acc x) {
    if constexpr (HALF) {
        const Acc t = fast_inverse(1 + 0.315f * fabs(x));
        Acc sum = -0.0701801777f;
        sum = sum * t + 0.1587656736f;
        sum = sum * t + 0.0345942080f;
        sum = sum * t + 0.1271506965f;
        sum = sum * t + 0.1239166036f;
        sum = sum * t + 0.1257493645f;
        const Acc tail = sum * t * ptx_exp2(x * x * -0.72134752f);
        return x < 0 ? tail : 1 - tail;
    } else {
        const Acc scaled = x * Acc(0.70710678118654752);
        return Acc(0.5) * (sizeof(Acc) == 8 ? erfc(-scaled) : 1 + erf(scaled));
    }
}
__device__ __forceinline__ Acc normal_pdf(Acc x) {
    if constexpr (HALF) {
        return 0.39894228f * ptx_exp2(x * x * -0.72134752f);
    } else {
        return Acc(0.39894228040143268) * exp(Acc(-0.5) * x * x);
    }
}

// The factor of x in the tanh approximation of GELU, and its derivative. 2 sqrt(2 / pi) is 1.5957691216057308.
// Beyond 24 the gate is 0 or 1 even in f64, and the first factor of its slope is 0: the last one must not overflow.
__device__ __forceinline__ Acc gelu_gate(Acc x) {
    return fast_inverse(1 + fast_exp(-Acc(1.5957691216057308) * x * (1 + Acc(0.044715) * x * x)));
}
__device__ __forceinline__ Acc gelu_gate_slope(Acc x) {
    const Acc gate = gelu_gate(x);
    if (x > 24) x = 24;
    if (x < -24) x = -24;
    return gate * (1 - gate) * Acc(1.5957691216057308) * (1 + Acc(0.134145) * x * x);
}

__device__ __forceinline__ Acc logistic(Acc x) { return fast_inverse(1 + fast_exp(-x)); }

// Its derivative, to the last digit where it is near 0 or 1.
__device__ __forceinline__ Acc logistic_slope(Acc x) {
    const Acc small = fast_exp(x < 0 ? x : -x);
    if constexpr (HALF) {
        const Acc gate = fast_inverse(1 + small);
        return small * gate * gate;
    } else {
        return small / ((1 + small) * (1 + small));
    }
}

__device__ __forceinline__ Acc twice(Acc x) { return x + x; }

enum { INPUT, OUTPUT };

// Name, whether the derivative is a function of the input or of the output, value at x, and gradient of the input from
// that of the output, g, and the kept number: no factor leaves the type's range unless the gradient does. In a
// namespace, because some have the names of functions.
#define ROW(name, keep, value_at_x, gradient_at_kept) \
    struct name { \
        static constexpr int KEEP = keep; \
        static __device__ __forceinline__ Acc value(Acc x) { return value_at_x; } \
        static __device__ __forceinline__ Acc gradient(Acc g, Acc kept) { return gradient_at_kept; } \
        static __device__ __forceinline__ Acc slope(Acc kept) { return gradient(1, kept); } \
    };

// Functions that are also activations in activation.cu and glu.cu.
#define ACTIVATION_ROW(...) ROW(__VA_ARGS__)

namespace function {
ROW(neg, INPUT, -x, -g)
ROW(exp, OUTPUT, ::exp(x), g * kept)
ROW(ln, INPUT, ::log(x), g / kept)
ROW(sqrt, OUTPUT, ::sqrt(x), g * (Acc(0.5) / kept))
ROW(square, INPUT, x * x, twice(g * kept))
ACTIVATION_ROW(sigmoid, INPUT, logistic(x), g * logistic_slope(kept))
ROW(tanh, INPUT, ::tanh(x), g * (4 * logistic_slope(kept + kept)))
ROW(erf, INPUT, ::erf(x), g * (Acc(1.1283791670955126) * ::exp(-(kept * kept))))
ROW(cos, INPUT, ::cos(x), -g * ::sin(kept))
// The gradient is 0 where x <= 0; this test, unlike x > 0, lets NaN pass.
ACTIVATION_ROW(relu, OUTPUT, positive(x), kept <= 0 ? 0 : g)
ACTIVATION_ROW(relu_squared, INPUT, positive(x) * positive(x), kept <= 0 ? 0 : twice(g * kept))
ACTIVATION_ROW(gelu, INPUT, x * normal_cdf(x), g * (normal_cdf(kept) + kept * normal_pdf(kept)))
ACTIVATION_ROW(gelu_tanh, INPUT, x * gelu_gate(x), g * (gelu_gate(kept) + kept * gelu_gate_slope(kept)))
ACTIVATION_ROW(silu, INPUT, x * logistic(x), g * (logistic(kept) * (1 + kept * (1 - logistic(kept)))))
ACTIVATION_ROW(quick_gelu, INPUT, x * logistic(x * Acc(1.702)),
               g * (logistic(kept * Acc(1.702)) + kept * (logistic_slope(kept * Acc(1.702)) * Acc(1.702))))
} // namespace function
