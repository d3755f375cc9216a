// Rotary position embedding of the rows of a step, see rotary.cu: row i of sequence b is rotated by the angles of
// position offset + ends[b] + i.
//
// Shapes: y [batch, heads, rows, d] packed, x the same of any layout with packed features, table [positions, 2 pairs],
// cosines then sines, ends [batch]. T: f32, f64, bf16, f16; table in f32 (f64 for f64).
// Variants: DTYPE=FLOATS
//
// A thread takes elements a grid apart. Moves 3 sizeof(T) per element. The few rows of a step are limited by latency.

#include "common.cuh"

typedef Element<T>::Acc Acc;

extern "C" __global__ void cache_rotate(T* y, const T* x, const Acc* table, const i64* ends, Layout layout, i64 n,
                                        u32 heads, u32 rows, u32 d, u32 pairs, i64 positions, i64 offset) {
    for_elements(n, false, [&](i64 i, auto) {
        u64 rest = i;
        const u32 k = divide(rest, d), row = divide(rest, rows);
        const T* from = x + layout.position(i - k);
        if (k >= 2 * pairs) {
            y[i] = from[k];
            return;
        }
        const i64 wanted = offset + ends[(i64)rest / heads] + row;
        const i64 position = wanted < positions ? wanted : positions - 1;
        const u32 pair = k % pairs;
        const Acc cos = table[position * 2 * pairs + pair], sin = table[position * 2 * pairs + pairs + pair];
        const Acc a = Element<T>::to_acc(from[pair]), b = Element<T>::to_acc(from[pairs + pair]);
        y[i] = Element<T>::from_acc(k < pairs ? a * cos - b * sin : b * cos + a * sin);
    });
}
