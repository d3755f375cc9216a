//! Operands of the products of tiles, in the compute type or in bf16.

use half::bf16;

use super::{OP, tile::KEYS};
use crate::{
    Result, Tensor,
    device::{floats::Floats, simd::vectorized},
    dtype::{Float, Real},
    gemm::{Matrix, Multiply, gemm_block},
};

/// Operand of a product: in the compute type, or in bf16 where the processor multiplies that faster.
#[derive(Clone, Copy)]
pub(super) enum Operand<'a, A> {
    Own(Matrix<'a, A>),
    Bf16(Matrix<'a, bf16>),
}

/// Computes `c = a b`, or `c += a b`, where `c` has `m` rows that are `row` apart, and `n` columns. Both operands are of
/// one type.
pub(super) fn product<A: Real + Multiply>(
    [m, n, k]: [usize; 3],
    a: Operand<A>,
    b: Operand<A>,
    accumulate: bool,
    c: &mut [A],
    row: usize,
) {
    match (a, b) {
        (Operand::Own(a), Operand::Own(b)) => gemm_block::<A>(m, n, k, a, b, accumulate, c, row),
        (Operand::Bf16(a), Operand::Bf16(b)) => {
            gemm_block::<bf16>(m, n, k, a, b, accumulate, bytemuck::cast_slice_mut(c), row);
        }
        _ => unreachable!("operands of two types"),
    }
}

/// One operand `[batch, heads, sequence, features]` with packed rows.
pub(super) struct Rows<'a> {
    data: Floats<'a>,
    batch: usize,
    head: usize,
    row: usize,
}

impl<'a> Rows<'a> {
    pub fn new(x: &'a Tensor) -> Result<Self> {
        let layout = x.layout();
        let (strides, storage) = (layout.strides(), x.stored_floats(OP)?);
        let data = storage.range(layout.offset.min(storage.len())..storage.len());
        Ok(Self { data, batch: strides[0], head: strides[1], row: strides[2] })
    }

    /// Returns `true` if products round their other operand to bf16.
    pub fn rounds(&self) -> bool {
        matches!(self.data, Floats::BF16(_))
    }

    /// Returns the rows from `start` on.
    pub fn block<A: Real>(&self, batch: usize, head: usize, start: usize) -> Operand<'a, A> {
        let offset = batch * self.batch + head * self.head + start * self.row;
        // Rows without features may start past the end.
        let data = self.data.range(offset.min(self.data.len())..self.data.len());
        match data {
            Floats::BF16(data) => Operand::Bf16(Matrix { data, row: self.row, col: 1 }),
            data => Operand::Own(Matrix { data: data.direct().unwrap_or_default(), row: self.row, col: 1 }),
        }
    }
}

/// Returns a tile as an operand of a product: itself, or rounded to bf16 in `memory`, if there is any.
pub(super) fn operand<'a, A: Real>(tile: &'a [A], width: usize, memory: &'a mut [A]) -> Operand<'a, A> {
    if memory.is_empty() {
        return Operand::Own(Matrix { data: tile, row: KEYS, col: 1 });
    }
    let rounded: &mut [bf16] = bytemuck::cast_slice_mut(memory);
    round_rows(bytemuck::cast_slice(tile), width, rounded);
    Operand::Bf16(Matrix { data: rounded, row: KEYS, col: 1 })
}

vectorized! {
    fn round_rows(tile: &[f32], width: usize, to: &mut [bf16]) {
        for (tile, to) in tile.chunks_exact(KEYS).zip(to.chunks_exact_mut(KEYS)) {
            for (tile, to) in tile[..width].iter().zip(to) {
                *to = bf16::from_acc(*tile);
            }
        }
    }
}

/// Returns a transposed view.
pub(super) fn transposed<A: Copy>(x: Operand<A>) -> Operand<A> {
    match x {
        Operand::Own(x) => Operand::Own(Matrix { row: x.col, col: x.row, ..x }),
        Operand::Bf16(x) => Operand::Bf16(Matrix { row: x.col, col: x.row, ..x }),
    }
}
