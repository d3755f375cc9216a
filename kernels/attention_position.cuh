// Position biases: which weight a distance has, and how often it counts.
//
//   curve[distance] = weights[parameter(distance), head] · factor(distance),    distance = key - query
//
// T5 has a parameter per bucket and one factor for all; ALiBi has one parameter per head, the slope, times the distance
// counted from the query's position (the softmax does not see the difference to counting from 0, and small numbers
// keep their digits). The sums over a head's distances are the gradients of its weights.

struct PositionTerms {
    // Buckets of the distances 0 to `reach` of keys before the query; null for ALiBi. All beyond share the last.
    const i64* bucket_of;
    i32 parameters, reach;
    // The first bucket of the keys behind the query: they mirror those before it. 0 if they share bucket 0.
    i32 behind;
    // Distance that ALiBi counts from.
    i32 shift;

    __device__ __forceinline__ i32 parameter(i32 distance) const {
        if (!bucket_of) return 0;
        if (distance <= 0) return bucket_of[min(-distance, reach)];
        return behind == 0 ? bucket_of[0] : behind + bucket_of[min(distance, reach)];
    }

    // The factor that depends on the distance; that of T5 is applied to the sums.
    template <typename A> __device__ __forceinline__ A factor(i32 distance) const {
        return bucket_of ? 1 : distance - shift;
    }
};
