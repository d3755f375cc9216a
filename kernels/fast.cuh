// exp(x) and 1 / x; for half types by approximate instructions, whose errors of at most 2^-17 of the result vanish when
// it is rounded to 11 bits; results below 2^-126 are 0.

constexpr bool HALF = sizeof(T) == 2;

__device__ __forceinline__ Element<T>::Acc fast_exp(Element<T>::Acc x) {
    if constexpr (HALF) {
        return ptx_exp2(x * 1.4426950408889634f);
    } else {
        return exp(x);
    }
}

__device__ __forceinline__ Element<T>::Acc fast_inverse(Element<T>::Acc x) {
    if constexpr (HALF) {
        return ptx_inverse(x);
    } else {
        return 1 / x;
    }
}
