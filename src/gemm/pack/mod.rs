//! Operands in the layouts that kernels read: in place, or packed into panels. A [`Packing`] is a kernel together with
//! the layout of its operands, like a context in BLIS:
//!
//! * [`panels`]: the type of the sums, for [multiply-adds](crate::gemm::kernels::fma);
//! * [`bf16`]: rows and pairs of columns in bf16, for products of pairs and for tiles;
//! * [`split`]: f32 as the sum of three bf16 parts, for tiles.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
pub(super) mod bf16;
pub(super) mod panels;
#[cfg(target_arch = "x86_64")]
pub(super) mod split;

use bytemuck::Pod;

use super::matrix::{Beta, Matrix, Tile, Window};
use crate::dtype::Float;

/// Instructions of a kernel, which determine the order of additions.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Arithmetic {
    /// Chains of multiply-adds.
    Fma,
    /// Chains of two products at a time.
    Bf16Dot,
    /// Tiles of AMX.
    Amx,
}

/// Operand of one block.
#[derive(Clone, Copy)]
pub(super) enum Operand<'a, T> {
    /// In place, with its layout in memory.
    InPlace(Matrix<'a, T>),
    /// Panels, in the packing's type of elements.
    Packed(&'a [u8]),
}

impl<'a, T> Operand<'a, T> {
    /// Returns the panels of an operand that is never read in place.
    fn packed<P: Pod>(self) -> &'a [P] {
        match self {
            // Too short for any block, which the kernel detects.
            Self::InPlace(_) => &[],
            Self::Packed(bytes) => bytemuck::cast_slice(bytes),
        }
    }
}

/// Kernel for matrices of `T` with sums in [`Float::Acc`], and the layout of its operands.
pub(super) trait Packing<T: Float>: Sync {
    /// Returns the instructions of the kernel.
    fn arithmetic(&self) -> Arithmetic;

    /// Returns the number of rows and columns of the panels.
    fn tile(&self) -> Tile;

    /// Returns `true` if its products have the precision that the process asks for.
    fn is_exact_enough(&self) -> bool {
        true
    }

    /// Returns the depth of an instruction: blocks are padded with zeros to multiples of it.
    fn kr(&self) -> usize {
        1
    }

    /// Returns the number of bytes per packed element.
    fn packed_size(&self) -> usize;

    /// Returns `true` if reading a block of A in place is as fast as packing it for `n` columns.
    fn reads_a(&self, _a: Matrix<T>, _kc: usize, _n: usize) -> bool {
        false
    }

    /// Returns `true` if reading `n` columns of B in place is as fast as packing them for `m` rows.
    fn reads_b(&self, _b: Matrix<T>, _kc: usize, _m: usize, _n: usize) -> bool {
        false
    }

    /// Packs `m` rows of A in whole panels. Returns `false` if values are out of the range of the instructions, so that
    /// only multiply-adds compute them correctly. `to` is aligned to a cache line.
    #[must_use]
    fn pack_a(&self, a: Matrix<T>, m: usize, kc: usize, to: &mut [u8]) -> bool;

    /// Packs `n` columns of B in whole panels, like [`Packing::pack_a`].
    #[must_use]
    fn pack_b(&self, b: Matrix<T>, n: usize, kc: usize, to: &mut [u8]) -> bool;

    /// Computes `C = beta + A·B` for one block, whose depth `kc` is at least 1.
    fn multiply(&self, kc: usize, a: Operand<T>, b: Operand<T>, beta: Beta<T::Acc>, c: Window<T::Acc>);
}
