// The sum of the squares of each of many tensors, for the norm of all gradients.
//
//   square_norm_chunks: partials[chunk] = sum of x^2 over the chunk
//   square_norm_totals: totals[tensor] = sum of its partials
//   square_norm_clip:   norm[0] = scale sqrt(sum of totals), norm[1] = scale min(1, clip / (norm[0] + 1e-6))
//
// Shapes: any; a row of the table has the address of x (T). Sums are f64: squares of f32 overflow in f32.
// Variants: DTYPE=FLOATS
//
// First one block per chunk of a tensor (see many.cuh), then one block per tensor: two stages in a fixed order, whose
// result does not depend on the schedule of blocks. Moves sizeof(T) per element. Limited by memory bandwidth, and by
// f64 arithmetic on GPUs with few f64 units.

#include "common.cuh"
#include "exact.cuh"
#include "many.cuh"

enum { X, POINTERS };

extern "C" __global__ void square_norm_chunks(f64* partials, const u64* table, u32 tensors) {
    const Chunk chunk = chunk_of_block<POINTERS>(table, tensors);
    const T* values = chunk.at<const T>(X);
    f64 sum = 0;
    for_chunk<LANES>(chunk, aligned(values), [&](i64 i, auto lanes) {
        const auto value = load<lanes.COUNT>(values + i);
#pragma unroll
        for (T element : value.lane) {
            const f64 x = Element<T>::to_acc(element);
            sum += x * x;
        }
    });
    sum = sum_row(sum);
    if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

// One block per tensor.
extern "C" __global__ void square_norm_totals(f64* totals, const f64* partials, const u64* table) {
    const u64* row = table + blockIdx.x * (POINTERS + 2);
    const u64 chunks = (row[POINTERS] + CHUNK - 1) / CHUNK, first = row[POINTERS + 1];
    f64 sum = 0;
    for (u64 chunk = threadIdx.x; chunk < chunks; chunk += blockDim.x) sum += partials[first + chunk];
    sum = sum_row(sum);
    if (threadIdx.x == 0) totals[blockIdx.x] = sum;
}

// One thread, with the order and the bits of the CPU; the second result is NaN if the first is not finite. given: scale
// and clip.
extern "C" __global__ void square_norm_clip(f64* norm, const f64* totals, const f64* given, u32 tensors) {
    Exact<f64> sum = exact(0.0);
    for (u32 tensor = 0; tensor < tensors; ++tensor) sum = sum + exact(totals[tensor]);
    const Exact<f64> scale = exact(given[0]), of_all = scale * exact(__dsqrt_rn(sum.value));
    const f64 share = (exact(given[1]) / (of_all + exact(1e-6))).value;
    norm[0] = of_all.value;
    norm[1] = isfinite(of_all.value) ? (scale * exact(share < 1 ? share : 1.0)).value : of_all.value - of_all.value;
}
