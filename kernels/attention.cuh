// Scores: turns products of queries and keys into weights, and back into gradients. Shared by every attention kernel,
// so that masks, biases and dropout mean the same in all of them.
//
//   score = clamp(scale q·k + bias + curve[key - query]), -inf where masked
//
// A soft clamp is bound · tanh(score / bound); its derivative follows from the score, and that from the weight and the
// statistics of its query. A sink is one more score of each query, whose weight goes to no value: the running maximum
// and sum start with it, and the rest is the same.
// A query without any key left attends to every key alike, with weights 1 / keys that have no gradient. One that has
// keys left, but a bias of -inf for each of them, gives 0; one whose scores overflow to -inf gives NaN.

#include "philox.cuh"
#include "attention_window.cuh"

// Whether registers leave room for soft clamps, sinks, slopes on both sides and unbiased keys; the including file says
// so if not, and is not launched for them.
#ifndef EXTENDED
#define EXTENDED true
#endif

typedef Element<T>::Acc Acc;

__device__ __forceinline__ Acc infinity() { return (Acc)__uint_as_float(0x7F800000); }

__device__ __forceinline__ i32 ceil_div(i32 a, i32 b) { return (a + b - 1) / b; }

// Statistics of a query: its largest score, and the reciprocal of the sum of exp(score - largest). Separate, since the
// logarithm of the sum would be lost next to a large score. {inf, 0} if everything is masked, {0, 0} if the bias of the
// rest is -inf.
struct alignas(2 * sizeof(Acc)) Statistics {
    Acc largest, share;
};

template <typename E> constexpr f32 LARGEST = 3.3895313892515355e38f;
template <> constexpr f32 LARGEST<f16> = 65504;
template <> constexpr f32 LARGEST<f32> = 3.4028234663852886e38f;
template <> constexpr f64 LARGEST<f64> = 1.7976931348623157e308;

// sum · factor, a mean of values, which can only exceed all of them by rounding.
__device__ __forceinline__ Acc mean_of(Acc sum, Acc factor) {
    const Acc mean = sum * factor;
    return fabs(mean) > LARGEST<T> && fabs(sum) < infinity() ? copysign((Acc)LARGEST<T>, mean) : mean;
}

// Scale of the rounding error of an output before it is rounded itself: the inverse of the precision.
template <typename E> constexpr f32 RESIDUAL_SCALE = 256;
template <> constexpr f32 RESIDUAL_SCALE<f16> = 2048;

constexpr bool IS_F16 = RESIDUAL_SCALE<T> == 2048;

// Positions `start` to `end`, none if that is not larger.
struct Span {
    i32 start, end;
};

__device__ __forceinline__ Span span(i32 start, i32 end, i32 limit) {
    return {start < 0 ? 0 : start, end > limit ? limit : end};
}

// True if `holds` is true for one of the positions `first` to `end` - 1. Uniform across a warp.
template <typename F> __device__ __forceinline__ bool warp_any(i32 first, i32 end, F holds) {
    bool any = false;
    for (i32 at = first + (i32)threadIdx.x % 32; at < end; at += 32) any |= holds(at);
    return __any_sync(0xFFFFFFFF, any);
}

// Terms added to the scaled products of a query; null if absent.
struct RowBias {
    // At key 0.
    const Acc* curve;
    const T* bias;
    i64 step;
    // The curve leaves out the keys before.
    i32 first;

    __device__ __forceinline__ Acc at(i32 key) const {
        const Acc position = curve && (!EXTENDED || key >= first) ? curve[key] : 0;
        return bias ? position + Element<T>::to_acc(bias[key * step]) : position;
    }
};

// Parameters of all scores of a call: the tail of every kernel's parameters, in their order. Absent tensors are null.
// `mask` and `bias` have the sizes [batch, heads, query, key], with strides of 0 where they broadcast.
struct Spec {
    const bool *mask, *query_mask, *key_mask;
    const T* bias;
    const Acc *curves, *sinks;
    // Where the seed of a recorded graph lies, or none.
    const u64* seed_at;
    Layout mask_at, bias_at;
    // Number of leading keys that `key_mask` does not cover: the memory keys, or 0.
    i32 unmasked, mem_keys;
    // Number of leading keys that curves leave out.
    i32 unbiased;
    Window window;
    i32 causal;
    // 1 if each curve is a number times the distance from the query's position, 2 if times its magnitude, otherwise 0.
    i32 linear;
    f64 scale;
    // Bound of the soft clamp, or 0.
    f64 softclamp;
    u64 seed, stream, threshold;
    f64 factor;
};

// The same as parameters, inputs and values; and a Spec of these.
#define SPEC_INPUTS const bool* mask, const bool* query_mask, const bool* key_mask, const T* bias, const Acc* curves, \
                    const Acc* sinks, const u64* seed_at
#define SPEC_VALUES Layout mask_at, Layout bias_at, i32 unmasked, i32 mem_keys, i32 unbiased, WINDOW_VALUES, \
                    i32 causal, i32 linear, f64 scale, f64 softclamp, u64 seed, u64 stream, u64 threshold, f64 factor
#define SPEC {mask, query_mask, key_mask, bias, curves, sinks, seed_at, mask_at, bias_at, unmasked, mem_keys, \
              unbiased, WINDOW, causal, linear, scale, softclamp, seed, stream, threshold, factor}

// The scores of one head. Kernels keep it in shared memory: it would take some forty registers of every thread.
struct Scores {
    i32 queries, keys;
    // A query's position among the keys is its number + shift.
    i32 shift;
    i32 mem_keys, unbiased;
    Window window;
    bool causal, drops;
    i32 linear;
    Acc scale, factor;
    // Bound of the soft clamp, or 0; the sink's score, or -inf.
    Acc bound, sink;
    // Weights are summed as this power of two of themselves, so that no mean of finite values leaves the range of
    // numbers on the way. Sums of f16 cannot.
    Acc part;
    const bool *mask, *query_mask, *key_mask;
    i64 mask_query, mask_key;
    const T* bias;
    i64 bias_query, bias_key;
    // The bias of distance 0; distances run from 1 - queries to keys - 1.
    const Acc* curve;
    // For a linear curve, the bias at a distance of 1 after a query's position.
    Acc slope;
    // Position of the head's first score among all: dropout counts them.
    u64 first;
    u64 seed, stream, threshold;

    __device__ __forceinline__ void set(
        const Spec& spec, i32 batch, i32 head, i32 heads, i32 query_count, i32 key_count) {
        queries = query_count, keys = key_count, shift = keys - queries;
        mem_keys = spec.mem_keys, unbiased = spec.unbiased, window = spec.window, causal = spec.causal;
        scale = (Acc)spec.scale, factor = (Acc)spec.factor, bound = (Acc)spec.softclamp;
        sink = spec.sinks ? spec.sinks[head] : -infinity();
        part = 1;
        if constexpr (!IS_F16) {
            for (i32 rest = keys - 1; rest > 0; rest /= 2) part /= 2;
        }
        seed = spec.seed_at ? *spec.seed_at : spec.seed, stream = spec.stream, threshold = spec.threshold;
        drops = spec.threshold != 0 || spec.factor != 1;
        first = ((u64)batch * heads + head) * queries * keys;
        const auto start = [&](const Layout& at) {
            return at.offset + batch * at.strides[0] + head * at.strides[1];
        };
        mask = spec.mask ? spec.mask + start(spec.mask_at) : nullptr;
        mask_query = spec.mask_at.strides[2], mask_key = spec.mask_at.strides[3];
        bias = spec.bias ? spec.bias + start(spec.bias_at) : nullptr;
        bias_query = spec.bias_at.strides[2], bias_key = spec.bias_at.strides[3];
        query_mask = spec.query_mask ? spec.query_mask + (i64)batch * queries : nullptr;
        const i64 padding = (i64)batch * (keys - spec.unmasked) - spec.unmasked;
        key_mask = spec.key_mask ? spec.key_mask + padding : nullptr;
        curve = spec.curves ? spec.curves + (i64)head * (queries + keys - 1) + queries - 1 : nullptr;
        // A distance of 1 from the first query's position; a single query has none and needs none.
        linear = curve && queries > 1 ? spec.linear : 0;
        slope = linear ? curve[shift + 1] : 0;
    }

    // The keys that causality and the window leave to one of the queries `first` to `last`.
    __device__ __forceinline__ Span keys_of(i32 first, i32 last) const {
        return span(window.first_key(first + shift), causal ? last + shift + 1 : keys, keys);
    }

    // The queries to which they leave one of the keys `first` to `last`.
    __device__ __forceinline__ Span queries_of(i32 first, i32 last) const {
        return span(causal ? first - shift : 0, window.last_position(last) - shift + 1, queries);
    }

    // True if the padding keeps one of `count` keys, at least one of which exists; true if it masks one of them, or
    // one of `count` queries. Uniform across a warp.
    __device__ __forceinline__ bool any_key(i32 first, i32 count) const {
        const auto kept = [&](i32 key) { return key < mem_keys || key_mask[key]; };
        return !key_mask || warp_any(first, min(first + count, keys), kept);
    }
    __device__ __forceinline__ bool pads_keys(i32 first, i32 count) const {
        const auto masked = [&](i32 key) { return key >= mem_keys && !key_mask[key]; };
        return key_mask && warp_any(first, min(first + count, keys), masked);
    }
    __device__ __forceinline__ bool pads_queries(i32 first, i32 count) const {
        const auto masked = [&](i32 query) { return !query_mask[query]; };
        return query_mask && warp_any(first, min(first + count, queries), masked);
    }

    // True if the scores of a tile are only scaled products: all exist, and none is masked or biased. Uniform across a
    // warp.
    __device__ __forceinline__ bool plain(i32 query, i32 key, i32 rows, i32 columns) const {
        return inside(query, key, rows, columns) && !mask && !curve && !bias && !pads_keys(key, columns);
    }

    // True if all scores of a tile exist, and causality, the window and the queries' padding keep them.
    __device__ __forceinline__ bool inside(i32 query, i32 key, i32 rows, i32 columns) const {
        // A key that both the first and the last query keep is kept by those between them.
        const Span all = {keys_of(query + rows - 1, query).start, keys_of(query, query).end};
        return key >= all.start && key + columns <= all.end && query + rows <= queries && !pads_queries(query, rows);
    }

    // Tiles that hold only scaled products, by position: those of `columns` keys of the queries `first` to `last`, or
    // of queries of the keys. None if there are masks, biases or padding.
    __device__ __forceinline__ Span plain_keys(i32 first, i32 last) const {
        return all_plain(last < queries) ? Span{keys_of(last, last).start, keys_of(first, first).end} : Span{0, 0};
    }
    __device__ __forceinline__ Span plain_queries(i32 first, i32 last) const {
        return all_plain(last < keys) ? Span{queries_of(last, last).start, queries_of(first, first).end} : Span{0, 0};
    }
    __device__ __forceinline__ bool all_plain(bool all_exist) const {
        return all_exist && scale > 0 && !mask && !curve && !bias && !key_mask && !query_mask;
    }

    // The keys that causality, the window and a query's own padding leave to it.
    __device__ __forceinline__ Span kept(i32 query) const {
        Span kept = keys_of(query, query);
        if (query_mask && !query_mask[query]) kept.end = min(kept.end, mem_keys);
        return kept;
    }

    // True if the padding of the keys and the mask keep a score that exists.
    __device__ __forceinline__ bool keeps(i32 query, i32 key) const {
        return (!key_mask || key < mem_keys || key_mask[key]) && (!mask || mask[query * mask_query + key * mask_key]);
    }

    // Bit 0: whether a query has a key left. Bit 1: whether one of them has a bias above -inf. Looks at every `step`-th
    // key from `first` on.
    __device__ __forceinline__ u32 left_to(i32 query, i32 first, i32 step) const {
        const Span span = kept(query);
        const T* row = bias ? bias + query * bias_query : nullptr;
        u32 left = 0;
#pragma unroll 1
        for (i32 key = first; key < span.end; key += step) {
            if (key < span.start || !keeps(query, key)) continue;
            left |= row && Element<T>::to_acc(row[key * bias_key]) == -infinity() ? 1 : 3;
        }
        return left;
    }

    __device__ __forceinline__ bool biased() const { return curve || bias; }

    __device__ __forceinline__ RowBias bias_of(i32 query) const {
        return {curve ? curve - query : nullptr, bias ? bias + query * bias_query : nullptr, bias_key, unbiased};
    }

    // Bit c says whether dropout keeps a query's weight of key `key` + c, for c below N, at most 4. Word i of the
    // stream decides on score i.
    template <int N> __device__ __forceinline__ u32 undropped(i32 query, i32 key) const {
        const u64 index = first + (u64)query * keys + key;
        const u32 skip = index % 4;
        const auto above = [&](const Words& words) {
            u32 bits = 0;
#pragma unroll
            for (u32 lane = 0; lane < 4; ++lane) bits |= (u32)(words.word[lane] >= threshold) << lane;
            return bits;
        };
        u32 bits = above(philox_block(seed, stream, index / 4)) >> skip;
        if (skip + N > 4) bits |= above(philox_block(seed, stream, index / 4 + 1)) << (4 - skip);
        return bits;
    }
};

// The derivative of tanh by its value, which may be infinite or NaN for weights of 0.
__device__ __forceinline__ Acc clamp_slope(Acc tanh) {
    tanh = fmin(fmax(tanh, (Acc)-1), (Acc)1);
    return 1 - tanh * tanh;
}

// Rows of one head with packed features and their own strides.
struct Rows {
    const T* start;
    i64 step;
    i32 count, features;
    // True if rows can be read 128 bits at a time.
    bool packed;

    __device__ __forceinline__ void set(const T* storage, const Layout& at, i32 batch, i32 head) {
        start = storage + (at.offset + batch * at.strides[0] + head * at.strides[1]);
        step = at.strides[2];
        count = at.dims[2];
        features = at.dims[3];
        packed = aligned(start) && step % LANES == 0;
    }
};
