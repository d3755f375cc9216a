// Rotary position embedding (Su et al., RoFormer, https://arxiv.org/abs/2104.09864).
//
//   y_k = x_k cos - x_(k + pairs) sin,  y_(k + pairs) = x_(k + pairs) cos + x_k sin     for k < pairs
//   y_k = x_k                                                                          for k >= 2 pairs
//
// with the cosine and sine of position and pair k from a table, which rotary_table.cu makes; one of opposite angles
// gives the backward pass. Shapes: y [rows, columns] packed, positions repeating along rows; x of any layout whose last
// dimension is packed; table [positions, 2 pairs], cosines then sines. T: f32, f64, bf16, f16; table in f32 (f64 for
// f64).
// Variants: DTYPE=f32,f64,bf16,f16
//
// A thread takes a packet of pairs, or of features that stay as they are; threads are a grid apart.
// Moves 2 sizeof(T) per element; the table is shared by all heads and stays in the caches. Limited by memory bandwidth.

#include "common.cuh"

typedef Element<T>::Acc Acc;

template <int N>
__device__ __forceinline__ void turn(T* y, const T* x, const Acc* table, const Layout& layout, i64 rows, u32 positions,
                                     u32 columns, u32 pairs) {
    const u32 turned = pairs / N, items = turned + (columns - 2 * pairs) / N;
    const i64 count = rows * items, step = (i64)gridDim.x * blockDim.x;
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step) {
        u64 row = i;
        const u32 item = divide(row, items);
        T* to = y + row * columns;
        // A row is packed: its start says where all of it is. Without x, y holds it.
        const T* from = x == nullptr ? to : x + layout.position(row * columns);
        if (item >= turned) {
            const u32 k = 2 * pairs + (item - turned) * N;
            store(to + k, load<N>(from + k));
            continue;
        }
        const u32 k = item * N;
        const Acc* cosines = table + (i64)divide(row, positions) * 2 * pairs + k;
        auto a = load<N>(from + k), b = load<N>(from + pairs + k);
#pragma unroll
        for (int lane = 0; lane < N; ++lane) {
            const Acc left = Element<T>::to_acc(a.lane[lane]), right = Element<T>::to_acc(b.lane[lane]);
            const Acc cos = cosines[lane], sin = cosines[pairs + lane];
            a.lane[lane] = Element<T>::from_acc(left * cos - right * sin);
            b.lane[lane] = Element<T>::from_acc(right * cos + left * sin);
        }
        store(to + k, a);
        store(to + pairs + k, b);
    }
}

// Whether all rows of x and the parts of a row begin at multiples of 128 bits.
__device__ __forceinline__ bool in_packets(const T* y, const T* x, const Layout& layout, u32 columns, u32 pairs) {
    bool packed = aligned(y) && aligned(x) && columns % LANES == 0 && pairs % LANES == 0 && layout.offset % LANES == 0;
#pragma unroll
    for (int dim = 0; dim < MAX_RANK; ++dim) {
        if (dim + 1 < layout.rank) packed &= layout.strides[dim] % LANES == 0;
    }
    return packed;
}

// Without `x`, y holds it and is overwritten: an element is read before it is written, by one thread.
extern "C" __global__ void rotary_turn(T* y, const T* x, const Acc* table, Layout layout, i64 rows, u32 positions,
                                       u32 columns, u32 pairs) {
    if (in_packets(y, x, layout, columns, pairs)) {
        turn<LANES>(y, x, table, layout, rows, positions, columns, pairs);
    } else {
        turn<1>(y, x, table, layout, rows, positions, columns, pairs);
    }
}
