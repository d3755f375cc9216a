// Token shift: chunk t of the features moves by amounts[t] positions, zeros come in.
//
//   y[b, i, d] = x[b, i - amount, d], or 0 if that position is outside or masked
//   y[b, i, d] = x[b, i, d] where amount = 0, or where d is left over behind the last chunk
//
// The backward pass moves by the opposite amounts; the mask is about the target then, not about the source.
//
// Shapes: y, x [batch, positions, columns], packed; mask (bool) [batch, positions] or none; amounts [chunks], each for
// `chunk` features. T: f32, f64, bf16, f16.
// Variants: DTYPE=f32,f64,bf16,f16
//
// A thread takes a packet of y, which is a packet of x too if chunks are whole packets, a grid apart.
// Moves 2 sizeof(T) per element. Limited by memory bandwidth.

#include "common.cuh"

template <int N>
__device__ __forceinline__ void shift(T* y, const T* x, const unsigned char* mask, const i64* amounts, Index n,
                                      u32 positions, u32 columns, u32 chunks, u32 chunk, u32 mask_of_source) {
    const Index step = (Index)gridDim.x * blockDim.x * N;
    for (Index i = ((Index)blockIdx.x * blockDim.x + threadIdx.x) * N; i < n; i += step) {
        const Index row = i / columns;
        const u32 part = i % columns / chunk;
        const i64 amount = part < chunks ? amounts[part] : 0;
        const i64 position = row % positions - amount, source = (i64)row - amount;
        bool kept = amount == 0 || (position >= 0 && position < positions);
        if (kept && amount != 0 && mask != nullptr) kept = mask[mask_of_source ? source : (i64)row];
        // Zero has no bits set in any float type.
        Packet<N> packet = {};
        if (kept) packet = load<N>(x + (i64)i - amount * columns);
        store(y + i, packet);
    }
}

extern "C" __global__ void shift_tokens(T* y, const T* x, const unsigned char* mask, const i64* amounts, i64 n,
                                        u32 positions, u32 columns, u32 chunks, u32 chunk, u32 mask_of_source) {
    if (aligned(y) && aligned(x) && columns % LANES == 0 && chunk % LANES == 0) {
        shift<LANES>(y, x, mask, amounts, (Index)n, positions, columns, chunks, chunk, mask_of_source);
    } else {
        shift<1>(y, x, mask, amounts, (Index)n, positions, columns, chunks, chunk, mask_of_source);
    }
}
