//! Processor memory and how work is cut for the `rayon` pool.

use super::{
    cpu_heap,
    heap::{ALIGNMENT, Block},
    tasks::run,
};
use crate::{
    Result,
    shape::{Layout as TensorLayout, Shape, collapse},
};

/// Bytes in the processor's memory, 64-byte aligned, returned to the heap on drop.
pub(crate) struct CpuBuffer {
    block: Option<Block>,
    bytes: usize,
}

impl CpuBuffer {
    pub fn new(bytes: usize) -> Result<Self> {
        if bytes == 0 {
            return Ok(Self { block: None, bytes });
        }
        let mut buffer = Self { block: Some(cpu_heap().allocate(bytes)?), bytes };
        if cfg!(debug_assertions) {
            // All bits set is NaN in every float type: an element that an op forgets shows.
            buffer.bytes_mut().fill(0xFF);
        }
        Ok(buffer)
    }

    pub fn bytes(&self) -> &[u8] {
        match &self.block {
            // SAFETY: the block has at least `bytes` initialised bytes and lives as long as `self`.
            Some(block) => unsafe { std::slice::from_raw_parts(block.pointer.as_ptr(), self.bytes) },
            None => empty(),
        }
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        match &self.block {
            // SAFETY: as in `bytes`, and `&mut self` is exclusive.
            Some(block) => unsafe { std::slice::from_raw_parts_mut(block.pointer.as_ptr(), self.bytes) },
            None => empty(),
        }
    }
}

/// Returns the number of bytes that the system can give, where Linux tells it.
pub(super) fn available_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let field = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim_start_matches(':').trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()
    };
    Some((field("MemAvailable")? + field("SwapFree").unwrap_or(0)) * 1024)
}

/// An empty slice that is aligned for every element type, so that it can be cast.
fn empty() -> &'static mut [u8] {
    // SAFETY: a slice of length 0 needs only a non-null, aligned pointer.
    unsafe { std::slice::from_raw_parts_mut(std::ptr::without_provenance_mut(ALIGNMENT), 0) }
}

impl Drop for CpuBuffer {
    fn drop(&mut self) {
        if let Some(block) = self.block.take() {
            cpu_heap().give(block);
        }
    }
}

/// Element operations that a task should have at least, so that handing it to another thread pays.
pub(crate) const GRAIN: usize = 32 * 1024;

/// Runs `body(first_row, rows)` on parts of `out` that hold whole rows of `width` elements.
///
/// `cost` is the number of element operations of one row. Rows are independent, so that the cut, which depends on
/// the sizes alone, never changes a result.
#[inline(always)]
pub fn for_rows<T: Send>(out: &mut [T], width: usize, cost: usize, body: impl Fn(usize, &mut [T]) + Sync) {
    for_rows_dyn(out, width, cost, &body);
}

/// Body of [`for_rows`] behind a pointer: a table of one method, while that of `dyn Fn` compiles each closure twice.
trait OfRows<T>: Sync {
    fn call(&self, first: usize, rows: &mut [T]);
}

impl<T, F: Fn(usize, &mut [T]) + Sync> OfRows<T> for F {
    fn call(&self, first: usize, rows: &mut [T]) {
        self(first, rows);
    }
}

/// Once for each type of element, and not for each body.
#[inline(never)]
fn for_rows_dyn<T: Send>(out: &mut [T], width: usize, cost: usize, body: &dyn OfRows<T>) {
    if out.is_empty() || width == 0 {
        return;
    }
    let rows = rows_per_task(out.len() / width, cost);
    let parts = Parts::new(out, rows * width);
    run(parts.count(), &|task| {
        // SAFETY: every task is run once, and its part is its own.
        body.call(task * rows, unsafe { parts.get(task) });
    });
}

/// Like [`for_rows`], but with two outputs, whose rows have `widths` elements.
#[inline(always)]
pub(crate) fn for_rows2<A: Send, B: Send>(
    a: &mut [A],
    b: &mut [B],
    widths: (usize, usize),
    cost: usize,
    body: &(impl Fn(usize, &mut [A], &mut [B]) + Sync),
) {
    for_rows2_dyn(a, b, widths, cost, body);
}

/// See [`OfRows`].
trait OfRows2<A, B>: Sync {
    fn call(&self, first: usize, a: &mut [A], b: &mut [B]);
}

impl<A, B, F: Fn(usize, &mut [A], &mut [B]) + Sync> OfRows2<A, B> for F {
    fn call(&self, first: usize, a: &mut [A], b: &mut [B]) {
        self(first, a, b);
    }
}

#[inline(never)]
fn for_rows2_dyn<A: Send, B: Send>(
    a: &mut [A],
    b: &mut [B],
    widths: (usize, usize),
    cost: usize,
    body: &dyn OfRows2<A, B>,
) {
    if a.is_empty() || widths.0 == 0 || widths.1 == 0 {
        return;
    }
    let rows = rows_per_task(a.len() / widths.0, cost);
    let (a, b) = (Parts::new(a, rows * widths.0), Parts::new(b, rows * widths.1));
    run(a.count().min(b.count()), &|task| {
        // SAFETY: every task is run once, and its parts are its own.
        body.call(task * rows, unsafe { a.get(task) }, unsafe { b.get(task) });
    });
}

/// A slice cut into parts of equal length (the last may be shorter), each for one task.
struct Parts<'a, T> {
    start: *mut T,
    len: usize,
    part: usize,
    slice: std::marker::PhantomData<&'a mut [T]>,
}

// SAFETY: tasks reach disjoint parts only, as `get` demands.
unsafe impl<T: Send> Sync for Parts<'_, T> {}

impl<'a, T> Parts<'a, T> {
    fn new(slice: &'a mut [T], part: usize) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), part, slice: std::marker::PhantomData }
    }

    fn count(&self) -> usize {
        self.len.div_ceil(self.part)
    }

    /// # Safety
    ///
    /// `index` is below `count`, and no two calls with the same one overlap.
    #[allow(clippy::mut_from_ref)]
    unsafe fn get(&self, index: usize) -> &mut [T] {
        let start = index * self.part;
        // SAFETY: within the slice by the contract of `index`; exclusive because parts do not overlap.
        unsafe { self.range(start, self.part.min(self.len - start)) }
    }

    /// # Safety
    ///
    /// The range is within the slice, and no two that are in use at once overlap.
    #[allow(clippy::mut_from_ref)]
    unsafe fn range(&self, start: usize, len: usize) -> &mut [T] {
        // SAFETY: by this function's contract.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(start), len) }
    }
}

/// Rows that one task takes: enough work to pay for the hand-over, and few enough to balance.
pub(crate) fn rows_per_task(rows: usize, cost: usize) -> usize {
    let smallest = GRAIN.div_ceil(cost.max(1));
    // 64 tasks balance well on any machine; the number must not depend on the threads at hand.
    smallest.max(rows.div_ceil(64)).max(1)
}

/// Calls `body(task)` for every task in `0..tasks`, in parallel.
pub(crate) fn for_tasks(tasks: usize, body: impl Fn(usize) + Sync) {
    run(tasks, &body);
}

/// Walks a packed output together with strided inputs of the same shape.
///
/// `body(part, offsets, strides)` gets a run of the output, and for each input the position of its first element in
/// the input's storage and the step from one element of the run to the next (1 packed, 0 repeated).
#[inline(always)]
pub(crate) fn for_strided<T: Send, const N: usize>(
    out: &mut [T],
    shape: &Shape,
    inputs: [&TensorLayout; N],
    body: impl Fn(&mut [T], [usize; N], [usize; N]) + Sync,
) {
    let parts = Parts::new(out, 1);
    for_runs(parts.len, shape, inputs, &|start: usize, len: usize, offsets: [usize; N], steps: [usize; N]| {
        // SAFETY: runs are within the output and do not overlap.
        body(unsafe { parts.range(start, len) }, offsets, steps);
    });
}

/// Called with the start and the length of a run of the output, and the positions and steps of the inputs; see [`OfRows`].
trait OfRun<const N: usize>: Sync {
    fn call(&self, start: usize, len: usize, offsets: [usize; N], steps: [usize; N]);
}

impl<const N: usize, F: Fn(usize, usize, [usize; N], [usize; N]) + Sync> OfRun<N> for F {
    fn call(&self, start: usize, len: usize, offsets: [usize; N], steps: [usize; N]) {
        self(start, len, offsets, steps);
    }
}

/// Once for each number of inputs: calls `run` for each run of the output.
#[inline(never)]
fn for_runs<const N: usize>(len: usize, shape: &Shape, inputs: [&TensorLayout; N], run: &dyn OfRun<N>) {
    let (shape, strides) = collapse(shape, inputs.map(TensorLayout::strides));
    let inner = shape.last().copied().unwrap_or(1);
    let steps = strides.map(|strides| shape.rank().checked_sub(1).map_or(0, |last| strides[last]));
    let per_task = rows_per_task(len, 1);
    for_tasks(len.div_ceil(per_task), |task| {
        let mut at = task * per_task;
        let end = len.min(at + per_task);
        while at < end {
            let (mut row, column) = (at / inner, at % inner);
            let count = (inner - column).min(end - at);
            let mut offsets = inputs.map(|layout| layout.offset);
            for dim in (0..shape.rank().saturating_sub(1)).rev() {
                for n in 0..N {
                    offsets[n] += row % shape[dim] * strides[n][dim];
                }
                row /= shape[dim];
            }
            for n in 0..N {
                offsets[n] += column * steps[n];
            }
            run.call(at, count, offsets, steps);
            at += count;
        }
    });
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    /// In debug builds fresh and reused memory is NaN, which exposes elements that an op forgets to write.
    #[test]
    #[cfg(debug_assertions)]
    fn cpu_unwritten_memory_is_nan() -> Result<()> {
        for round in 0..3 {
            let mut buffer = CpuBuffer::new(1000)?;
            let nan = bytemuck::cast_slice::<u8, f32>(buffer.bytes()).iter().all(|x| x.is_nan())
                && bytemuck::cast_slice::<u8, f64>(buffer.bytes()).iter().all(|x| x.is_nan())
                && bytemuck::cast_slice::<u8, half::bf16>(buffer.bytes()).iter().all(|x| x.is_nan())
                && bytemuck::cast_slice::<u8, half::f16>(buffer.bytes()).iter().all(|x| x.is_nan());
            assert!(nan, "round {round}");
            buffer.bytes_mut().fill(1);
        }
        Ok(())
    }

    #[test]
    fn cpu_buffers_are_aligned() -> Result<()> {
        for bytes in [0, 1, 63, 64, 65, 1000, 1 << 20] {
            let mut buffer = CpuBuffer::new(bytes)?;
            assert_eq!((buffer.bytes().len(), buffer.bytes_mut().len()), (bytes, bytes));
            assert_eq!(buffer.bytes().as_ptr().align_offset(ALIGNMENT), 0);
        }
        Ok(())
    }

    /// Every row once, in its place, whatever the sizes and costs.
    #[test]
    fn cpu_rows_are_visited_once() {
        let (widths, counts): (&[usize], &[usize]) =
            if cfg!(miri) { (&[0, 3], &[0, 1, 65]) } else { (&[0, 1, 3, 64, 1000], &[0, 1, 2, 63, 64, 65, 257]) };
        for &width in widths {
            for &rows in counts {
                for cost in [0, 1, 1000, 100_000] {
                    let mut out = vec![0; rows * width];
                    for_rows(&mut out, width, cost, |first, part| {
                        for (index, row) in part.chunks_exact_mut(width).enumerate() {
                            row.iter_mut().for_each(|x| *x += first + index + 1);
                        }
                    });
                    assert!(out.iter().enumerate().all(|(at, &x)| x == at / width + 1));
                    let (mut a, mut b) = (vec![0; rows * width], vec![0; rows * 2]);
                    for_rows2(&mut a, &mut b, (width, 2), cost, &|first, a, b| {
                        for (index, (a, b)) in a.chunks_exact_mut(width).zip(b.chunks_exact_mut(2)).enumerate() {
                            a.iter_mut().for_each(|x| *x += first + index + 1);
                            b.fill(first + index + 1);
                        }
                    });
                    assert_eq!(a, out);
                    assert!(width == 0 || b.iter().enumerate().all(|(at, &x)| x == at / 2 + 1));
                }
            }
        }
        for tasks in [0, 1, 100] {
            let visits = AtomicUsize::new(0);
            for_tasks(tasks, |task| {
                visits.fetch_add(task + 1, Ordering::Relaxed);
            });
            assert_eq!(visits.into_inner(), tasks * (tasks + 1) / 2);
        }
    }

    /// Runs start where they should for every layout that a view can have.
    #[test]
    fn cpu_strided_walks() -> Result<()> {
        let base = TensorLayout::contiguous(Shape::new(&[3, 4, 5])?);
        let layouts = [
            base,
            base.permute(&[2, 0, 1]),
            base.narrow(1, 1, 2).permute(&[1, 2, 0]),
            base.narrow(0, 2, 1).expand(Shape::new(&[7, 4, 5])?),
            base.narrow(1, 3, 1).narrow(2, 4, 1).expand(Shape::new(&[3, 6, 2])?),
            base.narrow(2, 5, 0),
            TensorLayout::contiguous(Shape::new(&[])?),
            base.narrow(0, 1, 1).squeeze(0).unsqueeze(2),
        ];
        for layout in layouts {
            let mut seen = vec![usize::MAX; layout.shape.numel()];
            for_strided(&mut seen, &layout.shape, [&layout], |run, [start], [step]| {
                run.iter_mut().enumerate().for_each(|(index, to)| *to = start + index * step);
            });
            for (at, &seen) in seen.iter().enumerate() {
                let (mut rest, mut expected) = (at, layout.offset);
                for dim in (0..layout.shape.rank()).rev() {
                    expected += rest % layout.shape[dim] * layout.strides[dim];
                    rest /= layout.shape[dim];
                }
                assert_eq!(seen, expected, "element {at} of {layout:?}");
            }
        }
        Ok(())
    }
}
