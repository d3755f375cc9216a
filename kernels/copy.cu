// Copies between tensors of any strides: y = x, and sum = sum + x.
//
// Shapes: n elements of one shape on both sides, whose dimensions the host has merged where both layouts allow it: a
// transposed, sliced or broadcast tensor to a packed one, or a tensor to its part of a larger one. No element of y is
// written twice. T: every dtype; sums of integers are not used.
// Variants: DTYPE=f32,f64,bf16,f16,i64,bool
//
// copy_strided and copy_add: each thread takes elements a grid apart, so that writes are coalesced; where the innermost
// dimension is packed and everything is aligned to 128 bits, it takes 16 bytes at a time instead of one element.
// copy_transposed: where x is packed along another dimension than y, a block reads tiles of 32 x 32 elements along that
// and writes them along the other; in between they are in shared memory, where rows are an element longer, so that
// neither direction has bank conflicts.
// Moves 2 sizeof(T) per element, 3 for a sum. Limited by memory bandwidth where x and y are packed along a dimension
// of some length; otherwise x is read in sectors of 32 bytes of which one element is used at a time, the rest being
// left to the caches.

#include "common.cuh"
#include "strided.cuh"

__device__ __forceinline__ bool both_in_packets(const T* y, const T* x, const Layout& to, const Layout& from) {
    return last_step(to) == 1 && in_packets(y, to) && in_packets(x, from);
}

extern "C" __global__ void copy_strided(T* y, const T* x, Layout to, Layout from, i64 n) {
    const i64 step = last_step(from);
    for_elements(n, both_in_packets(y, x, to, from), [&](i64 i, auto lanes) {
        const auto at = positions(i, to, from);
        store(y + at.of[0], gather<lanes.COUNT>(x, at.of[1], step));
    });
}

extern "C" __global__ void copy_add(T* sum, const T* x, Layout to, Layout from, i64 n) {
    const i64 step = last_step(from);
    for_elements(n, both_in_packets(sum, x, to, from), [&](i64 i, auto lanes) {
        const auto at = positions(i, to, from);
        auto total = load<lanes.COUNT>(sum + at.of[0]);
        const auto summand = gather<lanes.COUNT>(x, at.of[1], step);
#pragma unroll
        for (int lane = 0; lane < lanes.COUNT; ++lane) {
            total.lane[lane] =
                Element<T>::from_acc(Element<T>::to_acc(total.lane[lane]) + Element<T>::to_acc(summand.lane[lane]));
        }
        store(sum + at.of[0], total);
    });
}

constexpr u32 TILE = 32, HEIGHT = 8;

// `batches` matrices, of which `to` and `from` locate the first elements: y [rows, columns] with packed rows `to_step`
// apart, x with packed columns `from_step` apart.
extern "C" __global__ void copy_transposed(T* y, const T* x, Layout to, Layout from, i64 batches, u32 rows, u32 columns,
                                           i64 to_step, i64 from_step, u32 add) {
    __shared__ T tile[TILE][TILE + 1];
    const u32 down = (rows + TILE - 1) / TILE, across = (columns + TILE - 1) / TILE;
    for (i64 index = blockIdx.x; index < batches * down * across; index += gridDim.x) {
        u64 batch = index;
        const u32 left = divide(batch, across) * TILE, top = divide(batch, down) * TILE;
        const auto at = positions(batch, to, from);
#pragma unroll
        for (u32 j = threadIdx.y; j < TILE; j += HEIGHT) {
            const u32 row = top + threadIdx.x, column = left + j;
            if (row < rows && column < columns) tile[j][threadIdx.x] = x[at.of[1] + column * from_step + row];
        }
        __syncthreads();
#pragma unroll
        for (u32 i = threadIdx.y; i < TILE; i += HEIGHT) {
            const u32 row = top + i, column = left + threadIdx.x;
            if (row < rows && column < columns) {
                T* element = y + at.of[0] + row * to_step + column;
                const T value = tile[threadIdx.x][i];
                *element =
                    add ? Element<T>::from_acc(Element<T>::to_acc(*element) + Element<T>::to_acc(value)) : value;
            }
        }
        // Everything is read before the next tile overwrites it.
        __syncthreads();
    }
}
