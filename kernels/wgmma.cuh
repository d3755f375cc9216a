// Warpgroup products (sm_90a) for bf16 and f16, summed in f32, of tiles in shared memory. The instructions, and the
// layouts of their fragments and of their operands in memory, are in ptx.cuh.

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

constexpr i32 WARPGROUP = 128;

// A tile in shared memory as wgmma reads it: blocks of ROWS rows of 64 elements, the packets of 128 bits of a row in
// an order that depends on the row. Starts at a multiple of 1024 bytes.
template <i32 ROWS, i32 WIDTH> struct WgmmaTile {
    static_assert(WIDTH % 64 == 0 && ROWS % 16 == 0, "tiles are whole blocks of 64 columns");
    // Row stride, in elements.
    static constexpr i32 PITCH = 64;
    static constexpr i32 PACKETS = WIDTH / 8, ELEMENTS = ROWS * WIDTH;
    T* start;

    __device__ __forceinline__ T* packet(i32 row, i32 packet) const {
        return start + packet / 8 * (64 * ROWS) + row * 64 + (packet % 8 ^ row % 8) * 8;
    }

    // Descriptor of elements 16 k … + 15 of the rows from `row` on, a multiple of 8: the operand a, or b transposed.
    static __device__ __forceinline__ u64 rows(u32 place, i32 row, i32 k) {
        return descriptor(place + row * 8 + k / 4 * (8 * ROWS) + k % 4 * 2);
    }
    // Descriptor of rows 16 k … + 15: the operand b.
    static __device__ __forceinline__ u64 columns(u32 place, i32 k) { return descriptor(place + k * 128); }

    // The `place` of both: the distance between blocks of 64 columns, and the address, in units of 16 bytes.
    __device__ __forceinline__ u32 place() const {
        const u32 place = (u32)(64 * ROWS * 2 / 16) << 16 | (ptx_shared_address(start) & 0x3FFFF) / 16;
        // With wide sums, descriptors computed before a loop would not fit into registers beside them.
        return WIDTH > 64 ? ptx_opaque(place) : place;
    }

  private:
    static __device__ __forceinline__ u64 descriptor(u32 low) {
        // Swizzle of 128 bytes, eight rows of 128 bytes.
        return (u64)((u32)1 << 30 | 8 * 128 / 16) << 32 | low;
    }
};

// The aligned start of dynamic shared memory for tiles, for which launches add 1024 bytes.
__device__ __forceinline__ T* wgmma_memory(void* memory) {
    const u32 address = ptx_shared_address(memory);
    return reinterpret_cast<T*>(static_cast<char*>(memory) + (1024 - address % 1024) % 1024);
}

// Operand of a warpgroup in registers: [64, K] in the type of the tensors.
template <i32 K> struct WgmmaOperand {
    u32 of[K / 16][4];

    // A warp's sums, rounded.
    __device__ __forceinline__ void set(const Sums<1, K>& from) {
#pragma unroll
        for (i32 k = 0; k < K / 16; ++k) {
            const auto &left = from.of[0][2 * k], &right = from.of[0][2 * k + 1];
            of[k][0] = TensorCore<T>::pack(left[0], left[1]);
            of[k][1] = TensorCore<T>::pack(left[2], left[3]);
            of[k][2] = TensorCore<T>::pack(right[0], right[1]);
            of[k][3] = TensorCore<T>::pack(right[2], right[3]);
        }
    }
    // Adds the thread's elements of its two rows to their sums.
    __device__ __forceinline__ void add_to(f32 (&sums)[2]) const {
#pragma unroll
        for (i32 k = 0; k < K / 16; ++k) {
#pragma unroll
            for (i32 i = 0; i < 4; ++i) sums[i % 2] += TensorCore<T>::sum(of[k][i]);
        }
    }
    __device__ __forceinline__ void clear() {
#pragma unroll
        for (i32 k = 0; k < K / 16; ++k) of[k][0] = of[k][1] = of[k][2] = of[k][3] = 0;
    }
    __device__ __forceinline__ void settle() {
#pragma unroll
        for (i32 k = 0; k < K / 16; ++k) {
#pragma unroll
            for (i32 i = 0; i < 4; ++i) ptx_settle(of[k][i]);
        }
    }
};

// Starts to = a bᵀ for 64 rows of `a` from `row` on and the N rows of `b`, a group of products.
template <i32 N, i32 ROWS, i32 WIDTH>
__device__ __forceinline__ void wgmma_rows(
    Sums<1, N>& to, const WgmmaTile<ROWS, WIDTH>& a, i32 row, const WgmmaTile<N, WIDTH>& b) {
    const u32 a_place = a.place(), b_place = b.place();
    ptx_wgmma_fence();
#pragma unroll
    for (i32 k = 0; k < WIDTH / 16; ++k) {
        ptx_wgmma_ss<IS_F16>(to.of[0], a.rows(a_place, row, k), b.rows(b_place, 0, k), k > 0);
    }
    ptx_wgmma_commit();
}

// Starts to += a b, or to = a b unless `add`, a group of products.
template <i32 N, i32 K>
__device__ __forceinline__ void wgmma_product(
    Sums<1, N>& to, const WgmmaOperand<K>& a, const WgmmaTile<K, N>& b, bool add = true) {
    const u32 place = b.place();
    ptx_wgmma_fence();
#pragma unroll
    for (i32 k = 0; k < K / 16; ++k) ptx_wgmma_rs<IS_F16>(to.of[0], a.of[k], b.columns(place, k), add || k > 0);
    ptx_wgmma_commit();
}

// Called after the wait for the product that writes the sums, before they are used.
template <i32 N> __device__ __forceinline__ void wgmma_settle(Sums<1, N>& sums) {
#pragma unroll
    for (i32 n = 0; n < N / 8; ++n) {
#pragma unroll
        for (i32 i = 0; i < 4; ++i) ptx_settle(sums.of[0][n][i]);
    }
}

#endif
