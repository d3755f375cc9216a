// AdamW (Loshchilov and Hutter, https://arxiv.org/abs/1711.05101) of many parameters at once.
//
//   g <- grad_scale g, m <- m + mean (g - m), v <- beta2 v + square g^2
//   w <- decay w - rate m / (sqrt(v) / correction + eps)
//
// with the factors of src/ops/adamw.rs. Shapes: any; a row of the table has the addresses of w (T), g (GRAD), m, v and,
// for half types, the f32 master weight that w is rounded from. m and v are f32, f64 for f64.
// Variants: DTYPE=f32 GRAD=f32
// Variants: DTYPE=f64 GRAD=f64
// Variants: DTYPE=bf16 GRAD=bf16,f32
// Variants: DTYPE=f16 GRAD=f16,f32
//
// A block takes a chunk of a tensor (see many.cuh), its threads groups of elements. Moves 28 bytes per f32 parameter,
// and 30 per half one (m, v and the weight read and written, w too, g read). Limited by memory bandwidth.

#include "common.cuh"
#include "many.cuh"

typedef Element<T>::Acc Acc;

enum { VALUE, GRADIENT, EXP_AVG, EXP_AVG_SQ, MASTER, POINTERS };

// The factors, in the type of the state.
struct Factors {
    Acc grad_scale, decay, mean, beta2, square, rate, correction, eps;
};

__device__ __forceinline__ void update(const Chunk& chunk, const Factors& factors) {
    T* values = chunk.at<T>(VALUE);
    const GRAD* grads = chunk.at<const GRAD>(GRADIENT);
    Acc *means = chunk.at<Acc>(EXP_AVG), *squares = chunk.at<Acc>(EXP_AVG_SQ), *masters = chunk.at<Acc>(MASTER);
    const bool packed = aligned(values) && aligned(grads) && aligned(means) && aligned(squares) && aligned(masters);
    for_chunk<16 / sizeof(Acc)>(chunk, packed, [&](i64 i, auto lanes) {
        constexpr int N = lanes.COUNT;
        auto value = load<N>(values + i);
        const auto grad = load<N>(grads + i);
        auto m = load<N>(means + i), v = load<N>(squares + i);
        auto master = masters == nullptr ? m : load<N>(masters + i);
#pragma unroll
        for (int lane = 0; lane < N; ++lane) {
            const Acc g = Element<GRAD>::to_acc(grad.lane[lane]) * factors.grad_scale;
            m.lane[lane] += factors.mean * (g - m.lane[lane]);
            v.lane[lane] = v.lane[lane] * factors.beta2 + factors.square * g * g;
            Acc w = Element<T>::to_acc(value.lane[lane]);
            // A value that differs from the rounded master was set from outside since, and takes precedence.
            if (masters != nullptr && Element<T>::to_acc(Element<T>::from_acc(master.lane[lane])) == w) {
                w = master.lane[lane];
            }
            w = w * factors.decay -
                factors.rate * m.lane[lane] / (sqrt(v.lane[lane]) / factors.correction + factors.eps);
            master.lane[lane] = w;
            value.lane[lane] = Element<T>::from_acc(w);
        }
        store(values + i, value);
        store(means + i, m);
        store(squares + i, v);
        if (masters != nullptr) store(masters + i, master);
    });
}

extern "C" __global__ void adamw_step(const u64* table, u32 tensors, f64 grad_scale, f64 decay, f64 mean, f64 beta2,
                                      f64 square, f64 rate, f64 correction, f64 eps) {
    update(chunk_of_block<POINTERS>(table, tensors), {(Acc)grad_scale, (Acc)decay, (Acc)mean, (Acc)beta2, (Acc)square,
                                                      (Acc)rate, (Acc)correction, (Acc)eps});
}

// For graphs: the factors are in memory, so that a replay reads those of its own step; the table's last pointer is the
// address of each tensor's factors, in the order above. Does nothing if the gradient scale is NaN.
extern "C" __global__ void adamw_recorded(const u64* table, const f64* grad_scale, u32 tensors) {
    const Chunk chunk = chunk_of_block<POINTERS + 1>(table, tensors);
    const f64* factors = chunk.at<const f64>(POINTERS);
    const f64 scale = *grad_scale;
    if (scale != scale) return;
    update(chunk, {(Acc)scale, (Acc)factors[0], (Acc)factors[1], (Acc)factors[2], (Acc)factors[3], (Acc)factors[4],
                   (Acc)factors[5], (Acc)factors[6]});
}
