// Token shift: chunk t of the features moves by amounts[t] positions, zeros come in.
//
//   y[b, i, d] = x[b, i - amount, d], or 0 if that position is outside or masked
//   y[b, i, d] = x[b, i, d] where amount = 0, or where d is left over after the last chunk
//
// The backward pass moves by the opposite amounts; the mask then applies to the target, not to the source.
//
// Shapes: y, x [batch, positions, columns], packed; mask (bool) [batch, positions] or none; amounts [chunks], each for
// `chunk` features. T: f32, f64, bf16, f16.
// Variants: DTYPE=FLOATS
//
// One row per warp, or per block for long rows (see for_row); rows are a grid apart. A packet of y is one of x too if
// chunks are whole packets. Moves 2 sizeof(T) per element. Limited by memory bandwidth.

#include "common.cuh"

extern "C" __global__ void shift_tokens(T* y, const T* x, const unsigned char* mask, const i64* amounts, i64 rows,
                                        u32 positions, u32 columns, u32 chunks, u32 chunk, u32 mask_of_source) {
    const bool packed = aligned(y) && aligned(x) && columns % LANES == 0 && chunk % LANES == 0;
    const i64 step = (i64)gridDim.x * blockDim.y;
    for (i64 row = (i64)blockIdx.x * blockDim.y + threadIdx.y; row < rows; row += step) {
        for_row(columns, packed, [&](u32 j, auto lanes) {
            const u32 part = j / chunk;
            const i64 amount = part < chunks ? amounts[part] : 0;
            const i64 position = row % positions - amount, source = row - amount;
            const bool inside = position >= 0 && position < positions;
            const bool kept = mask == nullptr || !inside || mask[mask_of_source ? source : row];
            // Zero has no bits set in any float type.
            Packet<lanes.COUNT> packet = {};
            if (amount == 0 || (inside && kept)) packet = load<lanes.COUNT>(x + source * columns + j);
            store(y + row * columns + j, packet);
        });
    }
}
