//! Shapes and layouts: at most six dimensions, kept inline, `Copy`.

use std::{fmt, ops::Deref};

use crate::{Error, Result, error::ensure};

/// Maximum number of dimensions of a tensor.
pub const MAX_RANK: usize = 6;

/// Sizes of a tensor's dimensions, outermost first. Dereferences to `[usize]`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    rank: u8,
    dims: [usize; MAX_RANK],
}

impl Shape {
    /// Creates a shape from its dimensions.
    ///
    /// Errors: more than [`MAX_RANK`] dimensions, or a number of elements whose bytes exceed `isize::MAX`.
    pub fn new(dims: &[usize]) -> Result<Self> {
        ensure!(
            dims.len() <= MAX_RANK,
            Error::shape("shape", format_args!("{dims:?} has {} dimensions, expected at most {MAX_RANK}", dims.len()))
        );
        // Zeros are skipped so that the strides of an empty tensor cannot overflow either.
        let elements = dims.iter().filter(|&&d| d != 0).try_fold(1usize, |n, &d| n.checked_mul(d));
        ensure!(
            elements.is_some_and(|n| n <= isize::MAX as usize / 8),
            Error::shape("shape", format_args!("{dims:?} has too many elements to address"))
        );
        Ok(Self::unchecked(dims))
    }

    /// Creates a shape without checks: callers have checked rank and size, or derive the dims from a checked shape.
    pub(crate) fn unchecked(dims: &[usize]) -> Self {
        let mut shape = Self { rank: dims.len() as u8, dims: [0; MAX_RANK] };
        shape.dims[..dims.len()].copy_from_slice(dims);
        shape
    }

    /// Returns the number of elements: the product of the dimensions, 1 for rank 0.
    pub fn numel(&self) -> usize {
        // Saturating, because a caller that writes to a shape's dimensions can make them too large.
        self.iter().fold(1, |elements, &size| elements.saturating_mul(size))
    }

    /// Returns the number of dimensions.
    pub fn rank(&self) -> usize {
        self.rank as usize
    }

    /// Returns the same shape with one dimension replaced.
    pub(crate) fn with_dim(mut self, dim: usize, size: usize) -> Self {
        self[dim] = size;
        self
    }

    /// Returns the same shape without one dimension.
    pub(crate) fn without(&self, dim: usize) -> Self {
        let mut dims = [0; MAX_RANK];
        let mut rank = 0;
        for (index, &size) in self.iter().enumerate() {
            if index != dim {
                dims[rank] = size;
                rank += 1;
            }
        }
        Self { rank: rank as u8, dims }
    }

    /// Returns the shape to which two shapes broadcast, as in PyTorch: aligned at the last dimension, sizes equal or 1.
    pub fn broadcast(&self, other: &Shape, op: &'static str) -> Result<Shape> {
        let rank = self.rank().max(other.rank());
        let mut dims = [1; MAX_RANK];
        for back in 1..=rank {
            let a = self.rank().checked_sub(back).map_or(1, |i| self[i]);
            let b = other.rank().checked_sub(back).map_or(1, |i| other[i]);
            ensure!(
                a == b || a == 1 || b == 1,
                Error::shape(
                    op,
                    format_args!("shapes {self:?} and {other:?} do not broadcast: sizes {a} and {b} differ")
                )
            );
            dims[rank - back] = if a == 1 { b } else { a };
        }
        Shape::new(&dims[..rank])
    }

    /// Resolves a dimension that may count from the end (`-1` is the last one).
    ///
    /// Errors: the dimension is out of range.
    pub fn dim(&self, dim: isize, op: &'static str) -> Result<usize> {
        let rank = self.rank() as isize;
        let resolved = if dim < 0 { dim.saturating_add(rank) } else { dim };
        ensure!(
            (0..rank).contains(&resolved),
            Error::shape(op, format_args!("dimension {dim} is out of range for shape {self:?}"))
        );
        Ok(resolved as usize)
    }

    /// Like [`Shape::dim`], but for ops that treat a scalar as a vector of one element, as in PyTorch: returns `None`
    /// for its dimension.
    pub(crate) fn dim_unless_scalar(&self, dim: isize, op: &'static str) -> Result<Option<usize>> {
        if self.rank() == 0 && matches!(dim, 0 | -1) { Ok(None) } else { self.dim(dim, op).map(Some) }
    }
}

impl Deref for Shape {
    type Target = [usize];

    fn deref(&self) -> &[usize] {
        &self.dims[..self.rank as usize]
    }
}

impl std::ops::DerefMut for Shape {
    fn deref_mut(&mut self) -> &mut [usize] {
        &mut self.dims[..self.rank as usize]
    }
}

impl<const N: usize> PartialEq<[usize; N]> for Shape {
    fn eq(&self, other: &[usize; N]) -> bool {
        **self == *other
    }
}

impl<const N: usize> PartialEq<[usize; N]> for &Shape {
    fn eq(&self, other: &[usize; N]) -> bool {
        ***self == *other
    }
}

impl fmt::Debug for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.deref().fmt(f)
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// Conversion into a [`Shape`], from arrays, slices, vectors, a [`Shape`], or `()` for rank 0.
pub trait IntoShape {
    /// Converts, checking rank and size.
    fn into_shape(self) -> Result<Shape>;
}

impl IntoShape for Shape {
    fn into_shape(self) -> Result<Shape> {
        // Checked again, since its dimensions can be written to.
        Shape::new(&self)
    }
}

impl IntoShape for () {
    fn into_shape(self) -> Result<Shape> {
        Shape::new(&[])
    }
}

impl<const N: usize> IntoShape for [usize; N] {
    fn into_shape(self) -> Result<Shape> {
        Shape::new(&self)
    }
}

impl IntoShape for &[usize] {
    fn into_shape(self) -> Result<Shape> {
        Shape::new(self)
    }
}

impl IntoShape for Vec<usize> {
    fn into_shape(self) -> Result<Shape> {
        Shape::new(&self)
    }
}

impl IntoShape for &Vec<usize> {
    fn into_shape(self) -> Result<Shape> {
        Shape::new(self)
    }
}

/// Positions of a tensor's elements in its buffer. Strides and offset count elements.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Layout {
    pub shape: Shape,
    pub strides: [usize; MAX_RANK],
    pub offset: usize,
}

impl Layout {
    /// Creates a row-major layout from the start of the buffer.
    pub fn contiguous(shape: Shape) -> Self {
        let mut strides = [0; MAX_RANK];
        let mut stride = 1usize;
        for dim in (0..shape.rank()).rev() {
            strides[dim] = stride;
            stride = stride.saturating_mul(shape[dim].max(1));
        }
        Self { shape, strides, offset: 0 }
    }

    pub fn strides(&self) -> &[usize] {
        &self.strides[..self.shape.rank()]
    }

    /// Returns `true` if the elements are packed in row-major order; any offset is allowed.
    pub fn is_contiguous(&self) -> bool {
        if self.shape.contains(&0) {
            return true;
        }
        let mut expected = 1;
        for (&size, &stride) in self.shape.iter().zip(self.strides()).rev() {
            if size != 1 && stride != expected {
                return false;
            }
            expected *= size;
        }
        true
    }

    /// Returns `true` if the last dimension is packed, so that rows are slices.
    pub fn has_packed_rows(&self) -> bool {
        let rank = self.shape.rank();
        rank > 0 && (self.shape[rank - 1] <= 1 || self.strides[rank - 1] == 1)
    }

    pub fn permute(&self, order: &[usize]) -> Self {
        let mut result = *self;
        for (to, &from) in order.iter().enumerate() {
            result.shape[to] = self.shape[from];
            result.strides[to] = self.strides[from];
        }
        result
    }

    pub fn narrow(&self, dim: usize, start: usize, len: usize) -> Self {
        let mut result = *self;
        result.shape[dim] = len;
        result.offset += if len == 0 { 0 } else { start * self.strides[dim] };
        result
    }

    /// Expands to a shape that this one broadcasts to (checked by the caller); new and size-1 dimensions get stride 0.
    pub fn expand(&self, shape: Shape) -> Self {
        let mut strides = [0; MAX_RANK];
        let shift = shape.rank() - self.shape.rank();
        for dim in 0..self.shape.rank() {
            if self.shape[dim] == shape[dim + shift] {
                strides[dim + shift] = self.strides[dim];
            }
        }
        Self { shape, strides, offset: self.offset }
    }

    pub fn unsqueeze(&self, dim: usize) -> Self {
        let rank = self.shape.rank();
        let mut dims = [1; MAX_RANK];
        let mut strides = [0; MAX_RANK];
        for old in 0..rank {
            let new = if old < dim { old } else { old + 1 };
            dims[new] = self.shape[old];
            strides[new] = self.strides[old];
        }
        dims[dim] = 1;
        Self { shape: Shape::unchecked(&dims[..rank + 1]), strides, offset: self.offset }
    }

    pub fn squeeze(&self, dim: usize) -> Self {
        let mut strides = [0; MAX_RANK];
        let mut rank = 0;
        for (old, &stride) in self.strides().iter().enumerate() {
            if old != dim {
                strides[rank] = stride;
                rank += 1;
            }
        }
        Self { shape: self.shape.without(dim), strides, offset: self.offset }
    }

    /// Returns the layout of the same elements in the same order with another shape, if strides can express it.
    pub fn reshape(&self, shape: Shape) -> Option<Self> {
        if self.is_contiguous() {
            return Some(Self { offset: self.offset, ..Self::contiguous(shape) });
        }
        // Walk both shapes from the outside; a group of old dims that is packed in itself can be divided differently.
        let (old, strides) = (&self.shape, self.strides());
        let mut result = Self { shape, strides: [0; MAX_RANK], offset: self.offset };
        let (mut from, mut to) = (0, 0);
        while from < old.rank() && to < shape.rank() {
            let (start_from, start_to) = (from, to);
            let (mut n_old, mut n_new) = (old[from], shape[to]);
            from += 1;
            to += 1;
            while n_old != n_new {
                if n_old < n_new {
                    n_old *= old[from];
                    from += 1;
                } else {
                    n_new *= shape[to];
                    to += 1;
                }
            }
            // Size-1 dims carry no stride; the others must be packed among themselves.
            let mut stride = None;
            for dim in (start_from..from).rev().filter(|&dim| old[dim] != 1) {
                match stride {
                    Some(expected) if expected != strides[dim] => return None,
                    _ => stride = Some(strides[dim] * old[dim]),
                }
            }
            let mut next = (start_from..from).rev().find(|&dim| old[dim] != 1).map_or(1, |dim| strides[dim]);
            for dim in (start_to..to).rev() {
                result.strides[dim] = next;
                next *= shape[dim];
            }
        }
        // Only size-1 dims can remain on either side.
        Some(result)
    }

    /// Returns the buffer position of the first element of row `row`, counting rows over all dims but the last.
    pub fn row_offset(&self, mut row: usize) -> usize {
        let mut offset = self.offset;
        for dim in (0..self.shape.rank().saturating_sub(1)).rev() {
            offset += row % self.shape[dim] * self.strides[dim];
            row /= self.shape[dim];
        }
        offset
    }
}

/// Merges adjacent dimensions that all given strides can traverse as one, and drops dimensions of size 1.
///
/// The result enumerates the same elements in the same order; fully packed operands come out with one dimension, unless
/// it would have 2³² elements or more, which kernels cannot count.
pub(crate) fn collapse<const N: usize>(shape: &Shape, strides: [&[usize]; N]) -> (Shape, [[usize; MAX_RANK]; N]) {
    let mut dims = [0; MAX_RANK];
    let mut merged = [[0; MAX_RANK]; N];
    let mut rank = 0;
    for dim in 0..shape.rank() {
        if shape[dim] == 1 {
            continue;
        }
        let joins = rank > 0
            && dims[rank - 1] * shape[dim] <= u32::MAX as usize
            && (0..N).all(|n| merged[n][rank - 1] == strides[n][dim] * shape[dim]);
        if joins {
            dims[rank - 1] *= shape[dim];
        } else {
            dims[rank] = shape[dim];
            rank += 1;
        }
        for n in 0..N {
            merged[n][rank - 1] = strides[n][dim];
        }
    }
    (Shape::unchecked(&dims[..rank]), merged)
}

/// Collapses layouts of this shape together.
pub(crate) fn collapse_layouts<const N: usize>(shape: &Shape, layouts: [&Layout; N]) -> [Layout; N] {
    let (shape, strides) = collapse(shape, layouts.map(Layout::strides));
    std::array::from_fn(|n| Layout { shape, strides: strides[n], offset: layouts[n].offset })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(dims: &[usize]) -> Shape {
        Shape::new(dims).expect("a legal shape")
    }

    /// Returns every buffer position that a layout visits, in row-major order.
    fn positions(layout: &Layout) -> Vec<usize> {
        (0..layout.shape.numel())
            .map(|mut at| {
                let mut position = layout.offset;
                for dim in (0..layout.shape.rank()).rev() {
                    position += at % layout.shape[dim] * layout.strides[dim];
                    at /= layout.shape[dim];
                }
                position
            })
            .collect()
    }

    #[test]
    fn shape_collapse_merges_what_walks_as_one() {
        let packed = Layout::contiguous(shape(&[2, 1, 3, 4]));
        let (dims, strides) = collapse(&packed.shape, [packed.strides()]);
        assert_eq!((&*dims, strides[0][0]), (&[24][..], 1));
        // Two operands: only dimensions that both can traverse as one are merged.
        let row = Layout::contiguous(shape(&[4])).expand(packed.shape);
        let (dims, strides) = collapse(&packed.shape, [packed.strides(), row.strides()]);
        assert_eq!((&*dims, &strides[1][..2]), (&[6, 4][..], &[0, 1][..]));
        // A scalar that repeats everywhere is one dimension of stride 0.
        let scalar = Layout::contiguous(shape(&[])).expand(packed.shape);
        let (dims, strides) = collapse(&packed.shape, [scalar.strides()]);
        assert_eq!((&*dims, strides[0][0]), (&[24][..], 0));
        let ones = Layout::contiguous(shape(&[1, 1]));
        assert_eq!(collapse(&ones.shape, [ones.strides()]).0.rank(), 0);
        let turned = packed.permute(&[3, 1, 2, 0]);
        let (dims, strides) = collapse(&turned.shape, [turned.strides()]);
        assert_eq!((&*dims, &strides[0][..3]), (&[4, 3, 2][..], &[1, 4, 12][..]));
        let (dims, _) = collapse(&shape(&[1 << 20, 1 << 20]), [&[1 << 20, 1]]);
        assert_eq!(dims, [1 << 20, 1 << 20], "a size that 32 bits do not hold");
        let empty = Layout::contiguous(shape(&[3, 0, 2]));
        assert_eq!(collapse(&empty.shape, [empty.strides()]).0.numel(), 0);
    }

    #[test]
    fn shape_reshape_of_views() {
        let base = Layout::contiguous(shape(&[4, 6]));
        let cases: [(Layout, &[usize], bool); 14] = [
            (base, &[3, 8], true),
            (base.permute(&[1, 0]), &[24], false),
            (base.permute(&[1, 0]), &[2, 3, 2, 2], true),
            (base.permute(&[1, 0]), &[6, 1, 4, 1], true),
            (base.permute(&[1, 0]), &[3, 8], false),
            (base.narrow(1, 1, 3), &[2, 2, 3, 1], true),
            (base.narrow(1, 1, 3), &[12], false),
            (base.narrow(1, 2, 1), &[2, 2], true),
            (base.narrow(1, 2, 1).narrow(0, 3, 1), &[1, 1, 1], true),
            (base.narrow(0, 1, 1).expand(shape(&[5, 6])), &[5, 2, 3], true),
            (base.narrow(0, 1, 1).expand(shape(&[5, 6])), &[30], false),
            (base.narrow(0, 1, 1).narrow(1, 5, 1).expand(shape(&[5, 6])), &[15, 2], true),
            (base.narrow(0, 4, 0), &[7, 0, 2], true),
            (base.unsqueeze(1).permute(&[2, 1, 0]), &[2, 3, 4], true),
        ];
        for (layout, target, possible) in cases {
            let result = layout.reshape(shape(target));
            assert_eq!(result.is_some(), possible, "{layout:?} to {target:?}");
            if let Some(result) = result {
                assert_eq!(positions(&result), positions(&layout), "{layout:?} to {target:?}");
            }
        }
    }

    #[test]
    fn shape_contiguity_ignores_what_has_one_place() {
        let base = Layout::contiguous(shape(&[4, 1, 6]));
        assert!(base.permute(&[1, 0, 2]).is_contiguous());
        assert!(base.narrow(0, 2, 2).is_contiguous(), "the offset does not matter");
        assert!(!base.narrow(2, 0, 5).is_contiguous());
        assert!(base.narrow(2, 0, 5).narrow(0, 1, 1).is_contiguous(), "one row has no gap");
        assert!(base.narrow(2, 6, 0).is_contiguous());
        assert!(!base.narrow(0, 0, 1).expand(shape(&[2, 1, 6])).is_contiguous());
        assert!(base.narrow(2, 1, 5).has_packed_rows() && !base.permute(&[2, 1, 0]).has_packed_rows());
    }
}
