// Random numbers: y[i] = word i of the Philox stream, or draw i of its uniform numbers.
//
// Shapes: y [n]. T: f32, f64. Each thread makes whole blocks of four words (two uniform numbers), a grid apart.
// Uniform numbers are in [0, 1) with 53 bits and are then rounded to T, so that f32 may reach 1.
// Moves 4 bytes (words) or sizeof(T) (uniform) per element, written only; limited by the 32-bit multiplications of
// Philox, 40 per four words.
// Variants: DTYPE=f32,f64

#include "common.cuh"
#include "philox.cuh"

extern "C" __global__ void random_words(u32* y, i64 n, u64 seed, u64 stream) {
    const i64 step = (i64)gridDim.x * blockDim.x;
    for (i64 block = (i64)blockIdx.x * blockDim.x + threadIdx.x; block * 4 < n; block += step) {
        const Words words = philox_block(seed, stream, block);
#pragma unroll
        for (int lane = 0; lane < 4; ++lane) {
            if (block * 4 + lane < n) y[block * 4 + lane] = words.word[lane];
        }
    }
}

extern "C" __global__ void random_uniform(T* y, i64 n, u64 seed, u64 stream) {
    const i64 step = (i64)gridDim.x * blockDim.x;
    for (i64 block = (i64)blockIdx.x * blockDim.x + threadIdx.x; block * 2 < n; block += step) {
        const Words words = philox_block(seed, stream, block);
        y[block * 2] = (T)philox_uniform(words.word[0], words.word[1]);
        if (block * 2 + 1 < n) y[block * 2 + 1] = (T)philox_uniform(words.word[2], words.word[3]);
    }
}
