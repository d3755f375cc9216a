//! Sizes and strides of products: broadcast batches, merged into as few items as the strides allow.

use crate::{
    Error, Result, Tensor,
    error::ensure,
    gemm::{Matrix, Multiply, Product},
    shape::{MAX_RANK, Shape, collapse},
};

/// Sizes of a product of two tensors.
pub(super) struct Sizes {
    /// The leading dimensions, broadcast.
    pub batch: Shape,
    pub m: usize,
    pub n: usize,
    pub k: usize,
    /// Number of rows multiplied by one matrix of B, derived from the shapes only: trailing batch dimensions that B
    /// lacks count too. The kernel depends on this number and must not depend on the layout in memory.
    pub rows: usize,
}

impl Sizes {
    pub fn of(a: &Shape, b: &Shape) -> Result<Self> {
        ensure!(
            a.rank() >= 2 && b.rank() >= 2,
            Error::shape("matmul", format_args!("expected at least one dimension each, got {a:?} and {b:?}"))
        );
        let (batch_a, [m, k]) = split_last_two(a);
        let (batch_b, [rows, n]) = split_last_two(b);
        ensure!(
            k == rows,
            Error::shape(
                "matmul",
                format_args!("cannot multiply {a:?} by {b:?}: inner dimensions {k} and {rows} differ")
            )
        );
        let batch = batch_a.broadcast(&batch_b, "matmul")?;
        let own = |back: usize| batch_b.rank().checked_sub(back).map_or(1, |dim| batch_b[dim]);
        let shared = (1..=batch.rank()).take_while(|&back| own(back) == 1).map(|back| batch[batch.rank() - back]);
        let rows = shared.fold(m, usize::saturating_mul);
        Ok(Self { batch, m, n, k, rows })
    }

    /// Returns the batch followed by two more dimensions.
    pub fn with(&self, last: [usize; 2]) -> Result<Shape> {
        let mut dims = self.batch.to_vec();
        dims.extend(last);
        Shape::new(&dims)
    }
}

pub(super) fn split_last_two(shape: &Shape) -> (Shape, [usize; 2]) {
    let (batch, last) = shape.split_at(shape.rank() - 2);
    (Shape::unchecked(batch), [last[0], last[1]])
}

/// A product with as few items in its batch as the strides allow.
pub(super) struct Merged {
    pub batch: Shape,
    /// Strides of both operands along the batch.
    pub strides: [[usize; MAX_RANK]; 2],
    /// Offsets of both operands in their storage.
    pub start: [usize; 2],
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub rows: usize,
    /// Row and column stride of A.
    pub a: [usize; 2],
    pub b: [usize; 2],
}

impl Merged {
    pub fn new(sizes: &Sizes, a: &Tensor, b: &Tensor) -> Result<Self> {
        let &Sizes { batch, mut m, n, k, rows } = sizes;
        let (a_layout, b_layout) = (a.layout().expand(sizes.with([m, k])?), b.layout().expand(sizes.with([k, n])?));
        let mut rank = batch.rank();
        let [mut a_row, a_col] = [a_layout.strides[rank], a_layout.strides[rank + 1]];
        let b_steps = [b_layout.strides[rank], b_layout.strides[rank + 1]];
        // A dimension along which B repeats extends the rows of A, if their strides agree: one tall product.
        while rank > 0 && (batch[rank - 1] == 1 || b_layout.strides[rank - 1] == 0) {
            let (size, stride) = (batch[rank - 1], a_layout.strides[rank - 1]);
            if size != 1 && m != 1 && stride != m * a_row {
                break;
            }
            if m == 1 && size != 1 {
                a_row = stride;
            }
            m *= size;
            rank -= 1;
        }
        let batch = Shape::unchecked(&batch[..rank]);
        let (batch, strides) = collapse(&batch, [&a_layout.strides()[..rank], &b_layout.strides()[..rank]]);
        let start = [a_layout.offset, b_layout.offset];
        Ok(Self { batch, strides, start, m, n, k, rows, a: [a_row, a_col], b: b_steps })
    }

    /// Computes the product on the CPU.
    pub fn product<'a, T: Multiply>(
        &self,
        a: &'a Tensor,
        b: &'a Tensor,
        bias: Option<&'a Tensor>,
        offsets: &'a (dyn Fn(usize) -> (usize, usize) + Sync),
    ) -> Result<Product<'a, T>> {
        let matrix = |data, [row, col]: [usize; 2]| Matrix { data, row, col };
        Ok(Product {
            batch: self.batch.numel(),
            m: self.m,
            n: self.n,
            k: self.k,
            rows: self.rows,
            a: matrix(a.storage::<T>()?, self.a),
            b: matrix(b.storage::<T>()?, self.b),
            offsets,
            bias: bias.map(Tensor::values::<T>).transpose()?,
        })
    }
}

/// Returns the offsets at which both operands of a batch item start.
pub(super) fn positions(
    mut item: usize,
    batch: &Shape,
    strides: &[[usize; MAX_RANK]; 2],
    start: [usize; 2],
) -> (usize, usize) {
    let [mut a, mut b] = start;
    for dim in (0..batch.rank()).rev() {
        a += item % batch[dim] * strides[0][dim];
        b += item % batch[dim] * strides[1][dim];
        item /= batch[dim];
    }
    (a, b)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The kernel is chosen by the shapes: the rows of a whole batch count if it has one matrix B.
    #[test]
    fn matmul_rows_by_shape() -> Result<()> {
        let rows = |a: &[usize], b: &[usize]| Ok(Sizes::of(&Shape::new(a)?, &Shape::new(b)?)?.rows);
        assert_eq!(rows(&[5, 7], &[7, 4])?, 5);
        assert_eq!(rows(&[3, 2, 5, 7], &[7, 4])?, 30);
        assert_eq!(rows(&[3, 2, 5, 7], &[3, 1, 7, 4])?, 10);
        assert_eq!(rows(&[3, 2, 5, 7], &[3, 2, 7, 4])?, 5);
        assert_eq!(rows(&[3, 2, 5, 7], &[1, 2, 7, 4])?, 5);
        assert_eq!(rows(&[5, 7], &[3, 1, 7, 4])?, 5);
        rows(&[5, 7], &[6, 4]).map_or(Ok(()), |rows| panic!("{rows} rows of what does not fit"))
    }
}
