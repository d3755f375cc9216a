// Copies between tensors of any strides: y = x, and sum = sum + x.
//
// Shapes: n elements of one shape on both sides, whose dimensions the host has merged where both layouts allow it: a
// transposed, sliced or broadcast tensor to a packed one, or a tensor to its part of a larger one. No element of y is
// written twice. T: every dtype; sums of integers are not used.
// Variants: DTYPE=FLOATS,i64,bool
//
// copy_strided and copy_add: each thread takes elements a grid apart, so that writes are coalesced; where the innermost
// dimension is packed and everything is aligned to 128 bits, it takes 16 bytes at a time instead of one element.
// copy_transposed: where x is packed along another dimension than y, a block reads square tiles along that and writes
// them along the other, in packets of 128 bits where those are aligned, through shared memory, where at most two
// threads of a warp hit the same bank.
// Moves 2 sizeof(T) per element, 3 for a sum. Limited by memory bandwidth if x and y are packed along a dimension of
// sufficient length; otherwise x is read in sectors of 32 bytes, of which one element is used at a time and the caches
// keep the rest.

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

// Tile size, threads per block, packets along a side and per thread. Rows of the tile are padded by at least a word, so
// that a column spreads over many banks; their length is a multiple of a word.
constexpr u32 TILE = sizeof(T) == 8 ? 32 : 64, PAD = sizeof(T) >= 4 ? 1 : 4 / sizeof(T), THREADS = 256;
constexpr u32 ALONG = TILE / LANES, COUNT = TILE * ALONG / THREADS;
static_assert(TILE % LANES == 0 && COUNT > 0, "each thread has a packet");

__device__ __forceinline__ bool multiple(i64 n) { return n % LANES == 0; }

// True if `layout` locates matrices that begin at multiples of 128 bits.
__device__ __forceinline__ bool begin_in_packets(const T* x, const Layout& layout) {
    bool all = aligned(x) && multiple(layout.offset);
#pragma unroll
    for (int dim = 0; dim < MAX_RANK; ++dim) {
        if (dim < layout.rank) all &= multiple(layout.strides[dim]);
    }
    return all;
}

// Transposes `batches` matrices whose first elements `to` and `from` locate: y [rows, columns] with packed rows
// `to_step` apart, x with packed columns `from_step` apart.
extern "C" __global__ void __launch_bounds__(THREADS)
    copy_transposed(T* y, const T* x, Layout to, Layout from, i64 batches, u32 rows, u32 columns, i64 to_step,
                    i64 from_step, u32 add) {
    __shared__ __align__(16) T tile[TILE][TILE + PAD];
    const u32 down = (rows + TILE - 1) / TILE, across = (columns + TILE - 1) / TILE;
    const u32 thread = threadIdx.y * 32 + threadIdx.x;
    const bool packed_x = begin_in_packets(x, from) && multiple(from_step) && multiple(rows);
    const bool packed_y = begin_in_packets(y, to) && multiple(to_step) && multiple(columns);
    for (i64 index = blockIdx.x; index < batches * down * across; index += gridDim.x) {
        u64 batch = index;
        const u32 left = divide(batch, across) * TILE, top = divide(batch, down) * TILE;
        const auto at = positions(batch, to, from);
        Raw<LANES> read[COUNT];
#pragma unroll
        for (u32 n = 0; n < COUNT; ++n) {
            const u32 i = n * THREADS + thread, row = top + i % ALONG * LANES, column = left + i / ALONG;
            const T* first = x + at.of[1] + column * from_step + row;
            if (packed_x) {
                read[n] = Raw<LANES>(first, row < rows && column < columns);
            } else if (column < columns) {
                read[n] = Raw<LANES>(first, (i32)rows - (i32)row);
            }
        }
#pragma unroll
        for (u32 n = 0; n < COUNT; ++n) {
            const u32 i = n * THREADS + thread;
            u32* words = reinterpret_cast<u32*>(&tile[i / ALONG][i % ALONG * LANES]);
#pragma unroll
            for (int word = 0; word < 4; ++word) words[word] = read[n].part[word];
        }
        __syncthreads();
#pragma unroll
        for (u32 n = 0; n < COUNT; ++n) {
            const u32 i = n * THREADS + thread, row = top + i / ALONG, column = left + i % ALONG * LANES;
            if (row >= rows || column >= columns) continue;
            T* first = y + at.of[0] + row * to_step + column;
            Packet<LANES> packet;
#pragma unroll
            for (int lane = 0; lane < LANES; ++lane) packet.lane[lane] = tile[i % ALONG * LANES + lane][i / ALONG];
            const auto plus = [](T a, T b) {
                return Element<T>::from_acc(Element<T>::to_acc(a) + Element<T>::to_acc(b));
            };
            if (packed_y) {
                if (add) {
                    const auto sum = load<LANES>(first);
#pragma unroll
                    for (int lane = 0; lane < LANES; ++lane) {
                        packet.lane[lane] = plus(sum.lane[lane], packet.lane[lane]);
                    }
                }
                store(first, packet);
            } else {
#pragma unroll
                for (int lane = 0; lane < LANES; ++lane) {
                    if (column + lane < columns) {
                        first[lane] = add ? plus(first[lane], packet.lane[lane]) : packet.lane[lane];
                    }
                }
            }
        }
        // Everything is read before the next tile overwrites it.
        __syncthreads();
    }
}
