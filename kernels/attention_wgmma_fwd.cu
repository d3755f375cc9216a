// Attention, forward, on the tensor cores of sm_90a; shapes and results as in attention_fwd.cu, for rows of up to HEAD
// features. The algorithm is that of attention_mma_fwd.cu, with products of warpgroups: 64 queries each, operands in
// swizzled shared memory, weights from the registers. The tensor cores work while the warps compute exponentials
// (FlashAttention-3, Shah et al., 2024).
//
// Variants: DTYPE=bf16,f16 HEAD=64,128

#include "attention_wgmma_fwd.cuh"

constexpr i32 FORWARD_WARPGROUPS = 2, FORWARD_BLOCKS = 1;

extern "C" __global__ void __launch_bounds__(128 * FORWARD_WARPGROUPS, FORWARD_BLOCKS) attention_wgmma_fwd(
    T* out, Statistics* statistics, T* residual, const T* q, const T* k, const T* v, const bool* mask, const bool*
    query_mask, const bool* key_mask, const T* bias, const f32* curves, Layout out_at, Layout q_at, Layout k_at,
    Layout v_at, Layout mask_at, Layout bias_at, i32 unmasked, i32 mem_keys, i32 past, i32 causal, i32 linear, f64
    scale, u64 seed, u64 stream, u64 threshold, f64 factor) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    const Spec spec = {mask,     query_mask, key_mask, bias,   curves, mask_at, bias_at, unmasked,
                       mem_keys, past,       causal,   linear, scale,  seed,    stream,  threshold,
                       factor};
    WgmmaForward<FORWARD_WARPGROUPS, 128, true> forward;
    forward.run(out, statistics, residual, q, k, v, out_at, q_at, k_at, v_at, spec);
#endif
}
