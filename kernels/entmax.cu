// 1.5-entmax over the last dimension (Peters, Niculae and Martins, https://arxiv.org/abs/1905.05702).
//
//   forward:  y_j = max(z_j - t, 0)^2 with z = (x - max x) / 2, and t such that a row sums to 1
//   backward: dx_j = s_j (g_j - sum_k s_k g_k / sum_k s_k) with s = sqrt(y)
//
// Shapes: y, x, dx, g [rows, columns], packed. T: f32, f64, bf16, f16; statistics in f32 (f64 for f64).
// Variants: DTYPE=FLOATS
//
// One row per warp, or per block for long rows (see for_row); rows are a grid apart. t is a root of
// f(t) = sum_j max(z_j - t, 0)^2 - 1, which is convex and decreasing: Newton's method from t = -1, where f >= 0,
// increases t to the root and never past it, and needs no sorting. It stops where rounding stops the increase, after
// about log2(sqrt(columns)) + 4 passes over the row in the caches.
// Moves 2 sizeof(T) per element forward and 3 backward as long as a row stays in the caches between passes.
// Limited by the latency of the reductions.
//
// A row that holds NaN or +inf, or nothing but -inf, gives NaN, as on the CPU.

#include "common.cuh"

typedef Element<T>::Acc Acc;

// More steps than any row needs: from -1 the distance to the root at least halves until convergence is quadratic.
constexpr int MAX_STEPS = 64;

extern "C" __global__ void entmax_fwd(T* y, const T* x, i64 rows, u32 columns) {
    const i64 step = (i64)gridDim.x * blockDim.y;
    for (i64 row = (i64)blockIdx.x * blockDim.y + threadIdx.y; row < rows; row += step) {
        T* to = y + row * columns;
        const T* from = x + row * columns;
        const bool packed = aligned(to) && aligned(from);
        // The larger one; NaN counts as the largest.
        const auto larger = [](Acc a, Acc b) { return b > a || b != b ? b : a; };
        Acc max = negative_infinity<Acc>();
        for_row(columns, packed, [&](u32 j, auto lanes) {
            const auto values = load<lanes.COUNT>(from + j);
#pragma unroll
            for (T value : values.lane) max = larger(max, Element<T>::to_acc(value));
        });
        max = reduce_row(max, negative_infinity<Acc>(), larger);
        // Halved first: the difference to the lowest finite number would overflow. NaN if the maximum is infinite.
        const auto shifted = [=](T value) { return Element<T>::to_acc(value) * Acc(0.5) - max * Acc(0.5); };
        Acc threshold = max - max == 0 ? Acc(-1) : max - max;
        for (int newton = 0; newton < MAX_STEPS; ++newton) {
            Acc sum = 0, squares = 0;
            for_row(columns, packed, [&](u32 j, auto lanes) {
                const auto values = load<lanes.COUNT>(from + j);
#pragma unroll
                for (T value : values.lane) {
                    const Acc root = fmax(shifted(value) - threshold, Acc(0));
                    sum += root;
                    squares += root * root;
                }
            });
            sum = sum_row(sum);
            const Acc next = threshold + (sum_row(squares) - 1) / (2 * sum);
            if (!(next > threshold)) break;
            threshold = next;
        }
        for_row(columns, packed, [&](u32 j, auto lanes) {
            auto values = load<lanes.COUNT>(from + j);
#pragma unroll
            for (T& value : values.lane) {
                const Acc root = shifted(value) - threshold;
                value = Element<T>::from_acc(root < 0 ? Acc(0) : root * root);
            }
            store(to + j, values);
        });
    }
}

extern "C" __global__ void entmax_bwd(T* dx, const T* y, const T* g, i64 rows, u32 columns) {
    const i64 step = (i64)gridDim.x * blockDim.y;
    for (i64 row = (i64)blockIdx.x * blockDim.y + threadIdx.y; row < rows; row += step) {
        T* to = dx + row * columns;
        const T *outputs = y + row * columns, *gradients = g + row * columns;
        const bool packed = aligned(to) && aligned(outputs) && aligned(gradients);
        Acc dot = 0, sum = 0;
        for_row(columns, packed, [&](u32 j, auto lanes) {
            const auto output = load<lanes.COUNT>(outputs + j), gradient = load<lanes.COUNT>(gradients + j);
#pragma unroll
            for (int lane = 0; lane < lanes.COUNT; ++lane) {
                const Acc root = sqrt(Element<T>::to_acc(output.lane[lane]));
                dot += root * Element<T>::to_acc(gradient.lane[lane]);
                sum += root;
            }
        });
        dot = sum_row(dot);
        const Acc mean = dot / sum_row(sum);
        for_row(columns, packed, [&](u32 j, auto lanes) {
            const auto output = load<lanes.COUNT>(outputs + j);
            auto result = load<lanes.COUNT>(gradients + j);
#pragma unroll
            for (int lane = 0; lane < lanes.COUNT; ++lane) {
                const Acc root = sqrt(Element<T>::to_acc(output.lane[lane]));
                result.lane[lane] = Element<T>::from_acc(root * (Element<T>::to_acc(result.lane[lane]) - mean));
            }
            store(to + j, result);
        });
    }
}
