// All inline PTX of the kernels, in small functions, one per instruction. The requirements on operands are in NVIDIA's
// "Parallel Thread Execution ISA"; the layouts of the tensor-core fragments are repeated here, because kernels index by
// them.
//
// The emulator in tests/emulator replaces this text by its ptx.h: functions added here must be added there.

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

// The logarithm of x to base 2, with an error of 2^-22 or two units in the last place; numbers below 2^-126 count as 0.
__device__ __forceinline__ f32 ptx_log2(f32 x) {
    f32 y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// 1 / x, with an error of 1 unit in the last place; numbers below 2^-126 count and become 0.
__device__ __forceinline__ f32 ptx_inverse(f32 x) {
    f32 y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// The same value, opaque to the compiler: computations with it are not moved out of loops.
__device__ __forceinline__ u32 ptx_opaque(u32 x) {
    asm volatile("" : "+r"(x));
    return x;
}

// Compiler barrier for memory accesses: otherwise all loads of an unrolled loop would start before the first is used,
// for which there are not enough registers.
__device__ __forceinline__ void ptx_keep_order() { asm volatile("" : : : "memory"); }

// Brings a line of memory into the second-level cache, without waiting for it.
__device__ __forceinline__ void ptx_prefetch(const void* from) {
    asm volatile("prefetch.global.L2 [%0];" : : "l"(__cvta_generic_to_global(from)));
}

// A plain assignment may be split into stores of single lanes; PTX prevents this.
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

// Waits until at most the N youngest groups of this thread are in flight.
template <int N> __device__ __forceinline__ void ptx_cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" : : "n"(N) : "memory");
}

#endif

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// Products of a warpgroup: 128 threads from a multiple of 128 on, all of which issue the same instructions. They run
// while the threads go on, and read shared memory as the asynchronous proxy: what threads have stored there, cp.async
// included, they see after ptx_fence_async of the thread that stored it and a barrier that follows.

// Address in shared memory, for descriptors.
__device__ __forceinline__ u32 ptx_shared_address(const void* shared) { return (u32)__cvta_generic_to_shared(shared); }

__device__ __forceinline__ void ptx_fence_async() { asm volatile("fence.proxy.async.shared::cta;" : : : "memory"); }

// Separates other instructions' accesses to the registers of a product from that product.
__device__ __forceinline__ void ptx_wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" : : : "memory"); }

// Ends a group of products.
__device__ __forceinline__ void ptx_wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" : : : "memory"); }

// Waits until at most the N youngest groups are in flight. Registers of products in flight must not be accessed.
template <int N> __device__ __forceinline__ void ptx_wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" : : "n"(N) : "memory");
}

// The same value, opaque to the compiler, so that it is not used before a preceding wait.
__device__ __forceinline__ void ptx_settle(f32& x) { asm volatile("" : "+f"(x) : : "memory"); }
__device__ __forceinline__ void ptx_settle(u32& x) { asm volatile("" : "+r"(x) : : "memory"); }

// d += a b, or d = a b unless `add`; a [64, 16], b [16, N], d [64, N]. Warp w of the warpgroup has rows 16 w … + 15
// of d and, where a is in registers, of a; its threads hold them as the fragments of ptx_mma_m16n8k16, d[n] being
// columns 8 n … + 7. Operands in shared memory are given by descriptors:
//   bits 0-13 address / 16, 16-29 and 32-45 two strides / 16, 62-63 swizzle: 1 for that of 128 bytes, in which bits
//   4-6 of an address are combined with its bits 7-9 by exclusive or
// `ss` takes a and the transposed b by rows of 64 elements, of which 16 are used: the second stride leads from eight
// rows to the next. `rs` takes b as it is, in rows of 64 columns: the first stride leads to the next 64 columns, the
// second from eight rows to the next.
#define PTX_SUM_4(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define PTX_SUM_16(n) PTX_SUM_4(n), PTX_SUM_4(n + 1), PTX_SUM_4(n + 2), PTX_SUM_4(n + 3)
#define PTX_SUMS_64 PTX_SUM_16(0), PTX_SUM_16(4)
#define PTX_SUMS_128 PTX_SUMS_64, PTX_SUM_16(8), PTX_SUM_16(12)
#define PTX_NAMES_64 \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, " \
    "%23, %24, %25, %26, %27, %28, %29, %30, %31}"
#define PTX_NAMES_128 \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, " \
    "%23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, " \
    "%45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}"
#define PTX_WGMMA_SS(n, type, names, a_at, b_at, add_at)                                                     \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" add_at ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n \
                 "k16.f32." type "." type " " names ", %" a_at ", %" b_at ", add, 1, 1, 0, 0;\n}"            \
                 : PTX_SUMS_##n                                                                             \
                 : "l"(a), "l"(b), "r"((u32)add))
#define PTX_WGMMA_RS(n, type, names, a_at, b_at, add_at)                                                     \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" add_at ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n \
                 "k16.f32." type "." type " " names ", {" a_at "}, %" b_at ", add, 1, 1, 1;\n}"              \
                 : PTX_SUMS_##n                                                                             \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((u32)add))

template <bool F16> __device__ __forceinline__ void ptx_wgmma_ss(f32 (&d)[8][4], u64 a, u64 b, bool add) {
    if constexpr (F16) PTX_WGMMA_SS(64, "f16", PTX_NAMES_64, "32", "33", "34");
    else PTX_WGMMA_SS(64, "bf16", PTX_NAMES_64, "32", "33", "34");
}
template <bool F16> __device__ __forceinline__ void ptx_wgmma_ss(f32 (&d)[16][4], u64 a, u64 b, bool add) {
    if constexpr (F16) PTX_WGMMA_SS(128, "f16", PTX_NAMES_128, "64", "65", "66");
    else PTX_WGMMA_SS(128, "bf16", PTX_NAMES_128, "64", "65", "66");
}
template <bool F16> __device__ __forceinline__ void ptx_wgmma_rs(f32 (&d)[8][4], const u32 (&a)[4], u64 b, bool add) {
    if constexpr (F16) PTX_WGMMA_RS(64, "f16", PTX_NAMES_64, "%32, %33, %34, %35", "36", "37");
    else PTX_WGMMA_RS(64, "bf16", PTX_NAMES_64, "%32, %33, %34, %35", "36", "37");
}
template <bool F16> __device__ __forceinline__ void ptx_wgmma_rs(f32 (&d)[16][4], const u32 (&a)[4], u64 b, bool add) {
    if constexpr (F16) PTX_WGMMA_RS(128, "f16", PTX_NAMES_128, "%64, %65, %66, %67", "68", "69");
    else PTX_WGMMA_RS(128, "bf16", PTX_NAMES_128, "%64, %65, %66, %67", "68", "69");
}

#endif
