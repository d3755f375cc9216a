//! Memory order of the rows of a tensor `[batch, heads, sequence, features]`, and their distribution to the tasks that
//! write them. The passes are compiled for the compute types; rows of other types are converted here.

use half::{bf16, f16};

use super::{OP, residual_scale};
use crate::{
    DType, Result, Tensor,
    collect::CollectVec,
    device::{cpu, floats::FloatsMut, simd::vectorized},
    dtype::{Float, Real},
    shape::Shape,
};

/// Order of the rows of a tensor in memory.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum RowOrder {
    /// `[batch, heads, sequence, features]`
    HeadsFirst,
    /// `[batch, sequence, heads, features]`
    SequenceFirst,
}

impl RowOrder {
    /// Returns the order of an operand. With its gradient in the same order, the backward pass of the views that led to
    /// the operand needs no copy.
    pub fn of(x: &Tensor) -> Self {
        if x.strides()[1] < x.strides()[2] { Self::SequenceFirst } else { Self::HeadsFirst }
    }

    /// Allocates memory for a gradient of `x`.
    pub fn uninit(self, x: &Tensor) -> Result<Tensor> {
        let [batch, heads, sequence, width] = [0, 1, 2, 3].map(|dim| x.shape()[dim]);
        let shape = match self {
            Self::HeadsFirst => [batch, heads, sequence, width],
            Self::SequenceFirst => [batch, sequence, heads, width],
        };
        Tensor::uninit(Shape::new(&shape)?, x.dtype(), x.device())
    }

    /// Returns the memory as `[batch, heads, sequence, features]`.
    pub fn view(self, x: Tensor) -> Result<Tensor> {
        match self {
            Self::HeadsFirst => Ok(x),
            Self::SequenceFirst => x.permute(&[0, 2, 1, 3]),
        }
    }

    /// Returns the head (counted over the batch) and position of row `row` in memory.
    pub fn place(self, row: usize, heads: usize, sequence: usize) -> (usize, usize) {
        match self {
            Self::HeadsFirst => (row / sequence, row % sequence),
            Self::SequenceFirst => (row / heads / sequence * heads + row % heads, row / heads % sequence),
        }
    }
}

/// Rows that one task writes, rounding once from the compute type.
pub(super) struct RowWriter<'a> {
    rows: Vec<FloatsMut<'a>>,
    /// Destination of the rounding errors, empty if they are not kept.
    residual: Vec<FloatsMut<'a>>,
    scale: f64,
}

/// Calls `write_row`, and `write_residual` if there is one, for the type of the rows.
macro_rules! write_as {
    ($from:expr, $factor:expr, $to:expr, $residual:expr, $scale:expr, [$($Kind:ident($T:ty)),*]) => {
        match $to {
            $(FloatsMut::$Kind(to) => {
                let (from, factor) = (bytemuck::cast_slice($from), bytemuck::cast($factor));
                write_row::<$T>(from, factor, to);
                if let Some(FloatsMut::$Kind(residual)) = $residual {
                    write_residual::<$T>(from, factor, to, <$T as Float>::Acc::from_f64($scale), residual);
                }
            })*
        }
    };
}

impl RowWriter<'_> {
    /// Writes `row = from · factor`; does nothing if the row is not wanted. `A` is the compute type.
    pub fn write<A: Real>(&mut self, row: usize, from: &[A], factor: A) {
        let Some(to) = self.rows.get_mut(row) else { return };
        let residual = self.residual.get_mut(row);
        write_as!(from, factor, to, residual, self.scale, [F32(f32), F64(f64), BF16(bf16), F16(f16)]);
    }
}

// One pass each: going through rows in f32 would cost more than reading the rows of values.
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

/// Distributes the rows of a tensor to tasks, one per batch entry, head and `block` positions of the sequence, in this
/// order, together with those of its rounding residual, if there is one.
pub(super) fn deal<'a>(
    values: FloatsMut<'a>,
    residual: Option<FloatsMut<'a>>,
    order: RowOrder,
    sizes: [usize; 3],
    block: usize,
) -> Vec<RowWriter<'a>> {
    let scale = residual_scale(values.dtype());
    let mut residuals = residual.map(|residual| deal_rows(residual, order, sizes, block).into_iter());
    let mut residual = || residuals.as_mut().and_then(Iterator::next).unwrap_or_default();
    let rows = deal_rows(values, order, sizes, block).into_iter();
    rows.map(|rows| RowWriter { rows, residual: residual(), scale }).collect_vec()
}

fn deal_rows<'a>(
    values: FloatsMut<'a>,
    order: RowOrder,
    [batch, heads, sequence]: [usize; 3],
    block: usize,
) -> Vec<Vec<FloatsMut<'a>>> {
    let blocks = sequence.div_ceil(block);
    let mut tasks: Vec<Vec<FloatsMut>> = (0..batch * heads * blocks).map(|_| Vec::new()).collect_vec();
    // Without features, or if nothing is wanted, the tasks get no rows.
    if let Some(width) = values.len().checked_div(batch * heads * sequence).filter(|&width| width > 0) {
        for (row, values) in values.chunks(width).into_iter().enumerate() {
            let (head, position) = order.place(row, heads, sequence);
            tasks[head * blocks + position / block].push(values);
        }
    }
    tasks
}

/// Gradient of an operand, if it is wanted.
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

    /// Returns the rows for tasks of `block` positions each.
    pub fn deal(&mut self, block: usize) -> Result<Vec<RowWriter<'_>>> {
        let values = match &mut self.memory {
            Some(memory) => memory.floats_mut(OP)?,
            None => FloatsMut::F32(&mut []),
        };
        Ok(deal(values, None, self.order, self.sizes, block))
    }

    pub fn finish(self) -> Result<Option<Tensor>> {
        self.memory.map(|memory| self.order.view(memory)).transpose()
    }
}

/// Returns a tensor of rank 4 with packed rows in the type of operands, its own if that is bf16 and multiplied as such,
/// or else the compute type: itself, or a packed copy.
pub(super) fn widen<A: Real>(x: &Tensor, multiplies_bf16: bool) -> Result<Tensor> {
    if multiplies_bf16 || x.dtype() == A::DTYPE {
        return Ok(x.clone());
    }
    let mut wide = Tensor::uninit(*x.shape(), A::DTYPE, x.device())?;
    let (layout, from, width) = (*x.layout(), x.stored_floats(OP)?, x.shape()[3]);
    cpu::for_rows(wide.values_mut::<A>()?, width, width, |first, wide| {
        for (row, wide) in wide.chunks_exact_mut(width).enumerate() {
            let start = layout.row_offset(first + row);
            from.range(start..start + width).read(wide);
        }
    });
    Ok(wide)
}

/// Number of keys from which the common part of a head is estimated.
const SAMPLE: usize = 64;

/// Returns a packed copy of keys in bf16, `[batch, heads, key, d]`, in bf16 or f32, without the common part of each feature
/// over all keys of a head, where that exceeds their differences; `None` if there is none. Without a sink or a soft clamp
/// the gradients of a query's scores sum to zero, so that they may be multiplied by either; but rounded, or from a rounded
/// `delta`, they do not quite, and the common part would multiply the difference.
pub(super) fn without_common(keys: &Tensor, dtype: DType) -> Result<Option<Tensor>> {
    let [batch, heads, count, d] = [0, 1, 2, 3].map(|dim| keys.shape()[dim]);
    let (layout, storage) = (*keys.layout(), keys.storage::<bf16>()?);
    let row = |head: usize, key: usize| &storage[layout.row_offset(head * count + key)..][..d];
    let step = count.div_ceil(SAMPLE).max(1);
    let part = (1.0 / count.div_ceil(step).max(1) as f64) as f32;
    // The sums become the common parts of all heads.
    let mut common = vec![0.0; batch * heads * d];
    let mut squares = vec![0.0; d];
    for (head, sums) in common.chunks_exact_mut(d.max(1)).enumerate() {
        squares.fill(0.0);
        (0..count).step_by(step).for_each(|key| add_moments(row(head, key), row(head, 0), sums, &mut squares));
        common_part(row(head, 0), sums, &squares, part);
    }
    if common.iter().all(|common| *common == 0.0) {
        return Ok(None);
    }
    let mut rest = Tensor::uninit(Shape::new(&[batch, heads, count, d])?, dtype, keys.device())?;
    let key = |index: usize| (row(index / count, index % count), &common[index / count * d..][..d]);
    if dtype == DType::BF16 {
        cpu::for_rows(rest.values_mut::<bf16>()?, d, d, |first, rest| {
            (first..)
                .map(key)
                .zip(rest.chunks_exact_mut(d))
                .for_each(|((row, common), rest)| subtract(row, common, rest));
        });
    } else {
        cpu::for_rows(rest.values_mut::<f32>()?, d, d, |first, rest| {
            (first..).map(key).zip(rest.chunks_exact_mut(d)).for_each(|((row, common), rest)| {
                subtract_wide(row, common, rest);
            });
        });
    }
    Ok(Some(rest))
}

vectorized! {
    /// Sums and sums of squares of the differences from a row.
    fn add_moments(row: &[bf16], from: &[bf16], sums: &mut [f32], squares: &mut [f32]) {
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
    fn common_part(from: &[bf16], sums: &mut [f32], squares: &[f32], part: f32) {
        for ((from, sum), square) in from.iter().zip(sums).zip(squares) {
            let shift = *sum * part;
            let (mean, variance) = (from.to_acc() + shift, *square * part - shift * shift);
            let common = mean * mean > variance + variance + variance + variance;
            *sum = if common { bf16::from_acc(mean).to_acc() } else { 0.0 };
        }
    }
}

vectorized! {
    fn subtract_wide(row: &[bf16], common: &[f32], to: &mut [f32]) {
        for ((row, common), to) in row.iter().zip(common).zip(to) {
            *to = row.to_acc() - *common;
        }
    }
}

vectorized! {
    fn subtract(row: &[bf16], common: &[f32], to: &mut [bf16]) {
        for ((row, common), to) in row.iter().zip(common).zip(to) {
            *to = bf16::from_acc(row.to_acc() - *common);
        }
    }
}
