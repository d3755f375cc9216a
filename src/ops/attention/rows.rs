//! How rows of a tensor `[batch, heads, sequence, features]` lie in memory, and who may write which of them. This is
//! the part that is compiled for each type of tensor; the passes are compiled for the types of computation alone.

use crate::{
    Result, Tensor,
    core::{Element, Float, Shape},
    device::{cpu, simd::vectorized},
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
    let blocks = sequence.div_ceil(block);
    let mut tasks: Vec<Vec<&mut [T]>> = (0..batch * heads * blocks).map(|_| Vec::new()).collect();
    // Without features, or where nothing is wanted, the tasks get no rows.
    if let Some(width) = values.len().checked_div(batch * heads * sequence).filter(|&width| width > 0) {
        for (row, values) in values.chunks_exact_mut(width).enumerate() {
            let (head, position) = order.place(row, heads, sequence);
            tasks[head * blocks + position / block].push(values);
        }
    }
    tasks.into_iter().map(|task| Box::new(task) as _).collect()
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

vectorized! {
    fn widen_row<T: Float>(from: &[T], to: &mut [T::Acc]) {
        for (from, to) in from.iter().zip(to) {
            *to = from.to_acc();
        }
    }
}
