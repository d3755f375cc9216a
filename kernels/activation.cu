// An activation of a sum with a bias.
//
//   forward:  y = f(x + b)
//   backward: dx = g f'(x + b), db = sum_rows dx
//
// Shapes: y, x, dx, g [rows, columns], packed; bias [columns]; partials [chunks, columns] or none, sums of dx over
// chunks of rows, which are added elsewhere. T: f32, f64, bf16, f16; computed and summed in f32 (f64 for f64). The
// activation f is a row of functions.cuh.
// Variants: DTYPE=FLOATS ACTIVATION=ACTIVATION_ROW(*)
//
// A thread takes the packets of a few columns in every eighth row of a chunk (see columns.cuh), several in flight at
// once: it reads the bias once and accumulates its columns along the way. Moves 2 sizeof(T) per element forward, 3
// backward. Limited by memory bandwidth, except for erf and exp in f64.

#include "common.cuh"
#include "columns.cuh"
#include "functions.cuh"

typedef function::ACTIVATION Activation;

// Chunk blockIdx.y of the rows, here and below.
extern "C" __global__ void activation_fwd(T* y, const T* x, const T* bias, i64 rows, i64 rows_per_chunk, u32 columns) {
    const i64 first = blockIdx.y * rows_per_chunk, last = min(first + rows_per_chunk, rows);
    for_columns(columns, aligned(y) && aligned(x) && aligned(bias), [&](u32 column, auto lanes) {
        constexpr int N = decltype(lanes)::COUNT;
        if (column >= columns) return;
        const auto summand = load<N>(bias + column);
        const auto fetch = [&](i64 row, bool inside) { return Kept<N>(x + row * columns + column, inside); };
        for_rows<4>(first, last, fetch, [&](i64 row, Packet<N> values) {
#pragma unroll
            for (int lane = 0; lane < N; ++lane) {
                const Acc sum = Element<T>::to_acc(values.lane[lane]) + Element<T>::to_acc(summand.lane[lane]);
                values.lane[lane] = Element<T>::from_acc(Activation::value(sum));
            }
            store(y + row * columns + column, values);
        });
    });
}

template <int N> struct Both {
    Kept<N> x, g;
};

// `dx` may be `g`: an element is read before it is written, by the same thread.
extern "C" __global__ void activation_bwd(T* dx, Acc* partials, const T* x, const T* bias, const T* g, i64 rows,
                                          i64 rows_per_chunk, u32 columns) {
    const i64 first = blockIdx.y * rows_per_chunk, last = min(first + rows_per_chunk, rows);
    const bool packed = aligned(dx) && aligned(x) && aligned(bias) && aligned(g);
    for_columns(columns, packed, [&](u32 column, auto lanes) {
        constexpr int N = decltype(lanes)::COUNT;
        Acc dbias[N] = {};
        if (column < columns) {
            const auto summand = load<N>(bias + column);
            const auto fetch = [&](i64 row, bool inside) {
                const i64 at = row * columns + column;
                return Both<N>{{x + at, inside}, {g + at, inside}};
            };
            for_rows<2>(first, last, fetch, [&](i64 row, const Both<N>& both) {
                const Packet<N> values = both.x;
                Packet<N> gradients = both.g;
#pragma unroll
                for (int lane = 0; lane < N; ++lane) {
                    const Acc sum = Element<T>::to_acc(values.lane[lane]) + Element<T>::to_acc(summand.lane[lane]);
                    const Acc kept = Activation::KEEP == INPUT ? sum : Activation::value(sum);
                    const Acc gradient = Activation::gradient(Element<T>::to_acc(gradients.lane[lane]), kept);
                    dbias[lane] += gradient;
                    gradients.lane[lane] = Element<T>::from_acc(gradient);
                }
                store(dx + row * columns + column, gradients);
            });
        }
        if (partials != nullptr) store_sums(partials + (i64)blockIdx.y * columns, dbias, column, columns);
    });
}
