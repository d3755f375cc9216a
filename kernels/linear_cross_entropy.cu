// The gradient of softmax cross-entropy with respect to f32 logits, rounded once to a half type.
//
//   dx_j = exp(x_j - max x) / sum_k exp(x_k - max x) - [j = target]
//
// The forward pass is that of cross_entropy.cu in f32. Rows whose target is `ignore_index` get no gradient; the divisor
// of the mean is applied later.
//
// Shapes: x, dx [rows, pitch] packed, of which the first `columns` columns count (in the others dx is 0), targets
// [rows], statistics [rows, 2] maximum and 1 / sum. T: bf16, f16; the rest in f32.
// Variants: DTYPE=HALVES
//
// One row per warp, or per block for long rows (see Grid::rows); exponentials by fast.cuh. Moves 6 bytes per element;
// limited by memory bandwidth.

#include "common.cuh"
#include "fast.cuh"

typedef Element<T>::Acc Acc;

// Packets of 8 that a thread has in flight.
constexpr int AT_ONCE = 2;
static_assert(LANES == 8, "a packet is made from two of logits");

extern "C" __global__ void linear_cross_entropy_bwd(T* dx, const Acc* x, const Acc* statistics, const i64* targets,
                                                    i64 rows, u32 columns, u32 pitch, i64 ignore_index) {
    const i64 step = (i64)gridDim.x * blockDim.y;
    for (i64 row = (i64)blockIdx.x * blockDim.y + threadIdx.y; row < rows; row += step) {
        T* to = dx + row * pitch;
        const Acc* from = x + row * pitch;
        const i64 target = targets[row];
        const Acc max = statistics[2 * row], inverse = statistics[2 * row + 1];
        const auto gradient = [&](Acc logit, u32 j) {
            const Acc probability = fast_exp(logit - max) * inverse;
            const Acc gradient = j == target ? probability - 1 : probability;
            return Element<T>::from_acc(target == ignore_index || j >= columns ? 0 : gradient);
        };
        if (!aligned(to) || !aligned(from) || pitch % LANES != 0) {
            for (u32 j = threadIdx.x; j < pitch; j += blockDim.x) to[j] = gradient(from[j], j);
            continue;
        }
        const u32 apart = blockDim.x * LANES;
        for (u32 first = threadIdx.x * LANES; first < pitch; first += AT_ONCE * apart) {
            Raw<4, Acc> logits[AT_ONCE][2];
#pragma unroll
            for (int k = 0; k < AT_ONCE; ++k) {
                const u32 j = first + k * apart;
                logits[k][0] = Raw<4, Acc>(from + j, j < pitch);
                logits[k][1] = Raw<4, Acc>(from + j + 4, j < pitch);
            }
#pragma unroll
            for (int k = 0; k < AT_ONCE; ++k) {
                const u32 j = first + k * apart;
                if (j >= pitch) break;
                const Packet<4, Acc> low = logits[k][0], high = logits[k][1];
                Packet<LANES> gradients;
#pragma unroll
                for (int lane = 0; lane < 4; ++lane) {
                    gradients.lane[lane] = gradient(low.lane[lane], j + lane);
                    gradients.lane[lane + 4] = gradient(high.lane[lane], j + lane + 4);
                }
                store(to + j, gradients);
            }
        }
    }
}
