//! How rows of a tensor `[batch, heads, sequence, features]` lie in memory, and who may write which of them. This is
//! the part that is compiled for each type of tensor; the passes are compiled for the types of computation alone.

use super::{residual_scale, tile::Rows};
use crate::{
    Result, Tensor,
    device::{cpu, simd::vectorized},
    dtype::{Element, Float, Real},
    shape::Shape,
};

/// The order of the rows of a tensor in memory.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum RowOrder {
    /// `[batch, heads, sequence, features]`
    HeadsFirst,
    /// `[batch, sequence, heads, features]`
    SequenceFirst,
}

impl RowOrder {
    /// The order of an operand. With its gradient in the same order, the views that led to the operand lead back
    /// without a copy.
    pub fn of(x: &Tensor) -> Self {
        if x.strides()[1] < x.strides()[2] { Self::SequenceFirst } else { Self::HeadsFirst }
    }

    /// Memory for a gradient of `x`.
    pub fn uninit(self, x: &Tensor) -> Result<Tensor> {
        let [batch, heads, sequence, width] = [0, 1, 2, 3].map(|dim| x.shape()[dim]);
        let shape = match self {
            Self::HeadsFirst => [batch, heads, sequence, width],
            Self::SequenceFirst => [batch, sequence, heads, width],
        };
        Tensor::uninit(Shape::new(&shape)?, x.dtype(), x.device())
    }

    /// The memory as `[batch, heads, sequence, features]`.
    pub fn view(self, x: Tensor) -> Result<Tensor> {
        match self {
            Self::HeadsFirst => Ok(x),
            Self::SequenceFirst => x.permute(&[0, 2, 1, 3]),
        }
    }

    /// Head (counted over the batch) and position of row `row` in memory.
    pub fn place(self, row: usize, heads: usize, sequence: usize) -> (usize, usize) {
        match self {
            Self::HeadsFirst => (row / sequence, row % sequence),
            Self::SequenceFirst => (row / heads / sequence * heads + row % heads, row / heads % sequence),
        }
    }
}

/// The rows that one task writes, rounding once from the type of the computation.
pub(super) trait RowWriter<A>: Send {
    /// `row = from · factor`; nothing if the row is not wanted.
    fn write(&mut self, row: usize, from: &[A], factor: A);
}

impl<T: Float> RowWriter<T::Acc> for Vec<&mut [T]> {
    fn write(&mut self, row: usize, from: &[T::Acc], factor: T::Acc) {
        if let Some(to) = self.get_mut(row) {
            write_row::<T>(from, factor, to);
        }
    }
}

/// Rows, and where to leave what rounding takes from them.
struct Exact<'a, T> {
    rows: Vec<&'a mut [T]>,
    residual: Vec<&'a mut [T]>,
}

impl<T: Float> RowWriter<T::Acc> for Exact<'_, T> {
    fn write(&mut self, row: usize, from: &[T::Acc], factor: T::Acc) {
        if let (Some(to), Some(residual)) = (self.rows.get_mut(row), self.residual.get_mut(row)) {
            write_row::<T>(from, factor, to);
            write_residual::<T>(from, factor, to, T::Acc::from_f64(residual_scale(T::DTYPE)), residual);
        }
    }
}

vectorized! {
    fn write_residual<T: Float>(from: &[T::Acc], factor: T::Acc, rounded: &[T], scale: T::Acc, to: &mut [T]) {
        for ((from, rounded), to) in from.iter().zip(rounded).zip(to) {
            *to = T::from_acc((*from * factor - rounded.to_acc()) * scale);
        }
    }
}

vectorized! {
    fn write_row<T: Float>(from: &[T::Acc], factor: T::Acc, to: &mut [T]) {
        for (from, to) in from.iter().zip(to) {
            *to = T::from_acc(*from * factor);
        }
    }
}

/// Deals the rows of a tensor to tasks: one per batch entry, head and `block` positions of the sequence, in this order.
pub(super) fn deal<'a, T: Float>(
    values: &'a mut [T],
    order: RowOrder,
    [batch, heads, sequence]: [usize; 3],
    block: usize,
) -> Vec<Box<dyn RowWriter<T::Acc> + 'a>> {
    deal_rows(values, order, [batch, heads, sequence], block).into_iter().map(|task| Box::new(task) as _).collect()
}

/// As [`deal`] for a tensor and the residual of its rounding.
pub(super) fn deal_with_residual<'a, T: Float>(
    [values, residual]: [&'a mut [T]; 2],
    order: RowOrder,
    sizes: [usize; 3],
    block: usize,
) -> Vec<Box<dyn RowWriter<T::Acc> + 'a>> {
    let [rows, residual] = [values, residual].map(|values| deal_rows(values, order, sizes, block));
    rows.into_iter().zip(residual).map(|(rows, residual)| Box::new(Exact { rows, residual }) as _).collect()
}

fn deal_rows<T>(
    values: &mut [T],
    order: RowOrder,
    [batch, heads, sequence]: [usize; 3],
    block: usize,
) -> Vec<Vec<&mut [T]>> {
    let blocks = sequence.div_ceil(block);
    let mut tasks: Vec<Vec<&mut [T]>> = (0..batch * heads * blocks).map(|_| Vec::new()).collect();
    // Without features, or where nothing is wanted, the tasks get no rows.
    if let Some(width) = values.len().checked_div(batch * heads * sequence).filter(|&width| width > 0) {
        for (row, values) in values.chunks_exact_mut(width).enumerate() {
            let (head, position) = order.place(row, heads, sequence);
            tasks[head * blocks + position / block].push(values);
        }
    }
    tasks
}

/// The gradient of an operand, if it is wanted.
pub(super) struct Output {
    order: RowOrder,
    /// Batch, heads and sequence.
    sizes: [usize; 3],
    memory: Option<Tensor>,
}

impl Output {
    pub fn new(x: &Tensor, wanted: bool) -> Result<Self> {
        let order = RowOrder::of(x);
        let memory = wanted.then(|| order.uninit(x)).transpose()?;
        Ok(Self { order, sizes: [0, 1, 2].map(|dim| x.shape()[dim]), memory })
    }

    /// The rows for tasks of `block` positions each.
    pub fn deal<T: Float>(&mut self, block: usize) -> Result<Vec<Box<dyn RowWriter<T::Acc> + '_>>> {
        let values = match &mut self.memory {
            Some(memory) => memory.values_mut::<T>()?,
            None => &mut [],
        };
        Ok(deal(values, self.order, self.sizes, block))
    }

    pub fn finish(self) -> Result<Option<Tensor>> {
        self.memory.map(|memory| self.order.view(memory)).transpose()
    }
}

/// A tensor of rank 4 with packed rows in the type of operands, that of the tensor or of the computation: itself, or a
/// packed copy.
pub(super) fn widen<T: Float, O: Float<Acc = T::Acc>>(x: &Tensor) -> Result<Tensor> {
    if T::DTYPE == O::DTYPE {
        return Ok(x.clone());
    }
    let mut wide = Tensor::uninit(*x.shape(), <T::Acc as Element>::DTYPE, x.device())?;
    let (layout, from, width) = (*x.layout(), x.storage::<T>()?, x.shape()[3]);
    cpu::for_rows(wide.values_mut::<T::Acc>()?, width, width, |first, wide| {
        for (row, wide) in wide.chunks_exact_mut(width).enumerate() {
            let start = layout.row_offset(first + row);
            widen_row::<T>(&from[start..start + width], wide);
        }
    });
    Ok(wide)
}

/// Keys from which the common part of a head is estimated.
const SAMPLE: usize = 64;

/// A packed copy of keys `[batch, heads, key, d]` without what all keys of a head have in common in a feature, where that
/// is more than what they differ by; `None` if there is nothing. The gradients of a query's scores sum to zero, so that
/// they may be multiplied by either; but rounded to a half type they do not quite, and the common part would multiply
/// the difference.
pub(super) fn without_common<O: Float>(keys: &Tensor) -> Result<Option<Tensor>> {
    let [batch, heads, count, d] = [0, 1, 2, 3].map(|dim| keys.shape()[dim]);
    let rows = Rows::<O>::new(keys)?;
    let row = |head: usize, key: usize| rows.row(head / heads, head % heads, key, d);
    let step = count.div_ceil(SAMPLE).max(1);
    let part = O::Acc::from_f64(1.0 / count.div_ceil(step).max(1) as f64);
    // Sums become the common parts of all heads.
    let mut common = vec![O::Acc::ZERO; batch * heads * d];
    let mut squares = vec![O::Acc::ZERO; d];
    for (head, sums) in common.chunks_exact_mut(d.max(1)).enumerate() {
        squares.fill(O::Acc::ZERO);
        (0..count).step_by(step).for_each(|key| add_moments::<O>(row(head, key), row(head, 0), sums, &mut squares));
        common_part::<O>(row(head, 0), sums, &squares, part);
    }
    if common.iter().all(|common| *common == O::Acc::ZERO) {
        return Ok(None);
    }
    let mut rest = Tensor::uninit(Shape::new(&[batch, heads, count, d])?, O::DTYPE, keys.device())?;
    cpu::for_rows(rest.values_mut::<O>()?, d, d, |first, rest| {
        for (index, rest) in (first..).zip(rest.chunks_exact_mut(d)) {
            let head = index / count;
            subtract::<O>(row(head, index % count), &common[head * d..][..d], rest);
        }
    });
    Ok(Some(rest))
}

vectorized! {
    /// Sums and sums of squares of the differences from a row.
    fn add_moments<O: Float>(row: &[O], from: &[O], sums: &mut [O::Acc], squares: &mut [O::Acc]) {
        for ((row, from), (sum, square)) in row.iter().zip(from).zip(sums.iter_mut().zip(squares)) {
            let difference = row.to_acc() - from.to_acc();
            *sum += difference;
            *square += difference * difference;
        }
    }
}

vectorized! {
    /// Replaces the sums by the mean of what they are from, rounded so that differences from it are exact; by zero if
    /// it is below twice the standard deviation.
    fn common_part<O: Float>(from: &[O], sums: &mut [O::Acc], squares: &[O::Acc], part: O::Acc) {
        for ((from, sum), square) in from.iter().zip(sums).zip(squares) {
            let shift = *sum * part;
            let (mean, variance) = (from.to_acc() + shift, *square * part - shift * shift);
            let common = mean * mean > variance + variance + variance + variance;
            *sum = if common { O::from_acc(mean).to_acc() } else { O::Acc::ZERO };
        }
    }
}

vectorized! {
    fn subtract<O: Float>(row: &[O], common: &[O::Acc], to: &mut [O]) {
        for ((row, common), to) in row.iter().zip(common).zip(to) {
            *to = O::from_acc(row.to_acc() - *common);
        }
    }
}

vectorized! {
    fn widen_row<T: Float>(from: &[T], to: &mut [T::Acc]) {
        for (from, to) in from.iter().zip(to) {
            *to = from.to_acc();
        }
    }
}
