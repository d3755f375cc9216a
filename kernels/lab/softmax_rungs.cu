// The slower rungs below kernels/softmax.cu, for benches/ladder.rs: y_j = exp(x_j - max x) / sum_k exp(x_k - max x).
//
// Shapes: y, x [rows, columns], packed. T: f32, bf16; statistics in f32.
// Variants: DTYPE=f32,bf16
//
//   thread: one row per thread, read three times. Neighbouring threads read addresses a row apart, so each load of a
//           warp touches 32 sectors and uses 4 of their 32 bytes.
//   block:  one row per block of 256 threads, reductions as a tree in shared memory: loads are coalesced, but a row
//           waits for eight barriers twice, and most threads are idle in the last steps.
//   warp:   one row per warp, reductions by shuffles: no barrier and no shared memory, but one element per load.
//
// The shipped kernel adds packets of 128 bits and finds maximum and sum in one reading.

#include "common.cuh"

typedef Element<T>::Acc Acc;

__device__ __forceinline__ Acc at(const T* x, u32 j) { return Element<T>::to_acc(x[j]); }

// Blocks of any number of threads.
extern "C" __global__ void softmax_rungs_thread(T* y, const T* x, i64 rows, u32 columns) {
    const i64 row = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= rows) return;
    const T* from = x + row * columns;
    Acc largest = lowest<Acc>(), sum = 0;
    for (u32 j = 0; j < columns; ++j) largest = max(largest, at(from, j));
    for (u32 j = 0; j < columns; ++j) sum += exp(at(from, j) - largest);
    for (u32 j = 0; j < columns; ++j) y[row * columns + j] = Element<T>::from_acc(exp(at(from, j) - largest) / sum);
}

// Combines the values of 256 threads by halves.
template <typename F> __device__ __forceinline__ Acc reduce_tree(Acc* shared, Acc value, F combine) {
    shared[threadIdx.x] = value;
    __syncthreads();
    for (u32 half = 128; half > 0; half /= 2) {
        if (threadIdx.x < half) shared[threadIdx.x] = combine(shared[threadIdx.x], shared[threadIdx.x + half]);
        __syncthreads();
    }
    const Acc result = shared[0];
    __syncthreads();
    return result;
}

// Blocks of 256 threads.
extern "C" __global__ void softmax_rungs_block(T* y, const T* x, i64 rows, u32 columns) {
    __shared__ Acc shared[256];
    const i64 row = blockIdx.x;
    const T* from = x + row * columns;
    Acc largest = lowest<Acc>(), sum = 0;
    for (u32 j = threadIdx.x; j < columns; j += 256) largest = max(largest, at(from, j));
    largest = reduce_tree(shared, largest, [](Acc a, Acc b) { return max(a, b); });
    for (u32 j = threadIdx.x; j < columns; j += 256) sum += exp(at(from, j) - largest);
    sum = reduce_tree(shared, sum, [](Acc a, Acc b) { return a + b; });
    for (u32 j = threadIdx.x; j < columns; j += 256) {
        y[row * columns + j] = Element<T>::from_acc(exp(at(from, j) - largest) / sum);
    }
}

// Blocks of 32 x 8 threads, which take eight rows.
extern "C" __global__ void softmax_rungs_warp(T* y, const T* x, i64 rows, u32 columns) {
    const i64 row = (i64)blockIdx.x * blockDim.y + threadIdx.y;
    if (row >= rows) return;
    const T* from = x + row * columns;
    Acc largest = lowest<Acc>(), sum = 0;
    for (u32 j = threadIdx.x; j < columns; j += 32) largest = max(largest, at(from, j));
    largest = reduce_warp(largest, [](Acc a, Acc b) { return max(a, b); });
    for (u32 j = threadIdx.x; j < columns; j += 32) sum += exp(at(from, j) - largest);
    sum = reduce_warp(sum, [](Acc a, Acc b) { return a + b; });
    for (u32 j = threadIdx.x; j < columns; j += 32) {
        y[row * columns + j] = Element<T>::from_acc(exp(at(from, j) - largest) / sum);
    }
}
