// Checks every memory access of a kernel: defines the functions that g++ calls before each access (-fsanitize=thread),
// and for a misaligned pointer, an index outside of its array or a zero divisor (-fsanitize=alignment,bounds,
// integer-divide-by-zero).

#include <cstdio>
#include <cstring>
#include <mutex>

#include "fibers.h"

namespace xt {
namespace {

std::mutex report_lock;
std::string last_report;

// Cells hold a time in the upper bits and a thread in the lower ones. For readers, the thread may stand for several
// threads of one warp, or of several warps. For writers, two bits encode the kind of write.
constexpr uint32_t WHO = 12, WHO_MASK = (1 << WHO) - 1, SEVERAL = 1024, SEVERAL_WARPS = 2048;
constexpr uint32_t ATOMIC_WRITE = 1 << 10, PENDING_COPY = 2 << 10, KIND_MASK = 3 << 10;
constexpr uint32_t END_OF_TIME = 1 << (32 - WHO);

uint32_t when(uint32_t cell) { return cell >> WHO; }
uint32_t who(uint32_t cell) { return cell & WHO_MASK; }

struct Race {
    const char* what;
    uint32_t other;  // a thread, or SEVERAL…
};

// Returns true if an access to a byte is correct; describes the race otherwise. Updates the byte's state.
bool access_byte(const Worker& worker, unsigned thread, Cell& cell, Access access, Race& race) {
    const uint32_t warp = thread / WARP;
    // True if an earlier access of another thread at `time` is not ordered before the current one.
    const auto unordered = [&](uint32_t other, uint32_t time) {
        return time >= worker.last_barrier && (other / WARP != warp || time >= worker.last_warp_barrier[warp]);
    };
    const bool written = when(cell.write) >= worker.block_start;
    const uint32_t writer = cell.write & (MOST_THREADS - 1), kind = cell.write & KIND_MASK;
    if (written && kind == PENDING_COPY && !(access == COPY_END && writer == thread)) {
        race = {"touches what a cp.async that was not waited for will write, started by", writer};
        return false;
    }
    if (!written && (access == READ || access == ATOMIC)) {
        race = {"reads uninitialised shared memory", ~0u};
        return false;
    }
    const bool atomics = access == ATOMIC && kind == ATOMIC_WRITE;
    if (written && writer != thread && unordered(writer, when(cell.write)) && !atomics) {
        race = {access == READ ? "reads what is written without a barrier between by"
                               : "writes what is written without a barrier between by",
                writer};
        return false;
    }
    const uint32_t reader = who(cell.read), read_at = when(cell.read);
    const bool read = read_at >= worker.last_barrier && read_at >= worker.block_start;
    if (access == READ) {
        uint32_t now_known = thread;
        if (read && reader != thread) {
            const bool one = reader < SEVERAL, of_warp = reader < SEVERAL_WARPS;
            const uint32_t reader_warp = one ? reader / WARP : reader - SEVERAL;
            if (!of_warp || reader_warp != warp) {
                now_known = SEVERAL_WARPS;
            } else if (read_at >= worker.last_warp_barrier[warp]) {
                now_known = SEVERAL + warp;
            }
        }
        cell.read = worker.now << WHO | now_known;
        return true;
    }
    if (read && reader != thread) {
        const bool one = reader < SEVERAL, of_warp = reader < SEVERAL_WARPS;
        const uint32_t reader_warp = one ? reader / WARP : reader - SEVERAL;
        if (!of_warp || reader_warp != warp || read_at >= worker.last_warp_barrier[warp]) {
            race = {"writes what is read without a barrier between by", reader};
            return false;
        }
    }
    const uint32_t as = access == ATOMIC ? ATOMIC_WRITE : access == COPY_START ? PENDING_COPY : 0;
    cell.write = worker.now << WHO | as | thread;
    return true;
}

std::string in_words(const Worker& worker, const Race& race) {
    if (race.other == ~0u) return race.what;
    std::string text = std::string(race.what) + " ";
    if (race.other >= SEVERAL_WARPS) return text + "threads of other warps";
    if (race.other >= SEVERAL) return text + "other threads of warp " + std::to_string(race.other - SEVERAL);
    const std::string name = name_of(worker, race.other);
    return text + name.substr(name.rfind("thread"));
}

// Start of dynamic shared memory: behind the static memory of kernels and driver, and not at a multiple of 1024.
uint32_t product_base(const Worker& worker) { return (worker.static_bytes + 1024 + 15) / 16 * 16; }

// Returns the cell of an address, or null if it is not in shared memory.
Cell* find(Worker& worker, uintptr_t address, size_t bytes) {
    const size_t in_static = address - uintptr_t(worker.static_shared);
    const size_t in_dynamic = address - uintptr_t(worker.dynamic_shared);
    const auto inside = [bytes](size_t offset, size_t size) { return offset < size && bytes <= size - offset; };
    if (inside(in_static, worker.static_bytes)) return &worker.cells[in_static];
    if (inside(in_dynamic, worker.dynamic_bytes)) return &worker.cells[worker.static_bytes + in_dynamic];
    return nullptr;
}

std::string shared_place(const Worker& worker, const Cell* cell) {
    const size_t at = cell - worker.cells.data();
    const bool in_static = at < worker.static_bytes;
    return std::string(in_static ? "static" : "dynamic") + " shared memory, byte " +
           std::to_string(in_static ? at : at - worker.static_bytes);
}

// Reports an error of the given thread, which need not be the running one.
void fail_as(const Thread& thread, const std::string& what) {
    report(name_of(*thread.worker, thread.number) + ": " + what);
    thread.worker->failed = true;
    yield();
}

void wrong_address(const Thread& thread, uintptr_t address, size_t bytes, bool write) {
    const Worker& worker = *thread.worker;
    std::string text = std::string(write ? "writes " : "reads ") + std::to_string(bytes) + " bytes at ";
    const size_t in_dynamic = address - uintptr_t(worker.dynamic_shared);
    if (in_dynamic < DYNAMIC_SHARED) {
        fail_as(thread, text + "byte " + std::to_string(in_dynamic) + " of dynamic shared memory, which has " +
                            std::to_string(worker.dynamic_bytes));
    }
    std::string why;
    may_write(address, bytes, why);
    if (!write && why.starts_with("writes")) why.replace(0, 6, "reads");
    fail_as(thread, why);
}

[[gnu::noinline]] void check_bytes(const Thread& thread, Cell* cells, size_t bytes, Access access) {
    Worker& worker = *thread.worker;
    for (size_t i = 0; i < bytes; ++i) {
        Race race;
        if (access_byte(worker, thread.number, cells[i], access, race)) [[likely]] continue;
        fail_as(thread, in_words(worker, race) + "; " + std::to_string(bytes) + " bytes at " +
                            shared_place(worker, cells));
    }
}

// Checks an address outside of device memory and of the thread's stack: shared memory, or constants of the module.
[[gnu::noinline]] void check_other(uintptr_t address, size_t bytes, bool write, bool aligned) {
    const Thread& thread = *self();
    const void* const pointer = reinterpret_cast<const void*>(address);
    if (check_shared(thread, pointer, bytes, write ? WRITE : READ)) {
        if (!aligned) fail("a misaligned access of " + std::to_string(bytes) + " bytes to shared memory");
        return;
    }
    const Module& module = *thread.worker->launch->module;
    if (!write && address - module.begin < module.end - module.begin) return;
    wrong_address(thread, address, bytes, write);
}

[[gnu::noinline]] void check_global(uintptr_t address, size_t bytes, bool write, bool aligned) {
    std::string why;
    if (!aligned) {
        char text[96];
        snprintf(text, sizeof text, "%s %zu bytes at %#lx, which is not aligned to them; ", write ? "writes" : "reads",
                 bytes, address);
        fail(text + place_of(address));
    }
    if (!(write ? may_write(address, bytes, why) : may_read(address, bytes, why))) fail(why);
    if (write) mark_written(address, bytes);
}

constexpr bool ALIGNED = true, ANYWHERE = false;

template <size_t N, bool WRITES, bool ALIGN> inline void access(const void* pointer) {
    typedef std::conditional_t<N == 1, uint8_t, std::conditional_t<N == 2, uint16_t,
            std::conditional_t<N == 4, uint32_t, std::conditional_t<N == 8, uint64_t, unsigned __int128>>>> Word;
    const uintptr_t address = uintptr_t(pointer);
    const bool aligned = !ALIGN || address % N == 0;
    if (in_arena(address)) [[likely]] {
        constexpr Word ALL = Word(-1) / 0xFF * WRITTEN;
        Word states;
        memcpy(&states, state_of(address), N);
        if (states == ALL && aligned) [[likely]] return;
        return check_global(address, N, WRITES, aligned);
    }
    if ((address ^ uintptr_t(__builtin_frame_address(0))) < XT_STACK) return;
    const Thread& thread = *self();
    Cell* const cells = find(*thread.worker, address, N);
    if (cells == nullptr || !aligned) return check_other(address, N, WRITES, aligned);
    // Fast path: the bytes of a value mostly share one history, so that checking one of them suffices.
    uint64_t first, differences = 0;
    memcpy(&first, cells, sizeof first);
    for (size_t i = 1; i < N; ++i) {
        uint64_t other;
        memcpy(&other, cells + i, sizeof other);
        differences |= other ^ first;
    }
    Cell cell = cells[0];
    const Worker& worker = *thread.worker;
    if (!WRITES && differences == 0) {
        // Written before the last barrier, and since then read only by the same threads: nothing changes.
        const uint32_t written = when(cell.write), known = cell.read - (worker.now << WHO);
        const bool settled = written >= worker.block_start && written < worker.last_barrier &&
                             (cell.write & KIND_MASK) != PENDING_COPY;
        if (settled && (known == SEVERAL_WARPS || known == thread.number)) [[likely]] return;
    }
    Race race;
    if (differences != 0 || !access_byte(worker, thread.number, cell, WRITES ? WRITE : READ, race)) {
        return check_bytes(thread, cells, N, WRITES ? WRITE : READ);
    }
    uint64_t changed;
    memcpy(&changed, &cell, sizeof changed);
    if (changed == first) return;
    for (size_t i = 0; i < N; ++i) cells[i] = cell;
}

inline void range(const void* pointer, size_t bytes, bool write) {
    const uintptr_t address = uintptr_t(pointer);
    if (bytes == 0 || (address ^ uintptr_t(__builtin_frame_address(0))) < XT_STACK) return;
    if (in_arena(address)) return check_global(address, bytes, write, true);
    check_other(address, bytes, write, true);
}

}  // namespace

void report(const std::string& text) {
    std::lock_guard guard(report_lock);
    last_report = text;
    fprintf(stderr, "xt-emulator: %s\n", text.c_str());
}

bool check_shared(const Thread& thread, const void* address, size_t bytes, Access access) {
    Cell* const cells = find(*thread.worker, uintptr_t(address), bytes);
    if (cells == nullptr) return false;
    check_bytes(thread, cells, bytes, access);
    return true;
}

void check(const Thread& thread, const void* address, size_t bytes, Access access) {
    if (check_shared(thread, address, bytes, access)) return;
    const uintptr_t at = uintptr_t(address);
    std::string why;
    if (!may_write(at, bytes, why) || (access == ATOMIC && !may_read(at, bytes, why))) fail_as(thread, why);
    mark_written(at, bytes);
}

const char* read_by_product(const Thread& thread, const PartOfProduct& part, uint32_t address) {
    Worker& worker = *thread.worker;
    const size_t at = address - product_base(worker);
    const auto wrong = [&](const std::string& what) -> const char* {
        fail_as(thread, what + "; 16 bytes at dynamic shared memory, byte " + std::to_string(at));
        return nullptr;
    };
    if (at >= worker.dynamic_bytes || worker.dynamic_bytes - at < 16) return wrong("wgmma reads outside of its memory");
    Cell* const cells = &worker.cells[worker.static_bytes + at];
    for (unsigned i = 0; i < 16; ++i) {
        const Cell cell = cells[i];
        const uint32_t written = when(cell.write), writer = cell.write & (MOST_THREADS - 1);
        Race race;
        if (written >= worker.block_start && written > part.started) {
            return wrong(in_words(worker, {"wgmma reads what has been overwritten since it was started by", writer}));
        }
        if (!access_byte(worker, thread.number, cells[i], READ, race)) return wrong("wgmma " + in_words(worker, race));
        if (writer != thread.number && written >= part.barrier) {
            return wrong(in_words(worker, {"wgmma reads what is written without a barrier between by", writer}));
        }
        if (worker.fenced[writer] <= written) {
            return wrong(in_words(worker, {"wgmma reads what is written without fence.proxy.async by", writer}));
        }
        // Read by all warps of the warpgroup: a later writer needs a barrier of the block.
        cells[i].read = worker.now << WHO | SEVERAL_WARPS;
    }
    return worker.dynamic_shared + at;
}

void Worker::tick() { ++now; }

// Erases what the previous block left: all shared memory reads as NaN and counts as uninitialized.
void Worker::begin_shared() {
    memset(static_shared, 0xFF, static_bytes);
    memset(dynamic_shared, 0xFF, dynamic_bytes);
    // Restarts the clock before it overflows: half of its range is left for this block.
    if (now > END_OF_TIME / 2 || cells.size() < static_bytes + dynamic_bytes) {
        cells.assign(std::max(cells.size(), static_bytes + dynamic_bytes), Cell{0, 0});
        now = 0;
    }
    block_start = last_barrier = ++now;
    for (uint32_t& barrier : last_warp_barrier) barrier = now;
}

}  // namespace xt

// Returns the last report, or an empty string.
XT_EXPORT const char* xt_emulator_report(void) {
    static thread_local std::string text;
    std::lock_guard guard(xt::report_lock);
    return (text = xt::last_report).c_str();
}

XT_EXPORT unsigned xt_shared_address(const void* shared) {
    const xt::Worker& worker = *xt::self()->worker;
    const size_t at = uintptr_t(shared) - uintptr_t(worker.dynamic_shared);
    if (at > worker.dynamic_bytes) xt::fail("the address of what is not dynamic shared memory, for a descriptor");
    return at + xt::product_base(worker);
}

XT_EXPORT void xt_check(const void* address, unsigned long bytes, bool write) { xt::range(address, bytes, write); }

XT_EXPORT void __tsan_init(void) {}
XT_EXPORT void __tsan_read_range(void* address, unsigned long bytes) { xt::range(address, bytes, false); }
XT_EXPORT void __tsan_write_range(void* address, unsigned long bytes) { xt::range(address, bytes, true); }

#define XT_HOOKS(n)                                                                                          \
    XT_EXPORT void __tsan_read##n(void* address) { xt::access<n, false, xt::ALIGNED>(address); }             \
    XT_EXPORT void __tsan_write##n(void* address) { xt::access<n, true, xt::ALIGNED>(address); }             \
    XT_EXPORT void __tsan_unaligned_read##n(void* address) { xt::access<n, false, xt::ANYWHERE>(address); }  \
    XT_EXPORT void __tsan_unaligned_write##n(void* address) { xt::access<n, true, xt::ANYWHERE>(address); }
XT_HOOKS(1)
XT_HOOKS(2)
XT_HOOKS(4)
XT_HOOKS(8)
XT_HOOKS(16)

// Source locations and types as g++ passes them to its sanitizer runtime.
struct SourceLocation {
    const char* file;
    unsigned line, column;
};

struct TypeDescriptor {
    unsigned short kind, information;
    char name[1];
};

struct Mismatch {
    SourceLocation where;
    const TypeDescriptor* type;
    unsigned char log_alignment, kind;
};

struct Overflow {
    SourceLocation where;
    const TypeDescriptor* type;
};

struct OutOfBounds {
    SourceLocation where;
    const TypeDescriptor *array, *index;
};

static std::string in_words(const SourceLocation& where) {
    return std::string(where.file) + ":" + std::to_string(where.line);
}

XT_EXPORT void __ubsan_handle_type_mismatch_v1(const Mismatch* what, uintptr_t address) {
    char text[64];
    snprintf(text, sizeof text, " at %#lx, which is not aligned to %u; ", address, 1u << what->log_alignment);
    const std::string place = xt::in_arena(address) ? xt::place_of(address) : "shared memory";
    xt::fail(in_words(what->where) + ": an access of type " + what->type->name + text + place);
}

XT_EXPORT void __ubsan_handle_out_of_bounds(const OutOfBounds* what, uintptr_t index) {
    xt::fail(in_words(what->where) + ": index " + std::to_string(long(index)) + " is outside of " + what->array->name);
}

// A GPU continues with some number.
XT_EXPORT void __ubsan_handle_divrem_overflow(const Overflow* what, uintptr_t, uintptr_t) {
    xt::fail(in_words(what->where) + ": an integer division by zero");
}
