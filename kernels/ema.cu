// The moving averages of many parameters at once: average += weight (value - average).
//
// Shapes: any; a row of the table has the addresses of the average (f32, f64 for f64) and of the value (T).
// Variants: DTYPE=FLOATS
//
// A block takes a chunk of a tensor (see many.cuh), its threads groups of elements. Moves 12 bytes per f32 parameter,
// 10 per half one. Limited by memory bandwidth.

#include "common.cuh"
#include "many.cuh"

typedef Element<T>::Acc Acc;

enum { AVERAGE, VALUE, POINTERS };

extern "C" __global__ void ema_update(const u64* table, u32 tensors, f64 weight) {
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
