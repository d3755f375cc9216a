// All inline PTX of the kernels, behind small functions, each for one instruction. What an instruction asks of its
// operands is in NVIDIA's "Parallel Thread Execution ISA"; the layouts of the tensor-core fragments are repeated here,
// because kernels index by them.
//
// The emulated compiler of tests/emulator takes its ptx.h in place of this text: a function added here is added there.

__device__ __forceinline__ f32 ptx_f16_to_f32(unsigned short bits) {
    f32 y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(bits));
    return y;
}

// Rounds to nearest even.
__device__ __forceinline__ unsigned short ptx_f32_to_f16(f32 x) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}

// 2 to the power of x, with an error of 2 units in the last place; results below 2^-126 become 0.
__device__ __forceinline__ f32 ptx_exp2(f32 x) {
    f32 y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// 1 / x, with an error of 1 unit in the last place; numbers below 2^-126 count and become 0.
__device__ __forceinline__ f32 ptx_inverse(f32 x) {
    f32 y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// The same value, which the compiler knows nothing about: what is computed from it is not moved out of loops.
__device__ __forceinline__ u32 ptx_opaque(u32 x) {
    asm volatile("" : "+r"(x));
    return x;
}

// Brings a line of memory into the second-level cache, without waiting for it.
__device__ __forceinline__ void ptx_prefetch(const void* from) {
    asm volatile("prefetch.global.L2 [%0];" : : "l"(__cvta_generic_to_global(from)));
}

// An assignment may be taken apart into stores of single lanes, which PTX prevents.
__device__ __forceinline__ void ptx_store_128(void* to, uint4 raw) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
                 :
                 : "l"(__cvta_generic_to_global(to)), "r"(raw.x), "r"(raw.y), "r"(raw.z), "r"(raw.w)
                 : "memory");
}

// Loads of 8x8 matrices of 16-bit elements from shared memory, by a whole warp: threads 8 m … 8 m + 7 give the
// addresses of the rows of matrix m (16 bytes each, aligned to 16; x2 ignores the addresses of threads 16 and up).
// Thread `lane` gets in r[m] the elements (row lane / 4, columns 2 (lane % 4) and the next) of matrix m, the first in
// the low half; `trans` loads the transposed matrix: rows 2 (lane % 4) and the next, column lane / 4.
__device__ __forceinline__ void ptx_ldmatrix_x4(u32 (&r)[4], const void* shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"((u32)__cvta_generic_to_shared(shared))
                 : "memory");
}

__device__ __forceinline__ void ptx_ldmatrix_x4_trans(u32 (&r)[4], const void* shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"((u32)__cvta_generic_to_shared(shared))
                 : "memory");
}

__device__ __forceinline__ void ptx_ldmatrix_x2(u32 (&r)[2], const void* shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"((u32)__cvta_generic_to_shared(shared))
                 : "memory");
}

__device__ __forceinline__ void ptx_ldmatrix_x2_trans(u32 (&r)[2], const void* shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"((u32)__cvta_generic_to_shared(shared))
                 : "memory");
}

#if __CUDA_ARCH__ >= 800

// Rounds to nearest even; NaN becomes 0x7FFF.
__device__ __forceinline__ unsigned short ptx_f32_to_bf16(f32 x) {
    unsigned short bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}

// Two values rounded to half types in one register, as the fragments below hold them.
__device__ __forceinline__ u32 ptx_pack_f16(f32 low, f32 high) {
    u32 bits;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
}

__device__ __forceinline__ u32 ptx_pack_bf16(f32 low, f32 high) {
    u32 bits;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
}

// d += a b by a whole warp, a [16, 16], b [16, 8], d [16, 8]. With group = lane / 4 and pair = 2 (lane % 4), a thread
// holds, low halves first,
//   a[0] (group, pair), (group, pair + 1)           a[1] the same of row group + 8
//   a[2] (group, pair + 8), (group, pair + 9)       a[3] the same of row group + 8
//   b[0] (pair, group), (pair + 1, group)           b[1] (pair + 8, group), (pair + 9, group)
//   d[0] (group, pair)  d[1] (group, pair + 1)      d[2], d[3] the same of row group + 8
__device__ __forceinline__ void ptx_mma_m16n8k16_f16(f32 (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void ptx_mma_m16n8k16_bf16(f32 (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Copies 16 bytes from global to shared memory, both aligned to 16, while the thread goes on; zeros if not `valid`,
// when `global` is not read. The bytes are there for this thread after ptx_cp_async_wait, for others after a barrier
// that follows it.
__device__ __forceinline__ void ptx_cp_async_16(void* shared, const void* global, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"((u32)__cvta_generic_to_shared(shared)), "l"(__cvta_generic_to_global(global)),
                   "r"(valid ? 16 : 0)
                 : "memory");
}

// Ends a group of copies.
__device__ __forceinline__ void ptx_cp_async_commit() { asm volatile("cp.async.commit_group;" : : : "memory"); }

// Waits until at most the N youngest groups of this thread are under way.
template <int N> __device__ __forceinline__ void ptx_cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" : : "n"(N) : "memory");
}

#endif
