// The functions of one number: a row for each row of the table in src/ops/pointwise.rs.

typedef Element<T>::Acc Acc;

// max(x, 0), keeping NaN.
__device__ __forceinline__ Acc positive(Acc x) { return x < 0 ? 0 : x; }

// Distribution and density of the standard normal.
__device__ __forceinline__ Acc normal_cdf(Acc x) { return Acc(0.5) * (1 + erf(x * Acc(0.70710678118654752))); }
__device__ __forceinline__ Acc normal_pdf(Acc x) { return Acc(0.39894228040143268) * exp(Acc(-0.5) * x * x); }

// What multiplies x in the approximation of GELU by tanh, and its derivative. 2 sqrt(2 / pi) is 1.5957691216057308.
__device__ __forceinline__ Acc gelu_gate(Acc x) {
    return 1 / (1 + exp(-Acc(1.5957691216057308) * x * (1 + Acc(0.044715) * x * x)));
}
__device__ __forceinline__ Acc gelu_gate_slope(Acc x) {
    const Acc gate = gelu_gate(x);
    return gate * (1 - gate) * Acc(1.5957691216057308) * (1 + Acc(0.134145) * x * x);
}

__device__ __forceinline__ Acc logistic(Acc x) { return 1 / (1 + exp(-x)); }

enum { INPUT, OUTPUT };

// Name, whether the derivative is written in input or output, value at x, derivative in the number that is kept. In a
// namespace, as some have the names of functions.
#define ROW(name, keep, value_at_x, derivative) \
    struct name { \
        static constexpr int KEEP = keep; \
        static __device__ __forceinline__ Acc value(Acc x) { return value_at_x; } \
        static __device__ __forceinline__ Acc slope(Acc kept) { return derivative; } \
    };

namespace function {
ROW(neg, INPUT, -x, -1)
ROW(exp, OUTPUT, ::exp(x), kept)
ROW(ln, INPUT, ::log(x), 1 / kept)
ROW(sqrt, OUTPUT, ::sqrt(x), Acc(0.5) / kept)
ROW(square, INPUT, x * x, kept + kept)
ROW(sigmoid, OUTPUT, 1 / (1 + ::exp(-x)), kept * (1 - kept))
ROW(tanh, OUTPUT, ::tanh(x), 1 - kept * kept)
ROW(relu, OUTPUT, positive(x), kept > 0 ? 1 : 0)
ROW(relu_squared, INPUT, positive(x) * positive(x), 2 * positive(kept))
ROW(gelu, INPUT, x * normal_cdf(x), normal_cdf(kept) + kept * normal_pdf(kept))
ROW(gelu_tanh, INPUT, x * gelu_gate(x), gelu_gate(kept) + kept * gelu_gate_slope(kept))
ROW(silu, INPUT, x * logistic(x), logistic(kept) * (1 + kept * (1 - logistic(kept))))
} // namespace function
