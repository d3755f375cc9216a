// Functions of one number.
//
//   forward:  y_i = f(x_i)
//   backward: dx_i = g_i f'(kept_i), kept being x or y, whichever the derivative is a function of
//
// Shapes: all [n], packed. T: f32, f64, bf16, f16, computed in f32 (f64 for f64). FUNCTION is a row of functions.cuh.
// Variants: DTYPE=FLOATS FUNCTION=ROW(*)
//
// Each thread takes packets a grid apart, several in flight at once. Moves 2 sizeof(T) per element forward, 3 backward.
// Limited by memory bandwidth, except for transcendental functions in f64.

#include "common.cuh"
#include "functions.cuh"

extern "C" __global__ void unary_fwd(T* y, const T* x, i64 n) {
    const auto fetch = [&](i64 i, bool inside, auto lanes) { return Kept<lanes.COUNT>(x + i, inside); };
    for_batches<4>(n, aligned(y) && aligned(x), fetch, [&](i64 i, const auto& kept, auto lanes) {
        Packet<lanes.COUNT> values = kept;
#pragma unroll
        for (T& value : values.lane) value = Element<T>::from_acc(function::FUNCTION::value(Element<T>::to_acc(value)));
        store(y + i, values);
    });
}

template <int N> struct Both {
    Kept<N> kept, g;
};

// `dx` may be `g`: an element is read before it is written, by the same thread.
extern "C" __global__ void unary_bwd(T* dx, const T* kept, const T* g, i64 n) {
    const auto fetch = [&](i64 i, bool inside, auto lanes) {
        return Both<lanes.COUNT>{{kept + i, inside}, {g + i, inside}};
    };
    for_batches<2>(n, aligned(dx) && aligned(kept) && aligned(g), fetch, [&](i64 i, const auto& both, auto lanes) {
        const Packet<lanes.COUNT> at = both.kept;
        Packet<lanes.COUNT> gradients = both.g;
#pragma unroll
        for (int lane = 0; lane < lanes.COUNT; ++lane) {
            const Acc g = Element<T>::to_acc(gradients.lane[lane]), kept = Element<T>::to_acc(at.lane[lane]);
            gradients.lane[lane] = Element<T>::from_acc(function::FUNCTION::gradient(g, kept));
        }
        store(dx + i, gradients);
    });
}
