// Driver API for devices, contexts, memory and modules. There is one device, under several numbers if that is asked for.

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>

#include "emulator.h"

namespace xt {
namespace {

constexpr Card CARDS[] = {
    {70, 96 << 10, 96 << 10, 2048},
    {75, 64 << 10, 64 << 10, 1024},
    {80, 163 << 10, 164 << 10, 2048},
    {90, 227 << 10, 228 << 10, 2048},
    {100, 227 << 10, 228 << 10, 2048},
    {120, 99 << 10, 100 << 10, 1536},
};
constexpr int MULTIPROCESSORS = 4;

std::atomic<bool> context_lost{false};
int context;  // its address is the handle
thread_local void* current_context = nullptr;
std::atomic<int> retained{0};

struct Name {
    int result;
    const char *name, *description;
};
constexpr Name NAMES[] = {
    {SUCCESS, "CUDA_SUCCESS", "no error"},
    {INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {INVALID_IMAGE, "CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"},
    {INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {UNSUPPORTED_PTX, "CUDA_ERROR_UNSUPPORTED_PTX_VERSION", "the provided PTX was compiled with an unsupported toolchain."},
    {NO_BINARY_FOR_GPU, "CUDA_ERROR_NO_BINARY_FOR_GPU", "no kernel image is available for execution on the device"},
    {INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {ILLEGAL_STATE, "CUDA_ERROR_ILLEGAL_STATE", "the operation cannot be performed in the present state"},
    {NOT_FOUND, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {NOT_READY, "CUDA_ERROR_NOT_READY", "device not ready"},
    {ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {LAUNCH_OUT_OF_RESOURCES, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES", "too many resources requested for launch"},
    {NOT_SUPPORTED, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
    {CAPTURE_UNSUPPORTED, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "operation not permitted when stream is capturing"},
    {CAPTURE_INVALIDATED, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED",
     "operation failed due to a previous error during capture"},
    {UNKNOWN, "CUDA_ERROR_UNKNOWN", "unknown error"},
};

const Name* find(int result) {
    for (const Name& name : NAMES) {
        if (name.result == result) return &name;
    }
    return nullptr;
}

int attribute(int which) {
    switch (which) {
        case 1: return 1024;                                   // MAX_THREADS_PER_BLOCK
        case 2: case 3: return 1024;                           // MAX_BLOCK_DIM_X, Y
        case 4: return 64;                                     // MAX_BLOCK_DIM_Z
        case 5: return 0x7FFFFFFF;                             // MAX_GRID_DIM_X
        case 6: case 7: return 65535;                          // MAX_GRID_DIM_Y, Z
        case 8: return SHARED_DEFAULT;                         // MAX_SHARED_MEMORY_PER_BLOCK
        case 9: return 65536;                                  // TOTAL_CONSTANT_MEMORY
        case 10: return 32;                                    // WARP_SIZE
        case 12: case 82: return 65536;                        // MAX_REGISTERS_PER_BLOCK, PER_MULTIPROCESSOR
        case 13: case 36: return 1000000;                      // CLOCK_RATE, MEMORY_CLOCK_RATE
        case 16: return MULTIPROCESSORS;                       // MULTIPROCESSOR_COUNT
        case 31: case 41: case 95: return 1;                   // CONCURRENT_KERNELS, UNIFIED_ADDRESSING, …
        case 37: return 256;                                   // GLOBAL_MEMORY_BUS_WIDTH
        case 38: return 4 << 20;                               // L2_CACHE_SIZE
        case 39: return card().threads_per_multiprocessor;     // MAX_THREADS_PER_MULTIPROCESSOR
        case 75: return card().architecture / 10;              // COMPUTE_CAPABILITY_MAJOR
        case 76: return card().architecture % 10;              // COMPUTE_CAPABILITY_MINOR
        case 81: return card().shared_per_multiprocessor;      // MAX_SHARED_MEMORY_PER_MULTIPROCESSOR
        case 97: return card().shared_opt_in;                  // MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
        case 106: return card().architecture == 75 ? 16 : 32;  // MAX_BLOCKS_PER_MULTIPROCESSOR
        case 111: return 1024;                                 // RESERVED_SHARED_MEMORY_PER_BLOCK
        case 115: return 1;                                    // MEMORY_POOLS_SUPPORTED
        default: return 0;
    }
}

// Number of cards, which share everything.
int cards() {
    static const int number = [] {
        const char* const text = getenv("XT_EMULATOR_CARDS");
        return text == nullptr ? 1 : atoi(text);
    }();
    return number;
}

int allocate_checked(uintptr_t* address, size_t bytes) {
    if (int error = lost()) return error;
    if (bytes == 0 || address == nullptr) return INVALID_VALUE;
    if (int error = refuse_while_recording()) return error;
    if (shall_fail(ALLOC)) return OUT_OF_MEMORY;
    *address = allocate(bytes);
    return *address == 0 ? OUT_OF_MEMORY : SUCCESS;
}

int release_checked(uintptr_t address) {
    if (address == 0) return SUCCESS;
    if (int error = refuse_while_recording()) return error;
    catch_up();
    // Also in a lost context, because live allocations are counted.
    if (!release(address)) return refuse(INVALID_VALUE, "cuMemFree of what is not allocated: " + place_of(address));
    return lost();
}

struct CopyOperation : Operation {
    enum Direction { IN, OUT, WITHIN };
    Direction direction;
    uintptr_t to, from;
    size_t bytes;

    CopyOperation(Direction direction, uintptr_t to, uintptr_t from, size_t bytes)
        : direction(direction), to(to), from(from), bytes(bytes) {}

    std::string name() const override {
        return direction == IN ? "copy in" : direction == OUT ? "copy out" : "copy within";
    }

    int run() override {
        if (int error = check()) return error;
        act();
        return SUCCESS;
    }

    int check() const {
        std::string why;
        if (shall_fail(COPY)) return UNKNOWN;
        if (direction != OUT && !may_write(to, bytes, why)) return refuse(INVALID_VALUE, "a copy " + why);
        if (direction == OUT && !may_read(from, bytes, why)) return refuse(INVALID_VALUE, "a copy to the host " + why);
        if (direction == WITHIN && !may_copy(from, bytes, why)) return refuse(INVALID_VALUE, "a copy " + why);
        return SUCCESS;
    }

    void act() const {
        if (direction == WITHIN) {
            copy(to, from, bytes);
            return;
        }
        memcpy(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), bytes);
        if (direction == IN) mark_written(to, bytes);
    }
};

struct FillOperation : Operation {
    uintptr_t to;
    uint32_t value;
    size_t count;
    unsigned size;

    FillOperation(uintptr_t to, uint32_t value, size_t count, unsigned size)
        : to(to), value(value), count(count), size(size) {}

    std::string name() const override { return "fill"; }

    int run() override {
        std::string why;
        if (shall_fail(COPY)) return UNKNOWN;
        if (to % size != 0) return refuse(INVALID_VALUE, "a memset of a misaligned address, " + place_of(to));
        if (!may_write(to, count * size, why)) return refuse(INVALID_VALUE, "a memset " + why);
        for (size_t i = 0; i < count; ++i) memcpy(reinterpret_cast<char*>(to) + i * size, &value, size);
        mark_written(to, count * size);
        return SUCCESS;
    }
};

// If `waits`, the call is synchronous, which is an error while a stream is recorded; `stream` may then be null.
template <typename O> int start(Stream* stream, bool waits, O operation) {
    if (int error = lost()) return error;
    if (waits) {
        if (int error = refuse_while_recording()) return error;
        catch_up();
        return operation.run();
    }
    return enqueue(stream, std::make_unique<O>(operation));
}

}  // namespace

const Card& card() {
    static const Card& chosen = []() -> const Card& {
        const char* const name = getenv("XT_EMULATOR_ARCH");
        const unsigned architecture = name == nullptr ? 80 : atoi(name);
        for (const Card& each : CARDS) {
            if (each.architecture == architecture) return each;
        }
        report(std::string("XT_EMULATOR_ARCH is 70, 75, 80, 90, 100 or 120; got ") + name);
        return CARDS[2];
    }();
    return chosen;
}

unsigned version_of(const char* variable) {
    const char* const text = getenv(variable);
    unsigned major = 13, minor = 0;
    if (text != nullptr && sscanf(text, "%u.%u", &major, &minor) != 2) {
        report(std::string(variable) + " is a version like 12.4; got " + text);
    }
    return major * 1000 + minor * 10;
}

int lost() { return context_lost ? ILLEGAL_ADDRESS : SUCCESS; }

void lose() {
    // Shows all errors in one run instead of only the first.
    static const bool goes_on = getenv("XT_EMULATOR_GO_ON") != nullptr;
    context_lost = !goes_on;
}

int refuse(Result result, const std::string& what) {
    report(what);
    return result;
}

}  // namespace xt

using namespace xt;

// Makes a lost context usable again, for tests that broke it on purpose.
XT_EXPORT void xt_emulator_clear(void) { context_lost = false; }

// --- Devices and contexts.

XT_EXPORT int cuInit(unsigned) { return SUCCESS; }

XT_EXPORT int cuDriverGetVersion(int* version) {
    *version = version_of("XT_EMULATOR_DRIVER");
    return SUCCESS;
}

XT_EXPORT int cuDeviceGetCount(int* count) {
    *count = cards();
    return SUCCESS;
}

XT_EXPORT int cuDeviceGet(int* device, int ordinal) {
    if (ordinal < 0 || ordinal >= cards()) return INVALID_DEVICE;
    *device = ordinal;
    return SUCCESS;
}

XT_EXPORT int cuDeviceGetName(char* name, int length, int device) {
    if (device < 0 || device >= cards()) return INVALID_DEVICE;
    snprintf(name, length, "Emulated card sm_%u", card().architecture);
    return SUCCESS;
}

XT_EXPORT int cuDeviceGetAttribute(int* value, int which, int device) {
    if (device < 0 || device >= cards()) return INVALID_DEVICE;
    *value = attribute(which);
    return SUCCESS;
}

XT_EXPORT int cuDeviceGetUuid(void* uuid, int) {
    memcpy(uuid, "xt-emulated-card", 16);
    return SUCCESS;
}
XT_EXPORT int cuDeviceGetUuid_v2(void* uuid, int device) { return cuDeviceGetUuid(uuid, device); }

XT_EXPORT int cuDeviceTotalMem_v2(size_t* bytes, int) {
    *bytes = memory_limit();
    return SUCCESS;
}

XT_EXPORT int cuMemGetInfo_v2(size_t* unused, size_t* total) {
    *total = memory_limit();
    *unused = memory_limit() - live_bytes();
    return lost();
}

XT_EXPORT int cuDevicePrimaryCtxRetain(void** handle, int device) {
    if (device < 0 || device >= cards()) return INVALID_DEVICE;
    ++retained;
    count_alive(CONTEXT, 1);
    *handle = &context;
    return SUCCESS;
}

XT_EXPORT int cuDevicePrimaryCtxRelease_v2(int device) {
    if (device < 0 || device >= cards()) return INVALID_DEVICE;
    count_alive(CONTEXT, -1);
    if (--retained == 0) context_lost = false;
    return SUCCESS;
}

XT_EXPORT int cuCtxGetCurrent(void** handle) {
    *handle = current_context;
    return SUCCESS;
}

XT_EXPORT int cuCtxSetCurrent(void* handle) {
    if (handle != nullptr && handle != &context) return INVALID_CONTEXT;
    current_context = handle;
    return SUCCESS;
}

XT_EXPORT int cuCtxSynchronize(void) {
    if (int error = refuse_while_recording()) return error;
    catch_up();
    return lost();
}

// --- Memory.

XT_EXPORT int cuMemAlloc_v2(uintptr_t* address, size_t bytes) { return allocate_checked(address, bytes); }
XT_EXPORT int cuMemAllocAsync(uintptr_t* address, size_t bytes, Stream*) { return allocate_checked(address, bytes); }
XT_EXPORT int cuMemFree_v2(uintptr_t address) { return release_checked(address); }
XT_EXPORT int cuMemFreeAsync(uintptr_t address, Stream*) { return release_checked(address); }

XT_EXPORT int cuMemHostAlloc(void** memory, size_t bytes, unsigned) {
    if (shall_fail(PIN)) return OUT_OF_MEMORY;
    *memory = malloc(bytes);
    if (*memory == nullptr) return OUT_OF_MEMORY;
    count_alive(PINNED, 1);
    return SUCCESS;
}

XT_EXPORT int cuMemFreeHost(void* memory) {
    catch_up();
    free(memory);
    count_alive(PINNED, -1);
    return SUCCESS;
}

// There is one pool, and its settings change nothing.
XT_EXPORT int cuDeviceGetDefaultMemPool(void** pool, int) {
    static int handle;
    *pool = &handle;
    return SUCCESS;
}
XT_EXPORT int cuDeviceGetMemPool(void** pool, int device) { return cuDeviceGetDefaultMemPool(pool, device); }
XT_EXPORT int cuMemPoolSetAttribute(void*, int, void*) { return SUCCESS; }
XT_EXPORT int cuMemPoolTrimTo(void*, size_t) { return SUCCESS; }
XT_EXPORT int cuMemPoolGetAttribute(void*, int, void* value) {
    const uint64_t bytes = live_bytes();
    memcpy(value, &bytes, sizeof bytes);
    return SUCCESS;
}

XT_EXPORT int cuMemcpyHtoD_v2(uintptr_t to, const void* from, size_t bytes) {
    return start(nullptr, true, CopyOperation(CopyOperation::IN, to, uintptr_t(from), bytes));
}
XT_EXPORT int cuMemcpyHtoDAsync_v2(uintptr_t to, const void* from, size_t bytes, Stream* stream) {
    const CopyOperation operation(CopyOperation::IN, to, uintptr_t(from), bytes);
    if (is_recording(stream)) return start(stream, false, operation);
    if (int error = lost()) return error;
    if (int error = operation.check()) return error;
    postpone([operation] { operation.act(); });
    return SUCCESS;
}
XT_EXPORT int cuMemcpyDtoH_v2(void* to, uintptr_t from, size_t bytes) {
    return start(nullptr, true, CopyOperation(CopyOperation::OUT, uintptr_t(to), from, bytes));
}
XT_EXPORT int cuMemcpyDtoHAsync_v2(void* to, uintptr_t from, size_t bytes, Stream* stream) {
    return start(stream, false, CopyOperation(CopyOperation::OUT, uintptr_t(to), from, bytes));
}
XT_EXPORT int cuMemcpyDtoD_v2(uintptr_t to, uintptr_t from, size_t bytes) {
    return start(nullptr, true, CopyOperation(CopyOperation::WITHIN, to, from, bytes));
}
XT_EXPORT int cuMemcpyDtoDAsync_v2(uintptr_t to, uintptr_t from, size_t bytes, Stream* stream) {
    return start(stream, false, CopyOperation(CopyOperation::WITHIN, to, from, bytes));
}

XT_EXPORT int cuMemsetD8_v2(uintptr_t to, unsigned char value, size_t count) {
    return start(nullptr, true, FillOperation(to, value, count, 1));
}
XT_EXPORT int cuMemsetD8Async(uintptr_t to, unsigned char value, size_t count, Stream* stream) {
    return start(stream, false, FillOperation(to, value, count, 1));
}
XT_EXPORT int cuMemsetD32_v2(uintptr_t to, unsigned value, size_t count) {
    return start(nullptr, true, FillOperation(to, value, count, 4));
}
XT_EXPORT int cuMemsetD32Async(uintptr_t to, unsigned value, size_t count, Stream* stream) {
    return start(stream, false, FillOperation(to, value, count, 4));
}

// --- Modules and functions. Modules stay loaded: kernels of a recorded graph may outlive their handle.

XT_EXPORT int cuModuleLoadData(const Module** module, const void* image) {
    if (int error = lost()) return error;
    if (module == nullptr || image == nullptr) return INVALID_VALUE;
    Origin origin;
    *module = load(image, origin);
    if (*module == nullptr) return INVALID_IMAGE;
    const unsigned made_for = origin.architecture, present = card().architecture;
    const unsigned driver = version_of("XT_EMULATOR_DRIVER");
    // A driver compiles PTX of compilers no newer than itself, for the card's architecture or an earlier one.
    if (origin.ptx && origin.compiler > driver) return UNSUPPORTED_PTX;
    // Machine code may come from any compiler of the same major version, for the card's major architecture and at most
    // its minor one.
    if (!origin.ptx && origin.compiler / 1000 > driver / 1000) return INVALID_IMAGE;
    if (made_for > present || (!origin.ptx && made_for / 10 != present / 10)) return NO_BINARY_FOR_GPU;
    count_alive(MODULE, 1);
    return SUCCESS;
}

XT_EXPORT int cuModuleUnload(const Module*) {
    count_alive(MODULE, -1);
    return SUCCESS;
}

XT_EXPORT int cuModuleGetFunction(Function** function, const Module* module, const char* name) {
    const XtKernel* const kernel = kernel_of(*module, name);
    if (kernel == nullptr || shall_fail(FUNCTION)) return NOT_FOUND;
    *function = new Function{module, kernel};
    return SUCCESS;
}

XT_EXPORT int cuFuncSetAttribute(Function* function, int which, int value) {
    if (which == 9) return value >= -1 && value <= 100 ? SUCCESS : INVALID_VALUE;  // PREFERRED_SHARED_MEMORY_CARVEOUT
    if (which != 8) return INVALID_VALUE;                                          // MAX_DYNAMIC_SHARED_SIZE_BYTES
    if (value < 0 || value + shared_bytes_of(*function->module, *function->kernel) > card().shared_opt_in) {
        return INVALID_VALUE;
    }
    function->dynamic_shared = value;
    return SUCCESS;
}

XT_EXPORT int cuFuncSetCacheConfig(Function*, int) { return SUCCESS; }

XT_EXPORT int cuFuncGetAttribute(int* value, int which, const Function* function) {
    switch (which) {
        case 0: *value = function->kernel->most_threads == 0 ? 1024 : function->kernel->most_threads; break;
        case 1: *value = shared_bytes_of(*function->module, *function->kernel); break;
        case 4: *value = 32; break;  // NUM_REGS: a number that permits every launch
        case 5: case 6: *value = function->module->architecture; break;
        case 8: *value = function->dynamic_shared > SHARED_DEFAULT ? function->dynamic_shared : SHARED_DEFAULT; break;
        default: *value = 0;
    }
    return SUCCESS;
}

XT_EXPORT int cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const Function* function, int threads,
                                                          size_t dynamic_shared) {
    if (threads <= 0 || threads > 1024) return INVALID_VALUE;
    const size_t shared = shared_bytes_of(*function->module, *function->kernel) + dynamic_shared + 1024;
    const size_t by_shared = card().shared_per_multiprocessor / shared;
    const size_t by_threads = card().threads_per_multiprocessor / threads;
    *blocks = by_shared < by_threads ? by_shared : by_threads;
    return SUCCESS;
}

XT_EXPORT int cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const Function* function, int threads,
                                                                   size_t dynamic_shared, unsigned) {
    return cuOccupancyMaxActiveBlocksPerMultiprocessor(blocks, function, threads, dynamic_shared);
}

// --- Errors.

XT_EXPORT int cuGetErrorName(int result, const char** name) {
    const Name* const found = find(result);
    *name = found == nullptr ? nullptr : found->name;
    return found == nullptr ? INVALID_VALUE : SUCCESS;
}

XT_EXPORT int cuGetErrorString(int result, const char** description) {
    const Name* const found = find(result);
    *description = found == nullptr ? nullptr : found->description;
    return found == nullptr ? INVALID_VALUE : SUCCESS;
}
