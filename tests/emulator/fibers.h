// The threads of a block, as fibers of one OS thread.

#pragma once

#include <memory>

#include "emulator.h"

namespace xt {

struct Worker;

constexpr unsigned WARP = 32, WARPGROUP = 128, MOST_THREADS = 1024, MOST_WARPS = MOST_THREADS / WARP;

// A pending copy from global to shared memory: started and not yet waited for.
struct Copy {
    void* shared;
    const void* global;
    unsigned bytes, valid;
    unsigned group;
};

// A thread's part of a pending product of its warpgroup: started and not yet waited for.
struct PartOfProduct {
    float* d;
    unsigned n;
    const unsigned* a;
    uint64_t a_at, b_at;
    bool add, bf16;
    unsigned group;
    // Registers of `a` at the start of the product, the time of its start, and that of the last barrier before it.
    unsigned copy[4];
    uint32_t started, barrier;
};

// Lies at the start of the fiber's stack.
struct Thread : XtThread {
    Worker* worker;
    void* stack_pointer;
    unsigned number;
    // Closed groups of copies.
    unsigned groups;
    std::vector<Copy>* copies;
    // Closed groups of products; true if a fence followed the last wait; pending products.
    unsigned product_groups, wait_for;
    bool fenced_products;
    std::vector<PartOfProduct>* products;

    unsigned warp() const { return number / WARP; }
    unsigned lane() const { return number % WARP; }
};

// Returns the running fiber, found by the stack pointer.
inline Thread* self() {
    Thread* thread;
    asm volatile("movq %%rsp, %0\n\tandq %1, %0" : "=r"(thread) : "i"(-long(XT_STACK)));
    return thread;
}

enum class Stage : uint8_t { NEW, READY, AT_BARRIER, IN_WARP, IN_WARPGROUP, DONE };

// A collective operation of a warp, for which some threads may still be missing.
struct Gathering {
    const XtPlace* place;
    unsigned mask, arrived;
    void* arguments[WARP];
};

// Called once all threads of `gathering.mask` have arrived.
typedef void (*Together)(Worker& worker, unsigned warp, Gathering& gathering);

// Waits for the threads of `mask`; one of them then calls `together` with the arguments of all.
void gather(const XtPlace* place, unsigned mask, void* arguments, Together together);

// Waits for the threads of the warpgroup; one of them then calls `together` with the first thread.
void gather_warpgroup(const XtPlace* place, void (*together)(Worker& worker, unsigned first));

// History of a byte of shared memory: its last writer, the readers since then, and their times. Time advances at
// barriers of the block and of its warps.
struct Cell {
    uint32_t write, read;
};

constexpr size_t DYNAMIC_SHARED = 256 << 10;

struct Worker {
    const Launch* launch;
    XtBlock block;
    unsigned threads, warps;

    // Indexed by thread number.
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

    // Static and dynamic shared memory, with consecutive cells.
    char *static_shared, *dynamic_shared;
    size_t static_bytes, dynamic_bytes;
    std::vector<Cell> cells;
    uint32_t now, block_start, last_barrier, last_warp_barrier[MOST_WARPS];
    // Time at which each thread last made its writes visible to products.
    uint32_t fenced[MOST_THREADS];

    Worker();
    ~Worker();
    // Returns the worker of this OS thread, prepared for a launch.
    static Worker& prepared(const Launch& launch);
    // Returns true if the block ran to its end.
    bool run_block(uint64_t number);
    void schedule();
    void run_warp(unsigned warp);
    void resume(unsigned number);
    void release_barrier();
    void complain();
    Thread* new_stack();
    // Records that a barrier of the block, or of a warp, has been passed.
    void tick();
    void begin_shared();
};

// Reports an error of the running thread and ends its launch.
[[noreturn]] void fail(const std::string& what);
// Yields to the scheduler.
void yield();

std::string name_of(const Worker& worker, unsigned thread);

// checker.cpp: checks an access to shared memory by a thread, which need not be the running one.
enum Access { READ, WRITE, ATOMIC, COPY_START, COPY_END };
// Returns true for an address in shared memory.
bool check_shared(const Thread& thread, const void* address, size_t bytes, Access access);
void check(const Thread& thread, const void* address, size_t bytes, Access access);
// Returns the 16 bytes at an address in shared memory that a product reads; null, after a report, if they are invalid.
const char* read_by_product(const Thread& thread, const PartOfProduct& part, uint32_t address);

}  // namespace xt
