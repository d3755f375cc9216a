// Copies between tensors of any strides: y = x, and sum = sum + x.
//
// Shapes: n elements of one shape on both sides, whose dimensions the host has merged where both layouts allow it: a
// transposed, sliced or broadcast tensor to a packed one, or a tensor to its part of a larger one. No element of y is
// written twice. T: every dtype; sums of integers are not used.
// Variants: DTYPE=f32,f64,bf16,f16,i64,bool
//
// Each thread takes elements a grid apart, so that writes are coalesced; where the innermost dimension is packed and
// everything is aligned to 128 bits, it takes 16 bytes at a time instead of one element.
// Moves 2 sizeof(T) per element, 3 for a sum. Limited by memory bandwidth where x is packed along its last dimension;
// a transposed x is read in sectors of 32 bytes of which one element is used at a time, the rest being left to the
// caches.

#include "common.cuh"
#include "strided.cuh"

__device__ __forceinline__ bool both_in_packets(const T* y, const T* x, const Layout& to, const Layout& from) {
    return last_step(to) == 1 && in_packets(y, to) && in_packets(x, from);
}

extern "C" __global__ void copy_strided(T* y, const T* x, Layout to, Layout from, i64 n) {
    const i64 step = last_step(from);
    for_elements(n, both_in_packets(y, x, to, from), [&](i64 i, auto lanes) {
        const auto at = positions(i, to, from);
        store(y + at.of[0], gather<lanes.COUNT>(x, at.of[1], step));
    });
}

extern "C" __global__ void copy_add(T* sum, const T* x, Layout to, Layout from, i64 n) {
    const i64 step = last_step(from);
    for_elements(n, both_in_packets(sum, x, to, from), [&](i64 i, auto lanes) {
        const auto at = positions(i, to, from);
        auto total = load<lanes.COUNT>(sum + at.of[0]);
        const auto summand = gather<lanes.COUNT>(x, at.of[1], step);
#pragma unroll
        for (int lane = 0; lane < lanes.COUNT; ++lane) {
            total.lane[lane] =
                Element<T>::from_acc(Element<T>::to_acc(total.lane[lane]) + Element<T>::to_acc(summand.lane[lane]));
        }
        store(sum + at.of[0], total);
    });
}
