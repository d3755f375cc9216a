// Gated linear units (Shazeer, GLU variants improve transformer, https://arxiv.org/abs/2002.05202).
//
//   forward:  y = v f(u), the first half of x being the value v and the second the gate u
//   backward: dv = g f(u), du = g v f'(u)
//
// Shapes: y, g [rows, columns]; x, dx [rows, 2 columns]; all packed. T: f32, f64, bf16, f16. The activation f is a row
// of functions.cuh.
// Variants: DTYPE=f32,f64,bf16,f16 ACTIVATION=gelu,gelu_tanh,relu_squared,sigmoid,silu
//
// One row per warp, or per block for long rows (see for_row); rows are a grid apart. Moves 3 sizeof(T) per element of y
// forward and 5 backward. Limited by memory bandwidth, if f is cheap; erf and exp of f64 are not.

#include "common.cuh"
#include "functions.cuh"

typedef function::ACTIVATION Activation;

extern "C" __global__ void glu_fwd(T* y, const T* x, i64 rows, u32 columns) {
    const i64 step = (i64)gridDim.x * blockDim.y;
    for (i64 row = (i64)blockIdx.x * blockDim.y + threadIdx.y; row < rows; row += step) {
        T* to = y + row * columns;
        const T *values = x + row * 2 * columns, *gates = values + columns;
        for_row(columns, aligned(to) && aligned(values) && aligned(gates), [&](u32 j, auto lanes) {
            auto value = load<lanes.COUNT>(values + j);
            const auto gate = load<lanes.COUNT>(gates + j);
#pragma unroll
            for (int lane = 0; lane < lanes.COUNT; ++lane) {
                const Acc activated = Activation::value(Element<T>::to_acc(gate.lane[lane]));
                value.lane[lane] = Element<T>::from_acc(Element<T>::to_acc(value.lane[lane]) * activated);
            }
            store(to + j, value);
        });
    }
}

// Without `x`, dx holds it and is overwritten: an element is read before it is written, by one thread.
extern "C" __global__ void glu_bwd(T* dx, const T* x, const T* g, i64 rows, u32 columns) {
    const i64 step = (i64)gridDim.x * blockDim.y;
    for (i64 row = (i64)blockIdx.x * blockDim.y + threadIdx.y; row < rows; row += step) {
        T *to_values = dx + row * 2 * columns, *to_gates = to_values + columns;
        const T *values = (x == nullptr ? dx : x) + row * 2 * columns, *gates = values + columns;
        const T* gradients = g + row * columns;
        const bool outputs = aligned(to_values) && aligned(to_gates);
        const bool packed = outputs && aligned(values) && aligned(gates) && aligned(gradients);
        for_row(columns, packed, [&](u32 j, auto lanes) {
            auto value = load<lanes.COUNT>(values + j), gate = load<lanes.COUNT>(gates + j);
            const auto gradient = load<lanes.COUNT>(gradients + j);
#pragma unroll
            for (int lane = 0; lane < lanes.COUNT; ++lane) {
                const Acc u = Element<T>::to_acc(gate.lane[lane]), v = Element<T>::to_acc(value.lane[lane]);
                const Acc grad = Element<T>::to_acc(gradient.lane[lane]);
                const Acc activated = Activation::value(u);
                const Acc slope = Activation::slope(Activation::KEEP == INPUT ? u : activated);
                value.lane[lane] = Element<T>::from_acc(grad * activated);
                gate.lane[lane] = Element<T>::from_acc(grad * v * slope);
            }
            store(to_values + j, value);
            store(to_gates + j, gate);
        });
    }
}
