//! Products with few rows of A: reading B is all the cost, and packing it would be another pass. Each method adds in
//! the order of the packed kernel with the same arithmetic, and so gives the same bits; it leaves remaining columns to
//! that kernel.
//!
//! * [`streamed`]: B passes through the registers once, by AVX2;
//! * [`transposed`]: columns of B lie in memory, and AVX-512 transposes squares of them.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
pub(super) mod streamed;
pub(super) mod transposed;

use super::matrix::{Beta, Matrix, Window};
use crate::{DType, dtype::Float};

/// Method of multiplying few rows.
#[derive(Clone, Copy)]
pub(super) enum FewRows {
    Streamed,
    Transposed(transposed::Word),
}

impl FewRows {
    /// Computes `C = beta + A·B` for the first columns; returns their number. `areas` are memory for rows of A and for
    /// sums.
    pub fn multiply<T: Float>(
        self,
        k: usize,
        a: Matrix<T>,
        b: Matrix<T>,
        beta: Beta<T::Acc>,
        c: &mut Window<T::Acc>,
        [rows, sums]: [&mut Vec<u64>; 2],
    ) -> usize {
        // f64 serves references and gradient checks: it is always packed.
        if T::DTYPE == DType::F64 {
            return 0;
        }
        match self {
            Self::Streamed => streamed::multiply(k, a, b, beta, c, [rows, sums]),
            Self::Transposed(word) => transposed::multiply(word, k, a, b, beta, c, rows),
        }
    }
}
