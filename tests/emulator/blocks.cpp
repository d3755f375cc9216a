// Runs the blocks of a kernel's grid, on several OS threads where that is faster.

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <thread>

#include "order.h"

namespace xt {
namespace {

// Minimum estimated time of the remaining blocks for which helper threads are woken.
constexpr std::chrono::microseconds WORTH_HELP(300);

struct Team {
    std::mutex lock;
    std::condition_variable begun, ended;
    unsigned helpers = 0, helping = 0;
    uint64_t launches = 0;
    // State of the launch that the helpers work on.
    const Launch* launch = nullptr;
    uint64_t blocks = 0;
    std::atomic<uint64_t> next{0};
    std::atomic<bool> failed{false};
    // Held by the thread whose launch the team runs.
    std::mutex taken;

    Team() {
        const char* const given = getenv("XT_EMULATOR_THREADS");
        const unsigned threads = given != nullptr ? atoi(given) : std::min(std::thread::hardware_concurrency(), 4u);
        // A given order is that of a single thread.
        if (getenv("XT_EMULATOR_ORDER") != nullptr) return;
        for (; helpers + 1 < threads; ++helpers) std::thread([this] { help(); }).detach();
    }

    void work(Worker& worker) {
        for (uint64_t block; !failed && (block = next++) < blocks;) {
            if (!worker.run_block(block)) failed = true;
        }
    }

    void help() {
        uint64_t seen = 0;
        std::unique_lock guard(lock);
        for (;;) {
            begun.wait(guard, [&] { return launch != nullptr && launches != seen; });
            seen = launches;
            ++helping;
            Worker& worker = Worker::prepared(*launch);
            guard.unlock();
            work(worker);
            guard.lock();
            if (--helping == 0) ended.notify_all();
        }
    }

    bool run(Worker& worker, const Launch& given, uint64_t first, uint64_t count) {
        {
            std::lock_guard guard(lock);
            launch = &given;
            blocks = count;
            next = first;
            failed = false;
            ++launches;
        }
        begun.notify_all();
        work(worker);
        // Helpers that have not joined by now are not waited for.
        std::unique_lock guard(lock);
        launch = nullptr;
        ended.wait(guard, [&] { return helping == 0; });
        return !failed;
    }
};

Team& team() {
    // Never destroyed: its threads may outlive everything.
    static Team* const team = new Team;
    return *team;
}

}  // namespace

Order order() {
    static const Order order = [] {
        const char* const name = getenv("XT_EMULATOR_ORDER");
        if (name == nullptr || strcmp(name, "forward") == 0) return Order::FORWARD;
        if (strcmp(name, "reverse") == 0) return Order::REVERSE;
        if (strcmp(name, "random") == 0) return Order::RANDOM;
        report(std::string("XT_EMULATOR_ORDER is forward, reverse or random; got ") + name);
        return Order::FORWARD;
    }();
    return order;
}

bool run(const Launch& launch) {
    Worker& worker = Worker::prepared(launch);
    const uint64_t blocks = uint64_t(launch.grid.x) * launch.grid.y * launch.grid.z;
    if (blocks == 1 || team().helpers == 0) {
        return in_order(blocks, [&](uint64_t block) { return worker.run_block(block); });
    }
    const auto start = std::chrono::steady_clock::now();
    for (uint64_t block = 0; block < blocks; ++block) {
        const uint64_t left = blocks - block;
        if (block > 0 && (std::chrono::steady_clock::now() - start) / block * left > WORTH_HELP) {
            // Unless the launch of another thread holds the team.
            std::unique_lock mine(team().taken, std::try_to_lock);
            if (mine) return team().run(worker, launch, block, blocks);
        }
        if (!worker.run_block(block)) return false;
    }
    return true;
}

}  // namespace xt
