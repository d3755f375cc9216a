// Tile sizes of attention_wgmma_fwd.cu, for benches/ladder.rs: o_i = sum_j softmax_j(scale q_i · k_j) v_j, causal or
// not, from the source of the shipped kernel.
//
// Shapes: q, k, v, o [heads, length, HEAD], packed. Blocks of 64 TILE_WARPGROUPS queries, tiles of TILE_KEYS keys,
// TILE_BLOCKS of them on a multiprocessor; TILE_OVERLAP=1: products with values run beside the exponentials of the
// next tile.
//
// Variants: DTYPE=bf16 HEAD=64,128 TILE_WARPGROUPS=2 TILE_KEYS=64,128 TILE_BLOCKS=1 TILE_OVERLAP=1
// Variants: DTYPE=bf16 HEAD=64 TILE_WARPGROUPS=3 TILE_KEYS=64 TILE_BLOCKS=1 TILE_OVERLAP=1
// Variants: DTYPE=bf16 HEAD=64 TILE_WARPGROUPS=2 TILE_KEYS=64 TILE_BLOCKS=2 TILE_OVERLAP=0,1
// Variants: DTYPE=bf16 HEAD=64 TILE_WARPGROUPS=4 TILE_KEYS=64 TILE_BLOCKS=1 TILE_OVERLAP=0,1

#include "attention_wgmma_fwd.cuh"

extern "C" __global__ void __launch_bounds__(128 * TILE_WARPGROUPS, TILE_BLOCKS)
attention_wgmma_rungs_tiles(T* o, const T* q, const T* k, const T* v, u32 heads, u32 length, u32 causal, f64 scale) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    Layout at = {};
    at.rank = 4;
    at.dims[0] = 1, at.dims[1] = heads, at.dims[2] = length, at.dims[3] = HEAD;
    at.strides[1] = (i64)length * HEAD, at.strides[0] = heads * at.strides[1], at.strides[2] = HEAD, at.strides[3] = 1;
    Spec spec = {};
    spec.window.past = 2 * length, spec.causal = causal, spec.scale = scale, spec.factor = 1;
    // Always 0, which the compiler cannot know: the shipped kernel tests it at each tile too.
    spec.threshold = length >> 31;
    WgmmaForward<TILE_WARPGROUPS, TILE_KEYS, TILE_OVERLAP> forward;
    forward.run(o, nullptr, nullptr, q, k, v, at, at, at, at, spec);
#endif
}
