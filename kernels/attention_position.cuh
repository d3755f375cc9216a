// Position biases: the weight of a distance, and its factor.
//
//   curve[distance] = weights[parameter(distance), head] · factor(distance),    distance = key - query
//
// T5 has a parameter per bucket and one factor for all; a curve by distance has a parameter per distance; ALiBi has one
// parameter per head, the slope, times the distance counted from the query's position, or minus its magnitude. The sums
// over a head's distances are the gradients of its weights.

struct PositionTerms {
    // Buckets of the distances 0 to `reach` of keys before the query, only for T5. Larger distances share the last.
    const i64* bucket_of;
    // 1 or 2 for ALiBi, on one side or on both.
    i32 linear;
    // For a curve by distance, `reach` is the last key, whose distance from query 0 has parameter 0.
    i32 parameters, reach;
    // The first bucket of the keys after the query: they mirror those before it. 0 if they share bucket 0.
    i32 behind;
    // Distance that ALiBi counts from.
    i32 shift;

    __device__ __forceinline__ i32 parameter(i32 distance) const {
        if (linear) return 0;
        if (by_distance()) return reach - distance;
        if (distance <= 0) return bucket_of[min(-distance, reach)];
        return behind == 0 ? bucket_of[0] : behind + bucket_of[min(distance, reach)];
    }

    __device__ __forceinline__ bool by_distance() const { return !linear && !bucket_of; }

    // The factor that depends on the distance; that of T5 is applied to the sums.
    template <typename A> __device__ __forceinline__ A factor(i32 distance) const {
        return linear == 0 ? 1 : linear == 1 ? distance - shift : -abs(distance - shift);
    }
};

// Shared memory of a block that adds up the gradients of a tile of QUERIES × KEYS scores by parameter.
template <i32 QUERIES, i32 KEYS, typename A> struct PositionTile {
    // A diagonal has one distance; the first is that of the last query and the first key.
    static constexpr i32 DIAGONALS = QUERIES + KEYS - 1;
    A sums[DIAGONALS];
    i32 parameters[DIAGONALS];

    // Adds a tile in shared memory, whose first key and query are `distance` apart, to the sums of the block, without
    // the keys before the `first` one. One thread adds to each parameter, in a fixed order of the diagonals.
    __device__ __forceinline__ void add(
        A* to, const A* tile, i32 pitch, const PositionTerms& terms, i32 distance, i32 first) {
        __syncthreads();
        for (i32 diagonal = threadIdx.x; diagonal < DIAGONALS; diagonal += blockDim.x) {
            const i32 offset = diagonal - (QUERIES - 1);
            A sum = 0;
            for (i32 row = max(0, first - offset); row < min(QUERIES, KEYS - offset); ++row) {
                sum += tile[row * pitch + row + offset];
            }
            if (terms.by_distance()) {
                // A diagonal without a score that exists may have no parameter.
                const i32 parameter = terms.parameter(distance + offset);
                if (parameter >= 0 && parameter < terms.parameters) to[parameter] += sum;
                continue;
            }
            sums[diagonal] = sum * terms.factor<A>(distance + offset);
            parameters[diagonal] = terms.parameter(distance + offset);
        }
        if (terms.by_distance()) return;
        __syncthreads();
        for (i32 parameter = threadIdx.x; parameter < terms.parameters; parameter += blockDim.x) {
            A sum = 0;
            for (i32 diagonal = 0; diagonal < DIAGONALS; ++diagonal) {
                if (parameters[diagonal] == parameter) sum += sums[diagonal];
            }
            to[parameter] += sum;
        }
    }
};
