// Interfaces between the files of the emulator: memory, checker, fibers, modules, faults.

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

// --- memory.cpp: device memory. Addresses are real addresses of this process, in a reserved range; the state of a byte
// is at a fixed offset behind it. Addresses are never reused, so that freed ones are recognized.

constexpr uintptr_t ARENA = 0x100000000000, ARENA_BYTES = uintptr_t(1) << 40;
enum State : uint8_t { NOTHING = 0, FRESH = 1, WRITTEN = 3 };

inline bool in_arena(uintptr_t address) { return address - ARENA < ARENA_BYTES; }
inline uint8_t* state_of(uintptr_t address) { return reinterpret_cast<uint8_t*>(address + ARENA_BYTES); }

// Returns 0 if memory is exhausted.
uintptr_t allocate(size_t bytes);
bool release(uintptr_t address);
size_t live_bytes();
size_t memory_limit();

// Returns true if an access is valid; otherwise `why` says what is wrong with it.
bool may_read(uintptr_t address, size_t bytes, std::string& why);
bool may_write(uintptr_t address, size_t bytes, std::string& why);
// Like may_read, but accepts uninitialized bytes.
bool may_copy(uintptr_t address, size_t bytes, std::string& why);
void mark_written(uintptr_t address, size_t bytes);
// Copies values within device memory, with the state of each byte.
void copy(uintptr_t to, uintptr_t from, size_t bytes);
// Describes the location of an address.
std::string place_of(uintptr_t address);

// --- checker.cpp: reports.

// Prints a report and stores it for xt_emulator_report.
void report(const std::string& text);

// --- fibers.cpp: running a kernel.

struct Module;

// Architecture of the card, 80 for sm_80, and its limits.
struct Card {
    unsigned architecture;
    unsigned shared_opt_in, shared_per_multiprocessor, threads_per_multiprocessor;
};
const Card& card();
// Returns the CUDA version in a variable, 12040 for 12.4; 13000 if it is not set.
unsigned version_of(const char* variable);
constexpr unsigned SHARED_DEFAULT = 48 << 10;

struct Launch {
    const Module* module;
    const XtKernel* kernel;
    XtDim grid, block;
    unsigned dynamic_shared;
    void** arguments;
};

// Returns true if the kernel ran to its end; otherwise the error has been reported.
bool run(const Launch& launch);

// --- module.cpp: compiled kernels.

struct Function {
    const Module* module;
    const XtKernel* kernel;
    unsigned dynamic_shared = 0;  // limit set by cuFuncSetAttribute
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
    size_t anchor;             // offset of `shared_memory` in it
    unsigned architecture;
    void* (*shared_memory)();  // of the calling thread
    std::vector<Variable> shared_variables;
};

// Folder of this library, which also holds compiled kernels.
const std::string& folder();
std::string hash_of(const std::string& text);
bool write_file(const std::string& path, const std::string& bytes);
bool read_file(const std::string& path, std::string& bytes);
// Target of a compiled image, and the version of NVRTC that compiled it, 13000 for 13.0.
struct Origin {
    uint32_t architecture, ptx, compiler;
};
// Packs a module as the "machine code" that nvrtcGetCUBIN returns, or as PTX.
std::string pack(const std::string& shared_object, const Origin& origin);
// Returns null if the image is damaged or from another version of the emulator.
const Module* load(const void* image, Origin& origin);
const XtKernel* kernel_of(const Module& module, const char* name);
// Returns the static shared memory that a kernel may use.
size_t shared_bytes_of(const Module& module, const XtKernel& kernel);

// --- faults.cpp: injected errors.

enum Kind { ALLOC, LAUNCH, COPY, COMPILE, PIN, FUNCTION, BLAS, NCCL, KINDS };
// Counts a call and returns true if it must fail.
bool shall_fail(Kind kind);

// --- faults.cpp: counts of live objects.

enum Thing { CONTEXT, STREAM, EVENT, GRAPH, EXECUTABLE, MODULE, BLAS_HANDLE, PINNED, THINGS };
void count_alive(Thing thing, int change);

// --- stream.cpp

// Work of a stream, done now or when the graph that it was recorded into is launched.
struct Operation {
    virtual ~Operation() = default;
    // 0, or a CUresult.
    virtual int run() = 0;
    // Name for `xt_emulator_trace`.
    virtual std::string name() const = 0;
};

struct Stream;
int enqueue(Stream* stream, std::unique_ptr<Operation> operation);
// Copies from host memory as late as the order of the stream permits, because a GPU may read the source that late.
void postpone(std::function<void()> copy);
// Does the postponed copies; called before anything that may depend on them.
void catch_up();
bool is_recording(Stream* stream);
// While a stream is recorded, calls that wait or allocate are errors and end the recording.
int refuse_while_recording();

// --- nccl.cpp: operations of several processes, which are the only work of a stream that is not done at once.

bool collectives_pending();
void await_collectives();

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
    NOT_READY = 600,
    ILLEGAL_ADDRESS = 700,
    LAUNCH_OUT_OF_RESOURCES = 701,
    NOT_SUPPORTED = 801,
    CAPTURE_UNSUPPORTED = 900,
    CAPTURE_INVALIDATED = 901,
    ILLEGAL_STATE = 401,
    UNKNOWN = 999,
};

// Result of every call after an error of a kernel, which makes the context unusable.
int lost();
void lose();
// Reports an error of an API call.
int refuse(Result result, const std::string& what);

}  // namespace xt
