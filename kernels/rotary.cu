// Rotary position embedding (Su et al., RoFormer, https://arxiv.org/abs/2104.09864).
//
//   y_k = x_k cos - x_(k + pairs) sin,  y_(k + pairs) = x_(k + pairs) cos + x_k sin     for k < pairs
//   y_k = x_k                                                                          for k >= 2 pairs
//
// with the cosine and sine of position and pair k from a table, which rotary_table.cu makes; one of opposite angles
// gives the backward pass. Shapes: y [outer, heads, positions, columns] packed; x of any layout whose last dimension is
// packed; table [positions, 2 pairs], cosines then sines. T: f32, f64, bf16, f16; table in f32 (f64 for f64).
// Variants: DTYPE=FLOATS
//
// A thread takes a packet of pairs, or of unrotated features, of one position, and reads its cosines and sines once for
// HEADS heads, all in flight at once. The grid covers positions, heads and the rest, so that a packet needs no
// division. Moves 2 sizeof(T) per element; the table stays in the caches. Limited by memory bandwidth.

#include "common.cuh"

typedef Element<T>::Acc Acc;

// Number of heads per blockIdx.y.
constexpr u32 HEADS = 4;

// Locations of the rows of the heads of one position.
struct Rows {
    T* to;
    // Without x, y holds the input.
    const T* from;
    i64 to_step, from_step;
    u32 heads;
};

template <int N>
__device__ __forceinline__ void turn(const Rows& rows, const Acc* angles, u32 columns, u32 pairs) {
    const u32 turned = pairs / N, items = turned + (columns - 2 * pairs) / N;
    for (u32 item = threadIdx.x; item < items; item += blockDim.x) {
        const bool turns = item < turned;
        const u32 k = turns ? item * N : 2 * pairs + (item - turned) * N;
        Kept<N> first[HEADS], second[HEADS];
#pragma unroll
        for (u32 h = 0; h < HEADS; ++h) {
            const T* row = rows.from + h * rows.from_step + k;
            first[h] = Kept<N>(row, h < rows.heads);
            second[h] = Kept<N>(row + pairs, turns && h < rows.heads);
        }
        Acc cos[N] = {}, sin[N] = {};
        constexpr int WIDTH = N * sizeof(Acc) < 16 ? N : 16 / sizeof(Acc);
#pragma unroll
        for (int lane = 0; lane < N && turns; lane += WIDTH) {
            const auto cosines = load<WIDTH>(angles + k + lane), sines = load<WIDTH>(angles + pairs + k + lane);
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) {
                cos[lane + i] = cosines.lane[i];
                sin[lane + i] = sines.lane[i];
            }
        }
#pragma unroll
        for (u32 h = 0; h < HEADS; ++h) {
            if (h >= rows.heads) break;
            T* to = rows.to + h * rows.to_step + k;
            Packet<N> a = first[h], b = second[h];
            if (!turns) {
                store(to, a);
                continue;
            }
#pragma unroll
            for (int lane = 0; lane < N; ++lane) {
                const Acc left = Element<T>::to_acc(a.lane[lane]), right = Element<T>::to_acc(b.lane[lane]);
                a.lane[lane] = Element<T>::from_acc(left * cos[lane] - right * sin[lane]);
                b.lane[lane] = Element<T>::from_acc(right * cos[lane] + left * sin[lane]);
            }
            store(to, a);
            store(to + pairs, b);
        }
    }
}

// True if all rows of x and the parts of a row begin at multiples of 128 bits.
__device__ __forceinline__ bool in_packets(const T* y, const T* x, const Layout& layout, u32 columns, u32 pairs) {
    bool packed = aligned(y) && aligned(x) && columns % LANES == 0 && pairs % LANES == 0 && layout.offset % LANES == 0;
#pragma unroll
    for (int dim = 0; dim < MAX_RANK; ++dim) {
        if (dim + 1 < layout.rank) packed &= layout.strides[dim] % LANES == 0;
    }
    return packed;
}

// The step of x along the dimension `back` from the last one, 0 where there is none.
__device__ __forceinline__ i64 step_of(const Layout& layout, u32 back) {
    i64 step = 0;
#pragma unroll
    for (int dim = 0; dim < MAX_RANK; ++dim) {
        if (dim + back + 1 == layout.rank) step = layout.strides[dim];
    }
    return step;
}

// Without `x`, y holds it and is overwritten: an element is read before it is written, by one thread.
extern "C" __global__ void rotary_turn(T* y, const T* x, const Acc* table, Layout layout, i64 outer, u32 heads,
                                       u32 positions, u32 columns, u32 pairs) {
    const bool packed = in_packets(y, x, layout, columns, pairs);
    const i64 row = (i64)positions * columns, apart = x == nullptr ? columns : step_of(layout, 1);
    const i64 from_step = x == nullptr ? row : step_of(layout, 2);
    for (i64 matrix = blockIdx.z; matrix < outer; matrix += gridDim.z) {
        for (u32 head = blockIdx.y * HEADS; head < heads; head += gridDim.y * HEADS) {
            const i64 start = (matrix * heads + head) * row;
            const T* from = x == nullptr ? y + start : x + layout.position(start);
            for (u32 position = blockIdx.x * blockDim.y + threadIdx.y; position < positions;
                 position += gridDim.x * blockDim.y) {
                const Acc* angles = table + (i64)position * 2 * pairs;
                const Rows here = {y + start + (i64)position * columns, from + position * apart, row, from_step,
                                   min(heads - head, HEADS)};
                if (packed) {
                    turn<LANES>(here, angles, columns, pairs);
                } else {
                    turn<1>(here, angles, columns, pairs);
                }
            }
        }
    }
}
