// Mask of the k largest entries of each row: keep_j = x_j >= the k-th largest of the row.
//
// Shapes: keep (bool, one byte) and x [rows, columns], packed, 0 < k < columns. T: f32, f64, bf16, f16.
// Variants: DTYPE=FLOATS
//
// Numbers become unsigned keys of the same order. The k-th largest key is found bit by bit from the top: a bit is set
// if at least k keys of the row reach the number so far with it; exactly k of them end the search. One row per warp, or
// per block for long rows (see for_row); rows are a grid apart. Moves sizeof(T) + 1 bytes per element, and reads a row
// from the caches about log2(columns) + 10 times, at most once per bit of T. Limited by the latency of the reductions.
//
// Values that tie with the k-th are all kept. NaN is larger than all numbers, as in PyTorch's topk; zeros are equal.

#include "common.cuh"

template <int BYTES> struct Unsigned;
template <> struct Unsigned<2> { typedef unsigned short Type; };
template <> struct Unsigned<4> { typedef u32 Type; };
template <> struct Unsigned<8> { typedef u64 Type; };
typedef Unsigned<sizeof(T)>::Type Key;

constexpr Key SIGN = Key(1) << (8 * sizeof(T) - 1);

__device__ __forceinline__ Key key_of(T x) {
    const auto value = Element<T>::to_acc(x);
    if (value != value) return ~Key(0);
    Key bits;
    memcpy(&bits, &x, sizeof(bits));
    // -0 has the key of 0.
    if (value == 0) bits = 0;
    return bits & SIGN ? ~bits : bits | SIGN;
}

extern "C" __global__ void topk_mask(unsigned char* keep, const T* x, i64 rows, u32 columns, u32 k) {
    const i64 step = (i64)gridDim.x * blockDim.y;
    for (i64 row = (i64)blockIdx.x * blockDim.y + threadIdx.y; row < rows; row += step) {
        const T* from = x + row * columns;
        const bool packed = aligned(from);
        Key kth = 0;
        for (Key bit = SIGN; bit != 0; bit >>= 1) {
            const Key candidate = kth | bit;
            u32 count = 0;
            for_row(columns, packed, [&](u32 j, auto lanes) {
                const auto values = load<lanes.COUNT>(from + j);
#pragma unroll
                for (T value : values.lane) count += key_of(value) >= candidate;
            });
            count = sum_row(count);
            if (count >= k) kth = candidate;
            if (count == k) break;
        }
        for (u32 j = threadIdx.x; j < columns; j += blockDim.x) keep[row * columns + j] = key_of(from[j]) >= kth;
    }
}
