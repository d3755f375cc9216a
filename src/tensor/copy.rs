//! Raw copies: packing strided tensors, converting dtypes, moving between devices, and sums in place. All results are
//! constants; the ops of the same names record their gradients.

use super::{Storage, Tensor};
use crate::{
    Error, Result,
    device::{
        Device, Gpu, Grid, args, cpu,
        f16_rows::{in_f32, is_f16},
        floats::Floats,
        rows::convert_floats,
        simd::vectorized,
        size32,
    },
    dtype::{DType, Element, Float, Pod, dispatch_float},
    error::ensure,
    shape::{Layout, collapse_layouts},
};

/// Elements `start..start + len` along dimension `dim` of a tensor.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct GradSlice {
    /// The dimension, counted from 0.
    pub dim: usize,
    /// The first element.
    pub start: usize,
    /// Number of elements.
    pub len: usize,
}

impl Tensor {
    /// Returns a constant with the same values, packed in row-major order: shares this handle's storage if it is packed
    /// already.
    pub(crate) fn packed(&self) -> Result<Tensor> {
        if self.is_contiguous() {
            return Ok(self.detach());
        }
        self.packed_copy()
    }

    /// Like [`Tensor::packed`], but always in new storage.
    pub(crate) fn packed_copy(&self) -> Result<Tensor> {
        let mut out = self.uninit_like()?;
        match (self.device(), self.dtype()) {
            (Device::Cpu, DType::I64) => pack_into::<i64>(self, &mut out)?,
            (Device::Cpu, DType::Bool) => pack_into::<bool>(self, &mut out)?,
            (Device::Cpu, float) => dispatch_float!("contiguous", float, T, pack_into::<T>(self, &mut out))?,
            (Device::Gpu(gpu), _) => {
                launch_strided(*gpu, &mut out, &Layout::contiguous(*self.shape()), self, false)?;
            }
        }
        Ok(out)
    }

    /// Returns a constant with the values of this packed tensor in another dtype, converted as by [`Tensor::to_dtype`].
    pub(crate) fn converted(&self, dtype: DType) -> Result<Tensor> {
        if dtype == self.dtype() {
            return Ok(self.detach());
        }
        let mut out = Tensor::uninit(*self.shape(), dtype, self.device())?;
        match (self.device(), self.dtype()) {
            (Device::Cpu, DType::I64) => convert_to(self.values::<i64>()?, |x| x as f64, &mut out)?,
            (Device::Cpu, DType::Bool) => convert_to(self.values::<bool>()?, |x| x as f64, &mut out)?,
            (Device::Cpu, _) if dtype.is_float() => {
                convert_floats(self.floats("to_dtype")?, out.floats_mut("to_dtype")?);
            }
            (Device::Cpu, _) if dtype == DType::I64 => {
                convert_from(self.floats("to_dtype")?, out.values_mut::<i64>()?, |x| x as i64);
            }
            (Device::Cpu, _) => {
                convert_from(self.floats("to_dtype")?, out.values_mut::<bool>()?, |x| u8::from(x != 0.0));
            }
            (Device::Gpu(gpu), from) => {
                let n = self.numel();
                gpu.kernel("convert_elements", &[("DTYPE", dtype.name()), ("FROM", from.name())])?
                    .launch(Grid::packets(n, dtype), args![&mut out, self, n as i64])?;
            }
        }
        Ok(out)
    }

    /// Returns a constant with the values of this packed tensor on another device.
    pub(crate) fn moved(&self, device: &Device) -> Result<Tensor> {
        let mut y = Self::uninit(*self.shape(), self.dtype(), device)?;
        match (self.device(), device) {
            (Device::Cpu, Device::Cpu) => y.bytes_mut()?.copy_from_slice(self.bytes()?),
            (Device::Cpu, Device::Gpu(gpu)) => gpu.upload(y.address_mut()?, self.bytes()?)?,
            (Device::Gpu(gpu), Device::Cpu) => gpu.read_back(self.address()?, y.bytes_mut()?)?,
            (Device::Gpu(a), Device::Gpu(_)) if self.0.device == *device => {
                a.copy(y.address_mut()?, self.address()?, y.numel() * y.dtype().size())?;
            }
            (Device::Gpu(_), Device::Gpu(_)) => y = self.moved(&Device::Cpu)?.moved(device)?,
        }
        Ok(y)
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
            Error::shape("accumulate", format_args!("{part:?} is outside a gradient of shape {:?}", self.shape()))
        );
        let expected = if self.rank() == 0 { *self.shape() } else { self.shape().with_dim(part.dim, part.len) };
        ensure!(
            expected == *value.shape() && self.dtype() == value.dtype(),
            Error::shape(
                "accumulate",
                format_args!(
                    "the gradient is {:?} {}, expected {expected:?} {}",
                    value.shape(),
                    value.dtype(),
                    self.dtype()
                )
            )
        );
        self.dtype().expect_float("accumulate")?;
        if !self.is_unique() {
            self = self.packed_copy()?;
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
        Error::dtype(op, format_args!("the tensors are {} and {}; convert one with `to_dtype`", a.dtype(), b.dtype()))
    );
    same_device(op, a, b)
}

/// Checks that two tensors are on one device.
pub(crate) fn same_device(op: &'static str, a: &Tensor, b: &Tensor) -> Result<()> {
    ensure!(
        a.device() == b.device(),
        Error::device(
            op,
            format_args!("the tensors are on {} and {}; move one with `to_device`", a.device(), b.device())
        )
    );
    Ok(())
}

/// Copies a tensor to, or adds it to, a part of a packed tensor; `part` is the layout of that part, from the first
/// element.
pub(crate) fn launch_strided(gpu: &dyn Gpu, to: &mut Tensor, part: &Layout, from: &Tensor, add: bool) -> Result<()> {
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

/// Minimum size of both sides for which the tiles of `copy_transposed` are worth it.
const LONG: usize = 16;

/// Returns the dimension along which `from` is packed, if `to` is packed along the last one and both are long enough
/// for tiles.
fn turned(to: &Layout, from: &Layout) -> Option<usize> {
    let last = to.shape.rank().checked_sub(1)?;
    let long = |dim: usize| to.shape[dim] >= LONG;
    let across = to.strides[last] == 1 && from.strides[last] > 1 && long(last);
    (0..last).find(|&dim| across && from.strides[dim] == 1 && long(dim))
}

fn pack_into<E: Element>(x: &Tensor, out: &mut Tensor) -> Result<()> {
    let from = x.storage::<E>()?;
    let [to, layout] = collapse_layouts(x.shape(), [&Layout::contiguous(*x.shape()), x.layout()]);
    let last = to.shape.rank().saturating_sub(1);
    if last > 0 && turned(&to, &layout) == Some(last - 1) {
        let (out, width) = (out.bytes_mut()?, to.shape[last]);
        match size_of::<E::Stored>() {
            1 => pack_turned::<u8>(bytemuck::cast_slice(from), &layout, width, out),
            2 => pack_turned::<u16>(bytemuck::cast_slice(from), &layout, width, out),
            4 => pack_turned::<u32>(bytemuck::cast_slice(from), &layout, width, out),
            _ => pack_turned::<u64>(bytemuck::cast_slice(from), &layout, width, out),
        }
        return Ok(());
    }
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

/// Packs matrices of rows of `width` elements whose columns lie packed, in tiles of [`LONG`] × [`LONG`]: a line of the
/// cache is read once and written once, whatever the distance of the columns.
fn pack_turned<E: Pod + Send + Sync>(from: &[E], layout: &Layout, width: usize, out: &mut [u8]) {
    let last = layout.shape.rank() - 1;
    let (height, step) = (layout.shape[last - 1], layout.strides[last]);
    cpu::for_rows(bytemuck::cast_slice_mut::<u8, E>(out), width, width, |mut row, mut out| {
        let mut tile = [E::zeroed(); LONG * LONG];
        while !out.is_empty() {
            // The rows of a band belong to one matrix.
            let (band, rest) = out.split_at_mut(LONG.min(height - row % height).min(out.len() / width) * width);
            let mut start = layout.offset + row % height;
            let mut matrix = row / height;
            for dim in (0..last - 1).rev() {
                start += matrix % layout.shape[dim] * layout.strides[dim];
                matrix /= layout.shape[dim];
            }
            let rows = band.len() / width;
            for column in (0..width).step_by(LONG) {
                let columns = LONG.min(width - column);
                for index in 0..columns {
                    // Values are moved one by one: gathering them in vectors takes longer.
                    let from = &from[start + (column + index) * step..][..rows];
                    for (tile, from) in tile.chunks_exact_mut(LONG).zip(from) {
                        tile[index] = *from;
                    }
                }
                for (tile, band) in tile.chunks_exact(LONG).zip(band.chunks_exact_mut(width)) {
                    match band[column..].first_chunk_mut::<LONG>() {
                        Some(band) => band.copy_from_slice(tile),
                        None => copy_rest(&mut band[column..], tile),
                    }
                }
            }
            row += rows;
            out = rest;
        }
    });
}

/// Copies to the end of a row. By a call: otherwise the compiler joins it with the copy of a whole piece, whose length it
/// then does not know.
#[cold]
#[inline(never)]
fn copy_rest<E: Copy>(to: &mut [E], from: &[E]) {
    to.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
}

/// Every conversion goes through f64, which holds each of the types exactly (integers up to 2⁵³).
fn convert_to<S: Copy + Sync>(from: &[S], widen: impl Fn(S) -> f64 + Sync, out: &mut Tensor) -> Result<()> {
    match out.dtype() {
        DType::I64 => convert(from, out.values_mut::<i64>()?, |x| widen(x) as i64),
        DType::Bool => convert(from, out.values_mut::<bool>()?, |x| (widen(x) != 0.0) as u8),
        float => dispatch_float!("to_dtype", float, T, {
            // Not `T::from_f64`: the half types have a method of that name that truncates before it rounds.
            convert(from, out.values_mut::<T>()?, |x| <T as Float>::from_f64(widen(x)));
            Ok(())
        })?,
    }
    Ok(())
}

/// Converts floats by way of f64.
fn convert_from<R: Send>(from: Floats, to: &mut [R], f: impl Fn(f64) -> R + Sync) {
    const PIECE: usize = 1024;
    cpu::for_rows(to, 1, 1, |start, to| {
        let mut memory = Vec::new();
        for (index, to) in to.chunks_mut(PIECE).enumerate() {
            let first = start + index * PIECE;
            let from = from.range(first..first + to.len()).to_slice::<f64>(&mut memory);
            to.iter_mut().zip(from).for_each(|(to, from)| *to = f(*from));
        }
    });
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
    let value = value.packed()?;
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

fn add_assign<T: Float>(sum: &mut [T], value: &[T]) {
    if const { is_f16::<T>() } {
        in_f32(sum, true, [value], |sum, [value]| add_where_they_lie(sum, value));
    } else {
        add_where_they_lie(sum, value);
    }
}

vectorized! {
    fn add_where_they_lie<T: Float>(sum: &mut [T], value: &[T]) {
        for (sum, value) in sum.iter_mut().zip(value) {
            *sum = T::from_acc(sum.to_acc() + value.to_acc());
        }
    }
}
