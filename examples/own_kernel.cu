// The snake activation, y = x + sin²(a x) / a, and its gradient, dx = dy (1 + sin(2 a x)).
//
// Shapes: all [n], packed. T: float or double, by the option ELEMENT. Threads take elements a grid apart.

typedef ELEMENT T;

extern "C" __global__ void snake_fwd(T* y, const T* x, long long n, T a) {
    const long long step = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += step) {
        const T s = sin(a * x[i]);
        y[i] = x[i] + s * s / a;
    }
}

extern "C" __global__ void snake_bwd(T* dx, const T* x, const T* dy, long long n, T a) {
    const long long step = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += step) {
        dx[i] = dy[i] * (1 + sin(2 * a * x[i]));
    }
}
