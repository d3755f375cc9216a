//! Matrix products over slices: packed panels, blocks that fit the caches, a micro-kernel in registers (Goto and van de
//! Geijn, "Anatomy of High-Performance Matrix Multiplication", 2008), in the terms of BLIS: C is `m × n` with products of
//! depth `k`, blocks are `mc × nc` of depth `kc`, tiles in registers `mr × nr`.
//!
//! Read from the driver down; each file imports only from files below it:
//!
//! | file | role |
//! |---|---|
//! | this one | driver: takes a product, cuts it into pieces for the threads |
//! | [`parallel`] | blocks of one large product, packed once for all threads |
//! | [`blocked`] | blocks of a piece, packed by the thread that multiplies them |
//! | [`select`] | chooses the kernel from shape and processor |
//! | [`few_rows`] | few rows of A without packing B |
//! | [`pack`] | operands as the kernels read them, in place or in panels |
//! | [`kernels`] | a tile of C in registers: multiply-adds, products of bf16 pairs, AMX |
//! | [`matrix`], [`simd`] | operands, windows of C, what a product is added to; vector registers |
//!
//! Element (i, j) of C is always summed in the same order: chains of [`KC`](matrix::KC) products, and the chains one after
//! the other. Neither the layout of the operands nor the number of threads changes a bit of it. Nor does the number of rows
//! or columns, except on tiles of AMX: those have an order of their own, and are not used for few rows.

mod blocked;
mod few_rows;
mod kernels;
mod matrix;
mod pack;
mod parallel;
mod select;
mod simd;
#[cfg(all(test, target_arch = "x86_64", target_os = "linux"))]
mod tests;

use std::mem::take;

use crate::{
    Result,
    device::{
        cpu::{self, CpuBuffer},
        scratch::aligned,
    },
    dtype::{Element, Float, Real},
};
use blocked::{FEW, NC_OF_FEW, Scratch};
use few_rows::streamed;
pub(crate) use matrix::Matrix;
use matrix::{Beta, Window, as_sums};
use pack::Packing;
pub(crate) use select::Multiply;

/// Minimum number of products per task, below which scheduling costs more than it gains.
const GRAIN: usize = 1 << 19;

/// The same minimum for few rows, where reading B is all the cost.
const GRAIN_OF_FEW: usize = 1 << 16;

/// Minimum number of products of a single matrix for which packing the operands once for all threads pays off.
const LARGE: usize = 1 << 24;

/// Batch of products of the same size. `offsets(item)` are the positions of A and B of an item in their data.
pub(crate) struct Product<'a, T> {
    pub batch: usize,
    pub m: usize,
    pub n: usize,
    pub k: usize,
    /// Number of rows by which the kernel is chosen: `m`, or more if rows of several items share the same matrix.
    pub rows: usize,
    pub a: Matrix<'a, T>,
    pub b: Matrix<'a, T>,
    pub offsets: &'a (dyn Fn(usize) -> (usize, usize) + Sync),
    /// Added to every row.
    pub bias: Option<&'a [T]>,
}

impl<'a, T: Float> Product<'a, T> {
    /// Returns the operands of one item.
    fn item(&self, item: usize) -> (Matrix<'a, T>, Matrix<'a, T>) {
        let (a, b) = (self.offsets)(item);
        (self.a.at(a), self.b.at(b))
    }
}

/// Computes `C[i * ldc + j] (+)= Σ_p A[i, p] B[p, j]` on the calling thread; C are accumulators (f32 for half types).
///
/// Without `accumulate` C is overwritten. The packing buffers belong to the thread and are reused.
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
    let beta = if accumulate { Beta::One } else { Beta::Zero };
    let mut c = Window::new(c, m, n, ldc);
    if k == 0 {
        return beta.fill(&mut c);
    }
    Scratch::with(|scratch| blocked::multiply(select::kernel::<T>(m), k, a, b, beta, c, scratch));
}

/// Computes `out[item] = A[item]·B[item] (+ bias)`, out packed `[batch, m, n]`, on all threads of the pool.
///
/// The division of the work depends only on the sizes. Errors: out of memory for packed operands.
pub(crate) fn gemm<T: Multiply>(product: &Product<T>, out: &mut [T]) -> Result<()> {
    gemm_by(select::kernel::<T>(product.rows), product, out)
}

/// Computes [`gemm`] with a given kernel.
fn gemm_by<T: Float>(kernel: &dyn Packing<T>, product: &Product<T>, out: &mut [T]) -> Result<()> {
    let &Product { batch, m, n, k, .. } = product;
    if batch == 0 || m == 0 || n == 0 {
        return Ok(());
    }
    if k == 0 {
        match product.bias {
            Some(bias) => out.chunks_exact_mut(n).for_each(|row| row.copy_from_slice(bias)),
            None => out.fill(T::from_acc(T::Acc::ZERO)),
        }
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
    let beta = bias.map_or(Beta::Zero, Beta::Bias);
    let cost = m.saturating_mul(n).saturating_mul(k);
    if cost >= LARGE && m > FEW && n > FEW && batch < 8 {
        return out.chunks_exact_mut(m * n).enumerate().try_for_each(|(item, out)| {
            let (a, b) = product.item(item);
            parallel::multiply(kernel, k, a, b, beta, Window::new(out, m, n, n))
        });
    }
    // Pieces for one thread each: whole items, rows of them, or columns where there are few rows.
    let few = m <= streamed::ROWS || select::few_rows(kernel, m, k, product.b).is_some();
    let grain = if few { GRAIN_OF_FEW * m } else { GRAIN };
    let (height, width) = if cost <= 2 * grain {
        (m, n)
    } else if m <= FEW {
        let columns = (grain / (m * k)).max(n / 64).max(NC_OF_FEW);
        (m, columns.next_multiple_of(NC_OF_FEW).min(n))
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
                one_piece(kernel, k, a.from(i, 0), b.from(0, j), beta.of_block(0, j), out, scratch);
            }
        });
    });
    Ok(())
}

/// Computes `out = beta + A·B` on the calling thread, rounded to the type of the output.
fn one_piece<T: Float>(
    kernel: &dyn Packing<T>,
    k: usize,
    a: Matrix<T>,
    b: Matrix<T>,
    beta: Beta<T::Acc>,
    mut out: Window<T>,
    scratch: &mut Scratch,
) {
    if let Some(out) = out.as_sums() {
        return blocked::multiply(kernel, k, a, b, beta, out, scratch);
    }
    let (rows, columns) = (out.rows(), out.columns());
    let mut buffer = take(&mut scratch.sums);
    let sums = aligned::<T::Acc>(&mut buffer, rows * columns);
    blocked::multiply(kernel, k, a, b, beta, Window::new(sums, rows, columns, columns), scratch);
    out.round(sums);
    scratch.sums = buffer;
}

/// Computes `sums (+)= A·B` for a batch of one and without a bias, in the type of the sums, on all threads of the pool.
///
/// The division of the work depends only on the sizes. Errors: out of memory for packed operands.
pub(crate) fn gemm_sums<T: Multiply>(product: &Product<T>, accumulate: bool, sums: &mut [T::Acc]) -> Result<()> {
    let &Product { m, n, k, .. } = product;
    if m == 0 || n == 0 {
        return Ok(());
    }
    let kernel = select::kernel::<T>(product.rows);
    let beta = if accumulate { Beta::One } else { Beta::Zero };
    let mut whole = Window::new(sums, m, n, n);
    if k == 0 {
        beta.fill(&mut whole);
        return Ok(());
    }
    let (a, b) = product.item(0);
    let cost_of_row = n.saturating_mul(k);
    if m.saturating_mul(cost_of_row) >= LARGE && m > FEW && n > FEW {
        return parallel::multiply_sums(kernel, k, a, b, beta, whole);
    }
    let height = GRAIN.div_ceil(cost_of_row).next_multiple_of(kernel.tile().mr).min(m);
    cpu::for_tasks(m.div_ceil(height), |task| {
        let i = task * height;
        // SAFETY: every task has other rows.
        let part = unsafe { whole.shared_part(i, 0, height.min(m - i), n) };
        Scratch::with(|scratch| blocked::multiply(kernel, k, a.from(i, 0), b, beta, part, scratch));
    });
    Ok(())
}
