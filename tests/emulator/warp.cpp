// Collective operations of a warp, atomics, and asynchronous copies.

#include <bit>
#include <cstring>
#include <mutex>

#include "fibers.h"

namespace xt {
namespace {

struct Shuffle {
    XtShuffle kind;
    uint64_t value;
    unsigned operand, width;
    uint64_t result;
};

// Follows the definition of `shfl` in the PTX ISA.
void shuffle(Worker& worker, unsigned warp, Gathering& gathering) {
    for (unsigned lane = 0; lane < WARP; ++lane) {
        if (!(gathering.arrived >> lane & 1)) continue;
        Shuffle& mine = *static_cast<Shuffle*>(gathering.arguments[lane]);
        const unsigned first = lane & ~(mine.width - 1), last = first + mine.width - 1;
        int from = 0;
        switch (mine.kind) {
            case XT_SHUFFLE_INDEX: from = first + (mine.operand & (mine.width - 1)); break;
            case XT_SHUFFLE_UP: from = int(lane) - int(mine.operand); break;
            case XT_SHUFFLE_DOWN: from = lane + mine.operand; break;
            case XT_SHUFFLE_XOR: from = lane ^ mine.operand; break;
        }
        const bool below = from < int(first), above = from > int(last);
        if (mine.kind == XT_SHUFFLE_UP ? below : above) from = lane;
        if (!(gathering.arrived >> from & 1)) {
            const unsigned thread = warp * WARP + lane;
            report(name_of(worker, thread) + ": " + gathering.place->what + " reads from lane " +
                   std::to_string(from) + ", which takes no part");
            worker.failed = true;
            yield();
        }
        mine.result = static_cast<Shuffle*>(gathering.arguments[from])->value;
    }
}

struct Vote {
    XtVote kind;
    bool value;
    unsigned result;
};

void vote(Worker&, unsigned, Gathering& gathering) {
    unsigned ballot = 0;
    for (unsigned lane = 0; lane < WARP; ++lane) {
        if (!(gathering.arrived >> lane & 1)) continue;
        ballot |= unsigned(static_cast<Vote*>(gathering.arguments[lane])->value) << lane;
    }
    for (unsigned lane = 0; lane < WARP; ++lane) {
        if (!(gathering.arrived >> lane & 1)) continue;
        Vote& mine = *static_cast<Vote*>(gathering.arguments[lane]);
        mine.result = mine.kind == XT_BALLOT ? ballot : mine.kind == XT_ANY ? ballot != 0 : ballot == gathering.arrived;
    }
}

struct Match {
    uint64_t value;
    unsigned result;
};

void match(Worker&, unsigned, Gathering& gathering) {
    for (unsigned lane = 0; lane < WARP; ++lane) {
        if (!(gathering.arrived >> lane & 1)) continue;
        Match& mine = *static_cast<Match*>(gathering.arguments[lane]);
        mine.result = 0;
        for (unsigned other = 0; other < WARP; ++other) {
            if (!(gathering.arrived >> other & 1)) continue;
            if (static_cast<Match*>(gathering.arguments[other])->value == mine.value) mine.result |= 1u << other;
        }
    }
}

struct Reduce {
    XtReduce kind;
    unsigned value, result;
};

unsigned combine(XtReduce kind, unsigned a, unsigned b) {
    switch (kind) {
        case XT_REDUCE_ADD: return a + b;
        case XT_REDUCE_MIN: return a < b ? a : b;
        case XT_REDUCE_MAX: return a < b ? b : a;
        case XT_REDUCE_MIN_SIGNED: return int(a) < int(b) ? a : b;
        case XT_REDUCE_MAX_SIGNED: return int(a) < int(b) ? b : a;
        case XT_REDUCE_AND: return a & b;
        case XT_REDUCE_OR: return a | b;
        case XT_REDUCE_XOR: return a ^ b;
    }
    return a;
}

void reduce(Worker&, unsigned, Gathering& gathering) {
    bool started = false;
    unsigned result = 0;
    for (unsigned lane = 0; lane < WARP; ++lane) {
        if (!(gathering.arrived >> lane & 1)) continue;
        const Reduce& each = *static_cast<Reduce*>(gathering.arguments[lane]);
        result = started ? combine(each.kind, result, each.value) : each.value;
        started = true;
    }
    for (unsigned lane = 0; lane < WARP; ++lane) {
        if (gathering.arrived >> lane & 1) static_cast<Reduce*>(gathering.arguments[lane])->result = result;
    }
}

void warp_barrier(Worker& worker, unsigned warp, Gathering&) {
    worker.tick();
    worker.last_warp_barrier[warp] = worker.now;
}

struct Matrices {
    unsigned* r;
    unsigned count;
    bool transposed;
    const char* row;
};

void whole_warp(const XtPlace* place, void* arguments, Together together) {
    const Thread* const thread = self();
    if (thread->worker->threads - thread->warp() * WARP < WARP) {
        fail(std::string(place->what) + " in a warp that has not all of its 32 threads");
    }
    gather(place, 0xFFFFFFFF, arguments, together);
}

// PTX ISA, "Warp-level matrix load instruction: ldmatrix": threads 8 m … 8 m + 7 supply the rows of matrix m; a thread
// receives, of each matrix, the elements of row lane / 4 and columns 2 (lane % 4), 2 (lane % 4) + 1.
void ldmatrix(Worker& worker, unsigned warp, Gathering& gathering) {
    uint16_t rows[WARP][8];
    for (unsigned lane = 0; lane < WARP; ++lane) {
        const Matrices& given = *static_cast<Matrices*>(gathering.arguments[lane]);
        if (lane >= 8 * given.count) continue;
        const Thread& thread = *worker.running[warp * WARP + lane];
        if (uintptr_t(given.row) % 16 != 0 || !check_shared(thread, given.row, 16, READ)) {
            report(name_of(worker, thread.number) + ": ldmatrix reads a row at " +
                   std::to_string(uintptr_t(given.row)) + ", which is not 16 aligned bytes of shared memory");
            worker.failed = true;
        }
        if (worker.failed) yield();
        memcpy(rows[lane], given.row, 16);
    }
    for (unsigned lane = 0; lane < WARP; ++lane) {
        const Matrices& given = *static_cast<Matrices*>(gathering.arguments[lane]);
        for (unsigned matrix = 0; matrix < given.count; ++matrix) {
            const uint16_t(*const m)[8] = rows + 8 * matrix;
            const unsigned a = lane / 4, b = lane % 4 * 2;
            const uint16_t low = given.transposed ? m[b][a] : m[a][b];
            const uint16_t high = given.transposed ? m[b + 1][a] : m[a][b + 1];
            given.r[matrix] = low | unsigned(high) << 16;
        }
    }
}

struct Product {
    float* d;
    const unsigned *a, *b;
    bool bf16;
};

float half_of(unsigned pair, unsigned index, bool bf16) {
    const uint16_t bits = pair >> 16 * index;
    return bf16 ? std::bit_cast<float>(unsigned(bits) << 16) : xt_f16_to_f32(bits);
}

// PTX ISA, "Matrix fragments for mma.m16n8k16 with floating point type", with groupID = lane / 4 and
// threadID_in_group = lane % 4:
//   a_i, i = 0 … 7: row groupID, + 8 unless i < 2 or 4 <= i < 6; column 2 threadID_in_group + i % 2, + 8 if i >= 4
//   b_i, i = 0 … 3: row 2 threadID_in_group + i % 2, + 8 if i >= 2; column groupID
//   c_i, i = 0 … 3: row groupID, + 8 if i >= 2; column 2 threadID_in_group + i % 2
void mma(Worker&, unsigned, Gathering& gathering) {
    float a[16][16], b[16][8];
    for (unsigned lane = 0; lane < WARP; ++lane) {
        const Product& given = *static_cast<Product*>(gathering.arguments[lane]);
        const unsigned group = lane / 4, in_group = lane % 4;
        for (unsigned i = 0; i < 8; ++i) {
            const unsigned row = i < 2 || (4 <= i && i < 6) ? group : group + 8;
            a[row][2 * in_group + i % 2 + (i >= 4 ? 8 : 0)] = half_of(given.a[i / 2], i % 2, given.bf16);
        }
        for (unsigned i = 0; i < 4; ++i) {
            b[2 * in_group + i % 2 + (i >= 2 ? 8 : 0)][group] = half_of(given.b[i / 2], i % 2, given.bf16);
        }
    }
    for (unsigned lane = 0; lane < WARP; ++lane) {
        const Product& given = *static_cast<Product*>(gathering.arguments[lane]);
        for (unsigned i = 0; i < 4; ++i) {
            const unsigned row = lane / 4 + (i >= 2 ? 8 : 0), column = 2 * (lane % 4) + i % 2;
            float sum = given.d[i];
            for (unsigned k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
            given.d[i] = sum;
        }
    }
}

void finish_copies(Thread& thread, unsigned until) {
    std::vector<Copy>& copies = *thread.copies;
    size_t done = 0;
    for (; done < copies.size() && copies[done].group < until; ++done) {
        const Copy& copy = copies[done];
        check(thread, copy.shared, copy.bytes, COPY_END);
        memcpy(copy.shared, copy.global, copy.valid);
        memset(static_cast<char*>(copy.shared) + copy.valid, 0, copy.bytes - copy.valid);
    }
    copies.erase(copies.begin(), copies.begin() + done);
}

// Several host threads may run kernels at the same time.
std::mutex atomics;

uint64_t load_atomic(const void* address, unsigned bytes) {
    uint64_t value = 0;
    memcpy(&value, address, bytes);
    return value;
}

uint64_t apply(XtAtomic kind, unsigned bytes, uint64_t old, uint64_t value) {
    const auto with_sign = [bytes](uint64_t x) { return bytes == 4 ? int64_t(int32_t(x)) : int64_t(x); };
    switch (kind) {
        case XT_ATOMIC_ADD: return old + value;
        case XT_ATOMIC_EXCHANGE: return value;
        case XT_ATOMIC_MIN: return old < value ? old : value;
        case XT_ATOMIC_MAX: return old < value ? value : old;
        case XT_ATOMIC_MIN_SIGNED: return with_sign(old) < with_sign(value) ? old : value;
        case XT_ATOMIC_MAX_SIGNED: return with_sign(old) < with_sign(value) ? value : old;
        case XT_ATOMIC_AND: return old & value;
        case XT_ATOMIC_OR: return old | value;
        case XT_ATOMIC_XOR: return old ^ value;
    }
    return old;
}

void check_atomic(void* address, unsigned bytes) {
    if (uintptr_t(address) % bytes != 0) fail("an atomic operation at a misaligned address");
    check(*self(), address, bytes, ATOMIC);
}

}  // namespace
}  // namespace xt

using namespace xt;

XT_EXPORT void xt_warp_barrier(const XtPlace* place, unsigned mask) { gather(place, mask, nullptr, warp_barrier); }

XT_EXPORT unsigned long long xt_shuffle(const XtPlace* place, XtShuffle kind, unsigned mask, unsigned long long value,
                                        unsigned operand, unsigned width) {
    if (width > WARP || !std::has_single_bit(width)) fail("a shuffle whose width is no power of two up to 32");
    Shuffle arguments = {kind, value, operand, width, 0};
    gather(place, mask, &arguments, shuffle);
    return arguments.result;
}

XT_EXPORT unsigned xt_vote(const XtPlace* place, XtVote kind, unsigned mask, bool value) {
    Vote arguments = {kind, value, 0};
    gather(place, mask, &arguments, vote);
    return arguments.result;
}

XT_EXPORT unsigned xt_match(const XtPlace* place, unsigned mask, unsigned long long value) {
    Match arguments = {value, 0};
    gather(place, mask, &arguments, match);
    return arguments.result;
}

XT_EXPORT unsigned xt_reduce(const XtPlace* place, XtReduce kind, unsigned mask, unsigned value) {
    Reduce arguments = {kind, value, 0};
    gather(place, mask, &arguments, reduce);
    return arguments.result;
}

XT_EXPORT unsigned xt_active(void) {
    const Thread& thread = *self();
    const unsigned first = thread.warp() * WARP;
    unsigned mask = 0;
    for (unsigned lane = 0; lane < WARP && first + lane < thread.worker->threads; ++lane) {
        if (thread.worker->states[first + lane] != Stage::DONE) mask |= 1u << lane;
    }
    return mask;
}

XT_EXPORT void xt_ldmatrix(const XtPlace* place, unsigned* r, unsigned matrices, bool transposed, const void* shared) {
    Matrices arguments = {r, matrices, transposed, static_cast<const char*>(shared)};
    whole_warp(place, &arguments, ldmatrix);
}

XT_EXPORT void xt_mma_m16n8k16(const XtPlace* place, float* d, const unsigned* a, const unsigned* b, bool bf16) {
    Product arguments = {d, a, b, bf16};
    whole_warp(place, &arguments, mma);
}

// The bytes are copied when the thread waits for them, so that no thread can read them earlier.
XT_EXPORT void xt_copy_start(void* shared, const void* global, unsigned bytes, unsigned valid) {
    Thread& thread = *self();
    if (uintptr_t(shared) % bytes != 0) fail("cp.async to a misaligned address of shared memory");
    if (!check_shared(thread, shared, bytes, COPY_START)) fail("cp.async to an address that is not in shared memory");
    if (valid > 0) {
        if (uintptr_t(global) % bytes != 0) fail("cp.async from a misaligned address");
        std::string why;
        if (!may_read(uintptr_t(global), valid, why)) fail("cp.async " + why);
    }
    thread.copies->push_back({shared, global, bytes, valid, thread.groups});
}

XT_EXPORT void xt_copy_commit(void) { ++self()->groups; }

XT_EXPORT void xt_copy_wait(unsigned groups) {
    Thread& thread = *self();
    finish_copies(thread, thread.groups > groups ? thread.groups - groups : 0);
}

XT_EXPORT unsigned long long xt_atomic(XtAtomic kind, void* address, unsigned bytes, unsigned long long value) {
    check_atomic(address, bytes);
    std::lock_guard guard(atomics);
    const uint64_t old = load_atomic(address, bytes);
    const uint64_t changed = apply(kind, bytes, old, value);
    memcpy(address, &changed, bytes);
    return old;
}

XT_EXPORT unsigned long long xt_compare_and_swap(void* address, unsigned bytes, unsigned long long expected,
                                                 unsigned long long value) {
    check_atomic(address, bytes);
    std::lock_guard guard(atomics);
    const uint64_t old = load_atomic(address, bytes);
    uint64_t wanted = 0;
    memcpy(&wanted, &expected, bytes);
    if (old == wanted) memcpy(address, &value, bytes);
    return old;
}

XT_EXPORT float xt_f16_to_f32(unsigned short bits) { return float(std::bit_cast<_Float16>(bits)); }

// NaN becomes the canonical NaN of the PTX instructions.
XT_EXPORT unsigned short xt_f32_to_f16(float x) { return x != x ? 0x7FFF : std::bit_cast<unsigned short>(_Float16(x)); }

XT_EXPORT unsigned short xt_f32_to_bf16(float x) {
    const unsigned bits = std::bit_cast<unsigned>(x), half = 0x7FFF + (bits >> 16 & 1);
    return x != x ? 0x7FFF : (bits + half) >> 16;
}
