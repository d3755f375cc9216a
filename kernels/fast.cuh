// exp(x) and 1 / x; of half types by the instructions of the card, whose errors of at most 2^-17 of the result are lost
// when that is rounded to 11 bits; results below 2^-126 are 0.

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
