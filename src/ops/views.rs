//! Views: new shapes and strides over the same storage. None of them copies, except a `reshape` that strides cannot
//! express.

use crate::{
    Error, Result,
    autograd::{Backward, InputGrad, InputGrads, record},
    collect::CollectVec,
    error::ensure,
    shape::{IntoShape, Layout, MAX_RANK, Shape},
    tensor::{GradSlice, Tensor},
};

impl Tensor {
    /// Returns the same elements in the same order with another shape, given in full: there is no −1. Copies only if
    /// the strides do not allow a view.
    ///
    /// Errors: a different number of elements.
    ///
    /// ```
    /// use x_transformers::{Device, Tensor};
    /// let x = Tensor::from_slice(&[1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0], [2, 3], &Device::Cpu)?;
    /// assert_eq!(x.reshape([3, 2])?.shape()[..], [3, 2]);
    /// # Ok::<(), x_transformers::Error>(())
    /// ```
    #[doc(alias = "view")]
    pub fn reshape(&self, shape: impl IntoShape) -> Result<Tensor> {
        self.reshaped(shape.into_shape())
    }

    fn reshaped(&self, shape: Result<Shape>) -> Result<Tensor> {
        let shape = shape?;
        ensure!(
            shape.numel() == self.numel(),
            Error::shape(
                "reshape",
                format_args!("cannot reshape {:?} to {shape:?}: the number of elements differs", self.shape())
            )
        );
        match self.layout().reshape(shape) {
            Some(layout) => self.view("reshape", layout, ReshapeBackward { shape: *self.shape() }),
            None => self.contiguous()?.reshaped(Ok(shape)),
        }
    }

    /// Merges dimensions `first..=last` into one: `[a, b, c, …] → [a, b · c, …]`. Negative ones count from the end. A
    /// scalar becomes a vector of one.
    ///
    /// Errors: a dimension out of range, or `first > last`.
    ///
    /// ```
    /// use x_transformers::{Device, Tensor};
    /// let x = Tensor::from_slice(&[1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0], [2, 3], &Device::Cpu)?;
    /// assert_eq!(x.flatten(0, 1)?.shape()[..], [6]);
    /// # Ok::<(), x_transformers::Error>(())
    /// ```
    pub fn flatten(&self, first: isize, last: isize) -> Result<Tensor> {
        let at = |dim: isize| self.shape().dim_unless_scalar(dim, "flatten");
        let (Some(first), Some(last)) = (at(first)?, at(last)?) else { return self.reshape([1]) };
        ensure!(
            first <= last,
            Error::argument("flatten", format_args!("first dimension {first} comes after last dimension {last}"))
        );
        let mut dims = self.shape()[..first].to_vec();
        dims.push(self.shape()[first..=last].iter().product());
        dims.extend_from_slice(&self.shape()[last + 1..]);
        self.reshape(dims)
    }

    /// Swaps two dimensions; negative ones count from the end. A scalar is unchanged.
    ///
    /// Errors: a dimension out of range.
    ///
    /// ```
    /// use x_transformers::{Device, Tensor};
    /// let x = Tensor::from_slice(&[1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0], [2, 3], &Device::Cpu)?;
    /// assert_eq!(x.transpose(0, 1)?.to_vec::<f32>()?, [1.0, 4.0, 2.0, 5.0, 3.0, 6.0]);
    /// # Ok::<(), x_transformers::Error>(())
    /// ```
    #[doc(alias = "swapaxes")]
    #[doc(alias = "mT")]
    pub fn transpose(&self, a: isize, b: isize) -> Result<Tensor> {
        let at = |dim: isize| self.shape().dim_unless_scalar(dim, "transpose");
        let (Some(a), Some(b)) = (at(a)?, at(b)?) else { return Ok(self.clone()) };
        let mut order: Vec<usize> = (0..self.rank()).collect_vec();
        order.swap(a, b);
        self.permute(&order)
    }

    /// Reorders the dimensions: dimension `i` of the result is dimension `order[i]` of this tensor, counted from 0.
    ///
    /// Errors: `order` is not a permutation of `0..rank`.
    ///
    /// ```
    /// use x_transformers::{DType, Device, Tensor};
    /// let x = Tensor::zeros([2, 3, 4], DType::F32, &Device::Cpu)?;
    /// assert_eq!(x.permute(&[0, 2, 1])?.shape()[..], [2, 4, 3]);
    /// # Ok::<(), x_transformers::Error>(())
    /// ```
    pub fn permute(&self, order: &[usize]) -> Result<Tensor> {
        let mut inverse = [usize::MAX; MAX_RANK];
        let legal = order.len() == self.rank()
            && order
                .iter()
                .enumerate()
                .all(|(to, &from)| from < self.rank() && std::mem::replace(&mut inverse[from], to) == usize::MAX);
        ensure!(
            legal,
            Error::argument(
                "permute",
                format_args!("{order:?} is not a permutation of the dimensions of {:?}", self.shape())
            )
        );
        self.view("permute", self.layout().permute(order), PermuteBackward { inverse, rank: self.rank() })
    }

    /// Returns a view of elements `start..start + len` along a dimension; negative dimensions count from the end,
    /// `start` from the beginning.
    ///
    /// Errors: the dimension or the range is out of range.
    ///
    /// ```
    /// use x_transformers::{Device, Tensor};
    /// let x = Tensor::from_slice(&[1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0], [2, 3], &Device::Cpu)?;
    /// let last_two = x.narrow(1, 1, 2)?; // dimension, start, length: x[:, 1:3] in Python
    /// assert_eq!(last_two.to_vec::<f32>()?, [2.0, 3.0, 5.0, 6.0]);
    /// # Ok::<(), x_transformers::Error>(())
    /// ```
    #[doc(alias = "slice")]
    #[doc(alias = "index")]
    pub fn narrow(&self, dim: isize, start: usize, len: usize) -> Result<Tensor> {
        let dim = self.shape().dim(dim, "narrow")?;
        ensure!(
            start.checked_add(len).is_some_and(|end| end <= self.shape()[dim]),
            Error::shape(
                "narrow",
                format_args!("{len} elements from {start} exceed dimension {dim} of shape {:?}", self.shape())
            )
        );
        let backward = NarrowBackward { shape: *self.shape(), part: GradSlice { dim, start, len } };
        self.view("narrow", self.layout().narrow(dim, start, len), backward)
    }

    /// Returns a view of element `index`, counted from 0, along a dimension, and removes the dimension.
    ///
    /// Errors: the dimension or the index is out of range.
    ///
    /// ```
    /// use x_transformers::{Device, Tensor};
    /// let x = Tensor::from_slice(&[1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0], [2, 3], &Device::Cpu)?;
    /// assert_eq!(x.select(0, 1)?.to_vec::<f32>()?, [4.0, 5.0, 6.0]); // x[1] in Python
    /// # Ok::<(), x_transformers::Error>(())
    /// ```
    pub fn select(&self, dim: isize, index: usize) -> Result<Tensor> {
        let at = self.shape().dim(dim, "select")?;
        ensure!(
            index < self.shape()[at],
            Error::shape(
                "select",
                format_args!("index {index} is out of range for dimension {dim} of shape {:?}", self.shape())
            )
        );
        self.narrow(dim, index, 1)?.squeeze(dim)
    }

    /// Repeats dimensions of size 1 and adds leading dimensions, without copying. The shape is given in full: there is
    /// no −1 for an unchanged size.
    ///
    /// Errors: the shape does not broadcast to the target.
    ///
    /// ```
    /// use x_transformers::{Device, Tensor};
    /// let row = Tensor::from_slice(&[1.0f32, 2.0], [1, 2], &Device::Cpu)?;
    /// assert_eq!(row.expand([3, 2])?.to_vec::<f32>()?, [1.0, 2.0, 1.0, 2.0, 1.0, 2.0]);
    /// # Ok::<(), x_transformers::Error>(())
    /// ```
    #[doc(alias = "broadcast_to")]
    #[doc(alias = "broadcast_as")]
    pub fn expand(&self, shape: impl IntoShape) -> Result<Tensor> {
        self.expanded(shape.into_shape())
    }

    fn expanded(&self, shape: Result<Shape>) -> Result<Tensor> {
        let shape = shape?;
        let fits = self.shape().broadcast(&shape, "expand").is_ok_and(|result| result == shape);
        ensure!(fits, Error::shape("expand", format_args!("cannot expand {:?} to {shape:?}", self.shape())));
        if shape == *self.shape() {
            return Ok(self.clone());
        }
        self.view("expand", self.layout().expand(shape), ExpandBackward { shape: *self.shape() })
    }

    /// Adds a dimension of size 1 at `dim`, which may be the rank; `-1` adds it at the end.
    ///
    /// Errors: `dim` is out of range, or the rank is already 6.
    ///
    /// ```
    /// use x_transformers::{DType, Device, Tensor};
    /// let x = Tensor::zeros([2, 3], DType::F32, &Device::Cpu)?;
    /// assert_eq!(x.unsqueeze(0)?.shape()[..], [1, 2, 3]);
    /// assert_eq!(x.unsqueeze(-1)?.shape()[..], [2, 3, 1]);
    /// # Ok::<(), x_transformers::Error>(())
    /// ```
    #[doc(alias = "expand_dims")]
    pub fn unsqueeze(&self, dim: isize) -> Result<Tensor> {
        let rank = self.rank();
        let at = if dim < 0 { dim.saturating_add(rank as isize + 1) } else { dim };
        ensure!(
            rank < MAX_RANK && (0..=rank as isize).contains(&at),
            Error::shape("unsqueeze", format_args!("cannot add a dimension at {dim} to shape {:?}", self.shape()))
        );
        self.view("unsqueeze", self.layout().unsqueeze(at as usize), ReshapeBackward { shape: *self.shape() })
    }

    /// Removes a dimension of size 1; negative ones count from the end. As in PyTorch, a dimension of another size
    /// stays, and so does a scalar.
    ///
    /// Errors: `dim` is out of range.
    ///
    /// ```
    /// use x_transformers::{DType, Device, Tensor};
    /// let x = Tensor::zeros([1, 2, 3], DType::F32, &Device::Cpu)?;
    /// assert_eq!(x.squeeze(0)?.shape()[..], [2, 3]);
    /// # Ok::<(), x_transformers::Error>(())
    /// ```
    pub fn squeeze(&self, dim: isize) -> Result<Tensor> {
        let at = self.shape().dim_unless_scalar(dim, "squeeze")?;
        let Some(at) = at.filter(|&at| self.shape()[at] == 1) else { return Ok(self.clone()) };
        self.view("squeeze", self.layout().squeeze(at), ReshapeBackward { shape: *self.shape() })
    }

    /// Splits a dimension into pieces of the given sizes.
    ///
    /// Errors: the sizes do not add up to the dimension.
    ///
    /// ```
    /// use x_transformers::{Device, Tensor};
    /// let x = Tensor::from_slice(&[1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0], [2, 3], &Device::Cpu)?;
    /// let parts = x.split(&[1, 2], 1)?;
    /// assert_eq!(parts[1].to_vec::<f32>()?, [2.0, 3.0, 5.0, 6.0]);
    /// # Ok::<(), x_transformers::Error>(())
    /// ```
    pub fn split(&self, sizes: &[usize], dim: isize) -> Result<Vec<Tensor>> {
        let at = self.shape().dim(dim, "split")?;
        let total = sizes.iter().try_fold(0usize, |sum, &size| sum.checked_add(size));
        ensure!(
            total == Some(self.shape()[at]),
            Error::shape("split", format_args!("sizes {sizes:?} do not sum to dimension {dim} of {:?}", self.shape()))
        );
        let mut start = 0;
        sizes
            .iter()
            .map(|&size| {
                start += size;
                self.narrow(at as isize, start - size, size)
            })
            .try_collect_vec()
    }

    /// Splits a dimension into at most `n` pieces of equal size, of which the last may be shorter, as in PyTorch: 13
    /// elements in 5 or in 6 pieces are 3, 3, 3, 3 and 1; an empty dimension gives `n` empty pieces. Use
    /// [`Tensor::split`] for exact sizes.
    ///
    /// Errors: `n` is 0, or a dimension out of range.
    ///
    /// ```
    /// use x_transformers::{Device, Tensor};
    /// let x = Tensor::from_slice(&[1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0], [2, 3], &Device::Cpu)?;
    /// let rows = x.chunk(2, 0)?;
    /// assert_eq!(rows[1].to_vec::<f32>()?, [4.0, 5.0, 6.0]);
    /// # Ok::<(), x_transformers::Error>(())
    /// ```
    pub fn chunk(&self, n: usize, dim: isize) -> Result<Vec<Tensor>> {
        let at = self.shape().dim(dim, "chunk")?;
        ensure!(n > 0, Error::argument("chunk", "expected at least 1 piece, got 0"));
        let size = self.shape()[at];
        let sizes: Vec<usize> = match size.div_ceil(n) {
            0 => vec![0; n],
            piece => (0..size).step_by(piece).map(|start| piece.min(size - start)).collect_vec(),
        };
        self.split(&sizes, dim)
    }

    fn view(&self, op: &'static str, layout: Layout, backward: impl Backward + 'static) -> Result<Tensor> {
        record(op, self.with_layout(layout), &[self], |_| backward)
    }
}

struct ReshapeBackward {
    shape: Shape,
}

impl Backward for ReshapeBackward {
    fn name(&self) -> &'static str {
        "reshape"
    }

    fn backward(self: Box<Self>, grad: Tensor, _need: &[bool]) -> Result<InputGrads> {
        grad.reshape(self.shape).map(InputGrads::one)
    }
}

struct PermuteBackward {
    inverse: [usize; MAX_RANK],
    rank: usize,
}

impl Backward for PermuteBackward {
    fn name(&self) -> &'static str {
        "permute"
    }

    fn backward(self: Box<Self>, grad: Tensor, _need: &[bool]) -> Result<InputGrads> {
        grad.permute(&self.inverse[..self.rank]).map(InputGrads::one)
    }
}

struct NarrowBackward {
    shape: Shape,
    part: GradSlice,
}

impl Backward for NarrowBackward {
    fn name(&self) -> &'static str {
        "narrow"
    }

    fn backward(self: Box<Self>, grad: Tensor, _need: &[bool]) -> Result<InputGrads> {
        Ok(InputGrads::new(vec![InputGrad::Slice { shape: self.shape, part: self.part, value: grad }]))
    }
}

struct ExpandBackward {
    shape: Shape,
}

impl Backward for ExpandBackward {
    fn name(&self) -> &'static str {
        "expand"
    }

    fn backward(self: Box<Self>, grad: Tensor, _need: &[bool]) -> Result<InputGrads> {
        grad.sum_to(self.shape).map(InputGrads::one)
    }
}
