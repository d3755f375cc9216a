// Tensors that depend only on positions: T5's relative bias (Raffel et al., https://arxiv.org/abs/1910.10683) and
// sinusoids.
//
//   bias:     y[h, i, j] = scale table[h, bucket(i - j)]
//   backward: dtable[h, c] = scale sum of g[h, i, j] where bucket(i - j) = c
//   sinusoid: y[p] = [sin((first + p) f) | cos((first + p) f)]
//
// Shapes: y, g [heads, queries, keys]; table, dtable [heads, buckets]; bucket_of [queries + keys - 1], the bucket of
// each diagonal j - i + queries - 1; sums [heads, chunks, queries + keys - 1]; sinusoids [positions, 2 half] of
// frequencies [half]. T: f32, f64, bf16, f16; sums in f32 (f64 for f64), sinusoids in f64, rounded once.
// Variants: DTYPE=FLOATS
//
// Forward, one row of keys per warp, or per block for long rows (see for_row). Backward, first a thread adds one
// diagonal over a chunk of the queries, its neighbours being on the diagonals beside it, so that reads are coalesced;
// then the threads of a block add what is in one bucket.
// Moves sizeof(T) per element of y or g. Limited by memory bandwidth, sinusoids by the arithmetic of f64.

#include "common.cuh"

typedef Element<T>::Acc Acc;

extern "C" __global__ void position_bias_fwd(T* y, const T* table, const i64* bucket_of, i64 rows, u32 queries,
                                             u32 keys, u32 buckets, f64 scale) {
    const i64 step = (i64)gridDim.x * blockDim.y;
    for (i64 row = (i64)blockIdx.x * blockDim.y + threadIdx.y; row < rows; row += step) {
        T* to = y + row * keys;
        const T* of_head = table + row / queries * buckets;
        const i64* of_key = bucket_of + queries - 1 - row % queries;
        for_row(keys, aligned(to), [&](u32 key, auto lanes) {
            Packet<lanes.COUNT> packet;
#pragma unroll
            for (int lane = 0; lane < lanes.COUNT; ++lane) {
                const Acc value = Element<T>::to_acc(of_head[of_key[key + lane]]);
                packet.lane[lane] = Element<T>::from_acc(value * (Acc)scale);
            }
            store(to + key, packet);
        });
    }
}

// Grid: diagonals, chunks, heads.
extern "C" __global__ void position_bias_bwd_sums(Acc* sums, const T* g, u32 queries, u32 keys, u32 chunk) {
    const u32 diagonals = queries + keys - 1, first = blockIdx.y * chunk, last = min(first + chunk, queries);
    const T* of_head = g + (i64)blockIdx.z * queries * keys;
    Acc* to = sums + ((i64)blockIdx.z * gridDim.y + blockIdx.y) * diagonals;
    for (u32 at = blockIdx.x * blockDim.x + threadIdx.x; at < diagonals; at += gridDim.x * blockDim.x) {
        Acc sum = 0;
        for (u32 query = first; query < last; ++query) {
            // Wraps around where the diagonal has not begun yet, and is too large then.
            const u32 key = at + query + 1 - queries;
            if (key < keys) sum += Element<T>::to_acc(of_head[(i64)query * keys + key]);
        }
        to[at] = sum;
    }
}

// Grid: buckets, heads.
extern "C" __global__ void position_bias_bwd(T* dtable, const Acc* sums, const i64* bucket_of, u32 diagonals,
                                             u32 chunks, f64 scale) {
    const u32 bucket = blockIdx.x, head = blockIdx.y;
    const Acc* of_head = sums + (i64)head * chunks * diagonals;
    Acc total = 0;
    for (u32 at = threadIdx.x; at < diagonals; at += blockDim.x) {
        if (bucket_of[at] != bucket) continue;
        for (u32 chunk = 0; chunk < chunks; ++chunk) total += of_head[(i64)chunk * diagonals + at];
    }
    total = sum_row(total);
    if (threadIdx.x == 0) dtable[head * gridDim.x + bucket] = Element<T>::from_acc(total * (Acc)scale);
}

extern "C" __global__ void position_sinusoid(T* y, const f64* frequencies, i64 first, i64 positions, u32 half) {
    const i64 step = (i64)gridDim.x * blockDim.x, count = positions * half;
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step) {
        const i64 position = i / half, k = i % half;
        f64 sine, cosine;
        sincos((f64)(first + position) * frequencies[k], &sine, &cosine);
        y[position * 2 * half + k] = from_f64<T>(sine);
        y[position * 2 * half + half + k] = from_f64<T>(cosine);
    }
}
