// The pointwise part of a GRU cell, gates in PyTorch's order (reset, update, new).
//
//   forward:  r = sigmoid(i_r + u_r), z = sigmoid(i_z + u_z), n = tanh(i_n + r u_n), y = (1 - z) n + z h
//   backward: dn = g (1 - z) (1 - n^2), dr = dn u_n r (1 - r), dz = g (h - n) z (1 - z)
//             dh = g z, di = [dr, dz, dn], du = [dr, dz, dn r]
//
// Shapes: y, h, g, dh [rows, columns]; i, u, di, du [rows, 3 columns]; all packed. T: f32, f64, bf16, f16.
// Variants: DTYPE=FLOATS
//
// One row per warp, or per block for long rows (see for_row); rows are a grid apart. Moves 8 sizeof(T) per element of y
// forward and 15 backward. Limited by memory bandwidth.

#include "common.cuh"
#include "functions.cuh"

struct Gates {
    Acc r, z, n;

    __device__ __forceinline__ Gates(Acc ir, Acc iz, Acc in, Acc ur, Acc uz, Acc un)
        : r(function::sigmoid::value(ir + ur)),
          z(function::sigmoid::value(iz + uz)),
          n(function::tanh::value(in + r * un)) {}
};

// N elements of each of the three parts of a row of gates.
template <int N> struct Parts {
    Packet<N> part[3];

    __device__ __forceinline__ Parts(const T* row, u32 columns, u32 j)
        : part{load<N>(row + j), load<N>(row + columns + j), load<N>(row + 2 * columns + j)} {}

    __device__ __forceinline__ Acc of(int which, int lane) const {
        return Element<T>::to_acc(part[which].lane[lane]);
    }

    __device__ __forceinline__ void write(T* row, u32 columns, u32 j) const {
#pragma unroll
        for (int which = 0; which < 3; ++which) store(row + which * columns + j, part[which]);
    }
};

template <int N> __device__ __forceinline__ Gates gates(const Parts<N>& i, const Parts<N>& u, int lane) {
    return Gates(i.of(0, lane), i.of(1, lane), i.of(2, lane), u.of(0, lane), u.of(1, lane), u.of(2, lane));
}

extern "C" __global__ void gru_fwd(T* y, const T* h, const T* i, const T* u, i64 rows, u32 columns) {
    const bool packed = columns % LANES == 0 && aligned(y) && aligned(h) && aligned(i) && aligned(u);
    const i64 step = (i64)gridDim.x * blockDim.y;
    for (i64 row = (i64)blockIdx.x * blockDim.y + threadIdx.y; row < rows; row += step) {
        const i64 states = row * columns, gates_of_row = 3 * states;
        for_row(columns, packed, [&](u32 j, auto lanes) {
            auto state = load<lanes.COUNT>(h + states + j);
            const Parts<lanes.COUNT> input(i + gates_of_row, columns, j), hidden(u + gates_of_row, columns, j);
#pragma unroll
            for (int lane = 0; lane < lanes.COUNT; ++lane) {
                const Gates gate = gates(input, hidden, lane);
                const Acc before = Element<T>::to_acc(state.lane[lane]);
                state.lane[lane] = Element<T>::from_acc((1 - gate.z) * gate.n + gate.z * before);
            }
            store(y + states + j, state);
        });
    }
}

extern "C" __global__ void gru_bwd(T* dh, T* di, T* du, const T* h, const T* i, const T* u, const T* g, i64 rows,
                                   u32 columns) {
    const bool outputs = aligned(dh) && aligned(di) && aligned(du);
    const bool packed = columns % LANES == 0 && outputs && aligned(h) && aligned(i) && aligned(u) && aligned(g);
    const i64 step = (i64)gridDim.x * blockDim.y;
    for (i64 row = (i64)blockIdx.x * blockDim.y + threadIdx.y; row < rows; row += step) {
        const i64 states = row * columns, gates_of_row = 3 * states;
        for_row(columns, packed, [&](u32 j, auto lanes) {
            auto state = load<lanes.COUNT>(h + states + j);
            const auto gradient = load<lanes.COUNT>(g + states + j);
            Parts<lanes.COUNT> input(i + gates_of_row, columns, j), hidden(u + gates_of_row, columns, j);
#pragma unroll
            for (int lane = 0; lane < lanes.COUNT; ++lane) {
                const Gates gate = gates(input, hidden, lane);
                const Acc before = Element<T>::to_acc(state.lane[lane]), grad = Element<T>::to_acc(gradient.lane[lane]);
                const Acc dn = grad * (1 - gate.z) * (1 - gate.n * gate.n);
                const Acc dr = dn * hidden.of(2, lane) * gate.r * (1 - gate.r);
                const Acc dz = grad * (before - gate.n) * gate.z * (1 - gate.z);
                state.lane[lane] = Element<T>::from_acc(grad * gate.z);
                input.part[0].lane[lane] = hidden.part[0].lane[lane] = Element<T>::from_acc(dr);
                input.part[1].lane[lane] = hidden.part[1].lane[lane] = Element<T>::from_acc(dz);
                input.part[2].lane[lane] = Element<T>::from_acc(dn);
                hidden.part[2].lane[lane] = Element<T>::from_acc(dn * gate.r);
            }
            store(dh + states + j, state);
            input.write(di + gates_of_row, columns, j);
            hidden.write(du + gates_of_row, columns, j);
        });
    }
}
