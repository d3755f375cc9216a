// Loops down the columns of packed rows: a block has WIDTH threads, each for a packet of columns, and takes HEIGHT rows
// at once.

constexpr u32 WIDTH = 32, HEIGHT = 8;

// Calls body(column, Lanes<N>()) for the first column of this thread: packets if `packed`, which requires 128-bit
// aligned rows, otherwise single columns.
template <typename Body> __device__ __forceinline__ void for_columns(u32 columns, bool packed, Body body) {
    if (packed && columns % LANES == 0) {
        const u32 step = gridDim.x * WIDTH * LANES;
        for (u32 tile = blockIdx.x * WIDTH * LANES; tile < columns; tile += step) {
            body(tile + threadIdx.x * LANES, Lanes<LANES>());
        }
    } else {
        const u32 step = gridDim.x * WIDTH;
        for (u32 tile = blockIdx.x * WIDTH; tile < columns; tile += step) body(tile + threadIdx.x, Lanes<1>());
    }
}

// Calls use(row, fetch(row, true)) for every HEIGHTth row of a chunk, beginning with that of this thread; AT_ONCE of
// them are read before the first is used. fetch(row, false) reads nothing.
template <int AT_ONCE, typename Fetch, typename Use>
__device__ __forceinline__ void for_rows(i64 first, i64 last, Fetch fetch, Use use) {
    for (i64 top = first + threadIdx.y; top < last; top += AT_ONCE * HEIGHT) {
        decltype(fetch(top, true)) rows[AT_ONCE];
#pragma unroll
        for (int n = 0; n < AT_ONCE; ++n) rows[n] = fetch(top + n * HEIGHT, top + n * HEIGHT < last);
#pragma unroll
        for (int n = 0; n < AT_ONCE; ++n) {
            if (top + n * HEIGHT < last) use(top + n * HEIGHT, rows[n]);
        }
    }
}

// Adds up the values of the HEIGHT threads of a column, in order: to[column], to[column + 1], … All threads of the
// block must call it.
template <int N, typename A>
__device__ __forceinline__ void store_sums(A* to, const A (&sums)[N], u32 column, u32 columns) {
    __shared__ A shared[HEIGHT][N][WIDTH];
    // Every thread has read the sums of an earlier call before they are overwritten.
    __syncthreads();
#pragma unroll
    for (int lane = 0; lane < N; ++lane) shared[threadIdx.y][lane][threadIdx.x] = sums[lane];
    __syncthreads();
    const u32 tile = column - threadIdx.x * N;
    for (u32 i = threadIdx.y * WIDTH + threadIdx.x; i < N * WIDTH; i += HEIGHT * WIDTH) {
        const u32 lane = i / WIDTH, thread = i % WIDTH, at = tile + thread * N + lane;
        A total = 0;
#pragma unroll
        for (u32 y = 0; y < HEIGHT; ++y) total += shared[y][lane][thread];
        if (at < columns) to[at] = total;
    }
}
