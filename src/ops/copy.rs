//! Copies: packing strided tensors, converting dtypes, joining, and the sums in place that the tape needs.

use crate::{
    DType, Error, Result, Tensor,
    core::{Backward, Contribution, Contributions, Element, Float, Part, Shape, discrete, dispatch_float, record},
    device::{cpu, simd::vectorized},
    error::ensure,
};

impl Tensor {
    /// The same values packed in row-major order; the tensor itself if it is packed already.
    pub fn contiguous(&self) -> Result<Tensor> {
        if self.is_contiguous() {
            return Ok(self.clone());
        }
        let mut out = self.uninit_like()?;
        match self.dtype() {
            DType::I64 => pack::<i64>(self, &mut out)?,
            DType::Bool => pack::<bool>(self, &mut out)?,
            float => dispatch_float!("contiguous", float, T, pack::<T>(self, &mut out))?,
        }
        record("contiguous", out, &[self], |_| CopyBackward { dtype: self.dtype() })
    }

    /// The values as another dtype: floats round to nearest even, float to i64 truncates, to bool asks for "not zero".
    ///
    /// Errors: a tensor that requires a gradient to a dtype that has none.
    pub fn to_dtype(&self, dtype: DType) -> Result<Tensor> {
        if dtype == self.dtype() {
            return Ok(self.clone());
        }
        if !dtype.is_float() {
            discrete("to_dtype", &[self])?;
        }
        let x = self.contiguous()?;
        let mut out = Tensor::uninit(*x.shape(), dtype, x.device())?;
        match x.dtype() {
            DType::I64 => convert_to(x.values::<i64>()?, |x| x as f64, &mut out)?,
            DType::Bool => convert_to(x.values::<bool>()?, |x| x as f64, &mut out)?,
            float => dispatch_float!("to_dtype", float, T, {
                convert_to(x.values::<T>()?, |x| crate::core::Real::to_f64(x.to_acc()), &mut out)
            })?,
        }
        // Recorded against the packed tensor: if that was a copy, its own node follows.
        record("to_dtype", out, &[&x], |_| CopyBackward { dtype: self.dtype() })
    }

    /// Joins tensors along a dimension; negative ones count from the end.
    ///
    /// Errors: no tensors, or shapes, dtypes or devices that differ elsewhere.
    pub fn cat(tensors: &[&Tensor], dim: isize) -> Result<Tensor> {
        let Some(&first) = tensors.first() else {
            return Err(Error::argument("cat", "expected at least one tensor"));
        };
        let dim = first.shape().dim(dim, "cat")?;
        let mut total = 0usize;
        for tensor in tensors {
            same_kind("cat", first, tensor)?;
            let fits = tensor.rank() == first.rank() && tensor.shape().without(dim) == first.shape().without(dim);
            ensure!(
                fits,
                Error::shape("cat", format!("{:?} and {:?} differ outside dimension {dim}", first.shape(), tensor.shape()))
            );
            total = total.saturating_add(tensor.shape()[dim]);
        }
        let mut dims = first.shape().to_vec();
        dims[dim] = total;
        let mut out = Tensor::uninit(Shape::new(&dims)?, first.dtype(), first.device())?;
        let packed = tensors.iter().map(|tensor| tensor.detach().contiguous()).collect::<Result<Vec<_>>>()?;
        match first.dtype() {
            DType::I64 => join::<i64>(&packed, dim, &mut out)?,
            DType::Bool => join::<bool>(&packed, dim, &mut out)?,
            float => dispatch_float!("cat", float, T, join::<T>(&packed, dim, &mut out))?,
        }
        let sizes = tensors.iter().map(|tensor| tensor.shape()[dim]).collect();
        record("cat", out, tensors, |_| CatBackward { sizes, dim })
    }

    /// Adds a tensor of the same shape and dtype, in place if no other handle shares the values.
    pub(crate) fn accumulate(self, value: &Tensor) -> Result<Tensor> {
        let whole = Part { dim: 0, start: 0, len: self.shape().first().copied().unwrap_or(1) };
        self.accumulate_part(whole, value)
    }

    /// Adds a tensor to a part of this one, in place if no other handle shares the values.
    pub(crate) fn accumulate_part(mut self, part: Part, value: &Tensor) -> Result<Tensor> {
        let inside = |&size: &usize| part.start.checked_add(part.len).is_some_and(|end| end <= size);
        ensure!(
            self.rank() == 0 || self.shape().get(part.dim).is_some_and(inside),
            Error::shape("accumulate", format!("{part:?} is no part of a gradient of shape {:?}", self.shape()))
        );
        let expected = if self.rank() == 0 { *self.shape() } else { self.shape().with_dim(part.dim, part.len) };
        ensure!(
            expected == *value.shape() && self.dtype() == value.dtype(),
            Error::shape(
                "accumulate",
                format!(
                    "a gradient of shape {:?} {} was given where {expected:?} {} is needed",
                    value.shape(),
                    value.dtype(),
                    self.dtype()
                )
            )
        );
        let value = value.detach().contiguous()?;
        if !self.is_unique() {
            let mut copy = self.uninit_like()?;
            dispatch_float!("accumulate", self.dtype(), T, pack::<T>(&self, &mut copy))?;
            self = copy;
        }
        let inner: usize = self.shape().iter().skip(part.dim + 1).product();
        let width = self.shape().get(part.dim).copied().unwrap_or(1) * inner;
        let (start, len) = (part.start * inner, part.len * inner);
        dispatch_float!("accumulate", self.dtype(), T, {
            let value = value.values::<T>()?;
            let sum = self.values_mut::<T>()?;
            if len == sum.len() {
                cpu::for_rows(sum, 1, 1, |at, sum| add_assign::<T>(sum, &value[at..at + sum.len()]));
            } else if len > 0 {
                cpu::for_rows(sum, width, len, |row, rows| {
                    for (index, sum) in rows.chunks_exact_mut(width).enumerate() {
                        add_assign::<T>(&mut sum[start..start + len], &value[(row + index) * len..][..len]);
                    }
                });
            }
            Ok(())
        })?;
        Ok(self)
    }
}

/// Checks that two tensors have one dtype and one device.
pub(crate) fn same_kind(op: &'static str, a: &Tensor, b: &Tensor) -> Result<()> {
    ensure!(
        a.dtype() == b.dtype(),
        Error::dtype(op, format!("the tensors are {} and {}; convert one with `to_dtype`", a.dtype(), b.dtype()))
    );
    ensure!(
        a.device() == b.device(),
        Error::Device { op, message: format!("the tensors are on {} and {}; move one", a.device(), b.device()) }
    );
    Ok(())
}

fn pack<E: Element>(x: &Tensor, out: &mut Tensor) -> Result<()> {
    let from = x.storage::<E>()?;
    cpu::for_strided(out.values_mut::<E>()?, x.shape(), [x.layout()], |run, [start], [step]| {
        if step == 1 {
            run.copy_from_slice(&from[start..start + run.len()]);
        } else {
            for (index, to) in run.iter_mut().enumerate() {
                *to = from[start + index * step];
            }
        }
    });
    Ok(())
}

fn join<E: Element>(tensors: &[Tensor], dim: usize, out: &mut Tensor) -> Result<()> {
    let shape = *out.shape();
    let inner: usize = shape[dim + 1..].iter().product();
    let width = shape[dim] * inner;
    let parts = tensors
        .iter()
        .map(|tensor| Ok((tensor.values::<E>()?, tensor.shape()[dim] * inner)))
        .collect::<Result<Vec<_>>>()?;
    cpu::for_rows(out.values_mut::<E>()?, width, width, |row, rows| {
        for (index, mut to) in rows.chunks_exact_mut(width).enumerate() {
            for &(from, len) in &parts {
                let (part, rest) = to.split_at_mut(len);
                part.copy_from_slice(&from[(row + index) * len..][..len]);
                to = rest;
            }
        }
    });
    Ok(())
}

/// Every conversion goes through f64, which holds each of the types exactly (integers up to 2⁵³).
fn convert_to<S: Copy + Sync>(from: &[S], widen: impl Fn(S) -> f64 + Sync, out: &mut Tensor) -> Result<()> {
    match out.dtype() {
        DType::I64 => convert(from, out.values_mut::<i64>()?, |x| widen(x) as i64),
        DType::Bool => convert(from, out.values_mut::<bool>()?, |x| (widen(x) != 0.0) as u8),
        float => dispatch_float!("to_dtype", float, T, {
            // Not `T::from_f64`: the half types have a method of that name, which cuts bits off before it rounds.
            convert(from, out.values_mut::<T>()?, |x| <T as Float>::from_f64(widen(x)));
            Ok(())
        })?,
    }
    Ok(())
}

fn convert<S: Copy + Sync, R: Send>(from: &[S], to: &mut [R], f: impl Fn(S) -> R + Sync) {
    cpu::for_rows(to, 1, 1, |start, to| {
        for (to, &from) in to.iter_mut().zip(&from[start..]) {
            *to = f(from);
        }
    });
}

vectorized! {
    fn add_assign<T: Float>(sum: &mut [T], value: &[T]) {
        for (sum, value) in sum.iter_mut().zip(value) {
            *sum = T::from_acc(sum.to_acc() + value.to_acc());
        }
    }
}

struct CopyBackward {
    dtype: DType,
}

impl Backward for CopyBackward {
    fn name(&self) -> &'static str {
        "copy"
    }

    fn backward(self: Box<Self>, grad: Tensor, _need: &[bool]) -> Result<Contributions> {
        grad.to_dtype(self.dtype).map(Contributions::one)
    }
}

struct CatBackward {
    sizes: Vec<usize>,
    dim: usize,
}

impl Backward for CatBackward {
    fn name(&self) -> &'static str {
        "cat"
    }

    fn backward(self: Box<Self>, grad: Tensor, _need: &[bool]) -> Result<Contributions> {
        let parts = grad.split(&self.sizes, self.dim as isize)?;
        Ok(Contributions::new(parts.into_iter().map(Contribution::Whole).collect()))
    }
}
