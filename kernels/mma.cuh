// Products on tensor cores (sm_80 and later) for bf16 and f16, summed in f32: m16n8k16, with operands in shared memory.
// The layouts of the fragments are in ptx.cuh.

#if __CUDA_ARCH__ >= 800

template <typename E> struct TensorCore;

template <> struct TensorCore<bf16> {
    static __device__ __forceinline__ u32 pack(f32 low, f32 high) { return ptx_pack_bf16(low, high); }
    // The sum of the two values.
    static __device__ __forceinline__ f32 sum(u32 pair) {
        return __uint_as_float(pair << 16) + __uint_as_float(pair & 0xFFFF0000);
    }
    static __device__ __forceinline__ void multiply(f32 (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
        ptx_mma_m16n8k16_bf16(d, a, b);
    }
};

template <> struct TensorCore<f16> {
    static __device__ __forceinline__ u32 pack(f32 low, f32 high) { return ptx_pack_f16(low, high); }
    static __device__ __forceinline__ f32 sum(u32 pair) {
        return ptx_f16_to_f32((unsigned short)pair) + ptx_f16_to_f32((unsigned short)(pair >> 16));
    }
    static __device__ __forceinline__ void multiply(f32 (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
        ptx_mma_m16n8k16_f16(d, a, b);
    }
};

// A tile in shared memory: rows of WIDTH elements in packets of 128 bits. The packets of a row are permuted, so that
// the eight packets that an access reads, one from each of eight rows, lie in different banks.
template <i32 WIDTH> struct SwizzledTile {
    static_assert(WIDTH % 32 == 0, "rows must fill whole groups of four packets");
    // Row stride, in elements.
    static constexpr i32 PITCH = WIDTH;
    static constexpr i32 PACKETS = WIDTH / 8;
    T* start;

    __device__ __forceinline__ T* packet(i32 row, i32 packet) const {
        // Rows of 128, 256, … bytes all start in the same bank, others in turns in one of two.
        const i32 place = PACKETS % 8 == 0 ? packet ^ row % 8 : packet ^ row / 2 % 4;
        return start + row * WIDTH + place * 8;
    }

    // Fragment a of rows `row` … + 15 and elements 16 k … + 15.
    __device__ __forceinline__ void load_a(u32 (&a)[4], i32 row, i32 k) const {
        const i32 lane = threadIdx.x % 32;
        ptx_ldmatrix_x4(a, packet(row + lane % 16, 2 * k + lane / 16));
    }

    // Fragments b of the transposed tile: rows `row` … + 15 are columns, elements 16 k … + 15 are rows.
    __device__ __forceinline__ void load_b_transposed(u32 (&b)[2][2], i32 row, i32 k) const {
        const i32 lane = threadIdx.x % 32;
        u32 r[4];
        ptx_ldmatrix_x4(r, packet(row + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
        b[0][0] = r[0], b[0][1] = r[1], b[1][0] = r[2], b[1][1] = r[3];
    }

    // Fragments b of the tile: rows 16 k … + 15, columns `column` … + 15.
    __device__ __forceinline__ void load_b(u32 (&b)[2][2], i32 k, i32 column) const {
        const i32 lane = threadIdx.x % 32;
        u32 r[4];
        ptx_ldmatrix_x4_trans(r, packet(16 * k + lane % 16, column / 8 + lane / 16));
        b[0][0] = r[0], b[0][1] = r[1], b[1][0] = r[2], b[1][1] = r[3];
    }
};

// A warp's sums: 16 M rows of N columns, each thread holding four of each 16 × 8.
template <i32 M, i32 N> struct Sums {
    static constexpr i32 ROWS = 2 * M, COLUMNS = N / 4;
    f32 of[M][N / 8][4];

    // The thread's rows and columns by their numbers, and where they are in the warp's part.
    __device__ __forceinline__ f32& at(i32 r, i32 c) { return of[r / 2][c / 2][r % 2 * 2 + c % 2]; }
    static __device__ __forceinline__ i32 row(i32 r) { return r / 2 * 16 + r % 2 * 8 + (i32)threadIdx.x % 32 / 4; }
    static __device__ __forceinline__ i32 column(i32 c) { return c / 2 * 8 + (i32)threadIdx.x % 4 * 2 + c % 2; }

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (i32 m = 0; m < M; ++m) {
#pragma unroll
            for (i32 n = 0; n < N / 8; ++n) of[m][n][0] = of[m][n][1] = of[m][n][2] = of[m][n][3] = 0;
        }
    }

    // += a bᵀ for the rows of `a` from `row` on and N rows of `b`.
    template <i32 WIDTH>
    __device__ __forceinline__ void add_rows(const SwizzledTile<WIDTH>& a, i32 row, const SwizzledTile<WIDTH>& b) {
        // With more unrolling, the addresses of wide tiles would not fit into registers beside the sums.
#pragma unroll(WIDTH > 64 ? 4 : 8)
        for (i32 k = 0; k < WIDTH / 16; ++k) {
            u32 a_part[M][4];
#pragma unroll
            for (i32 m = 0; m < M; ++m) a.load_a(a_part[m], row + 16 * m, k);
#pragma unroll
            for (i32 n = 0; n < N / 16; ++n) {
                u32 b_part[2][2];
                b.load_b_transposed(b_part, 16 * n, k);
#pragma unroll
                for (i32 m = 0; m < M; ++m) {
                    TensorCore<T>::multiply(of[m][2 * n], a_part[m], b_part[0]);
                    TensorCore<T>::multiply(of[m][2 * n + 1], a_part[m], b_part[1]);
                }
            }
        }
    }

    // += a b: `a` is rounded to the type of the tensors.
    template <i32 K> __device__ __forceinline__ void add_product(const Sums<M, K>& a, const SwizzledTile<N>& b) {
#pragma unroll
        for (i32 k = 0; k < K / 16; ++k) {
            u32 a_part[M][4];
#pragma unroll
            for (i32 m = 0; m < M; ++m) {
                const auto &left = a.of[m][2 * k], &right = a.of[m][2 * k + 1];
                a_part[m][0] = TensorCore<T>::pack(left[0], left[1]);
                a_part[m][1] = TensorCore<T>::pack(left[2], left[3]);
                a_part[m][2] = TensorCore<T>::pack(right[0], right[1]);
                a_part[m][3] = TensorCore<T>::pack(right[2], right[3]);
            }
#pragma unroll
            for (i32 n = 0; n < N / 16; ++n) {
                u32 b_part[2][2];
                b.load_b(b_part, k, 16 * n);
#pragma unroll
                for (i32 m = 0; m < M; ++m) {
                    TensorCore<T>::multiply(of[m][2 * n], a_part[m], b_part[0]);
                    TensorCore<T>::multiply(of[m][2 * n + 1], a_part[m], b_part[1]);
                }
            }
        }
    }
};

#endif
