// Injected errors: the n-th allocation, launch, copy or compilation fails.

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>

#include "emulator.h"

namespace xt {
namespace {

const char* const NAMES[KINDS] = {"alloc", "launch", "copy", "compile", "pin", "function", "blas", "nccl"};
const char* const THING_NAMES[THINGS] = {"context", "stream", "event", "graph", "executable", "module", "blas", "pinned"};
std::atomic<int64_t> alive[THINGS];

struct Counter {
    std::atomic<uint64_t> calls{0};
    // Number of the call that fails, counted like `calls`, or 0; with `from_then_on`, all later calls fail too.
    std::atomic<uint64_t> failing{0};
    std::atomic<bool> from_then_on{false};
};

Counter counters[KINDS];

// Parses `alloc`, or `alloc+` for all calls from the n-th on. Null for an unknown kind.
Counter* find(const char* kind, size_t length, bool& from_then_on) {
    from_then_on = length > 0 && kind[length - 1] == '+';
    length -= from_then_on;
    for (int i = 0; i < KINDS; ++i) {
        if (strlen(NAMES[i]) == length && memcmp(NAMES[i], kind, length) == 0) return &counters[i];
    }
    return nullptr;
}

bool arrange(const char* kind, size_t length, uint64_t n) {
    bool from_then_on;
    Counter* const counter = find(kind, length, from_then_on);
    if (counter == nullptr) return false;
    counter->from_then_on = from_then_on;
    counter->failing = n == 0 ? 0 : counter->calls + n;
    return true;
}

// XT_EMULATOR_FAIL=alloc:3,launch+:1
void read_environment() {
    const char* text = getenv("XT_EMULATOR_FAIL");
    while (text != nullptr && *text != 0) {
        const char* const colon = strchr(text, ':');
        if (colon == nullptr || !arrange(text, colon - text, strtoull(colon + 1, nullptr, 10))) {
            report(std::string("XT_EMULATOR_FAIL is a list of kind:number, with kinds alloc, launch, copy, compile, ") +
                   "pin, function, blas and nccl; got " + text);
            return;
        }
        text = strchr(colon, ',');
        if (text != nullptr) ++text;
    }
}

}  // namespace

bool shall_fail(Kind kind) {
    static std::once_flag once;
    std::call_once(once, read_environment);
    Counter& counter = counters[kind];
    const uint64_t call = ++counter.calls, failing = counter.failing;
    return failing != 0 && (call == failing || (call > failing && counter.from_then_on));
}

void count_alive(Thing thing, int change) { alive[thing] += change; }

}  // namespace xt

// Makes the n-th call of a kind fail, counted from the next one (1), and with `alloc+` all later ones too; n = 0 ends
// this. Returns 0 for an unknown kind.
XT_EXPORT int xt_emulator_fail(const char* kind, uint64_t n) { return xt::arrange(kind, strlen(kind), n); }

// Returns the number of calls of a kind.
XT_EXPORT uint64_t xt_emulator_count(const char* kind) {
    bool from_then_on;
    const xt::Counter* const counter = xt::find(kind, strlen(kind), from_then_on);
    return counter == nullptr ? 0 : counter->calls.load();
}

// Returns the number of live context references, streams, events, graphs, executables, modules, cuBLAS handles or
// page-locked allocations; -1 for an unknown kind.
XT_EXPORT int64_t xt_emulator_alive(const char* thing) {
    for (int i = 0; i < xt::THINGS; ++i) {
        if (strcmp(xt::THING_NAMES[i], thing) == 0) return xt::alive[i];
    }
    return -1;
}

XT_EXPORT uint64_t xt_emulator_live_bytes(void) { return xt::live_bytes(); }
