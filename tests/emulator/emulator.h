// What the rooms of the emulator share: memory, checker, fibers, modules, faults.

#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "runtime.h"

#define XT_EXPORT extern "C" __attribute__((visibility("default")))

namespace xt {

// --- memory.cpp: device memory. Addresses are real ones of this process, in one range that nothing else lies in; a
// byte's state lies at the same distance behind it. Addresses are never used twice, so that a freed one stays known.

constexpr uintptr_t ARENA = 0x100000000000, ARENA_BYTES = uintptr_t(1) << 40;
enum State : uint8_t { NOTHING = 0, FRESH = 1, WRITTEN = 3 };

inline bool in_arena(uintptr_t address) { return address - ARENA < ARENA_BYTES; }
inline uint8_t* state_of(uintptr_t address) { return reinterpret_cast<uint8_t*>(address + ARENA_BYTES); }

// 0 if there is no more memory.
uintptr_t allocate(size_t bytes);
bool release(uintptr_t address);
size_t live_bytes();
size_t memory_limit();

// Whether an access is right; else what is wrong with it.
bool may_read(uintptr_t address, size_t bytes, std::string& why);
bool may_write(uintptr_t address, size_t bytes, std::string& why);
// As may_read, also of bytes that were never written.
bool may_copy(uintptr_t address, size_t bytes, std::string& why);
void mark_written(uintptr_t address, size_t bytes);
// Within device memory: values and whether they were written.
void copy(uintptr_t to, uintptr_t from, size_t bytes);
// Where an address is, in words.
std::string place_of(uintptr_t address);

// --- checker.cpp: reports.

// Prints a report and keeps it for xt_emulator_report.
void report(const std::string& text);

// --- fibers.cpp: running a kernel.

struct Module;

// The architecture of the card, 80 for sm_80, and what it allows.
struct Card {
    unsigned architecture;
    unsigned shared_opt_in, shared_per_multiprocessor, threads_per_multiprocessor;
};
const Card& card();
// The version of CUDA that a variable gives as 12.4: 12040; 13000 if it is not set.
unsigned version_of(const char* variable);
constexpr unsigned SHARED_DEFAULT = 48 << 10;

struct Launch {
    const Module* module;
    const XtKernel* kernel;
    XtDim grid, block;
    unsigned dynamic_shared;
    void** arguments;
};

// Whether it ran to its end; if not, a report was made.
bool run(const Launch& launch);

// --- module.cpp: compiled kernels.

struct Function {
    const Module* module;
    const XtKernel* kernel;
    unsigned dynamic_shared = 0;  // what cuFuncSetAttribute allowed
};

// A variable in shared memory.
struct Variable {
    std::string name;
    size_t bytes;
};

struct Module {
    void* handle;
    uintptr_t begin, end;      // of the image in memory
    size_t shared_bytes;       // static shared memory of all kernels of the module
    size_t anchor;             // how far into it `shared_memory` points
    unsigned architecture;
    void* (*shared_memory)();  // of the calling thread
    std::vector<Variable> shared_variables;
};

// The folder of this library; kernels are kept below it.
const std::string& folder();
std::string hash_of(const std::string& text);
bool write_file(const std::string& path, const std::string& bytes);
bool read_file(const std::string& path, std::string& bytes);
// What a compiled image was made for, and by which version of NVRTC, as 13000 for 13.0.
struct Origin {
    uint32_t architecture, ptx, compiler;
};
// A module as the "machine code" that nvrtcGetCUBIN returns, or the PTX.
std::string pack(const std::string& shared_object, const Origin& origin);
// Null if the image is damaged or another emulator's.
const Module* load(const void* image, Origin& origin);
const XtKernel* kernel_of(const Module& module, const char* name);
// Static shared memory that a kernel may use.
size_t shared_bytes_of(const Module& module, const XtKernel& kernel);

// --- faults.cpp: errors on demand.

enum Kind { ALLOC, LAUNCH, COPY, COMPILE, PIN, FUNCTION, BLAS, KINDS };
// Counts a call; whether it shall fail.
bool shall_fail(Kind kind);

// --- faults.cpp: what was made and not yet destroyed.

enum Thing { CONTEXT, STREAM, EVENT, GRAPH, EXECUTABLE, MODULE, BLAS_HANDLE, PINNED, THINGS };
void count_alive(Thing thing, int change);

// --- stream.cpp

// What a stream does, now or when the graph that it was recorded into is launched.
struct Operation {
    virtual ~Operation() = default;
    // 0, or a CUresult.
    virtual int run() = 0;
};

struct Stream;
int enqueue(Stream* stream, std::unique_ptr<Operation> operation);
// What a copy from the host's memory does: as late as the order of its stream permits, because a card may read the
// source that late.
void postpone(std::function<void()> copy);
// Does what was postponed: before all that may depend on it.
void catch_up();
bool is_recording(Stream* stream);
// While a stream is recorded, calls that wait or allocate are errors, which end the recording.
int refuse_while_recording();

// --- driver.cpp

enum Result {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NOT_INITIALIZED = 3,
    INVALID_DEVICE = 101,
    INVALID_IMAGE = 200,
    INVALID_CONTEXT = 201,
    UNSUPPORTED_PTX = 222,
    NO_BINARY_FOR_GPU = 209,
    INVALID_HANDLE = 400,
    NOT_FOUND = 500,
    ILLEGAL_ADDRESS = 700,
    LAUNCH_OUT_OF_RESOURCES = 701,
    NOT_SUPPORTED = 801,
    CAPTURE_UNSUPPORTED = 900,
    CAPTURE_INVALIDATED = 901,
    ILLEGAL_STATE = 401,
    UNKNOWN = 999,
};

// A context is lost after a kernel did what it must not: this is then the result of every call.
int lost();
void lose();
// A report about a call that is not a kernel's.
int refuse(Result result, const std::string& what);

}  // namespace xt
