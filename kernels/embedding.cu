// Rows of a table by index, and the gradient of the table.
//
//   forward:  y_i = table[index_i]
//   backward: dtable_t = sum of g_i over the i with index_i = t, in their order
//
// Shapes: table, dtable [tokens, dim], indices [count], y, g [count, dim], keys [padded], all packed; count and tokens
// below 2^31. T: f32, f64, bf16, f16; sums in f32 (f64 for f64).
// Variants: DTYPE=FLOATS
//
// Forward: a warp or a block copies a row (see for_row). An index outside the table is reported, and its row is zero.
// Backward, without atomics and in an order that does not depend on the threads: keys `index 2^32 + i` are sorted by a
// bitonic network (Batcher, "Sorting networks and their applications", 1968), which makes the uses of a token adjacent
// and keeps their order. Then each row of the table finds its uses by bisection, and each thread adds up one packet of
// columns over them. Steps of the network within a tile of TILE keys run in shared memory, in one kernel.
// Moves 2 sizeof(T) per element of y forward; backward sizeof(T) per element of g and of dtable, and 16 bytes per key
// and launch of the sort. Limited by memory bandwidth, or by the latency of a token with very many uses.

#include "common.cuh"

typedef Element<T>::Acc Acc;

extern "C" __global__ void embedding_fwd(T* y, i64* fault, const T* table, const i64* indices, i64 count, i64 tokens,
                                         u32 dim) {
    const i64 step = (i64)gridDim.x * blockDim.y;
    for (i64 row = (i64)blockIdx.x * blockDim.y + threadIdx.y; row < count; row += step) {
        const i64 index = indices[row];
        // A negative index becomes a large number.
        const bool known = (u64)index < (u64)tokens;
        if (!known && threadIdx.x == 0) report_fault(fault, FAULT_EMBEDDING, index, tokens);
        T* to = y + row * dim;
        const T* from = table + (known ? index : 0) * dim;
        for_row(dim, aligned(to) && aligned(from), [&](u32 j, auto lanes) {
            Packet<lanes.COUNT> values = {};
            if (known) values = load<lanes.COUNT>(from + j);
            store(to + j, values);
        });
    }
}

// Keys that one block sorts.
constexpr u32 TILE = 2048;

// One comparison of the network, between elements `distance` apart: the order of runs of `size` alternates.
__device__ __forceinline__ void compare(u64* keys, u64 low, u64 distance, bool ascending) {
    const u64 a = keys[low], b = keys[low + distance];
    if ((a > b) == ascending) {
        keys[low] = b;
        keys[low + distance] = a;
    }
}

// The lower element of pair `pair` among those `distance` apart, which is a power of two.
__device__ __forceinline__ u64 lower_of_pair(u64 pair, u64 distance) { return 2 * pair - (pair & (distance - 1)); }

// The steps at distances below TILE that merge runs of `size`, for the tile that starts at `first`.
__device__ __forceinline__ void merge_in_tile(u64* tile, u64 first, u64 size) {
    for (u64 distance = min(size, (u64)TILE) / 2; distance > 0; distance /= 2) {
        __syncthreads();
        for (u32 pair = threadIdx.x; pair < TILE / 2; pair += blockDim.x) {
            const u64 low = lower_of_pair(pair, distance);
            compare(tile, low, distance, ((first + low) & size) == 0);
        }
    }
    __syncthreads();
}

// Creates the keys and sorts each tile. Keys of indices outside the table, and those that pad to `padded`, a power of
// two and whole tiles, come last.
extern "C" __global__ void embedding_sort_tiles(u64* keys, const i64* indices, i64 count, i64 padded, i64 tokens) {
    __shared__ u64 tile[TILE];
    for (i64 first = (i64)blockIdx.x * TILE; first < padded; first += (i64)gridDim.x * TILE) {
        for (u32 at = threadIdx.x; at < TILE; at += blockDim.x) {
            const u64 index = first + at < count ? indices[first + at] : -1;
            tile[at] = (index < (u64)tokens ? index : tokens) << 32 | (u64)(first + at);
        }
        for (u64 size = 2; size <= TILE; size *= 2) merge_in_tile(tile, first, size);
        for (u32 at = threadIdx.x; at < TILE; at += blockDim.x) keys[first + at] = tile[at];
        __syncthreads();
    }
}

// One step at a distance of TILE or more.
extern "C" __global__ void embedding_sort_step(u64* keys, i64 padded, i64 size, i64 distance) {
    const i64 threads = (i64)gridDim.x * blockDim.x;
    for (i64 pair = (i64)blockIdx.x * blockDim.x + threadIdx.x; pair < padded / 2; pair += threads) {
        const u64 low = lower_of_pair(pair, distance);
        compare(keys, low, distance, (low & size) == 0);
    }
}

// The remaining steps of merging runs of `size`.
extern "C" __global__ void embedding_sort_merge(u64* keys, i64 padded, i64 size) {
    __shared__ u64 tile[TILE];
    for (i64 first = (i64)blockIdx.x * TILE; first < padded; first += (i64)gridDim.x * TILE) {
        for (u32 at = threadIdx.x; at < TILE; at += blockDim.x) tile[at] = keys[first + at];
        merge_in_tile(tile, first, size);
        for (u32 at = threadIdx.x; at < TILE; at += blockDim.x) keys[first + at] = tile[at];
        __syncthreads();
    }
}

// The number of sorted keys below `bound`.
__device__ __forceinline__ i64 keys_below(const u64* keys, i64 count, u64 bound) {
    i64 low = 0, high = count;
    while (low < high) {
        const i64 middle = (low + high) / 2;
        if (keys[middle] < bound) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

template <int N>
__device__ __forceinline__ void add_up_uses(T* dtable, const T* g, const u64* keys, i64 count, i64 tokens, u32 dim) {
    for (i64 token = (i64)blockIdx.x * blockDim.y + threadIdx.y; token < tokens; token += (i64)gridDim.x * blockDim.y) {
        const i64 first = keys_below(keys, count, (u64)token << 32);
        const bool used = first < count && keys[first] >> 32 == token;
        const i64 last = used ? keys_below(keys, count, (u64)(token + 1) << 32) : first;
        for (u32 j = (blockIdx.y * blockDim.x + threadIdx.x) * N; j < dim; j += gridDim.y * blockDim.x * N) {
            Acc sum[N] = {};
#pragma unroll 4
            for (i64 use = first; use < last; ++use) {
                const auto gradient = load<N>(g + (u32)keys[use] * (i64)dim + j);
#pragma unroll
                for (int lane = 0; lane < N; ++lane) sum[lane] += Element<T>::to_acc(gradient.lane[lane]);
            }
            Packet<N> result;
#pragma unroll
            for (int lane = 0; lane < N; ++lane) result.lane[lane] = Element<T>::from_acc(sum[lane]);
            store(dtable + token * dim + j, result);
        }
    }
}

// blockIdx.x and threadIdx.y select rows, blockIdx.y and threadIdx.x columns.
extern "C" __global__ void embedding_bwd(T* dtable, const T* g, const u64* keys, i64 count, i64 tokens, u32 dim) {
    if (dim % LANES == 0 && aligned(dtable) && aligned(g)) {
        add_up_uses<LANES>(dtable, g, keys, count, tokens, dim);
    } else {
        add_up_uses<1>(dtable, g, keys, count, tokens, dim);
    }
}
