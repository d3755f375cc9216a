// Attention of the last few tokens to a cache, see src/ops/attention/decode.rs: out = softmax(scale q kᵀ + curve) v
// over the keys up to each query's position.
//
// Shapes: q [batch, heads, query, d], caches k [batch, kv_heads, capacity, d] and v [.., e], all at strides of their
// own with packed features; out [batch, query, heads, e] packed; scores [batch heads query, capacity], scratch; ends
// [batch]; key_mask [batch, capacity - front], query_mask [batch, query] and curves [heads, distances] may be null.
// T: f32, f64, bf16, f16; products, statistics and sums in f32 (f64 for f64).
//
// A block owns a query. Warps take keys in turn, their lanes the features; then threads take features, groups of them
// keys in turn. Reads each key and value once; limited by memory bandwidth for long caches of many heads and sequences,
// by latency for others. Nothing that the host passes grows with the sequence, so that a graph can hold the launch.
//
// Variants: DTYPE=f32,f64,bf16,f16

#include "common.cuh"

typedef Element<T>::Acc Acc;

constexpr i32 THREADS = 256;

extern "C" __global__ void __launch_bounds__(THREADS) attention_decode(
    T* out, Acc* scores, const T* q, const T* k, const T* v, const i64* ends, const bool* key_mask,
    const bool* query_mask, const Acc* curves, Layout q_at, Layout k_at, Layout v_at, i32 front, i32 mem_keys,
    i32 past, i32 distances, f64 scale) {
    __shared__ Acc partial[THREADS];
    const i32 heads = q_at.dims[1], queries = q_at.dims[2], d = q_at.dims[3];
    const i32 capacity = k_at.dims[2], e = v_at.dims[3];
    const i32 i = blockIdx.x % queries, head = blockIdx.x / queries % heads, b = blockIdx.x / queries / heads;
    const i32 kv_head = head / (heads / (i32)k_at.dims[1]), thread = threadIdx.x;
    const T* query = q + q_at.offset + b * q_at.strides[0] + head * q_at.strides[1] + i * q_at.strides[2];
    const T* keys = k + k_at.offset + b * k_at.strides[0] + kv_head * k_at.strides[1];
    const T* values = v + v_at.offset + b * v_at.strides[0] + kv_head * v_at.strides[1];
    Acc* s = scores + (i64)blockIdx.x * capacity;

    const i32 position = front + (i32)ends[b] + i;
    i32 start = position > past ? position - past : 0, end = min(position + 1, capacity);
    if (query_mask && !query_mask[(i64)b * queries + i]) end = min(end, mem_keys);
    start = min(start, end);

    Acc max = negative_infinity<Acc>();
    bool any_kept = false;
    for (i32 key = start + thread / 32; key < end; key += THREADS / 32) {
        const bool kept = !key_mask || key < front || key_mask[(i64)b * (capacity - front) + key - front];
        Acc score = 0;
        const T* row = keys + key * k_at.strides[2];
        for (i32 f = thread % 32; f < d; f += 32) score += Element<T>::to_acc(query[f]) * Element<T>::to_acc(row[f]);
        score = reduce_warp(score, [](Acc a, Acc b) { return a + b; }) * (Acc)scale;
        if (curves) score += curves[(i64)head * distances + min(position - key, distances - 1)];
        if (!kept) score = negative_infinity<Acc>();
        any_kept |= kept;
        if (thread % 32 == 0) s[key] = score;
        max = fmax(max, score);
    }
    max = reduce_row(max, negative_infinity<Acc>(), [](Acc a, Acc b) { return fmax(a, b); });
    // Without any key left, all keys of the sequence count alike. With scores that are all NaN or -inf, `max` is -inf
    // too, and the weights are NaN.
    const bool blind = !__syncthreads_or(any_kept);
    if (blind) start = 0, end = min(front + (i32)ends[b] + queries, capacity);
    // A power of two that keeps sums of values in the range of numbers.
    Acc part = 1, sum = 0;
    for (i32 rest = end - start - 1; rest > 0; rest /= 2) part /= 2;
    for (i32 key = start + thread; key < end; key += THREADS) {
        const Acc weight = (blind ? 1 : exp(s[key] - max)) * part;
        s[key] = weight;
        sum += weight;
    }
    sum = sum_row(sum);
    __syncthreads();

    const i32 width = min((e + 31) / 32 * 32, THREADS), groups = THREADS / width, group = thread / width;
    T* to = out + (((i64)b * queries + i) * heads + head) * e;
    for (i32 first = 0; first < e; first += width) {
        const i32 f = first + thread % width;
        Acc total = 0;
        if (f < e && group < groups) {
            for (i32 key = start + group; key < end; key += groups) {
                total += s[key] * Element<T>::to_acc(values[key * v_at.strides[2] + f]);
            }
        }
        partial[thread] = total;
        __syncthreads();
        if (thread < width && f < e) {
            for (i32 other = 1; other < groups; ++other) total += partial[other * width + thread];
            const Acc mean = total / sum;
            // Rounding alone makes the mean of finite values infinite.
            const bool exceeds = fabs(mean) > -lowest<Acc>() && fabs(total) <= -lowest<Acc>();
            to[f] = Element<T>::from_acc(exceeds ? copysign(-lowest<Acc>(), mean) : mean);
        }
        __syncthreads();
    }
}
