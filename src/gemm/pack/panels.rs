//! Panels in the accumulation type, for fused multiply-adds: half types are widened during packing.

use super::{Arithmetic, Operand, Packing};
use crate::{
    dtype::Float,
    gemm::{
        kernels::{Order, PanelsA, PanelsB, fma},
        matrix::{Beta, Matrix, Tile, Window, as_sums},
    },
};

/// Maximum extent of an operand, in elements, up to which packing it does not pay.
const CLOSE: usize = 1 << 15;

/// Maximum number of columns for which compact rows of A are read in place.
const FEW_COLUMNS: usize = 128;

/// Maximum number of rows for which compact columns of B are read in place.
const FEW_ROWS: usize = 128;

/// Multiply-adds, which every processor supports.
pub(in crate::gemm) struct Fma;

impl<T: Float> Packing<T> for Fma {
    fn arithmetic(&self) -> Arithmetic {
        Arithmetic::Fma
    }

    fn tile(&self) -> Tile {
        fma::tile::<T::Acc>()
    }

    fn packed_size(&self) -> usize {
        size_of::<T::Acc>()
    }

    fn reads_a(&self, a: Matrix<T>, kc: usize, n: usize) -> bool {
        // A packed depth is read along cache lines; a strided one only if few lines serve all rows and columns.
        as_sums(a.data).is_some() && (a.col == 1 || (a.row == 1 && kc * a.col <= CLOSE && n <= FEW_COLUMNS))
    }

    fn reads_b(&self, b: Matrix<T>, kc: usize, m: usize, n: usize) -> bool {
        let near = b.col == 1 && kc * b.row <= CLOSE && m <= FEW_ROWS;
        near && as_sums(b.data).is_some() && n.is_multiple_of(fma::tile::<T::Acc>().nr)
    }

    fn pack_a(&self, a: Matrix<T>, m: usize, kc: usize, to: &mut [u8]) -> bool {
        pack(a, m, kc, fma::tile::<T::Acc>().mr, bytemuck::cast_slice_mut(to));
        true
    }

    fn pack_b(&self, b: Matrix<T>, n: usize, kc: usize, to: &mut [u8]) -> bool {
        pack(b.transposed(), n, kc, fma::tile::<T::Acc>().nr, bytemuck::cast_slice_mut(to));
        true
    }

    fn multiply(&self, kc: usize, a: Operand<T>, b: Operand<T>, beta: Beta<T::Acc>, c: Window<T::Acc>) {
        let Tile { mr, nr } = fma::tile::<T::Acc>();
        let a = match a {
            Operand::InPlace(a) => {
                let (order, stride) = if a.row == 1 { (Order::Rows, a.col) } else { (Order::Depth, a.row) };
                PanelsA { data: as_sums(a.data).unwrap_or(&[]), panel: mr * a.row, order, stride }
            }
            Operand::Packed(bytes) => {
                PanelsA { data: bytemuck::cast_slice(bytes), panel: mr * kc, order: Order::Rows, stride: mr }
            }
        };
        let b = match b {
            Operand::InPlace(b) => PanelsB { data: as_sums(b.data).unwrap_or(&[]), panel: nr, row: b.row },
            Operand::Packed(bytes) => PanelsB { data: bytemuck::cast_slice(bytes), panel: nr * kc, row: nr },
        };
        fma::multiply(kc, a, b, beta, c);
    }
}

/// Packs `m` rows of a matrix of depth `kc` into panels of `width` rows: element (i, p) goes to
/// `to[i / width * width * kc + p * width + i % width]`. Elements of the last panel beyond row `m` are unspecified.
///
/// A is packed by rows; B by columns, as the rows of its transpose.
pub(in crate::gemm) fn pack<T: Float>(from: Matrix<T>, m: usize, kc: usize, width: usize, to: &mut [T::Acc]) {
    if m == 0 || kc == 0 {
        return;
    }
    let to = &mut to[..m.next_multiple_of(width) * kc];
    assert!(from.holds(m, kc), "an operand ends before its block");
    #[cfg(target_arch = "x86_64")]
    if super::avx2::pack(from, m, kc, width, to) {
        return;
    }
    for (panel, to) in to.chunks_exact_mut(width * kc).enumerate() {
        let first = panel * width;
        for (p, to) in to.chunks_exact_mut(width).enumerate() {
            for (i, to) in to.iter_mut().take(m - first).enumerate() {
                *to = from.data[(first + i) * from.row + p * from.col].to_acc();
            }
        }
    }
}
