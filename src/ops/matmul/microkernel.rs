//! The innermost loops of the matrix product: a tile of C in registers, once per instruction level.
//!
//! Every element of C is one chain `c = a·b + c` over the steps of a block, so that tile sizes, and with them the
//! instruction level, do not change the order of additions. AVX2 and AVX-512 give the same bits.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;
use std::marker::PhantomData;

use crate::{
    DType,
    core::{Element, Float, Real},
    device::{Level, simd},
};

/// A vector register of floats.
///
/// # Safety
///
/// The methods may be called only where the processor has the instructions, with pointers to `COUNT` elements (one
/// for `splat`). They carry no alignment requirement.
unsafe trait Lanes: Copy {
    type Scalar: Real;
    const COUNT: usize;
    unsafe fn zero() -> Self;
    /// One element in all lanes.
    unsafe fn splat(from: *const Self::Scalar) -> Self;
    unsafe fn load(from: *const Self::Scalar) -> Self;
    unsafe fn store(self, to: *mut Self::Scalar);
    unsafe fn add(self, other: Self) -> Self;
    /// `self · factor + summand`
    unsafe fn mul_add(self, factor: Self, summand: Self) -> Self;
}

macro_rules! x86_lanes {
    ($($vector:ty: $scalar:ty, $count:literal, $zero:ident, $splat:ident, $load:ident, $store:ident, $add:ident, $fma:ident;)*) => {$(
        // SAFETY: each method is one instruction, whose presence and pointers the caller answers for.
        #[cfg(target_arch = "x86_64")]
        unsafe impl Lanes for $vector {
            type Scalar = $scalar;
            const COUNT: usize = $count;
            #[inline(always)]
            unsafe fn zero() -> Self {
                // SAFETY: see the trait.
                unsafe { $zero() }
            }
            #[inline(always)]
            unsafe fn splat(from: *const $scalar) -> Self {
                // SAFETY: see the trait.
                unsafe { $splat(*from) }
            }
            #[inline(always)]
            unsafe fn load(from: *const $scalar) -> Self {
                // SAFETY: see the trait.
                unsafe { $load(from) }
            }
            #[inline(always)]
            unsafe fn store(self, to: *mut $scalar) {
                // SAFETY: see the trait.
                unsafe { $store(to, self) }
            }
            #[inline(always)]
            unsafe fn add(self, other: Self) -> Self {
                // SAFETY: see the trait.
                unsafe { $add(self, other) }
            }
            #[inline(always)]
            unsafe fn mul_add(self, factor: Self, summand: Self) -> Self {
                // SAFETY: see the trait.
                unsafe { $fma(self, factor, summand) }
            }
        }
    )*};
}

x86_lanes! {
    __m256: f32, 8, _mm256_setzero_ps, _mm256_set1_ps, _mm256_loadu_ps, _mm256_storeu_ps, _mm256_add_ps, _mm256_fmadd_ps;
    __m256d: f64, 4, _mm256_setzero_pd, _mm256_set1_pd, _mm256_loadu_pd, _mm256_storeu_pd, _mm256_add_pd, _mm256_fmadd_pd;
    __m512: f32, 16, _mm512_setzero_ps, _mm512_set1_ps, _mm512_loadu_ps, _mm512_storeu_ps, _mm512_add_ps, _mm512_fmadd_ps;
    __m512d: f64, 8, _mm512_setzero_pd, _mm512_set1_pd, _mm512_loadu_pd, _mm512_storeu_pd, _mm512_add_pd, _mm512_fmadd_pd;
}

/// 128 bits, which every processor of the common architectures computes at once; the compiler vectorises the loops.
#[derive(Clone, Copy)]
struct Portable<S, const N: usize>([S; N]);

macro_rules! portable_lanes {
    ($($scalar:ty, $count:literal;)*) => {$(
        // SAFETY: plain arithmetic; the caller answers for the pointers.
        unsafe impl Lanes for Portable<$scalar, $count> {
            type Scalar = $scalar;
            const COUNT: usize = $count;
            #[inline(always)]
            unsafe fn zero() -> Self {
                Self([0.0; $count])
            }
            #[inline(always)]
            unsafe fn splat(from: *const $scalar) -> Self {
                // SAFETY: see the trait.
                Self([unsafe { *from }; $count])
            }
            #[inline(always)]
            unsafe fn load(from: *const $scalar) -> Self {
                // SAFETY: see the trait; the array has the alignment of its elements.
                Self(unsafe { *from.cast() })
            }
            #[inline(always)]
            unsafe fn store(self, to: *mut $scalar) {
                // SAFETY: as in `load`.
                unsafe { *to.cast() = self.0 }
            }
            #[inline(always)]
            unsafe fn add(self, other: Self) -> Self {
                Self(std::array::from_fn(|lane| self.0[lane] + other.0[lane]))
            }
            #[inline(always)]
            unsafe fn mul_add(self, factor: Self, summand: Self) -> Self {
                Self(std::array::from_fn(|lane| {
                    if cfg!(target_arch = "aarch64") {
                        // Every processor of this architecture multiplies and adds in one instruction.
                        <$scalar>::mul_add(self.0[lane], factor.0[lane], summand.0[lane])
                    } else {
                        self.0[lane] * factor.0[lane] + summand.0[lane]
                    }
                }))
            }
        }
    )*};
}

portable_lanes! {
    f32, 4;
    f64, 2;
}

/// Rows and columns of the tile of C that is kept in registers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Tile {
    pub rows: usize,
    pub columns: usize,
}

/// The tile for sums of this type on this processor: two vectors wide, as tall as the registers allow.
pub(super) fn tile<R: Real>() -> Tile {
    let (rows, bytes) = match simd::level() {
        Level::Portable => (4, 32),
        Level::Avx2 => (6, 64),
        Level::Avx512 => (14, 128),
    };
    Tile { rows, columns: bytes / size_of::<R>() }
}

/// The largest number of columns of any [`Tile`].
const WIDEST: usize = 32;

/// A window of a row-major matrix: whoever holds it is the only one to touch these elements.
pub(super) struct Window<'a, R> {
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
pub(super) enum Start<'a, R> {
    /// Nothing: C is overwritten.
    Zero,
    /// A value per column: C is overwritten.
    Bias(&'a [R]),
    /// C itself.
    Previous,
}

/// Rows of A: element (i, step) is `data[(i / tile.rows) * panel + (i % tile.rows) * row + step * step_stride]`.
#[derive(Clone, Copy)]
pub(super) struct Left<'a, R> {
    pub data: &'a [R],
    pub panel: usize,
    pub row: usize,
    pub step: usize,
}

/// Columns of B: element (step, j) is `data[(j / tile.columns) * panel + j % tile.columns + step * step_stride]`.
/// All columns of the last panel are readable, even if C ends before.
#[derive(Clone, Copy)]
pub(super) struct Right<'a, R> {
    pub data: &'a [R],
    pub panel: usize,
    pub step: usize,
}

/// `C = start + A·B` for one block of `steps` steps, on the calling thread.
pub(super) fn multiply<R: Real>(steps: usize, a: Left<R>, b: Right<R>, start: Start<R>, c: Window<R>) {
    let (m, n) = (c.rows, c.columns);
    if m == 0 || n == 0 {
        return;
    }
    let tile = tile::<R>();
    if steps > 0 {
        let last_row = ((m - 1) / tile.rows) * a.panel + ((m - 1) % tile.rows).min(m - 1) * a.row;
        // Full panels reach at least as far as the last one, which may be lower.
        let full = (m / tile.rows).saturating_sub(1) * a.panel + (tile.rows.min(m) - 1) * a.row;
        assert!(last_row.max(full) + (steps - 1) * a.step < a.data.len(), "A ends before its block");
        let last_column = ((n - 1) / tile.columns) * b.panel + tile.columns - 1;
        assert!(last_column + (steps - 1) * b.step < b.data.len(), "B ends before its block");
    }
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
        a_row: a.row,
        a_step: a.step,
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
            (Level::Avx512, DType::F64) => avx512_f64(&block.cast()),
            #[cfg(target_arch = "x86_64")]
            (Level::Avx512, _) => avx512_f32(&block.cast()),
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
    a_row: usize,
    a_step: usize,
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
            a_row: self.a_row,
            a_step: self.a_step,
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
    avx512_f32: __m512, 14 = [1 2 3 4 5 6 7 8 9 10 11 12 13];
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")]
    avx512_f64: __m512d, 14 = [1 2 3 4 5 6 7 8 9 10 11 12 13];
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
        let mut a = block.a.add(panel * block.a_panel);
        let mut b = block.b.add(j / (2 * V::COUNT) * block.b_panel);
        let mut sums = [[V::zero(); 2]; ROWS];
        for _ in 0..block.steps {
            let columns = [V::load(b), V::load(b.add(V::COUNT))];
            for (row, sums) in sums.iter_mut().enumerate() {
                let a = V::splat(a.add(row * block.a_row));
                sums[0] = a.mul_add(columns[0], sums[0]);
                sums[1] = a.mul_add(columns[1], sums[1]);
            }
            // Wrapping: after the last step the pointers may leave their slices.
            a = a.wrapping_add(block.a_step);
            b = b.wrapping_add(block.b_step);
        }
        let c = block.c.add(i * block.c_row + j);
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
