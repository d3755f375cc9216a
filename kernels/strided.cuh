// Elementwise loops over tensors of any strides: groups of LANES neighbours in row-major order are read and written as
// packets where, in each of the tensors, they are aligned neighbours or one repeated element.

// The step between neighbours of the last dimension: 1 packed, 0 repeated.
__device__ __forceinline__ i64 last_step(const Layout& layout) {
    i64 step = 0;
#pragma unroll
    for (int dim = 0; dim < MAX_RANK; ++dim) {
        if (dim + 1 == layout.rank) step = layout.strides[dim];
    }
    return step;
}

// True if packets never cross a row, and each is aligned or one element. `E` is at most as large as T.
template <typename E> __device__ __forceinline__ bool in_packets(const E* x, const Layout& layout) {
    const i64 step = last_step(layout);
    bool whole = true, neighbours = step == 1 && aligned(x) && layout.offset % LANES == 0;
#pragma unroll
    for (int dim = 0; dim < MAX_RANK; ++dim) {
        // A single row may end with a part of a packet.
        if (dim > 0 && dim + 1 == layout.rank) whole = layout.dims[dim] % LANES == 0;
        if (dim + 1 < layout.rank) neighbours &= layout.strides[dim] % LANES == 0;
    }
    return whole && (step == 0 || neighbours);
}

// N neighbours of an input from position `at`. A packet has step 0 or 1.
template <int N, typename E> __device__ __forceinline__ Packet<N, E> gather(const E* x, i64 at, i64 step) {
    if (N == 1 || step == 1) return load<N>(x + at);
    Packet<N, E> packet;
    const E repeated = x[at];
#pragma unroll
    for (E& value : packet.lane) value = repeated;
    return packet;
}
