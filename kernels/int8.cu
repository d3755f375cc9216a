// Products with weights in eight bits: y[i, j] = scales[j] sum_k x[i, k] w[j, k] (+ bias[j]); the weights as floats.
//
// Shapes: y [count, rows], x [count, columns], w [rows, columns] integers from -127 to 127, scales [rows]
// f32, bias [rows] or none; all packed. T: f32, f64, bf16, f16; sums in f32 (f64 for f64).
// Variants: DTYPE=FLOATS
//
// A warp owns a row of the weights and reads it once for INPUTS of the inputs, 16 bytes per load; the few inputs stay
// in the caches. Moves one byte per weight and INPUTS inputs. Limited by memory bandwidth for one input.

#include "common.cuh"

typedef Element<T>::Acc Acc;

// Number of inputs that share a pass over the weights, and of weights per packet.
constexpr int INPUTS = 4, BYTES = 16;

// Converts a weight to a number: for f32 by placing its bits below those of 2^23, since conversions take four times as
// long.
__device__ __forceinline__ Acc number(const Packet<BYTES, signed char>& bytes, int lane) {
    if constexpr (sizeof(Acc) == 8) {
        return bytes.lane[lane];
    } else {
        return __uint_as_float(0x4B000000 | ((u32)(unsigned char)bytes.lane[lane] ^ 0x80)) - 8388736.0f;
    }
}

extern "C" __global__ void int8_linear(T* y, const T* x, const signed char* w, const f32* scales, const T* bias,
                                       i64 count, i64 rows, u32 columns) {
    const i64 step = (i64)gridDim.x * blockDim.y;
    const bool packed = columns % BYTES == 0 && aligned(w), packed_x = columns % LANES == 0 && aligned(x);
    for (i64 row = (i64)blockIdx.x * blockDim.y + threadIdx.y; row < rows; row += step) {
        const signed char* weights = w + row * columns;
        for (i64 first = 0; first < count; first += INPUTS) {
            Acc sums[INPUTS] = {};
            const u32 in_packets = columns / BYTES * BYTES;
#pragma unroll 2
            for (u32 k = threadIdx.x * BYTES; k < in_packets; k += 32 * BYTES) {
                const auto bytes = load<BYTES>(weights + k, packed);
#pragma unroll
                for (int i = 0; i < INPUTS; ++i) {
                    if (first + i >= count) break;
                    const T* input = x + (first + i) * columns + k;
#pragma unroll
                    for (int part = 0; part < BYTES; part += LANES) {
                        const auto values = load<LANES>(input + part, packed_x);
#pragma unroll
                        for (int lane = 0; lane < LANES; ++lane) {
                            sums[i] += number(bytes, part + lane) * Element<T>::to_acc(values.lane[lane]);
                        }
                    }
                }
            }
            for (u32 k = in_packets + threadIdx.x; k < columns; k += 32) {
#pragma unroll
                for (int i = 0; i < INPUTS; ++i) {
                    if (first + i >= count) break;
                    sums[i] += (Acc)weights[k] * Element<T>::to_acc(x[(first + i) * columns + k]);
                }
            }
#pragma unroll
            for (int i = 0; i < INPUTS; ++i) {
                if (first + i >= count) break;
                Acc sum = reduce_warp(sums[i], [](Acc a, Acc b) { return a + b; }) * (Acc)scales[row];
                if (bias) sum += Element<T>::to_acc(bias[row]);
                if (threadIdx.x == 0) y[(first + i) * rows + row] = Element<T>::from_acc(sum);
            }
        }
    }
}

extern "C" __global__ void int8_dequantize(T* y, const signed char* w, const f32* scales, i64 n, u32 columns) {
    for_elements(n, false, [&](i64 i, auto) {
        u64 row = i;
        divide(row, columns);
        y[i] = from_f64<T>((f64)w[i] * (f64)scales[row]);
    });
}
