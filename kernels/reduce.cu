// Sums over one dimension, and the largest element of each row.
//
//   y[o, i] = sum_c x[o, c, i] / divisor
//
// Shapes: x [outer, count, inner] packed, y [outer, inner]. T: f32, f64, bf16, f16; sums in f32 (f64 for f64). Or i64,
// whose sums wrap around.
// Variants: DTYPE=FLOATS,i64
//
// Where rows are few and sums long, reduce_pieces adds up pieces of `piece` summands, [outer, pieces, inner], and
// reduce_finish the pieces. inner = 1: a warp or a block per sum (see for_row). Otherwise blocks of 32 x 8 threads: 32
// packets of neighbours of `inner`, and each eighth summand; the eight sums are added in order.
// The largest: rows packed along the dimension; each thread keeps its first largest element, then the row agrees on a
// value and on its first position.
// Moves sizeof(T) per element of x. Limited by memory bandwidth, for short rows by the latency of the reductions.

#include "common.cuh"

typedef Element<T>::Acc Acc;

// Type of sums.
template <typename A> struct Sum {
    typedef A Type;
};
template <> struct Sum<i64> {
    typedef u64 Type;
};
typedef Sum<Acc>::Type Total;

// FEW summands are added before they join the total, which bounds the rounding error of long sums.
constexpr u32 WARP = 32, HEIGHT = 8, FEW = 16;

// The partial sum of piece `piece_index` of the summands.
struct Span {
    i64 first, last;
};

__device__ __forceinline__ Span span_of(i64 piece_index, i64 piece, i64 count) {
    return {piece_index * piece, min((piece_index + 1) * piece, count)};
}

template <typename To, typename From>
__device__ __forceinline__ void sum_rows(To* y, const From* x, i64 outer, i64 count, i64 piece, i64 pieces,
                                         Acc divisor) {
    const i64 step = (i64)gridDim.x * blockDim.y;
    for (i64 row = (i64)blockIdx.x * blockDim.y + threadIdx.y; row < outer * pieces; row += step) {
        const Span span = span_of(row % pieces, piece, count);
        const From* from = x + row / pieces * count + span.first;
        const bool packed = aligned(from);
        Total sum = 0;
        // Packets even where they are not aligned: the order of summation must not depend on where the row starts.
        for_row<16 / sizeof(From)>(span.last - span.first, true, [&](u32 j, auto lanes) {
            const auto values = load<lanes.COUNT>(from + j, packed);
            Total few = 0;
#pragma unroll
            for (From value : values.lane) few += Element<From>::to_acc(value);
            sum += few;
        });
        sum = sum_row(sum);
        if (threadIdx.x == 0) y[row] = Element<To>::from_acc(sum / (Total)divisor);
    }
}

template <int N, typename To, typename From>
__device__ __forceinline__ void sum_columns(To* y, const From* x, i64 outer, i64 count, i64 inner, i64 piece,
                                            i64 pieces, Acc divisor) {
    __shared__ Total sums[HEIGHT][N][WARP];
    for (i64 row = blockIdx.y; row < outer * pieces; row += gridDim.y) {
        const Span span = span_of(row % pieces, piece, count);
        const From* from = x + row / pieces * count * inner;
        for (i64 tile = (i64)blockIdx.x * WARP * N; tile < inner; tile += (i64)gridDim.x * WARP * N) {
            const i64 column = tile + threadIdx.x * N;
            Total sum[N] = {};
            if (column < inner) {
                for (i64 first = span.first + threadIdx.y; first < span.last; first += HEIGHT * FEW) {
                    Total few[N] = {};
                    const i64 last = min(first + HEIGHT * FEW, span.last);
#pragma unroll 4
                    for (i64 c = first; c < last; c += HEIGHT) {
                        const auto values = load<N>(from + c * inner + column);
#pragma unroll
                        for (int lane = 0; lane < N; ++lane) few[lane] += Element<From>::to_acc(values.lane[lane]);
                    }
#pragma unroll
                    for (int lane = 0; lane < N; ++lane) sum[lane] += few[lane];
                }
            }
#pragma unroll
            for (int lane = 0; lane < N; ++lane) sums[threadIdx.y][lane][threadIdx.x] = sum[lane];
            __syncthreads();
            if (threadIdx.y == 0 && column < inner) {
#pragma unroll
                for (int lane = 0; lane < N; ++lane) {
                    Total total = 0;
#pragma unroll
                    for (u32 height = 0; height < HEIGHT; ++height) total += sums[height][lane][threadIdx.x];
                    y[row * inner + column + lane] = Element<To>::from_acc(total / (Total)divisor);
                }
            }
            __syncthreads();
        }
    }
}

template <typename To, typename From>
__device__ __forceinline__ void sum_middle(To* y, const From* x, i64 outer, i64 count, i64 inner, i64 piece,
                                           i64 pieces, Acc divisor) {
    constexpr int WIDTH = 16 / sizeof(From);
    if (inner == 1) {
        sum_rows(y, x, outer, count, piece, pieces, divisor);
    } else if (aligned(x) && inner % WIDTH == 0) {
        sum_columns<WIDTH>(y, x, outer, count, inner, piece, pieces, divisor);
    } else {
        sum_columns<1>(y, x, outer, count, inner, piece, pieces, divisor);
    }
}

extern "C" __global__ void reduce_sum(T* y, const T* x, i64 outer, i64 count, i64 inner, f64 divisor) {
    sum_middle(y, x, outer, count, inner, count, 1, (Acc)divisor);
}

extern "C" __global__ void reduce_pieces(Acc* sums, const T* x, i64 outer, i64 count, i64 inner, i64 piece) {
    sum_middle(sums, x, outer, count, inner, piece, (count + piece - 1) / piece, (Acc)1);
}

extern "C" __global__ void reduce_finish(T* y, const Acc* sums, i64 outer, i64 pieces, i64 inner, f64 divisor) {
    sum_middle(y, sums, outer, pieces, inner, pieces, 1, (Acc)divisor);
}

// True if `a` comes before `b` among the largest: NaN first.
__device__ __forceinline__ bool larger(Acc a, Acc b) { return a > b || (a != a && b == b); }

// Lower bound of every value.
template <typename A> __device__ __forceinline__ A least() { return negative_infinity<A>(); }
template <> __device__ __forceinline__ i64 least<i64>() { return -0x7FFFFFFFFFFFFFFF - 1; }

// The largest element of each row [rows, columns] and, unless `y` is null, its value; the first of equal ones.
extern "C" __global__ void reduce_largest(i64* index, T* y, const T* x, i64 rows, u32 columns) {
    const Acc lowest = least<Acc>();
    const i64 step = (i64)gridDim.x * blockDim.y;
    for (i64 row = (i64)blockIdx.x * blockDim.y + threadIdx.y; row < rows; row += step) {
        const T* from = x + row * columns;
        Acc best = lowest;
        u32 position = columns;
        for_row(columns, aligned(from), [&](u32 j, auto lanes) {
            const auto values = load<lanes.COUNT>(from + j);
#pragma unroll
            for (int lane = 0; lane < lanes.COUNT; ++lane) {
                const Acc value = Element<T>::to_acc(values.lane[lane]);
                if (position == columns || larger(value, best)) {
                    best = value;
                    position = j + lane;
                }
            }
        });
        const Acc largest = reduce_row(best, lowest, [](Acc a, Acc b) { return larger(b, a) ? b : a; });
        const bool mine = best == largest || (best != best && largest != largest);
        const u32 first =
            reduce_row(mine ? position : columns, columns, [](u32 a, u32 b) { return a < b ? a : b; });
        if (threadIdx.x == 0) {
            index[row] = first;
            if (y != nullptr) y[row] = from[first];
        }
    }
}

// Adds up 32 columns of partials from `column` on, each in the order of reduce_chunks; the first thread of warp n gets
// the sum of column n. All threads of a block of 32 x 32 must call it.
__device__ __forceinline__ Total sum_of_chunks(const Acc* partials, i64 chunks, u32 width, u32 column, u32 columns) {
    __shared__ Total of_warps[32][33];
    column += threadIdx.x;
    Total total = 0;
    if (column < columns) {
#pragma unroll 8
        for (i64 chunk = threadIdx.y; chunk < chunks; chunk += 32) total += partials[chunk * width + column];
    }
    of_warps[threadIdx.y][threadIdx.x] = total;
    __syncthreads();
    // Each warp adds up a column.
    return reduce_warp(of_warps[threadIdx.x][threadIdx.y], [](Total a, Total b) { return a + b; });
}

// Sums of partials [chunks, width] over the chunks: first [of_first] those of the first columns, second those of the
// others; each may be none. A block takes 32 columns, its warps chunks in turn, whose sums are added in one order.
extern "C" __global__ void __launch_bounds__(1024)
    reduce_chunks(T* first, T* second, const Acc* partials, i64 chunks, u32 width, u32 of_first) {
    const Total total = sum_of_chunks(partials, chunks, width, blockIdx.x * 32, width);
    const u32 of_warp = blockIdx.x * 32 + threadIdx.y;
    if (threadIdx.x > 0 || of_warp >= width) return;
    T* to = of_warp < of_first ? first : second;
    if (to != nullptr) to[of_warp < of_first ? of_warp : of_warp - of_first] = Element<T>::from_acc(total);
}

// The same for many sums: rows of `table` [sums, 6] have the addresses of a sum and of the first of its columns of
// partials, the number of chunks, the width of the partials, the number of columns, and the blocks of all sums before.
extern "C" __global__ void __launch_bounds__(1024) reduce_many(const i64* table, u32 sums) {
    // The last sum that begins at or before this block.
    u32 low = 0, high = sums;
    while (high - low > 1) {
        const u32 middle = (low + high) / 2;
        if (table[middle * 6 + 5] <= blockIdx.x) {
            low = middle;
        } else {
            high = middle;
        }
    }
    const i64* row = table + low * 6;
    const u32 columns = (u32)row[4], column = (u32)(blockIdx.x - row[5]) * 32;
    const Total total = sum_of_chunks(reinterpret_cast<const Acc*>(row[1]), row[2], (u32)row[3], column, columns);
    if (threadIdx.x > 0 || column + threadIdx.y >= columns) return;
    reinterpret_cast<T*>(row[0])[column + threadIdx.y] = Element<T>::from_acc(total);
}
