// The angles of rotary.cu: table[p] = [cos(a_p0) .. | sin(a_p0) ..] with a_pk = direction (first + p) frequencies_k.
//
// Shapes: table [positions, 2 pairs], frequencies [pairs]. T is the dtype of the frequencies; the table is TABLE.
// Variants: DTYPE=FLOATS TABLE=f32,f64
//
// A thread takes one angle, a grid apart. Computed in f64 and rounded once, because f32 angles are inexact at distant
// positions. Writes 2 sizeof(TABLE) per angle; limited by f64 arithmetic, which is why the table is computed once for
// all heads.

#include "common.cuh"

extern "C" __global__ void rotary_table(TABLE* table, const T* frequencies, i64 first, i64 positions, u32 pairs,
                                        f64 direction) {
    const i64 step = (i64)gridDim.x * blockDim.x, count = positions * pairs;
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step) {
        const i64 position = i / pairs, pair = i % pairs;
        const f64 angle = direction * (f64)(first + position) * (f64)Element<T>::to_acc(frequencies[pair]);
        f64 sine, cosine;
        sincos(angle, &sine, &cosine);
        table[position * 2 * pairs + pair] = (TABLE)cosine;
        table[position * 2 * pairs + pairs + pair] = (TABLE)sine;
    }
}
