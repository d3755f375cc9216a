// Rows written into a buffer that grows in place: y[b, h, offset + ends[b] + i] = x[b, h, i], dropped beyond
// capacity.
//
// Shapes: y [batch, heads, capacity, d] packed, x [batch, heads, rows, d] of any layout with packed features, ends
// [batch]. T: every dtype but i64.
// Variants: DTYPE=FLOATS,bool
//
// A thread takes elements a grid apart. Moves 2 sizeof(T) per element. The few rows of a step are limited by latency.

#include "common.cuh"

extern "C" __global__ void cache_write(T* y, const T* x, const i64* ends, Layout layout, i64 n, u32 heads, u32 rows,
                                       u32 d, i64 capacity, i64 offset) {
    for_elements(n, false, [&](i64 i, auto) {
        u64 rest = i;
        const u32 feature = divide(rest, d), row = divide(rest, rows);
        const i64 head = rest, position = offset + ends[head / heads] + row;
        if (position < capacity) y[(head * capacity + position) * d + feature] = x[layout.position(i)];
    });
}
