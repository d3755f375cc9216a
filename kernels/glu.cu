// Gated linear units (Shazeer, GLU variants improve transformer, https://arxiv.org/abs/2002.05202).
//
//   forward:  y = v f(u), the first half of x being the value v and the second the gate u
//   backward: dv = g f(u), du = g v f'(u)
//
// Shapes: y, g [rows, columns]; x, dx [rows, 2 columns]; all packed. T: f32, f64, bf16, f16. The activation f is a
// compile option.
// Variants: DTYPE=f32,f64,bf16,f16 ACTIVATION=gelu,relu_squared,sigmoid
//
// A thread takes a packet of y, a grid apart. Moves 3 sizeof(T) per element of y forward and 5 backward. Limited by
// memory bandwidth, if f is cheap; erf and exp of f64 are not.

#include "activation.cuh"
#include "common.cuh"

typedef Element<T>::Acc Acc;

// Calls body(i, at, Lanes<N>()) for the packets of y: i is their place in y, at that of their value in x. The gate is
// `columns` behind it.
template <int N, typename Body> __device__ __forceinline__ void for_packets(Index n, u32 columns, Body body) {
    const Index step = (Index)gridDim.x * blockDim.x * N;
    for (Index i = ((Index)blockIdx.x * blockDim.x + threadIdx.x) * N; i < n; i += step) {
        body(i, i + i / columns * columns, Lanes<N>());
    }
}

template <typename Body>
__device__ __forceinline__ void for_values(Index n, u32 columns, bool packed, Body body) {
    if (packed && columns % LANES == 0) {
        for_packets<LANES>(n, columns, body);
    } else {
        for_packets<1>(n, columns, body);
    }
}

extern "C" __global__ void glu_fwd(T* y, const T* x, i64 n, u32 columns) {
    for_values((Index)n, columns, aligned(y) && aligned(x), [&](Index i, Index at, auto lanes) {
        auto value = load<lanes.COUNT>(x + at);
        const auto gate = load<lanes.COUNT>(x + at + columns);
#pragma unroll
        for (int lane = 0; lane < lanes.COUNT; ++lane) {
            const Acc activated = ACTIVATION::value(Element<T>::to_acc(gate.lane[lane]));
            value.lane[lane] = Element<T>::from_acc(Element<T>::to_acc(value.lane[lane]) * activated);
        }
        store(y + i, value);
    });
}

// Without `x`, dx holds it and is overwritten: an element is read before it is written, by one thread.
extern "C" __global__ void glu_bwd(T* dx, const T* x, const T* g, i64 n, u32 columns) {
    const T* from = x == nullptr ? dx : x;
    const bool packed = aligned(dx) && aligned(from) && aligned(g);
    for_values((Index)n, columns, packed, [&](Index i, Index at, auto lanes) {
        auto value = load<lanes.COUNT>(from + at), gate = load<lanes.COUNT>(from + at + columns);
        const auto gradient = load<lanes.COUNT>(g + i);
#pragma unroll
        for (int lane = 0; lane < lanes.COUNT; ++lane) {
            const Acc u = Element<T>::to_acc(gate.lane[lane]), v = Element<T>::to_acc(value.lane[lane]);
            const Acc grad = Element<T>::to_acc(gradient.lane[lane]);
            value.lane[lane] = Element<T>::from_acc(grad * ACTIVATION::value(u));
            gate.lane[lane] = Element<T>::from_acc(grad * v * ACTIVATION::derivative(u));
        }
        store(dx + at, value);
        store(dx + at + columns, gate);
    });
}
