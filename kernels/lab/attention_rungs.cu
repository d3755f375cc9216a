// The rungs below kernels/attention_fwd.cu and attention_mma_fwd.cu, for benches/ladder.rs:
// o_i = sum_j softmax_j(scale q_i · k_j) v_j, causal or not.
//
// Shapes: q, k, v, o [heads, length, 64], packed. T: f32, bf16; sums in f32.
// Variants: DTYPE=f32,bf16
//
//   thread: one query per thread, which keeps query and sum in registers and reads every key and value from the caches
//           itself; softmax with a running maximum, so that no score is stored.
//   shared: the same, with 32 keys and values at a time in shared memory, shared by the 64 queries of a block: each is
//           read from memory once per block, and all threads of a warp read the same address at a time.
//
// The plain rung gives a thread 4 x 4 scores, so that an operand from shared memory serves four products; the rung on
// tensor cores gives a warp tiles of 32 queries.

#include "common.cuh"

typedef Element<T>::Acc Acc;

constexpr u32 SIZE = 64, KEYS = 32;

// A query, its running maximum and sums.
struct Query {
    Acc q[SIZE], sum[SIZE], largest, total;

    __device__ __forceinline__ void start(const T* from, f64 scale) {
#pragma unroll
        for (u32 d = 0; d < SIZE; ++d) {
            q[d] = Element<T>::to_acc(from[d]) * (Acc)scale;
            sum[d] = 0;
        }
        largest = lowest<Acc>();
        total = 0;
    }

    __device__ __forceinline__ void add(const T* key, const T* value) {
        Acc score = 0;
#pragma unroll
        for (u32 d = 0; d < SIZE; ++d) score += q[d] * Element<T>::to_acc(key[d]);
        const Acc now = max(largest, score), shrink = exp(largest - now), weight = exp(score - now);
        largest = now;
        total = total * shrink + weight;
#pragma unroll
        for (u32 d = 0; d < SIZE; ++d) sum[d] = sum[d] * shrink + weight * Element<T>::to_acc(value[d]);
    }

    __device__ __forceinline__ void finish(T* to) const {
#pragma unroll
        for (u32 d = 0; d < SIZE; ++d) to[d] = Element<T>::from_acc(sum[d] / total);
    }
};

// Blocks of 64 threads: blockIdx.x for queries, blockIdx.y for heads.
extern "C" __global__ void __launch_bounds__(64)
attention_rungs_thread(T* o, const T* q, const T* k, const T* v, u32 length, u32 causal, f64 scale) {
    const u32 i = blockIdx.x * 64 + threadIdx.x;
    const i64 head = (i64)blockIdx.y * length * SIZE;
    if (i >= length) return;
    Query query;
    query.start(q + head + (i64)i * SIZE, scale);
    const u32 keys = causal ? i + 1 : length;
    for (u32 j = 0; j < keys; ++j) query.add(k + head + (i64)j * SIZE, v + head + (i64)j * SIZE);
    query.finish(o + head + (i64)i * SIZE);
}

extern "C" __global__ void __launch_bounds__(64)
attention_rungs_shared(T* o, const T* q, const T* k, const T* v, u32 length, u32 causal, f64 scale) {
    __shared__ T keys[KEYS][SIZE], values[KEYS][SIZE];
    const u32 first = blockIdx.x * 64, i = first + threadIdx.x;
    const i64 head = (i64)blockIdx.y * length * SIZE;
    Query query;
    if (i < length) query.start(q + head + (i64)i * SIZE, scale);
    const u32 end = causal ? min(first + 64, length) : length;
    for (u32 tile = 0; tile < end; tile += KEYS) {
        __syncthreads();
        for (u32 n = threadIdx.x; n < KEYS * SIZE; n += 64) {
            const u32 j = tile + n / SIZE;
            if (j < length) {
                keys[n / SIZE][n % SIZE] = k[head + (i64)j * SIZE + n % SIZE];
                values[n / SIZE][n % SIZE] = v[head + (i64)j * SIZE + n % SIZE];
            }
        }
        __syncthreads();
        const u32 most = min(tile + KEYS, causal ? min(i + 1, end) : end);
        if (i < length) {
            for (u32 j = tile; j < most; ++j) query.add(keys[j - tile], values[j - tile]);
        }
    }
    if (i < length) query.finish(o + head + (i64)i * SIZE);
}
