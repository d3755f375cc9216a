// Softmax over the last dimension.
//
//   forward:  y_j = exp(x_j - max x) / sum_k exp(x_k - max x)
//   backward: dx_j = y_j (g_j - sum_k g_k y_k)
//
// Shapes: y, x, dx, g [rows, columns], packed. T: f32, f64, bf16, f16; statistics in f32 (f64 for f64).
// Variants: DTYPE=FLOATS
//
// One row per warp, or per block for long rows, held in registers where it fits (see rows.cuh). Exponentials are
// computed twice, for their sum and for the result, and not kept; those of half types by an instruction of the card.
// Moves 2 sizeof(T) per element forward and 3 backward, longer rows as long as they stay in the caches. Limited by
// memory bandwidth; for few rows by the latency of the reductions.
//
// A row of equal values gives 1 / columns even if they are the lowest finite number, as masks make them. A row that
// holds NaN or +inf, or nothing but -inf, gives NaN, as on the CPU.

#include "common.cuh"
#include "fast.cuh"
#include "rows.cuh"

template <bool PACKED> __device__ __forceinline__ void forward(T* y, const T* x, i64 rows, u32 columns) {
    const u32 first = first_column();
    const i32 left = (i32)columns - (i32)first;
    const i64 step = (i64)gridDim.x * blockDim.y;
    for (i64 row = (i64)blockIdx.x * blockDim.y + threadIdx.y; row < rows; row += step) {
        const i64 start = row * columns + first;
        Row<PACKED> values(x + start, left);
        Acc max = lowest<Acc>();
        for_packets<PACKED>(left, [&](i32 j, u32 k) {
            const auto packet = values.at(j, k);
            for_lanes<PACKED>(j, left, [&](int lane) { max = fmax(max, Element<T>::to_acc(packet.lane[lane])); });
        });
        max = max_row(max);
        values.forget();
        const Acc scale = 1 / values.sum([=](Acc value) { return fast_exp(value - max); });
        values.forget();
        for_packets<PACKED>(left, [&](i32 j, u32 k) {
            auto packet = values.at(j, k);
#pragma unroll
            for (T& value : packet.lane) {
                value = Element<T>::from_acc(fast_exp(Element<T>::to_acc(value) - max) * scale);
            }
            put<PACKED>(y + start, j, left, packet);
        });
    }
}

// True if rows are packets that registers hold.
__device__ __forceinline__ bool held(bool aligned, u32 columns) {
    return aligned && columns % LANES == 0 && columns <= HELD * LANES * blockDim.x;
}

extern "C" __global__ void __launch_bounds__(ROW_THREADS, ROW_BLOCKS)
    softmax_fwd(T* y, const T* x, i64 rows, u32 columns) {
    if (held(aligned(y) && aligned(x), columns)) {
        forward<true>(y, x, rows, columns);
    } else {
        forward<false>(y, x, rows, columns);
    }
}

template <bool PACKED>
__device__ __forceinline__ void backward(T* dx, const T* y, const T* g, i64 rows, u32 columns) {
    const u32 first = first_column();
    const i32 left = (i32)columns - (i32)first;
    const i64 step = (i64)gridDim.x * blockDim.y;
    for (i64 row = (i64)blockIdx.x * blockDim.y + threadIdx.y; row < rows; row += step) {
        const i64 start = row * columns + first;
        Row<PACKED> outputs(y + start, left), gradients(g + start, left);
        Acc dot = 0;
        for_packets<PACKED>(left, [&](i32 j, u32 k) {
            const auto output = outputs.at(j, k), gradient = gradients.at(j, k);
            for_lanes<PACKED>(j, left, [&](int lane) {
                dot += Element<T>::to_acc(output.lane[lane]) * Element<T>::to_acc(gradient.lane[lane]);
            });
        });
        dot = sum_row(dot);
        outputs.forget();
        gradients.forget();
        for_packets<PACKED>(left, [&](i32 j, u32 k) {
            const auto output = outputs.at(j, k);
            auto result = gradients.at(j, k);
#pragma unroll
            for (int lane = 0; lane < LANES; ++lane) {
                const Acc gradient = Element<T>::to_acc(result.lane[lane]);
                result.lane[lane] = Element<T>::from_acc(Element<T>::to_acc(output.lane[lane]) * (gradient - dot));
            }
            put<PACKED>(dx + start, j, left, result);
        });
    }
}

// `dx` may be `g`: an element is read before it is written, by the same thread.
extern "C" __global__ void __launch_bounds__(ROW_THREADS, ROW_BLOCKS)
    softmax_bwd(T* dx, const T* y, const T* g, i64 rows, u32 columns) {
    if (held(aligned(dx) && aligned(y) && aligned(g), columns)) {
        backward<true>(dx, y, g, rows, columns);
    } else {
        backward<false>(dx, y, g, rows, columns);
    }
}
