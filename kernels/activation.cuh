// Activations and their derivatives, as in src/ops/pointwise.rs.

// x Phi(x) with the exact normal distribution (Hendrycks and Gimpel, https://arxiv.org/abs/1606.08415).
struct gelu {
    template <typename A> static __device__ __forceinline__ A cdf(A x) {
        return A(0.5) * (1 + erf(x * A(0.70710678118654752)));
    }
    template <typename A> static __device__ __forceinline__ A value(A x) { return x * cdf(x); }
    template <typename A> static __device__ __forceinline__ A derivative(A x) {
        return cdf(x) + x * A(0.39894228040143268) * exp(A(-0.5) * x * x);
    }
};

// max(x, 0)^2, keeping NaN.
struct relu_squared {
    template <typename A> static __device__ __forceinline__ A relu(A x) { return x < 0 ? A(0) : x; }
    template <typename A> static __device__ __forceinline__ A value(A x) { return relu(x) * relu(x); }
    template <typename A> static __device__ __forceinline__ A derivative(A x) { return 2 * relu(x); }
};

struct sigmoid {
    template <typename A> static __device__ __forceinline__ A value(A x) { return 1 / (1 + exp(-x)); }
    template <typename A> static __device__ __forceinline__ A derivative(A x) {
        const A y = value(x);
        return y * (1 - y);
    }
};
