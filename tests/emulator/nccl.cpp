// NCCL between processes of one machine, over a file that they map. Each communicator has a thread, which does its
// operations in order; what a stream does next waits for them, as it would on a card. Sums begin at the next rank of a
// ring, so that their order is not that of ranks.

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <mutex>
#include <thread>

#include "emulator.h"

namespace xt {
namespace {

enum Code { OK = 0, SYSTEM_ERROR = 2, INTERNAL_ERROR = 3, INVALID_ARGUMENT = 4, INVALID_USAGE = 5, REMOTE_ERROR = 6, IN_PROGRESS = 7 };
constexpr unsigned SIZES[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};
constexpr int FLOAT = 7, DOUBLE = 8;
constexpr unsigned MOST = 16;
constexpr size_t SLOT = 256 << 10;
constexpr uint64_t LIVELY = 0x6c63636e5f7478;
enum Kind : uint32_t { ALL_REDUCE = 1, REDUCE_SCATTER, ALL_GATHER, BROADCAST, EXCHANGE };

struct Id {
    char bytes[128];
};

struct Config {
    size_t size;
    unsigned magic, version;
    int blocking;
};

struct What {
    uint32_t kind, type, root, unused;
    uint64_t count;
};

// State of a rank that the others see.
struct Seat {
    std::atomic<uint32_t> process;
    std::atomic<uint64_t> arrived;
    What what;
};

struct Shared {
    std::atomic<uint32_t> joined;
    Seat seats[MOST];
    char slots[];
};

// Operations that were begun and have not ended, of all communicators.
std::mutex pending_lock;
std::condition_variable pending_changed;
unsigned pending = 0;

thread_local char last_error[256];

bool has_ended(uint32_t process) {
    char path[64], text[512];
    snprintf(path, sizeof path, "/proc/%u/stat", process);
    FILE* const file = fopen(path, "r");
    if (file == nullptr) return true;
    const size_t bytes = fread(text, 1, sizeof text - 1, file);
    fclose(file);
    text[bytes] = 0;
    const char* const name = strrchr(text, ')');
    return name == nullptr || name[1] == 0 || name[2] == 'Z' || name[2] == 'X';
}

struct Comm {
    unsigned rank, size;
    bool blocking;
    std::string path;
    Shared* shared = nullptr;
    std::atomic<int> state{IN_PROGRESS};
    std::atomic<bool> aborted{false};
    uint64_t turns = 0;
    std::thread thread;
    std::mutex lock;
    std::condition_variable changed;
    std::deque<std::function<void()>> queue;
    bool closed = false;
    char error[256] = "";

    size_t bytes() const { return sizeof(Shared) + size * SLOT; }
    char* slot(unsigned of) { return shared->slots + of * SLOT; }

    void fail(Code code, const char* what) {
        snprintf(error, sizeof error, "%s", what);
        state = code;
    }

    template <typename Ready> bool wait(Ready ready) {
        static const bool detects = getenv("XT_EMULATOR_NCCL_DETECTS") != nullptr;
        for (unsigned looks = 0; !ready(); ++looks) {
            if (aborted) return false;
            usleep(20);
            if (!detects || shared == nullptr || looks % 1000 != 0 || state != OK) continue;
            for (unsigned other = 0; other < size; ++other) {
                const uint32_t process = shared->seats[other].process;
                // The operation hangs until it is aborted, as kernels do.
                if (process != 0 && has_ended(process)) fail(REMOTE_ERROR, "a remote process has exited");
            }
        }
        return true;
    }

    bool meet() {
        const uint64_t turn = ++turns;
        shared->seats[rank].arrived = turn;
        return wait([&] {
            for (unsigned other = 0; other < size; ++other) {
                if (shared->seats[other].arrived < turn) return false;
            }
            return true;
        });
    }

    void join() {
        const int file = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
        if (file < 0 || ftruncate(file, bytes()) != 0) {
            fail(SYSTEM_ERROR, "no shared memory");
            return;
        }
        void* const got = mmap(nullptr, bytes(), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
        close(file);
        if (got == MAP_FAILED) {
            fail(SYSTEM_ERROR, "no shared memory");
            return;
        }
        shared = static_cast<Shared*>(got);
        Seat& seat = shared->seats[rank];
        if (seat.process.exchange(getpid()) != 0) {
            fail(INVALID_USAGE, "two processes have the same rank");
            return;
        }
        ++shared->joined;
        if (!wait([&] { return shared->joined >= size; })) return;
        unlink(path.c_str());
        state = OK;
    }

    void push(std::function<void()> work) {
        std::lock_guard guard(lock);
        queue.push_back(std::move(work));
        changed.notify_one();
    }

    void work() {
        for (;;) {
            std::unique_lock guard(lock);
            changed.wait(guard, [&] { return closed || !queue.empty(); });
            if (queue.empty()) return;
            const std::function<void()> next = std::move(queue.front());
            queue.pop_front();
            guard.unlock();
            next();
        }
    }

    void end() {
        {
            std::lock_guard guard(lock);
            closed = true;
            changed.notify_one();
        }
        thread.join();
        if (shared != nullptr) munmap(shared, bytes());
        unlink(path.c_str());
        delete this;
    }
};

// Work of one rank.
struct Work {
    Comm* comm;
    What what;
    const char* from;
    char* to;
    // Of an exchange, with each rank.
    const char* sent[MOST];
    char* received[MOST];

    size_t element() const { return SIZES[what.type]; }

    bool agrees() {
        for (unsigned other = 0; other < comm->size; ++other) {
            if (memcmp(&comm->shared->seats[other].what, &what, sizeof what) != 0) {
                report("ranks of NCCL do not call the same operation");
                comm->fail(INTERNAL_ERROR, "ranks do not call the same operation");
                return false;
            }
        }
        return true;
    }

    template <typename T> void add(size_t at, size_t count, unsigned first, T* to) {
        for (size_t i = 0; i < count; ++i) {
            T sum = 0;
            for (unsigned step = 0; step < comm->size; ++step) {
                const char* const slot = comm->slot((first + step) % comm->size);
                T x;
                memcpy(&x, slot + at + i * sizeof(T), sizeof(T));
                sum = step == 0 ? x : sum + x;
            }
            memcpy(to + i, &sum, sizeof(T));
        }
    }

    void sum(size_t at, size_t count, unsigned first, char* to) {
        if (what.type == FLOAT) add(at, count, first, reinterpret_cast<float*>(to));
        else add(at, count, first, reinterpret_cast<double*>(to));
    }

    void run() {
        Comm& self = *comm;
        const unsigned size = self.size, rank = self.rank;
        if (self.shared == nullptr) return;
        self.shared->seats[rank].what = what;
        const size_t total = what.count * element();
        const bool parts = what.kind == REDUCE_SCATTER || what.kind == EXCHANGE;
        const size_t step = (parts ? SLOT / size : SLOT) / 8 * 8;
        for (size_t start = 0; start < total; start += step) {
            const size_t bytes = total - start < step ? total - start : step;
            char* const own = self.slot(rank);
            switch (what.kind) {
                case BROADCAST:
                    if (rank == what.root) memcpy(own, from + start, bytes);
                    break;
                case REDUCE_SCATTER:
                    for (unsigned other = 0; other < size; ++other) memcpy(own + other * step, from + other * total + start, bytes);
                    break;
                case EXCHANGE:
                    for (unsigned other = 0; other < size; ++other) memcpy(own + other * step, sent[other] + start, bytes);
                    break;
                default: memcpy(own, from + start, bytes);
            }
            if (!self.meet() || !agrees()) return;
            switch (what.kind) {
                case ALL_REDUCE: {
                    // Each rank's part of the ring begins with the next one.
                    const size_t share = (what.count + size - 1) / size;
                    for (size_t at = 0; at < bytes;) {
                        const size_t index = (start + at) / element(), part = index / share;
                        size_t count = (part + 1) * share - index;
                        if (count * element() > bytes - at) count = (bytes - at) / element();
                        sum(at, count, part + 1, to + start + at);
                        at += count * element();
                    }
                    break;
                }
                case REDUCE_SCATTER: sum(rank * step, bytes / element(), rank + 1, to + start); break;
                case ALL_GATHER:
                    for (unsigned other = 0; other < size; ++other) memcpy(to + other * total + start, self.slot(other), bytes);
                    break;
                case BROADCAST: memcpy(to + start, self.slot(what.root), bytes); break;
                case EXCHANGE:
                    for (unsigned other = 0; other < size; ++other) memcpy(received[other] + start, self.slot(other) + rank * step, bytes);
                    break;
            }
            if (!self.meet()) return;
        }
        const size_t written = what.kind == ALL_GATHER ? size * total : total;
        if (what.kind != EXCHANGE) mark_written(uintptr_t(to), written);
        for (unsigned other = 0; what.kind == EXCHANGE && other < size; ++other) mark_written(uintptr_t(received[other]), total);
    }
};

int refuse_call(Code code, const std::string& what) {
    report("NCCL: " + what);
    snprintf(last_error, sizeof last_error, "%s", what.c_str());
    return code;
}

int start(Comm* comm, const Work& work) {
    catch_up();
    if (shall_fail(NCCL)) {
        snprintf(comm->error, sizeof comm->error, "a failure on demand");
        return SYSTEM_ERROR;
    }
    if (comm->state != OK) return comm->state;
    comm->state = IN_PROGRESS;
    comm->push([work = Work(work), comm]() mutable {
        {
            std::lock_guard guard(pending_lock);
            ++pending;
        }
        comm->state = OK;
        work.run();
        std::lock_guard guard(pending_lock);
        --pending;
        pending_changed.notify_all();
    });
    return comm->blocking ? OK : IN_PROGRESS;
}

// Checks the memory of an operation; 0 if it is fine.
int check(Comm* comm, Stream* stream, const void* from, size_t sent, void* to, size_t received) {
    std::string why;
    if (comm == nullptr) return refuse_call(INVALID_ARGUMENT, "no communicator");
    if (is_recording(stream)) return refuse_call(INVALID_USAGE, "an operation in a graph");
    catch_up();
    if (from != nullptr && !may_read(uintptr_t(from), sent, why)) return refuse_call(INVALID_ARGUMENT, "an operation " + why);
    if (to != nullptr && !may_write(uintptr_t(to), received, why)) return refuse_call(INVALID_ARGUMENT, "an operation " + why);
    return OK;
}

int collective(Kind kind, const void* from, void* to, size_t count, int type, int root, Comm* comm, Stream* stream) {
    if (type < 0 || type >= 12) return refuse_call(INVALID_ARGUMENT, "an unknown type");
    const bool sums = kind == ALL_REDUCE || kind == REDUCE_SCATTER;
    if (sums && type != FLOAT && type != DOUBLE) return refuse_call(INVALID_ARGUMENT, "only f32 and f64 are summed here");
    if (comm == nullptr) return refuse_call(INVALID_ARGUMENT, "no communicator");
    if (root < 0 || unsigned(root) >= comm->size) return refuse_call(INVALID_ARGUMENT, "an unknown root");
    const size_t bytes = count * SIZES[type];
    const size_t sent = kind == REDUCE_SCATTER ? bytes * comm->size : bytes;
    const size_t received = kind == ALL_GATHER ? bytes * comm->size : bytes;
    if (int code = check(comm, stream, from, sent, to, received)) return code;
    Work work = {comm, {kind, uint32_t(type), uint32_t(root), 0, count}, static_cast<const char*>(from), static_cast<char*>(to), {}, {}};
    return start(comm, work);
}

struct Group {
    unsigned depth = 0;
    Work work = {};
    unsigned sends = 0, receives = 0;
    int code = OK;
};
thread_local Group group;

}  // namespace

bool collectives_pending() {
    std::lock_guard guard(pending_lock);
    return pending > 0;
}

void await_collectives() {
    std::unique_lock guard(pending_lock);
    pending_changed.wait(guard, [] { return pending == 0; });
}

}  // namespace xt

using namespace xt;

XT_EXPORT int ncclGetVersion(int* version) {
    const char* const text = getenv("XT_EMULATOR_NCCL");
    int major = 2, minor = 21, patch = 5;
    if (text != nullptr && sscanf(text, "%d.%d.%d", &major, &minor, &patch) != 3) report("XT_EMULATOR_NCCL is a version like 2.21.5");
    *version = major * ((major == 2 && minor < 9) ? 1000 : 10000) + minor * 100 + patch;
    return OK;
}

XT_EXPORT const char* ncclGetErrorString(int code) {
    switch (code) {
        case OK: return "no error";
        case SYSTEM_ERROR: return "unhandled system error";
        case INTERNAL_ERROR: return "internal error";
        case INVALID_ARGUMENT: return "invalid argument";
        case INVALID_USAGE: return "invalid usage";
        case REMOTE_ERROR: return "remote process exited or there was a network error";
        case IN_PROGRESS: return "NCCL operation in progress";
        default: return "unknown result code";
    }
}

XT_EXPORT const char* ncclGetLastError(Comm* comm) { return comm != nullptr && comm->error[0] != 0 ? comm->error : last_error; }

XT_EXPORT int ncclGetUniqueId(Id* id) {
    uint64_t number[2];
    if (getrandom(number, sizeof number, 0) != sizeof number) return SYSTEM_ERROR;
    memset(id, 0, sizeof *id);
    memcpy(id->bytes, &LIVELY, sizeof LIVELY);
    snprintf(id->bytes + 8, sizeof id->bytes - 8, "/dev/shm/xt-nccl-%016lx%016lx", number[0], number[1]);
    return OK;
}

XT_EXPORT int ncclCommInitRankConfig(Comm** comm, int size, Id id, int rank, Config* config) {
    if (comm == nullptr || config == nullptr || config->magic != 0xCAFEBEEF || config->size < sizeof(Config)) return refuse_call(INVALID_ARGUMENT, "a config that is none");
    if (memcmp(id.bytes, &LIVELY, sizeof LIVELY) != 0 || memchr(id.bytes, 0, sizeof id.bytes) == nullptr) return refuse_call(INVALID_ARGUMENT, "an id that is none");
    if (size < 1 || size > int(MOST) || rank < 0 || rank >= size) return refuse_call(INVALID_ARGUMENT, "a rank that is none");
    Comm* const made = new Comm;
    made->rank = rank;
    made->size = size;
    made->blocking = config->blocking != 0;
    made->path = id.bytes + 8;
    made->thread = std::thread([made] { made->work(); });
    made->push([made] { made->join(); });
    *comm = made;
    while (made->blocking && made->state == IN_PROGRESS) usleep(100);
    return made->blocking ? int(made->state) : IN_PROGRESS;
}

XT_EXPORT int ncclCommGetAsyncError(Comm* comm, int* state) {
    *state = comm->state;
    return OK;
}

XT_EXPORT int ncclCommFinalize(Comm* comm) {
    if (comm->state != OK) return comm->state;
    comm->state = IN_PROGRESS;
    comm->push([comm] { comm->state = OK; });
    return IN_PROGRESS;
}

XT_EXPORT int ncclCommDestroy(Comm* comm) {
    comm->end();
    return OK;
}

XT_EXPORT int ncclCommAbort(Comm* comm) {
    comm->aborted = true;
    comm->end();
    return OK;
}

XT_EXPORT int ncclAllReduce(const void* from, void* to, size_t count, int type, int sum, Comm* comm, Stream* stream) {
    if (sum != 0) return refuse_call(INVALID_ARGUMENT, "another operation than a sum");
    return collective(ALL_REDUCE, from, to, count, type, 0, comm, stream);
}

XT_EXPORT int ncclReduceScatter(const void* from, void* to, size_t count, int type, int sum, Comm* comm, Stream* stream) {
    if (sum != 0) return refuse_call(INVALID_ARGUMENT, "another operation than a sum");
    return collective(REDUCE_SCATTER, from, to, count, type, 0, comm, stream);
}

XT_EXPORT int ncclAllGather(const void* from, void* to, size_t count, int type, Comm* comm, Stream* stream) {
    return collective(ALL_GATHER, from, to, count, type, 0, comm, stream);
}

XT_EXPORT int ncclBroadcast(const void* from, void* to, size_t count, int type, int root, Comm* comm, Stream* stream) {
    return collective(BROADCAST, from, to, count, type, root, comm, stream);
}

XT_EXPORT int ncclGroupStart(void) {
    if (group.depth++ == 0) group = {1, {}, 0, 0, OK};
    return OK;
}

// Within a group, sends to all ranks and as many receipts, each of the same size.
static int exchange(const void* from, void* to, size_t count, int type, int peer, Comm* comm, Stream* stream) {
    if (group.depth == 0) return refuse_call(INVALID_USAGE, "ncclSend and ncclRecv outside of a group");
    if (type < 0 || type >= 12 || comm == nullptr || peer < 0 || unsigned(peer) >= comm->size) return refuse_call(INVALID_ARGUMENT, "a peer or type that is none");
    const size_t bytes = count * SIZES[type];
    if (int code = check(comm, stream, from, bytes, to, bytes)) return group.code = code;
    Work& work = group.work;
    const What what = {EXCHANGE, uint32_t(type), 0, 0, count};
    if (group.sends + group.receives > 0 && memcmp(&work.what, &what, sizeof what) != 0) return group.code = refuse_call(INVALID_USAGE, "a group of other sizes");
    work.comm = comm;
    work.what = what;
    if (from != nullptr) {
        work.sent[peer] = static_cast<const char*>(from);
        ++group.sends;
    } else {
        work.received[peer] = static_cast<char*>(to);
        ++group.receives;
    }
    return OK;
}

XT_EXPORT int ncclSend(const void* from, size_t count, int type, int peer, Comm* comm, Stream* stream) {
    return exchange(from, nullptr, count, type, peer, comm, stream);
}

XT_EXPORT int ncclRecv(void* to, size_t count, int type, int peer, Comm* comm, Stream* stream) {
    return exchange(nullptr, to, count, type, peer, comm, stream);
}

XT_EXPORT int ncclGroupEnd(void) {
    if (group.depth == 0) return refuse_call(INVALID_USAGE, "a group that was not begun");
    if (--group.depth > 0) return OK;
    if (group.code != OK) return group.code;
    if (group.sends + group.receives == 0) return OK;
    const unsigned size = group.work.comm->size;
    if (group.sends != size || group.receives != size) return refuse_call(INVALID_USAGE, "a group that does not reach all ranks");
    return start(group.work.comm, group.work);
}
