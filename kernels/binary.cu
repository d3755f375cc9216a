// Functions of two numbers, with broadcasting: y_i = f(a_i, b_i).
//
// Shapes: y [n] packed; a and b any layouts of y's shape, with step 0 along the dimensions in which they repeat, whose
// dimensions the host has merged where both layouts allow it. FUNCTION names a row below, one for each row of the
// tables in src/ops/binary.rs and compare.rs. Arithmetic gives a T, computed in f32 for half types, the others bool.
// Integers wrap around.
// Variants: DTYPE=FLOATS FUNCTION=add,sub,mul,div
// Variants: DTYPE=i64 FUNCTION=add,sub,mul
// Variants: DTYPE=FLOATS,i64,bool FUNCTION=eq,ne,lt,le,gt,ge
// Variants: DTYPE=bool FUNCTION=logical_and,logical_or,logical_not
//
// Each thread takes packets a grid apart where the last dimension of each operand is packed or repeated, else single
// elements. Moves sizeof(T) per element of y and of each operand; limited by memory bandwidth, for operands that are
// not packed along their last dimension by the sectors of 32 bytes of which only a part is used.

#include "common.cuh"
#include "strided.cuh"

typedef Element<T>::Acc Acc;

__device__ __forceinline__ f32 wrap(f32 x) { return x; }
__device__ __forceinline__ f64 wrap(f64 x) { return x; }
__device__ __forceinline__ u64 wrap(i64 x) { return x; }
__device__ __forceinline__ bool wrap(bool x) { return x; }

#define ROW(name, value_of_a_b) \
    struct name { \
        static __device__ __forceinline__ auto value(Acc a, Acc b) { return value_of_a_b; } \
    };

namespace function {
ROW(add, Acc(wrap(a) + wrap(b)))
ROW(sub, Acc(wrap(a) - wrap(b)))
ROW(mul, Acc(wrap(a) * wrap(b)))
ROW(div, a / b)
ROW(eq, a == b)
ROW(ne, a != b)
ROW(lt, a < b)
ROW(le, a <= b)
ROW(gt, a > b)
ROW(ge, a >= b)
ROW(logical_and, a && b)
ROW(logical_or, a || b)
ROW(logical_not, !a)
} // namespace function

// Storage type of a value: T for numbers, bool for truth values.
template <typename Value> struct Stored {
    typedef T Type;
    static __device__ __forceinline__ T from(Value value) { return Element<T>::from_acc(value); }
};
template <> struct Stored<bool> {
    typedef bool Type;
    static __device__ __forceinline__ bool from(bool value) { return value; }
};
typedef Stored<decltype(function::FUNCTION::value(Acc(), Acc()))> Result;

extern "C" __global__ void binary_fwd(Result::Type* y, const T* a, const T* b, Layout a_layout, Layout b_layout,
                                      i64 n) {
    const i64 a_step = last_step(a_layout), b_step = last_step(b_layout);
    const bool packed = aligned(y) && in_packets(a, a_layout) && in_packets(b, b_layout);
    for_elements(n, packed, [&](i64 i, auto lanes) {
        const auto at = positions(i, a_layout, b_layout);
        const auto left = gather<lanes.COUNT>(a, at.of[0], a_step), right = gather<lanes.COUNT>(b, at.of[1], b_step);
        Packet<lanes.COUNT, Result::Type> result;
#pragma unroll
        for (int lane = 0; lane < lanes.COUNT; ++lane) {
            const Acc x = Element<T>::to_acc(left.lane[lane]), y = Element<T>::to_acc(right.lane[lane]);
            result.lane[lane] = Result::from(function::FUNCTION::value(x, y));
        }
        store(y + i, result);
    });
}
