// Softmax cross-entropy from logits.
//
//   forward:  loss = mean over rows of max x - x_target + ln sum_j exp(x_j - max x)
//   backward: dx_j = (exp(x_j - max x) / sum_k exp(x_k - max x) - [j = target]) g / count
//
// Rows whose target is `ignore_index` are left out of the mean and get no gradient. A target that is not a class is
// reported, and so is a mean over zero rows.
//
// Shapes: x, dx [rows, pitch] packed, of which the first `columns` columns count (in the others dx is 0), targets,
// losses [rows], statistics [rows, 2] maximum and 1 / sum, loss, g and count one element. T: f32, f64, bf16, f16;
// statistics, loss and g in f32 (f64 for f64), losses and their mean in f64.
// Variants: DTYPE=FLOATS
//
// One row per warp, or per block for long rows (see for_row); half types use fast instructions forward, whose error
// fast.cuh bounds; the mean by one block, in an order that only depends on the number of rows. Moves sizeof(T) per
// element forward, 2 backward; limited by memory bandwidth.

#include "common.cuh"
#include "softmax.cuh"

typedef Element<T>::Acc Acc;

// Blocks of 512 threads per multiprocessor: three where they fit without loss, so that all rows that
// linear_cross_entropy takes of GPT-2 run at once.
constexpr u32 BLOCKS = sizeof(Acc) == 8 ? 1 : __CUDA_ARCH__ >= 900 ? 3 : 2;

extern "C" __global__ void __launch_bounds__(512, BLOCKS)
    cross_entropy_fwd(Acc* statistics, f64* losses, i64* fault, const T* x, const i64* targets, i64 rows, u32 columns,
                      u32 pitch, i64 ignore_index) {
    const i64 step = (i64)gridDim.x * blockDim.y;
    for (i64 row = (i64)blockIdx.x * blockDim.y + threadIdx.y; row < rows; row += step) {
        const T* from = x + row * pitch;
        const i64 target = targets[row];
        // A negative target becomes a large number.
        const bool counts = target != ignore_index, known = (u64)target < columns;
        if (counts && !known && threadIdx.x == 0) report_fault(fault, FAULT_CROSS_ENTROPY, target, columns);
        Softmax softmax = {0, 1};
        if (counts && known) softmax = softmax_of_row(from, columns);
        if (threadIdx.x > 0) continue;
        // Not computed from a rounded log-sum-exp, whose error would grow with the logits.
        losses[row] = counts && known ? softmax.max - Element<T>::to_acc(from[target]) + log((f64)softmax.sum) : 0;
        statistics[2 * row] = softmax.max;
        statistics[2 * row + 1] = 1 / softmax.sum;
    }
}

// Launched with one block of one row of threads.
extern "C" __global__ void cross_entropy_mean(Acc* loss, f64* count, i64* fault, const f64* losses, const i64* targets,
                                              i64 rows, i64 ignore_index) {
    f64 sum = 0, counted = 0;
    for (i64 row = threadIdx.x; row < rows; row += blockDim.x) {
        sum += losses[row];
        counted += targets[row] != ignore_index;
    }
    sum = sum_row(sum);
    counted = sum_row(counted);
    if (threadIdx.x > 0) return;
    if (counted == 0) report_fault(fault, FAULT_NO_TARGETS, ignore_index, rows);
    loss[0] = (Acc)(sum / counted);
    count[0] = counted;
}

// `dx` may be `x`: an element is read before it is written, by the same thread.
extern "C" __global__ void cross_entropy_bwd(T* dx, const T* x, const Acc* statistics, const i64* targets, const Acc* g,
                                             const f64* count, i64 rows, u32 columns, u32 pitch,
                                             i64 ignore_index) {
    const Acc scale = (f64)g[0] / count[0];
    const i64 step = (i64)gridDim.x * blockDim.y;
    for (i64 row = (i64)blockIdx.x * blockDim.y + threadIdx.y; row < rows; row += step) {
        T* to = dx + row * pitch;
        const T* from = x + row * pitch;
        const i64 target = targets[row];
        const Acc max = statistics[2 * row], inverse = statistics[2 * row + 1], factor = inverse * scale;
        for_row(pitch, aligned(to) && aligned(from), [&](u32 j, auto lanes) {
            auto values = load<lanes.COUNT>(from + j);
#pragma unroll
            for (int lane = 0; lane < lanes.COUNT; ++lane) {
                const Acc power = exp(Element<T>::to_acc(values.lane[lane]) - max);
                const Acc gradient = j + lane == target ? (power * inverse - 1) * scale : power * factor;
                values.lane[lane] =
                    Element<T>::from_acc(target == ignore_index || j + lane >= columns ? 0 : gradient);
            }
            store(to + j, values);
        });
    }
}
