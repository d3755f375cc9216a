// A choice between two tensors, with broadcasting: y_i = a_i where mask_i, else b_i.
//
// Shapes: y [n] packed; mask, a and b any layouts of y's shape, with step 0 along the dimensions in which they repeat,
// whose dimensions the host has merged where all layouts allow it. T: every dtype.
// Variants: DTYPE=FLOATS,i64,bool
//
// Each thread takes packets a grid apart where the last dimension of each operand is packed or repeated, else single
// elements. Both a and b are read. Moves 3 sizeof(T) + 1 bytes per element; limited by memory bandwidth.

#include "common.cuh"
#include "strided.cuh"

extern "C" __global__ void where_cond(T* y, const bool* mask, const T* a, const T* b, Layout mask_layout,
                                      Layout a_layout, Layout b_layout, i64 n) {
    const i64 mask_step = last_step(mask_layout), a_step = last_step(a_layout), b_step = last_step(b_layout);
    const bool packed =
        aligned(y) && in_packets(mask, mask_layout) && in_packets(a, a_layout) && in_packets(b, b_layout);
    for_elements(n, packed, [&](i64 i, auto lanes) {
        const auto at = positions(i, mask_layout, a_layout, b_layout);
        const auto choice = gather<lanes.COUNT>(mask, at.of[0], mask_step);
        const auto yes = gather<lanes.COUNT>(a, at.of[1], a_step);
        auto result = gather<lanes.COUNT>(b, at.of[2], b_step);
#pragma unroll
        for (int lane = 0; lane < lanes.COUNT; ++lane) {
            if (choice.lane[lane]) result.lane[lane] = yes.lane[lane];
        }
        store(y + i, result);
    });
}
