// The moving averages of many parameters at once: average += weight (value - average).
//
// Shapes: any; a row of the table has the addresses of the average (f32, f64 for f64) and of the value (T).
// Does nothing if grad_scale, [1] or none, is NaN: a graph's step whose gradients are not finite.
// Variants: DTYPE=FLOATS
//
// A block takes a chunk of a tensor (see many.cuh), its threads groups of elements. Moves 12 bytes per f32 parameter,
// 10 per half one. Limited by memory bandwidth.

#include "common.cuh"
#include "many.cuh"

typedef Element<T>::Acc Acc;

enum { AVERAGE, VALUE, POINTERS };

extern "C" __global__ void ema_update(const u64* table, const f64* grad_scale, u32 tensors, f64 weight) {
    if (grad_scale != nullptr && *grad_scale != *grad_scale) return;
    const Chunk chunk = chunk_of_block<POINTERS>(table, tensors);
    Acc* averages = chunk.at<Acc>(AVERAGE);
    const T* values = chunk.at<const T>(VALUE);
    for_chunk<16 / sizeof(Acc)>(chunk, aligned(averages) && aligned(values), [&](i64 i, auto lanes) {
        auto average = load<lanes.COUNT>(averages + i);
        const auto value = load<lanes.COUNT>(values + i);
#pragma unroll
        for (int lane = 0; lane < lanes.COUNT; ++lane) {
            average.lane[lane] += (Acc)weight * (Element<T>::to_acc(value.lane[lane]) - average.lane[lane]);
        }
        store(averages + i, average);
    });
}
