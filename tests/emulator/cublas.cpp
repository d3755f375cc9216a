// cuBLAS and cuBLASLt: C = alpha op(A) op(B) + beta C, column-major, summed in the order of k without blocking.

#include <algorithm>
#include <bit>
#include <cstdlib>
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
    // Epilogues of cuBLASLt, of the type of C: a value per row to add, and sums over k per column of B; or 0.
    uintptr_t bias = 0, column_sums = 0;

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
                    if (bias != 0) {
                        value += read<A>(reinterpret_cast<const char*>(bias) + row * size_of(c.type), c.type, false);
                    }
                    if (beta != 0) value += A(beta) * read<A>(element, c.type, false);
                    write<A>(element, c.type, value);
                }
                mark_written(uintptr_t(to), m * size_of(c.type));
                if (column_sums == 0) continue;
                A sum = 0;
                for (int inner = 0; inner < k; ++inner) sum += right[size_t(column) * k + inner];
                const uintptr_t total = column_sums + column * size_of(c.type);
                write<A>(reinterpret_cast<char*>(total), c.type, sum);
                mark_written(total, size_of(c.type));
            }
        }
    }

    // `product`, m, n, k, the leading dimensions of A, B and C, and the epilogue.
    std::string name() const override {
        std::string text = "product";
        for (int size : {m, n, k}) text += ' ' + std::to_string(size);
        for (const Matrix* matrix : {&a, &b, &c}) text += ' ' + std::to_string(matrix->leading);
        return text + (bias != 0 ? " + bias" : column_sums != 0 ? " + sums" : "");
    }

    int run() override {
        if (shall_fail(LAUNCH)) return LAUNCH_OUT_OF_RESOURCES;
        std::string why;
        if (bias != 0 && !may_read(bias, m * size_of(c.type), why)) report("cuBLASLt, bias, " + why);
        if (column_sums != 0 && !may_write(column_sums, n * size_of(c.type), why)) report("cuBLASLt, sums, " + why);
        const bool right = why.empty() && allowed("A", a, a.transposed ? k : m, a.transposed ? m : k, false) &&
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

// Returns the error of a product with these types, or 0.
int objection(int a_type, int b_type, int c_type, int compute) {
    const bool in_f64 = compute == COMPUTE_F64 || compute == COMPUTE_F64_PEDANTIC;
    const bool in_f32 = compute == COMPUTE_F32 || compute == COMPUTE_F32_PEDANTIC || compute == COMPUTE_F32_FAST_TF32;
    const auto halves = [](int type) { return type == F16 || type == BF16; };
    const bool types = in_f64 ? a_type == F64 && b_type == F64 && c_type == F64
                              : a_type == b_type && (a_type == F32 || halves(a_type)) &&
                                    (c_type == a_type || c_type == F32);
    if ((in_f64 || in_f32) && types) return BLAS_SUCCESS;
    report("cuBLAS: no product of types " + std::to_string(a_type) + ", " + std::to_string(b_type) + " and " +
           std::to_string(c_type) + " with compute type " + std::to_string(compute));
    return BLAS_NOT_SUPPORTED;
}

int gemm(Handle* handle, int transposed_a, int transposed_b, int m, int n, int k, const void* alpha, const void* a,
         int a_type, int lda, long long a_stride, const void* b, int b_type, int ldb, long long b_stride,
         const void* beta, void* c, int c_type, int ldc, long long c_stride, int items, int compute) {
    if (lost()) return BLAS_EXECUTION_FAILED;
    if (handle == nullptr) return BLAS_NOT_INITIALIZED;
    if (m < 0 || n < 0 || k < 0 || items < 0) return invalid("a negative size");
    const bool in_f64 = compute == COMPUTE_F64 || compute == COMPUTE_F64_PEDANTIC;
    if (int error = objection(a_type, b_type, c_type, compute)) return error;
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

// --- cuBLASLt: products with an epilogue.

namespace xt {
namespace {

struct Layout {
    int type;
    uint64_t rows, columns;
    int64_t leading;
};

struct Product {
    int compute, transposed_a = 0, transposed_b = 0, epilogue = 1;
    uintptr_t bias = 0;
};

enum ProductAttribute { TRANS_A = 3, TRANS_B = 4, EPILOGUE = 7, BIAS_POINTER = 8 };
enum Epilogue { EPILOGUE_DEFAULT = 1, EPILOGUE_BIAS = 4, EPILOGUE_BGRADB = 512 };

// Alignments that the caller promises, and the permitted ways to add partial sums.
struct Preference {
    uint32_t alignment[4] = {256, 256, 256, 256}, reduction = ~0u;
};

// The opaque descriptor, in which a heuristic leaves what it was asked for.
struct Algorithm {
    uint64_t marker, rows, columns, inner, alignment, unused[3];
};
constexpr uint64_t MARKER = 0x58545F4C54ull;

struct Found {
    Algorithm algorithm;
    size_t workspace;
    int state;
    float waves;
    int reserved[4];
};

uint64_t inner_of(const Product& product, const Layout& a) { return product.transposed_a ? a.rows : a.columns; }

// Returns the error of a product of these matrices, or 0.
int objection(const Product& product, const Layout& a, const Layout& b, const Layout& c) {
    if (int error = objection(a.type, b.type, c.type, product.compute)) return error;
    const uint64_t m = product.transposed_a ? a.columns : a.rows, n = product.transposed_b ? b.rows : b.columns;
    const uint64_t k = product.transposed_b ? b.columns : b.rows;
    if (m != c.rows || n != c.columns || k != inner_of(product, a)) return invalid("cuBLASLt: sizes that do not match");
    for (const Layout* layout : {&a, &b, &c}) {
        if (layout->leading < int64_t(layout->rows) || layout->leading < 1) {
            return invalid("cuBLASLt: a leading dimension is smaller than the matrix");
        }
    }
    const bool known = product.epilogue == EPILOGUE_DEFAULT || product.epilogue == EPILOGUE_BIAS ||
                       product.epilogue == EPILOGUE_BGRADB;
    if (!known) return BLAS_NOT_SUPPORTED;
    // Rows that are not whole packets of four bytes have no kernels with epilogues.
    const auto aligned = [](const Layout& layout) { return layout.leading * size_of(layout.type) % 4 == 0; };
    return aligned(a) && aligned(b) && aligned(c) ? BLAS_SUCCESS : BLAS_NOT_SUPPORTED;
}

}  // namespace
}  // namespace xt

// XT_EMULATOR_CUBLASLT=off: as if the library were not there.
XT_EXPORT int cublasLtCreate(Handle** handle) {
    const char* const state = getenv("XT_EMULATOR_CUBLASLT");
    if (state != nullptr && std::string(state) == "off") return BLAS_NOT_INITIALIZED;
    *handle = new Handle;
    count_alive(BLAS_HANDLE, 1);
    return BLAS_SUCCESS;
}

XT_EXPORT int cublasLtDestroy(Handle* handle) { return cublasDestroy_v2(handle); }

XT_EXPORT int cublasLtMatrixLayoutCreate(Layout** layout, int type, uint64_t rows, uint64_t columns, int64_t leading) {
    *layout = new Layout{type, rows, columns, leading};
    return BLAS_SUCCESS;
}

XT_EXPORT int cublasLtMatrixLayoutDestroy(Layout* layout) {
    delete layout;
    return BLAS_SUCCESS;
}

XT_EXPORT int cublasLtMatmulDescCreate(Product** product, int compute, int scale) {
    if (scale != F32) return BLAS_NOT_SUPPORTED;
    *product = new Product{compute};
    return BLAS_SUCCESS;
}

XT_EXPORT int cublasLtMatmulDescSetAttribute(Product* product, int attribute, const void* value, size_t bytes) {
    if (attribute == BIAS_POINTER) {
        if (bytes != sizeof product->bias) return BLAS_INVALID_VALUE;
        memcpy(&product->bias, value, bytes);
        return BLAS_SUCCESS;
    }
    int* const to = attribute == TRANS_A    ? &product->transposed_a
                    : attribute == TRANS_B  ? &product->transposed_b
                    : attribute == EPILOGUE ? &product->epilogue
                                            : nullptr;
    if (to == nullptr || bytes != sizeof *to) return BLAS_INVALID_VALUE;
    memcpy(to, value, bytes);
    return BLAS_SUCCESS;
}

XT_EXPORT int cublasLtMatmulDescDestroy(Product* product) {
    delete product;
    return BLAS_SUCCESS;
}

XT_EXPORT int cublasLtMatmulPreferenceCreate(Preference** preference) {
    *preference = new Preference;
    return BLAS_SUCCESS;
}

XT_EXPORT int cublasLtMatmulPreferenceSetAttribute(Preference* preference, int attribute, const void* value,
                                                   size_t bytes) {
    enum { WORKSPACE = 1, REDUCTION = 3, ALIGNMENT_A = 5, ALIGNMENT_D = 8 };
    if (attribute == WORKSPACE) return bytes == sizeof(size_t) ? BLAS_SUCCESS : BLAS_INVALID_VALUE;
    uint32_t* const to = attribute == REDUCTION                                     ? &preference->reduction
                         : attribute >= ALIGNMENT_A && attribute <= ALIGNMENT_D ? &preference->alignment[attribute - 5]
                                                                                    : nullptr;
    if (to == nullptr || bytes != sizeof *to) return BLAS_INVALID_VALUE;
    memcpy(to, value, bytes);
    return BLAS_SUCCESS;
}

XT_EXPORT int cublasLtMatmulPreferenceDestroy(Preference* preference) {
    delete preference;
    return BLAS_SUCCESS;
}

XT_EXPORT int cublasLtMatmulAlgoGetHeuristic(Handle*, const Product* product, const Layout* a, const Layout* b,
                                             const Layout* c, const Layout* d, const Preference* preference, int most,
                                             Found* found, int* count) {
    *count = 0;
    if (most < 1) return BLAS_INVALID_VALUE;
    if (memcmp(c, d, sizeof *c) != 0) return BLAS_NOT_SUPPORTED;
    if (int error = objection(*product, *a, *b, *c)) return error;
    uint32_t least = 256;
    for (uint32_t alignment : preference->alignment) least = std::min(least, alignment);
    *found = {{MARKER, c->rows, c->columns, inner_of(*product, *a), least, {}}, 0, BLAS_SUCCESS, 1, {}};
    *count = 1;
    return BLAS_SUCCESS;
}

XT_EXPORT int cublasLtMatmul(Handle* handle, const Product* product, const void* alpha, const void* a,
                             const Layout* a_layout, const void* b, const Layout* b_layout, const void* beta,
                             const void* c, const Layout* c_layout, void* d, const Layout* d_layout,
                             const Algorithm* algorithm, void*, size_t, Stream* stream) {
    if (lost()) return BLAS_EXECUTION_FAILED;
    if (handle == nullptr) return BLAS_NOT_INITIALIZED;
    if (c != d || memcmp(c_layout, d_layout, sizeof *c_layout) != 0) return BLAS_NOT_SUPPORTED;
    if (int error = objection(*product, *a_layout, *b_layout, *c_layout)) return error;
    const uint64_t inner = inner_of(*product, *a_layout);
    if (algorithm == nullptr || algorithm->marker != MARKER || algorithm->rows != c_layout->rows ||
        algorithm->columns != c_layout->columns || algorithm->inner != inner) {
        return invalid("cuBLASLt: the algorithm was chosen for another product");
    }
    for (uintptr_t address : {uintptr_t(a), uintptr_t(b), uintptr_t(d)}) {
        if (address % algorithm->alignment != 0) return invalid("cuBLASLt: a matrix is less aligned than was promised");
    }
    if (product->epilogue != EPILOGUE_DEFAULT && product->bias % 16 != 0) return invalid("cuBLASLt: a misaligned bias");
    auto operation = std::make_unique<Gemm>();
    operation->m = int(c_layout->rows), operation->n = int(c_layout->columns), operation->k = int(inner);
    operation->items = 1;
    operation->alpha = *static_cast<const float*>(alpha), operation->beta = *static_cast<const float*>(beta);
    const auto matrix = [](const void* address, const Layout* layout, bool transposed) {
        return Matrix{uintptr_t(address), layout->type, int(layout->leading), 0, transposed};
    };
    operation->a = matrix(a, a_layout, product->transposed_a), operation->b = matrix(b, b_layout, product->transposed_b);
    operation->c = matrix(d, d_layout, false);
    operation->in_f64 = operation->tf32 = false;
    operation->bias = product->epilogue == EPILOGUE_BIAS ? product->bias : 0;
    operation->column_sums = product->epilogue == EPILOGUE_BGRADB ? product->bias : 0;
    return enqueue(stream, std::move(operation)) == SUCCESS ? BLAS_SUCCESS : BLAS_EXECUTION_FAILED;
}
