// Replacement for kernels/ptx.cuh when kernels are compiled for the emulator: the same functions, without inline PTX.

inline f32 ptx_f16_to_f32(unsigned short bits) { return xt_f16_to_f32(bits); }
inline unsigned short ptx_f32_to_f16(f32 x) { return xt_f32_to_f16(x); }
inline f32 ptx_exp2(f32 x) { return exp2(x); }
inline f32 ptx_log2(f32 x) { return log2(fabs(x) < 0x1p-126f ? 0.0f : x); }
// Flushes numbers below 2^-126 to 0, in arguments and results.
inline f32 ptx_inverse(f32 x) {
    const f32 least = 0x1p-126f, y = 1 / (fabs(x) < least ? copysign(0.0f, x) : x);
    return fabs(y) < least ? copysign(0.0f, y) : y;
}
inline void ptx_prefetch(const void*) {}
inline u32 ptx_opaque(u32 x) { return x; }
inline void ptx_keep_order() {}
inline void ptx_store_128(void* to, uint4 raw) { *static_cast<uint4*>(to) = raw; }

inline void ptx_ldmatrix_x4(u32 (&r)[4], const void* shared) { xt_ldmatrix(XT_HERE("ldmatrix"), r, 4, false, shared); }
inline void ptx_ldmatrix_x4_trans(u32 (&r)[4], const void* shared) {
    xt_ldmatrix(XT_HERE("ldmatrix"), r, 4, true, shared);
}
inline void ptx_ldmatrix_x2(u32 (&r)[2], const void* shared) { xt_ldmatrix(XT_HERE("ldmatrix"), r, 2, false, shared); }
inline void ptx_ldmatrix_x2_trans(u32 (&r)[2], const void* shared) {
    xt_ldmatrix(XT_HERE("ldmatrix"), r, 2, true, shared);
}

#if __CUDA_ARCH__ >= 800

inline unsigned short ptx_f32_to_bf16(f32 x) { return xt_f32_to_bf16(x); }
inline u32 ptx_pack_f16(f32 low, f32 high) { return xt_f32_to_f16(low) | (u32)xt_f32_to_f16(high) << 16; }
inline u32 ptx_pack_bf16(f32 low, f32 high) { return xt_f32_to_bf16(low) | (u32)xt_f32_to_bf16(high) << 16; }

inline void ptx_mma_m16n8k16_f16(f32 (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    xt_mma_m16n8k16(XT_HERE("mma"), d, a, b, false);
}
inline void ptx_mma_m16n8k16_bf16(f32 (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    xt_mma_m16n8k16(XT_HERE("mma"), d, a, b, true);
}

inline void ptx_cp_async_16(void* shared, const void* global, bool valid) {
    xt_copy_start(shared, global, 16, valid ? 16 : 0);
}
inline void ptx_cp_async_commit() { xt_copy_commit(); }
template <int N> inline void ptx_cp_async_wait() { xt_copy_wait(N); }

#endif

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

inline u32 ptx_shared_address(const void* shared) { return xt_shared_address(shared); }
inline void ptx_fence_async() { xt_fence_async(); }
inline void ptx_wgmma_fence() { xt_wgmma_fence(); }
inline void ptx_wgmma_commit() { xt_wgmma_commit(); }
template <int N> inline void ptx_wgmma_wait() { xt_wgmma_wait(XT_HERE("wgmma.wait_group"), N); }
inline void ptx_settle(f32&) {}
inline void ptx_settle(u32&) {}

template <bool F16, int N> inline void ptx_wgmma_ss(f32 (&d)[N][4], u64 a, u64 b, bool add) {
    xt_wgmma(&d[0][0], 8 * N, nullptr, a, b, add, !F16);
}
template <bool F16, int N> inline void ptx_wgmma_rs(f32 (&d)[N][4], const u32 (&a)[4], u64 b, bool add) {
    xt_wgmma(&d[0][0], 8 * N, a, 0, b, add, !F16);
}

#endif
