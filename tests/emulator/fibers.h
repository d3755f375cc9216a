// The threads of a block as fibers of one thread of the system.

#pragma once

#include <memory>

#include "emulator.h"

namespace xt {

struct Worker;

constexpr unsigned WARP = 32, WARPGROUP = 128, MOST_THREADS = 1024, MOST_WARPS = MOST_THREADS / WARP;

// A copy from global to shared memory that was started and not waited for.
struct Copy {
    void* shared;
    const void* global;
    unsigned bytes, valid;
    unsigned group;
};

// A thread's part of a product of its warpgroup that was started and not waited for.
struct PartOfProduct {
    float* d;
    unsigned n;
    const unsigned* a;
    uint64_t a_at, b_at;
    bool add, bf16;
    unsigned group;
    // What `a` points to, when it was started, and when that was; the last barrier before.
    unsigned copy[4];
    uint32_t started, barrier;
};

// Lies at the start of the fiber's stack.
struct Thread : XtThread {
    Worker* worker;
    void* stack_pointer;
    unsigned number;
    // Groups of copies: those that were closed.
    unsigned groups;
    std::vector<Copy>* copies;
    // Groups of products that were closed, whether a fence is after all that was waited for, and products under way.
    unsigned product_groups, wait_for;
    bool fenced_products;
    std::vector<PartOfProduct>* products;

    unsigned warp() const { return number / WARP; }
    unsigned lane() const { return number % WARP; }
};

// The fiber that runs, from its stack pointer.
inline Thread* self() {
    Thread* thread;
    asm volatile("movq %%rsp, %0\n\tandq %1, %0" : "=r"(thread) : "i"(-long(XT_STACK)));
    return thread;
}

enum class Stage : uint8_t { NEW, READY, AT_BARRIER, IN_WARP, IN_WARPGROUP, DONE };

// What the threads of a warp have come together for; some may still be missing.
struct Gathering {
    const XtPlace* place;
    unsigned mask, arrived;
    void* arguments[WARP];
};

// Called once all of `gathering.mask` are there.
typedef void (*Together)(Worker& worker, unsigned warp, Gathering& gathering);

// Waits for the threads of `mask` and has one of them call `together`, which finds what each of them brought.
void gather(const XtPlace* place, unsigned mask, void* arguments, Together together);

// Waits for the threads of the warpgroup and has one of them call `together` with its first thread.
void gather_warpgroup(const XtPlace* place, void (*together)(Worker& worker, unsigned first));

// What is known of a byte of shared memory: who wrote it last and who has read it since, and when. Time passes at
// barriers of the block and of its warps.
struct Cell {
    uint32_t write, read;
};

constexpr size_t DYNAMIC_SHARED = 256 << 10;

struct Worker {
    const Launch* launch;
    XtBlock block;
    unsigned threads, warps;

    // By number of the thread.
    Stage states[MOST_THREADS];
    Thread* running[MOST_THREADS];
    const XtPlace* places[MOST_THREADS];
    unsigned values[MOST_THREADS];
    unsigned at_barrier, done, barrier_result;
    std::vector<Gathering> gatherings[MOST_WARPS];
    unsigned ready_in_warp[MOST_WARPS];
    unsigned in_warpgroup[MOST_THREADS / WARPGROUP];

    std::vector<Thread*> stacks, free_stacks;
    void* scheduler;
    bool failed;

    // Shared memory: static and dynamic, whose cells follow each other.
    char *static_shared, *dynamic_shared;
    size_t static_bytes, dynamic_bytes;
    std::vector<Cell> cells;
    uint32_t now, block_start, last_barrier, last_warp_barrier[MOST_WARPS];
    // When each thread last made what it had written visible to products.
    uint32_t fenced[MOST_THREADS];

    Worker();
    ~Worker();
    // That of this thread of the system, for a launch.
    static Worker& prepared(const Launch& launch);
    // Whether the block ran to its end.
    bool run_block(uint64_t number);
    void schedule();
    void run_warp(unsigned warp);
    void resume(unsigned number);
    void release_barrier();
    void complain();
    Thread* new_stack();
    // A barrier of the block, or of a warp, has been passed.
    void tick();
    void begin_shared();
};

// Reports what the thread that runs did, and ends its launch.
[[noreturn]] void fail(const std::string& what);
// Gives control to the scheduler.
void yield();

std::string name_of(const Worker& worker, unsigned thread);

// checker.cpp: an access to shared memory by a thread, which may be another than the running one.
enum Access { READ, WRITE, ATOMIC, COPY_START, COPY_END };
// Whether it is shared memory at all.
bool check_shared(const Thread& thread, const void* address, size_t bytes, Access access);
void check(const Thread& thread, const void* address, size_t bytes, Access access);
// 16 bytes of shared memory that a product reads, by their address there; null, after a report, if it must not.
const char* read_by_product(const Thread& thread, const PartOfProduct& part, uint32_t address);

}  // namespace xt
