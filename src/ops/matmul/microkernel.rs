//! The innermost loops of the matrix product: a tile of C in registers, once per instruction level.
//!
//! Every element of C is one chain `c = a·b + c` over the steps of a block, so that tile sizes, and with them the
//! instruction level, do not change the order of additions. AVX2 and AVX-512 give the same bits.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{__m256, __m256d, __m512, __m512d};
use std::marker::PhantomData;

use super::lanes::{Lanes, Portable};
use crate::{
    DType,
    device::{Level, simd},
    dtype::{Element, Float, Real},
};

/// Rows and columns of the tile of C that is kept in registers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Tile {
    pub rows: usize,
    pub columns: usize,
}

/// The tile for sums of this type on this processor: two vectors wide, as tall as the registers allow.
pub(super) fn tile<R: Real>() -> Tile {
    let (rows, bytes) = match simd::level() {
        Level::Portable => (4, 32),
        Level::Avx2 => (6, 64),
        Level::Avx512 | Level::Avx512Bf16 | Level::Amx => (12, 128),
    };
    Tile { rows, columns: bytes / size_of::<R>() }
}

/// The largest number of columns of any [`Tile`].
const WIDEST: usize = 32;

/// A window of a row-major matrix: whoever holds it is the only one to touch these elements.
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
    /// Element (i, j) is `values[i * row + j]`.
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

    /// A smaller window from row `i` and column `j`.
    pub fn part(&mut self, i: usize, j: usize, rows: usize, columns: usize) -> Window<'_, R> {
        // SAFETY: `&mut self` rules out every other use while the part lives.
        unsafe { self.shared_part(i, j, rows, columns) }
    }

    /// As [`Window::part`], for tasks that share one window.
    ///
    /// # Safety
    ///
    /// No two parts that overlap may live at the same time.
    pub unsafe fn shared_part(&self, i: usize, j: usize, rows: usize, columns: usize) -> Window<'_, R> {
        assert!(i + rows <= self.rows && j + columns <= self.columns, "a part lies outside of its window");
        // Wrapping: an empty part may start behind the last element.
        let pointer = self.pointer.wrapping_add(i * self.row + j);
        Window { pointer, row: self.row, rows, columns, lifetime: PhantomData }
    }

    /// Its first element, and the step from one row to the next.
    pub fn as_mut_ptr(&mut self) -> (*mut R, usize) {
        (self.pointer, self.row)
    }

    /// The elements of row `i`.
    pub fn row_mut(&mut self, i: usize) -> &mut [R] {
        assert!(i < self.rows, "row {i} lies outside of a window of {} rows", self.rows);
        // SAFETY: `new` has checked that the rows lie inside of the borrowed slice.
        unsafe { std::slice::from_raw_parts_mut(self.pointer.add(i * self.row), self.columns) }
    }
}

impl<T: Float> Window<'_, T> {
    /// The same window as one of sums, if sums of `T` have its type.
    pub fn as_sums(&mut self) -> Option<Window<'_, T::Acc>> {
        let Window { row, rows, columns, .. } = *self;
        let pointer = self.pointer.cast();
        (T::DTYPE == T::Acc::DTYPE).then_some(Window { pointer, row, rows, columns, lifetime: PhantomData })
    }
}

/// What the sums of a block are added to.
#[derive(Clone, Copy)]
pub(crate) enum Start<'a, R> {
    /// Nothing: C is overwritten.
    Zero,
    /// A value per column: C is overwritten.
    Bias(&'a [R]),
    /// C itself.
    Previous,
}

impl<'a, R: Real> Start<'a, R> {
    /// The start of the block of steps from `step` on, for the columns from `column` on.
    pub fn of_block(self, step: usize, column: usize) -> Self {
        match self {
            _ if step > 0 => Self::Previous,
            Self::Bias(bias) => Self::Bias(&bias[column..]),
            start => start,
        }
    }

    /// `C = start`, the product without steps.
    pub fn fill(self, c: &mut Window<R>) {
        let columns = c.columns;
        for i in 0..c.rows {
            match self {
                Self::Zero => c.row_mut(i).fill(R::ZERO),
                Self::Bias(bias) => c.row_mut(i).copy_from_slice(&bias[..columns]),
                Self::Previous => {}
            }
        }
    }

    /// `row = start + sums` for the columns that have sums.
    #[inline(always)]
    pub fn add_to(self, sums: &[R], row: &mut [R]) {
        match self {
            Self::Zero => row[..sums.len()].copy_from_slice(sums),
            Self::Bias(bias) => row.iter_mut().zip(sums).zip(bias).for_each(|((c, &sum), &bias)| *c = sum + bias),
            Self::Previous => row.iter_mut().zip(sums).for_each(|(c, &sum)| *c = sum + *c),
        }
    }
}

/// Which elements of A lie next to each other.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Order {
    /// The rows of a panel; `stride` leads to the next step.
    Rows,
    /// The steps of a row; `stride` leads to the next row.
    Steps,
}

/// Rows of A in panels of [`Tile::rows`] that start `panel` elements apart.
#[derive(Clone, Copy)]
pub(crate) struct Left<'a, R> {
    pub data: &'a [R],
    pub panel: usize,
    pub order: Order,
    pub stride: usize,
}

/// Columns of B in panels of [`Tile::columns`] that start `panel` elements apart; the columns of a panel lie next to each
/// other, `step` leads to the next step. All columns of the last panel are readable, even if C ends before.
#[derive(Clone, Copy)]
pub(crate) struct Right<'a, R> {
    pub data: &'a [R],
    pub panel: usize,
    pub step: usize,
}

/// `C = start + A·B` for one block of `steps` steps, on the calling thread.
pub(super) fn multiply<R: Real>(steps: usize, a: Left<R>, b: Right<R>, start: Start<R>, mut c: Window<R>) {
    let (m, n) = (c.rows, c.columns);
    if m == 0 || n == 0 {
        return;
    }
    if steps == 0 {
        // Operands may be empty: no place in them can be pointed to.
        return start.fill(&mut c);
    }
    let tile = tile::<R>();
    let (row, step) = if a.order == Order::Rows { (1, a.stride) } else { (a.stride, 1) };
    // A full panel may reach further than the last one, which may be lower.
    let last_panel = (m - 1) / tile.rows * a.panel + (m - 1) % tile.rows * row;
    let full_panel = (m / tile.rows).saturating_sub(1) * a.panel + (tile.rows.min(m) - 1) * row;
    assert!(last_panel.max(full_panel) + (steps - 1) * step < a.data.len(), "A ends before its block");
    let last_column = ((n - 1) / tile.columns) * b.panel + tile.columns - 1;
    assert!(last_column + (steps - 1) * b.step < b.data.len(), "B ends before its block");
    let (bias, start) = match start {
        Start::Zero => (std::ptr::null(), Kind::Zero),
        Start::Previous => (std::ptr::null(), Kind::Previous),
        Start::Bias(bias) => {
            assert!(bias.len() >= n, "the bias ends before the columns");
            (bias.as_ptr(), Kind::Bias)
        }
    };
    let block = Block {
        m,
        n,
        steps,
        a: a.data.as_ptr(),
        a_panel: a.panel,
        a_order: a.order,
        a_stride: a.stride,
        b: b.data.as_ptr(),
        b_panel: b.panel,
        b_step: b.step,
        c: c.pointer,
        c_row: c.row,
        bias,
        start,
    };
    // SAFETY: the level is at most what was detected, the reach of the operands is checked above, C is a window, and
    // the casts go from `R` to `R`, which is the only type with its dtype.
    unsafe {
        match (simd::level(), R::DTYPE) {
            #[cfg(target_arch = "x86_64")]
            (Level::Avx512 | Level::Avx512Bf16 | Level::Amx, DType::F64) => avx512_f64(&block.cast()),
            #[cfg(target_arch = "x86_64")]
            (Level::Avx512 | Level::Avx512Bf16 | Level::Amx, _) => avx512_f32(&block.cast()),
            #[cfg(target_arch = "x86_64")]
            (Level::Avx2, DType::F64) => avx2_f64(&block.cast()),
            #[cfg(target_arch = "x86_64")]
            (Level::Avx2, _) => avx2_f32(&block.cast()),
            (_, DType::F64) => portable_f64(&block.cast()),
            (_, _) => portable_f32(&block.cast()),
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Zero,
    Bias,
    Previous,
}

/// The arguments of [`multiply`] after its checks.
#[derive(Clone, Copy)]
struct Block<R> {
    m: usize,
    n: usize,
    steps: usize,
    a: *const R,
    a_panel: usize,
    a_order: Order,
    a_stride: usize,
    b: *const R,
    b_panel: usize,
    b_step: usize,
    c: *mut R,
    c_row: usize,
    bias: *const R,
    start: Kind,
}

impl<R> Block<R> {
    fn cast<S>(self) -> Block<S> {
        Block {
            m: self.m,
            n: self.n,
            steps: self.steps,
            a: self.a.cast(),
            a_panel: self.a_panel,
            a_order: self.a_order,
            a_stride: self.a_stride,
            b: self.b.cast(),
            b_panel: self.b_panel,
            b_step: self.b_step,
            c: self.c.cast(),
            c_row: self.c_row,
            bias: self.bias.cast(),
            start: self.start,
        }
    }
}

/// A function per level that walks the tiles of a block: a panel of B stays in the first-level cache while the
/// panels of A pass.
macro_rules! levels {
    ($($(#[$meta:meta])* $name:ident: $lanes:ty, $tall:literal = [$($rows:literal)*];)*) => {$(
        $(#[$meta])*
        unsafe fn $name(block: &Block<<$lanes as Lanes>::Scalar>) {
            for j in (0..block.n).step_by(2 * <$lanes>::COUNT) {
                for i in (0..block.m).step_by($tall) {
                    // SAFETY: the caller answers for the block, (i, j) lies inside.
                    unsafe {
                        match block.m - i {
                            $($rows => one_tile::<$lanes, $rows>(block, i, i / $tall, j),)*
                            _ => one_tile::<$lanes, $tall>(block, i, i / $tall, j),
                        }
                    }
                }
            }
        }
    )*};
}

levels! {
    portable_f32: Portable<f32, 4>, 4 = [1 2 3];
    portable_f64: Portable<f64, 2>, 4 = [1 2 3];
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma")]
    avx2_f32: __m256, 6 = [1 2 3 4 5];
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma")]
    avx2_f64: __m256d, 6 = [1 2 3 4 5];
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")]
    avx512_f32: __m512, 12 = [1 2 3 4 5 6 7 8 9 10 11];
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")]
    avx512_f64: __m512d, 12 = [1 2 3 4 5 6 7 8 9 10 11];
}

/// The sums of one tile.
type Sums<V, const ROWS: usize> = [[V; 2]; ROWS];

/// The sums of a tile from rows of A that lie next to each other.
///
/// # Safety
///
/// The processor has the instructions of `V`; the pointers reach as far as the sizes say.
#[inline(always)]
unsafe fn sums_of_rows<V: Lanes, const ROWS: usize>(
    steps: usize,
    mut a: *const V::Scalar,
    step: usize,
    mut b: *const V::Scalar,
    b_step: usize,
) -> Sums<V, ROWS> {
    // SAFETY: see above.
    unsafe {
        let mut sums = [[V::zero(); 2]; ROWS];
        for _ in 0..steps {
            let columns = [V::load(b), V::load(b.add(V::COUNT))];
            for (index, sums) in sums.iter_mut().enumerate() {
                let a = V::splat(a.add(index));
                sums[0] = a.mul_add(columns[0], sums[0]);
                sums[1] = a.mul_add(columns[1], sums[1]);
            }
            // Wrapping: after the last step the pointers may leave their slices.
            (a, b) = (a.wrapping_add(step), b.wrapping_add(b_step));
        }
        sums
    }
}

/// The sums of a tile from steps of A that lie next to each other.
///
/// # Safety
///
/// As for [`sums_of_rows`].
#[inline(always)]
unsafe fn sums_of_steps<V: Lanes, const ROWS: usize>(
    steps: usize,
    a: *const V::Scalar,
    row: usize,
    mut b: *const V::Scalar,
    b_step: usize,
) -> Sums<V, ROWS> {
    /// Rows that are reached from one pointer: an address has room for a stride times 1 or 2, and three strides are
    /// kept in a register. With a pointer per row, or strides that are added up, sums would leave their registers.
    const REACHED: usize = 4;
    // SAFETY: see above.
    unsafe {
        let mut sums = [[V::zero(); 2]; ROWS];
        let mut groups = [0, 1, 2, 3].map(|group| a.wrapping_add(group * REACHED * row));
        let strides = [0, row, 2 * row, 3 * row];
        for _ in 0..steps {
            let columns = [V::load(b), V::load(b.add(V::COUNT))];
            for (index, sums) in sums.iter_mut().enumerate() {
                let a = V::splat(groups[index / REACHED].add(strides[index % REACHED]));
                sums[0] = a.mul_add(columns[0], sums[0]);
                sums[1] = a.mul_add(columns[1], sums[1]);
            }
            // Wrapping: after the last step the pointers may leave their slices.
            b = b.wrapping_add(b_step);
            groups = groups.map(|group| group.wrapping_add(1));
        }
        sums
    }
}

/// The tile of `ROWS` rows at row `i`, which is panel `panel` of A, and column `j`.
///
/// # Safety
///
/// The processor has the instructions of `V`; the pointers of the block reach as far as its sizes say.
#[inline(always)]
unsafe fn one_tile<V: Lanes, const ROWS: usize>(block: &Block<V::Scalar>, i: usize, panel: usize, j: usize) {
    // SAFETY: see above.
    unsafe {
        let a = block.a.add(panel * block.a_panel);
        let b = block.b.add(j / (2 * V::COUNT) * block.b_panel);
        let c = block.c.add(i * block.c_row + j);
        // Each order has its own loop, where all but one stride is a constant of the addresses.
        let sums = match block.a_order {
            Order::Rows => sums_of_rows::<V, ROWS>(block.steps, a, block.a_stride, b, block.b_step),
            Order::Steps => sums_of_steps::<V, ROWS>(block.steps, a, block.a_stride, b, block.b_step),
        };
        let bias = block.bias.wrapping_add(j);
        if block.n - j >= 2 * V::COUNT {
            for (row, sums) in sums.iter().enumerate() {
                for (half, &sum) in sums.iter().enumerate() {
                    let c = c.add(row * block.c_row + half * V::COUNT);
                    let sum = match block.start {
                        Kind::Zero => sum,
                        Kind::Bias => sum.add(V::load(bias.add(half * V::COUNT))),
                        Kind::Previous => sum.add(V::load(c)),
                    };
                    sum.store(c);
                }
            }
        } else {
            let mut wide = [V::Scalar::ZERO; WIDEST];
            for (row, sums) in sums.iter().enumerate() {
                sums[0].store(wide.as_mut_ptr());
                sums[1].store(wide.as_mut_ptr().add(V::COUNT));
                for (column, &sum) in wide[..block.n - j].iter().enumerate() {
                    let c = c.add(row * block.c_row + column);
                    *c = match block.start {
                        Kind::Zero => sum,
                        Kind::Bias => sum + *bias.add(column),
                        Kind::Previous => sum + *c,
                    };
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    levels! {
        emulated_avx512: Portable<f32, 16>, 12 = [1 2 3 4 5 6 7 8 9 10 11];
    }

    /// The tile of AVX-512 with vectors that any processor has, on every height and width of the last tile.
    #[test]
    fn microkernel_with_the_largest_tile() {
        let (tall, wide, steps) = (12, 32, 5);
        for (m, n) in (1..=25usize).map(|m| (m, 65usize)).chain((1..=65).map(|n| (13, n))) {
            let a: Vec<f32> = (0..m.div_ceil(tall) * tall * steps).map(|i| (i % 13) as f32 - 6.0).collect();
            let b: Vec<f32> = (0..n.div_ceil(wide) * wide * steps).map(|i| (i % 11) as f32 - 5.0).collect();
            let bias: Vec<f32> = (0..n).map(|j| j as f32).collect();
            let mut c = vec![100.0; m * n];
            for start in [Kind::Zero, Kind::Bias, Kind::Previous] {
                let block = Block {
                    m,
                    n,
                    steps,
                    a: a.as_ptr(),
                    a_panel: tall * steps,
                    a_order: Order::Rows,
                    a_stride: tall,
                    b: b.as_ptr(),
                    b_panel: wide * steps,
                    b_step: wide,
                    c: c.as_mut_ptr(),
                    c_row: n,
                    bias: bias.as_ptr(),
                    start,
                };
                let before = c.clone();
                // SAFETY: the operands are packed for these sizes, and the vectors are plain arrays.
                unsafe { emulated_avx512(&block) };
                for (index, (&c, &before)) in c.iter().zip(&before).enumerate() {
                    let (i, j) = (index / n, index % n);
                    let at =
                        |panel: usize, lane: usize, width: usize, step: usize| (panel * steps + step) * width + lane;
                    let sum: f32 = (0..steps)
                        .map(|step| a[at(i / tall, i % tall, tall, step)] * b[at(j / wide, j % wide, wide, step)])
                        .sum();
                    let start = match start {
                        Kind::Zero => 0.0,
                        Kind::Bias => bias[j],
                        Kind::Previous => before,
                    };
                    assert_eq!(c, start + sum, "{m}x{n} at ({i}, {j})");
                }
            }
        }
    }
}
