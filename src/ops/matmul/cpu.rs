//! The matrix product on the processor: packed panels, blocks that fit the caches, a micro-kernel in registers
//! (Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication", 2008).
//!
//! Element (i, j) of C is always summed in the same order: chains of [`STEPS`] products, and the chains one after the
//! other. Neither the layout of the operands nor the number of threads changes a bit of it. Nor does the number of rows
//! or columns, but on tiles of AMX ([`packing`](super::packing)): those have an order of their own, and are not used for a
//! few rows.

use std::mem::take;

use bytemuck::Pod;

use super::{
    few,
    microkernel::{Left, Right, Start, Window},
    pack::pack,
    packing::{Multiply, MultiplyAdd, Packing},
    shared, skinny,
};
use crate::{
    Result,
    device::{
        cpu::{self, CpuBuffer},
        scratch::{User, aligned, lend},
        simd::vectorized,
    },
    dtype::{Element, Float, Real},
};

/// A matrix inside of a slice: element (i, j) is `data[i * row + j * col]`.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<'a, T> {
    pub data: &'a [T],
    pub row: usize,
    pub col: usize,
}

impl<T: Copy> Matrix<'_, T> {
    /// The matrix that starts `offset` elements later; an empty one may start behind the end.
    pub(super) fn at(self, offset: usize) -> Self {
        Self { data: &self.data[offset.min(self.data.len())..], ..self }
    }

    /// The matrix from row `i` and column `j` on.
    pub(super) fn from(self, i: usize, j: usize) -> Self {
        self.at(i * self.row + j * self.col)
    }

    /// Rows and columns exchanged.
    pub(super) fn transposed(self) -> Self {
        Self { data: self.data, row: self.col, col: self.row }
    }
}

/// Products that are summed in one chain before they are added to C. Part of the result: see the module's head.
pub(super) const STEPS: usize = 256;

/// Rows and columns of the blocks that one thread packs for itself: both stay in the second-level cache.
const BLOCK_ROWS: usize = 168;
const BLOCK_COLUMNS: usize = 256;

/// Columns that are packed at a time for few rows: they stay in the first-level cache.
const FEW_COLUMNS: usize = 64;

/// Products below which a task does not pay for its hand-over.
const GRAIN: usize = 1 << 19;

/// The same for few rows, where reading B is all the cost.
const GRAIN_OF_FEW: usize = 1 << 16;

/// Products of a single matrix from which it pays to pack the operands for all threads together.
const LARGE: usize = 1 << 24;

/// Operands with at most this many rows (or columns) are cut along the other side alone.
const THIN: usize = 64;

/// `C[i * ldc + j] (+)= Σ_k A[i, k] B[k, j]` on the calling thread; C are accumulators (f32 for half types).
///
/// Without `accumulate` C is overwritten. The buffers for packing belong to the thread and are reused.
#[allow(clippy::too_many_arguments)]
pub(crate) fn gemm_block<T: Multiply>(
    m: usize,
    n: usize,
    k: usize,
    a: Matrix<T>,
    b: Matrix<T>,
    accumulate: bool,
    c: &mut [T::Acc],
    ldc: usize,
) {
    let start = if accumulate { Start::Previous } else { Start::Zero };
    let mut c = Window::new(c, m, n, ldc);
    if k == 0 {
        return start.fill(&mut c);
    }
    Scratch::with(|scratch| {
        if m > skinny::ROWS && T::Tiled::available() {
            block::<T, T::Tiled>(k, a, b, start, c, scratch);
        } else if T::Paired::available() {
            block::<T, T::Paired>(k, a, b, start, c, scratch);
        } else {
            block::<T, MultiplyAdd>(k, a, b, start, c, scratch);
        }
    });
}

/// Memory of a thread for packed operands and sums.
#[derive(Default)]
struct Scratch {
    left: Vec<u64>,
    right: Vec<u64>,
    sums: Vec<u64>,
}

impl Scratch {
    fn with<R>(f: impl FnOnce(&mut Scratch) -> R) -> R {
        lend(User::Products, |areas| {
            let [left, right, sums] = take(areas);
            let mut scratch = Scratch { left, right, sums };
            let result = f(&mut scratch);
            *areas = [scratch.left, scratch.right, scratch.sums];
            result
        })
    }
}

/// Values as the type of the sums, if they have it.
pub(super) fn as_sums<T: Float>(data: &[T]) -> Option<&[T::Acc]> {
    (T::DTYPE == T::Acc::DTYPE).then(|| bytemuck::cast_slice(data))
}

/// `C = start + A·B` on the calling thread, for `k > 0`.
fn block<T: Float, P: Packing<T>>(
    k: usize,
    a: Matrix<T>,
    b: Matrix<T>,
    start: Start<T::Acc>,
    mut c: Window<T::Acc>,
    scratch: &mut Scratch,
) {
    let (m, n) = (c.rows(), c.columns());
    let done = match few::lane::<T, P>(m, k, b) {
        Some(lane) => few::multiply(lane, k, a, b, start, &mut c, &mut scratch.left),
        None if m <= skinny::ROWS && P::STREAMS => few_rows(k, a, b, start, &mut c, scratch),
        None => 0,
    };
    let width = if m <= THIN { FEW_COLUMNS } else { BLOCK_COLUMNS };
    for j in (done..n).step_by(width) {
        let width = width.min(n - j);
        for step in (0..k).step_by(STEPS) {
            let steps = STEPS.min(k - step);
            let start = start.of_block(step, j);
            let right = right::<T, P>(b.from(step, j), m, width, steps, &mut scratch.right);
            for i in (0..m).step_by(BLOCK_ROWS) {
                let height = BLOCK_ROWS.min(m - i);
                let left = left::<T, P>(a.from(i, step), height, width, steps, &mut scratch.left);
                let c = c.part(i, j, height, width);
                match (left, right) {
                    (Some(left), Some(right)) => P::multiply(steps, left, right, start, c),
                    _ => out_of_range(steps, a.from(i, step), b.from(step, j), start, c),
                }
            }
        }
    }
}

/// As [`block`] for one block of steps, by multiply-adds: for values that other instructions get wrong.
#[cold]
pub(super) fn out_of_range<T: Float>(
    steps: usize,
    a: Matrix<T>,
    b: Matrix<T>,
    start: Start<T::Acc>,
    c: Window<T::Acc>,
) {
    let mut scratch = Scratch::default();
    let (rows, columns) = (c.rows(), c.columns());
    let right = right::<T, MultiplyAdd>(b, rows, columns, steps, &mut scratch.right);
    let left = left::<T, MultiplyAdd>(a, rows, columns, steps, &mut scratch.left);
    if let (Some(left), Some(right)) = (left, right) {
        <MultiplyAdd as Packing<T>>::multiply(steps, left, right, start, c);
    }
}

/// Rows of A for the micro-kernel, in place where that is as fast; `None` if they are out of its range.
fn left<'a, T: Float, P: Packing<T>>(
    a: Matrix<'a, T>,
    rows: usize,
    columns: usize,
    steps: usize,
    packed: &'a mut Vec<u64>,
) -> Option<Left<'a, P::Packed>> {
    if let Some(left) = P::left_in_place(a, steps, columns) {
        return Some(left);
    }
    let packed = aligned(packed, rows.next_multiple_of(P::tile().rows) * steps.next_multiple_of(P::STEPS));
    P::pack_left(a, rows, steps, packed).then(|| P::packed_left(packed, steps))
}

/// Columns of B for the micro-kernel, in place where that is as fast; `None` if they are out of its range.
fn right<'a, T: Float, P: Packing<T>>(
    b: Matrix<'a, T>,
    rows: usize,
    columns: usize,
    steps: usize,
    packed: &'a mut Vec<u64>,
) -> Option<Right<'a, P::Packed>> {
    if let Some(right) = P::right_in_place(b, steps, rows, columns) {
        return Some(right);
    }
    let packed = aligned(packed, columns.next_multiple_of(P::tile().columns) * steps.next_multiple_of(P::STEPS));
    P::pack_right(b, columns, steps, packed).then(|| P::packed_right(packed, steps))
}

/// As [`block`] for at most [`skinny::ROWS`] rows; returns how many columns are done.
fn few_rows<T: Float>(
    k: usize,
    a: Matrix<T>,
    b: Matrix<T>,
    start: Start<T::Acc>,
    c: &mut Window<T::Acc>,
    scratch: &mut Scratch,
) -> usize {
    let (m, n) = (c.rows(), c.columns());
    if m == 0 || n == 0 {
        return 0;
    }
    let groups = m.div_ceil(skinny::TOGETHER);
    // The rows of A for all steps, by blocks of steps, and in them by groups of rows.
    let left = aligned::<T::Acc>(&mut scratch.left, m * k);
    for step in (0..k).step_by(STEPS) {
        let steps = STEPS.min(k - step);
        for first in (0..m).step_by(skinny::TOGETHER) {
            let rows = skinny::TOGETHER.min(m - first);
            let packed = &mut left[step * m + first * steps..][..rows * steps];
            pack(a.from(first, step), rows, steps, rows, packed);
        }
    }
    // Columns whose steps lie next to each other are read from the first to the last before those behind them; and each
    // group of rows must come as far as the others.
    let width = if b.row == 1 { skinny::strip::<T>() } else { n };
    let end = if groups > 1 { n - n % skinny::strip::<T>() } else { n };
    let mut done = 0;
    for j in (0..end).step_by(width) {
        let width = width.min(end - j);
        let mut of_strip = 0;
        for step in (0..k).step_by(STEPS) {
            let steps = STEPS.min(k - step);
            for first in (0..m).step_by(skinny::TOGETHER) {
                let rows = skinny::TOGETHER.min(m - first);
                let left = &left[step * m + first * steps..][..rows * steps];
                let sums = aligned::<T::Acc>(&mut scratch.right, rows * width);
                of_strip = skinny::multiply(rows, width, steps, left, b.from(step, j), step, sums);
                if of_strip == 0 {
                    return done;
                }
                let start = start.of_block(step, j);
                for (i, sums) in sums.chunks_exact(width).enumerate() {
                    start.add_to(&sums[..of_strip], &mut c.row_mut(first + i)[j..]);
                }
            }
        }
        done += of_strip;
        if of_strip < width {
            break;
        }
    }
    done
}

/// Lends this thread's memory for sums, of unspecified content.
pub(super) fn sums_of_task<R: Pod>(elements: usize, f: impl FnOnce(&mut [R])) {
    Scratch::with(|scratch| f(aligned(&mut scratch.sums, elements)));
}

/// A batch of products of the same size. `offsets(item)` are the positions of A and B of an item in their data.
pub(crate) struct Product<'a, T> {
    pub batch: usize,
    pub m: usize,
    pub n: usize,
    pub k: usize,
    /// What decides by which instructions to multiply: `m`, or more if rows of several items meet the same matrix.
    pub rows: usize,
    pub a: Matrix<'a, T>,
    pub b: Matrix<'a, T>,
    pub offsets: &'a (dyn Fn(usize) -> (usize, usize) + Sync),
    /// Added to every row.
    pub bias: Option<&'a [T]>,
}

/// `out[item] = A[item]·B[item] (+ bias)`, out packed `[batch, m, n]`, on all threads of the pool.
///
/// How the work is cut depends on the sizes alone. Errors: out of memory for packed operands.
pub(crate) fn gemm<T: Multiply>(product: &Product<T>, out: &mut [T]) -> Result<()> {
    if product.rows > skinny::ROWS && T::Tiled::available() {
        gemm_by::<T, T::Tiled>(product, out)
    } else if T::Paired::available() {
        gemm_by::<T, T::Paired>(product, out)
    } else {
        gemm_by::<T, MultiplyAdd>(product, out)
    }
}

/// As [`gemm`] in one way.
pub(super) fn gemm_by<T: Float, P: Packing<T>>(product: &Product<T>, out: &mut [T]) -> Result<()> {
    let &Product { batch, m, n, k, .. } = product;
    if batch == 0 || m == 0 || n == 0 {
        return Ok(());
    }
    // The bias as sums: converted once, before it is added to every row.
    let mut converted = CpuBuffer::new(if T::DTYPE == T::Acc::DTYPE { 0 } else { n * size_of::<T::Acc>() })?;
    let bias = product.bias.map(|bias| {
        as_sums(bias).unwrap_or_else(|| {
            let values = bytemuck::cast_slice_mut::<u8, T::Acc>(converted.bytes_mut());
            values.iter_mut().zip(bias).for_each(|(value, bias)| *value = bias.to_acc());
            values
        })
    });
    let start = bias.map_or(Start::Zero, Start::Bias);
    if k == 0 {
        match product.bias {
            Some(bias) => out.chunks_exact_mut(n).for_each(|row| row.copy_from_slice(bias)),
            None => out.fill(T::from_acc(T::Acc::ZERO)),
        }
        return Ok(());
    }
    let cost = m.saturating_mul(n).saturating_mul(k);
    if cost >= LARGE && m > THIN && n > THIN && batch < 8 {
        return out.chunks_exact_mut(m * n).enumerate().try_for_each(|(item, out)| {
            let (a, b) = product.item(item);
            shared::product::<T, P>(k, a, b, start, Window::new(out, m, n, n))
        });
    }
    // Pieces that one thread computes alone: whole items, rows of them, or columns where there are few rows.
    let streamed = m <= skinny::ROWS || few::lane::<T, P>(m, k, product.b).is_some();
    let grain = if streamed { GRAIN_OF_FEW * m } else { GRAIN };
    let (height, width) = if cost <= 2 * grain {
        (m, n)
    } else if m <= THIN {
        let columns = (grain / (m * k)).max(n / 64).max(FEW_COLUMNS);
        (m, columns.next_multiple_of(FEW_COLUMNS).min(n))
    } else {
        ((GRAIN / (n * k)).max(256).min(m), n)
    };
    let (down, across) = (m.div_ceil(height), n.div_ceil(width));
    let whole = Window::new(out, batch * m, n, n);
    let pieces = batch * down * across;
    let per_task = (grain / height.saturating_mul(width).saturating_mul(k)).max(1);
    cpu::for_tasks(pieces.div_ceil(per_task), |task| {
        Scratch::with(|scratch| {
            for piece in task * per_task..((task + 1) * per_task).min(pieces) {
                let (item, piece) = (piece / (down * across), piece % (down * across));
                let (i, j) = (piece / across * height, piece % across * width);
                let (rows, columns) = (height.min(m - i), width.min(n - j));
                // SAFETY: every piece is another window of the output.
                let out = unsafe { whole.shared_part(item * m + i, j, rows, columns) };
                let (a, b) = product.item(item);
                one_piece::<T, P>(k, a.from(i, 0), b.from(0, j), start.of_block(0, j), out, scratch);
            }
        });
    });
    Ok(())
}

/// `sums (+)= A·B` for a batch of one and without a bias, in the type of the sums, on all threads of the pool.
///
/// How the work is cut depends on the sizes alone. Errors: out of memory for packed operands.
pub(crate) fn gemm_sums<T: Multiply>(product: &Product<T>, accumulate: bool, sums: &mut [T::Acc]) -> Result<()> {
    if product.rows > skinny::ROWS && T::Tiled::available() {
        gemm_sums_by::<T, T::Tiled>(product, accumulate, sums)
    } else if T::Paired::available() {
        gemm_sums_by::<T, T::Paired>(product, accumulate, sums)
    } else {
        gemm_sums_by::<T, MultiplyAdd>(product, accumulate, sums)
    }
}

/// As [`gemm_sums`] in one way.
fn gemm_sums_by<T: Float, P: Packing<T>>(product: &Product<T>, accumulate: bool, sums: &mut [T::Acc]) -> Result<()> {
    let &Product { m, n, k, .. } = product;
    if m == 0 || n == 0 {
        return Ok(());
    }
    let start = if accumulate { Start::Previous } else { Start::Zero };
    let mut whole = Window::new(sums, m, n, n);
    if k == 0 {
        start.fill(&mut whole);
        return Ok(());
    }
    let (a, b) = product.item(0);
    let cost_of_row = n.saturating_mul(k);
    if m.saturating_mul(cost_of_row) >= LARGE && m > THIN && n > THIN {
        return shared::product_sums::<T, P>(k, a, b, start, whole);
    }
    let height = GRAIN.div_ceil(cost_of_row).next_multiple_of(P::tile().rows).min(m);
    cpu::for_tasks(m.div_ceil(height), |task| {
        let i = task * height;
        // SAFETY: every task has other rows.
        let part = unsafe { whole.shared_part(i, 0, height.min(m - i), n) };
        Scratch::with(|scratch| block::<T, P>(k, a.from(i, 0), b, start, part, scratch));
    });
    Ok(())
}

impl<'a, T: Float> Product<'a, T> {
    /// The operands of one item.
    fn item(&self, item: usize) -> (Matrix<'a, T>, Matrix<'a, T>) {
        let (a, b) = (self.offsets)(item);
        (self.a.at(a), self.b.at(b))
    }
}

/// `out = start + A·B` on the calling thread, rounded to the type of the output.
fn one_piece<T: Float, P: Packing<T>>(
    k: usize,
    a: Matrix<T>,
    b: Matrix<T>,
    start: Start<T::Acc>,
    mut out: Window<T>,
    scratch: &mut Scratch,
) {
    if let Some(out) = out.as_sums() {
        return block::<T, P>(k, a, b, start, out, scratch);
    }
    let (rows, columns) = (out.rows(), out.columns());
    let mut buffer = take(&mut scratch.sums);
    let sums = aligned::<T::Acc>(&mut buffer, rows * columns);
    block::<T, P>(k, a, b, start, Window::new(sums, rows, columns, columns), scratch);
    for (row, sums) in sums.chunks_exact(columns).enumerate() {
        round::<T>(sums, out.row_mut(row));
    }
    scratch.sums = buffer;
}

vectorized! {
    /// Rounds sums to the type of the output.
    pub(super) fn round<T: Float>(sums: &[T::Acc], out: &mut [T]) {
        for (out, sum) in out.iter_mut().zip(sums) {
            *out = T::from_acc(*sum);
        }
    }
}
