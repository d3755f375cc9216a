// Interface between kernels compiled by g++ and the emulator that runs them, included by both sides. Kernels see
// nothing else of the emulator.

#pragma once

struct XtDim {
    unsigned x, y, z;
};

// Call site in a kernel, for reports and to distinguish barriers.
struct XtPlace {
    const char* file;
    int line;
    const char* what;
};

// Values that every thread of a block reads.
struct XtBlock {
    XtDim index, dim, grid;
    char* dynamic_shared;
};

// At the start of the thread's stack, which is aligned to its size, so that the stack pointer locates it.
struct XtThread {
    XtDim index;
    XtBlock* block;
};

constexpr unsigned long XT_STACK = 1 << 16;

// Description of a kernel in a module.
struct XtKernel {
    const char* name;
    void (*invoke)(void** arguments);
    unsigned arguments;
    const unsigned* sizes;
    const bool* pointers;
    // First argument of __launch_bounds__, or 0.
    unsigned most_threads;
};

enum XtShuffle { XT_SHUFFLE_INDEX, XT_SHUFFLE_UP, XT_SHUFFLE_DOWN, XT_SHUFFLE_XOR };
enum XtVote { XT_BALLOT, XT_ALL, XT_ANY };
enum XtReduce { XT_REDUCE_ADD, XT_REDUCE_MIN, XT_REDUCE_MAX, XT_REDUCE_MIN_SIGNED, XT_REDUCE_MAX_SIGNED, XT_REDUCE_AND,
                XT_REDUCE_OR, XT_REDUCE_XOR };
enum XtAtomic { XT_ATOMIC_ADD, XT_ATOMIC_EXCHANGE, XT_ATOMIC_MIN, XT_ATOMIC_MAX, XT_ATOMIC_MIN_SIGNED,
                XT_ATOMIC_MAX_SIGNED, XT_ATOMIC_AND, XT_ATOMIC_OR, XT_ATOMIC_XOR };

extern "C" {
// Barrier of the block; returns the number of its threads with a non-zero `value`.
unsigned xt_barrier(const XtPlace*, unsigned value);

// Collective operations of a warp: each thread waits for all of `mask`.
void xt_warp_barrier(const XtPlace*, unsigned mask);
unsigned long long xt_shuffle(const XtPlace*, XtShuffle, unsigned mask, unsigned long long value, unsigned operand,
                              unsigned width);
unsigned xt_vote(const XtPlace*, XtVote, unsigned mask, bool value);
unsigned xt_match(const XtPlace*, unsigned mask, unsigned long long value);
unsigned xt_reduce(const XtPlace*, XtReduce, unsigned mask, unsigned value);
unsigned xt_active(void);

// Loads 1, 2 or 4 `matrices` of 8x8 elements from shared memory.
void xt_ldmatrix(const XtPlace*, unsigned* r, unsigned matrices, bool transposed, const void* shared);
// d [16, 8] += a [16, 16] b [16, 8], of f16 or bf16.
void xt_mma_m16n8k16(const XtPlace*, float* d, const unsigned* a, const unsigned* b, bool bf16);

void xt_copy_start(void* shared, const void* global, unsigned bytes, unsigned valid);
void xt_copy_commit(void);
void xt_copy_wait(unsigned groups);

// Warpgroup products, sm_90a: d [64, n] += a b, or = a b unless `add`. `a` points to registers; if it is null, `a_at`
// describes the operand in shared memory, and b is transposed. They are computed when they are waited for.
unsigned xt_shared_address(const void*);
void xt_fence_async(void);
void xt_wgmma_fence(void);
void xt_wgmma(float* d, unsigned n, const unsigned* a, unsigned long long a_at, unsigned long long b_at, bool add, bool bf16);
void xt_wgmma_commit(void);
void xt_wgmma_wait(const XtPlace*, unsigned groups);

unsigned long long xt_atomic(XtAtomic, void* address, unsigned bytes, unsigned long long value);
unsigned long long xt_compare_and_swap(void* address, unsigned bytes, unsigned long long expected,
                                       unsigned long long value);

// Reports an error and ends the launch.
[[noreturn]] void xt_fail(const char* what);

// Checks an access that the compiler does not instrument.
void xt_check(const void* address, unsigned long bytes, bool write);

float xt_f16_to_f32(unsigned short bits);
unsigned short xt_f32_to_f16(float x);
unsigned short xt_f32_to_bf16(float x);
}
