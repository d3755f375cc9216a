// cuBLAS: C = alpha op(A) op(B) + beta C, column-major, summed in the order of k without blocking.

#include <bit>
#include <cstring>

#include "emulator.h"

namespace xt {
namespace {

enum Status {
    BLAS_SUCCESS = 0,
    BLAS_NOT_INITIALIZED = 1,
    BLAS_ALLOC_FAILED = 3,
    BLAS_INVALID_VALUE = 7,
    BLAS_EXECUTION_FAILED = 13,
    BLAS_NOT_SUPPORTED = 15,
};

enum DataType { F32 = 0, F64 = 1, F16 = 2, BF16 = 14 };
enum ComputeType { COMPUTE_F32 = 68, COMPUTE_F32_PEDANTIC = 69, COMPUTE_F64 = 70, COMPUTE_F64_PEDANTIC = 71,
                   COMPUTE_F32_FAST_TF32 = 77 };
constexpr int TF32_MATH = 3;

struct Handle {
    Stream* stream = nullptr;
    int math = 0;
};

size_t size_of(int type) { return type == F64 ? 8 : type == F32 ? 4 : 2; }

// Rounds to TF32, which has ten mantissa bits.
float to_tf32(float x) {
    const uint32_t bits = std::bit_cast<uint32_t>(x);
    if ((bits >> 23 & 0xFF) == 0xFF) return x;
    return std::bit_cast<float>((bits + 0xFFF + (bits >> 13 & 1)) & ~0x1FFFu);
}

template <typename A> A read(const char* from, int type, bool tf32) {
    switch (type) {
        case F64: {
            double x;
            memcpy(&x, from, sizeof x);
            return A(x);
        }
        case F32: {
            float x;
            memcpy(&x, from, sizeof x);
            return A(tf32 ? to_tf32(x) : x);
        }
        default: {
            uint16_t bits;
            memcpy(&bits, from, sizeof bits);
            return A(type == F16 ? xt_f16_to_f32(bits) : std::bit_cast<float>(uint32_t(bits) << 16));
        }
    }
}

template <typename A> void write(char* to, int type, A value) {
    if (type == F64) {
        const double x = value;
        memcpy(to, &x, sizeof x);
    } else if (type == F32) {
        const float x = value;
        memcpy(to, &x, sizeof x);
    } else {
        const uint16_t bits = type == F16 ? xt_f32_to_f16(value) : xt_f32_to_bf16(value);
        memcpy(to, &bits, sizeof bits);
    }
}

// Layout of a matrix in memory.
struct Matrix {
    uintptr_t address;
    int type;
    int leading;
    long long stride;
    bool transposed;

    uintptr_t of(int item) const { return address + item * stride * (long long)(size_of(type)); }
};

struct Gemm : Operation {
    int m, n, k, items;
    double alpha, beta;
    Matrix a, b, c;
    bool in_f64, tf32;

    // Checks the access to all elements, column by column, because the gaps between columns are not accessed.
    bool allowed(const char* name, const Matrix& matrix, int rows, int columns, bool write) const {
        std::string why;
        for (int item = 0; item < items; ++item) {
            for (int column = 0; column < columns; ++column) {
                const uintptr_t start = matrix.of(item) + size_t(column) * matrix.leading * size_of(matrix.type);
                const size_t bytes = rows * size_of(matrix.type);
                if (write ? may_write(start, bytes, why) : may_read(start, bytes, why)) continue;
                report("cuBLAS, matrix " + std::string(name) + " of item " + std::to_string(item) + ", " + why);
                return false;
            }
        }
        return true;
    }

    // Returns op(matrix) with packed rows: [columns, rows].
    template <typename A> std::vector<A> packed(const Matrix& matrix, int item, int rows, int columns) const {
        std::vector<A> out(size_t(rows) * columns);
        const char* const from = reinterpret_cast<const char*>(matrix.of(item));
        const size_t size = size_of(matrix.type);
        for (int column = 0; column < columns; ++column) {
            for (int row = 0; row < rows; ++row) {
                const size_t at = matrix.transposed ? size_t(row) * matrix.leading + column
                                                    : size_t(column) * matrix.leading + row;
                out[size_t(column) * rows + row] = read<A>(from + at * size, matrix.type, tf32);
            }
        }
        return out;
    }

    template <typename A> void multiply() const {
        for (int item = 0; item < items; ++item) {
            const std::vector<A> left = packed<A>(a, item, m, k), right = packed<A>(b, item, k, n);
            std::vector<A> sums(m);
            for (int column = 0; column < n; ++column) {
                std::fill(sums.begin(), sums.end(), A(0));
                for (int inner = 0; inner < k; ++inner) {
                    const A factor = right[size_t(column) * k + inner];
                    const A* const values = &left[size_t(inner) * m];
                    for (int row = 0; row < m; ++row) sums[row] += values[row] * factor;
                }
                char* const to = reinterpret_cast<char*>(c.of(item)) + size_t(column) * c.leading * size_of(c.type);
                for (int row = 0; row < m; ++row) {
                    char* const element = to + row * size_of(c.type);
                    A value = A(alpha) * sums[row];
                    if (beta != 0) value += A(beta) * read<A>(element, c.type, false);
                    write<A>(element, c.type, value);
                }
                mark_written(uintptr_t(to), m * size_of(c.type));
            }
        }
    }

    int run() override {
        if (shall_fail(LAUNCH)) return LAUNCH_OUT_OF_RESOURCES;
        const bool right = allowed("A", a, a.transposed ? k : m, a.transposed ? m : k, false) &&
                           allowed("B", b, b.transposed ? n : k, b.transposed ? k : n, false) &&
                           (beta == 0 || allowed("C", c, m, n, false)) && allowed("C", c, m, n, true);
        if (!right) {
            lose();
            return ILLEGAL_ADDRESS;
        }
        in_f64 ? multiply<double>() : multiply<float>();
        return SUCCESS;
    }
};

int invalid(const std::string& what) {
    report("cuBLAS: " + what);
    return BLAS_INVALID_VALUE;
}

int gemm(Handle* handle, int transposed_a, int transposed_b, int m, int n, int k, const void* alpha, const void* a,
         int a_type, int lda, long long a_stride, const void* b, int b_type, int ldb, long long b_stride,
         const void* beta, void* c, int c_type, int ldc, long long c_stride, int items, int compute) {
    if (lost()) return BLAS_EXECUTION_FAILED;
    if (handle == nullptr) return BLAS_NOT_INITIALIZED;
    if (m < 0 || n < 0 || k < 0 || items < 0) return invalid("a negative size");
    const bool in_f64 = compute == COMPUTE_F64 || compute == COMPUTE_F64_PEDANTIC;
    const bool in_f32 = compute == COMPUTE_F32 || compute == COMPUTE_F32_PEDANTIC || compute == COMPUTE_F32_FAST_TF32;
    const auto halves = [](int type) { return type == F16 || type == BF16; };
    const bool types = in_f64 ? a_type == F64 && b_type == F64 && c_type == F64
                              : a_type == b_type && (a_type == F32 || halves(a_type)) &&
                                    (c_type == a_type || c_type == F32);
    if (!(in_f64 || in_f32) || !types) {
        report("cuBLAS: no product of types " + std::to_string(a_type) + ", " + std::to_string(b_type) + " and " +
               std::to_string(c_type) + " with compute type " + std::to_string(compute));
        return BLAS_NOT_SUPPORTED;
    }
    if (lda < (transposed_a ? k : m) || ldb < (transposed_b ? n : k) || ldc < m || lda < 1 || ldb < 1 || ldc < 1) {
        return invalid("a leading dimension is smaller than the matrix");
    }
    if (m == 0 || n == 0 || items == 0) return BLAS_SUCCESS;
    auto operation = std::make_unique<Gemm>();
    operation->m = m, operation->n = n, operation->k = k, operation->items = items;
    operation->alpha = in_f64 ? *static_cast<const double*>(alpha) : *static_cast<const float*>(alpha);
    operation->beta = in_f64 ? *static_cast<const double*>(beta) : *static_cast<const float*>(beta);
    operation->a = {uintptr_t(a), a_type, lda, a_stride, transposed_a != 0};
    operation->b = {uintptr_t(b), b_type, ldb, b_stride, transposed_b != 0};
    operation->c = {uintptr_t(c), c_type, ldc, c_stride, false};
    operation->in_f64 = in_f64;
    operation->tf32 = a_type == F32 && (compute == COMPUTE_F32_FAST_TF32 ||
                                        (compute == COMPUTE_F32 && (handle->math & 0xF) == TF32_MATH));
    const int result = enqueue(handle->stream, std::move(operation));
    return result == SUCCESS ? BLAS_SUCCESS : BLAS_EXECUTION_FAILED;
}

}  // namespace
}  // namespace xt

using namespace xt;

XT_EXPORT int cublasCreate_v2(Handle** handle) {
    if (shall_fail(BLAS)) return BLAS_NOT_INITIALIZED;
    *handle = new Handle;
    count_alive(BLAS_HANDLE, 1);
    return BLAS_SUCCESS;
}

XT_EXPORT int cublasDestroy_v2(Handle* handle) {
    delete handle;
    count_alive(BLAS_HANDLE, -1);
    return BLAS_SUCCESS;
}

XT_EXPORT int cublasSetStream_v2(Handle* handle, Stream* stream) {
    handle->stream = stream;
    return BLAS_SUCCESS;
}

XT_EXPORT int cublasSetWorkspace_v2(Handle*, void* workspace, size_t bytes) {
    std::string why;
    if (bytes == 0 || may_write(uintptr_t(workspace), bytes, why)) return BLAS_SUCCESS;
    return invalid("the workspace " + why);
}

XT_EXPORT int cublasSetMathMode(Handle* handle, int mode) {
    handle->math = mode;
    return BLAS_SUCCESS;
}

// Scaling factors are in host memory, the default pointer mode.
XT_EXPORT int cublasSetPointerMode_v2(Handle*, int mode) { return mode == 0 ? BLAS_SUCCESS : BLAS_NOT_SUPPORTED; }

XT_EXPORT int cublasGetVersion_v2(Handle*, int* version) {
    *version = 130000;
    return BLAS_SUCCESS;
}

XT_EXPORT int cublasGemmEx(Handle* handle, int ta, int tb, int m, int n, int k, const void* alpha, const void* a,
                           int a_type, int lda, const void* b, int b_type, int ldb, const void* beta, void* c,
                           int c_type, int ldc, int compute, int) {
    return gemm(handle, ta, tb, m, n, k, alpha, a, a_type, lda, 0, b, b_type, ldb, 0, beta, c, c_type, ldc, 0, 1,
                compute);
}

XT_EXPORT int cublasGemmStridedBatchedEx(Handle* handle, int ta, int tb, int m, int n, int k, const void* alpha,
                                         const void* a, int a_type, int lda, long long a_stride, const void* b,
                                         int b_type, int ldb, long long b_stride, const void* beta, void* c,
                                         int c_type, int ldc, long long c_stride, int items, int compute, int) {
    return gemm(handle, ta, tb, m, n, k, alpha, a, a_type, lda, a_stride, b, b_type, ldb, b_stride, beta, c, c_type,
                ldc, c_stride, items, compute);
}

#define XT_GEMM(name, E, type, compute)                                                                            \
    XT_EXPORT int cublas##name##gemm_v2(Handle* handle, int ta, int tb, int m, int n, int k, const E* alpha,       \
                                        const E* a, int lda, const E* b, int ldb, const E* beta, E* c, int ldc) {  \
        return gemm(handle, ta, tb, m, n, k, alpha, a, type, lda, 0, b, type, ldb, 0, beta, c, type, ldc, 0, 1,    \
                    compute);                                                                                      \
    }                                                                                                              \
    XT_EXPORT int cublas##name##gemmStridedBatched(Handle* handle, int ta, int tb, int m, int n, int k,            \
                                                   const E* alpha, const E* a, int lda, long long a_stride,        \
                                                   const E* b, int ldb, long long b_stride, const E* beta, E* c,   \
                                                   int ldc, long long c_stride, int items) {                       \
        return gemm(handle, ta, tb, m, n, k, alpha, a, type, lda, a_stride, b, type, ldb, b_stride, beta, c, type, \
                    ldc, c_stride, items, compute);                                                                \
    }
XT_GEMM(S, float, F32, COMPUTE_F32)
XT_GEMM(D, double, F64, COMPUTE_F64)
