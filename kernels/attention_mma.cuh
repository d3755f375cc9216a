// The tensor-core rung of attention, for bf16 and f16 on sm_80 and later, and rows of up to HEAD features that can be
// copied 128 bits at a time.
//
// Four warps own 16 M rows each of one operand, whose tile stays in shared memory, while tiles of the other pass by:
// cp.async fills one stage as the warps multiply the other. Scores stay in registers; rounded to the type of the
// tensors, the registers of one product are operands of the next.

#include "mma.cuh"

// The including file defines SPANS, which says whether registers leave room for a separate path for scores without
// masks and biases, except biases that are a slope times the distance.

constexpr i32 WARPS = 4, MMA_THREADS = 32 * WARPS;

#if __CUDA_ARCH__ >= 800

constexpr f32 LOG2_E = 1.4426950408889634f;

// Up to this magnitude the largest score may be subtracted after scaling to base 2, in one multiply-add: rounding then
// changes a weight by less than half types resolve. Larger scores are subtracted first.
constexpr f32 LARGE_SCORE = 256;

typedef SwizzledTile<HEAD> Tile;

__device__ __forceinline__ i32 warp_row(i32 rows_of_warp) { return (i32)threadIdx.x / 32 * rows_of_warp; }

// Starts the copy of COUNT rows to shared memory, zeros where there are none; another head is `offset` further on. A
// thread copies the same packet of every STEP-th row. Terms common to its copies are computed once: the compiler must
// assume that each copy changes `rows`, and would read it again.
template <i32 COUNT, i32 THREADS = MMA_THREADS, typename To>
__device__ __forceinline__ void copy_rows(const To& to, const Rows& rows, i32 first, i64 offset = 0) {
    constexpr u32 STEP = THREADS / To::PACKETS;
    static_assert(STEP % 8 == 0, "threads copy rows at one place of the swizzle");
    // Positions of the thread that are computed before the loop over tiles would occupy registers throughout, for which
    // wider heads have no room.
    const u32 thread = HEAD > 32 ? ptx_opaque(threadIdx.x) : (u32)threadIdx.x;
    const u32 row = thread / To::PACKETS, packet = thread % To::PACKETS;
    const T* const none = rows.start;
    const i64 step = rows.step;
    const i32 left = packet * 8 < (u32)rows.features ? rows.count - first - (i32)row : 0;
    i64 at = offset + (first + (i32)row) * step + packet * 8;
    T* place = to.packet(row, packet);
#pragma unroll
    for (u32 i = 0; i < COUNT; i += STEP) {
        const bool exists = (i32)i < left;
        if (COUNT % STEP == 0 || i + row < COUNT) ptx_cp_async_16(place, exists ? none + at : none, exists);
        at += STEP * step;
        place += STEP * To::PITCH;
    }
}

template <bool FIRST, typename A, typename B> struct Choice {
    typedef A Type;
};

template <typename A, typename B> struct Choice<false, A, B> {
    typedef B Type;
};

// Scores or weights of a warp. If BY_KEY, its rows are keys, otherwise queries.
template <i32 M, i32 N, bool BY_KEY> struct ScoreSums : Sums<M, N> {
    typedef Sums<M, N> Base;
    static constexpr i32 QUERIES = BY_KEY ? Base::COLUMNS : Base::ROWS, KEYS = BY_KEY ? Base::ROWS : Base::COLUMNS;
    // One bit per score of the thread.
    static_assert(QUERIES * KEYS <= 64, "a thread has up to 64 scores");
    typedef typename Choice<QUERIES * KEYS <= 32, u32, u64>::Type Bits;

    __device__ __forceinline__ f32& score(i32 query, i32 key) {
        return BY_KEY ? this->at(key, query) : this->at(query, key);
    }
    static __device__ __forceinline__ i32 query(i32 q) { return BY_KEY ? Base::column(q) : Base::row(q); }
    static __device__ __forceinline__ i32 key(i32 k) { return BY_KEY ? Base::row(k) : Base::column(k); }

    // The same if the tile at `at`, of `size` keys or queries, may lie in a span of those that need no check.
    __device__ __forceinline__ f32 finish(
        const Scores& scores, i32 first_query, i32 first_key, Span plain, i32 at, i32 size) {
        return at >= plain.start && at + size <= plain.end ? scores.scale : finish(scores, first_query, first_key);
    }

    // Products to scores, −inf where masked or outside; returns what they must still be multiplied with, so that the
    // scale of plain tiles costs nothing. The warp's first query and key are those given.
    __device__ __forceinline__ f32 finish(const Scores& scores, i32 first_query, i32 first_key) {
        constexpr i32 ROWS = 16 * M;
        const i32 rows = BY_KEY ? N : ROWS, columns = BY_KEY ? ROWS : N;
        const bool clamps = EXTENDED && scores.bound > 0;
        // The largest score stays the largest only if the scale is positive.
        if (scores.scale > 0 && scores.plain(first_query, first_key, rows, columns)) {
            if (!clamps) return scores.scale;
            clamp(scores.bound, scores.scale);
            return 1;
        }
        Bits kept = ~Bits(0);
        const bool masked = scores.mask || scores.pads_keys(first_key, columns), biased = scores.biased();
        const f32 scale = scores.scale;
        // Without masks and tables, spans and slopes decide on a score.
        const i32 linear = scores.bias || EXTENDED && first_key < scores.unbiased ? 0 : scores.linear;
        if (SPANS && !masked && (linear || !biased && scale > 0)) {
            if (linear) {
                const f32 slope = scores.slope;
#pragma unroll
                for (i32 q = 0; q < QUERIES; ++q) {
                    // As seen from the thread's first key.
                    const f32 distance = first_key + key(0) - first_query - query(q) - scores.shift;
#pragma unroll
                    for (i32 k = 0; k < KEYS; ++k) {
                        const f32 away = distance + (f32)(key(k) - key(0));
                        score(q, k) = score(q, k) * scale + slope * (EXTENDED && linear == 2 ? fabs(away) : away);
                    }
                }
            }
            if (clamps) clamp(scores.bound, linear ? 1 : scale);
#pragma unroll
            for (i32 q = 0; q < QUERIES; ++q) {
                const i32 row = first_query + query(q);
                const Span span = scores.kept(min(row, scores.queries - 1));
                const i32 start = span.start - first_key - key(0);
                const i32 end = row < scores.queries ? span.end - first_key - key(0) : start;
#pragma unroll
                for (i32 k = 0; k < KEYS; ++k) {
                    const i32 place = key(k) - key(0);
                    if (place < start || place >= end) score(q, k) = -infinity();
                }
            }
            return linear || clamps ? 1 : scale;
        }
        if (masked) kept = masks(scores, first_query, first_key);
#pragma unroll
        for (i32 q = 0; q < QUERIES; ++q) {
            const i32 row = first_query + query(q);
            const Span span = scores.kept(min(row, scores.queries - 1));
            const RowBias bias = scores.bias_of(row);
#pragma unroll
            for (i32 k = 0; k < KEYS; ++k) {
                if constexpr (KEYS > 8) {
                    if (k % 8 == 0) ptx_keep_order();
                }
                const i32 column = first_key + key(k);
                const bool keep = column >= span.start && column < span.end && row < scores.queries &&
                                  kept >> (q * KEYS + k) & 1;
                f32& s = score(q, k);
                s *= scale;
                if (biased && keep) s += bias.at(column);
                if (clamps) s = clamped(s, scores.bound, 2 * LOG2_E / scores.bound);
                if (!keep) s = -infinity();
            }
        }
        return 1;
    }

    // bound · tanh(score / bound), where `to_log2` is 2 log2(e) / bound: tanh(x) = 1 - 2 / (e^2x + 1).
    static __device__ __forceinline__ f32 clamped(f32 score, f32 bound, f32 to_log2) {
        return bound - 2 * bound * ptx_inverse(ptx_exp2(score * to_log2) + 1);
    }

    // Clamps scores softly, of which this holds the quotients by `unit`.
    __device__ __forceinline__ void clamp(f32 bound, f32 unit) {
        const f32 to_log2 = 2 * LOG2_E * unit / bound;
#pragma unroll
        for (i32 q = 0; q < QUERIES; ++q) {
#pragma unroll
            for (i32 k = 0; k < KEYS; ++k) score(q, k) = clamped(score(q, k), bound, to_log2);
        }
    }

    // Bit q KEYS + k: whether padding and mask keep a score. Not unrolled, as its code would be large.
    static __device__ __forceinline__ Bits masks(const Scores& scores, i32 first_query, i32 first_key) {
        Bits kept = 0;
#pragma unroll 1
        for (i32 at = 0; at < QUERIES * KEYS; ++at) {
            const i32 row = first_query + query(at / KEYS), column = first_key + key(at % KEYS);
            const bool keep = row < scores.queries && column < scores.keys && scores.keeps(row, column);
            kept |= (Bits)keep << at;
        }
        return kept;
    }

    // Bit q KEYS + k: whether dropout keeps a weight. Not unrolled either; all threads of the warp call it.
    static __device__ __forceinline__ Bits undropped(const Scores& scores, i32 first_query, i32 first_key) {
        Bits kept = 0;
        if (scores.keys % 4 == 0) {
            // Four words of Philox decide on four keys of a query, which lie with two or four threads: each draws for
            // some of them and passes the bits on.
            const u32 lane = threadIdx.x % 32;
            const u32 own = BY_KEY ? lane / 4 % 4 : lane % 2;
#pragma unroll 1
            for (i32 at = 0; at < M * (N / 8); ++at) {
                const i32 m = at / (N / 8), n = at % (N / 8);
                if (BY_KEY) {
                    const i32 row = first_query + query(2 * n + own % 2), column = first_key + key(2 * m + own / 2);
                    const u32 bits = scores.undropped<4>(row, column - own);
#pragma unroll
                    for (u32 part = 0; part < 4; ++part) {
                        const u32 theirs = __shfl_sync(0xFFFFFFFF, bits, (lane & ~12u) | part << 2);
                        kept |= (Bits)(theirs >> own & 1) << ((2 * n + part % 2) * KEYS + 2 * m + part / 2);
                    }
                } else {
                    const i32 row = first_query + query(2 * m + own), column = first_key + key(2 * n);
                    const u32 bits = scores.undropped<4>(row, column - 2 * own);
                    const u32 theirs = __shfl_xor_sync(0xFFFFFFFF, bits, 1);
                    const u32 first = own ? theirs : bits, second = own ? bits : theirs;
                    kept |= (Bits)(first >> 2 * own & 3) << (2 * m * KEYS + 2 * n);
                    kept |= (Bits)(second >> 2 * own & 3) << ((2 * m + 1) * KEYS + 2 * n);
                }
            }
            return kept;
        }
#pragma unroll 1
        for (i32 at = 0; at < QUERIES * KEYS; ++at) {
            const i32 row = first_query + query(at / KEYS), column = first_key + key(at % KEYS);
            kept |= (Bits)(scores.undropped<1>(row, column) & 1) << at;
        }
        return kept;
    }

    // Sets the weights that dropout drops to zero. The others are scaled once the sums are complete.
    __device__ __forceinline__ void drop(Bits kept) {
#pragma unroll
        for (i32 q = 0; q < QUERIES; ++q) {
#pragma unroll
            for (i32 k = 0; k < KEYS; ++k) {
                if (!(kept >> (q * KEYS + k) & 1)) score(q, k) = 0;
            }
        }
    }

    // exp(score - largest) · share of finished scores; `unit` is the result of `finish`, `statistics` are those of the
    // warp's queries, `count` of which exist. Returns true if one weight may be the whole weight of its query.
    __device__ __forceinline__ bool weigh(f32 unit, const Statistics* statistics, i32 count) {
        const i32 end = min(BY_KEY ? N : 16 * M, count);
        const auto of_query = [&](i32 q) { return query(q) < count ? statistics[query(q)] : Statistics{0, 0}; };
        const bool large = warp_any(0, end, [&](i32 row) { return is_large(statistics[row]); });
        const bool sharp = warp_any(0, end, [&](i32 row) { return is_sharp(statistics[row]); });
        weigh(unit, large, of_query);
        return sharp;
    }

    // True if the scores of a query are large; true if one of its weights may be its whole weight.
    static __device__ __forceinline__ bool is_large(const Statistics& row) { return fabs(row.largest) > LARGE_SCORE; }
    static __device__ __forceinline__ bool is_sharp(const Statistics& row) { return row.share > 0.999f; }

    // The same by the statistics of each of the thread's queries; `large` if scores of one of the warp's queries are.
    template <typename F> __device__ __forceinline__ void weigh(f32 unit, bool large, F of_query) {
        f32 to_log2 = unit * LOG2_E;
        if (large) {
            to_log2 = LOG2_E;
#pragma unroll
            for (i32 q = 0; q < QUERIES; ++q) {
                const f32 largest = of_query(q).largest;
#pragma unroll
                for (i32 k = 0; k < KEYS; ++k) {
                    // No weight exceeds 1, whatever the rounding of huge scores.
                    const f32 less = __fsub_rn(__fmul_rn(score(q, k), unit), largest);
                    score(q, k) = less > 0 ? 0 : less;
                }
            }
        }
#pragma unroll
        for (i32 q = 0; q < QUERIES; ++q) {
            const Statistics row = of_query(q);
            const f32 base = large ? 0 : row.largest * LOG2_E;
#pragma unroll
            for (i32 k = 0; k < KEYS; ++k) score(q, k) = ptx_exp2(score(q, k) * to_log2 - base) * row.share;
        }
    }

    // The same for queries none of which has large scores or a weight that may be the whole one: `base_of` gives the
    // exponent that stands for largest and share, `exponent_base`.
    template <typename F> __device__ __forceinline__ void weigh_plainly(f32 unit, F base_of) {
        const f32 to_log2 = unit * LOG2_E;
#pragma unroll
        for (i32 q = 0; q < QUERIES; ++q) {
            const f32 base = base_of(q);
#pragma unroll
            for (i32 k = 0; k < KEYS; ++k) score(q, k) = ptx_exp2(score(q, k) * to_log2 - base);
        }
    }
    // A share of 0, for queries without weights, is an infinite exponent.
    static __device__ __forceinline__ f32 exponent_base(const Statistics& row) {
        return row.share == 0 ? infinity() : row.largest * LOG2_E - log2(row.share);
    }

    // Sets the weights of queries without keys; `statistics` are those of the tile's queries.
    __device__ __forceinline__ void spread(
        const Scores& scores, const Statistics* statistics, i32 first_query, i32 first_key) {
        const Bits kept = scores.drops ? undropped(scores, first_query, first_key) : ~Bits(0);
#pragma unroll
        for (i32 q = 0; q < QUERIES; ++q) {
            const bool blind = statistics[query(q)].largest == infinity();
#pragma unroll
            for (i32 k = 0; k < KEYS; ++k) {
                const bool keep = first_key + key(k) < scores.keys && kept >> (q * KEYS + k) & 1;
                if (blind) score(q, k) = keep ? 1 / (f32)scores.keys : 0;
            }
        }
    }

    // Turns the gradients of the weights, which this holds, into those of the scores. Applies dropout to the weights;
    // `sharp` is the result of `weigh`.
    __device__ __forceinline__ void to_score_gradients(
        ScoreSums& weights, const Scores& scores, bool sharp, const Statistics* statistics, const f32* delta, i32 count,
        i32 first_query, i32 first_key) {
        const auto delta_of = [&](i32 q) { return query(q) < count ? delta[query(q)] : 0; };
        const auto of_query = [&](i32 q) { return query(q) < count ? statistics[query(q)] : Statistics{0, 0}; };
        to_score_gradients(weights, scores, sharp, delta_of, of_query, first_query, first_key);
    }

    // The same by the delta, and with a soft clamp the statistics, of each of the thread's queries.
    template <typename D, typename S>
    __device__ __forceinline__ void to_score_gradients(
        ScoreSums& weights, const Scores& scores, bool sharp, D delta_of, S of_query, i32 first_query, i32 first_key) {
        const bool drops = scores.drops;
        const Bits kept = drops ? undropped(scores, first_query, first_key) : ~Bits(0);
        const f32 factor = scores.factor;
#pragma unroll
        for (i32 q = 0; q < QUERIES; ++q) {
            const f32 mean = delta_of(q);
#pragma unroll
            for (i32 k = 0; k < KEYS; ++k) {
                f32& ds = score(q, k);
                const bool keep = kept >> (q * KEYS + k) & 1;
                if (drops) ds = keep ? ds * factor : 0;
                ds -= mean;
            }
        }
        if (sharp) {
#pragma unroll
            for (i32 q = 0; q < QUERIES; ++q) {
#pragma unroll
                for (i32 k = 0; k < KEYS; ++k) {
                    // A key that has all the weight of its query up to rounding: the difference is a rounding error
                    // of 0, unless it is infinite or NaN.
                    if (weights.score(q, k) > 1 - 2.4e-7f) score(q, k) *= 0;
                }
            }
        }
#pragma unroll
        for (i32 q = 0; q < QUERIES; ++q) {
#pragma unroll
            for (i32 k = 0; k < KEYS; ++k) score(q, k) *= weights.score(q, k);
        }
        if (EXTENDED && scores.bound > 0) {
            const f32 part = 1 / scores.bound, to_log = part / LOG2_E;
#pragma unroll
            for (i32 q = 0; q < QUERIES; ++q) {
                // A score is the logarithm of its weight, plus the largest score, minus the logarithm of the share.
                const Statistics row = of_query(q);
                const f32 base = row.largest * part - ptx_log2(row.share) * to_log;
#pragma unroll
                for (i32 k = 0; k < KEYS; ++k) {
                    score(q, k) *= clamp_slope(ptx_log2(weights.score(q, k)) * to_log + base);
                }
            }
        }
        if (drops) weights.drop(kept);
    }
};

// The common part of all keys, by feature, from some of a tile's keys: 0 where they differ by more than that. The
// gradients of a query's scores sum to zero, but not quite once rounded as operands, and the common part would multiply
// the remainder: it is subtracted from the result. The tile's first key is `first`; returns true if there is a common
// part. All threads of the block call it, HEAD of which compute one feature each.
template <i32 COUNT, typename By>
__device__ __forceinline__ bool common_part(f32* common, const By& keys, const Scores& scores, i32 first) {
    constexpr i32 SAMPLE = 16;
    f32 mean = 0;
    if (threadIdx.x < HEAD) {
        f32 from = 0, sum = 0, squares = 0, count = 0;
#pragma unroll 4
        for (i32 i = 0; i < SAMPLE; ++i) {
            const i32 row = i * (COUNT / SAMPLE), key = first + row;
            if (key >= scores.keys || !(!scores.key_mask || key < scores.mem_keys || scores.key_mask[key])) continue;
            const f32 value = Element<T>::to_acc(keys.packet(row, threadIdx.x / 8)[threadIdx.x % 8]);
            if (count == 0) from = value;
            const f32 difference = value - from;
            sum += difference, squares += difference * difference, count += 1;
        }
        const f32 part = 1 / fmax(count, 1.0f), shift = sum * part, variance = squares * part - shift * shift;
        mean = from + shift;
        // False where one is NaN.
        if (!(mean * mean > 4 * variance)) mean = 0;
        common[threadIdx.x] = mean;
    }
    return __syncthreads_or(mean != 0);
}

// Subtracts from the rows of a warp the common part of the keys times the sums of the rounded gradients, of which each
// thread has a part.
template <i32 M>
__device__ __forceinline__ void take_common(Sums<M, HEAD>& sums, f32 (&gradients)[2 * M], const f32* common) {
#pragma unroll
    for (i32 r = 0; r < 2 * M; ++r) {
        gradients[r] += __shfl_xor_sync(0xFFFFFFFF, gradients[r], 1);
        gradients[r] += __shfl_xor_sync(0xFFFFFFFF, gradients[r], 2);
#pragma unroll
        for (i32 c = 0; c < HEAD / 4; ++c) sums.at(r, c) -= gradients[r] * common[Sums<M, HEAD>::column(c)];
    }
}

// Replaces the rows of a warp by their rounding errors, times `RESIDUAL_SCALE`.
template <i32 M> __device__ __forceinline__ void to_residual(Sums<M, HEAD>& sums) {
#pragma unroll
    for (i32 r = 0; r < 2 * M; ++r) {
#pragma unroll
        for (i32 c = 0; c < HEAD / 4; ++c) {
            f32& value = sums.at(r, c);
            value = (value - Element<T>::to_acc(Element<T>::from_acc(value))) * RESIDUAL_SCALE<T>;
        }
    }
}

// Writes the rows of a warp, times `factor`, through its part of `tile`, which no other warp uses any more.
template <i32 M, typename By>
__device__ __forceinline__ void write_rows(
    T* storage, const Layout& at, i32 batch, i32 head, i32 first, Sums<M, HEAD>& sums, f32 factor, const By& tile) {
    const i32 start = warp_row(16 * M), lane = threadIdx.x % 32;
#pragma unroll
    for (i32 r = 0; r < 2 * M; ++r) {
        const i32 row = start + Sums<M, HEAD>::row(r);
#pragma unroll
        for (i32 n = 0; n < HEAD / 8; ++n) {
            T* packet = tile.packet(row, n);
            reinterpret_cast<u32*>(packet)[lane % 4] =
                TensorCore<T>::pack(sums.at(r, 2 * n) * factor, sums.at(r, 2 * n + 1) * factor);
        }
    }
    __syncwarp();
    T* to = storage + (at.offset + batch * at.strides[0] + head * at.strides[1]);
    const i32 rows = at.dims[2], features = at.dims[3];
#pragma unroll 4
    for (i32 item = lane; item < 16 * M * By::PACKETS; item += 32) {
        const i32 row = start + item / By::PACKETS, packet = item % By::PACKETS;
        if (first + row < rows && packet * 8 < features) {
            const uint4 raw = *reinterpret_cast<const uint4*>(tile.packet(row, packet));
            ptx_store_128(to + (first + row) * at.strides[2] + packet * 8, raw);
        }
    }
}

#endif
