//! Matrix products with cuBLAS.

use std::ffi::c_void;

use cudarc::{
    cublas::{
        result::{self, CublasError},
        sys::{self, cublasComputeType_t as Compute, cublasMath_t as Math, cublasOperation_t as Operation},
    },
    driver::{DriverError, sys::CUresult},
};

use super::{
    Architecture, CudaDevice, error,
    resources::{Context, Plain, Stream},
};
use crate::{
    DType, Error, ErrorKind, Result,
    device::{
        gpu::Address,
        launch::{Gemm, Operand},
        precision::{Precision, float32_matmul_precision},
    },
};

/// A cuBLAS handle with its own workspace, which on a single stream makes results reproducible.
pub(super) struct Handle {
    handle: Library,
    // Freed after the handle, which uses it.
    workspace: Plain,
    bytes: usize,
}

/// A raw handle from `cublasCreate`.
struct Library(sys::cublasHandle_t);

// SAFETY: used by one thread at a time, behind a lock.
unsafe impl Send for Library {}

impl Drop for Library {
    fn drop(&mut self) {
        // SAFETY: created in `Handle::new`, not used again.
        let _ = unsafe { result::destroy_handle(self.0) };
    }
}

impl Handle {
    /// Creates a handle for products on this stream. The stream's context must be current.
    pub fn new(stream: &Stream, architecture: Architecture, current: &Context) -> Result<Self> {
        let fail = |why: CublasError| error(format!("cuBLAS: {why:?}"));
        let handle = Library(result::create_handle().map_err(fail)?);
        // SAFETY: the handle was made above; both libraries mean the same handle of a stream.
        unsafe { result::set_stream(handle.0, stream.0.cast()) }.map_err(fail)?;
        // The size that cuBLAS itself would choose on these cards.
        let bytes = if architecture >= 90 { 32 << 20 } else { 4 << 20 };
        let workspace = Plain::new(bytes, current).map_err(|DriverError(why)| match why {
            CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
                Error::new(ErrorKind::OutOfMemory { requested: bytes, live: 0, cached: 0 })
            }
            _ => error(format!("cuMemAlloc of {bytes} bytes for cuBLAS: {why:?}")),
        })?;
        // SAFETY: the memory has this size and is freed after the handle.
        unsafe { sys::cublasSetWorkspace_v2(handle.0, workspace.address() as *mut c_void, bytes) }
            .result()
            .map_err(fail)?;
        Ok(Self { handle, workspace, bytes })
    }

    /// Returns address and size of the workspace.
    pub fn workspace(&self) -> (u64, usize) {
        (self.workspace.address(), self.bytes)
    }
}

impl CudaDevice {
    /// Enqueues a matrix product. Sums in f32 (f64 for f64); in TF32 under [`Precision::High`] and below.
    ///
    /// Errors: sizes beyond 2³¹ − 1, or an error of cuBLAS.
    pub(super) fn multiply(&self, gemm: &Gemm) -> Result<()> {
        let Gemm { dtype, sums, batch, m, n, k, a, b, c, add, .. } = *gemm;
        let ints = [m, n, k, a.stride, b.stride, batch].map(i32::try_from);
        let [Ok(rows), Ok(columns), Ok(inner), Ok(a_stride), Ok(b_stride), Ok(items)] = ints else {
            return Err(Error::shape("matmul", format_args!("a size of {gemm:?} exceeds 2^31 - 1")));
        };
        let (kind, compute) = match dtype {
            DType::F32 => (sys::cudaDataType_t::CUDA_R_32F, Compute::CUBLAS_COMPUTE_32F),
            DType::F64 => (sys::cudaDataType_t::CUDA_R_64F, Compute::CUBLAS_COMPUTE_64F),
            DType::BF16 => (sys::cudaDataType_t::CUDA_R_16BF, Compute::CUBLAS_COMPUTE_32F),
            DType::F16 => (sys::cudaDataType_t::CUDA_R_16F, Compute::CUBLAS_COMPUTE_32F),
            other => return Err(Error::dtype("matmul", format_args!("expected a float tensor, got {other}"))),
        };
        let kind_of_c = match dtype {
            DType::F64 => kind,
            _ if sums => sys::cudaDataType_t::CUDA_R_32F,
            _ => kind,
        };
        // TF32 only on request; sums of half types are never rounded to half precision on the way.
        let math = match (dtype, float32_matmul_precision()) {
            (DType::F32, Precision::High | Precision::Medium) => Math::CUBLAS_TF32_TENSOR_OP_MATH,
            _ => Math::CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION,
        };
        let (one, zero) = (1f64.to_bits(), 0u64);
        let (one32, zero32) = (1f32.to_bits(), 0u32);
        let factor = |on: bool| -> *const c_void {
            match (dtype, on) {
                (DType::F64, true) => std::ptr::from_ref(&one).cast(),
                (DType::F64, false) => std::ptr::from_ref(&zero).cast(),
                (_, true) => std::ptr::from_ref(&one32).cast(),
                (_, false) => std::ptr::from_ref(&zero32).cast(),
            }
        };
        let operation =
            |operand: Operand| if operand.transposed { Operation::CUBLAS_OP_T } else { Operation::CUBLAS_OP_N };
        let _pass = self.enter("a product")?;
        self.hold("a product", [a.address, b.address, c].map(Address::get))?;
        self.bind()?;
        let blas = self.blas.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let handle = blas.handle.0;
        // SAFETY: the handle lives as long as the device.
        let moded = unsafe { sys::cublasSetMathMode(handle, math) }.result();
        // cuBLAS is column-major: our rows are its columns, so it computes cᵀ = bᵀ aᵀ. SAFETY: the caller's tensors
        // hold what sizes and strides say, and are freed on this stream, after this product; a graph that it becomes
        // part of holds their memory. The factors are read before the call returns.
        let outcome = moded.and_then(|()| unsafe {
            result::gemm_strided_batched_ex(
                handle,
                operation(b),
                operation(a),
                columns,
                rows,
                inner,
                factor(true),
                b.address.get() as *const c_void,
                kind,
                b_stride,
                b.batch as i64,
                a.address.get() as *const c_void,
                kind,
                a_stride,
                a.batch as i64,
                factor(add),
                c.get() as *mut c_void,
                kind_of_c,
                columns,
                (m * n) as i64,
                items,
                compute,
                sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
            )
        });
        outcome.map_err(|why| {
            error(format!("cuBLAS: {:?} for {batch} products [{m}, {k}] · [{k}, {n}] in {dtype}", why.0))
        })
    }
}
