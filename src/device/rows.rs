//! Rows of float tensors in the type that they are computed in: f32 and f64 where they lie, half types through f32 rows
//! that stay in the cache. An op's loops are compiled for f32 and f64 alone.

use std::{marker::PhantomData, ops::Range};

use super::{
    cpu::rows_per_task,
    floats::{Floats, FloatsMut, convert, each},
    scratch::{User, aligned, lend},
    tasks::run,
};
use crate::dtype::{DType, Real};

/// An input of [`for_rows_of`]: rows of `width` elements.
#[derive(Clone, Copy)]
pub(crate) struct In<'a> {
    values: Floats<'a>,
    width: usize,
}

impl<'a> In<'a> {
    pub fn new(values: Floats<'a>, width: usize) -> Self {
        Self { values, width }
    }
}

/// An output of [`for_rows_of`]: rows of `width` elements, none if it is not wanted.
pub(crate) struct Out<'a> {
    start: *mut u8,
    dtype: DType,
    len: usize,
    width: usize,
    before: Before<'a>,
    values: PhantomData<&'a mut [u8]>,
}

/// Content of the rows of an output before they are computed.
#[derive(Clone, Copy)]
enum Before<'a> {
    Anything,
    Own,
    From(Floats<'a>),
}

// SAFETY: tasks reach disjoint parts only, as `part` demands.
unsafe impl Sync for Out<'_> {}

impl<'a> Out<'a> {
    /// Rows that are written without being read.
    pub fn new(values: FloatsMut<'a>, width: usize) -> Self {
        let (dtype, len) = (values.dtype(), values.len());
        let start = each!(FloatsMut, values, x, x.as_mut_ptr().cast());
        Self { start, dtype, len, width, before: Before::Anything, values: PhantomData }
    }

    /// Rows that hold the values of `source`, or their own.
    pub fn over(values: FloatsMut<'a>, width: usize, source: Option<Floats<'a>>) -> Self {
        Self { before: source.map_or(Before::Own, Before::From), ..Self::new(values, width) }
    }

    /// Rows that are computed from those of `source`, returned as an input, or from their own if that input is empty.
    pub fn from_or_over(values: FloatsMut<'a>, width: usize, source: Option<Floats<'a>>) -> (Self, In<'a>) {
        match source {
            // Half types are converted in any case: to where they are overwritten.
            Some(source) if values.dtype().size() > 2 => (Self::new(values, width), In::new(source, width)),
            source => (Self::over(values, width, source), In::new(Floats::F32(&[]), 0)),
        }
    }

    /// # Safety
    ///
    /// The range is within the output, and no two calls whose results are in use at once overlap.
    unsafe fn part(&self, range: Range<usize>) -> FloatsMut<'a> {
        let len = range.len();
        // SAFETY: within the slice, of that type, that `new` was given, and exclusive by this function's contract.
        unsafe {
            match self.dtype {
                DType::F64 => FloatsMut::F64(slice(self.start, range.start, len)),
                DType::BF16 => FloatsMut::BF16(slice(self.start, range.start, len)),
                DType::F16 => FloatsMut::F16(slice(self.start, range.start, len)),
                _ => FloatsMut::F32(slice(self.start, range.start, len)),
            }
        }
    }
}

/// # Safety
///
/// As for [`std::slice::from_raw_parts_mut`], from element `first` on.
unsafe fn slice<'a, T>(start: *mut u8, first: usize, len: usize) -> &'a mut [T] {
    // SAFETY: by this function's contract.
    unsafe { std::slice::from_raw_parts_mut(start.cast::<T>().add(first), len) }
}

/// Rounds every value to the other type, once, in parallel. Both have one length.
pub(crate) fn convert_floats(from: Floats, to: FloatsMut) {
    let out = Out::new(to, 1);
    let per_task = rows_per_task(out.len, 1);
    run(out.len.div_ceil(per_task), &|task| {
        let range = task * per_task..out.len.min((task + 1) * per_task);
        // SAFETY: within the output, and every task is run once.
        let to = unsafe { out.part(range.clone()) };
        each!(FloatsMut, to, to, each!(Floats, from.range(range), from, convert(from, to)));
    });
}

/// Partial sums over rows: `width` elements for each block of `block` rows, or none if they are not wanted. They have
/// the same bits for any number of threads if the blocks depend only on the sizes.
pub(crate) struct Sums<'a, R> {
    start: *mut R,
    len: usize,
    width: usize,
    block: usize,
    values: PhantomData<&'a mut [R]>,
}

// SAFETY: tasks reach disjoint blocks only, as `row` demands.
unsafe impl<R: Send> Sync for Sums<'_, R> {}

impl<'a, R> Sums<'a, R> {
    pub fn new(values: &'a mut [R], width: usize, block: usize) -> Self {
        Self { start: values.as_mut_ptr(), len: values.len(), width, block, values: PhantomData }
    }

    pub fn none() -> Self {
        Self::new(&mut [], 0, 1)
    }

    /// # Safety
    ///
    /// No two results for one block are in use at once.
    unsafe fn row(&self, block: usize) -> &'a mut [R] {
        if self.len == 0 {
            return &mut [];
        }
        assert!((block + 1) * self.width <= self.len, "sums for each block");
        // SAFETY: within the slice that `new` was given, and exclusive by this function's contract.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(block * self.width), self.width) }
    }
}

/// Elements of all operands that are converted at a time: the widened rows stay in the first-level cache.
const PIECE: usize = 4 * 1024;

/// Maximum number of inputs, and of outputs.
const OPERANDS: usize = 5;

/// Function of a first row, outputs, inputs and sums. A table of one method, while that of `dyn Fn` compiles each closure
/// twice.
trait Body<R>: Sync {
    fn call(&self, first: usize, outs: &mut [&mut [R]], ins: &[&[R]], sums: &mut [R]);
}

impl<R, F: Fn(usize, &mut [&mut [R]], &[&[R]], &mut [R]) + Sync> Body<R> for F {
    fn call(&self, first: usize, outs: &mut [&mut [R]], ins: &[&[R]], sums: &mut [R]) {
        self(first, outs, ins, sums);
    }
}

/// Calls `body(first_row, outputs, inputs, sums)` for parts of some rows each, in parallel.
///
/// `cost` is the number of element operations of one row. Rows are independent of each other but for `sums`, which are
/// zero at the first row of a block. The cut depends on the sizes alone.
#[allow(clippy::type_complexity)]
pub(crate) fn for_rows_of<R: Real, const O: usize, const I: usize>(
    outs: [Out<'_>; O],
    ins: [In<'_>; I],
    sums: Sums<'_, R>,
    cost: usize,
    body: &(impl Fn(usize, [&mut [R]; O], [&[R]; I], &mut [R]) + Sync),
) {
    const { assert!(O <= OPERANDS && I <= OPERANDS) };
    rows_of(&outs, &ins, sums, cost, &|first: usize, outs: &mut [&mut [R]], ins: &[&[R]], sums: &mut [R]| {
        let (mut outs, mut ins) = (outs.iter_mut(), ins.iter());
        let outs = std::array::from_fn(|_| outs.next().map(std::mem::take).unwrap_or_default());
        body(first, outs, std::array::from_fn(|_| ins.next().copied().unwrap_or_default()), sums);
    });
}

/// Once for each type of numbers, whatever the number of operands.
fn rows_of<R: Real>(outs: &[Out], ins: &[In], sums: Sums<R>, cost: usize, body: &dyn Body<R>) {
    let Some(first) = outs.first().filter(|out| out.width > 0) else { return };
    let rows = first.len.div_ceil(first.width);
    let block = if sums.len > 0 { sums.block } else { 1 };
    // Whole blocks to a task.
    let per_task = block * rows_per_task(rows.div_ceil(block), block.saturating_mul(cost));
    let work = Work { outs, ins, body };
    run(rows.div_ceil(per_task), &|task| {
        let rows = task * per_task..rows.min((task + 1) * per_task);
        if sums.len == 0 {
            return work.rows(rows, &mut []);
        }
        for first in rows.clone().step_by(block) {
            // SAFETY: every task is run once, and its blocks are its own.
            let sums = unsafe { sums.row(first / block) };
            sums.fill(R::ZERO);
            work.rows(first..rows.end.min(first + block), sums);
        }
    });
}

struct Work<'a, R> {
    outs: &'a [Out<'a>],
    ins: &'a [In<'a>],
    body: &'a dyn Body<R>,
}

impl<R: Real> Work<'_, R> {
    /// Rows that no other task has.
    fn rows(&self, rows: Range<usize>, sums: &mut [R]) {
        let direct = |dtype: DType| dtype == R::DTYPE;
        let converted = self.outs.iter().filter(|out| !direct(out.dtype)).map(|out| out.width).sum::<usize>()
            + self.ins.iter().filter(|x| x.values.direct::<R>().is_none()).map(|x| x.width).sum::<usize>();
        let copied = self.outs.iter().any(|out| matches!(out.before, Before::From(_)));
        if converted == 0 && !copied {
            return self.piece(rows, sums, &mut []);
        }
        let widest = self.outs.iter().map(|out| out.width).chain(self.ins.iter().map(|x| x.width)).sum::<usize>();
        let piece = (PIECE / widest.max(1)).clamp(1, rows.len().max(1));
        lend(User::Rows, |areas| {
            let memory = aligned::<R>(&mut areas[0], piece * converted);
            for first in rows.clone().step_by(piece) {
                self.piece(first..rows.end.min(first + piece), sums, memory);
            }
        });
    }

    /// Rows whose operands of other types fit into `memory`, those of outputs first.
    fn piece(&self, rows: Range<usize>, sums: &mut [R], memory: &mut [R]) {
        // The last row may be cut short.
        let range = |width: usize, len: usize| len.min(rows.start * width)..len.min(rows.end * width);
        let place = |out: &Out| range(out.width, out.len);
        let converted = |out: &Out| if out.dtype == R::DTYPE { 0 } else { place(out).len() };
        let (results, mut rest) = memory.split_at_mut(self.outs.iter().map(converted).sum());
        let mut ins: [&[R]; OPERANDS] = Default::default();
        for (x, to) in self.ins.iter().zip(&mut ins) {
            let values = x.values.range(range(x.width, x.values.len()));
            *to = match values.direct() {
                Some(values) => values,
                None => {
                    let to = take(&mut rest, values.len());
                    values.read(to);
                    to
                }
            };
        }
        let mut rest = &mut *results;
        let mut outs: [&mut [R]; OPERANDS] = Default::default();
        for (out, given) in self.outs.iter().zip(&mut outs) {
            let range = place(out);
            *given = if out.dtype == R::DTYPE {
                // SAFETY: `place` is within the output, and the rows are this task's own.
                unsafe { slice(out.start, range.start, range.len()) }
            } else {
                let to = take(&mut rest, range.len());
                if let Before::Own = out.before {
                    // SAFETY: as above.
                    unsafe { out.part(range.clone()) }.values().read(to);
                }
                to
            };
            if let Before::From(source) = out.before {
                source.range(range).read(given);
            }
        }
        self.body.call(rows.start, &mut outs[..self.outs.len()], &ins[..self.ins.len()], sums);
        let mut rest = &*results;
        for out in self.outs.iter().filter(|out| out.dtype != R::DTYPE) {
            let (from, others) = rest.split_at(converted(out));
            // SAFETY: as above.
            unsafe { out.part(place(out)) }.write(from);
            rest = others;
        }
    }
}

/// Cuts the first elements off a slice.
fn take<'a, R>(rest: &mut &'a mut [R], len: usize) -> &'a mut [R] {
    let (taken, others) = std::mem::take(rest).split_at_mut(len);
    *rest = others;
    taken
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::*;
    use crate::dtype::Float;

    fn stored<T: Float>(values: &[T]) -> Floats<'_> {
        match T::DTYPE {
            DType::F64 => Floats::F64(bytemuck::cast_slice(values)),
            DType::BF16 => Floats::BF16(bytemuck::cast_slice(values)),
            DType::F16 => Floats::F16(bytemuck::cast_slice(values)),
            _ => Floats::F32(bytemuck::cast_slice(values)),
        }
    }

    fn stored_mut<T: Float>(values: &mut [T]) -> FloatsMut<'_> {
        match T::DTYPE {
            DType::F64 => FloatsMut::F64(bytemuck::cast_slice_mut(values)),
            DType::BF16 => FloatsMut::BF16(bytemuck::cast_slice_mut(values)),
            DType::F16 => FloatsMut::F16(bytemuck::cast_slice_mut(values)),
            _ => FloatsMut::F32(bytemuck::cast_slice_mut(values)),
        }
    }

    /// Doubles rows, with sums over blocks: in the types that are computed in and in a half type, in place and from
    /// another tensor, with a last row that is cut short.
    fn doubled<R: Real, T: Float>(rows: usize, width: usize, block: usize, other: bool) {
        let number = |index: usize| T::from_f64((index % 13) as f64);
        let from: Vec<T> = (0..rows * width).map(number).collect();
        let start = if other { vec![T::from_f64(99.0); from.len()] } else { from.clone() };
        let summands: Vec<T> = (0..rows).map(number).collect();
        let mut out = start;
        let mut sums = vec![R::from_f64(f64::NAN); rows.div_ceil(block)];
        let outs = [Out::over(stored_mut(&mut out), width, other.then(|| stored(&from)))];
        let ins = [In::new(stored(&summands), 1)];
        let sums_of_blocks = Sums::new(&mut sums, 1, block);
        for_rows_of::<R, 1, 1>(outs, ins, sums_of_blocks, 40_000, &|first, [out], [summands], sums| {
            for (index, (out, summand)) in out.chunks_exact_mut(width).zip(summands).enumerate() {
                assert_eq!(summand.to_f64(), ((first + index) % 13) as f64);
                out.iter_mut().for_each(|x| *x = *x + *x + *summand);
                sums[0] += *summand;
            }
        });
        for (index, (out, from)) in out.iter().zip(&from).enumerate() {
            let expected = 2.0 * from.to_acc().to_f64() + (index / width % 13) as f64;
            assert_eq!(out.to_acc().to_f64(), expected, "{rows} × {width}, element {index}");
        }
        for (sums, summands) in sums.iter().zip(summands.chunks(block)) {
            assert_eq!(sums.to_f64(), summands.iter().map(|x| x.to_acc().to_f64()).sum::<f64>());
        }
    }

    #[test]
    fn rows_of_every_type() {
        let sizes: &[(usize, usize)] =
            if cfg!(miri) { &[(70, 3)] } else { &[(1, 1), (3, 5), (70, 3), (200, 64), (3, 7000)] };
        for &(rows, width) in sizes {
            for block in [1, 4] {
                for other in [false, true] {
                    doubled::<f32, f32>(rows, width, block, other);
                    doubled::<f64, f64>(rows, width, block, other);
                    doubled::<f32, bf16>(rows, width, block, other);
                    doubled::<f32, f16>(rows, width, block, other);
                }
            }
        }
    }

    /// A last row that is cut short, an input that is left out, and outputs without elements.
    #[test]
    fn rows_that_are_cut_short() {
        let mut out = [bf16::ZERO; 10];
        let outs = [Out::new(FloatsMut::BF16(&mut out), 4), Out::new(FloatsMut::F32(&mut []), 0)];
        let ins = [In::new(Floats::F32(&[]), 0)];
        for_rows_of::<f32, 2, 1>(outs, ins, Sums::none(), 1, &|first, [out, none], [nothing], sums| {
            assert!(none.is_empty() && nothing.is_empty() && sums.is_empty());
            out.iter_mut().enumerate().for_each(|(index, x)| *x = (4 * first + index) as f32);
        });
        assert_eq!(out.map(f32::from), std::array::from_fn(|index| index as f32));
    }
}
