//! Operands as kernels read them: in place, or packed into panels. A [`Packing`] is a kernel together with its layout of
//! operands, what BLIS calls a context:
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

/// The instructions of a kernel, which fix the order of additions.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Arithmetic {
    /// Chains of multiply-adds.
    Fma,
    /// Chains of two products at a time.
    Bf16Dot,
    /// Tiles of AMX.
    Amx,
}

/// An operand of one block.
#[derive(Clone, Copy)]
pub(super) enum Operand<'a, T> {
    /// As it lies in memory.
    InPlace(Matrix<'a, T>),
    /// Panels, in the packing's type of elements.
    Packed(&'a [u8]),
}

impl<'a, T> Operand<'a, T> {
    /// The panels of an operand that is never read in place.
    fn packed<P: Pod>(self) -> &'a [P] {
        match self {
            // Too short for any block, which the kernel finds.
            Self::InPlace(_) => &[],
            Self::Packed(bytes) => bytemuck::cast_slice(bytes),
        }
    }
}

/// A kernel for matrices of `T` with sums in [`Float::Acc`], and the layout of the operands that it reads.
pub(super) trait Packing<T: Float>: Sync {
    /// The instructions of the kernel.
    fn arithmetic(&self) -> Arithmetic;

    /// Rows and columns of the panels.
    fn tile(&self) -> Tile;

    /// The depth of an instruction: blocks are packed in multiples of it, filled up with zeros.
    fn kr(&self) -> usize {
        1
    }

    /// Bytes of a packed element.
    fn packed_size(&self) -> usize;

    /// If `true`, reading a block of A where it lies is as fast as packing it for `n` columns.
    fn reads_a(&self, _a: Matrix<T>, _kc: usize, _n: usize) -> bool {
        false
    }

    /// If `true`, reading `n` columns of B where they lie is as fast as packing them for `m` rows.
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

    /// `C = beta + A·B` for one block, whose depth `kc` is at least 1.
    fn multiply(&self, kc: usize, a: Operand<T>, b: Operand<T>, beta: Beta<T::Acc>, c: Window<T::Acc>);
}
