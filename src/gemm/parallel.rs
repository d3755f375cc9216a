//! One large product on all threads: the operands are packed once, block by block, and every thread reads them. The depth
//! is at least 1.

use std::sync::atomic::{AtomicBool, Ordering};

use super::{
    blocked::{Scratch, out_of_range},
    matrix::{Beta, KC, Matrix, Tile, Window},
    pack::{Operand, Packing},
};
use crate::{
    Result,
    device::{
        cpu::{CpuBuffer, for_rows, for_tasks},
        scratch::aligned,
    },
    dtype::{Float, Real},
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
            let operands = Typed { kernel, a: a.from(i, 0), b: b.from(0, j) };
            let chunk = Chunk::new(&operands, k, beta.of_block(0, j), rows, columns);
            let mut out = out.part(i, j, rows, columns);
            if let Some(out) = out.as_sums() {
                chunk.write_sums(&out)?;
                continue;
            }
            if chunk.blocks_at_a_time * KC >= k {
                write_rounded(&chunk, &out)?;
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
            let operands = Typed { kernel, a: a.from(i, 0), b: b.from(0, j) };
            let chunk = Chunk::new(&operands, k, beta.of_block(0, j), rows, columns);
            chunk.write_sums(&sums.part(i, j, rows, columns))?;
        }
    }
    Ok(())
}

/// Task: receives row, column, rows and columns of its part of C, and a function that adds the products of the part to
/// sums.
type Task<'a, R> = dyn Fn(usize, usize, usize, usize, &dyn Fn(Window<R>)) + Sync + 'a;

/// Operands of a product with the kernel for their type: the loops over them are compiled for the types of sums alone.
trait Operands<R>: Sync {
    fn tile(&self) -> Tile;

    fn packed_size(&self) -> usize;

    /// Returns `true` if A is read in place where `n` columns are computed.
    fn reads_a(&self, k: usize, n: usize) -> bool;

    /// Packs rows of A from row `i` and column `p` on, like [`Packing::pack_a`].
    fn pack_a(&self, i: usize, p: usize, rows: usize, kc: usize, to: &mut [u8]) -> bool;

    /// Packs columns of B from row `p` and column `j` on, like [`Packing::pack_b`].
    fn pack_b(&self, p: usize, j: usize, columns: usize, kc: usize, to: &mut [u8]) -> bool;

    /// Computes a block of C from row `i`, column `j` and depth `p` on, with panels of A, if it is not read in place, and
    /// of B; without panels of B, by multiply-adds for values that other instructions compute incorrectly.
    fn multiply(&self, at: [usize; 3], kc: usize, a: Option<&[u8]>, b: Option<&[u8]>, beta: Beta<R>, c: Window<R>);
}

struct Typed<'a, T: Float> {
    kernel: &'a dyn Packing<T>,
    a: Matrix<'a, T>,
    b: Matrix<'a, T>,
}

impl<T: Float> Operands<T::Acc> for Typed<'_, T> {
    fn tile(&self) -> Tile {
        self.kernel.tile()
    }

    fn packed_size(&self) -> usize {
        self.kernel.packed_size()
    }

    fn reads_a(&self, k: usize, n: usize) -> bool {
        let reads = |kc: usize| kc == 0 || self.kernel.reads_a(self.a, kc, n);
        self.a.col == 1 && reads(KC.min(k)) && reads(k % KC)
    }

    fn pack_a(&self, i: usize, p: usize, rows: usize, kc: usize, to: &mut [u8]) -> bool {
        self.kernel.pack_a(self.a.from(i, p), rows, kc, to)
    }

    fn pack_b(&self, p: usize, j: usize, columns: usize, kc: usize, to: &mut [u8]) -> bool {
        self.kernel.pack_b(self.b.from(p, j), columns, kc, to)
    }

    fn multiply(
        &self,
        [i, p, j]: [usize; 3],
        kc: usize,
        a: Option<&[u8]>,
        b: Option<&[u8]>,
        beta: Beta<T::Acc>,
        c: Window<T::Acc>,
    ) {
        match b {
            None => out_of_range(kc, self.a.from(i, p), self.b.from(p, j), beta, c),
            Some(b) => {
                let a = a.map_or_else(|| Operand::InPlace(self.a.from(i, p)), Operand::Packed);
                self.kernel.multiply(kc, a, Operand::Packed(b), beta, c);
            }
        }
    }
}

/// Part of C whose operands are packed together, some blocks of depth at a time.
struct Chunk<'a, R> {
    operands: &'a dyn Operands<R>,
    k: usize,
    beta: Beta<'a, R>,
    rows: usize,
    columns: usize,
    /// Number of rows of C per task.
    height: usize,
    /// Number of blocks of depth [`KC`] packed at a time.
    blocks_at_a_time: usize,
}

/// Computes `out = beta + A·B` rounded, if the whole depth is packed at a time: the sums of a task never leave the cache.
fn write_rounded<T: Float>(chunk: &Chunk<T::Acc>, out: &Window<T>) -> Result<()> {
    chunk.run(&|i, j, rows, columns, add| {
        Scratch::with(|scratch| {
            let sums = aligned(&mut scratch.sums, rows * columns);
            add(Window::new(sums, rows, columns, columns));
            // SAFETY: every task has another part of C.
            unsafe { out.shared_part(i, j, rows, columns) }.round(sums);
        });
    })
}

impl<'a, R: Real> Chunk<'a, R> {
    fn new(operands: &'a dyn Operands<R>, k: usize, beta: Beta<'a, R>, rows: usize, columns: usize) -> Self {
        let blocks_at_a_time = (PACKED / (operands.packed_size() * KC * rows.max(columns))).max(1);
        let mr = operands.tile().mr;
        Self { operands, k, beta, rows, columns, height: (TASK_ROWS / mr).max(1) * mr, blocks_at_a_time }
    }

    /// Computes `c = beta + A·B`.
    fn write_sums(&self, c: &Window<R>) -> Result<()> {
        self.run(&|i, j, rows, columns, add| {
            // SAFETY: every task has another part of C.
            add(unsafe { c.shared_part(i, j, rows, columns) });
        })
    }

    /// Divides the work into tasks.
    fn run(&self, task: &Task<R>) -> Result<()> {
        let &Self { operands, k, rows: m, columns: n, height, .. } = self;
        let (down, across) = (m.div_ceil(height), n.div_ceil(TASK_COLUMNS));
        let blocks = k.div_ceil(KC).min(self.blocks_at_a_time);
        // Contiguous rows of A are read in place if packing them would serve few columns.
        let in_place = n <= DIRECT && operands.reads_a(k, n);
        let [area_a, area_b] = [height, TASK_COLUMNS].map(|count| count * KC * operands.packed_size());
        let areas_of_a = if in_place { 0 } else { blocks * down };
        let mut packed_a = CpuBuffer::new(areas_of_a * area_a)?;
        let mut packed_b = CpuBuffer::new(blocks * across * area_b)?;
        for first in (0..k).step_by(self.blocks_at_a_time * KC) {
            let depth = |block: usize| KC.min(k.saturating_sub(first + block * KC));
            let in_range = AtomicBool::new(true);
            // The panels of one task and one block of depth are stored together, in an area of fixed size.
            let pack_a = |area: usize, to: &mut [u8]| {
                let (block, i) = (area / down, area % down * height);
                if !operands.pack_a(i, first + block * KC, height.min(m - i), depth(block), to) {
                    in_range.store(false, Ordering::Relaxed);
                }
            };
            let pack_b = |area: usize, to: &mut [u8]| {
                let (block, j) = (area / across, area % across * TASK_COLUMNS);
                if !operands.pack_b(first + block * KC, j, TASK_COLUMNS.min(n - j), depth(block), to) {
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
                        let left = (!in_place).then(|| &packed_a[(block * down + i) * area_a..][..area_a]);
                        let right = in_range.then(|| &packed_b[(block * across + j) * area_b..][..area_b]);
                        let at = [i * height, p, j * TASK_COLUMNS];
                        operands.multiply(at, kc, left, right, beta, c.part(0, 0, rows, columns));
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
