// Runs a block, with its threads as fibers that yield at barriers and exchanges.

#include "order.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

// Saves the callee-saved registers on this stack and restores those of the other stack.
asm(R"(
    .text
    .type xt_switch, @function
xt_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size xt_switch, . - xt_switch
)");
extern "C" void xt_switch(void** save, void* load);

namespace xt {
namespace {

constexpr size_t PAGE = 4096;

XtDim position(uint64_t number, XtDim sizes) {
    return {unsigned(number % sizes.x), unsigned(number / sizes.x % sizes.y),
            unsigned(number / sizes.x / sizes.y)};
}

std::string in_brackets(XtDim dim) {
    char text[64];
    snprintf(text, sizeof text, "(%u, %u, %u)", dim.x, dim.y, dim.z);
    return text;
}

bool same(const XtPlace* a, const XtPlace* b) {
    return a == b || (a->line == b->line && strcmp(a->what, b->what) == 0 && strcmp(a->file, b->file) == 0);
}

std::string in_words(const XtPlace* place) {
    return std::string(place->what) + " (" + place->file + ":" + std::to_string(place->line) + ")";
}

void finish() {
    Thread* const thread = self();
    Worker& worker = *thread->worker;
    if (!thread->products->empty()) fail("leaves the kernel without having waited for its wgmma");
    worker.states[thread->number] = Stage::DONE;
    ++worker.done;
    worker.free_stacks.push_back(thread);
    yield();
    __builtin_unreachable();
}

void start() {
    const Launch& launch = *self()->worker->launch;
    launch.kernel->invoke(launch.arguments);
    finish();
}

}  // namespace

void yield() {
    Thread* const thread = self();
    xt_switch(&thread->stack_pointer, thread->worker->scheduler);
}

std::string name_of(const Worker& worker, unsigned thread) {
    return std::string("kernel ") + worker.launch->kernel->name + ", block " + in_brackets(worker.block.index) +
           ", thread " + in_brackets(position(thread, worker.block.dim));
}

void fail(const std::string& what) {
    Thread* const thread = self();
    report(name_of(*thread->worker, thread->number) + ": " + what);
    thread->worker->failed = true;
    yield();
    __builtin_unreachable();
}

Worker::Worker() {
    dynamic_shared = static_cast<char*>(
        mmap(nullptr, DYNAMIC_SHARED, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    now = 1;
}

Worker::~Worker() {
    munmap(dynamic_shared, DYNAMIC_SHARED);
    for (Thread* thread : stacks) {
        delete thread->copies;
        delete thread->products;
        munmap(thread, XT_STACK);
    }
}

// Header, guard page, and the fiber's stack.
Thread* Worker::new_stack() {
    // Aligned to its size, which mmap does not guarantee.
    char* const raw = static_cast<char*>(
        mmap(nullptr, 2 * XT_STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (raw == MAP_FAILED) {
        perror("xt-emulator: no memory for the stack of a thread");
        abort();
    }
    const uintptr_t base = (uintptr_t(raw) + XT_STACK - 1) & -XT_STACK;
    if (base > uintptr_t(raw)) munmap(raw, base - uintptr_t(raw));
    munmap(reinterpret_cast<void*>(base + XT_STACK), uintptr_t(raw) + XT_STACK - base);
    mprotect(reinterpret_cast<void*>(base + PAGE), PAGE, PROT_NONE);
    Thread* const thread = new (reinterpret_cast<void*>(base)) Thread;
    thread->copies = new std::vector<Copy>;
    thread->products = new std::vector<PartOfProduct>;
    thread->worker = this;
    thread->block = &block;
    stacks.push_back(thread);
    return thread;
}

void Worker::resume(unsigned number) {
    if (states[number] == Stage::NEW) {
        Thread* thread;
        if (free_stacks.empty()) {
            thread = new_stack();
        } else {
            thread = free_stacks.back();
            free_stacks.pop_back();
        }
        thread->number = number;
        thread->index = position(number, block.dim);
        thread->groups = 0;
        thread->copies->clear();
        thread->product_groups = 0;
        thread->fenced_products = false;
        thread->products->clear();
        running[number] = thread;
        // Stacks start at different offsets, so that they do not compete for the same cache lines.
        const uintptr_t top = uintptr_t(thread) + XT_STACK - 64 - uintptr_t(thread) / XT_STACK % 16 * 192;
        void** const frame = reinterpret_cast<void**>(top) - 8;
        memset(frame, 0, 64);
        frame[6] = reinterpret_cast<void*>(start);
        thread->stack_pointer = frame;
    }
    states[number] = Stage::READY;
    xt_switch(&scheduler, running[number]->stack_pointer);
}

void Worker::run_warp(unsigned warp) {
    const unsigned first = warp * WARP, count = std::min(WARP, threads - first);
    while (ready_in_warp[warp] > 0 && !failed) {
        in_order(count, [&](unsigned lane) {
            Stage& stage = states[first + lane];
            if (stage != Stage::NEW && stage != Stage::READY) return true;
            --ready_in_warp[warp];
            resume(first + lane);
            return !failed;
        });
    }
}

void Worker::schedule() {
    while (!failed) {
        in_order(warps, [&](unsigned warp) {
            run_warp(warp);
            return !failed;
        });
        if (failed || done == threads) return;
        // A later warp may have completed its warpgroup.
        if (std::any_of(ready_in_warp, ready_in_warp + warps, [](unsigned ready) { return ready > 0; })) continue;
        const bool together = at_barrier == threads && std::all_of(places, places + threads, [&](const XtPlace* place) {
                                  return same(place, places[0]);
                              });
        if (!together) return complain();
        release_barrier();
    }
}

void Worker::release_barrier() {
    barrier_result = 0;
    for (unsigned thread = 0; thread < threads; ++thread) {
        barrier_result += values[thread];
        states[thread] = Stage::READY;
    }
    for (unsigned warp = 0; warp < warps; ++warp) ready_in_warp[warp] = std::min(WARP, threads - warp * WARP);
    at_barrier = 0;
    tick();
    last_barrier = now;
}

// Reports a deadlock: names a thread that waits, and one that it waits for.
void Worker::complain() {
    unsigned waiting = 0;
    while (states[waiting] == Stage::DONE) ++waiting;
    const bool whole_block = states[waiting] == Stage::AT_BARRIER;
    unsigned first = 0, last = threads;
    uint64_t mask = ~uint64_t(0);
    if (states[waiting] == Stage::IN_WARPGROUP) {
        first = waiting / WARPGROUP * WARPGROUP;
        last = std::min(first + WARPGROUP, threads);
    } else if (!whole_block) {
        first = waiting / WARP * WARP;
        last = std::min(first + WARP, threads);
        for (const Gathering& gathering : gatherings[waiting / WARP]) {
            if (gathering.arrived >> waiting % WARP & 1) mask = gathering.mask;
        }
    }
    for (unsigned other = first; other < last; ++other) {
        const bool asked = states[waiting] != Stage::IN_WARP || mask >> other % WARP & 1;
        const bool there = states[other] == states[waiting] && same(places[other], places[waiting]);
        if (!asked || there) continue;
        const std::string where = states[other] == Stage::DONE
                                      ? "has left the kernel"
                                      : "waits in " + in_words(places[other]);
        report(name_of(*this, waiting) + ": waits in " + in_words(places[waiting]) + ", but thread " +
               in_brackets(position(other, block.dim)) + " " + where);
        failed = true;
        return;
    }
    report(name_of(*this, waiting) + ": waits in " + in_words(places[waiting]) +
           " for threads that name other threads to wait for");
    failed = true;
}

bool Worker::run_block(uint64_t number) {
    block.index = position(number, block.grid);
    at_barrier = done = 0;
    memset(states, 0, threads * sizeof(Stage));
    memset(in_warpgroup, 0, sizeof in_warpgroup);
    memset(fenced, 0, sizeof fenced);
    for (unsigned warp = 0; warp < warps; ++warp) {
        gatherings[warp].clear();
        ready_in_warp[warp] = std::min(WARP, threads - warp * WARP);
    }
    begin_shared();
    schedule();
    return !failed;
}

void gather(const XtPlace* place, unsigned mask, void* arguments, Together together) {
    Thread* const thread = self();
    Worker& worker = *thread->worker;
    const unsigned warp = thread->warp(), lane = thread->lane(), first = warp * WARP;
    if (!(mask >> lane & 1)) fail(std::string(place->what) + " by a thread that its mask does not name");
    const unsigned count = std::min(WARP, worker.threads - first);
    const unsigned existing = count == WARP ? ~0u : (1u << count) - 1;
    std::vector<Gathering>& gatherings = worker.gatherings[warp];
    auto mine = std::find_if(gatherings.begin(), gatherings.end(), [&](const Gathering& gathering) {
        return gathering.mask == mask && same(gathering.place, place);
    });
    if (mine == gatherings.end()) {
        gatherings.push_back({place, mask, 0, {}});
        mine = gatherings.end() - 1;
    }
    mine->arrived |= 1u << lane;
    mine->arguments[lane] = arguments;
    worker.places[thread->number] = place;
    if (mine->arrived != (mask & existing)) {
        worker.states[thread->number] = Stage::IN_WARP;
        yield();
        return;
    }
    Gathering whole = *mine;
    gatherings.erase(mine);
    together(worker, warp, whole);
    for (unsigned other = 0; other < count; ++other) {
        if (other == lane || !(whole.arrived >> other & 1)) continue;
        worker.states[first + other] = Stage::READY;
        ++worker.ready_in_warp[warp];
    }
}

void gather_warpgroup(const XtPlace* place, void (*together)(Worker& worker, unsigned first)) {
    Thread* const thread = self();
    Worker& worker = *thread->worker;
    const unsigned first = thread->number / WARPGROUP * WARPGROUP;
    if (first + WARPGROUP > worker.threads) {
        fail(std::string(place->what) + " in a warpgroup that has not all of its 128 threads");
    }
    worker.places[thread->number] = place;
    worker.states[thread->number] = Stage::IN_WARPGROUP;
    if (++worker.in_warpgroup[first / WARPGROUP] < WARPGROUP) return yield();
    worker.in_warpgroup[first / WARPGROUP] = 0;
    for (unsigned other = first; other < first + WARPGROUP; ++other) {
        if (!same(worker.places[other], place)) {
            report(name_of(worker, other) + ": waits in " + in_words(worker.places[other]) + ", but thread " +
                   in_brackets(position(thread->number, worker.block.dim)) + " waits in " + in_words(place));
            worker.failed = true;
            return yield();
        }
    }
    together(worker, first);
    for (unsigned other = first; other < first + WARPGROUP; ++other) {
        worker.states[other] = Stage::READY;
        if (other != thread->number) ++worker.ready_in_warp[other / WARP];
    }
}

Worker& Worker::prepared(const Launch& launch) {
    static thread_local std::unique_ptr<Worker> kept;
    if (kept == nullptr) kept = std::make_unique<Worker>();
    Worker& worker = *kept;
    worker.launch = &launch;
    worker.block.dim = launch.block;
    worker.block.grid = launch.grid;
    worker.threads = launch.block.x * launch.block.y * launch.block.z;
    worker.warps = (worker.threads + WARP - 1) / WARP;
    worker.static_shared = static_cast<char*>(launch.module->shared_memory()) - launch.module->anchor;
    worker.static_bytes = launch.module->shared_bytes;
    worker.dynamic_bytes = launch.dynamic_shared;
    worker.block.dynamic_shared = worker.dynamic_shared;
    worker.failed = false;
    worker.free_stacks.assign(worker.stacks.rbegin(), worker.stacks.rend());
    return worker;
}

}  // namespace xt

XT_EXPORT unsigned xt_barrier(const XtPlace* place, unsigned value) {
    xt::Thread* const thread = xt::self();
    xt::Worker& worker = *thread->worker;
    worker.states[thread->number] = xt::Stage::AT_BARRIER;
    worker.places[thread->number] = place;
    worker.values[thread->number] = value;
    ++worker.at_barrier;
    xt::yield();
    return worker.barrier_result;
}

XT_EXPORT void xt_fail(const char* what) { xt::fail(what); }
