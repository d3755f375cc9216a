// Products with packed weights, and packed rows as floats: GGUF's blocks of integers with common scales.
//
//   linear:  y[i, j] = sum_k x[i, k] w[j, k] (+ bias[j])
//   rows:    y[i, k] = w[index_i, k], or w[i, k] without indices
//
// Shapes: y [count, rows] or [count, columns], x [count, columns], w rows of blocks with `columns` values, bias [rows]
// or none, indices [count] or none; all packed. `kind` is the number of the type in GGUF files. T: f32, f64, bf16, f16;
// values of w have the bits of the CPU's, in f32; sums in f32 (f64 for f64).
// Variants: DTYPE=FLOATS
//
// A warp owns a row of w; its lanes take turns at groups of 32 values, which they convert in registers. For products
// they do so once for INPUTS of the inputs, a few, which stay in the caches. An index outside of w is reported, and its
// row is zero. Moves 0.56 to 1.06 bytes per value of w. Limited by the latency of loads of two bytes, since blocks are
// no better aligned.

#include "common.cuh"

typedef Element<T>::Acc Acc;
typedef unsigned char u8;
typedef signed char i8;
typedef unsigned short u16;

constexpr u32 GROUP = 32;

// Inputs that share a reading of the weights.
constexpr int INPUTS = 4;

// The types by their numbers in GGUF files.
constexpr u32 Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = 8, Q4_K = 12, Q5_K = 13, Q6_K = 14, IQ4_NL = 20;

// Values that the 4-bit integers of IQ4_NL stand for.
__constant__ i8 LEVELS[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

// Values and bytes of a block.
__device__ __forceinline__ u32 values_of_block(u32 kind) { return kind >= Q4_K && kind <= Q6_K ? 256 : 32; }

__device__ __forceinline__ u32 bytes_of_block(u32 kind) {
    switch (kind) {
        case Q4_1: return 20;
        case Q5_0: return 22;
        case Q5_1: return 24;
        case Q8_0: return 34;
        case Q4_K: return 144;
        case Q5_K: return 176;
        case Q6_K: return 210;
        default: return 18;
    }
}

__device__ __forceinline__ u32 pair(const u8* at) { return *(const u16*)at; }

__device__ __forceinline__ f32 half(const u8* at) { return ptx_f16_to_f32(*(const u16*)at); }

__device__ __forceinline__ f32 line(f32 scale, f32 q, f32 offset) { return __fadd_rn(__fmul_rn(scale, q), offset); }

// The 6-bit scale and minimum of a group in the 12 bytes of a block of 256.
__device__ __forceinline__ void sixes(const u8* at, u32 group, f32* scale, f32* least) {
    if (group < 4) {
        *scale = at[group] & 63;
        *least = at[4 + group] & 63;
    } else {
        const u32 low = at[4 + group];
        *scale = (low & 15) | (at[group - 4] >> 2 & 48);
        *least = low >> 4 | (at[group] >> 2 & 48);
    }
}

// Calls `give(i, value)` for the 32 values of a group of a row.
template <typename F> __device__ __forceinline__ void for_group(const u8* row, u32 group, u32 kind, F give) {
    if (values_of_block(kind) == GROUP) {
        const u8* block = row + group * bytes_of_block(kind);
        const f32 scale = half(block);
        if (kind == Q8_0) {
#pragma unroll
            for (u32 i = 0; i < GROUP; i += 2) {
                const u32 bytes = pair(block + 2 + i);
                give(i, scale * (f32)(i8)bytes);
                give(i + 1, scale * (f32)(i8)(bytes >> 8));
            }
            return;
        }
        const bool stored = kind == Q4_1 || kind == Q5_1, fifth = kind == Q5_0 || kind == Q5_1;
        const f32 offset = stored ? half(block + 2) : 0.0f;
        const i32 less = kind == Q4_0 ? 8 : kind == Q5_0 ? 16 : 0;
        const u8* high = block + (stored ? 4 : 2);
        const u32 bits = fifth ? pair(high) | pair(high + 2) << 16 : 0;
        const u8* low = high + (fifth ? 4 : 0);
#pragma unroll
        for (u32 i = 0; i < GROUP / 2; i += 2) {
            const u32 bytes = pair(low + i);
#pragma unroll
            for (u32 part = 0; part < 4; ++part) {
                const u32 at = i + part % 2 + part / 2 * 16;
                const u32 q = (bytes >> (8 * (part % 2) + 4 * (part / 2)) & 15) | (bits >> at & 1) << 4;
                if (kind == IQ4_NL) {
                    give(at, scale * (f32)LEVELS[q]);
                } else {
                    const f32 value = (f32)((i32)q - less);
                    give(at, stored ? line(scale, value, offset) : scale * value);
                }
            }
        }
        return;
    }
    const u8* block = row + group / 8 * bytes_of_block(kind);
    const u32 part = group % 8;
    if (kind == Q6_K) {
        const u8* low = block + 64 * (part / 4) + 32 * (part % 2);
        const u8* high = block + 128 + 32 * (part / 4);
        const u32 low_shift = part % 4 / 2 * 4, high_shift = part % 4 * 2;
        const f32 whole = half(block + 208);
        const f32 scales[2] = {whole * (f32)(i8)block[192 + 2 * part], whole * (f32)(i8)block[193 + 2 * part]};
#pragma unroll
        for (u32 i = 0; i < GROUP; i += 2) {
            const u32 lows = pair(low + i) >> low_shift, highs = pair(high + i) >> high_shift;
            give(i, scales[i / 16] * (f32)((i32)((lows & 15) | (highs & 3) << 4) - 32));
            give(i + 1, scales[i / 16] * (f32)((i32)((lows >> 8 & 15) | (highs >> 8 & 3) << 4) - 32));
        }
        return;
    }
    f32 scale, least;
    sixes(block + 4, part, &scale, &least);
    scale *= half(block);
    least *= half(block + 2);
    const u8* high = block + 16;
    const u8* low = block + (kind == Q5_K ? 48 : 16) + 32 * (part / 2);
    const u32 shift = part % 2 * 4;
#pragma unroll
    for (u32 i = 0; i < GROUP; i += 2) {
        const u32 lows = pair(low + i) >> shift, highs = kind == Q5_K ? pair(high + i) >> part : 0;
        give(i, line(scale, (f32)((lows & 15) | (highs & 1) << 4), -least));
        give(i + 1, line(scale, (f32)((lows >> 8 & 15) | (highs >> 8 & 1) << 4), -least));
    }
}

extern "C" __global__ void packed_linear(T* y, const T* x, const bool* w, const T* bias, i64 count, i64 rows,
                                         u32 columns, u32 kind) {
    const i64 step = (i64)gridDim.x * blockDim.y, width = columns / values_of_block(kind) * bytes_of_block(kind);
    for (i64 row = (i64)blockIdx.x * blockDim.y + threadIdx.y; row < rows; row += step) {
        const u8* weights = (const u8*)w + row * width;
        for (i64 first = 0; first < count; first += INPUTS) {
            Acc sums[INPUTS] = {};
            for (u32 group = threadIdx.x; group < columns / GROUP; group += 32) {
                const T* from = x + first * columns + group * GROUP;
                for_group(weights, group, kind, [&](u32 i, f32 value) {
#pragma unroll
                    for (int input = 0; input < INPUTS; ++input) {
                        if (first + input >= count) break;
                        sums[input] += (Acc)value * Element<T>::to_acc(from[(i64)input * columns + i]);
                    }
                });
            }
#pragma unroll
            for (int input = 0; input < INPUTS; ++input) {
                if (first + input >= count) break;
                Acc sum = reduce_warp(sums[input], [](Acc a, Acc b) { return a + b; });
                if (bias) sum += Element<T>::to_acc(bias[row]);
                if (threadIdx.x == 0) y[(first + input) * rows + row] = Element<T>::from_acc(sum);
            }
        }
    }
}

extern "C" __global__ void packed_rows(T* y, i64* fault, const bool* w, const i64* indices, i64 count, i64 rows,
                                       u32 columns, u32 kind) {
    const i64 step = (i64)gridDim.x * blockDim.y, width = columns / values_of_block(kind) * bytes_of_block(kind);
    for (i64 row = (i64)blockIdx.x * blockDim.y + threadIdx.y; row < count; row += step) {
        const i64 index = indices ? indices[row] : row;
        // A negative index becomes a large number.
        const bool known = (u64)index < (u64)rows;
        if (!known && threadIdx.x == 0) report_fault(fault, FAULT_EMBEDDING, index, rows);
        const u8* weights = (const u8*)w + (known ? index : 0) * width;
        for (u32 group = threadIdx.x; group < columns / GROUP; group += 32) {
            T* to = y + row * columns + group * GROUP;
            for_group(weights, group, kind, [&](u32 i, f32 value) {
                to[i] = from_f64<T>(known ? (f64)value : 0.0);
            });
        }
    }
}
