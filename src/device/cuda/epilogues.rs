//! Matrix products with cuBLASLt, for what cuBLAS cannot do in the same pass: adding a bias, and the gradient of a bias.
//!
//! Half types only: cuBLASLt may choose another kernel than cuBLAS, and results in f32 and f64 must not depend on whether
//! it is installed. Its GELU is the approximation by tanh and has no use here: models that want it are rare.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    ffi::c_void,
    sync::{MutexGuard, PoisonError},
};

use cudarc::{
    cublas::sys::cublasOperation_t as Operation,
    cublaslt::{
        result::{self, CublasError},
        sys::{
            self, cublasComputeType_t as Compute, cublasLtEpilogue_t as Epilogue,
            cublasLtMatmulDescAttributes_t as Attribute, cublasLtMatmulPreferenceAttributes_t as Preference,
        },
    },
};

use super::{CudaDevice, error, libraries};
use crate::{
    DType, Result,
    device::{
        gpu::Address,
        launch::{Gemm, Operand},
    },
};

/// Partial sums are added in f32: never in the type of the result, never in an order that changes.
const REDUCTION: u32 = sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32;

/// A cuBLASLt handle, and the algorithms that it has chosen.
pub(super) struct Handle {
    handle: Library,
    /// Address and size of the workspace of cuBLAS; both enqueue work on one stream.
    workspace: (u64, usize),
    algorithms: BTreeMap<Key, Option<sys::cublasLtMatmulAlgo_t>>,
}

/// A raw handle from `cublasLtCreate`.
struct Library(sys::cublasLtHandle_t);

// SAFETY: used by one thread at a time, behind a lock.
unsafe impl Send for Library {}

impl Drop for Library {
    fn drop(&mut self) {
        // SAFETY: created in `Handle::new`, not used again.
        let _ = unsafe { result::destroy_handle(self.0) };
    }
}

impl Handle {
    /// Creates a handle; `None` if cuBLASLt is not there. The device's context must be current.
    pub fn new(workspace: (u64, usize)) -> Option<Self> {
        let handle = Library(libraries::has_cublaslt().then(result::create_handle)?.ok()?);
        Some(Self { handle, workspace, algorithms: BTreeMap::new() })
    }
}

/// Everything that the choice of an algorithm depends on.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    is_f16: bool,
    wide: bool,
    /// `m`, `n`, `k`, and the strides of both operands.
    sizes: [i64; 5],
    transposed: [bool; 2],
    add: bool,
    row_sums: bool,
    /// Alignment of `a`, `b` and `c` in bytes.
    alignment: [u32; 3],
}

impl Key {
    /// Returns the key of a product that may be served; `None` for others.
    fn of(gemm: &Gemm) -> Option<Self> {
        let Gemm { dtype, sums, batch, m, n, k, a, b, c, add, bias, row_sums } = *gemm;
        // One epilogue per product; neither is there without columns.
        if !matches!(dtype, DType::BF16 | DType::F16) || batch != 1 || bias.is_some() == row_sums.is_some() {
            return None;
        }
        let sizes = [m, n, k, a.stride, b.stride].map(|size| i32::try_from(size).map(i64::from));
        let [Ok(m), Ok(n), Ok(k), Ok(a_stride), Ok(b_stride)] = sizes else { return None };
        let alignment = |address: Address| 1 << address.get().trailing_zeros().min(8);
        // What kernels read in packets.
        let epilogue = bias.or(row_sums).map(alignment)?;
        (epilogue >= 16).then_some(Self {
            is_f16: dtype == DType::F16,
            wide: sums,
            sizes: [m, n, k, a_stride, b_stride],
            transposed: [a.transposed, b.transposed],
            add,
            row_sums: row_sums.is_some(),
            alignment: [a.address, b.address, c].map(alignment),
        })
    }

    fn types(&self) -> [sys::cudaDataType_t; 2] {
        let half = if self.is_f16 { sys::cudaDataType_t::CUDA_R_16F } else { sys::cudaDataType_t::CUDA_R_16BF };
        [half, if self.wide { sys::cudaDataType_t::CUDA_R_32F } else { half }]
    }
}

/// Descriptors of one product; like cuBLAS, cuBLASLt is column-major and computes `cᵀ = bᵀ aᵀ`.
struct Described {
    product: sys::cublasLtMatmulDesc_t,
    /// Layouts of `b`, `a` and `c`.
    layouts: Vec<sys::cublasLtMatrixLayout_t>,
}

impl Drop for Described {
    fn drop(&mut self) {
        // SAFETY: each was made by `Described::new`, and is not used again.
        unsafe {
            let _ = result::destroy_matmul_desc(self.product);
            self.layouts.iter().for_each(|&layout| _ = result::destroy_matrix_layout(layout));
        }
    }
}

impl Described {
    /// `epilogue`: address of the bias or of the row sums.
    fn new(key: &Key, epilogue: u64) -> std::result::Result<Self, CublasError> {
        let ([kind, kind_of_c], [m, n, k, a_stride, b_stride]) = (key.types(), key.sizes);
        let product = result::create_matmul_desc(Compute::CUBLAS_COMPUTE_32F, sys::cudaDataType_t::CUDA_R_32F)?;
        let mut described = Self { product, layouts: Vec::new() };
        let [a_transposed, b_transposed] = key.transposed;
        let operation = |on: bool| if on { Operation::CUBLAS_OP_T as u32 } else { Operation::CUBLAS_OP_N as u32 };
        let kind_of_epilogue =
            if key.row_sums { Epilogue::CUBLASLT_EPILOGUE_BGRADB } else { Epilogue::CUBLASLT_EPILOGUE_BIAS };
        described.set(Attribute::CUBLASLT_MATMUL_DESC_TRANSA, &operation(b_transposed))?;
        described.set(Attribute::CUBLASLT_MATMUL_DESC_TRANSB, &operation(a_transposed))?;
        described.set(Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE, &(kind_of_epilogue as u32))?;
        described.set(Attribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &epilogue)?;
        let swapped =
            |transposed: bool, rows: i64, columns: i64| if transposed { (columns, rows) } else { (rows, columns) };
        let (b, a) = (swapped(b_transposed, n, k), swapped(a_transposed, k, m));
        for (kind, (rows, columns), stride) in [(kind, b, b_stride), (kind, a, a_stride), (kind_of_c, (n, m), n)] {
            described.layouts.push(result::create_matrix_layout(kind, rows as u64, columns as u64, stride)?);
        }
        Ok(described)
    }

    fn set<T>(&self, attribute: Attribute, value: &T) -> std::result::Result<(), CublasError> {
        // SAFETY: the descriptor exists; the value has the attribute's size and is copied.
        unsafe {
            result::set_matmul_desc_attribute(self.product, attribute, std::ptr::from_ref(value).cast(), size_of::<T>())
        }
    }
}

impl Handle {
    /// Returns the algorithm for these products, which is chosen once; `None` if there is none.
    fn algorithm(&mut self, key: &Key, epilogue: u64) -> Option<sys::cublasLtMatmulAlgo_t> {
        let (handle, bytes) = (self.handle.0, self.workspace.1);
        match self.algorithms.entry(*key) {
            Entry::Occupied(found) => *found.get(),
            Entry::Vacant(vacant) => *vacant.insert(choose(handle, key, epilogue, bytes).ok()),
        }
    }
}

fn choose(
    handle: sys::cublasLtHandle_t,
    key: &Key,
    epilogue: u64,
    bytes: usize,
) -> std::result::Result<sys::cublasLtMatmulAlgo_t, CublasError> {
    let described = Described::new(key, epilogue)?;
    let preference = result::create_matmul_pref()?;
    let set = |attribute, value: *const c_void, size| {
        // SAFETY: the preference exists; the value has the attribute's size and is copied.
        unsafe { result::set_matmul_pref_attribute(preference, attribute, value, size) }
    };
    let [a, b, c] = key.alignment;
    let alignments = [
        (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, b),
        (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, a),
        (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, c),
        (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, c),
        (Preference::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, REDUCTION),
    ];
    let found = set(
        Preference::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
        std::ptr::from_ref(&bytes).cast(),
        size_of::<usize>(),
    )
    .and_then(|()| {
        alignments.iter().try_for_each(|(attribute, value)| set(*attribute, std::ptr::from_ref(value).cast(), 4))
    })
    .and_then(|()| {
        let [b, a, c] = [0, 1, 2].map(|at| described.layouts[at]);
        // SAFETY: all descriptors exist.
        unsafe { result::get_matmul_algo_heuristic(handle, described.product, b, a, c, c, preference) }
    });
    // SAFETY: made above, not used again.
    let _ = unsafe { result::destroy_matmul_pref(preference) };
    found.map(|found| found.algo)
}

impl CudaDevice {
    /// Returns `true` if cuBLASLt serves a product with a bias or row sums.
    pub(super) fn has_algorithm(&self, gemm: &Gemm) -> bool {
        let (Some(mut handle), Some(key)) = (self.epilogues(), Key::of(gemm)) else { return false };
        let epilogue = gemm.bias.or(gemm.row_sums).map_or(0, Address::get);
        self.bind().is_ok() && handle.algorithm(&key, epilogue).is_some()
    }

    fn epilogues(&self) -> Option<MutexGuard<'_, Handle>> {
        self.epilogues.as_ref().map(|handle| handle.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Enqueues a product with a bias or row sums.
    ///
    /// Errors: one that [`Gpu::fuses`](crate::device::Gpu::fuses) does not return `true` for, or an error of cuBLASLt.
    pub(super) fn multiply_fused(&self, gemm: &Gemm) -> Result<()> {
        let Gemm { dtype, m, n, k, a, b, c, add, bias, row_sums, .. } = *gemm;
        let epilogue = bias.or(row_sums).unwrap_or(Address::NULL);
        let fail =
            |why: CublasError| error(format!("cuBLASLt: {:?} for a product [{m}, {k}] · [{k}, {n}] in {dtype}", why.0));
        let unsupported = || fail(CublasError(sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED));
        let _pass = self.enter("a product")?;
        self.hold("a product", [a.address.get(), b.address.get(), c.get()])?;
        self.hold("a product", [epilogue.get()])?;
        self.bind()?;
        let key = Key::of(gemm).ok_or_else(unsupported)?;
        let mut handle = self.epilogues().ok_or_else(unsupported)?;
        let algorithm = handle.algorithm(&key, epilogue.get()).ok_or_else(unsupported)?;
        let described = Described::new(&key, epilogue.get()).map_err(fail)?;
        let [b_layout, a_layout, c_layout] = [0, 1, 2].map(|at| described.layouts[at]);
        let (one, beta) = (1f32, if add { 1f32 } else { 0.0 });
        let pointer = |operand: Operand| operand.address.get() as *const c_void;
        let c = c.get() as *mut c_void;
        // SAFETY: the caller's tensors hold what sizes and strides say, and are freed on this stream, after this
        // product; a graph that it becomes part of holds their memory. The factors are read before the call returns.
        // The workspace belongs to this stream.
        unsafe {
            result::matmul(
                handle.handle.0,
                described.product,
                std::ptr::from_ref(&one).cast(),
                std::ptr::from_ref(&beta).cast(),
                pointer(b),
                b_layout,
                pointer(a),
                a_layout,
                c,
                c_layout,
                c,
                c_layout,
                &algorithm,
                handle.workspace.0 as *mut c_void,
                handle.workspace.1,
                self.stream.0.cast(),
            )
        }
        .map_err(fail)
    }
}
