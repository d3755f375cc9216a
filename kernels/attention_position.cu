// Position biases of attention as curves, and the gradients of their weights; see attention_position.cuh.
//
// Shapes: curves [heads, queries + keys - 1], from distance 1 - queries on; weights, dweights [parameters, heads]; sums
// [batch, heads, tiles, parameters], from attention_bwd_queries for each tile of queries. T: f32, f64, the type that
// attention computes in. Forward, one thread per distance; backward, one warp per weight, which adds up the tiles in
// f64 in a fixed order. Both move little: curves are linear in the length of the sequence.
//
// Variants: DTYPE=f32,f64

#include "common.cuh"
#include "attention_position.cuh"

extern "C" __global__ void attention_position_fwd(
    T* curves, const T* weights, const i64* bucket_of, i32 heads, i32 queries, i32 keys, i32 linear, i32 parameters,
    i32 reach, i32 behind, f64 scale) {
    const PositionTerms terms = {bucket_of, linear, parameters, reach, behind, keys - queries};
    const i64 distances = queries + keys - 1, step = (i64)gridDim.x * blockDim.x;
    for (i64 at = (i64)blockIdx.x * blockDim.x + threadIdx.x; at < heads * distances; at += step) {
        const i32 head = at / distances, distance = (i32)(at % distances) + 1 - queries;
        // Distances of keys that a curve leaves out have no parameter, and their values are not read.
        const i32 parameter = min(max(terms.parameter(distance), 0), parameters - 1);
        const f64 weight = weights[(i64)parameter * heads + head];
        curves[at] = (T)(weight * terms.factor<f64>(distance) * scale);
    }
}

extern "C" __global__ void attention_position_bwd(
    T* dweights, const T* sums, i32 batch, i32 heads, i32 tiles, i32 parameters, f64 scale) {
    const i64 step = (i64)gridDim.x * blockDim.y;
    for (i64 at = (i64)blockIdx.x * blockDim.y + threadIdx.y; at < (i64)parameters * heads; at += step) {
        const i64 parameter = at / heads, head = at % heads;
        f64 sum = 0;
        for (i64 part = threadIdx.x; part < (i64)batch * tiles; part += blockDim.x) {
            sum += sums[((part / tiles * heads + head) * tiles + part % tiles) * parameters + parameter];
        }
        sum = sum_row(sum);
        if (threadIdx.x == 0) dweights[at] = (T)(sum * scale);
    }
}
