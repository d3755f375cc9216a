// Dropout: y_i = x_i scale + residual_i if word i of a Philox stream is at least `threshold`, else residual_i. The
// backward pass is the same function of the gradient, without a residual.
//
// Shapes: y, x, residual [n], packed; y may be x; residual may be none, which counts as 0; seed_at [1] or none: a graph
// reads its seed there. T: f32, f64, bf16, f16; computed in f32 (f64 for f64).
// Variants: DTYPE=FLOATS
//
// Each thread takes groups of 16 bytes or more that begin with a block of four words, a grid apart.
// Moves 2 sizeof(T) per element, 3 with a residual. Limited by memory bandwidth; half types also by the 32-bit
// multiplications of Philox, ten per element.

#include "common.cuh"
#include "philox.cuh"

typedef Element<T>::Acc Acc;

// Elements that a thread takes together.
constexpr int GROUP = LANES < 4 ? 4 : LANES;

// Rounded before anything is added, as on the CPU.
__device__ __forceinline__ f32 product(f32 a, f32 b) { return __fmul_rn(a, b); }
__device__ __forceinline__ f64 product(f64 a, f64 b) { return __dmul_rn(a, b); }

extern "C" __global__ void dropout_mask(T* y, const T* x, const T* residual, const u64* seed_at, i64 n, u64 seed,
                                        u64 stream, u64 threshold, f64 scale) {
    if (seed_at != nullptr) seed = *seed_at;
    const bool packed = aligned(y) && aligned(x) && aligned(residual);
    const auto masked = [=](T value, u32 word) {
        return word >= threshold ? product(Element<T>::to_acc(value), (Acc)scale) : Acc(0);
    };
    const i64 step = (i64)gridDim.x * blockDim.x * GROUP;
    for (i64 i = ((i64)blockIdx.x * blockDim.x + threadIdx.x) * GROUP; i < n; i += step) {
        const bool whole = packed && i + GROUP <= n;
        // Under way while the words are drawn.
        Raw<LANES> values[GROUP / LANES], summands[GROUP / LANES];
#pragma unroll
        for (int k = 0; k < GROUP / LANES; ++k) {
            values[k] = Raw<LANES>(x + i + k * LANES, whole);
            if (residual != nullptr) summands[k] = Raw<LANES>(residual + i + k * LANES, whole);
        }
        u32 words[GROUP];
#pragma unroll
        for (int block = 0; block < GROUP / 4; ++block) {
            const Words drawn = philox_block(seed, stream, i / 4 + block);
#pragma unroll
            for (int lane = 0; lane < 4; ++lane) words[4 * block + lane] = drawn.word[lane];
        }
#pragma unroll
        for (int at = 0; at < GROUP; at += LANES) {
            if (whole) {
                Packet<LANES> packet = values[at / LANES];
                const Packet<LANES> summand = summands[at / LANES];
#pragma unroll
                for (int lane = 0; lane < LANES; ++lane) {
                    const Acc kept = masked(packet.lane[lane], words[at + lane]);
                    const Acc sum = residual == nullptr ? kept : kept + Element<T>::to_acc(summand.lane[lane]);
                    packet.lane[lane] = Element<T>::from_acc(sum);
                }
                store(y + i + at, packet);
            } else {
#pragma unroll
                for (int lane = at; lane < at + LANES; ++lane) {
                    if (i + lane >= n) continue;
                    const Acc kept = masked(x[i + lane], words[lane]);
                    y[i + lane] = Element<T>::from_acc(
                        residual == nullptr ? kept : kept + Element<T>::to_acc(residual[i + lane]));
                }
            }
        }
    }
}
