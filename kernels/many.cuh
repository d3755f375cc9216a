// Many tensors in one launch: a table locates them, and blocks take chunks of them.
//
// A row of the table has POINTERS addresses, the number of elements, and the number of chunks of all tensors before it;
// empty tensors are omitted. A launch has one block per chunk.

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

// Calls body(i, Lanes<N>()) for the elements of a chunk: packets of WIDTH if `packed`, which requires 128-bit aligned
// addresses, then the remainder one by one. A thread sees the same elements in the same order either way.
template <int WIDTH, typename Body>
__device__ __forceinline__ void for_chunk(const Chunk& chunk, bool packed, Body body) {
    for_row<WIDTH>((u32)(chunk.end - chunk.begin), packed, [&](u32 j, auto lanes) { body(chunk.begin + j, lanes); });
}
