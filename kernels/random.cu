// Initial weights: exactly the draws of src/philox.rs and src/params/init.rs, so that a model starts from the same bits
// on every device and nothing is uploaded.
//
//   random_uniform: y[i] = bound (2 u_i - 1)
//   random_normal:  y[i] = deviation r cos a and y[i + 1] = deviation r sin a for even i,
//                   r = sqrt(-2 ln(1 - u_i)), a = 2 pi u_{i + 1} (Box and Muller)
//
// Shapes: y [n]. T: f32, f64, bf16, f16, to which the value rounded to f32 is rounded.
// Variants: DTYPE=FLOATS
//
// A block of Philox gives two draws: each thread takes pairs of elements a grid apart. Moves sizeof(T) per element,
// written only. Limited by arithmetic, in f64.

#include "common.cuh"
#include "exact.cuh"
#include "philox.cuh"

// Calls pair(u, u of the next element) for each two elements and writes the two numbers that it gives.
template <typename Pair>
__device__ __forceinline__ void for_pairs(T* y, i64 n, u64 seed, u64 stream, f64 scale, Pair pair) {
    const i64 step = (i64)gridDim.x * blockDim.x;
    for (i64 block = (i64)blockIdx.x * blockDim.x + threadIdx.x; block * 2 < n; block += step) {
        const Words words = philox_block(seed, stream, block);
        const Direction numbers = pair(philox_uniform(words.word[0], words.word[1]),
                                       philox_uniform(words.word[2], words.word[3]));
        const auto rounded = [&](f64 x) { return from_f64<T>((f64)(f32)(exact(scale) * exact(x)).value); };
        y[block * 2] = rounded(numbers.cosine);
        if (block * 2 + 1 < n) y[block * 2 + 1] = rounded(numbers.sine);
    }
}

extern "C" __global__ void random_uniform(T* y, i64 n, u64 seed, u64 stream, f64 bound) {
    for_pairs(y, n, seed, stream, bound, [](f64 first, f64 second) -> Direction {
        return {2 * first - 1, 2 * second - 1};
    });
}

extern "C" __global__ void random_normal(T* y, i64 n, u64 seed, u64 stream, f64 deviation) {
    for_pairs(y, n, seed, stream, deviation, [](f64 first, f64 second) -> Direction {
        const f64 radius = __dsqrt_rn(-2 * exact_log(1 - first));
        const Direction direction = exact_direction((exact(6.283185307179586) * exact(second)).value);
        return {__dmul_rn(radius, direction.cosine), __dmul_rn(radius, direction.sine)};
    });
}
