// Order in which threads and blocks run. Kernels must not depend on it.

#pragma once

#include <algorithm>
#include <random>

#include "fibers.h"

namespace xt {

enum class Order { FORWARD, REVERSE, RANDOM };

// Returns the order given by XT_EMULATOR_ORDER.
Order order();

// Calls body(i) for each i below n in this order; stops when it returns false.
template <typename Body> bool in_order(uint64_t n, Body body) {
    switch (order()) {
        case Order::FORWARD:
            for (uint64_t i = 0; i < n; ++i) {
                if (!body(i)) return false;
            }
            return true;
        case Order::REVERSE:
            for (uint64_t i = n; i-- > 0;) {
                if (!body(i)) return false;
            }
            return true;
        case Order::RANDOM: {
            thread_local std::minstd_rand random;
            std::vector<uint64_t> shuffled(n);
            for (uint64_t i = 0; i < n; ++i) shuffled[i] = i;
            std::shuffle(shuffled.begin(), shuffled.end(), random);
            for (uint64_t i : shuffled) {
                if (!body(i)) return false;
            }
            return true;
        }
    }
    return true;
}

}  // namespace xt
