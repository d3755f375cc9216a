// The gradient of softmax cross-entropy by logits in f32, rounded to a half type once.
//
//   dx_j = exp(x_j - max x) / sum_k exp(x_k - max x) - [j = target]
//
// The forward pass is that of cross_entropy.cu in f32. Rows whose target is `ignore_index` get no gradient; what their
// mean divides by comes later.
//
// Shapes: x, dx [rows, pitch] packed, of which the first `columns` columns count (in the others dx is 0), targets
// [rows], statistics [rows, 2] maximum and 1 / sum. T: bf16, f16; the rest in f32.
// Variants: DTYPE=bf16,f16
//
// One row per warp, or per block for long rows (see for_row). Moves 6 bytes per element; limited by memory bandwidth.

#include "common.cuh"

typedef Element<T>::Acc Acc;

extern "C" __global__ void linear_cross_entropy_bwd(T* dx, const Acc* x, const Acc* statistics, const i64* targets,
                                                    i64 rows, u32 columns, u32 pitch, i64 ignore_index) {
    const i64 step = (i64)gridDim.x * blockDim.y;
    for (i64 row = (i64)blockIdx.x * blockDim.y + threadIdx.y; row < rows; row += step) {
        T* to = dx + row * pitch;
        const Acc* from = x + row * pitch;
        const i64 target = targets[row];
        const Acc max = statistics[2 * row], inverse = statistics[2 * row + 1];
        for_row<16 / sizeof(Acc)>(pitch, aligned(to) && aligned(from), [&](u32 j, auto lanes) {
            const auto logits = load<lanes.COUNT>(from + j);
            Packet<lanes.COUNT> gradients;
#pragma unroll
            for (int lane = 0; lane < lanes.COUNT; ++lane) {
                const Acc probability = exp(logits.lane[lane] - max) * inverse;
                const Acc gradient = j + lane == target ? probability - 1 : probability;
                gradients.lane[lane] =
                    Element<T>::from_acc(target == ignore_index || j + lane >= columns ? 0 : gradient);
            }
            store(to + j, gradients);
        });
    }
}
