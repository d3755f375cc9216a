// CUDA C++ for g++: the built-ins of NVRTC that the kernels use. Prepended to the source of every kernel; includes no
// system headers, so that kernels cannot use anything that NVRTC lacks.

#include "runtime.h"

#define __CUDACC__ 1
#define __CUDACC_RTC__ 1

#define __host__
#define __device__
#define __constant__ static const
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(n) __attribute__((aligned(n)))
#define __grid_constant__
// Shared memory of a block is thread-local, because each OS thread runs one block at a time.
#define __shared__ static thread_local
// The emulated compiler searches for these two words.
#define __global__ __attribute__((xt_global, noinline, visibility("default")))
#define __launch_bounds__(...) __attribute__((xt_launch_bounds((__VA_ARGS__))))

typedef decltype(sizeof(0)) size_t;

static const int warpSize = 32;

// --- Indices. Read by assembly, which the memory checker does not instrument.

static inline __attribute__((always_inline)) XtThread* xt_self() {
    XtThread* self;
    asm("movq %%rsp, %0\n\tandq %1, %0" : "=r"(self) : "i"(-(long)XT_STACK));
    return self;
}

template <typename E> static inline __attribute__((always_inline)) E xt_read(const E* from) {
    E value;
    if constexpr (sizeof(E) == 8) {
        asm("movq (%1), %0" : "=r"(value) : "r"(from));
    } else {
        asm("movl (%1), %0" : "=r"(value) : "r"(from));
    }
    return value;
}

struct uint3 {
    unsigned x, y, z;
};

struct dim3 {
    unsigned x, y, z;
};

template <typename E> static inline __attribute__((always_inline)) E xt_read(const XtDim& from) {
    return {xt_read(&from.x), xt_read(&from.y), xt_read(&from.z)};
}

#define threadIdx (xt_read<uint3>(xt_self()->index))
#define blockIdx (xt_read<uint3>(xt_read(&xt_self()->block)->index))
#define blockDim (xt_read<dim3>(xt_read(&xt_self()->block)->dim))
#define gridDim (xt_read<dim3>(xt_read(&xt_self()->block)->grid))
#define xt_dynamic_shared (xt_read(&xt_read(&xt_self()->block)->dynamic_shared))

// --- Barriers and exchanges between threads.

#define XT_HERE(what)                                      \
    ([]() __attribute__((always_inline)) -> const XtPlace* { \
        static constexpr XtPlace place = {__FILE__, __LINE__, what}; \
        return &place;                                     \
    }())

// The compiler must not keep memory in registers across these.
#define XT_FENCED(call)                    \
    ({                                     \
        asm volatile("" : : : "memory");   \
        auto xt_result = call;             \
        asm volatile("" : : : "memory");   \
        xt_result;                         \
    })

#define __syncthreads() ((void)XT_FENCED(xt_barrier(XT_HERE("__syncthreads"), 0)))
#define __syncthreads_count(value) ((int)XT_FENCED(xt_barrier(XT_HERE("__syncthreads_count"), (value) ? 1 : 0)))
#define __syncthreads_or(value) ((int)(XT_FENCED(xt_barrier(XT_HERE("__syncthreads_or"), (value) ? 1 : 0)) != 0))
#define __syncthreads_and(value) ((int)(XT_FENCED(xt_barrier(XT_HERE("__syncthreads_and"), (value) ? 0 : 1)) == 0))

static inline int xt_syncwarp(const XtPlace* place, unsigned mask = 0xFFFFFFFF) {
    xt_warp_barrier(place, mask);
    return 0;
}
#define __syncwarp(...) ((void)XT_FENCED(xt_syncwarp(XT_HERE("__syncwarp") __VA_OPT__(, ) __VA_ARGS__)))

template <typename E>
static inline E xt_shuffle_any(const XtPlace* place, XtShuffle kind, unsigned mask, E value, unsigned operand,
                               unsigned width = 32) {
    static_assert(sizeof(E) == 4 || sizeof(E) == 8, "shuffles move 4 or 8 bytes");
    unsigned long long bits = 0;
    __builtin_memcpy(&bits, &value, sizeof(E));
    bits = xt_shuffle(place, kind, mask, bits, operand, width);
    __builtin_memcpy(&value, &bits, sizeof(E));
    return value;
}
#define __shfl_sync(mask, ...) xt_shuffle_any(XT_HERE("__shfl_sync"), XT_SHUFFLE_INDEX, mask, __VA_ARGS__)
#define __shfl_up_sync(mask, ...) xt_shuffle_any(XT_HERE("__shfl_up_sync"), XT_SHUFFLE_UP, mask, __VA_ARGS__)
#define __shfl_down_sync(mask, ...) xt_shuffle_any(XT_HERE("__shfl_down_sync"), XT_SHUFFLE_DOWN, mask, __VA_ARGS__)
#define __shfl_xor_sync(mask, ...) xt_shuffle_any(XT_HERE("__shfl_xor_sync"), XT_SHUFFLE_XOR, mask, __VA_ARGS__)

#define __ballot_sync(mask, value) xt_vote(XT_HERE("__ballot_sync"), XT_BALLOT, mask, (value) != 0)
#define __any_sync(mask, value) ((int)xt_vote(XT_HERE("__any_sync"), XT_ANY, mask, (value) != 0))
#define __all_sync(mask, value) ((int)xt_vote(XT_HERE("__all_sync"), XT_ALL, mask, (value) != 0))
#define __activemask() xt_active()

template <typename E> static inline unsigned xt_match_any(const XtPlace* place, unsigned mask, E value) {
    unsigned long long bits = 0;
    __builtin_memcpy(&bits, &value, sizeof(E));
    return xt_match(place, mask, bits);
}
#define __match_any_sync(mask, value) xt_match_any(XT_HERE("__match_any_sync"), mask, value)

#if __CUDA_ARCH__ >= 800
template <typename E>
static inline E xt_reduce_any(const XtPlace* place, XtReduce kind, XtReduce kind_signed, unsigned mask, E value) {
    static_assert(sizeof(E) == 4, "reductions of a warp are of 32-bit integers");
    return (E)xt_reduce(place, E(-1) < E(0) ? kind_signed : kind, mask, (unsigned)value);
}
#define XT_REDUCTION(name, kind, kind_signed, mask, value) xt_reduce_any(XT_HERE(name), kind, kind_signed, mask, value)
#define __reduce_add_sync(m, v) XT_REDUCTION("__reduce_add_sync", XT_REDUCE_ADD, XT_REDUCE_ADD, m, v)
#define __reduce_min_sync(m, v) XT_REDUCTION("__reduce_min_sync", XT_REDUCE_MIN, XT_REDUCE_MIN_SIGNED, m, v)
#define __reduce_max_sync(m, v) XT_REDUCTION("__reduce_max_sync", XT_REDUCE_MAX, XT_REDUCE_MAX_SIGNED, m, v)
#define __reduce_and_sync(m, v) XT_REDUCTION("__reduce_and_sync", XT_REDUCE_AND, XT_REDUCE_AND, m, v)
#define __reduce_or_sync(m, v) XT_REDUCTION("__reduce_or_sync", XT_REDUCE_OR, XT_REDUCE_OR, m, v)
#define __reduce_xor_sync(m, v) XT_REDUCTION("__reduce_xor_sync", XT_REDUCE_XOR, XT_REDUCE_XOR, m, v)
#endif

static inline void __threadfence() { asm volatile("" : : : "memory"); }
static inline void __threadfence_block() { asm volatile("" : : : "memory"); }
static inline void __nanosleep(unsigned) {}
static inline void __trap() { xt_fail("__trap()"); }

// --- Atomics. Sums of floats depend on the order of threads, and the kernels' rules forbid them.

template <typename E> static inline E xt_atomic_any(XtAtomic kind, XtAtomic kind_signed, E* address, E value) {
    unsigned long long bits = 0;
    __builtin_memcpy(&bits, &value, sizeof(E));
    bits = xt_atomic(E(-1) < E(0) ? kind_signed : kind, address, sizeof(E), bits);
    __builtin_memcpy(&value, &bits, sizeof(E));
    return value;
}

#define XT_ATOMICS(E)                                                                                              \
    static inline E atomicExch(E* a, E v) { return xt_atomic_any(XT_ATOMIC_EXCHANGE, XT_ATOMIC_EXCHANGE, a, v); }  \
    static inline E atomicAdd(E* a, E v) { return xt_atomic_any(XT_ATOMIC_ADD, XT_ATOMIC_ADD, a, v); }             \
    static inline E atomicMin(E* a, E v) { return xt_atomic_any(XT_ATOMIC_MIN, XT_ATOMIC_MIN_SIGNED, a, v); }      \
    static inline E atomicMax(E* a, E v) { return xt_atomic_any(XT_ATOMIC_MAX, XT_ATOMIC_MAX_SIGNED, a, v); }      \
    static inline E atomicAnd(E* a, E v) { return xt_atomic_any(XT_ATOMIC_AND, XT_ATOMIC_AND, a, v); }             \
    static inline E atomicOr(E* a, E v) { return xt_atomic_any(XT_ATOMIC_OR, XT_ATOMIC_OR, a, v); }                \
    static inline E atomicXor(E* a, E v) { return xt_atomic_any(XT_ATOMIC_XOR, XT_ATOMIC_XOR, a, v); }             \
    static inline E atomicCAS(E* a, E expected, E v) {                                                             \
        return (E)xt_compare_and_swap(a, sizeof(E), (unsigned long long)expected, (unsigned long long)v);          \
    }
XT_ATOMICS(int)
XT_ATOMICS(unsigned)
XT_ATOMICS(unsigned long long)
#undef XT_ATOMICS

static inline int atomicSub(int* a, int v) { return atomicAdd(a, -v); }
static inline unsigned atomicSub(unsigned* a, unsigned v) { return atomicAdd(a, -v); }
static inline float atomicExch(float* a, float v) {
    return xt_atomic_any(XT_ATOMIC_EXCHANGE, XT_ATOMIC_EXCHANGE, a, v);
}
static constexpr const char* XT_FLOAT_ATOMIC = "atomicAdd of floats, whose result depends on the order of threads";
static inline float atomicAdd(float*, float) { xt_fail(XT_FLOAT_ATOMIC); }
static inline double atomicAdd(double*, double) { xt_fail(XT_FLOAT_ATOMIC); }

// --- Memory.

static inline void* xt_memcpy(void* to, const void* from, size_t bytes) {
    xt_check(from, bytes, false);
    xt_check(to, bytes, true);
    return __builtin_memcpy(to, from, bytes);
}
static inline void* xt_memset(void* to, int value, size_t bytes) {
    xt_check(to, bytes, true);
    return __builtin_memset(to, value, bytes);
}
#define memcpy xt_memcpy
#define memset xt_memset

template <typename E> static inline E __ldg(const E* from) { return *from; }
template <typename E> static inline E __ldcg(const E* from) { return *from; }
template <typename E> static inline E __ldca(const E* from) { return *from; }
template <typename E> static inline E __ldcs(const E* from) { return *from; }
template <typename E> static inline E __ldlu(const E* from) { return *from; }
template <typename E> static inline void __stwb(E* to, E value) { *to = value; }
template <typename E> static inline void __stcg(E* to, E value) { *to = value; }
template <typename E> static inline void __stcs(E* to, E value) { *to = value; }
template <typename E> static inline void __stwt(E* to, E value) { *to = value; }

// --- Vectors.

#define XT_VECTORS(E, name, align2, align4)                                                                        \
    struct name##1 { E x; };                                                                                       \
    struct alignas(align2) name##2 { E x, y; };                                                                    \
    struct alignas(align4) name##4 { E x, y, z, w; };                                                              \
    static inline name##2 make_##name##2(E x, E y) { return {x, y}; }                                              \
    static inline name##4 make_##name##4(E x, E y, E z, E w) { return {x, y, z, w}; }
XT_VECTORS(char, char, 2, 4)
XT_VECTORS(unsigned char, uchar, 2, 4)
XT_VECTORS(short, short, 4, 8)
XT_VECTORS(unsigned short, ushort, 4, 8)
XT_VECTORS(int, int, 8, 16)
XT_VECTORS(unsigned, uint, 8, 16)
XT_VECTORS(long long, longlong, 16, 16)
XT_VECTORS(unsigned long long, ulonglong, 16, 16)
XT_VECTORS(float, float, 8, 16)
XT_VECTORS(double, double, 16, 16)
#undef XT_VECTORS

// --- Bits.

template <typename To, typename From> static inline __attribute__((always_inline)) To xt_bits(From from) {
    return __builtin_bit_cast(To, from);
}
static inline unsigned __float_as_uint(float x) { return xt_bits<unsigned>(x); }
static inline int __float_as_int(float x) { return xt_bits<int>(x); }
static inline float __uint_as_float(unsigned x) { return xt_bits<float>(x); }
static inline float __int_as_float(int x) { return xt_bits<float>(x); }
static inline long long __double_as_longlong(double x) { return xt_bits<long long>(x); }
static inline double __longlong_as_double(long long x) { return xt_bits<double>(x); }
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
static inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(x); }
static inline int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll(x); }
static inline int __ffs(int x) { return __builtin_ffs(x); }
static inline int __ffsll(long long x) { return __builtin_ffsll(x); }
static inline unsigned __brev(unsigned x) {
    unsigned y = 0;
    for (int bit = 0; bit < 32; ++bit) y |= (x >> bit & 1) << (31 - bit);
    return y;
}
static inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned long long)a * b >> 32; }
static inline int __mulhi(int a, int b) { return (long long)a * b >> 32; }
static inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (unsigned __int128)a * b >> 64;
}
static inline long long __mul64hi(long long a, long long b) { return (__int128)a * b >> 64; }

// --- Arithmetic. Functions of f32 and f64 have one name, as in CUDA.

#define XT_MATH(name)                                                            \
    static inline double name(double x) { return __builtin_##name(x); }          \
    static inline float name(float x) { return __builtin_##name##f(x); }         \
    static inline float name##f(float x) { return __builtin_##name##f(x); }
#define XT_MATH_2(name)                                                                    \
    static inline double name(double x, double y) { return __builtin_##name(x, y); }       \
    static inline float name(float x, float y) { return __builtin_##name##f(x, y); }       \
    static inline float name##f(float x, float y) { return __builtin_##name##f(x, y); }
XT_MATH(acos)
XT_MATH(asin)
XT_MATH(atan)
XT_MATH(cbrt)
XT_MATH(ceil)
XT_MATH(cos)
XT_MATH(cosh)
XT_MATH(erf)
XT_MATH(erfc)
XT_MATH(exp)
XT_MATH(exp2)
XT_MATH(expm1)
XT_MATH(fabs)
XT_MATH(floor)
XT_MATH(log)
XT_MATH(log10)
XT_MATH(log1p)
XT_MATH(log2)
XT_MATH(nearbyint)
XT_MATH(rint)
XT_MATH(round)
XT_MATH(sin)
XT_MATH(sinh)
XT_MATH(sqrt)
XT_MATH(tan)
XT_MATH(tanh)
XT_MATH(tgamma)
XT_MATH(lgamma)
XT_MATH(trunc)
XT_MATH_2(atan2)
XT_MATH_2(copysign)
XT_MATH_2(fdim)
XT_MATH_2(fmax)
XT_MATH_2(fmin)
XT_MATH_2(fmod)
XT_MATH_2(hypot)
XT_MATH_2(pow)
#undef XT_MATH
#undef XT_MATH_2

static inline double fma(double x, double y, double z) { return __builtin_fma(x, y, z); }
static inline float fma(float x, float y, float z) { return __builtin_fmaf(x, y, z); }
static inline float fmaf(float x, float y, float z) { return __builtin_fmaf(x, y, z); }
static inline double ldexp(double x, int n) { return __builtin_ldexp(x, n); }
static inline float ldexp(float x, int n) { return __builtin_ldexpf(x, n); }
static inline float ldexpf(float x, int n) { return __builtin_ldexpf(x, n); }
static inline double rsqrt(double x) { return 1 / __builtin_sqrt(x); }
static inline float rsqrt(float x) { return 1 / __builtin_sqrtf(x); }
static inline float rsqrtf(float x) { return 1 / __builtin_sqrtf(x); }
static inline double sinpi(double x) { return __builtin_sin(x * 3.14159265358979323846); }
static inline double cospi(double x) { return __builtin_cos(x * 3.14159265358979323846); }
static inline float sinpif(float x) { return (float)sinpi((double)x); }
static inline float cospif(float x) { return (float)cospi((double)x); }
static inline void sincos(double x, double* sine, double* cosine) { *sine = sin(x), *cosine = cos(x); }
static inline void sincos(float x, float* sine, float* cosine) { *sine = sin(x), *cosine = cos(x); }
static inline void sincosf(float x, float* sine, float* cosine) { *sine = sin(x), *cosine = cos(x); }
static inline long long llrint(double x) { return __builtin_llrint(x); }
static inline long long llrint(float x) { return __builtin_llrintf(x); }
static inline bool isnan(double x) { return x != x; }
static inline bool isnan(float x) { return x != x; }
static inline bool isinf(double x) { return __builtin_isinf(x); }
static inline bool isinf(float x) { return __builtin_isinf(x); }
static inline bool isfinite(double x) { return __builtin_isfinite(x); }
static inline bool isfinite(float x) { return __builtin_isfinite(x); }
static inline bool signbit(double x) { return __builtin_signbit(x); }
static inline bool signbit(float x) { return __builtin_signbitf(x); }

static inline int abs(int x) { return x < 0 ? -x : x; }
static inline long long abs(long long x) { return x < 0 ? -x : x; }
static inline double abs(double x) { return __builtin_fabs(x); }
static inline float abs(float x) { return __builtin_fabsf(x); }
static inline long long llabs(long long x) { return abs(x); }

#define XT_MIN_MAX(E)                                            \
    static inline E min(E a, E b) { return b < a ? b : a; }      \
    static inline E max(E a, E b) { return a < b ? b : a; }
XT_MIN_MAX(int)
XT_MIN_MAX(unsigned)
XT_MIN_MAX(long)
XT_MIN_MAX(unsigned long)
XT_MIN_MAX(long long)
XT_MIN_MAX(unsigned long long)
#undef XT_MIN_MAX
static inline float min(float a, float b) { return __builtin_fminf(a, b); }
static inline float max(float a, float b) { return __builtin_fmaxf(a, b); }
static inline double min(double a, double b) { return __builtin_fmin(a, b); }
static inline double max(double a, double b) { return __builtin_fmax(a, b); }

// The fast variants of a card have fewer correct bits; here they are the exact ones.
static inline float __expf(float x) { return exp(x); }
static inline float __exp10f(float x) { return __builtin_exp10f(x); }
static inline float __logf(float x) { return log(x); }
static inline float __log2f(float x) { return log2(x); }
static inline float __log10f(float x) { return log10(x); }
static inline float __sinf(float x) { return sin(x); }
static inline float __cosf(float x) { return cos(x); }
static inline float __tanf(float x) { return tan(x); }
static inline float __powf(float x, float y) { return pow(x, y); }
static inline void __sincosf(float x, float* sine, float* cosine) { sincosf(x, sine, cosine); }
static inline float __fdividef(float x, float y) { return x / y; }
static inline float __saturatef(float x) { return x > 0 ? (x < 1 ? x : 1) : 0; }

static inline float __fadd_rn(float x, float y) { return x + y; }
static inline float __fsub_rn(float x, float y) { return x - y; }
static inline float __fmul_rn(float x, float y) { return x * y; }
static inline float __fdiv_rn(float x, float y) { return x / y; }
static inline float __fsqrt_rn(float x) { return sqrt(x); }
static inline float __frcp_rn(float x) { return 1 / x; }
static inline float __frsqrt_rn(float x) { return rsqrt(x); }
static inline float __fmaf_rn(float x, float y, float z) { return __builtin_fmaf(x, y, z); }
static inline double __dadd_rn(double x, double y) { return x + y; }
static inline double __dsub_rn(double x, double y) { return x - y; }
static inline double __dmul_rn(double x, double y) { return x * y; }
static inline double __ddiv_rn(double x, double y) { return x / y; }
static inline double __dsqrt_rn(double x) { return sqrt(x); }
static inline double __fma_rn(double x, double y, double z) { return __builtin_fma(x, y, z); }

static inline int __float2int_rn(float x) { return (int)rint(x); }
static inline int __float2int_rz(float x) { return (int)x; }
static inline int __float2int_rd(float x) { return (int)floor(x); }
static inline int __float2int_ru(float x) { return (int)ceil(x); }
static inline unsigned __float2uint_rn(float x) { return (unsigned)rint(x); }
static inline unsigned __float2uint_rz(float x) { return (unsigned)x; }
static inline long long __float2ll_rn(float x) { return (long long)rint(x); }
static inline long long __double2ll_rn(double x) { return (long long)rint(x); }
static inline float __int2float_rn(int x) { return (float)x; }
static inline float __uint2float_rn(unsigned x) { return (float)x; }
static inline float __ll2float_rn(long long x) { return (float)x; }
static inline float __ull2float_rn(unsigned long long x) { return (float)x; }
static inline float __double2float_rn(double x) { return (float)x; }

// --- Entry points for the emulator. A line XT_KERNEL(name, maximum threads) follows the source for each kernel.

template <typename A> constexpr bool xt_is_pointer = false;
template <typename A> constexpr bool xt_is_pointer<A*> = true;
template <unsigned... I> struct XtIndices {};

template <typename F> struct XtCall;
template <typename... A> struct XtCall<void(A...)> {
    static constexpr unsigned COUNT = sizeof...(A);
    static constexpr unsigned SIZES[COUNT + 1] = {sizeof(A)..., 0};
    static constexpr bool POINTERS[COUNT + 1] = {xt_is_pointer<A>..., false};

    // Arguments are in host memory, which the checker would reject.
    template <unsigned... I>
    __attribute__((no_sanitize("thread"))) static void unpack(void (*kernel)(A...), void** arguments, XtIndices<I...>) {
        kernel(*static_cast<A*>(arguments[I])...);
    }
    __attribute__((no_sanitize("thread"))) static void call(void (*kernel)(A...), void** arguments) {
        unpack(kernel, arguments, XtIndices<__integer_pack(COUNT)...>());
    }
};

// Arguments of __launch_bounds__.
template <typename... R> constexpr unsigned xt_first(unsigned first, R...) { return first; }

#define XT_KERNEL(kernel, most_threads)                                                                    \
    __attribute__((no_sanitize("thread"))) static void xt_invoke_##kernel(void** arguments) {              \
        XtCall<decltype(kernel)>::call(kernel, arguments);                                                 \
    }                                                                                                      \
    extern "C" __attribute__((visibility("default"))) const XtKernel xt_kernel_##kernel;                   \
    const XtKernel xt_kernel_##kernel = {#kernel,                                                          \
                                         xt_invoke_##kernel,                                               \
                                         XtCall<decltype(kernel)>::COUNT,                                  \
                                         XtCall<decltype(kernel)>::SIZES,                                  \
                                         XtCall<decltype(kernel)>::POINTERS,                               \
                                         most_threads};

// Taking this address allocates the shared memory of the calling OS thread.
static thread_local char xt_anchor;
extern "C" __attribute__((visibility("default"))) void* xt_shared_memory() { return &xt_anchor; }
