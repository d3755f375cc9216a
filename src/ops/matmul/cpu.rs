//! The matrix product on the processor: packed panels, blocks that fit the caches, a micro-kernel in registers
//! (Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication", 2008).
//!
//! Element (i, j) of C is always summed in the same order: chains of [`STEPS`] products, and the chains one after the
//! other. Neither the layout of the operands nor the number of rows, columns or threads changes a bit of it; the path
//! taken is a matter of speed alone.

use std::cell::Cell;

use super::{
    microkernel::{Left, Right, Start, Tile, Window, multiply, tile},
    pack::pack,
};
use crate::{
    Result,
    core::{Element, Float, Real},
    device::cpu,
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
    fn at(self, offset: usize) -> Self {
        Self { data: &self.data[offset.min(self.data.len())..], ..self }
    }

    /// The matrix from row `i` and column `j` on.
    fn from(self, i: usize, j: usize) -> Self {
        self.at(i * self.row + j * self.col)
    }

    /// Rows and columns exchanged.
    fn transposed(self) -> Self {
        Self { data: self.data, row: self.col, col: self.row }
    }
}

/// Products that are summed in one chain before they are added to C. Part of the result: see the module's head.
const STEPS: usize = 512;

/// Rows and columns of the blocks that [`gemm_block`] packs: A stays in the second-level cache.
const BLOCK_ROWS: usize = 168;
const BLOCK_COLUMNS: usize = 512;

/// Products below which a task does not pay for its hand-over.
const GRAIN: usize = 1 << 19;

/// Operands with at most this many rows (or columns) are cut along the other side alone.
const THIN: usize = 64;

/// `C[i * ldc + j] (+)= Σ_k A[i, k] B[k, j]` on the calling thread; C are accumulators (f32 for half types).
///
/// Without `accumulate` C is overwritten. The buffers for packing belong to the thread and are reused.
#[allow(clippy::too_many_arguments)]
pub(crate) fn gemm_block<T: Float>(
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
    Scratch::with(|scratch| block(k, a, b, start, Window::new(c, m, n, ldc), scratch));
}

/// Memory of a thread for packed operands and sums; it grows to what was needed most.
#[derive(Default)]
struct Scratch {
    left: Vec<u64>,
    right: Vec<u64>,
    sums: Vec<u64>,
    bias: Vec<u64>,
}

thread_local! {
    static SCRATCH: Cell<Scratch> = Cell::default();
}

impl Scratch {
    fn with<R>(f: impl FnOnce(&mut Scratch) -> R) -> R {
        // Taken, not borrowed: whatever `f` does, a second call on this thread finds an empty scratch, not a panic.
        let mut scratch = SCRATCH.take();
        let result = f(&mut scratch);
        SCRATCH.set(scratch);
        result
    }
}

/// The first elements of a growing buffer, aligned to a cache line.
fn aligned<R: Real>(buffer: &mut Vec<u64>, elements: usize) -> &mut [R] {
    const LINE: usize = 64;
    let words = (elements * size_of::<R>()).div_ceil(size_of::<u64>());
    if buffer.len() < words + LINE / size_of::<u64>() {
        buffer.resize(words + LINE / size_of::<u64>(), 0);
    }
    let skip = buffer.as_ptr().align_offset(LINE).min(LINE / size_of::<u64>());
    &mut bytemuck::cast_slice_mut(&mut buffer[skip..skip + words])[..elements]
}

/// The operand as the type of the sums, if it has it.
fn as_sums<T: Float>(data: &[T]) -> Option<&[T::Acc]> {
    (T::DTYPE == T::Acc::DTYPE).then(|| bytemuck::cast_slice(data))
}

/// `C = start + A·B` on the calling thread.
fn block<T: Float>(
    k: usize,
    a: Matrix<T>,
    b: Matrix<T>,
    start: Start<T::Acc>,
    mut c: Window<T::Acc>,
    scratch: &mut Scratch,
) {
    let (m, n) = (c.rows(), c.columns());
    if m == 0 || n == 0 {
        return;
    }
    let Tile { rows, columns } = tile::<T::Acc>();
    for j in (0..n).step_by(BLOCK_COLUMNS) {
        let width = BLOCK_COLUMNS.min(n - j);
        for step in (0..k.max(1)).step_by(STEPS) {
            let steps = STEPS.min(k - step);
            let start = match start {
                _ if step > 0 => Start::Previous,
                Start::Bias(bias) => Start::Bias(&bias[j..]),
                start => start,
            };
            let packed = aligned::<T::Acc>(&mut scratch.right, width.next_multiple_of(columns) * steps);
            pack(b.from(step, j).transposed(), width, steps, columns, packed);
            let right = Right { data: packed, panel: columns * steps, step: columns };
            for i in (0..m).step_by(BLOCK_ROWS) {
                let height = BLOCK_ROWS.min(m - i);
                let part = a.from(i, step);
                let direct = as_sums(part.data).filter(|_| part.col == 1);
                let left = match direct {
                    Some(data) => Left { data, panel: rows * part.row, row: part.row, step: 1 },
                    None => {
                        let packed = aligned::<T::Acc>(&mut scratch.left, height.next_multiple_of(rows) * steps);
                        pack(part, height, steps, rows, packed);
                        Left { data: packed, panel: rows * steps, row: 1, step: rows }
                    }
                };
                multiply(steps, left, right, start, c.part(i, j, height, width));
            }
        }
    }
}

/// A batch of products of the same size. `offsets(item)` are the positions of A and B of an item in their data.
pub(crate) struct Product<'a, T> {
    pub batch: usize,
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub a: Matrix<'a, T>,
    pub b: Matrix<'a, T>,
    pub offsets: &'a (dyn Fn(usize) -> (usize, usize) + Sync),
    /// Added to every row.
    pub bias: Option<&'a [T]>,
    /// Adds to the output instead of overwriting it; excludes a bias.
    pub accumulate: bool,
}

/// `out[item] = A[item]·B[item] (+ bias)`, out packed `[batch, m, n]`, on all threads of the pool.
///
/// Errors: out of memory for packed operands.
pub(crate) fn gemm<T: Float>(product: &Product<T>, out: &mut [T]) -> Result<()> {
    let &Product { batch, m, n, k, .. } = product;
    if batch == 0 || m == 0 || n == 0 {
        return Ok(());
    }
    // Pieces that one thread computes alone: whole items, rows of them, or columns where there are few rows.
    let depth = k.max(1);
    let cost = m.saturating_mul(n).saturating_mul(depth);
    let (height, width) = if cost <= 2 * GRAIN {
        (m, n)
    } else if m <= THIN {
        let tile = tile::<T::Acc>().columns;
        (m, (GRAIN / (m * depth)).max(n / 64).next_multiple_of(tile).min(n))
    } else {
        ((GRAIN / (n * depth)).max(256).min(m), n)
    };
    let (down, across) = (m.div_ceil(height), n.div_ceil(width));
    let whole = Window::new(out, batch * m, n, n);
    let pieces = batch * down * across;
    let per_task = (GRAIN / height.saturating_mul(width).saturating_mul(depth)).max(1);
    cpu::for_tasks(pieces.div_ceil(per_task), |task| {
        Scratch::with(|scratch| {
            for piece in task * per_task..((task + 1) * per_task).min(pieces) {
                let (item, piece) = (piece / (down * across), piece % (down * across));
                let (i, j) = (piece / across * height, piece % across * width);
                let (rows, columns) = (height.min(m - i), width.min(n - j));
                // SAFETY: every piece is another window of the output.
                let out = unsafe { whole.shared_part(item * m + i, j, rows, columns) };
                part(product, item, i, j, out, scratch);
            }
        });
    });
    Ok(())
}

/// One piece of the output, from row `i` and column `j` of an item, on the calling thread.
fn part<T: Float>(product: &Product<T>, item: usize, i: usize, j: usize, mut out: Window<T>, scratch: &mut Scratch) {
    let (rows, columns) = (out.rows(), out.columns());
    let (a, b) = (product.offsets)(item);
    let a = product.a.at(a).from(i, 0);
    let b = product.b.at(b).from(0, j);
    let mut bias_values = std::mem::take(&mut scratch.bias);
    let mut sums = std::mem::take(&mut scratch.sums);
    let start = match product.bias {
        _ if product.accumulate => Start::Previous,
        Some(bias) => {
            let values = aligned::<T::Acc>(&mut bias_values, columns);
            values.iter_mut().zip(&bias[j..]).for_each(|(value, bias)| *value = bias.to_acc());
            Start::Bias(values)
        }
        None => Start::Zero,
    };
    match out.as_sums() {
        Some(out) => block(product.k, a, b, start, out, scratch),
        None => {
            let sums = aligned::<T::Acc>(&mut sums, rows * columns);
            if product.accumulate {
                for (row, sums) in sums.chunks_exact_mut(columns).enumerate() {
                    sums.iter_mut().zip(out.row_mut(row)).for_each(|(sum, out)| *sum = out.to_acc());
                }
            }
            block(product.k, a, b, start, Window::new(sums, rows, columns, columns), scratch);
            for (row, sums) in sums.chunks_exact(columns).enumerate() {
                out.row_mut(row).iter_mut().zip(sums).for_each(|(out, sum)| *out = T::from_acc(*sum));
            }
        }
    }
    scratch.bias = bias_values;
    scratch.sums = sums;
}
