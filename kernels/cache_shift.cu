// Token shift of the rows of a step, see shift.cu: chunk t of row i of sequence b comes from amounts[t] positions
// before ends[b] + i; zeros where that is before the start or masked.
//
// Shapes: y [batch, rows, columns], x [batch, capacity, columns] with the rows of the step in it, mask (bool) [batch,
// capacity] or none, amounts [chunks], each for `chunk` features, ends [batch]; all packed. T: f32, f64, bf16, f16.
// Variants: DTYPE=FLOATS
//
// A thread takes elements a grid apart. Moves 2 sizeof(T) per element. The few rows of a step are limited by latency.

#include "common.cuh"

extern "C" __global__ void cache_shift(T* y, const T* x, const unsigned char* mask, const i64* amounts,
                                       const i64* ends, i64 n, u32 rows, u32 columns, u32 chunks, u32 chunk,
                                       i64 capacity) {
    for_elements(n, false, [&](i64 i, auto) {
        u64 rest = i;
        const u32 j = divide(rest, columns), row = divide(rest, rows);
        const i64 first = (i64)rest * capacity, wanted = ends[rest] + row;
        const i64 amount = j / chunk < chunks ? amounts[j / chunk] : 0;
        const i64 source = (wanted < capacity ? wanted : capacity - 1) - amount;
        const bool kept = amount == 0 || (source >= 0 && (mask == nullptr || mask[first + source]));
        // Zero has no bits set in any float type.
        Packet<1> element = {};
        if (kept) element.lane[0] = x[(first + source) * columns + j];
        store(y + i, element);
    });
}
