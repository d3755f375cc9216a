// Packing of a strided tensor: y[i] = x[position of element i under the layout].
//
// Shapes: y [n] packed, x any layout of n elements (transposed, sliced, broadcast). T: every dtype.
// Each thread takes elements a grid apart, so that writes are coalesced; where the innermost dimension is packed and
// everything is aligned to 128 bits, it takes 16 bytes at a time instead of one element.
// Moves 2 sizeof(T) per element. Limited by memory bandwidth where x is packed along its last dimension; a transposed
// x is read in sectors of 32 bytes of which one element is used at a time, the rest being left to the caches.
// Variants: DTYPE=f32,f64,bf16,f16,i64,bool INDEX=u32,i64

#include "common.cuh"

// Whether groups of LANES elements that are neighbours in y are neighbours in x, both aligned.
__device__ __forceinline__ bool in_packets(const T* y, const T* x, const Layout& layout) {
    bool packed = layout.rank > 0 && aligned(y) && aligned(x) && layout.offset % LANES == 0;
#pragma unroll
    for (int dim = 0; dim < MAX_RANK; ++dim) {
        if (dim + 1 == layout.rank) packed &= layout.strides[dim] == 1 && layout.dims[dim] % LANES == 0;
        if (dim + 1 < layout.rank) packed &= layout.strides[dim] % LANES == 0;
    }
    return packed;
}

template <int N> __device__ __forceinline__ void copy(T* y, const T* x, const Layout& layout, Index n) {
    const Index step = (Index)gridDim.x * blockDim.x * N;
    for (Index i = ((Index)blockIdx.x * blockDim.x + threadIdx.x) * N; i < n; i += step) {
        store<N>(y + i, load<N>(x + layout.position(i)));
    }
}

extern "C" __global__ void copy_strided(T* y, const T* x, Layout layout, i64 n) {
    if (in_packets(y, x, layout)) {
        copy<LANES>(y, x, layout, (Index)n);
    } else {
        copy<1>(y, x, layout, (Index)n);
    }
}
