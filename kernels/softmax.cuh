// What softmax and cross-entropy need to know of a row.

template <typename A> struct Softmax {
    A max;
    // Of exp(x - max).
    A sum;
};

// By the threads of the row, in one reading: a running maximum and the sum under it (Milakov and Gimelshein, "Online
// normalizer calculation for softmax", 2018). A NaN is no maximum, but makes the sum NaN.
template <typename E> __device__ __forceinline__ auto softmax_of_row(const E* row, u32 columns) {
    typedef typename Element<E>::Acc A;
    const bool packed = aligned(row);
    Softmax<A> mine = {lowest<A>(), 0};
    // Packets even where they are not aligned: how the maximum grows must not depend on where the row starts.
    for_row(columns, true, [&](u32 j, auto lanes) {
        const auto values = load<lanes.COUNT>(row + j, packed);
        A larger = mine.max;
#pragma unroll
        for (E value : values.lane) larger = fmax(larger, Element<E>::to_acc(value));
        mine.sum *= exp(mine.max - larger);
        mine.max = larger;
#pragma unroll
        for (E value : values.lane) mine.sum += exp(Element<E>::to_acc(value) - mine.max);
    });
    const A max = max_row(mine.max);
    return Softmax<A>{max, sum_row(mine.sum * exp(mine.max - max))};
}
