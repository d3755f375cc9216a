// Warpgroup products (wgmma of sm_90a); see "Asynchronous Warpgroup Level Matrix Instructions" in the PTX ISA.

#include <bit>
#include <cstring>

#include "fibers.h"

namespace xt {
namespace {

float half_to_float(uint16_t bits, bool bf16) {
    return bf16 ? std::bit_cast<float>(unsigned(bits) << 16) : xt_f16_to_f32(bits);
}

// "Matrix descriptor format": fields in units of 16 bytes.
struct Descriptor {
    uint32_t start, leading, stride;
    unsigned offset, swizzle;

    explicit Descriptor(uint64_t bits)
        : start((bits & 0x3FFF) << 4), leading((bits >> 16 & 0x3FFF) << 4), stride((bits >> 32 & 0x3FFF) << 4),
          offset(bits >> 49 & 7), swizzle(bits >> 62) {}
};

// Reads an operand, eight elements at a time.
struct Reader {
    const Thread& thread;
    const PartOfProduct& part;
    Descriptor at;

    // Elements 0 … 7 of the 16 bytes at an offset from the start. The swizzle applies to addresses.
    bool read(uint32_t distance, float* to) const {
        const uint32_t address = at.start + distance;
        const char* const from = read_by_product(thread, part, address ^ (address >> 7 & 7) << 4);
        if (from == nullptr) return false;
        uint16_t bits[8];
        memcpy(bits, from, sizeof bits);
        for (unsigned i = 0; i < 8; ++i) to[i] = half_to_float(bits[i], part.bf16);
        return true;
    }
};

// Returns the error in how the threads of a warpgroup start a product, or an empty string.
std::string difference(const PartOfProduct& a, const PartOfProduct& b) {
    const bool same = a.n == b.n && (a.a == nullptr) == (b.a == nullptr) && a.a_at == b.a_at && a.b_at == b.b_at &&
                      a.add == b.add && a.bf16 == b.bf16 && a.group == b.group;
    return same ? "" : "starts another wgmma than the first thread of its warpgroup";
}

bool multiply(Worker& worker, unsigned first, unsigned index) {
    const Thread& leader = *worker.running[first];
    const PartOfProduct& part = (*leader.products)[index];
    float a[64][16];
    static thread_local float b[16][256], d[64][256];
    const Descriptor b_at(part.b_at);
    for (const Descriptor& at : {b_at, part.a == nullptr ? Descriptor(part.a_at) : b_at}) {
        if (at.swizzle != 1 || at.offset != 0) {
            report(name_of(worker, first) + ": wgmma with a descriptor that has not the swizzle of 128 bytes, or an offset");
            return false;
        }
    }
    const Reader of_b = {leader, part, b_at};
    if (part.a == nullptr) {
        // "K-major": rows of 128 bytes; the stride leads from eight rows to the next.
        const Reader of_a = {leader, part, Descriptor(part.a_at)};
        for (unsigned row = 0; row < 64; ++row) {
            for (unsigned k = 0; k < 16; k += 8) {
                if (!of_a.read(row / 8 * of_a.at.stride + row % 8 * 128 + 2 * k, a[row] + k)) return false;
            }
        }
        for (unsigned column = 0; column < part.n; ++column) {
            float values[16];
            for (unsigned k = 0; k < 16; k += 8) {
                if (!of_b.read(column / 8 * b_at.stride + column % 8 * 128 + 2 * k, values + k)) return false;
            }
            for (unsigned k = 0; k < 16; ++k) b[k][column] = values[k];
        }
    } else {
        for (unsigned thread = 0; thread < WARPGROUP; ++thread) {
            const PartOfProduct& of = (*worker.running[first + thread]->products)[index];
            if (memcmp(of.a, of.copy, sizeof of.copy) != 0) {
                report(name_of(worker, first + thread) + ": the registers of a wgmma were changed before it was waited for");
                return false;
            }
            const unsigned group = thread % 32 / 4, pair = 2 * (thread % 4);
            for (unsigned i = 0; i < 8; ++i) {
                const unsigned row = thread / 32 * 16 + group + (i / 2 % 2 ? 8 : 0);
                const unsigned column = pair + i % 2 + (i >= 4 ? 8 : 0);
                a[row][column] = half_to_float(of.copy[i / 2] >> 16 * (i % 2), of.bf16);
            }
        }
        // "MN-major": rows of 64 columns; the leading stride is that to the next 64, the other from eight rows to the
        // next.
        for (unsigned k = 0; k < 16; ++k) {
            for (unsigned column = 0; column < part.n; column += 8) {
                const uint32_t at = column / 64 * b_at.leading + column % 64 * 2 + k / 8 * b_at.stride + k % 8 * 128;
                if (!of_b.read(at, b[k] + column)) return false;
            }
        }
    }
    // Thread t holds rows r = 16 (t / 32) + t % 32 / 4 and r + 8 of d, and columns 8 j + 2 (t % 4) and the next.
    const auto each = [&](auto&& apply) {
        for (unsigned thread = 0; thread < WARPGROUP; ++thread) {
            float* const values = (*worker.running[first + thread]->products)[index].d;
            const unsigned row = thread / 32 * 16 + thread % 32 / 4, column = 2 * (thread % 4);
            for (unsigned i = 0; i < part.n / 2; ++i) {
                apply(values[i], d[row + i / 2 % 2 * 8][i / 4 * 8 + column + i % 2]);
            }
        }
    };
    if (part.add) {
        each([](float of_thread, float& sum) { sum = of_thread; });
    } else {
        memset(d, 0, sizeof d);
    }
    for (unsigned row = 0; row < 64; ++row) {
        for (unsigned k = 0; k < 16; ++k) {
            const float factor = a[row][k];
            for (unsigned column = 0; column < part.n; ++column) d[row][column] += factor * b[k][column];
        }
    }
    each([](float& of_thread, float sum) { of_thread = sum; });
    return true;
}

// Computes the products whose groups the warpgroup waits for.
void run_products(Worker& worker, unsigned first) {
    const std::vector<PartOfProduct>& parts = *worker.running[first]->products;
    unsigned done = 0;
    for (; done < parts.size() && parts[done].group < worker.running[first]->wait_for; ++done) {
        for (unsigned other = first; other < first + WARPGROUP; ++other) {
            const std::vector<PartOfProduct>& theirs = *worker.running[other]->products;
            const std::string what = done < theirs.size() ? difference(parts[done], theirs[done])
                                                          : "leaves out a wgmma of its warpgroup";
            if (what.empty()) continue;
            report(name_of(worker, other) + ": " + what);
            worker.failed = true;
            return yield();
        }
        if (!multiply(worker, first, done)) {
            worker.failed = true;
            return yield();
        }
    }
    for (unsigned thread = first; thread < first + WARPGROUP; ++thread) {
        std::vector<PartOfProduct>& mine = *worker.running[thread]->products;
        mine.erase(mine.begin(), mine.begin() + done);
    }
}

}  // namespace
}  // namespace xt

using namespace xt;

XT_EXPORT void xt_fence_async(void) {
    const Thread& thread = *self();
    thread.worker->tick();
    thread.worker->fenced[thread.number] = thread.worker->now;
}

XT_EXPORT void xt_wgmma_fence(void) { self()->fenced_products = true; }

XT_EXPORT void xt_wgmma(float* d, unsigned n, const unsigned* a, unsigned long long a_at, unsigned long long b_at, bool add,
                        bool bf16) {
    Thread& thread = *self();
    if (!thread.fenced_products) fail("wgmma without wgmma.fence since the last wait");
    PartOfProduct part = {d, n, a, a_at, b_at, add, bf16, thread.product_groups, {}, thread.worker->now,
                          thread.worker->last_barrier};
    if (a != nullptr) memcpy(part.copy, a, sizeof part.copy);
    thread.products->push_back(part);
}

XT_EXPORT void xt_wgmma_commit(void) { ++self()->product_groups; }

XT_EXPORT void xt_wgmma_wait(const XtPlace* place, unsigned groups) {
    Thread& thread = *self();
    thread.wait_for = thread.product_groups > groups ? thread.product_groups - groups : 0;
    thread.fenced_products = false;
    gather_warpgroup(place, run_products);
}
