// The slower rungs below kernels/norm.cu, for benches/ladder.rs: y = (x - mean) / sqrt(variance + eps), without weight
// and bias.
//
// Shapes: y, x [rows, columns], packed. T: f32, bf16; statistics in f32.
// Variants: DTYPE=f32,bf16
//
//   thread: one row per thread, read three times, never coalesced.
//   block:  one row per block of 256 threads, sums as a tree in shared memory.
//   warp:   one row per warp, sums by shuffles, one element per load; the row is read three times from the caches.
//
// The shipped kernel reads packets of 128 bits, and long rows with a whole block.

#include "common.cuh"

typedef Element<T>::Acc Acc;

__device__ __forceinline__ Acc at(const T* x, u32 j) { return Element<T>::to_acc(x[j]); }

// The row by threads `first`, `first + step`, …, whose sums `add` brings together.
template <typename Add>
__device__ __forceinline__ void norm_row(T* y, const T* x, u32 columns, f64 eps, u32 first, u32 step, Add add) {
    Acc sum = 0, squares = 0;
    for (u32 j = first; j < columns; j += step) sum += at(x, j);
    const Acc mean = add(sum) / columns;
    for (u32 j = first; j < columns; j += step) squares += (at(x, j) - mean) * (at(x, j) - mean);
    const Acc inverse = 1 / sqrt(add(squares) / columns + (Acc)eps);
    for (u32 j = first; j < columns; j += step) y[j] = Element<T>::from_acc((at(x, j) - mean) * inverse);
}

// Blocks of any number of threads.
extern "C" __global__ void layer_norm_rungs_thread(T* y, const T* x, i64 rows, u32 columns, f64 eps) {
    const i64 row = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= rows) return;
    norm_row(y + row * columns, x + row * columns, columns, eps, 0, 1, [](Acc sum) { return sum; });
}

// Blocks of 256 threads.
extern "C" __global__ void layer_norm_rungs_block(T* y, const T* x, i64 rows, u32 columns, f64 eps) {
    __shared__ Acc shared[256];
    const i64 start = (i64)blockIdx.x * columns;
    norm_row(y + start, x + start, columns, eps, threadIdx.x, 256, [&](Acc sum) {
        shared[threadIdx.x] = sum;
        __syncthreads();
        for (u32 half = 128; half > 0; half /= 2) {
            if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
            __syncthreads();
        }
        const Acc total = shared[0];
        __syncthreads();
        return total;
    });
}

// Blocks of 32 x 8 threads, which take eight rows.
extern "C" __global__ void layer_norm_rungs_warp(T* y, const T* x, i64 rows, u32 columns, f64 eps) {
    const i64 row = (i64)blockIdx.x * blockDim.y + threadIdx.y;
    if (row >= rows) return;
    norm_row(y + row * columns, x + row * columns, columns, eps, threadIdx.x, 32,
             [](Acc sum) { return reduce_warp(sum, [](Acc a, Acc b) { return a + b; }); });
}
