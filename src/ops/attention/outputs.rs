//! Memory on a GPU for the gradients of queries, keys and values.

use super::{Needed, Problem, rows::RowOrder};
use crate::{
    Result, Shape, Tensor,
    device::{Address, Arg},
    shape::Layout,
};

/// Memory for the gradient of an operand, if it is wanted.
pub(super) struct Output {
    /// The gradient, `[batch, heads, sequence, features]`.
    gradient: Option<Tensor>,
    /// Start of its storage.
    address: Address,
    layout: Layout,
}

impl Output {
    /// Returns memory for the gradients of the operands. Where these are the columns of one tensor, so are their
    /// gradients: a product that made the operands takes them as one matrix.
    pub fn of(problem: &Problem, need: Needed) -> Result<[Self; 3]> {
        let operands = [&problem.q, &problem.k, &problem.v];
        if need.operands == [true; 3]
            && let Some(shape) = columns(operands)?
        {
            let mut whole = Tensor::uninit(shape, problem.q.dtype(), problem.q.device())?;
            let address = whole.address_mut()?;
            return Ok(operands.map(|x| Self {
                gradient: Some(whole.with_layout(*x.layout())),
                address,
                layout: *x.layout(),
            }));
        }
        let [q, k, v] = need.operands;
        Ok([Self::alone(&problem.q, q)?, Self::alone(&problem.k, k)?, Self::alone(&problem.v, v)?])
    }

    fn alone(x: &Tensor, wanted: bool) -> Result<Self> {
        if !wanted {
            return Ok(Self { gradient: None, address: Address::NULL, layout: *x.layout() });
        }
        let order = RowOrder::of(x);
        let mut memory = order.uninit(x)?;
        let address = memory.address_mut()?;
        let gradient = order.view(memory)?;
        Ok(Self { address, layout: *gradient.layout(), gradient: Some(gradient) })
    }

    /// Returns the start of the storage, which kernels index by the layout.
    pub fn storage(&self) -> Arg {
        Arg::Output(self.address)
    }

    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Returns the gradient that has been written.
    pub fn finish(self) -> Option<Tensor> {
        self.gradient
    }
}

/// Returns the shape `[batch, sequence, columns]` of a tensor whose columns are queries, keys and values of all heads,
/// in this order, if these operands `[batch, heads, sequence, features]` are views of one.
fn columns(operands: [&Tensor; 3]) -> Result<Option<Shape>> {
    let [q, k, v] = operands;
    let (batch, sequence) = (q.shape()[0], q.shape()[2]);
    let mut end = 0;
    for x in operands {
        let [_, heads, _, features] = [0, 1, 2, 3].map(|dim| x.shape()[dim]);
        if !x.shares_storage(q) || x.layout().offset != end || [x.shape()[0], x.shape()[2]] != [batch, sequence] {
            return Ok(None);
        }
        end += heads * features;
    }
    let fits = |x: &&Tensor| {
        let (shape, strides) = (x.shape(), x.strides());
        let expected = [sequence * end, shape[3], end, 1];
        (0..4).all(|dim| strides[dim] == expected[dim] || shape[dim] == 1)
    };
    // Kernels write each row in packets.
    let aligned = [k, v].iter().all(|x| (x.layout().offset * x.dtype().size()).is_multiple_of(16));
    if [q, k, v].iter().all(fits) && aligned && (end * q.dtype().size()).is_multiple_of(16) {
        return Shape::new(&[batch, sequence, end]).map(Some);
    }
    Ok(None)
}
