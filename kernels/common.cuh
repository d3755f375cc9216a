// Shared by all kernels: element types, layouts, 128-bit packets, and reductions over the threads of a row.
//
// A source is compiled once per element type, named like the crate's dtype: -DDTYPE=f32, f64, bf16, f16, i64 or bool.
// Names for several of them, which the variants of a source may use:
// Types: FLOATS=f32,f64,bf16,f16 HALVES=bf16,f16
// Sources call it T; the option cannot be -DT itself, because NVRTC's built-in headers have template parameters T.
// NVRTC has no include path, so that half types are defined here, with conversions by PTX where the card has them.

typedef int i32;
typedef unsigned int u32;
typedef long long i64;
typedef unsigned long long u64;
typedef float f32;
typedef double f64;

struct bf16 {
    unsigned short bits;
};

struct f16 {
    unsigned short bits;
};

#include "ptx.cuh"

typedef DTYPE T;

// Type that an element is computed in: f32 for the half types, itself otherwise. Stores round to nearest even.
template <typename E> struct Element;

template <> struct Element<f32> {
    typedef f32 Acc;
    static __device__ __forceinline__ f32 to_acc(f32 x) { return x; }
    static __device__ __forceinline__ f32 from_acc(f32 x) { return x; }
};

template <> struct Element<f64> {
    typedef f64 Acc;
    static __device__ __forceinline__ f64 to_acc(f64 x) { return x; }
    static __device__ __forceinline__ f64 from_acc(f64 x) { return x; }
};

template <> struct Element<f16> {
    typedef f32 Acc;
    static __device__ __forceinline__ f32 to_acc(f16 x) { return ptx_f16_to_f32(x.bits); }
    static __device__ __forceinline__ f16 from_acc(f32 x) { return {ptx_f32_to_f16(x)}; }
};

template <> struct Element<bf16> {
    typedef f32 Acc;
    static __device__ __forceinline__ f32 to_acc(bf16 x) { return __uint_as_float((u32)x.bits << 16); }
    static __device__ __forceinline__ bf16 from_acc(f32 x) {
#if __CUDA_ARCH__ >= 800
        return {ptx_f32_to_bf16(x)};
#else
        // Cards before sm_80 have no bf16 instruction. NaN becomes 0x7FFF, as it does there.
        const u32 bits = __float_as_uint(x);
        return {(unsigned short)(x != x ? 0x7FFF : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
#endif
    }
};

// Integers and truth values are only moved and compared.
template <> struct Element<i64> {
    typedef i64 Acc;
    static __device__ __forceinline__ i64 to_acc(i64 x) { return x; }
    static __device__ __forceinline__ i64 from_acc(i64 x) { return x; }
};

template <> struct Element<bool> {
    typedef bool Acc;
    static __device__ __forceinline__ bool to_acc(bool x) { return x; }
    static __device__ __forceinline__ bool from_acc(bool x) { return x; }
};

// The element nearest to a number: floats round to nearest even, once; integers truncate and saturate, NaN being 0;
// a truth value is true if the number is not 0.
template <typename E> __device__ __forceinline__ E from_f64(f64 x) {
    if constexpr (sizeof(E) == 2) {
        // To f32 first, with the last bit set if any bits were cut off: rounding that equals rounding x itself.
        const f32 nearest = (f32)x;
        const bool cut = (f64)nearest != x, away = fabs((f64)nearest) > fabs(x);
        return Element<E>::from_acc(__uint_as_float((__float_as_uint(nearest) - away) | cut));
    } else {
        return (E)x;
    }
}
template <> __device__ __forceinline__ bool from_f64<bool>(f64 x) { return x != 0; }
template <> __device__ __forceinline__ i64 from_f64<i64>(f64 x) {
    constexpr i64 MAX = 0x7FFFFFFFFFFFFFFF;
    if (x != x) return 0;
    return x >= 9223372036854775808.0 ? MAX : x < -9223372036854775808.0 ? -MAX - 1 : (i64)x;
}

// The lowest finite number: the start of a running maximum. exp(lowest - lowest) is 1, where infinities give NaN.
template <typename A> __device__ __forceinline__ A lowest();
template <> __device__ __forceinline__ f32 lowest<f32>() { return -3.4028234663852886e38f; }
template <> __device__ __forceinline__ f64 lowest<f64>() { return -1.7976931348623157e308; }

template <typename A> __device__ __forceinline__ A negative_infinity();
template <> __device__ __forceinline__ f32 negative_infinity<f32>() { return __int_as_float(0xFF800000); }
template <> __device__ __forceinline__ f64 negative_infinity<f64>() { return __longlong_as_double(0xFFF0000000000000); }

// Layout of a tensor: sizes and steps of its dimensions, outermost first, all counted in elements. Passed by value; the
// same bytes as the struct that the launch fills.
constexpr int MAX_RANK = 6;

struct Layout {
    u32 rank;
    u32 dims[MAX_RANK];
    u32 unused;
    i64 strides[MAX_RANK];
    i64 offset;

    // Position of element `i` in row-major order.
    __device__ __forceinline__ i64 position(i64 i) const;
};
static_assert(sizeof(Layout) == 88, "Layout must have the size that the launch passes");

// Returns the remainder of i / size; i becomes the quotient. In 32 bits where they suffice: GPUs have no 64-bit
// division.
__device__ __forceinline__ u32 divide(u64& i, u32 size) {
    const u64 whole = i;
    i = whole >> 32 == 0 ? (u32)whole / size : whole / size;
    return (u32)whole - (u32)i * size;
}

// Positions of element `i` in row-major order, in tensors of one shape whose layouts differ in strides and offset.
template <int COUNT> struct Positions {
    i64 of[COUNT];
};

// Unrolled, so that the arrays of the layouts are read straight from the parameters.
template <typename... Others>
__device__ __forceinline__ Positions<1 + sizeof...(Others)> positions(u64 i, const Layout& first,
                                                                      const Others&... others) {
    Positions<1 + sizeof...(Others)> at = {{first.offset, others.offset...}};
#pragma unroll
    for (int dim = MAX_RANK - 1; dim >= 0; --dim) {
        if (dim >= first.rank) continue;
        const i64 along = dim > 0 ? divide(i, first.dims[dim]) : i;
        int n = 0;
        at.of[n++] += along * first.strides[dim];
        ((at.of[n++] += along * others.strides[dim]), ...);
    }
    return at;
}

__device__ __forceinline__ i64 Layout::position(i64 i) const { return positions(i, *this).of[0]; }

// Elements of one 128-bit access.
constexpr int LANES = 16 / sizeof(T);

// N consecutive elements, read and written at once.
template <int N, typename E = T> struct alignas(N * sizeof(E)) Packet {
    E lane[N];
};

template <int N, typename E> __device__ __forceinline__ Packet<N, E> load(const E* from) {
    if constexpr (sizeof(Packet<N, E>) == 16) {
        const uint4 raw = *reinterpret_cast<const uint4*>(from);
        Packet<N, E> packet;
        memcpy(&packet, &raw, sizeof(raw));
        return packet;
    } else {
        return *reinterpret_cast<const Packet<N, E>*>(from);
    }
}

// The same, from addresses that are aligned for a packet only if `packed`.
template <int N, typename E> __device__ __forceinline__ Packet<N, E> load(const E* from, bool packed) {
    if (packed) return load<N>(from);
    Packet<N, E> packet;
#pragma unroll
    for (int lane = 0; lane < N; ++lane) packet.lane[lane] = from[lane];
    return packet;
}

template <int N, typename E> __device__ __forceinline__ void store(E* to, const Packet<N, E>& packet) {
    if constexpr (sizeof(packet) == 16) {
        uint4 raw;
        memcpy(&raw, &packet, sizeof(raw));
        ptx_store_128(to, raw);
    } else {
        *reinterpret_cast<Packet<N, E>*>(to) = packet;
    }
}

// The elements of a packet of 128 bits. Half types are extracted by shifts, which fuse with the conversion to f32 into
// one instruction; extracting them as bytes would take two or three.
template <int N, typename E> __device__ __forceinline__ Packet<N, E> unpack(const u32 (&part)[4]) {
    Packet<N, E> packet;
    if constexpr (sizeof(E) == 2) {
#pragma unroll
        for (int lane = 0; lane < N; ++lane) {
            const unsigned short bits = (unsigned short)(part[lane / 2] >> (lane % 2 * 16));
            memcpy(&packet.lane[lane], &bits, sizeof(bits));
        }
    } else {
        memcpy(&packet, part, sizeof(part));
    }
    return packet;
}

// A packet of 128 bits as in memory, for holding in registers: unpacked lanes of half types would take a register each.
// `forget` makes the compiler unpack it again instead of keeping the unpacked values.
template <int N, typename E = T> struct Raw {
    u32 part[4] = {};

    Raw() = default;
    __device__ __forceinline__ Raw(const Packet<N, E>& packet) {
        static_assert(sizeof(packet) == 16, "a packet of 128 bits");
        memcpy(part, &packet, sizeof(part));
    }

    // Elements from an aligned address, zeros if not `inside`, where nothing is read.
    __device__ __forceinline__ Raw(const E* from, bool inside) {
        if (!inside) return;
        const uint4 raw = *reinterpret_cast<const uint4*>(from);
        part[0] = raw.x, part[1] = raw.y, part[2] = raw.z, part[3] = raw.w;
    }

    // Elements from any address, the first `count` of them and then `rest`, read one by one with little code.
    __device__ __forceinline__ Raw(const E* from, i32 count, E rest = {}) {
#pragma unroll 1
        for (i32 lane = 0; lane < N; ++lane) {
            E value = rest;
            if (lane < count) value = from[lane];
            append(value);
        }
    }

    // Moves all elements one lane down and appends another one.
    __device__ __forceinline__ void append(E value) {
        constexpr int WORDS = sizeof(E) / 4;
        if constexpr (sizeof(E) == 1) {
#pragma unroll
            for (int i = 0; i < 3; ++i) part[i] = part[i] >> 8 | part[i + 1] << 24;
            part[3] = part[3] >> 8 | (u32)value << 24;
        } else if constexpr (WORDS == 0) {
            unsigned short bits;
            memcpy(&bits, &value, sizeof(bits));
#pragma unroll
            for (int i = 0; i < 3; ++i) part[i] = part[i] >> 16 | part[i + 1] << 16;
            part[3] = part[3] >> 16 | (u32)bits << 16;
        } else {
#pragma unroll
            for (int i = 0; i < 4 - WORDS; ++i) part[i] = part[i + WORDS];
            memcpy(part + (4 - WORDS), &value, sizeof(value));
        }
    }

    __device__ __forceinline__ operator Packet<N, E>() const { return unpack<N, E>(part); }

    __device__ __forceinline__ void forget() {
#pragma unroll
        for (u32& one : part) one = ptx_opaque(one);
    }
};

// Like Raw, for packets of any width.
template <int N, typename E> struct Few {
    Packet<N, E> packet = {};

    Few() = default;
    __device__ __forceinline__ Few(const E* from, bool inside) {
        if (inside) packet = load<N>(from);
    }
    __device__ __forceinline__ operator Packet<N, E>() const { return packet; }
};

template <int N, typename E, bool WIDE = N * sizeof(E) == 16> struct KeptAs {
    typedef Raw<N, E> Type;
};
template <int N, typename E> struct KeptAs<N, E, false> {
    typedef Few<N, E> Type;
};

// N consecutive elements that are read some time before they are used: Kept<N>(from, inside).
template <int N, typename E = T> using Kept = typename KeptAs<N, E>::Type;

__device__ __forceinline__ bool aligned(const void* pointer) { return (u64)pointer % 16 == 0; }

// A number of lanes as a type, so that a lambda can be compiled for it.
template <int N> struct Lanes {
    static constexpr int COUNT = N;
};

// Calls body(i, Lanes<N>()) for the positions 0, N, 2N, … of n elements, each by one thread of the grid: packets of
// WIDTH if `packed`, which requires 128-bit aligned addresses, then the remainder one by one.
template <int WIDTH = LANES, typename Body>
__device__ __forceinline__ void for_elements(i64 n, bool packed, Body body) {
    const i64 thread = (i64)blockIdx.x * blockDim.x + threadIdx.x, threads = (i64)gridDim.x * blockDim.x;
    const i64 in_packets = packed ? n / WIDTH * WIDTH : 0;
    for (i64 i = thread * WIDTH; i < in_packets; i += threads * WIDTH) body(i, Lanes<WIDTH>());
    for (i64 i = in_packets + thread; i < n; i += threads) body(i, Lanes<1>());
}

// Like for_elements, with use(i, fetch(i, true, lanes), lanes); AT_ONCE packets of a thread are read before the first
// is used. fetch(i, false, lanes) reads nothing.
template <int AT_ONCE, typename Fetch, typename Use>
__device__ __forceinline__ void for_batches(i64 n, bool packed, Fetch fetch, Use use) {
    const i64 thread = (i64)blockIdx.x * blockDim.x + threadIdx.x, threads = (i64)gridDim.x * blockDim.x;
    const i64 in_packets = packed ? n / LANES * LANES : 0, step = threads * LANES;
    for (i64 first = thread * LANES; first < in_packets; first += AT_ONCE * step) {
        decltype(fetch(first, true, Lanes<LANES>())) batch[AT_ONCE];
#pragma unroll
        for (int k = 0; k < AT_ONCE; ++k) {
            batch[k] = fetch(first + k * step, first + k * step < in_packets, Lanes<LANES>());
        }
#pragma unroll
        for (int k = 0; k < AT_ONCE; ++k) {
            if (first + k * step < in_packets) use(first + k * step, batch[k], Lanes<LANES>());
        }
    }
    for (i64 i = in_packets + thread; i < n; i += threads) use(i, fetch(i, true, Lanes<1>()), Lanes<1>());
}

// Threads with the same threadIdx.y share a row: one warp (blockDim.x 32, several rows per block), or several warps
// (blockDim.x a larger multiple of 32), which must then loop over their rows together with the whole block.
//
// Calls body(j, Lanes<N>()) for the positions 0, N, 2N, … of a row, each by one thread: packets of WIDTH if `packed`,
// which requires 128-bit aligned rows, then the remainder one by one. A thread sees the same elements in the same order
// either way, so that sums do not depend on where a row starts.
template <int WIDTH = LANES, typename Body>
__device__ __forceinline__ void for_row(u32 columns, bool packed, Body body) {
    const u32 in_packets = columns / WIDTH * WIDTH;
    for (u32 j = threadIdx.x * WIDTH; j < in_packets; j += blockDim.x * WIDTH) {
        if (packed) {
            body(j, Lanes<WIDTH>());
        } else {
            for (u32 lane = 0; lane < WIDTH; ++lane) body(j + lane, Lanes<1>());
        }
    }
    for (u32 j = in_packets + threadIdx.x; j < columns; j += blockDim.x) body(j, Lanes<1>());
}

// Combines the values of the threads of a row; each of them gets the same bits, in an order fixed by blockDim.x.
// `none` is the identity of the operation. All threads of the row must call it, and the whole block if a row has
// several warps.
template <typename A, typename F> __device__ __forceinline__ A reduce_warp(A value, F combine) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) value = combine(value, __shfl_xor_sync(0xFFFFFFFF, value, step));
    return value;
}

template <typename A, typename F> __device__ __forceinline__ A reduce_row(A value, A none, F combine) {
    value = reduce_warp(value, combine);
    if (blockDim.x == 32) return value;
    __shared__ A of_warp[32];
    const u32 warps = blockDim.x / 32, first = threadIdx.y * warps, lane = threadIdx.x % 32;
    // Every thread has read the result of an earlier call before it is overwritten.
    __syncthreads();
    if (lane == 0) of_warp[first + threadIdx.x / 32] = value;
    __syncthreads();
    return reduce_warp(lane < warps ? of_warp[first + lane] : none, combine);
}

template <typename A> __device__ __forceinline__ A sum_row(A value) {
    return reduce_row(value, A(0), [](A a, A b) { return a + b; });
}

template <typename A> __device__ __forceinline__ A max_row(A value) {
    return reduce_row(value, lowest<A>(), [](A a, A b) { return a > b ? a : b; });
}

// An index out of range cannot stop a kernel. It stays within its tables and reports a fault, the first of which the
// host turns into an error the next time it waits for the device.
constexpr i64 FAULT_EMBEDDING = 1, FAULT_CROSS_ENTROPY = 2, FAULT_NO_TARGETS = 3, FAULT_LOGITS = 4;

__device__ __forceinline__ void report_fault(i64* fault, i64 kind, i64 index, i64 limit) {
    if (atomicCAS((u64*)fault, (u64)0, (u64)kind) == 0) {
        fault[1] = index;
        fault[2] = limit;
    }
}
