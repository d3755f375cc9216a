// The plain rung of attention: tiles in shared memory, multiplied by fused multiply-adds in the type of the
// computation. It serves every element type, every card and every number of features.
//
// A block of ACROSS × ACROSS threads owns tiles of TILE × TILE scores, SIDE × SIDE of them per thread, and TILE columns
// of a result at a time. SIDE elements have 128 bits, the width of every access to shared memory. Features are staged
// CHUNK at a time; nothing depends on their number. Blocks of f64, the type of gradient tests, are small, because their
// sequences are short.

constexpr i32 SIDE = 16 / sizeof(Acc);
constexpr i32 ACROSS = sizeof(Acc) == 8 ? 8 : 16;
constexpr i32 TILE = ACROSS * SIDE;
constexpr i32 CHUNK = 128 / sizeof(Acc);
constexpr i32 TILE_THREADS = ACROSS * ACROSS;

// Strides of shared tiles: 128 bits more than the row, so that columns hit different banks.
constexpr i32 CHUNK_PITCH = CHUNK + SIDE;
constexpr i32 SCORE_PITCH = TILE + SIDE;

// A thread's part of a tile.
typedef Acc Square[SIDE][SIDE];

struct alignas(16) Vector {
    Acc lane[SIDE];
};

__device__ __forceinline__ Vector vector_at(const Acc* from) { return *reinterpret_cast<const Vector*>(from); }

// Row and column of a thread in its block; it owns SIDE consecutive rows and columns of a tile.
__device__ __forceinline__ i32 thread_row() { return threadIdx.x / ACROSS; }
__device__ __forceinline__ i32 thread_column() { return threadIdx.x % ACROSS; }

// Copies TILE rows of COLUMNS features to shared memory, zeros where there are none. Row r goes to slot
// r % SIDE * ACROSS + r / SIDE if `INTERLEAVED`: threads that read every SIDE-th row then hit different banks.
template <i32 COLUMNS, i32 PITCH, bool INTERLEAVED, int N>
__device__ __forceinline__ void stage_packets(Acc* to, const Rows& rows, i32 first, i32 column) {
    constexpr i32 PER_ROW = COLUMNS / N;
#pragma unroll(N == 1 ? 1 : 2)
    for (i32 at = threadIdx.x; at < TILE * PER_ROW; at += TILE_THREADS) {
        const i32 row = at / PER_ROW, feature = column + at % PER_ROW * N;
        Packet<N> packet;
        if (first + row < rows.count && feature + N <= rows.features) {
            packet = load<N>(rows.start + (first + row) * rows.step + feature);
        } else {
#pragma unroll
            for (int lane = 0; lane < N; ++lane) {
                const bool exists = first + row < rows.count && feature + lane < rows.features;
                packet.lane[lane] = exists ? rows.start[(first + row) * rows.step + feature + lane] : T{0};
            }
        }
        const i32 slot = INTERLEAVED ? row % SIDE * ACROSS + row / SIDE : row;
#pragma unroll
        for (int lane = 0; lane < N; ++lane) {
            to[slot * PITCH + at % PER_ROW * N + lane] = Element<T>::to_acc(packet.lane[lane]);
        }
    }
}

template <i32 COLUMNS, i32 PITCH, bool INTERLEAVED>
__device__ __forceinline__ void stage(Acc* to, const Rows& rows, i32 first, i32 column) {
    if (rows.packed) {
        stage_packets<COLUMNS, PITCH, INTERLEAVED, LANES>(to, rows, first, column);
    } else {
        stage_packets<COLUMNS, PITCH, INTERLEAVED, 1>(to, rows, first, column);
    }
}

// Shared memory of a block: scores and rows of its head, a tile of scores, and operands staged for multiplication.
struct Shared {
    Scores of_head;
    Rows q, k, v, grad;
    // Statistics of the head's queries; only in the backward pass.
    const Statistics* statistics;
    const Acc* delta;
    alignas(16) Acc scores[TILE * SCORE_PITCH];
    alignas(16) Acc operands[2 * TILE * CHUNK_PITCH];
};
static_assert(TILE * TILE <= 2 * TILE * CHUNK_PITCH, "a tile of a result's operand must fit in the place of chunks");

// s = a bᵀ for the rows from `a_first` and `b_first` on. Threads without a row or a column of it have zeros.
__device__ __forceinline__ void multiply_rows(
    Square& s, Shared& shared, const Rows& a, i32 a_first, const Rows& b, i32 b_first) {
#pragma unroll
    for (i32 r = 0; r < SIDE; ++r) {
#pragma unroll
        for (i32 c = 0; c < SIDE; ++c) s[r][c] = 0;
    }
    Acc *a_chunk = shared.operands, *b_chunk = shared.operands + TILE * CHUNK_PITCH;
    const bool busy = a_first + thread_row() * SIDE < a.count && b_first + thread_column() * SIDE < b.count;
    for (i32 feature = 0; feature < a.features; feature += CHUNK) {
        __syncthreads();
        stage<CHUNK, CHUNK_PITCH, true>(a_chunk, a, a_first, feature);
        stage<CHUNK, CHUNK_PITCH, true>(b_chunk, b, b_first, feature);
        __syncthreads();
        const i32 end = busy ? min(CHUNK, a.features - feature) : 0;
#pragma unroll 1
        for (i32 at = 0; at < end; at += SIDE) {
            Vector a_rows[SIDE], b_rows[SIDE];
#pragma unroll
            for (i32 r = 0; r < SIDE; ++r) {
                a_rows[r] = vector_at(a_chunk + (r * ACROSS + thread_row()) * CHUNK_PITCH + at);
                b_rows[r] = vector_at(b_chunk + (r * ACROSS + thread_column()) * CHUNK_PITCH + at);
            }
#pragma unroll
            for (i32 lane = 0; lane < SIDE; ++lane) {
#pragma unroll
                for (i32 r = 0; r < SIDE; ++r) {
#pragma unroll
                    for (i32 c = 0; c < SIDE; ++c) s[r][c] += a_rows[r].lane[lane] * b_rows[c].lane[lane];
                }
            }
        }
    }
}

// Position of a row of the thread's square in the shared tile.
__device__ __forceinline__ Vector& score_row(Shared& shared, i32 r) {
    Acc* row = shared.scores + (thread_row() * SIDE + r) * SCORE_PITCH + thread_column() * SIDE;
    return *reinterpret_cast<Vector*>(row);
}

// Stores a tile in shared memory for the products below. The barrier waits for the readers of the previous one.
__device__ __forceinline__ void put_scores(Shared& shared, const Square& s) {
    __syncthreads();
#pragma unroll
    for (i32 r = 0; r < SIDE; ++r) {
        Vector& row = score_row(shared, r);
#pragma unroll
        for (i32 c = 0; c < SIDE; ++c) row.lane[c] = s[r][c];
    }
}

// The thread's part of the shared tile.
__device__ __forceinline__ void take_scores(Square& s, Shared& shared) {
#pragma unroll
    for (i32 r = 0; r < SIDE; ++r) {
        const Vector row = score_row(shared, r);
#pragma unroll
        for (i32 c = 0; c < SIDE; ++c) s[r][c] = row.lane[c];
    }
}

// acc += s x, or sᵀ x: the tile in shared memory with TILE columns of the rows from `first` on. The result has `rows`
// rows.
template <bool TRANSPOSED>
__device__ __forceinline__ void add_product(
    Square& acc, Shared& shared, i32 rows, const Rows& x, i32 first, i32 column) {
    __syncthreads();
    stage<TILE, TILE, false>(shared.operands, x, first, column);
    __syncthreads();
    const Acc *s = shared.scores, *columns = shared.operands + thread_column() * SIDE;
    const i32 row = thread_row() * SIDE;
    const bool busy = row < rows && column + thread_column() * SIDE < x.features;
    const i32 end = busy ? min(TILE, x.count - first) : 0;
#pragma unroll 1
    for (i32 at = 0; at < end; at += SIDE) {
        Vector s_part[SIDE];
#pragma unroll
        for (i32 r = 0; r < SIDE; ++r) {
            s_part[r] = vector_at(TRANSPOSED ? s + (at + r) * SCORE_PITCH + row : s + (row + r) * SCORE_PITCH + at);
        }
#pragma unroll
        for (i32 lane = 0; lane < SIDE; ++lane) {
            const Vector x_row = vector_at(columns + (at + lane) * TILE);
#pragma unroll
            for (i32 r = 0; r < SIDE; ++r) {
                const Acc weight = TRANSPOSED ? s_part[lane].lane[r] : s_part[r].lane[lane];
#pragma unroll
                for (i32 c = 0; c < SIDE; ++c) acc[r][c] += weight * x_row.lane[c];
            }
        }
    }
}

// Writes TILE columns of the thread's rows of a result, and their rounding errors if requested.
__device__ __forceinline__ void write_rows(
    T* storage, const Layout& at, i32 batch, i32 head, i32 first, i32 column, const Square& acc, Acc factor,
    T* residual = nullptr) {
    column += thread_column() * SIDE;
    const i32 features = at.dims[3];
    const i64 start = at.offset + batch * at.strides[0] + head * at.strides[1] + column;
    T* to = storage + start;
#pragma unroll
    for (i32 r = 0; r < SIDE; ++r) {
        const i32 row = first + thread_row() * SIDE + r;
        if (row >= at.dims[2]) continue;
        T* row_to = to + row * at.strides[2];
#pragma unroll
        for (i32 c = 0; c < SIDE; ++c) {
            if (column + c >= features) continue;
            const Acc value = acc[r][c] * factor;
            row_to[c] = Element<T>::from_acc(value);
            if (residual) {
                const Acc lost = value - Element<T>::to_acc(row_to[c]);
                residual[start + row * at.strides[2] + c] = Element<T>::from_acc(lost * (Acc)RESIDUAL_SCALE<T>);
            }
        }
    }
}

// The products of a tile as scores, −inf where masked or outside. Tiles that are not plain go through shared memory, a
// row at a time: unrolled, the code of biases, masks and dropout would be four times as large.
__device__ __forceinline__ void finish_scores(Square& s, Shared& shared, i32 query, i32 key) {
    const Scores& scores = shared.of_head;
    if (scores.bound == 0 && scores.plain(query, key, TILE, TILE)) {
#pragma unroll
        for (i32 r = 0; r < SIDE; ++r) {
#pragma unroll
            for (i32 c = 0; c < SIDE; ++c) s[r][c] *= scores.scale;
        }
        return;
    }
    put_scores(shared, s);
#pragma unroll 1
    for (i32 r = 0; r < SIDE; ++r) {
        const i32 row = query + thread_row() * SIDE + r;
        // Rows that do not exist stay zero.
        if (row >= scores.queries) break;
        const Span kept = scores.kept(row);
        const RowBias bias = scores.bias_of(row);
        Vector values = score_row(shared, r);
#pragma unroll
        for (i32 c = 0; c < SIDE; ++c) {
            const i32 at = key + thread_column() * SIDE + c;
            const bool keep = at >= kept.start && at < kept.end && scores.keeps(row, at);
            Acc value = -infinity();
            if (keep) {
                value = values.lane[c] * scores.scale + bias.at(at);
                if (scores.bound > 0) value = scores.bound * tanh(value / scores.bound);
            }
            values.lane[c] = value;
        }
        score_row(shared, r) = values;
    }
    take_scores(s, shared);
}

// Applies dropout to the thread's part of the shared tile.
__device__ __forceinline__ void drop_scores(Shared& shared, i32 query, i32 key) {
    const Scores& scores = shared.of_head;
#pragma unroll 1
    for (i32 r = 0; r < SIDE; ++r) {
        const u32 bits = scores.undropped<SIDE>(query + thread_row() * SIDE + r, key + thread_column() * SIDE);
        Vector& row = score_row(shared, r);
#pragma unroll
        for (i32 c = 0; c < SIDE; ++c) row.lane[c] *= bits >> c & 1 ? scores.factor : 0;
    }
}

// Combines the values of a row's threads; each gets the same bits.
template <typename V, typename F> __device__ __forceinline__ V reduce_tile_row(V value, F combine) {
#pragma unroll
    for (int step = ACROSS / 2; step > 0; step /= 2) value = combine(value, __shfl_xor_sync(0xFFFFFFFF, value, step));
    return value;
}

// True if one of a tile's queries has no key. Uniform across a warp.
__device__ __forceinline__ bool blind_query(const Shared& shared, i32 query) {
    const auto blind = [&](i32 row) { return shared.statistics[row].largest == infinity(); };
    return warp_any(query, min(query + TILE, shared.q.count), blind);
}

// Sets the weights of queries without keys.
__device__ __forceinline__ void spread_weights(Square& p, const Shared& shared, i32 query, i32 key) {
    const Scores& scores = shared.of_head;
#pragma unroll
    for (i32 r = 0; r < SIDE; ++r) {
        const i32 row = query + thread_row() * SIDE + r;
        if (row >= scores.queries || shared.statistics[row].largest != infinity()) continue;
#pragma unroll
        for (i32 c = 0; c < SIDE; ++c) {
            if (key + thread_column() * SIDE + c < scores.keys) p[r][c] = 1 / (Acc)scores.keys;
        }
    }
}
