//! One large product on all threads: the operands are packed once, block by block, and every thread reads them. The depth
//! is at least 1.

use std::sync::atomic::{AtomicBool, Ordering};

use super::{
    blocked::{Scratch, out_of_range},
    matrix::{Beta, KC, Matrix, Window},
    pack::{Operand, Packing},
};
use crate::{
    Result,
    device::{
        cpu::{CpuBuffer, for_rows, for_tasks},
        scratch::aligned,
    },
    dtype::Float,
};

/// Number of rows and columns of C computed at a time: their operands and sums stay in the last-level cache.
const CHUNK: usize = 2048;

/// Number of bytes of one operand packed at a time, unless a block of depth [`KC`] has more.
const PACKED: usize = 4 << 20;

/// Number of columns of C per task; with its rows it determines the division of the work.
const TASK_COLUMNS: usize = 256;

/// Approximate number of rows of C per task: those of A times [`KC`] stay in the L2 cache.
const TASK_ROWS: usize = 112;

/// Maximum number of columns for which A is read in place if its layout allows it.
const DIRECT: usize = 1024;

/// Computes `out = beta + A·B`, rounded to the type of the output.
///
/// Errors: out of memory for the packed operands, or for the sums of half types.
pub(super) fn multiply<T: Float>(
    kernel: &dyn Packing<T>,
    k: usize,
    a: Matrix<T>,
    b: Matrix<T>,
    beta: Beta<T::Acc>,
    mut out: Window<T>,
) -> Result<()> {
    let (m, n) = (out.rows(), out.columns());
    for j in (0..n).step_by(CHUNK) {
        for i in (0..m).step_by(CHUNK) {
            let (rows, columns) = (CHUNK.min(m - i), CHUNK.min(n - j));
            let (a, b, beta) = (a.from(i, 0), b.from(0, j), beta.of_block(0, j));
            let chunk = Chunk::new(kernel, k, a, b, beta, rows, columns);
            let mut out = out.part(i, j, rows, columns);
            if let Some(out) = out.as_sums() {
                chunk.write_sums(&out)?;
                continue;
            }
            if chunk.blocks_at_a_time * KC >= k {
                chunk.write_rounded(&out)?;
                continue;
            }
            let mut buffer = CpuBuffer::new(rows * columns * size_of::<T::Acc>())?;
            let sums = bytemuck::cast_slice_mut::<u8, T::Acc>(buffer.bytes_mut());
            chunk.write_sums(&Window::new(sums, rows, columns, columns))?;
            let out = &out;
            for_rows(sums, columns, columns, |first, sums| {
                let rows = sums.len() / columns;
                // SAFETY: every task writes other rows.
                unsafe { out.shared_part(first, 0, rows, columns) }.round(sums);
            });
        }
    }
    Ok(())
}

/// Computes `sums = beta + A·B`
///
/// Errors: out of memory for the packed operands.
pub(super) fn multiply_sums<T: Float>(
    kernel: &dyn Packing<T>,
    k: usize,
    a: Matrix<T>,
    b: Matrix<T>,
    beta: Beta<T::Acc>,
    mut sums: Window<T::Acc>,
) -> Result<()> {
    let (m, n) = (sums.rows(), sums.columns());
    for j in (0..n).step_by(CHUNK) {
        for i in (0..m).step_by(CHUNK) {
            let (rows, columns) = (CHUNK.min(m - i), CHUNK.min(n - j));
            let chunk = Chunk::new(kernel, k, a.from(i, 0), b.from(0, j), beta.of_block(0, j), rows, columns);
            chunk.write_sums(&sums.part(i, j, rows, columns))?;
        }
    }
    Ok(())
}

/// Task: receives row, column, rows and columns of its part of C, and a function that adds the products of the part to
/// sums.
type Task<'a, R> = dyn Fn(usize, usize, usize, usize, &dyn Fn(Window<R>)) + Sync + 'a;

/// Part of C whose operands are packed together, some blocks of depth at a time.
struct Chunk<'a, T: Float> {
    kernel: &'a dyn Packing<T>,
    k: usize,
    a: Matrix<'a, T>,
    b: Matrix<'a, T>,
    beta: Beta<'a, T::Acc>,
    rows: usize,
    columns: usize,
    /// Number of rows of C per task.
    height: usize,
    /// Number of blocks of depth [`KC`] packed at a time.
    blocks_at_a_time: usize,
}

impl<'a, T: Float> Chunk<'a, T> {
    fn new(
        kernel: &'a dyn Packing<T>,
        k: usize,
        a: Matrix<'a, T>,
        b: Matrix<'a, T>,
        beta: Beta<'a, T::Acc>,
        rows: usize,
        columns: usize,
    ) -> Self {
        let blocks_at_a_time = (PACKED / (kernel.packed_size() * KC * rows.max(columns))).max(1);
        let height = (TASK_ROWS / kernel.tile().mr).max(1) * kernel.tile().mr;
        Self { kernel, k, a, b, beta, rows, columns, height, blocks_at_a_time }
    }

    /// Computes `c = beta + A·B`.
    fn write_sums(&self, c: &Window<T::Acc>) -> Result<()> {
        self.run(&|i, j, rows, columns, add| {
            // SAFETY: every task has another part of C.
            add(unsafe { c.shared_part(i, j, rows, columns) });
        })
    }

    /// Computes `out = beta + A·B` rounded, if the whole depth is packed at a time: the sums of a task never leave the
    /// cache.
    fn write_rounded(&self, out: &Window<T>) -> Result<()> {
        self.run(&|i, j, rows, columns, add| {
            Scratch::with(|scratch| {
                let sums = aligned(&mut scratch.sums, rows * columns);
                add(Window::new(sums, rows, columns, columns));
                // SAFETY: every task has another part of C.
                unsafe { out.shared_part(i, j, rows, columns) }.round(sums);
            });
        })
    }

    /// Divides the work into tasks.
    fn run(&self, task: &Task<T::Acc>) -> Result<()> {
        let &Self { kernel, k, a, b, rows: m, columns: n, height, .. } = self;
        let (down, across) = (m.div_ceil(height), n.div_ceil(TASK_COLUMNS));
        let blocks = k.div_ceil(KC).min(self.blocks_at_a_time);
        // Contiguous rows of A are read in place if packing them would serve few columns.
        let in_place = n <= DIRECT && a.col == 1 && kernel.reads_a(a, KC.min(k), n) && {
            let last = k % KC;
            last == 0 || kernel.reads_a(a, last, n)
        };
        let (area_a, area_b) = (height * KC * kernel.packed_size(), TASK_COLUMNS * KC * kernel.packed_size());
        let areas_of_a = if in_place { 0 } else { blocks * down };
        let mut packed_a = CpuBuffer::new(areas_of_a * area_a)?;
        let mut packed_b = CpuBuffer::new(blocks * across * area_b)?;
        for first in (0..k).step_by(self.blocks_at_a_time * KC) {
            let depth = |block: usize| KC.min(k.saturating_sub(first + block * KC));
            let in_range = AtomicBool::new(true);
            // The panels of one task and one block of depth are stored together, in an area of fixed size.
            let pack_a = |area: usize, to: &mut [u8]| {
                let (block, i) = (area / down, area % down * height);
                if !kernel.pack_a(a.from(i, first + block * KC), height.min(m - i), depth(block), to) {
                    in_range.store(false, Ordering::Relaxed);
                }
            };
            let pack_b = |area: usize, to: &mut [u8]| {
                let (block, j) = (area / across, area % across * TASK_COLUMNS);
                if !kernel.pack_b(b.from(first + block * KC, j), TASK_COLUMNS.min(n - j), depth(block), to) {
                    in_range.store(false, Ordering::Relaxed);
                }
            };
            for_areas(packed_a.bytes_mut(), area_a, &pack_a);
            for_areas(packed_b.bytes_mut(), area_b, &pack_b);
            let (packed_a, packed_b, in_range) = (packed_a.bytes(), packed_b.bytes(), in_range.into_inner());
            for_tasks(down * across, |index| {
                // Neighbouring tasks have the same columns: a thread's next task finds its part of B in the cache.
                let (i, j) = (index % down, index / down);
                let (rows, columns) = (height.min(m - i * height), TASK_COLUMNS.min(n - j * TASK_COLUMNS));
                task(i * height, j * TASK_COLUMNS, rows, columns, &|mut c| {
                    for block in 0..blocks {
                        let (p, kc) = (first + block * KC, depth(block));
                        if kc == 0 {
                            break;
                        }
                        let beta = self.beta.of_block(p, j * TASK_COLUMNS);
                        if !in_range {
                            let (a, b) = (a.from(i * height, p), b.from(p, j * TASK_COLUMNS));
                            out_of_range(kc, a, b, beta, c.part(0, 0, rows, columns));
                            continue;
                        }
                        let left = if in_place {
                            Operand::InPlace(a.from(i * height, p))
                        } else {
                            Operand::Packed(&packed_a[(block * down + i) * area_a..][..area_a])
                        };
                        let right = Operand::Packed(&packed_b[(block * across + j) * area_b..][..area_b]);
                        kernel.multiply(kc, left, right, beta, c.part(0, 0, rows, columns));
                    }
                });
            });
        }
        Ok(())
    }
}

/// Fills areas of `size` bytes one by one, on all threads.
fn for_areas(packed: &mut [u8], size: usize, pack: &(dyn Fn(usize, &mut [u8]) + Sync)) {
    // An element may come from another row than its neighbours, and so from another cache line.
    for_rows(packed, size, 2 * size, |first, areas| {
        areas.chunks_exact_mut(size).enumerate().for_each(|(index, area)| pack(first + index, area));
    });
}
