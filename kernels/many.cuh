// Many tensors in one launch: a table says where they are, and blocks take chunks of them.
//
// A row of the table is POINTERS addresses, the number of elements, and the number of chunks of all tensors before it;
// tensors of no elements are left out. A launch has one block for each chunk.

constexpr i64 CHUNK = 4096;

// The part of a tensor that a block takes.
struct Chunk {
    const u64* row;
    i64 begin, end;

    template <typename E> __device__ __forceinline__ E* at(int pointer) const {
        return reinterpret_cast<E*>(row[pointer]);
    }
};

template <int POINTERS> __device__ __forceinline__ Chunk chunk_of_block(const u64* table, u32 tensors) {
    constexpr int FIELDS = POINTERS + 2;
    // The last tensor that begins at or before this block's chunk.
    u32 low = 0, high = tensors;
    while (high - low > 1) {
        const u32 middle = (low + high) / 2;
        if (table[middle * FIELDS + POINTERS + 1] <= blockIdx.x) {
            low = middle;
        } else {
            high = middle;
        }
    }
    const u64* row = table + low * FIELDS;
    const i64 begin = (i64)(blockIdx.x - row[POINTERS + 1]) * CHUNK, elements = row[POINTERS];
    return {row, begin, begin + CHUNK < elements ? begin + CHUNK : elements};
}

// N elements of any type, read and written 128 bits at a time if they fill whole packets.
template <typename E, int N> struct alignas(N * sizeof(E) % 16 == 0 ? 16 : alignof(E)) Lane {
    E lane[N];

    static constexpr int PACKETS = N * sizeof(E) / 16;

    __device__ __forceinline__ explicit Lane(const E* from) {
        if constexpr (N == 1) {
            lane[0] = from[0];
        } else {
            uint4 raw[PACKETS];
#pragma unroll
            for (int i = 0; i < PACKETS; ++i) raw[i] = reinterpret_cast<const uint4*>(from)[i];
            memcpy(lane, raw, sizeof(lane));
        }
    }

    __device__ __forceinline__ void store(E* to) const {
        if constexpr (N == 1) {
            to[0] = lane[0];
        } else {
            uint4 raw[PACKETS];
            memcpy(raw, lane, sizeof(lane));
#pragma unroll
            for (int i = 0; i < PACKETS; ++i) ptx_store_128(reinterpret_cast<uint4*>(to) + i, raw[i]);
        }
    }
};

// Calls body(i, Lanes<N>()) for the elements of a chunk: in groups of N if `packed`, then what is left one by one.
template <int N, typename Body> __device__ __forceinline__ void for_chunk(const Chunk& chunk, bool packed, Body body) {
    const i64 in_groups = packed ? chunk.begin + (chunk.end - chunk.begin) / N * N : chunk.begin;
    for (i64 i = chunk.begin + threadIdx.x * N; i < in_groups; i += blockDim.x * N) body(i, Lanes<N>());
    for (i64 i = in_groups + threadIdx.x; i < chunk.end; i += blockDim.x) body(i, Lanes<1>());
}
