//! Copies: packing strided tensors, converting dtypes, joining, and the sums in place that the tape needs.

use crate::{
    DType, Device, Error, Result, Tensor,
    autograd::{Backward, GradSlice, InputGrad, InputGrads, discrete, record},
    device::{Gpu, Grid, args, cpu, simd::vectorized, size32},
    dtype::{Element, Float, dispatch_float},
    error::ensure,
    shape::{Layout, Shape, collapse_layouts},
    tensor::Storage,
};

impl Tensor {
    /// The same values packed in row-major order; the tensor itself if it is packed already.
    pub fn contiguous(&self) -> Result<Tensor> {
        if self.is_contiguous() {
            return Ok(self.clone());
        }
        let out = pack(self)?;
        record("contiguous", out, &[self], |_| CopyBackward { dtype: self.dtype() })
    }

    /// The values as another dtype: floats round to nearest even, once (PyTorch rounds f64 to f32 before a half type), float
    /// to i64 truncates, to bool asks for "not zero", which NaN is. What i64 cannot hold becomes its nearest number, NaN
    /// becomes 0; PyTorch leaves both undefined.
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
        match (x.device(), x.dtype()) {
            (Device::Cpu, DType::I64) => convert_to(x.values::<i64>()?, |x| x as f64, &mut out)?,
            (Device::Cpu, DType::Bool) => convert_to(x.values::<bool>()?, |x| x as f64, &mut out)?,
            (Device::Cpu, float) => dispatch_float!("to_dtype", float, T, {
                convert_to(x.values::<T>()?, |x| crate::dtype::Real::to_f64(x.to_acc()), &mut out)
            })?,
            (Device::Gpu(gpu), from) => {
                let n = x.numel();
                gpu.kernel("convert_elements", &[("DTYPE", dtype.name()), ("FROM", from.name())])?
                    .launch(Grid::packets(n, dtype), args![&mut out, &x, n as i64])?;
            }
        }
        // Recorded against the packed tensor: if that was a copy, its own node follows.
        record("to_dtype", out, &[&x], |_| CopyBackward { dtype: self.dtype() })
    }

    /// Joins tensors along a dimension; negative ones count from the end. As in PyTorch, a tensor of shape `[0]` joins
    /// tensors of any rank, to which it adds nothing.
    ///
    /// Errors: no tensors, scalars, or shapes, dtypes or devices that differ elsewhere.
    pub fn cat(tensors: &[&Tensor], dim: isize) -> Result<Tensor> {
        let (out, sizes, dim) = Self::joined(tensors, dim)?;
        let shapes = || tensors.iter().map(|tensor| *tensor.shape()).collect();
        record("cat", out, tensors, |_| CatBackward { sizes, shapes: shapes(), dim })
    }

    /// As [`Tensor::cat`], as a part of another op: a constant, with the sizes along the dimension, and which one it is.
    pub(crate) fn joined(tensors: &[&Tensor], dim: isize) -> Result<(Tensor, Vec<usize>, usize)> {
        let adds_nothing = |tensor: &Tensor| *tensor.shape() == [0];
        let adds_something = tensors.iter().find(|tensor| !adds_nothing(tensor));
        let Some(&first) = adds_something.or(tensors.first()) else {
            return Err(Error::argument("cat", "expected at least one tensor"));
        };
        let dim = first.shape().dim(dim, "cat")?;
        let mut total = 0usize;
        for tensor in tensors {
            same_kind("cat", first, tensor)?;
            if adds_nothing(tensor) {
                continue;
            }
            let fits = tensor.rank() == first.rank() && tensor.shape().without(dim) == first.shape().without(dim);
            ensure!(
                fits,
                Error::shape(
                    "cat",
                    format!("{:?} and {:?} differ outside dimension {dim}", first.shape(), tensor.shape())
                )
            );
            total = total.saturating_add(tensor.shape()[dim]);
        }
        let mut dims = first.shape().to_vec();
        dims[dim] = total;
        let mut out = Tensor::uninit(Shape::new(&dims)?, first.dtype(), first.device())?;
        let size = |tensor: &&Tensor| if adds_nothing(tensor) { 0 } else { tensor.shape()[dim] };
        let sizes: Vec<usize> = tensors.iter().map(size).collect();
        match (first.device(), first.dtype()) {
            (Device::Cpu, DType::I64) => join::<i64>(tensors, dim, &mut out)?,
            (Device::Cpu, DType::Bool) => join::<bool>(tensors, dim, &mut out)?,
            (Device::Cpu, float) => dispatch_float!("cat", float, T, join::<T>(tensors, dim, &mut out))?,
            (Device::Gpu(gpu), _) => {
                let (whole, mut start) = (Layout::contiguous(*out.shape()), 0);
                for (tensor, &size) in tensors.iter().zip(&sizes).filter(|(_, size)| **size > 0) {
                    launch_strided(*gpu, &mut out, &whole.narrow(dim, start, size), tensor, false)?;
                    start += size;
                }
            }
        }
        Ok((out, sizes, dim))
    }

    /// Adds a tensor of the same shape and dtype, in place if no other handle shares the values.
    pub(crate) fn accumulate(self, value: &Tensor) -> Result<Tensor> {
        let whole = GradSlice { dim: 0, start: 0, len: self.shape().first().copied().unwrap_or(1) };
        self.accumulate_part(whole, value)
    }

    /// Adds a tensor to a part of this one, in place if no other handle shares the values.
    pub(crate) fn accumulate_part(mut self, part: GradSlice, value: &Tensor) -> Result<Tensor> {
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
        self.dtype().expect_float("accumulate")?;
        if !self.is_unique() {
            self = pack(&self)?;
        }
        match *self.device() {
            Device::Cpu => dispatch_float!("accumulate", self.dtype(), T, add_part::<T>(&mut self, part, value))?,
            Device::Gpu(gpu) => {
                let whole = Layout::contiguous(*self.shape());
                let layout = if self.rank() == 0 { whole } else { whole.narrow(part.dim, part.start, part.len) };
                launch_strided(gpu, &mut self, &layout, value, true)?;
            }
        }
        Ok(self)
    }
}

/// Checks that two tensors have one dtype and one device.
pub(crate) fn same_kind(op: &'static str, a: &Tensor, b: &Tensor) -> Result<()> {
    ensure!(
        a.dtype() == b.dtype(),
        Error::dtype(op, format!("the tensors are {} and {}; convert one with `to_dtype`", a.dtype(), b.dtype()))
    );
    same_device(op, a, b)
}

/// Checks that two tensors are on one device.
pub(crate) fn same_device(op: &'static str, a: &Tensor, b: &Tensor) -> Result<()> {
    ensure!(
        a.device() == b.device(),
        Error::Device { op, message: format!("the tensors are on {} and {}; move one", a.device(), b.device()) }
    );
    Ok(())
}

/// A packed copy.
pub(super) fn pack(x: &Tensor) -> Result<Tensor> {
    let mut out = x.uninit_like()?;
    match (x.device(), x.dtype()) {
        (Device::Cpu, DType::I64) => pack_into::<i64>(x, &mut out)?,
        (Device::Cpu, DType::Bool) => pack_into::<bool>(x, &mut out)?,
        (Device::Cpu, float) => dispatch_float!("contiguous", float, T, pack_into::<T>(x, &mut out))?,
        (Device::Gpu(gpu), _) => {
            launch_strided(*gpu, &mut out, &Layout::contiguous(*x.shape()), x, false)?;
        }
    }
    Ok(out)
}

/// Copies a tensor to a part of a packed one, whose elements `part` counts from the first, or adds it to that.
fn launch_strided(gpu: &dyn Gpu, to: &mut Tensor, part: &Layout, from: &Tensor, add: bool) -> Result<()> {
    let (n, options) = (from.numel(), [("DTYPE", from.dtype().name())]);
    let [part, layout] = collapse_layouts(from.shape(), [part, from.layout()]);
    if let Some(dim) = turned(&part, &layout) {
        let last = part.shape.rank() - 1;
        let (rows, columns) = (part.shape[dim], part.shape[last]);
        let steps = (part.strides[dim] as i64, layout.strides[last] as i64);
        let firsts = [part, layout].map(|layout| layout.squeeze(last).squeeze(dim));
        let batches = firsts[0].shape.numel();
        let side = if from.dtype().size() == 8 { 32 } else { 64 };
        let tiles = batches * rows.div_ceil(side) * columns.div_ceil(side);
        let args = args![
            to,
            Storage(from),
            &firsts[0],
            &firsts[1],
            batches as i64,
            size32(rows)?,
            size32(columns)?,
            steps.0,
            steps.1,
            u32::from(add)
        ];
        return gpu.kernel("copy_transposed", &options)?.launch(Grid::tiles(tiles), args);
    }
    gpu.kernel(if add { "copy_add" } else { "copy_strided" }, &options)?
        .launch(Grid::packets(n, from.dtype()), args![to, Storage(from), &part, &layout, n as i64])
}

/// The least of both sides that tiles of `copy_transposed` pay for.
const LONG: usize = 16;

/// The dimension along which `from` is packed, if `to` is packed along the last one and both are long enough for tiles.
fn turned(to: &Layout, from: &Layout) -> Option<usize> {
    let last = to.shape.rank().checked_sub(1)?;
    let long = |dim: usize| to.shape[dim] >= LONG;
    let across = to.strides[last] == 1 && from.strides[last] > 1 && long(last);
    (0..last).find(|&dim| across && from.strides[dim] == 1 && long(dim))
}

fn pack_into<E: Element>(x: &Tensor, out: &mut Tensor) -> Result<()> {
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

fn join<E: Element>(tensors: &[&Tensor], dim: usize, out: &mut Tensor) -> Result<()> {
    let shape = *out.shape();
    let of_this_rank = |tensor: &&&Tensor| tensor.rank() == shape.rank();
    let packed = |tensor: &&Tensor| tensor.detach().contiguous();
    let tensors = tensors.iter().filter(of_this_rank).map(packed).collect::<Result<Vec<_>>>()?;
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

/// Adds to a part of a packed tensor that no other handle shares.
fn add_part<T: Float>(sum: &mut Tensor, part: GradSlice, value: &Tensor) -> Result<()> {
    let inner: usize = sum.shape().iter().skip(part.dim + 1).product();
    let width = sum.shape().get(part.dim).copied().unwrap_or(1) * inner;
    let (start, len) = (part.start * inner, part.len * inner);
    let value = value.detach().contiguous()?;
    let (sum, value) = (sum.values_mut::<T>()?, value.values::<T>()?);
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

    fn backward(self: Box<Self>, grad: Tensor, _need: &[bool]) -> Result<InputGrads> {
        grad.to_dtype(self.dtype).map(InputGrads::one)
    }
}

struct CatBackward {
    sizes: Vec<usize>,
    shapes: Vec<Shape>,
    dim: usize,
}

impl Backward for CatBackward {
    fn name(&self) -> &'static str {
        "cat"
    }

    fn backward(self: Box<Self>, grad: Tensor, _need: &[bool]) -> Result<InputGrads> {
        let parts = grad.split(&self.sizes, self.dim as isize)?;
        // The shape is another one where nothing was added.
        let whole = |(part, shape): (Tensor, &Shape)| {
            Ok(InputGrad::Whole(if part.shape() == shape { part } else { part.reshape(*shape)? }))
        };
        Ok(InputGrads::new(parts.into_iter().zip(&self.shapes).map(whole).collect::<Result<_>>()?))
    }
}
