// Device memory: allocations separated by guard pages, and the state of every byte.

#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

#include "emulator.h"

namespace xt {
namespace {

constexpr size_t PAGE = 4096;
// Maximum number of freed allocations kept for reports.
constexpr size_t REMEMBERED = 1 << 16;

struct Allocation {
    size_t bytes;
    uint64_t number;
    bool freed;
};

struct Memory {
    std::mutex lock;
    std::map<uintptr_t, Allocation> allocations;  // including freed ones
    uintptr_t next = ARENA + PAGE;
    uint64_t number = 0;
    size_t live = 0, freed = 0;
    size_t limit = size_t(4) << 30;

    Memory() {
        const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE;
        // States are placed after the memory itself.
        void* const got = mmap(reinterpret_cast<void*>(ARENA), 2 * ARENA_BYTES, PROT_READ | PROT_WRITE, flags, -1, 0);
        if (got != reinterpret_cast<void*>(ARENA)) {
            perror("xt-emulator: no address space for device memory");
            abort();
        }
        madvise(got, 2 * ARENA_BYTES, MADV_NOHUGEPAGE);
        madvise(got, 2 * ARENA_BYTES, MADV_DONTDUMP);
        if (const char* bytes = getenv("XT_EMULATOR_MEMORY")) limit = strtoull(bytes, nullptr, 10);
    }
};

Memory& memory() {
    static Memory* const memory = new Memory;
    return *memory;
}

size_t pages(size_t bytes) { return (bytes + PAGE - 1) / PAGE * PAGE; }

// Returns the index of the first byte in none of the states, or `bytes`.
template <typename Wrong> size_t first(uintptr_t address, size_t bytes, Wrong wrong) {
    const uint8_t* const states = state_of(address);
    for (size_t i = 0; i < bytes; ++i) {
        if (wrong(states[i])) return i;
    }
    return bytes;
}

// If `fresh`, uninitialized bytes are accepted.
bool may_access(uintptr_t address, size_t bytes, const char* verb, bool fresh, std::string& why) {
    if (!in_arena(address) || ARENA + ARENA_BYTES - address < bytes) {
        char text[128];
        snprintf(text, sizeof text, "%s %zu bytes at %#lx, which is %s", verb, bytes, address,
                 address < PAGE ? "a null pointer" : "no device memory");
        why = text;
        return false;
    }
    const size_t outside = first(address, bytes, [](uint8_t state) { return state == NOTHING; });
    const size_t unwritten = fresh ? bytes : first(address, bytes, [](uint8_t state) { return state != WRITTEN; });
    if (outside == bytes && unwritten == bytes) return true;
    const bool uninitialised = outside == bytes;
    char text[128];
    const char* const kind = uninitialised ? "uninitialised " : "";
    snprintf(text, sizeof text, "%s %zu %sbytes at %#lx, ", verb, bytes, kind, address);
    why = text + place_of(address + (uninitialised ? unwritten : outside));
    return false;
}

}  // namespace

uintptr_t allocate(size_t bytes) {
    Memory& self = memory();
    std::lock_guard guard(self.lock);
    if (bytes > self.limit - self.live) return 0;
    const uintptr_t address = self.next;
    if (ARENA + ARENA_BYTES - address < pages(bytes) + PAGE) return 0;
    self.next += pages(bytes) + PAGE;
    self.live += bytes;
    self.allocations[address] = {bytes, ++self.number, false};
    // This pattern is NaN in every floating-point type.
    memset(reinterpret_cast<void*>(address), 0xFF, bytes);
    memset(state_of(address), FRESH, bytes);
    return address;
}

bool release(uintptr_t address) {
    Memory& self = memory();
    std::lock_guard guard(self.lock);
    const auto found = self.allocations.find(address);
    if (found == self.allocations.end() || found->second.freed) return false;
    Allocation& allocation = found->second;
    allocation.freed = true;
    self.live -= allocation.bytes;
    // Returns the pages to the system; their states then read as zero, NOTHING.
    madvise(reinterpret_cast<void*>(address), pages(allocation.bytes), MADV_DONTNEED);
    madvise(state_of(address), pages(allocation.bytes), MADV_DONTNEED);
    if (++self.freed > REMEMBERED) {
        for (auto old = self.allocations.begin(); self.freed > REMEMBERED / 2 && old != self.allocations.end();) {
            if (old->second.freed) {
                old = self.allocations.erase(old);
                --self.freed;
            } else {
                ++old;
            }
        }
    }
    return true;
}

size_t live_bytes() {
    std::lock_guard guard(memory().lock);
    return memory().live;
}

size_t memory_limit() { return memory().limit; }

bool may_read(uintptr_t address, size_t bytes, std::string& why) {
    return may_access(address, bytes, "reads", false, why);
}

bool may_write(uintptr_t address, size_t bytes, std::string& why) {
    return may_access(address, bytes, "writes", true, why);
}

bool may_copy(uintptr_t address, size_t bytes, std::string& why) {
    return may_access(address, bytes, "copies", true, why);
}

void copy(uintptr_t to, uintptr_t from, size_t bytes) {
    memmove(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), bytes);
    memmove(state_of(to), state_of(from), bytes);
}

void mark_written(uintptr_t address, size_t bytes) { memset(state_of(address), WRITTEN, bytes); }

std::string place_of(uintptr_t address) {
    Memory& self = memory();
    std::lock_guard guard(self.lock);
    auto after = self.allocations.upper_bound(address);
    if (after == self.allocations.begin()) return "before all allocations";
    const auto& [start, allocation] = *std::prev(after);
    const size_t offset = address - start;
    char text[160];
    const char* const freed = allocation.freed ? "freed " : "";
    if (offset < allocation.bytes) {
        snprintf(text, sizeof text, "byte %zu of %sallocation %lu (%zu bytes at %#lx)", offset, freed,
                 allocation.number, allocation.bytes, start);
    } else if (after != self.allocations.end() && after->first - address < PAGE && !allocation.freed &&
               offset - allocation.bytes > after->first - address) {
        snprintf(text, sizeof text, "%zu bytes before %sallocation %lu (%zu bytes at %#lx)", after->first - address,
                 after->second.freed ? "freed " : "", after->second.number, after->second.bytes, after->first);
    } else {
        snprintf(text, sizeof text, "%zu bytes past the end of %sallocation %lu (%zu bytes at %#lx)",
                 offset - allocation.bytes, freed, allocation.number, allocation.bytes, start);
    }
    return text;
}

}  // namespace xt
