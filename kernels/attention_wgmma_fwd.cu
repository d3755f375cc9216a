// Attention, forward, on the tensor cores of sm_90a; shapes and results as in attention_fwd.cu, for rows of up to HEAD
// features. The algorithm is that of attention_mma_fwd.cu, with warpgroup products: 64 queries each, operands in
// swizzled shared memory, weights from registers. The tensor cores work while the warps compute exponentials
// (FlashAttention-3, Shah et al., 2024).
//
// Variants: DTYPE=HALVES HEAD=64,128

#include "attention_wgmma_fwd.cuh"

constexpr i32 FORWARD_WARPGROUPS = 2, FORWARD_BLOCKS = 1;

extern "C" __global__ void __launch_bounds__(128 * FORWARD_WARPGROUPS, FORWARD_BLOCKS) attention_wgmma_fwd(
    T* out, Statistics* statistics, T* residual, const T* q, const T* k, const T* v, SPEC_INPUTS, Layout out_at,
    Layout q_at, Layout k_at, Layout v_at, SPEC_VALUES) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    const Spec spec = SPEC;
    WgmmaForward<FORWARD_WARPGROUPS, 128, true> forward;
    forward.run(out, statistics, residual, q, k, v, out_at, q_at, k_at, v_at, spec);
#endif
}
