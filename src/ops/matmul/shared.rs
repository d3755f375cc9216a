//! One large product on all threads: the operands are packed once, block by block, and every thread reads them.

use rayon::prelude::*;

use super::{
    cpu::{Matrix, STEPS, as_sums, round},
    microkernel::{Left, Order, Right, Start, Tile, Window, multiply, tile},
    pack::pack,
};
use crate::{
    Result,
    core::Float,
    device::cpu::{CpuBuffer, for_tasks},
};

/// Rows and columns of C that are computed before the next: their operands and sums stay in the last-level cache.
const CHUNK: usize = 2048;

/// Elements of one operand that are packed at a time, if a block of [`STEPS`] has not more.
const PACKED: usize = 1 << 20;

/// Columns of C in a task; with [`Tasks::rows`] it fixes how the work is cut.
const TASK_COLUMNS: usize = 256;

/// Panels of A in a task: their rows times [`STEPS`] stay in the second-level cache.
const TASK_PANELS: usize = 8;

/// Columns up to which A is read in place if its layout allows it.
const DIRECT: usize = 1024;

/// `out = start + A·B`, rounded to the type of the output.
///
/// Errors: out of memory for the packed operands, or for the sums of half types.
pub(super) fn product<T: Float>(
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
            let mut out = out.part(i, j, rows, columns);
            if let Some(out) = out.as_sums() {
                chunk(k, a, b, start, out)?;
                continue;
            }
            let mut buffer = CpuBuffer::new(rows * columns * size_of::<T::Acc>())?;
            let sums = bytemuck::cast_slice_mut::<u8, T::Acc>(buffer.bytes_mut());
            chunk(k, a, b, start, Window::new(sums, rows, columns, columns))?;
            let out = &out;
            sums.par_chunks_exact(columns).enumerate().for_each(|(row, sums)| {
                // SAFETY: every task writes another row.
                round::<T>(sums, unsafe { out.shared_part(row, 0, 1, columns) }.row_mut(0));
            });
        }
    }
    Ok(())
}

/// As [`product`] for a part of C whose operands are packed together, some blocks of steps at a time.
fn chunk<T: Float>(k: usize, a: Matrix<T>, b: Matrix<T>, start: Start<T::Acc>, c: Window<T::Acc>) -> Result<()> {
    let (m, n) = (c.rows(), c.columns());
    let Tile { rows, columns } = tile::<T::Acc>();
    let (height, width) = (TASK_PANELS * rows, TASK_COLUMNS);
    let (down, across) = (m.div_ceil(height), n.div_ceil(width));
    let at_a_time = (PACKED / (STEPS * m.max(n))).max(1);
    let blocks = k.div_ceil(STEPS).clamp(1, at_a_time);
    // Rows of A whose steps lie next to each other are read in place if packing them would serve few columns.
    let rows_of_a = as_sums(a.data).filter(|_| a.col == 1 && n <= DIRECT);
    let areas_of_a = if rows_of_a.is_some() { 0 } else { blocks * down };
    let mut packed_a = CpuBuffer::new(areas_of_a * height * STEPS * size_of::<T::Acc>())?;
    let mut packed_b = CpuBuffer::new(blocks * across * width * STEPS * size_of::<T::Acc>())?;
    let packed_a = bytemuck::cast_slice_mut::<u8, T::Acc>(packed_a.bytes_mut());
    let packed_b = bytemuck::cast_slice_mut::<u8, T::Acc>(packed_b.bytes_mut());
    for first in (0..k.max(1)).step_by(at_a_time * STEPS) {
        let steps = |block: usize| STEPS.min(k.saturating_sub(first + block * STEPS));
        // The panels of one task and one block of steps lie together, in an area of fixed size.
        let pack_a = |(area, to): (usize, &mut [T::Acc])| {
            let (block, i) = (area / down, area % down * height);
            pack(a.from(i, first + block * STEPS), height.min(m - i), steps(block), rows, to);
        };
        let pack_b = |(area, to): (usize, &mut [T::Acc])| {
            let (block, j) = (area / across, area % across * width);
            pack(b.from(first + block * STEPS, j).transposed(), width.min(n - j), steps(block), columns, to);
        };
        rayon::join(
            || packed_a.par_chunks_exact_mut(height * STEPS).enumerate().for_each(pack_a),
            || packed_b.par_chunks_exact_mut(width * STEPS).enumerate().for_each(pack_b),
        );
        let (packed_a, packed_b, c) = (&*packed_a, &*packed_b, &c);
        for_tasks(down * across, |task| {
            // Neighbouring tasks have the same columns: what one thread does next finds its part of B in the cache.
            let (i, j) = (task % down, task / down);
            let (part_rows, part_columns) = (height.min(m - i * height), width.min(n - j * width));
            for block in 0..blocks {
                let (step, steps) = (first + block * STEPS, steps(block));
                if step > 0 && steps == 0 {
                    break;
                }
                let left = match rows_of_a {
                    Some(data) => Left {
                        data: &data[i * height * a.row + step..],
                        panel: rows * a.row,
                        order: Order::Steps,
                        stride: a.row,
                    },
                    None => {
                        let data = &packed_a[(block * down + i) * height * STEPS..];
                        Left { data, panel: rows * steps, order: Order::Rows, stride: rows }
                    }
                };
                let right = Right {
                    data: &packed_b[(block * across + j) * width * STEPS..],
                    panel: columns * steps,
                    step: columns,
                };
                // SAFETY: every task has another part of C.
                let c = unsafe { c.shared_part(i * height, j * width, part_rows, part_columns) };
                multiply(steps, left, right, start.of_block(step, j * width), c);
            }
        });
    }
    Ok(())
}
