//! One large product on all threads: the operands are packed once, block by block, and every thread reads them. There is
//! at least one step.

use std::{
    marker::PhantomData,
    sync::atomic::{AtomicBool, Ordering},
};

use super::{
    cpu::{Matrix, STEPS, out_of_range, round, sums_of_task},
    microkernel::{Start, Window},
    packing::Packing,
};
use crate::{
    Result,
    device::cpu::{CpuBuffer, for_rows, for_tasks},
    dtype::Float,
};

/// Rows and columns of C that are computed before the next: their operands and sums stay in the last-level cache.
const CHUNK: usize = 2048;

/// Bytes of one operand that are packed at a time, if a block of [`STEPS`] has not more.
const PACKED: usize = 4 << 20;

/// Columns of C in a task; with its rows it fixes how the work is cut.
const TASK_COLUMNS: usize = 256;

/// Rows of C in a task, about: those of A times [`STEPS`] stay in the second-level cache.
const TASK_ROWS: usize = 112;

/// Columns up to which A is read in place if its layout allows it.
const DIRECT: usize = 1024;

/// `out = start + A·B`, rounded to the type of the output.
///
/// Errors: out of memory for the packed operands, or for the sums of half types.
pub(super) fn product<T: Float, P: Packing<T>>(
    k: usize,
    a: Matrix<T>,
    b: Matrix<T>,
    start: Start<T::Acc>,
    mut out: Window<T>,
) -> Result<()> {
    let (m, n) = (out.rows(), out.columns());
    for j in (0..n).step_by(CHUNK) {
        for i in (0..m).step_by(CHUNK) {
            let (rows, columns) = (CHUNK.min(m - i), CHUNK.min(n - j));
            let (a, b, start) = (a.from(i, 0), b.from(0, j), start.of_block(0, j));
            let chunk = Chunk::<T, P>::new(k, a, b, start, rows, columns);
            let mut out = out.part(i, j, rows, columns);
            if let Some(out) = out.as_sums() {
                chunk.write_sums(&out)?;
                continue;
            }
            if chunk.blocks_at_a_time * STEPS >= k {
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
                let mut out = unsafe { out.shared_part(first, 0, rows, columns) };
                for (row, sums) in sums.chunks_exact(columns).enumerate() {
                    round::<T>(sums, out.row_mut(row));
                }
            });
        }
    }
    Ok(())
}

/// `sums = start + A·B`
///
/// Errors: out of memory for the packed operands.
pub(super) fn product_sums<T: Float, P: Packing<T>>(
    k: usize,
    a: Matrix<T>,
    b: Matrix<T>,
    start: Start<T::Acc>,
    mut sums: Window<T::Acc>,
) -> Result<()> {
    let (m, n) = (sums.rows(), sums.columns());
    for j in (0..n).step_by(CHUNK) {
        for i in (0..m).step_by(CHUNK) {
            let (rows, columns) = (CHUNK.min(m - i), CHUNK.min(n - j));
            let chunk = Chunk::<T, P>::new(k, a.from(i, 0), b.from(0, j), start.of_block(0, j), rows, columns);
            chunk.write_sums(&sums.part(i, j, rows, columns))?;
        }
    }
    Ok(())
}

/// A part of C whose operands are packed together, some blocks of steps at a time.
struct Chunk<'a, T: Float, P: Packing<T>> {
    k: usize,
    a: Matrix<'a, T>,
    b: Matrix<'a, T>,
    start: Start<'a, T::Acc>,
    rows: usize,
    columns: usize,
    /// Rows of C in a task.
    height: usize,
    /// Blocks of [`STEPS`] that are packed at a time.
    blocks_at_a_time: usize,
    packing: PhantomData<P>,
}

impl<'a, T: Float, P: Packing<T>> Chunk<'a, T, P> {
    fn new(
        k: usize,
        a: Matrix<'a, T>,
        b: Matrix<'a, T>,
        start: Start<'a, T::Acc>,
        rows: usize,
        columns: usize,
    ) -> Self {
        let blocks_at_a_time = (PACKED / (size_of::<P::Packed>() * STEPS * rows.max(columns))).max(1);
        let height = (TASK_ROWS / P::tile().rows).max(1) * P::tile().rows;
        Self { k, a, b, start, rows, columns, height, blocks_at_a_time, packing: PhantomData }
    }

    /// `c = start + A·B`
    fn write_sums(&self, c: &Window<T::Acc>) -> Result<()> {
        self.run(|i, j, rows, columns, add| {
            // SAFETY: every task has another part of C.
            add(unsafe { c.shared_part(i, j, rows, columns) });
        })
    }

    /// `out = start + A·B` rounded, if all steps are packed at a time: the sums of a task never leave the cache.
    fn write_rounded(&self, out: &Window<T>) -> Result<()> {
        self.run(|i, j, rows, columns, add| {
            sums_of_task(rows * columns, |sums| {
                add(Window::new(sums, rows, columns, columns));
                // SAFETY: every task has another part of C.
                let mut out = unsafe { out.shared_part(i, j, rows, columns) };
                for (row, sums) in sums.chunks_exact(columns).enumerate() {
                    round::<T>(sums, out.row_mut(row));
                }
            });
        })
    }

    /// Cuts the work into tasks. Each gets the place and size of its part, and what adds the part's products to sums.
    fn run(&self, task: impl Fn(usize, usize, usize, usize, &dyn Fn(Window<T::Acc>)) + Sync) -> Result<()> {
        let &Self { k, a, b, rows: m, columns: n, height, .. } = self;
        let (down, across) = (m.div_ceil(height), n.div_ceil(TASK_COLUMNS));
        let blocks = k.div_ceil(STEPS).min(self.blocks_at_a_time);
        // Rows of A whose steps lie next to each other are read in place if packing them would serve few columns.
        let in_place = n <= DIRECT && a.col == 1 && P::left_in_place(a, STEPS.min(k), n).is_some() && {
            let last = k % STEPS;
            last == 0 || P::left_in_place(a, last, n).is_some()
        };
        let areas_of_a = if in_place { 0 } else { blocks * down };
        let mut packed_a = CpuBuffer::new(areas_of_a * height * STEPS * size_of::<P::Packed>())?;
        let mut packed_b = CpuBuffer::new(blocks * across * TASK_COLUMNS * STEPS * size_of::<P::Packed>())?;
        let packed_a = bytemuck::cast_slice_mut::<u8, P::Packed>(packed_a.bytes_mut());
        let packed_b = bytemuck::cast_slice_mut::<u8, P::Packed>(packed_b.bytes_mut());
        for first in (0..k).step_by(self.blocks_at_a_time * STEPS) {
            let steps = |block: usize| STEPS.min(k.saturating_sub(first + block * STEPS));
            let in_range = AtomicBool::new(true);
            // The panels of one task and one block of steps lie together, in an area of fixed size.
            let pack_a = |area: usize, to: &mut [P::Packed]| {
                let (block, i) = (area / down, area % down * height);
                if !P::pack_left(a.from(i, first + block * STEPS), height.min(m - i), steps(block), to) {
                    in_range.store(false, Ordering::Relaxed);
                }
            };
            let pack_b = |area: usize, to: &mut [P::Packed]| {
                let (block, j) = (area / across, area % across * TASK_COLUMNS);
                if !P::pack_right(b.from(first + block * STEPS, j), TASK_COLUMNS.min(n - j), steps(block), to) {
                    in_range.store(false, Ordering::Relaxed);
                }
            };
            for_areas(packed_a, height * STEPS, pack_a);
            for_areas(packed_b, TASK_COLUMNS * STEPS, pack_b);
            let (packed_a, packed_b, in_range) = (&*packed_a, &*packed_b, in_range.into_inner());
            for_tasks(down * across, |index| {
                // Neighbouring tasks have the same columns: what one thread does next finds its part of B in the cache.
                let (i, j) = (index % down, index / down);
                let (rows, columns) = (height.min(m - i * height), TASK_COLUMNS.min(n - j * TASK_COLUMNS));
                task(i * height, j * TASK_COLUMNS, rows, columns, &|mut c| {
                    for block in 0..blocks {
                        let (step, steps) = (first + block * STEPS, steps(block));
                        if steps == 0 {
                            break;
                        }
                        let start = self.start.of_block(step, j * TASK_COLUMNS);
                        if !in_range {
                            let (a, b) = (a.from(i * height, step), b.from(step, j * TASK_COLUMNS));
                            out_of_range(steps, a, b, start, c.part(0, 0, rows, columns));
                            continue;
                        }
                        let left = match P::left_in_place(a.from(i * height, step), steps, n).filter(|_| in_place) {
                            Some(left) => left,
                            None => P::packed_left(&packed_a[(block * down + i) * height * STEPS..], steps),
                        };
                        let right = P::packed_right(&packed_b[(block * across + j) * TASK_COLUMNS * STEPS..], steps);
                        P::multiply(steps, left, right, start, c.part(0, 0, rows, columns));
                    }
                });
            });
        }
        Ok(())
    }
}

/// Fills areas of `size` elements one by one, on all threads.
fn for_areas<R: Send>(packed: &mut [R], size: usize, pack: impl Fn(usize, &mut [R]) + Sync) {
    // An element may come from another row than its neighbours, and so from another cache line.
    for_rows(packed, size, 8 * size, |first, areas| {
        areas.chunks_exact_mut(size).enumerate().for_each(|(index, area)| pack(first + index, area));
    });
}
