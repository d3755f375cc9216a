// Rungs of a transposed copy, for benches/ladder.rs: y[j, i] = x[i, j].
//
// Shapes: x [rows, columns], y [columns, rows], packed. T: f32, bf16.
// Variants: DTYPE=f32,bf16
//
//   read:   neighbouring threads read neighbours and write a column apart: each store of a warp touches 32 sectors.
//   write:  the other way round; loads are scattered, which caches tolerate better than scattered stores.
//   tile:   32 x 32 elements through shared memory, so that both sides are coalesced; but a column of the tile lies in
//           one bank (f32), whose 32 accesses are serialized.
//   padded: one more column in the tile, which shifts each row by a bank.
//
// The shipped copy_transposed of kernels/copy.cu does the last for tensors of any strides.

#include "common.cuh"

constexpr u32 TILE = 32, HEIGHT = 8;

// Grids of threads 32 x 8, one for each element of x.
extern "C" __global__ void transpose_rungs_read(T* y, const T* x, i64 rows, i64 columns) {
    const i64 j = (i64)blockIdx.x * TILE + threadIdx.x, i = (i64)blockIdx.y * HEIGHT + threadIdx.y;
    if (i < rows && j < columns) y[j * rows + i] = x[i * columns + j];
}

// Grids of threads 32 x 8, one for each element of y.
extern "C" __global__ void transpose_rungs_write(T* y, const T* x, i64 rows, i64 columns) {
    const i64 i = (i64)blockIdx.x * TILE + threadIdx.x, j = (i64)blockIdx.y * HEIGHT + threadIdx.y;
    if (i < rows && j < columns) y[j * rows + i] = x[i * columns + j];
}

template <u32 WIDTH>
__device__ __forceinline__ void through_tile(T (&tile)[TILE][WIDTH], T* y, const T* x, i64 rows, i64 columns) {
    const i64 left = (i64)blockIdx.x * TILE, top = (i64)blockIdx.y * TILE;
    for (u32 k = threadIdx.y; k < TILE; k += HEIGHT) {
        const i64 i = top + k, j = left + threadIdx.x;
        if (i < rows && j < columns) tile[k][threadIdx.x] = x[i * columns + j];
    }
    __syncthreads();
    for (u32 k = threadIdx.y; k < TILE; k += HEIGHT) {
        const i64 j = left + k, i = top + threadIdx.x;
        if (i < rows && j < columns) y[j * rows + i] = tile[threadIdx.x][k];
    }
}

// Blocks of 32 x 8 threads, one for each tile of x.
extern "C" __global__ void transpose_rungs_tile(T* y, const T* x, i64 rows, i64 columns) {
    __shared__ T tile[TILE][TILE];
    through_tile(tile, y, x, rows, columns);
}

extern "C" __global__ void transpose_rungs_padded(T* y, const T* x, i64 rows, i64 columns) {
    __shared__ T tile[TILE][TILE + 1];
    through_tile(tile, y, x, rows, columns);
}
