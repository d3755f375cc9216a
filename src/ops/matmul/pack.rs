//! Copies of an operand in the order in which the micro-kernel reads it, converted to the type of the sums.

use super::cpu::Matrix;
use crate::{
    core::{Float, Real},
    device::simd::vectorized,
};

/// Packs `lanes` rows of a matrix with `steps` columns into panels of `width` rows: element (lane, step) goes to
/// `to[lane / width * width * steps + step * width + lane % width]`. The last panel is filled with zeros.
///
/// A is packed by its rows; B by its columns, that is as the rows of its transpose.
pub(super) fn pack<T: Float>(from: Matrix<T>, lanes: usize, steps: usize, width: usize, to: &mut [T::Acc]) {
    if steps == 0 {
        return;
    }
    for (panel, to) in to.chunks_exact_mut(width * steps).take(lanes.div_ceil(width)).enumerate() {
        let first = panel * width;
        let from = Matrix { data: &from.data[first * from.row..], ..from };
        let filled = width.min(lanes - first);
        if filled < width {
            to.fill(T::Acc::ZERO);
        }
        match from {
            Matrix { row: 1, .. } => pack_steps(from.data, from.col, filled, width, to),
            _ => pack_lanes(from.data, from.row, from.col, filled, width, to),
        }
    }
}

vectorized! {
    /// A panel whose lanes lie next to each other.
    fn pack_steps<T: Float>(from: &[T], step: usize, filled: usize, width: usize, to: &mut [T::Acc]) {
        for (index, to) in to.chunks_exact_mut(width).enumerate() {
            for (to, from) in to.iter_mut().zip(&from[index * step..][..filled]) {
                *to = from.to_acc();
            }
        }
    }
}

vectorized! {
    /// A panel whose lanes lie apart.
    fn pack_lanes<T: Float>(from: &[T], row: usize, step: usize, filled: usize, width: usize, to: &mut [T::Acc]) {
        for (index, to) in to.chunks_exact_mut(width).enumerate() {
            for (lane, to) in to[..filled].iter_mut().enumerate() {
                *to = from[lane * row + index * step].to_acc();
            }
        }
    }
}
