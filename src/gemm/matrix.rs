//! Matrices inside of slices: operands, windows of C, and the term that a product is added to.

use std::marker::PhantomData;

use crate::{
    device::simd::vectorized,
    dtype::{Element, Float, Real},
};

/// Depth of a block: products of one element of C that are summed in one chain before the chain is added to C. Part of
/// the result, see [the module](super).
pub(super) const KC: usize = 256;

/// Operand inside of a slice: element (i, j) is `data[i * row + j * col]`.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<'a, T> {
    pub data: &'a [T],
    pub row: usize,
    pub col: usize,
}

impl<T: Copy> Matrix<'_, T> {
    /// Returns the matrix that starts `offset` elements later; an empty one may start past the end.
    pub(super) fn at(self, offset: usize) -> Self {
        Self { data: &self.data[offset.min(self.data.len())..], ..self }
    }

    /// Returns the matrix from row `i` and column `j` on.
    pub(super) fn from(self, i: usize, j: usize) -> Self {
        self.at(i * self.row + j * self.col)
    }

    /// Returns the transposed matrix.
    pub(crate) fn transposed(self) -> Self {
        Self { data: self.data, row: self.col, col: self.row }
    }

    /// Returns `true` if `rows` × `columns` elements are inside of the slice.
    pub(super) fn holds(&self, rows: usize, columns: usize) -> bool {
        rows == 0 || columns == 0 || (rows - 1) * self.row + (columns - 1) * self.col < self.data.len()
    }
}

/// Rows and columns of the tile of C that a micro-kernel keeps in registers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Tile {
    pub mr: usize,
    pub nr: usize,
}

/// Returns values as their accumulation type, if that is their type.
pub(super) fn as_sums<T: Float>(data: &[T]) -> Option<&[T::Acc]> {
    (T::DTYPE == T::Acc::DTYPE).then(|| bytemuck::cast_slice(data))
}

/// Window of a row-major matrix, with exclusive access to its elements.
pub(crate) struct Window<'a, R> {
    pointer: *mut R,
    row: usize,
    rows: usize,
    columns: usize,
    lifetime: PhantomData<&'a mut [R]>,
}

// SAFETY: a window is an exclusive borrow of its elements, like `&mut [R]`.
unsafe impl<R: Send> Send for Window<'_, R> {}
// SAFETY: through a shared window elements are reached only by `shared_part`, whose caller answers for it.
unsafe impl<R: Send> Sync for Window<'_, R> {}

impl<'a, R> Window<'a, R> {
    /// Creates a window whose element (i, j) is `values[i * row + j]`.
    pub fn new(values: &'a mut [R], rows: usize, columns: usize, row: usize) -> Self {
        assert!(
            rows == 0 || columns == 0 || ((rows == 1 || row >= columns) && (rows - 1) * row + columns <= values.len()),
            "a window of {rows} rows and {columns} columns with stride {row} exceeds {} elements",
            values.len()
        );
        Self { pointer: values.as_mut_ptr(), row, rows, columns, lifetime: PhantomData }
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Returns a smaller window from row `i` and column `j` on.
    pub fn part(&mut self, i: usize, j: usize, rows: usize, columns: usize) -> Window<'_, R> {
        // SAFETY: `&mut self` rules out every other use while the part lives.
        unsafe { self.shared_part(i, j, rows, columns) }
    }

    /// Like [`Window::part`], for tasks that share one window.
    ///
    /// # Safety
    ///
    /// No two parts that overlap may live at the same time.
    pub unsafe fn shared_part(&self, i: usize, j: usize, rows: usize, columns: usize) -> Window<'_, R> {
        assert!(i + rows <= self.rows && j + columns <= self.columns, "a part lies outside of its window");
        // Wrapping: an empty part may start after the last element.
        let pointer = self.pointer.wrapping_add(i * self.row + j);
        Window { pointer, row: self.row, rows, columns, lifetime: PhantomData }
    }

    /// Returns its first element and the stride of its rows.
    pub fn as_mut_ptr(&mut self) -> (*mut R, usize) {
        (self.pointer, self.row)
    }

    /// Returns the elements of row `i`.
    pub fn row_mut(&mut self, i: usize) -> &mut [R] {
        assert!(i < self.rows, "row {i} lies outside of a window of {} rows", self.rows);
        // SAFETY: `new` has checked that the rows lie inside of the borrowed slice.
        unsafe { std::slice::from_raw_parts_mut(self.pointer.add(i * self.row), self.columns) }
    }
}

impl<T: Float> Window<'_, T> {
    /// Returns the same window as one of sums, if `T` is its own accumulation type.
    pub fn as_sums(&mut self) -> Option<Window<'_, T::Acc>> {
        let Window { row, rows, columns, .. } = *self;
        let pointer = self.pointer.cast();
        (T::DTYPE == T::Acc::DTYPE).then_some(Window { pointer, row, rows, columns, lifetime: PhantomData })
    }

    /// Writes packed sums of all rows, rounded to the type of the window.
    pub fn round(&mut self, sums: &[T::Acc]) {
        for (i, sums) in sums.chunks_exact(self.columns.max(1)).take(self.rows).enumerate() {
            round_row::<T>(sums, self.row_mut(i));
        }
    }
}

vectorized! {
    fn round_row<T: Float>(sums: &[T::Acc], out: &mut [T]) {
        for (out, sum) in out.iter_mut().zip(sums) {
            *out = T::from_acc(*sum);
        }
    }
}

/// Term that a product is added to: BLAS's `beta · C` for `beta` 0 and 1, or a bias.
#[derive(Clone, Copy)]
pub(crate) enum Beta<'a, R> {
    /// C is overwritten by the product.
    Zero,
    /// C is overwritten by the product and one value per column.
    Bias(&'a [R]),
    /// The product is added to C.
    One,
}

impl<'a, R: Real> Beta<'a, R> {
    /// Returns the term for the block from depth `p` and column `j` on: later blocks of a column add to the first.
    pub fn of_block(self, p: usize, j: usize) -> Self {
        match self {
            _ if p > 0 => Self::One,
            Self::Bias(bias) => Self::Bias(&bias[j..]),
            beta => beta,
        }
    }

    /// Writes the product of depth 0.
    pub fn fill(self, c: &mut Window<R>) {
        let columns = c.columns;
        for i in 0..c.rows {
            match self {
                Self::Zero => c.row_mut(i).fill(R::ZERO),
                Self::Bias(bias) => c.row_mut(i).copy_from_slice(&bias[..columns]),
                Self::One => {}
            }
        }
    }

    /// Stores the sums of the first columns of a row of C.
    #[inline(always)]
    pub fn store(self, sums: &[R], row: &mut [R]) {
        match self {
            Self::Zero => row[..sums.len()].copy_from_slice(sums),
            Self::Bias(bias) => row.iter_mut().zip(sums).zip(bias).for_each(|((c, &sum), &bias)| *c = sum + bias),
            Self::One => row.iter_mut().zip(sums).for_each(|(c, &sum)| *c = sum + *c),
        }
    }
}
