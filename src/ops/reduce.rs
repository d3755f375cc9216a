//! Sums and means over dimensions.

use crate::{
    DType, Error, Result, Tensor,
    core::{Backward, Contributions, Float, Real, Shape, discrete, dispatch_float, record},
    device::{cpu, simd::vectorized},
    error::ensure,
};

impl Tensor {
    /// The sum over the given dimensions, which disappear; all of them if none is given. Negative ones count from
    /// the end.
    ///
    /// Shapes: `[.., i, ..] → [.., ..]`. Accumulates in f32 (f64 for f64). Saves nothing.
    /// Errors: a dimension out of range or named twice, or a dtype that is not float.
    pub fn sum(&self, dims: &[isize]) -> Result<Tensor> {
        ensure!(
            self.dtype().is_float(),
            Error::dtype("sum", format!("expected a float tensor, got {}", self.dtype()))
        );
        let mut reduced = vec![dims.is_empty(); self.rank()];
        for &dim in dims {
            let dim = self.shape().dim(dim, "sum")?;
            let repeated = std::mem::replace(&mut reduced[dim], true);
            ensure!(!repeated, Error::argument("sum", format!("dimension {dim} is named twice in {dims:?}")));
        }
        // Kept dimensions first, so that each sum is one packed row.
        let kept: Vec<usize> = (0..self.rank()).filter(|&dim| !reduced[dim]).collect();
        let order: Vec<usize> = kept.iter().copied().chain((0..self.rank()).filter(|&dim| reduced[dim])).collect();
        let shape = Shape::unchecked(&kept.iter().map(|&dim| self.shape()[dim]).collect::<Vec<_>>());
        let mut out = Tensor::uninit(shape, self.dtype(), self.device())?;
        let kept_is_last = !kept.is_empty() && kept.iter().enumerate().all(|(i, &dim)| dim == self.rank() - kept.len() + i);
        dispatch_float!("sum", self.dtype(), T, {
            if kept_is_last {
                // Whole rows are added up: no transposed copy, and the inner loop runs over packed columns.
                let x = self.detach().contiguous()?;
                sum_rows_together::<T>(x.values::<T>()?, out.values_mut::<T>()?);
            } else {
                let x = self.detach().permute(&order)?.contiguous()?;
                let (x, out) = (x.values::<T>()?, out.values_mut::<T>()?);
                let width = x.len().checked_div(out.len()).unwrap_or(0);
                cpu::for_rows(out, 1, width, |row, out| sum_each_row::<T>(&x[row * width..], width, out));
            }
            Ok(())
        })?;
        record("sum", out, &[self], |_| SumBackward { shape: *self.shape(), reduced })
    }

    /// The mean over the given dimensions, which disappear; all of them if none is given.
    ///
    /// Errors: as [`Tensor::sum`]. The mean of no elements is NaN, as in PyTorch.
    pub fn mean(&self, dims: &[isize]) -> Result<Tensor> {
        let sum = self.sum(dims)?;
        let count = self.elements() as f64 / sum.elements() as f64;
        if sum.elements() == 0 { Ok(sum) } else { sum.affine(1.0 / count, 0.0) }
    }

    /// Sums over whatever dimensions broadcasting has added or repeated: the inverse of [`Tensor::expand`].
    ///
    /// Errors: `shape` does not broadcast to this one.
    pub fn sum_to(&self, shape: Shape) -> Result<Tensor> {
        if shape == *self.shape() {
            return Ok(self.clone());
        }
        let fits = shape.broadcast(self.shape(), "sum_to").is_ok_and(|result| result == *self.shape());
        ensure!(fits, Error::shape("sum_to", format!("{shape:?} does not expand to {:?}", self.shape())));
        let added = self.rank() - shape.rank();
        let dims: Vec<isize> = (0..self.rank())
            .filter(|&dim| dim < added || shape[dim - added] != self.shape()[dim])
            .map(|dim| dim as isize)
            .collect();
        if dims.is_empty() { self.reshape(shape) } else { self.sum(&dims)?.reshape(shape) }
    }
}

/// Columns that one pass of [`sum_rows_together`] keeps in registers and first-level cache.
const COLUMNS: usize = 512;

/// `out[j] = Σ_i x[i, j]`: over columns in parallel, over rows in order.
fn sum_rows_together<T: Float>(x: &[T], out: &mut [T]) {
    let width = out.len();
    let rows = x.len().checked_div(width).unwrap_or(0);
    let tasks_of = COLUMNS.min(width.max(1));
    cpu::for_rows(out, 1, rows.max(1), |start, out| {
        for (index, out) in out.chunks_mut(tasks_of).enumerate() {
            sum_columns::<T>(x, width, start + index * tasks_of, out);
        }
    });
}

vectorized! {
    fn sum_columns<T: Float>(x: &[T], width: usize, start: usize, out: &mut [T]) {
        let mut sums = [T::Acc::ZERO; COLUMNS];
        let sums = &mut sums[..out.len()];
        for row in x.chunks_exact(width) {
            for (sum, x) in sums.iter_mut().zip(&row[start..]) {
                *sum += x.to_acc();
            }
        }
        for (out, sum) in out.iter_mut().zip(sums) {
            *out = T::from_acc(*sum);
        }
    }
}

vectorized! {
    /// `out[i] = Σ_j x[i, j]`.
    fn sum_each_row<T: Float>(x: &[T], width: usize, out: &mut [T]) {
        for (row, out) in out.iter_mut().enumerate() {
            *out = T::from_acc(sum_slice(&x[row * width..(row + 1) * width]));
        }
    }
}

/// Adds up a slice in sixteen lanes, which vectorises and keeps the error small; the order is fixed.
#[inline(always)]
pub(crate) fn sum_slice<T: Float>(x: &[T]) -> T::Acc {
    fold(x, T::Acc::ZERO, |x| x.to_acc())
}

/// `Σ f(x)` in sixteen lanes.
#[inline(always)]
pub(crate) fn fold<T: Float>(x: &[T], start: T::Acc, f: impl Fn(T) -> T::Acc) -> T::Acc {
    let mut lanes = [T::Acc::ZERO; 16];
    let chunks = x.chunks_exact(16);
    let mut sum = start;
    for &x in chunks.remainder() {
        sum += f(x);
    }
    for chunk in chunks {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane += f(x);
        }
    }
    for width in [8, 4, 2, 1] {
        for lane in 0..width {
            let other = lanes[lane + width];
            lanes[lane] += other;
        }
    }
    sum + lanes[0]
}

struct SumBackward {
    shape: Shape,
    reduced: Vec<bool>,
}

impl Backward for SumBackward {
    fn name(&self) -> &'static str {
        "sum"
    }

    /// Every summand gets the gradient of its sum.
    fn backward(self: Box<Self>, mut grad: Tensor, _need: &[bool]) -> Result<Contributions> {
        for (dim, _) in self.reduced.iter().enumerate().filter(|(_, reduced)| **reduced) {
            grad = grad.unsqueeze(dim as isize)?;
        }
        grad.expand(self.shape).map(Contributions::one)
    }
}

impl Tensor {
    /// The largest value along a dimension, which disappears; the gradient goes to the first of equal ones.
    ///
    /// NaN wins, as in PyTorch. Saves: the position of each maximum.
    /// Errors: the dimension is out of range or empty, or a dtype that is not float.
    pub fn max(&self, dim: isize) -> Result<Tensor> {
        let index = self.detach().argmax(dim)?;
        let dim = self.shape().dim(dim, "max")?;
        let x = self.detach().dim_last(dim)?;
        let mut out = Tensor::uninit(self.shape().without(dim), self.dtype(), self.device())?;
        dispatch_float!("max", self.dtype(), T, {
            let (x, index, width) = (x.values::<T>()?, index.values::<i64>()?, self.shape()[dim]);
            for (row, (out, &at)) in out.values_mut::<T>()?.iter_mut().zip(index).enumerate() {
                *out = x[row * width + at as usize];
            }
            Ok(())
        })?;
        record("max", out, &[self], |_| MaxBackward { index, dim, shape: *self.shape() })
    }

    /// The position of the largest value along a dimension, which disappears, as I64; the first of equal ones, NaN
    /// wins.
    ///
    /// Errors: the dimension is out of range or empty, a dtype that is not float, or a tensor that requires a gradient.
    pub fn argmax(&self, dim: isize) -> Result<Tensor> {
        discrete("argmax", &[self])?;
        let dim = self.shape().dim(dim, "argmax")?;
        let width = self.shape()[dim];
        ensure!(width > 0, Error::shape("argmax", format!("dimension {dim} of shape {:?} is empty", self.shape())));
        let x = self.dim_last(dim)?;
        let mut index = Tensor::uninit(self.shape().without(dim), DType::I64, x.device())?;
        dispatch_float!("argmax", x.dtype(), T, {
            let x = x.values::<T>()?;
            cpu::for_rows(index.values_mut::<i64>()?, 1, width, |row, out| {
                for (x, out) in x[row * width..].chunks_exact(width).zip(out) {
                    *out = first_largest(x) as i64;
                }
            });
            Ok(())
        })?;
        Ok(index)
    }

    /// Packed, with a dimension moved to the end: each of its lines is a row.
    fn dim_last(&self, dim: usize) -> Result<Tensor> {
        let order: Vec<usize> = (0..self.rank()).filter(|&other| other != dim).chain([dim]).collect();
        self.permute(&order)?.contiguous()
    }
}

fn first_largest<T: Float>(x: &[T]) -> usize {
    let is_nan = |x: T| x.partial_cmp(&x).is_none();
    let mut best = 0;
    for (index, &value) in x.iter().enumerate() {
        if value > x[best] || (is_nan(value) && !is_nan(x[best])) {
            best = index;
        }
    }
    best
}

struct MaxBackward {
    index: Tensor,
    dim: usize,
    shape: Shape,
}

impl Backward for MaxBackward {
    fn name(&self) -> &'static str {
        "max"
    }

    fn backward(self: Box<Self>, grad: Tensor, _need: &[bool]) -> Result<Contributions> {
        let positions = Tensor::arange(self.shape[self.dim], grad.device())?;
        let hit = self.index.unsqueeze(-1)?.eq(&positions)?;
        let zero = Tensor::zeros((), grad.dtype(), grad.device())?;
        let spread = hit.where_cond(&grad.unsqueeze(-1)?, &zero)?;
        // The inverse of `dim_last`.
        let mut order: Vec<usize> = (0..self.shape.rank() - 1).collect();
        order.insert(self.dim, self.shape.rank() - 1);
        spread.permute(&order).map(Contributions::one)
    }
}
