// Lets a host compiler build and run a kernel source: each thread of a block is a thread of the system, one block after
// the other. Slow and small; it checks what a kernel computes, not how fast or whether a card would accept it.
//
// Half types: bf16 by the path for cards without the instruction; f16 conversions are PTX only and cannot run here.

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <barrier>
#include <memory>
#include <thread>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __shared__ static

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

struct Dim3 {
    unsigned x, y;
};

static Dim3 gridDim, blockDim;
static thread_local Dim3 blockIdx, threadIdx;

typedef std::barrier<> Barrier;
static std::unique_ptr<Barrier> block_barrier;
static std::vector<std::unique_ptr<Barrier>> warp_barriers;
static unsigned char exchanged[1024][8];

inline void __syncthreads() { block_barrier->arrive_and_wait(); }

template <typename A> A __shfl_xor_sync(unsigned, A value, int mask) {
    const unsigned thread = threadIdx.y * blockDim.x + threadIdx.x;
    Barrier& barrier = *warp_barriers[thread / 32];
    memcpy(exchanged[thread], &value, sizeof(A));
    barrier.arrive_and_wait();
    memcpy(&value, exchanged[thread ^ mask], sizeof(A));
    barrier.arrive_and_wait();
    return value;
}

inline unsigned __float_as_uint(float x) {
    unsigned bits;
    memcpy(&bits, &x, 4);
    return bits;
}

inline float __uint_as_float(unsigned bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

inline float ptx_f16_to_f32(unsigned short) { abort(); }
inline unsigned short ptx_f32_to_f16(float) { abort(); }
inline void ptx_store_128(void* to, uint4 raw) { *static_cast<uint4*>(to) = raw; }

// Runs a kernel; the number of threads of a block is a multiple of 32, at most 1024.
template <typename Kernel> void launch(unsigned grid, Dim3 block, Kernel kernel) {
    gridDim = {grid, 1};
    blockDim = block;
    const unsigned threads = block.x * block.y;
    for (unsigned index = 0; index < grid; ++index) {
        block_barrier = std::make_unique<Barrier>(threads);
        warp_barriers.clear();
        for (unsigned warp = 0; warp < threads / 32; ++warp) warp_barriers.push_back(std::make_unique<Barrier>(32));
        std::vector<std::thread> running;
        for (unsigned thread = 0; thread < threads; ++thread) {
            running.emplace_back([=] {
                blockIdx = {index, 0};
                threadIdx = {thread % block.x, thread / block.x};
                kernel();
            });
        }
        for (std::thread& thread : running) thread.join();
    }
}

// Room for values, never given back: the program is short.
template <typename E> E* room(size_t count) { return static_cast<E*>(aligned_alloc(16, (count * sizeof(E) + 15) & ~15)); }

// The next `count` values of standard input.
template <typename E> E* input(size_t count) {
    E* values = room<E>(count);
    if (fread(values, sizeof(E), count, stdin) != count) exit(2);
    return values;
}

template <typename E> void output(const E* values, size_t count) { fwrite(values, sizeof(E), count, stdout); }
