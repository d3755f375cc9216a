// Attention of the last few tokens to a cache, see src/ops/attention/decode.rs: out = softmax(clamp(scale q kᵀ +
// curve)) v over the keys up to each query's position; a sink adds a term to the sum of the softmax.
//
// Shapes: q [batch, heads, query, d], caches k [batch, kv_heads, capacity, d] and v [.., e], each with its own strides
// and packed features; out [batch, query, heads, e] packed; sums [batch heads query, parts, e] and statistics
// [.., parts, 2], largest score and sum of weights, between the two kernels; ends [batch]; key_mask
// [batch, capacity - front], query_mask [batch, query] and curves [heads, distances] may be null. T: f32, f64, bf16,
// f16; products, statistics and sums in f32 (f64 for f64).
//
// Keys are split into parts of PART, as on the CPU. attention_decode: a block takes parts of one key head, a grid
// apart, for up to QUERIES of the queries (of the heads that share it, and of the new tokens) that read them, so that
// keys and values are read once. Groups of lanes take the packets of a key, all keys of a batch in flight at once, then
// the packets of values. attention_decode_join adds up the parts of a query in order. The result of a query depends
// only on its sequence, not on the batch, the capacity or the grid. Reads each key and value once, and writes and reads
// e + 2 numbers per query and PART keys; limited by memory bandwidth, for short caches with few heads and sequences by
// latency. No launch argument depends on the length of the sequence, so that a graph can contain the launch.
//
// Variants: DTYPE=FLOATS QUERIES=1,4

#include "common.cuh"
#include "attention_window.cuh"

typedef Element<T>::Acc Acc;

constexpr i32 THREADS = 128, WARPS = THREADS / 32, PART = 64;
// Packets of keys, then of values, that a thread has in flight.
constexpr i32 BATCH = 4;
static_assert(QUERIES <= WARPS, "a warp takes the weights of a query");

// Elements j, j + 1, … of a row of `size`; zeros past its end and if not `inside`, where nothing is read.
__device__ __forceinline__ Raw<LANES> fetch(const T* row, i32 j, i32 size, bool inside, bool packed) {
    return packed ? Raw<LANES>(row + j, inside && j < size) : Raw<LANES>(row + j, inside ? size - j : 0);
}

// True if rows of this size begin and end at multiples of 128 bits.
__device__ __forceinline__ bool in_packets(const T* x, const Layout& at) {
    return aligned(x + at.offset) && at.dims[3] % LANES == 0 && at.strides[0] % LANES == 0 &&
           at.strides[1] % LANES == 0 && at.strides[2] % LANES == 0;
}

// Lanes that share a row of this many features: a power of two, 32 at most, when they take several rounds.
__device__ __forceinline__ i32 lanes_of(i32 features) {
    i32 lanes = 1;
    while (lanes < 32 && lanes * LANES < features) lanes *= 2;
    return lanes;
}

// A query, and the keys that causality, the window and the padding of the queries leave to it.
struct Query {
    i32 head, i, position, start, end;
};

// Number of keys of the sequence, including the new ones.
__device__ __forceinline__ i32 held(const i64* ends, i32 b, i32 front, i32 queries, i32 capacity) {
    return min(front + (i32)ends[b] + queries, capacity);
}

// Few queries are limited by memory, and need enough blocks to keep loads in flight.
constexpr i32 BLOCKS = QUERIES > 1 ? 3 : __CUDA_ARCH__ >= 900 ? 5 : 4;

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    attention_decode(Acc* sums, Acc* statistics, const T* q, const T* k, const T* v, const i64* ends,
                     const bool* key_mask, const bool* query_mask, const Acc* curves, Layout q_at, Layout k_at,
                     Layout v_at, i32 front, i32 mem_keys, WINDOW_VALUES, i32 distances, i32 unbiased, i32 parts,
                     f64 scale, f64 softclamp) {
    __shared__ Query shared_queries[QUERIES];
    __shared__ Acc scores[QUERIES][PART];
    __shared__ Acc of_warps[WARPS][QUERIES][32 * LANES];
    const i32 heads = q_at.dims[1], queries = q_at.dims[2], d = q_at.dims[3];
    const i32 capacity = k_at.dims[2], kv_heads = k_at.dims[1], e = v_at.dims[3], group = heads / kv_heads;
    const i32 tiles = (group * queries + QUERIES - 1) / QUERIES;
    const i32 tile = blockIdx.x % tiles, kv_head = blockIdx.x / tiles % kv_heads, b = blockIdx.x / tiles / kv_heads;
    const i32 thread = threadIdx.x, lane = thread % 32, count = min(group * queries - tile * QUERIES, QUERIES);
    const T* keys = k + k_at.offset + b * k_at.strides[0] + kv_head * k_at.strides[1];
    const T* values = v + v_at.offset + b * v_at.strides[0] + kv_head * v_at.strides[1];
    const bool packed_q = in_packets(q, q_at), packed_k = in_packets(k, k_at), packed_v = in_packets(v, v_at);

    if (thread < QUERIES) {
        const i32 index = tile * QUERIES + thread, i = index % queries;
        const i32 position = front + (i32)ends[b] + i;
        i32 start = max(Window WINDOW.first_key(position), 0), end = min(position + 1, capacity);
        if (query_mask && !query_mask[(i64)b * queries + i]) end = min(end, mem_keys);
        if (thread >= count) end = 0;
        shared_queries[thread] = {kv_head * group + index / queries, i, position, min(start, end), end};
    }
    __syncthreads();
    i32 start = capacity, end = 0;
    for (i32 r = 0; r < count; ++r) {
        start = min(start, shared_queries[r].start);
        end = max(end, shared_queries[r].end);
    }

    const i32 last = held(ends, b, front, queries, capacity);
    for (i32 part = blockIdx.y; part * PART < last; part += gridDim.y) {
        const i32 first = part * PART, low = max(first, start), high = min(first + PART, end);
        const i32 v_lanes = lanes_of(e), v_chunk = thread % v_lanes * LANES, v_slot = thread / v_lanes;
        const i32 v_step = THREADS / v_lanes;
        // Of row first + (round + n) step + slot.
        const auto fetch_values = [&](i32 n, i32 round, i32 feature) {
            const i32 at = (round + n) * v_step + v_slot, key = first + at;
            const bool inside = at < PART && key >= low && key < high;
            return fetch(values + (i64)key * v_at.strides[2], feature, e, inside, packed_v);
        };
        Raw<LANES> ahead[BATCH];
        if (low < high) {
            const i32 lanes = lanes_of(d), chunk = thread % lanes * LANES, slot = thread / lanes;
            const i32 step = THREADS / lanes;
            for (i32 feature = chunk; feature - chunk < d; feature += lanes * LANES) {
                Acc query[QUERIES][LANES];
                for (i32 round = 0; round * step < PART; round += BATCH) {
                    Raw<LANES> rows[BATCH];
#pragma unroll
                    for (i32 n = 0; n < BATCH; ++n) {
                        const i32 at = (round + n) * step + slot, key = first + at;
                        const bool inside = at < PART && key >= low && key < high;
                        rows[n] = fetch(keys + (i64)key * k_at.strides[2], feature, d, inside, packed_k);
                    }
                    if (round == 0) {
#pragma unroll
                        for (i32 r = 0; r < QUERIES; ++r) {
                            const Query& of = shared_queries[r];
                            const T* row =
                                q + q_at.offset + b * q_at.strides[0] + of.head * q_at.strides[1] +
                                of.i * q_at.strides[2];
                            const Packet<LANES> packet = fetch(row, feature, d, r < count, packed_q);
#pragma unroll
                            for (i32 n = 0; n < LANES; ++n) query[r][n] = Element<T>::to_acc(packet.lane[n]);
                        }
                        if (feature == chunk) {
#pragma unroll
                            for (i32 n = 0; n < BATCH; ++n) ahead[n] = fetch_values(n, 0, v_chunk);
                        }
                    }
                    Acc products[BATCH][QUERIES];
#pragma unroll
                    for (i32 n = 0; n < BATCH; ++n) {
                        const Packet<LANES> packet = rows[n];
#pragma unroll
                        for (i32 r = 0; r < QUERIES; ++r) {
                            Acc product = 0;
#pragma unroll
                            for (i32 f = 0; f < LANES; ++f) {
                                product += query[r][f] * Element<T>::to_acc(packet.lane[f]);
                            }
                            products[n][r] = product;
                        }
                    }
                    for (i32 other = lanes / 2; other > 0; other /= 2) {
#pragma unroll
                        for (i32 n = 0; n < BATCH; ++n) {
#pragma unroll
                            for (i32 r = 0; r < QUERIES; ++r) {
                                products[n][r] += __shfl_xor_sync(0xFFFFFFFF, products[n][r], other);
                            }
                        }
                    }
#pragma unroll
                    for (i32 n = 0; n < BATCH; ++n) {
                        const i32 at = (round + n) * step + slot;
#pragma unroll
                        for (i32 r = 0; r < QUERIES; ++r) {
                            if (thread % lanes == 0 && at < PART) {
                                scores[r][at] = (feature == chunk ? 0 : scores[r][at]) + products[n][r];
                            }
                        }
                    }
                }
            }
        }
        __syncthreads();

        if (thread / 32 < count) {
            const Query& of = shared_queries[thread / 32];
            Acc* weights = scores[thread / 32];
            Acc score[PART / 32], max = negative_infinity<Acc>(), sum = 0;
            bool kept[PART / 32], any_kept = false;
#pragma unroll
            for (i32 n = 0; n < PART / 32; ++n) {
                const i32 at = n * 32 + lane, key = first + at;
                kept[n] = key >= of.start && key < of.end &&
                          (!key_mask || key < front || key_mask[(i64)b * (capacity - front) + key - front]);
                score[n] = kept[n] ? weights[at] * (Acc)scale : 0;
                if (curves && kept[n] && key >= unbiased) {
                    score[n] += curves[(i64)of.head * distances + min(of.position - key, distances - 1)];
                }
                if (softclamp > 0) score[n] = (Acc)softclamp * tanh(score[n] / (Acc)softclamp);
                if (kept[n]) max = fmax(max, score[n]);
                any_kept |= kept[n];
            }
            max = reduce_warp(max, [](Acc a, Acc b) { return fmax(a, b); });
            // If all scores are -inf, exponentials must be 0, not NaN. A power of two keeps sums of values within the
            // finite range.
            const Acc shift = max == negative_infinity<Acc>() ? 0 : max;
#pragma unroll
            for (i32 n = 0; n < PART / 32; ++n) {
                const Acc weight = kept[n] ? exp(score[n] - shift) * (Acc(1) / PART) : 0;
                weights[n * 32 + lane] = weight;
                sum += weight;
            }
            sum = reduce_warp(sum, [](Acc a, Acc b) { return a + b; });
            const bool any = __ballot_sync(0xFFFFFFFF, any_kept) != 0;
            if (lane == 0) {
                const i64 row = ((i64)b * heads + of.head) * queries + of.i;
                Acc* to = statistics + (row * parts + part) * 2;
                to[0] = max;
                // 0 if, and only if, no key was kept.
                to[1] = any && sum == 0 ? 1 : sum;
            }
        }
        __syncthreads();
        if (low >= high) continue;

        for (i32 feature = v_chunk; feature - v_chunk < e; feature += v_lanes * LANES) {
            Acc total[QUERIES][LANES] = {};
            for (i32 round = 0; round * v_step < PART; round += BATCH) {
                Raw<LANES> rows[BATCH];
#pragma unroll
                for (i32 n = 0; n < BATCH; ++n) {
                    rows[n] = ahead[n];
                    if (round > 0 || feature > v_chunk) rows[n] = fetch_values(n, round, feature);
                }
#pragma unroll
                for (i32 n = 0; n < BATCH; ++n) {
                    const i32 at = (round + n) * v_step + v_slot, key = first + at;
                    const Packet<LANES> packet = rows[n];
#pragma unroll
                    for (i32 r = 0; r < QUERIES; ++r) {
                        // A key that a query does not see has no effect, even if it is NaN.
                        if (at >= PART || key < shared_queries[r].start || key >= shared_queries[r].end) continue;
                        const Acc weight = scores[r][at];
#pragma unroll
                        for (i32 f = 0; f < LANES; ++f) total[r][f] += weight * Element<T>::to_acc(packet.lane[f]);
                    }
                }
            }
            for (i32 other = v_lanes; other < 32; other *= 2) {
#pragma unroll
                for (i32 r = 0; r < QUERIES; ++r) {
#pragma unroll
                    for (i32 f = 0; f < LANES; ++f) {
                        total[r][f] += __shfl_xor_sync(0xFFFFFFFF, total[r][f], other);
                    }
                }
            }
            if (lane < v_lanes) {
#pragma unroll
                for (i32 r = 0; r < QUERIES; ++r) {
#pragma unroll
                    for (i32 f = 0; f < LANES; ++f) of_warps[thread / 32][r][v_chunk + f] = total[r][f];
                }
            }
            __syncthreads();
            const i32 round = feature - v_chunk, width = min(v_lanes * LANES, e - round);
            for (i32 at = thread; at < count * width; at += THREADS) {
                const i32 r = at / width, f = at % width;
                const Query& of = shared_queries[r];
                Acc sum = 0;
#pragma unroll
                for (i32 warp = 0; warp < WARPS; ++warp) sum += of_warps[warp][r][f];
                const i64 row = ((i64)b * heads + of.head) * queries + of.i;
                sums[(row * parts + part) * e + round + f] = sum;
            }
            __syncthreads();
        }
    }
}

// Threads of a block that joins parts, on which the order of its sums depends.
constexpr i32 JOINERS = 256;
// Parts that a thread has in flight.
constexpr i32 AT_ONCE = sizeof(Acc) == 8 ? 1 : 4;

// A block owns a query: groups of threads take its parts at a fixed stride, one packet of features per thread.
template <int N>
__device__ __forceinline__ void join(T* out, const Acc* sums, const Acc* of_parts, const T* values, const Acc* sink,
                                     i64 apart, i32 e, i32 count, i32 keys) {
    __shared__ Acc shared[JOINERS * N], shared_weights[JOINERS];
    const i32 thread = threadIdx.x, threads = JOINERS;
    Acc max = negative_infinity<Acc>();
    // The sink is one more part, whose weight goes to no value.
    bool seen = sink && *sink > negative_infinity<Acc>();
    if (seen) max = *sink;
    for (i32 part = thread; part < count; part += threads) {
        max = fmax(max, of_parts[2 * part]);
        seen |= of_parts[2 * part + 1] != 0;
    }
    max = reduce_row(max, negative_infinity<Acc>(), [](Acc a, Acc b) { return fmax(a, b); });
    // If no key is kept, all keys of the sequence count equally. If all scores are NaN or -inf, `max` is -inf too,
    // and the result is NaN.
    const bool blind = !__syncthreads_or(seen);
    const i32 items = blind ? keys : count;
    // Powers of two that keep sums of values within the finite range.
    Acc share = 1;
    for (i32 rest = items - 1; rest > 0; rest /= 2) share /= 2;

    const i32 chunks = (e + N - 1) / N, width = min(chunks, threads), groups = threads / width, group = thread / width;
    for (i32 chunk = thread % width; chunk - thread % width < chunks; chunk += width) {
        const i32 f = chunk * N;
        Acc total[N] = {}, weights = sink && group == 0 ? exp(*sink - max) * share * (Acc(1) / PART) : 0;
        if (group < groups && chunk < chunks) {
#pragma unroll AT_ONCE
            for (i32 item = group; item < items; item += groups) {
                Acc weight = share;
                if (!blind) {
                    // A part without a kept key has no sums.
                    if (of_parts[2 * item + 1] == 0) continue;
                    weight *= exp(of_parts[2 * item] - max);
                    weights += of_parts[2 * item + 1] * weight;
                    const auto sum = load<N>(sums + (i64)item * e + f);
#pragma unroll
                    for (i32 n = 0; n < N; ++n) total[n] += sum.lane[n] * weight;
                } else {
                    weights += weight;
#pragma unroll
                    for (i32 n = 0; n < N; ++n) total[n] += Element<T>::to_acc(values[item * apart + f + n]) * weight;
                }
            }
        }
        __syncthreads();
#pragma unroll
        for (i32 n = 0; n < N; ++n) shared[n * JOINERS + thread] = total[n];
        shared_weights[thread] = weights;
        __syncthreads();
        if (group > 0 || chunk >= chunks) continue;
        for (i32 other = 1; other < groups; ++other) {
            const i32 at = other * width + thread;
            weights += shared_weights[at];
#pragma unroll
            for (i32 n = 0; n < N; ++n) total[n] += shared[n * JOINERS + at];
        }
#pragma unroll
        for (i32 n = 0; n < N; ++n) {
            const Acc mean = total[n] / weights;
            // The mean of finite values can only become infinite by rounding.
            const bool exceeds = fabs(mean) > -lowest<Acc>() && fabs(total[n]) <= -lowest<Acc>();
            out[f + n] = Element<T>::from_acc(exceeds ? copysign(-lowest<Acc>(), mean) : mean);
        }
    }
}

extern "C" __global__ void __launch_bounds__(JOINERS)
    attention_decode_join(T* out, const Acc* sums, const Acc* statistics, const T* v, const i64* ends,
                          const Acc* sinks, Layout v_at, i32 front, i32 heads, i32 queries, i32 parts) {
    const i32 i = blockIdx.x % queries, head = blockIdx.x / queries % heads, b = blockIdx.x / queries / heads;
    const i32 kv_head = head / (heads / (i32)v_at.dims[1]), e = v_at.dims[3];
    const i32 keys = held(ends, b, front, queries, v_at.dims[2]), count = (keys + PART - 1) / PART;
    const T* values = v + v_at.offset + b * v_at.strides[0] + kv_head * v_at.strides[1];
    T* to = out + (((i64)b * queries + i) * heads + head) * e;
    const Acc* of_row = sums + (i64)blockIdx.x * parts * e;
    const Acc* of_parts = statistics + (i64)blockIdx.x * parts * 2;
    const Acc* sink = sinks ? sinks + head : nullptr;
    constexpr i32 N = 16 / sizeof(Acc);
    if (e % N == 0) {
        join<N>(to, of_row, of_parts, values, sink, v_at.strides[2], e, count, keys);
    } else {
        join<1>(to, of_row, of_parts, values, sink, v_at.strides[2], e, count, keys);
    }
}
