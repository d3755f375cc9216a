// Updates of many parameters at once by rules with at most one running mean: SGD with momentum (Sutskever et al., 2013)
// and Lion (Chen et al., https://arxiv.org/abs/2302.06675).
//
//   sgd:   g <- scale g + couple w, m <- momentum m + gain g, w <- decay w - rate (own g + mix m)
//   lion:  g <- scale g, w <- decay w - rate sign(beta1 m + mean1 g), m <- beta2 m + mean2 g
//
// with the factors of src/ops/momentum.rs. Shapes: any; a row of the table has the addresses of w (T), g (GRAD), m
// (null for sgd without momentum) and, for half types, the f32 master weight that w is rounded from. m is f32, f64 for
// f64.
// Variants: DTYPE=f32 GRAD=f32
// Variants: DTYPE=f64 GRAD=f64
// Variants: DTYPE=bf16 GRAD=bf16,f32
// Variants: DTYPE=f16 GRAD=f16,f32
//
// A block takes a chunk of a tensor (see many.cuh), its threads groups of elements. Moves 20 bytes per f32 parameter,
// and 22 per half one (m and the weight read and written, w too, g read). Limited by memory bandwidth.

#include "common.cuh"
#include "many.cuh"

typedef Element<T>::Acc Acc;

enum { VALUE, GRADIENT, MEAN, MASTER, POINTERS };

// Calls rule(w, g, m), which gives the new weight and changes m, for the elements of the block's chunk.
template <typename Rule> __device__ __forceinline__ void update(const Chunk& chunk, Rule rule) {
    T* values = chunk.at<T>(VALUE);
    const GRAD* grads = chunk.at<const GRAD>(GRADIENT);
    Acc *means = chunk.at<Acc>(MEAN), *masters = chunk.at<Acc>(MASTER);
    const bool packed = aligned(values) && aligned(grads) && aligned(means) && aligned(masters);
    for_chunk<16 / sizeof(Acc)>(chunk, packed, [&](i64 i, auto lanes) {
        constexpr int N = lanes.COUNT;
        auto value = load<N>(values + i);
        const auto grad = load<N>(grads + i);
        Packet<N, Acc> m = {}, master = {};
        if (means != nullptr) m = load<N>(means + i);
        if (masters != nullptr) master = load<N>(masters + i);
#pragma unroll
        for (int lane = 0; lane < N; ++lane) {
            Acc w = Element<T>::to_acc(value.lane[lane]);
            // A value that differs from the rounded master was set from outside since, and takes precedence.
            if (masters != nullptr && Element<T>::to_acc(Element<T>::from_acc(master.lane[lane])) == w) {
                w = master.lane[lane];
            }
            w = rule(w, Element<GRAD>::to_acc(grad.lane[lane]), m.lane[lane]);
            master.lane[lane] = w;
            value.lane[lane] = Element<T>::from_acc(w);
        }
        store(values + i, value);
        if (means != nullptr) store(means + i, m);
        if (masters != nullptr) store(masters + i, master);
    });
}

extern "C" __global__ void momentum_sgd(const u64* table, u32 tensors, f64 scale, f64 couple, f64 momentum, f64 gain,
                                        f64 own, f64 mix, f64 decay, f64 rate) {
    update(chunk_of_block<POINTERS>(table, tensors), [=](Acc w, Acc g, Acc& m) {
        g = g * (Acc)scale + (Acc)couple * w;
        m = (Acc)momentum * m + (Acc)gain * g;
        return w * (Acc)decay - (Acc)rate * ((Acc)own * g + (Acc)mix * m);
    });
}

extern "C" __global__ void momentum_lion(const u64* table, u32 tensors, f64 scale, f64 beta1, f64 mean1, f64 beta2,
                                         f64 mean2, f64 decay, f64 rate) {
    update(chunk_of_block<POINTERS>(table, tensors), [=](Acc w, Acc g, Acc& m) {
        g = g * (Acc)scale;
        const Acc direction = (Acc)beta1 * m + (Acc)mean1 * g;
        m = (Acc)beta2 * m + (Acc)mean2 * g;
        const Acc sign = direction > 0 ? (Acc)1 : direction < 0 ? (Acc)-1 : (Acc)0;
        return w * (Acc)decay - (Acc)rate * sign;
    });
}
