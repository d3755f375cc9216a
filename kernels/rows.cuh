// Rows that a warp, or several warps of one block, hold in registers, so that each is read once: up to HELD packets per
// thread. A row that is longer or not made of packets is read again each time, from the caches if it stays there, in
// the same order: sums do not depend on where a row starts.

typedef Element<T>::Acc Acc;

// Maximum threads of a block, and minimum blocks per multiprocessor: enough loads in flight for its share of the
// bandwidth.
constexpr u32 ROW_THREADS = 256, ROW_BLOCKS = sizeof(T) == 2 ? 4 : 2;

// Packets of a row that a thread holds: 32 elements, 16 of f64.
constexpr u32 HELD = sizeof(T) == 2 ? 4 : 8;

// First column of a thread: the HELD packets of the threads of a warp are interleaved, so that those of a thread have
// constant distances. Columns and pointers are relative to it; `left` columns remain, or none.
constexpr u32 APART = 32 * LANES;

__device__ __forceinline__ u32 first_column() {
    return (threadIdx.x / 32 * 32 * HELD + threadIdx.x % 32) * LANES;
}

// Elements j, j + 1, … as a packet, zeros past the end of the row; and back. PACKED rows are aligned, and no packet
// crosses their end.
template <bool PACKED> __device__ __forceinline__ Packet<LANES> fetch(const T* from, i32 j, i32 left) {
    if constexpr (PACKED) {
        return Raw<LANES>(from + j, j < left);
    } else {
        Packet<LANES> packet = {};
#pragma unroll
        for (int lane = 0; lane < LANES; ++lane) {
            if (j + lane < left) packet.lane[lane] = from[j + lane];
        }
        return packet;
    }
}

template <bool PACKED> __device__ __forceinline__ void put(T* to, i32 j, i32 left, const Packet<LANES>& packet) {
    if constexpr (PACKED) {
        if (j < left) store(to + j, packet);
    } else {
#pragma unroll
        for (int lane = 0; lane < LANES; ++lane) {
            if (j + lane < left) to[j + lane] = packet.lane[lane];
        }
    }
}

// Calls f(lane) for the lanes of the packet at j < left that lie in the row.
template <bool PACKED, typename F> __device__ __forceinline__ void for_lanes(i32 j, i32 left, F f) {
#pragma unroll
    for (int lane = 0; lane < LANES; ++lane) {
        if (PACKED || j + lane < left) f(lane);
    }
}

// Calls body(j, k) for the packets of this thread. Either all are in registers or none: a row that is longer or not
// made of packets takes several rounds, in the same order.
template <bool PACKED, typename Body> __device__ __forceinline__ void for_packets(i32 left, Body body) {
    if constexpr (PACKED) {
#pragma unroll
        for (u32 k = 0; k < HELD; ++k) {
            if ((i32)(k * APART) < left) body(k * APART, k);
        }
    } else {
#pragma unroll 1
        for (i32 round = 0; round < left; round += HELD * LANES * blockDim.x) {
#pragma unroll 1
            for (i32 j = round; j < min(round + (i32)(HELD * APART), left); j += APART) body(j, 0);
        }
    }
}

// One thread's part of a row.
template <bool PACKED> struct Row {
    const T* from;
    i32 left;
    Raw<LANES> held[HELD];

    __device__ __forceinline__ Row(const T* from, i32 left) : from(from), left(left) {
        if constexpr (PACKED) {
#pragma unroll
            for (u32 k = 0; k < HELD; ++k) held[k] = Raw<LANES>(from + k * APART, (i32)(k * APART) < left);
        }
    }

    __device__ __forceinline__ Packet<LANES> at(i32 j, u32 k) const {
        if constexpr (PACKED) {
            return held[k];
        } else {
            return fetch<PACKED>(from, j, left);
        }
    }

    // Placed between two walks over the row, which would otherwise keep common values in more registers.
    __device__ __forceinline__ void forget() {
        if constexpr (PACKED) {
#pragma unroll
            for (u32 k = 0; k < HELD; ++k) held[k].forget();
        }
    }

    // Adds another row; the sum is written, and where registers do not hold it, read from there from now on by the
    // threads that wrote it.
    __device__ __forceinline__ void add(T* sum, const T* other) {
        const Row others(other, left);
        for_packets<PACKED>(left, [&](i32 j, u32 k) {
            auto values = at(j, k);
            const auto summands = others.at(j, k);
#pragma unroll
            for (int lane = 0; lane < LANES; ++lane) {
                const Acc total = Element<T>::to_acc(values.lane[lane]) + Element<T>::to_acc(summands.lane[lane]);
                values.lane[lane] = Element<T>::from_acc(total);
            }
            put<PACKED>(sum, j, left, values);
            if (PACKED) held[k] = values;
        });
        from = sum;
    }

    // The sum of f(x_j) over the row.
    template <typename F> __device__ __forceinline__ Acc sum(F f) const {
        Acc total = 0;
        for_packets<PACKED>(left, [&](i32 j, u32 k) {
            const auto values = at(j, k);
            Acc of_packet = 0;
            for_lanes<PACKED>(j, left, [&](int lane) { of_packet += f(Element<T>::to_acc(values.lane[lane])); });
            total += of_packet;
        });
        return sum_row(total);
    }

    // The same for rare rows: reads them again, with little code.
    template <typename F> __device__ __forceinline__ Acc sum_again(F f) const {
        Acc total = 0;
        again([&](i32 j) {
            const auto values = fetch<PACKED>(from, j, left);
            for_lanes<PACKED>(j, left, [&](int lane) { total += f(Element<T>::to_acc(values.lane[lane])); });
        });
        return sum_row(total);
    }

    // Calls body(j) for the packets of this thread.
    template <typename Body> __device__ __forceinline__ void again(Body body) const {
        for_packets<false>(left, [&](i32 j, u32) { body(j); });
    }
};
