// What kernels share: element types, layouts, 128-bit packets, and reductions over the threads of a row.
//
// A source is compiled once per element type, named like the crate's dtype: -DDTYPE=f32, f64, bf16, f16, i64 or bool.
// Sources call it T; the option cannot be -DT itself, because NVRTC's built-in headers have template parameters T.
// NVRTC has no include path, so that half types are defined here, with conversions by PTX where the card has them.

typedef int i32;
typedef unsigned int u32;
typedef long long i64;
typedef unsigned long long u64;
typedef float f32;
typedef double f64;

// Index arithmetic: 32 bits unless the launch says -DINDEX=i64, because a tensor has 2^31 elements or more.
#ifndef INDEX
#define INDEX u32
#endif
typedef INDEX Index;

struct bf16 {
    unsigned short bits;
};

struct f16 {
    unsigned short bits;
};

typedef DTYPE T;

// How an element is computed with: f32 for the half types, itself otherwise. Stores round to nearest even.
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
    static __device__ __forceinline__ f32 to_acc(f16 x) {
        f32 y;
        asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
        return y;
    }
    static __device__ __forceinline__ f16 from_acc(f32 x) {
        f16 y;
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
        return y;
    }
};

template <> struct Element<bf16> {
    typedef f32 Acc;
    static __device__ __forceinline__ f32 to_acc(bf16 x) { return __uint_as_float((u32)x.bits << 16); }
    static __device__ __forceinline__ bf16 from_acc(f32 x) {
        bf16 y;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
        asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
#else
        // Cards before sm_80 have no bf16 instruction. NaN becomes 0x7FFF, as it does there.
        const u32 bits = __float_as_uint(x);
        y.bits = x != x ? 0x7FFF : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
#endif
        return y;
    }
};

// The smallest finite number: where a running maximum starts. exp(lowest - lowest) is 1 where infinities give NaN.
template <typename A> __device__ __forceinline__ A lowest();
template <> __device__ __forceinline__ f32 lowest<f32>() { return -3.4028234663852886e38f; }
template <> __device__ __forceinline__ f64 lowest<f64>() { return -1.7976931348623157e308; }

// Where the elements of a tensor are: sizes and steps of its dimensions, outermost first, all counted in elements.
// Passed by value; the same bytes as the struct that the launch fills.
constexpr int MAX_RANK = 6;

struct Layout {
    u32 rank;
    u32 dims[MAX_RANK];
    u32 unused;
    i64 strides[MAX_RANK];
    i64 offset;

    // Position of element `i` in row-major order. Unrolled, so that the arrays are read straight from the parameters.
    __device__ __forceinline__ Index position(Index i) const {
        Index at = (Index)offset;
#pragma unroll
        for (int dim = MAX_RANK - 1; dim >= 0; --dim) {
            if (dim < rank) {
                const Index size = dims[dim];
                at += i % size * (Index)strides[dim];
                i /= size;
            }
        }
        return at;
    }
};
static_assert(sizeof(Layout) == 88, "Layout must have the size that the launch passes");

// Elements of one 128-bit access.
constexpr int LANES = 16 / sizeof(T);

// N consecutive elements: LANES of them, read and written at once, or one.
template <int N> struct alignas(N * sizeof(T)) Packet {
    T lane[N];
};

template <int N> __device__ __forceinline__ Packet<N> load(const T* from) {
    Packet<N> packet;
    if constexpr (N == LANES && N > 1) {
        const uint4 raw = *reinterpret_cast<const uint4*>(from);
        memcpy(&packet, &raw, sizeof(raw));
    } else {
        static_assert(N == 1, "a packet has LANES elements or one");
        packet.lane[0] = from[0];
    }
    return packet;
}

// An assignment may be taken apart into stores of single lanes, which PTX prevents.
__device__ __forceinline__ void store_128(void* to, uint4 raw) {
#ifdef __CUDA_ARCH__
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
                 :
                 : "l"(__cvta_generic_to_global(to)), "r"(raw.x), "r"(raw.y), "r"(raw.z), "r"(raw.w)
                 : "memory");
#else
    *reinterpret_cast<uint4*>(to) = raw;
#endif
}

template <int N> __device__ __forceinline__ void store(T* to, const Packet<N>& packet) {
    if constexpr (N == LANES && N > 1) {
        uint4 raw;
        memcpy(&raw, &packet, sizeof(raw));
        store_128(to, raw);
    } else {
        static_assert(N == 1, "a packet has LANES elements or one");
        to[0] = packet.lane[0];
    }
}

__device__ __forceinline__ bool aligned(const void* pointer) { return (u64)pointer % 16 == 0; }

// A number of lanes as a type, so that a lambda can be compiled for it.
template <int N> struct Lanes {
    static constexpr int COUNT = N;
};

// The threads with one threadIdx.y share a row: a warp each (blockDim.x 32, several rows a block), or the whole block
// (blockDim.x a larger multiple of 32, blockDim.y 1).
//
// Calls body(j, Lanes<N>()) for the positions 0, N, 2N, … of a row, each by one thread: packets if `packed`, which
// asks for 128-bit aligned rows, then what is left one by one.
template <typename Body> __device__ __forceinline__ void for_row(u32 columns, bool packed, Body body) {
    const u32 in_packets = packed ? columns / LANES * LANES : 0;
    for (u32 j = threadIdx.x * LANES; j < in_packets; j += blockDim.x * LANES) body(j, Lanes<LANES>());
    for (u32 j = in_packets + threadIdx.x; j < columns; j += blockDim.x) body(j, Lanes<1>());
}

// Combines the values of the threads of a row; each of them gets the same bits, in an order fixed by blockDim.x.
// `none` is the value that changes nothing. All threads of the row must call it.
template <typename A, typename F> __device__ __forceinline__ A reduce_warp(A value, F combine) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) value = combine(value, __shfl_xor_sync(0xFFFFFFFF, value, step));
    return value;
}

template <typename A, typename F> __device__ __forceinline__ A reduce_row(A value, A none, F combine) {
    value = reduce_warp(value, combine);
    if (blockDim.x == 32) return value;
    __shared__ A of_warp[32];
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    // Every thread has read the result of an earlier call before it is overwritten.
    __syncthreads();
    if (lane == 0) of_warp[warp] = value;
    __syncthreads();
    return reduce_warp(lane < blockDim.x / 32 ? of_warp[lane] : none, combine);
}

template <typename A> __device__ __forceinline__ A sum_row(A value) {
    return reduce_row(value, A(0), [](A a, A b) { return a + b; });
}

template <typename A> __device__ __forceinline__ A max_row(A value) {
    return reduce_row(value, lowest<A>(), [](A a, A b) { return a > b ? a : b; });
}

// Indices that are out of range cannot stop a kernel. It stays within its tables and leaves a note, of which the first
// one counts; the host turns it into an error when it next waits for the device.
constexpr i64 FAULT_EMBEDDING = 1, FAULT_CROSS_ENTROPY = 2;

__device__ __forceinline__ void report_fault(i64* fault, i64 kind, i64 index, i64 limit) {
    if (atomicCAS((u64*)fault, (u64)0, (u64)kind) == 0) {
        fault[1] = index;
        fault[2] = limit;
    }
}
