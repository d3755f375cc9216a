// Streams, events, launches and graphs. A stream does its work at once; a recorded one stores it for a graph.

#include <time.h>

#include <algorithm>
#include <cstring>
#include <mutex>
#include <thread>

#include "emulator.h"

namespace xt {

enum Mode { GLOBAL, THREAD_LOCAL, RELAXED };

typedef std::vector<std::shared_ptr<Operation>> Graph;

struct Stream {
    bool recording = false, spoiled = false;
    Mode mode = GLOBAL;
    std::thread::id recorder;
    Graph recorded;
};

namespace {

struct Event {
    bool recorded = false;
    timespec time;
};

std::mutex trace_lock;
bool tracing = false;
std::string traced;

std::mutex streams_lock;
std::vector<Stream*> recording;
std::recursive_mutex late_lock;
std::vector<std::function<void()>> late;
Stream default_stream;

// Null, 1 and 2 are handles of the default stream.
Stream& stream_of(Stream* handle) { return uintptr_t(handle) <= 2 ? default_stream : *handle; }

struct LaunchOperation : Operation {
    const Function function;
    const XtDim grid, block;
    const unsigned dynamic_shared;
    std::vector<std::vector<char>> values;
    std::vector<void*> arguments;

    LaunchOperation(const Function& function, XtDim grid, XtDim block, unsigned dynamic_shared, void** given)
        : function(function), grid(grid), block(block), dynamic_shared(dynamic_shared) {
        const XtKernel& kernel = *function.kernel;
        for (unsigned i = 0; i < kernel.arguments; ++i) {
            const char* const value = static_cast<const char*>(given[i]);
            values.emplace_back(value, value + kernel.sizes[i]);
        }
        for (std::vector<char>& value : values) arguments.push_back(value.data());
    }

    std::string name() const override { return function.kernel->name; }

    int run() override {
        if (shall_fail(LAUNCH)) return LAUNCH_OUT_OF_RESOURCES;
        if (xt::run({function.module, function.kernel, grid, block, dynamic_shared, arguments.data()})) return SUCCESS;
        lose();
        return ILLEGAL_ADDRESS;
    }
};

// Returns the error of an invalid launch, or an empty string.
std::string objection(const Function& function, XtDim grid, XtDim block, unsigned dynamic_shared, void** arguments,
                      Result& result) {
    const XtKernel& kernel = *function.kernel;
    const uint64_t threads = uint64_t(block.x) * block.y * block.z;
    result = INVALID_VALUE;
    if (threads == 0 || threads > 1024 || block.x > 1024 || block.y > 1024 || block.z > 64) {
        return "blocks of " + std::to_string(block.x) + " x " + std::to_string(block.y) + " x " +
               std::to_string(block.z) + " threads; a block has at most 1024, 64 along z";
    }
    if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7FFFFFFF || grid.y > 65535 || grid.z > 65535) {
        return "a grid of " + std::to_string(grid.x) + " x " + std::to_string(grid.y) + " x " + std::to_string(grid.z) +
               " blocks; it has at most 2147483647 x 65535 x 65535, and no side is 0";
    }
    const size_t declared = shared_bytes_of(*function.module, kernel), shared = declared + dynamic_shared;
    const bool opted_in = function.dynamic_shared > 0;
    if (shared > (opted_in ? card().shared_opt_in : SHARED_DEFAULT) ||
        (opted_in && dynamic_shared > std::max(function.dynamic_shared, SHARED_DEFAULT))) {
        return std::to_string(declared) + " bytes of static and " + std::to_string(dynamic_shared) +
               " of dynamic shared memory; a launch may have " + std::to_string(SHARED_DEFAULT) +
               ", and as much dynamic memory more as cuFuncSetAttribute allowed, here " +
               std::to_string(function.dynamic_shared) + ", up to " + std::to_string(card().shared_opt_in) + " in all";
    }
    for (unsigned i = 0; i < kernel.arguments; ++i) {
        const std::string argument = "argument " + std::to_string(i);
        if (arguments == nullptr || arguments[i] == nullptr) return "no " + argument;
        if (!kernel.pointers[i]) continue;
        uintptr_t address;
        memcpy(&address, arguments[i], sizeof address);
        if (address == 0 || in_arena(address)) continue;
        return argument + " is a pointer, but what is given is no device address";
    }
    result = LAUNCH_OUT_OF_RESOURCES;
    if (kernel.most_threads != 0 && threads > kernel.most_threads) {
        return "blocks of " + std::to_string(threads) + " threads, but __launch_bounds__ says " +
               std::to_string(kernel.most_threads);
    }
    return "";
}

}  // namespace

int enqueue(Stream* handle, std::unique_ptr<Operation> operation) {
    Stream& stream = stream_of(handle);
    {
        std::lock_guard guard(trace_lock);
        if (tracing) traced += operation->name() + '\n';
    }
    if (!stream.recording) {
        catch_up();
        return operation->run();
    }
    if (stream.spoiled) return CAPTURE_INVALIDATED;
    stream.recorded.push_back(std::move(operation));
    return SUCCESS;
}

void postpone(std::function<void()> copy) {
    std::lock_guard guard(late_lock);
    late.push_back(std::move(copy));
}

void catch_up() {
    await_collectives();
    std::lock_guard guard(late_lock);
    for (const std::function<void()>& copy : late) copy();
    late.clear();
}

bool is_recording(Stream* stream) { return stream_of(stream).recording; }

int refuse_while_recording() {
    std::lock_guard guard(streams_lock);
    bool refused = false;
    for (Stream* stream : recording) {
        const bool concerned = stream->mode == GLOBAL ||
                               (stream->mode == THREAD_LOCAL && stream->recorder == std::this_thread::get_id());
        stream->spoiled |= concerned;
        refused |= concerned;
    }
    return refused ? CAPTURE_UNSUPPORTED : SUCCESS;
}

}  // namespace xt

using namespace xt;

// Begins a list of the work that is enqueued, or ends it and returns it: a name per line, until the next call.
XT_EXPORT const char* xt_emulator_trace(int on) {
    std::lock_guard guard(trace_lock);
    static std::string ended;
    ended.swap(traced);
    traced.clear();
    tracing = on != 0;
    return ended.c_str();
}

XT_EXPORT int cuStreamCreate(Stream** stream, unsigned) {
    *stream = new Stream;
    count_alive(STREAM, 1);
    return lost();
}
XT_EXPORT int cuStreamCreateWithPriority(Stream** stream, unsigned flags, int) { return cuStreamCreate(stream, flags); }

XT_EXPORT int cuStreamDestroy_v2(Stream* stream) {
    catch_up();
    if (uintptr_t(stream) > 2) {
        delete stream;
        count_alive(STREAM, -1);
    }
    return lost();
}

XT_EXPORT int cuStreamSynchronize(Stream* handle) {
    Stream& stream = stream_of(handle);
    if (stream.recording) {
        stream.spoiled = true;
        return CAPTURE_UNSUPPORTED;
    }
    catch_up();
    return lost();
}

XT_EXPORT int cuStreamQuery(Stream* stream) { return collectives_pending() ? int(NOT_READY) : cuStreamSynchronize(stream); }
XT_EXPORT int cuStreamWaitEvent(Stream*, Event*, unsigned) { return lost(); }

XT_EXPORT int cuLaunchHostFunc(Stream*, void (*function)(void*), void* data) {
    catch_up();
    function(data);
    return lost();
}

// --- Events.

XT_EXPORT int cuEventCreate(Event** event, unsigned) {
    *event = new Event;
    count_alive(EVENT, 1);
    return lost();
}

XT_EXPORT int cuEventDestroy_v2(Event* event) {
    delete event;
    count_alive(EVENT, -1);
    return lost();
}

XT_EXPORT int cuEventRecord(Event* event, Stream* stream) {
    if (stream_of(stream).recording) return SUCCESS;
    event->recorded = true;
    clock_gettime(CLOCK_MONOTONIC, &event->time);
    return lost();
}

XT_EXPORT int cuEventSynchronize(Event*) {
    catch_up();
    return lost();
}
XT_EXPORT int cuEventQuery(Event* event) { return collectives_pending() ? int(NOT_READY) : cuEventSynchronize(event); }

XT_EXPORT int cuEventElapsedTime_v2(float* milliseconds, const Event* from, const Event* to) {
    if (!from->recorded || !to->recorded) return INVALID_HANDLE;
    *milliseconds = (to->time.tv_sec - from->time.tv_sec) * 1e3f + (to->time.tv_nsec - from->time.tv_nsec) * 1e-6f;
    return lost();
}
XT_EXPORT int cuEventElapsedTime(float* milliseconds, const Event* from, const Event* to) {
    return cuEventElapsedTime_v2(milliseconds, from, to);
}

// --- Launches.

XT_EXPORT int cuLaunchKernel(const Function* function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                             unsigned block_x, unsigned block_y, unsigned block_z, unsigned dynamic_shared,
                             Stream* stream, void** arguments, void** extra) {
    if (int error = lost()) return error;
    if (function == nullptr) return INVALID_HANDLE;
    if (extra != nullptr) return NOT_SUPPORTED;
    const XtDim grid = {grid_x, grid_y, grid_z}, block = {block_x, block_y, block_z};
    Result result;
    const std::string wrong = objection(*function, grid, block, dynamic_shared, arguments, result);
    if (!wrong.empty()) return refuse(result, std::string("launch of kernel ") + function->kernel->name + ": " + wrong);
    return enqueue(stream, std::make_unique<LaunchOperation>(*function, grid, block, dynamic_shared, arguments));
}

// --- Graphs.

XT_EXPORT int cuStreamBeginCapture_v2(Stream* stream, int mode) {
    if (int error = lost()) return error;
    // The default stream cannot be recorded.
    if (uintptr_t(stream) <= 2 || stream->recording) return CAPTURE_UNSUPPORTED;
    std::lock_guard guard(streams_lock);
    stream->recording = true;
    stream->spoiled = false;
    stream->mode = Mode(mode);
    stream->recorder = std::this_thread::get_id();
    recording.push_back(stream);
    return SUCCESS;
}

XT_EXPORT int cuStreamIsCapturing(Stream* handle, int* status) {
    const Stream& stream = stream_of(handle);
    *status = stream.spoiled ? 2 : stream.recording ? 1 : 0;
    return lost();
}

XT_EXPORT int cuStreamEndCapture(Stream* stream, Graph** graph) {
    *graph = nullptr;
    if (uintptr_t(stream) <= 2 || !stream->recording) return ILLEGAL_STATE;
    std::lock_guard guard(streams_lock);
    stream->recording = false;
    std::erase(recording, stream);
    Graph recorded = std::move(stream->recorded);
    stream->recorded.clear();
    if (stream->spoiled) {
        stream->spoiled = false;
        return CAPTURE_INVALIDATED;
    }
    *graph = new Graph(std::move(recorded));
    count_alive(GRAPH, 1);
    return lost();
}

XT_EXPORT int cuGraphInstantiateWithFlags(Graph** executable, const Graph* graph, unsigned long long) {
    *executable = new Graph(*graph);
    count_alive(EXECUTABLE, 1);
    return lost();
}

XT_EXPORT int cuGraphUpload(const Graph*, Stream*) { return lost(); }

XT_EXPORT int cuGraphLaunch(const Graph* executable, Stream* stream) {
    if (int error = lost()) return error;
    if (stream_of(stream).recording) return CAPTURE_UNSUPPORTED;
    catch_up();
    for (const std::shared_ptr<Operation>& operation : *executable) {
        if (int error = operation->run()) return error;
    }
    return SUCCESS;
}

XT_EXPORT int cuGraphExecDestroy(Graph* executable) {
    delete executable;
    count_alive(EXECUTABLE, -1);
    return lost();
}

XT_EXPORT int cuGraphDestroy(Graph* graph) {
    delete graph;
    count_alive(GRAPH, -1);
    return lost();
}
