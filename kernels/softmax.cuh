// Statistics of a row for softmax and cross-entropy.

#include "fast.cuh"

struct Softmax {
    Element<T>::Acc max;
    // Of exp(x - max).
    Element<T>::Acc sum;
};

// Computed by the threads of the row in one pass, each with four packets in flight: a running maximum and its sum
// (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018). A NaN never becomes the maximum, but
// makes the sum NaN. The sequence of maxima does not depend on where the row starts.
__device__ __forceinline__ Softmax softmax_of_row(const T* row, u32 columns) {
    typedef Element<T>::Acc Acc;
    constexpr int AT_ONCE = 4;
    const bool packed = aligned(row);
    const u32 step = blockDim.x * LANES;
    Softmax mine = {lowest<Acc>(), 0};
    for (u32 first = threadIdx.x * LANES; first < columns; first += AT_ONCE * step) {
        Raw<LANES> batch[AT_ONCE];
#pragma unroll
        for (int k = 0; k < AT_ONCE; ++k) {
            const u32 j = first + k * step;
            batch[k] = Raw<LANES>(row + j, packed && j + LANES <= columns);
        }
        Acc larger = mine.max;
#pragma unroll
        for (int k = 0; k < AT_ONCE; ++k) {
            const u32 j = first + k * step;
            if (j >= columns) break;
            if (!packed || j + LANES > columns) {
                batch[k] = Raw<LANES>(row + j, (i32)(columns - j), Element<T>::from_acc(negative_infinity<Acc>()));
            }
            const Packet<LANES> values = batch[k];
#pragma unroll
            for (int lane = 0; lane < LANES; ++lane) larger = fmax(larger, Element<T>::to_acc(values.lane[lane]));
        }
        mine.sum *= fast_exp(mine.max - larger);
        mine.max = larger;
#pragma unroll
        for (int k = 0; k < AT_ONCE; ++k) {
            if (first + k * step >= columns) break;
            const Packet<LANES> values = batch[k];
#pragma unroll
            for (int lane = 0; lane < LANES; ++lane) {
                mine.sum += fast_exp(Element<T>::to_acc(values.lane[lane]) - mine.max);
            }
        }
    }
    const Acc max = max_row(mine.max);
    return {max, sum_row(mine.sum * fast_exp(mine.max - max))};
}
