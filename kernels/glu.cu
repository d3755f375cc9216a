// Gated linear units of a tensor or of its sum with a bias (Shazeer, GLU variants improve transformer,
// https://arxiv.org/abs/2002.05202).
//
//   forward:  y = v f(u), v and u being the first and the second half of x + b, value and gate
//   backward: dv = g f(u), du = g v f'(u), db = sum_rows dx
//
// Shapes: y, g [rows, columns]; x, dx [rows, 2 columns]; all packed; bias [2 columns] or none; partials
// [chunks, 2 columns] or none, sums of dx over chunks of rows, which are added elsewhere. T: f32, f64, bf16, f16;
// computed and summed in f32 (f64 for f64). The activation f is a row of functions.cuh.
// Variants: DTYPE=FLOATS ACTIVATION=ACTIVATION_ROW(*)
//
// A thread takes the packets of a few columns in every eighth row of a chunk (see columns.cuh), two in flight at once:
// it reads the bias once and accumulates its columns along the way. Moves 3 sizeof(T) per element of y forward and 5
// backward. Limited by memory bandwidth if f is cheap, which erf and exp in f64 are not.

#include "common.cuh"
#include "columns.cuh"
#include "functions.cuh"

typedef function::ACTIVATION Activation;

// Consecutive values of the bias, 0 without one.
template <int N> struct Bias {
    Acc lane[N];

    __device__ __forceinline__ Bias(const T* from) {
        Packet<N> packet = {};
        if (from != nullptr) packet = load<N>(from);
#pragma unroll
        for (int i = 0; i < N; ++i) lane[i] = from == nullptr ? Acc(0) : Element<T>::to_acc(packet.lane[i]);
    }
};

// The values read from a row.
template <int N> struct Both {
    Kept<N> value, gate;
};
template <int N> struct All {
    Kept<N> value, gate, gradient;
};

// Chunk blockIdx.y of the rows, here and below.
extern "C" __global__ void glu_fwd(T* y, const T* x, const T* bias, i64 rows, i64 rows_per_chunk, u32 columns) {
    const i64 first = blockIdx.y * rows_per_chunk, last = min(first + rows_per_chunk, rows);
    for_columns(columns, aligned(y) && aligned(x) && aligned(bias), [&](u32 column, auto lanes) {
        constexpr int N = decltype(lanes)::COUNT;
        if (column >= columns) return;
        const T* to_gates = bias == nullptr ? nullptr : bias + columns + column;
        const Bias<N> to_value(bias == nullptr ? nullptr : bias + column), to_gate(to_gates);
        const auto fetch = [&](i64 row, bool inside) {
            const T* from = x + row * 2 * columns + column;
            return Both<N>{{from, inside}, {from + columns, inside}};
        };
        for_rows<2>(first, last, fetch, [&](i64 row, const Both<N>& both) {
            Packet<N> value = both.value;
            const Packet<N> gate = both.gate;
#pragma unroll
            for (int lane = 0; lane < N; ++lane) {
                const Acc u = Element<T>::to_acc(gate.lane[lane]) + to_gate.lane[lane];
                const Acc v = Element<T>::to_acc(value.lane[lane]) + to_value.lane[lane];
                value.lane[lane] = Element<T>::from_acc(v * Activation::value(u));
            }
            store(y + row * columns + column, value);
        });
    });
}

// Without `x`, dx holds it and is overwritten: an element is read before it is written, by one thread.
extern "C" __global__ void glu_bwd(T* dx, Acc* partials, const T* x, const T* bias, const T* g, i64 rows,
                                   i64 rows_per_chunk, u32 columns) {
    const i64 first = blockIdx.y * rows_per_chunk, last = min(first + rows_per_chunk, rows);
    const bool packed = aligned(dx) && aligned(x) && aligned(bias) && aligned(g);
    for_columns(columns, packed, [&](u32 column, auto lanes) {
        constexpr int N = decltype(lanes)::COUNT;
        Acc dvalue[N] = {}, dgate[N] = {};
        if (column < columns) {
            const T* to_gates = bias == nullptr ? nullptr : bias + columns + column;
            const Bias<N> to_value(bias == nullptr ? nullptr : bias + column), to_gate(to_gates);
            const auto fetch = [&](i64 row, bool inside) {
                const T* from = (x == nullptr ? dx : x) + row * 2 * columns + column;
                return All<N>{{from, inside}, {from + columns, inside}, {g + row * columns + column, inside}};
            };
            for_rows<2>(first, last, fetch, [&](i64 row, const All<N>& all) {
                const i64 at = row * 2 * columns + column;
                Packet<N> value = all.value, gate = all.gate;
                const Packet<N> gradient = all.gradient;
#pragma unroll
                for (int lane = 0; lane < N; ++lane) {
                    const Acc u = Element<T>::to_acc(gate.lane[lane]) + to_gate.lane[lane];
                    const Acc v = Element<T>::to_acc(value.lane[lane]) + to_value.lane[lane];
                    const Acc grad = Element<T>::to_acc(gradient.lane[lane]), activated = Activation::value(u);
                    const Acc dv = grad * activated;
                    const Acc du = Activation::gradient(grad * v, Activation::KEEP == INPUT ? u : activated);
                    dvalue[lane] += dv;
                    dgate[lane] += du;
                    value.lane[lane] = Element<T>::from_acc(dv);
                    gate.lane[lane] = Element<T>::from_acc(du);
                }
                store(dx + at, value);
                store(dx + at + columns, gate);
            });
        }
        if (partials != nullptr) {
            Acc* partial = partials + (i64)blockIdx.y * 2 * columns;
            store_sums(partial, dvalue, column, columns);
            store_sums(partial + columns, dgate, column, columns);
        }
    });
}
