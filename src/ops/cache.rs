//! Buffers that grow in place along a sequence, for decoding token by token: rows are written at the end of each
//! sequence of a batch, and read from there. Not recorded on a tape: nothing here has a gradient.

use crate::{
    DType, Device, Element, Error, Result, Tensor,
    autograd::{computed, discrete},
    collect::CollectVec,
    device::{Grid, args, cpu, simd::vectorized, size32},
    dtype::{Float, dispatch_float},
    error::ensure,
    shape::Shape,
    tensor::Storage,
};

const OP: &str = "cache";

/// Checks the lengths of the sequences of a batch, `[b]` I64, each at least 0. Everything below counts from there.
fn check_lengths(lengths: &Tensor, batch: usize, like: &Tensor) -> Result<()> {
    ensure!(
        **lengths.shape() == [batch] && lengths.dtype() == DType::I64 && lengths.is_contiguous(),
        Error::shape(
            OP,
            format_args!("expected lengths [{batch}] of i64, got {:?} {}", lengths.shape(), lengths.dtype())
        )
    );
    ensure!(
        lengths.device() == like.device(),
        Error::device(OP, format_args!("lengths are on {} but values are on {}", lengths.device(), like.device()))
    );
    Ok(())
}

/// Rows `[b, heads, n, d]` with packed features.
fn packed_rows(x: &Tensor) -> Result<Tensor> {
    let x = x.detach();
    if x.layout().has_packed_rows() { Ok(x) } else { x.contiguous() }
}

impl Tensor {
    /// Writes rows `[b, heads, n, d]` into this buffer, `[b, heads, capacity, d]`: row `i` of sequence `b` goes to
    /// position `offset + lengths[b] + i`. Rows that do not fit are dropped.
    ///
    /// Errors: shapes, dtypes or devices that differ, or a view of the buffer that is still held.
    pub(crate) fn write_rows(&mut self, rows: &Tensor, lengths: &Tensor, offset: usize) -> Result<()> {
        let (&[batch, heads, capacity, d], &[b, h, n, width]) = (&self.shape()[..], &rows.shape()[..]) else {
            return Err(Error::shape(OP, format_args!("cannot write {:?} into {:?}", rows.shape(), self.shape())));
        };
        ensure!(
            [b, h, width] == [batch, heads, d] && self.dtype() == rows.dtype() && self.device() == rows.device(),
            Error::shape(
                OP,
                format_args!(
                    "cannot write {:?} {} into {:?} {}",
                    rows.shape(),
                    rows.dtype(),
                    self.shape(),
                    self.dtype()
                )
            )
        );
        check_lengths(lengths, batch, self)?;
        ensure!(self.dtype() != DType::I64, Error::dtype(OP, "expected floats or bool, got i64"));
        ensure!(self.is_unique(), Error::argument(OP, "the buffer cannot be written to while a view of it exists"));
        if rows.numel() == 0 || capacity == 0 {
            return Ok(());
        }
        let rows = packed_rows(rows)?;
        match (self.device().clone(), self.dtype()) {
            (Device::Gpu(gpu), dtype) => {
                let sizes = (rows.numel() as i64, size32(heads)?, size32(n)?, size32(d)?, capacity as i64);
                let layout = *rows.layout();
                gpu.kernel("cache_write", &[("DTYPE", dtype.name())])?.launch(
                    Grid::elements(rows.numel()),
                    args![
                        self,
                        Storage(&rows),
                        lengths,
                        &layout,
                        sizes.0,
                        sizes.1,
                        sizes.2,
                        sizes.3,
                        sizes.4,
                        offset as i64
                    ],
                )
            }
            (_, DType::Bool) => write::<bool>(self, &rows, lengths, offset),
            (_, float) => dispatch_float!(OP, float, T, write::<T>(self, &rows, lengths, offset)),
        }
    }

    /// Rotates rows `[b, heads, n, d]` like [`Tensor::rotary`], row `i` of sequence `b` by position `offset +
    /// lengths[b] + i` of a table of [`rotary_table`](super::rotary::rotary_table).
    ///
    /// Errors: other shapes, dtypes or devices.
    pub(crate) fn rotate_rows(&self, table: &Tensor, lengths: &Tensor, offset: usize) -> Result<Tensor> {
        let (&[batch, heads, n, d], &[positions, width]) = (&self.shape()[..], &table.shape()[..]) else {
            return Err(Error::shape(OP, format_args!("cannot rotate {:?} by {:?}", self.shape(), table.shape())));
        };
        ensure!(
            width <= d && positions > 0 && table.dtype() == self.dtype().accumulator() && self.dtype().is_float(),
            Error::shape(OP, format_args!("cannot rotate {:?} by {:?} {}", self.shape(), table.shape(), table.dtype()))
        );
        check_lengths(lengths, batch, self)?;
        discrete(OP, &[self, table])?;
        let x = packed_rows(self)?;
        let mut y = x.uninit_like()?;
        if let Device::Gpu(gpu) = *x.device() {
            let sizes = (x.numel() as i64, size32(heads)?, size32(n)?, size32(d)?, size32(width / 2)?);
            gpu.kernel("cache_rotate", &[("DTYPE", x.dtype().name())])?.launch(
                Grid::elements(x.numel()),
                args![
                    &mut y,
                    Storage(&x),
                    table,
                    lengths,
                    x.layout(),
                    sizes.0,
                    sizes.1,
                    sizes.2,
                    sizes.3,
                    sizes.4,
                    positions as i64,
                    offset as i64
                ],
            )?;
            return computed(OP, y, &[self]);
        }
        let starts = lengths.values::<i64>()?;
        dispatch_float!(OP, x.dtype(), T, {
            let (from, layout) = (x.storage::<T>()?, x.layout());
            let table = table.values::<<T as Float>::Acc>()?;
            cpu::for_rows(y.values_mut::<T>()?, d, 4 * d, |first, rows| {
                for (index, row) in rows.chunks_exact_mut(d).enumerate() {
                    let at = first + index;
                    let position = offset + starts[at / (heads * n)] as usize + at % n;
                    let start = layout.row_offset(at);
                    row.copy_from_slice(&from[start..start + d]);
                    rotate_row::<T>(row, &table[position.min(positions - 1) * width..][..width]);
                }
            });
            Ok(())
        })?;
        computed(OP, y, &[self])
    }

    /// Returns the rows after the lengths of this buffer of inputs, `[b, 1, capacity, dim]`, with their features
    /// shifted as by [`Tensor::shift_tokens`]: `[b, n, dim]`. `mask` `[b, capacity]`: `false` counts as zeros for the
    /// shifts.
    ///
    /// Errors: other shapes, dtypes or devices, or amounts that move tokens to earlier positions.
    pub(crate) fn shift_rows(
        &self,
        lengths: &Tensor,
        n: usize,
        amounts: &[isize],
        mask: Option<&Tensor>,
    ) -> Result<Tensor> {
        let &[batch, _, capacity, dim] = &self.shape()[..] else {
            return Err(Error::shape(
                OP,
                format_args!("expected inputs [batch, 1, capacity, dim], got {:?}", self.shape()),
            ));
        };
        ensure!(
            (1..=dim).contains(&amounts.len()) && amounts.iter().all(|&amount| amount >= 0) && capacity > 0,
            Error::argument(OP, format_args!("cannot shift {dim} features of a cached sequence by {amounts:?}"))
        );
        if let Some(mask) = mask {
            ensure!(
                mask.numel() == batch * capacity && mask.dtype() == DType::Bool && mask.is_contiguous(),
                Error::shape(OP, format_args!("expected a bool mask [{batch}, {capacity}], got {:?}", mask.shape()))
            );
        }
        check_lengths(lengths, batch, self)?;
        let chunk = dim / amounts.len();
        let mut y = Tensor::uninit(Shape::new(&[batch, n, dim])?, self.dtype(), self.device())?;
        if let Device::Gpu(gpu) = *self.device() {
            let table = Tensor::constant_on(gpu, &format!("shift_tokens {amounts:?}"), amounts.len(), || {
                Ok(amounts.iter().map(|&amount| amount as i64).collect_vec())
            })?;
            let sizes = (y.numel() as i64, size32(n)?, size32(dim)?, size32(amounts.len())?, size32(chunk)?);
            gpu.kernel("cache_shift", &[("DTYPE", self.dtype().name())])?.launch(
                Grid::elements(y.numel()),
                args![
                    &mut y,
                    self,
                    mask,
                    &table,
                    lengths,
                    sizes.0,
                    sizes.1,
                    sizes.2,
                    sizes.3,
                    sizes.4,
                    capacity as i64
                ],
            )?;
            return computed(OP, y, &[self]);
        }
        let starts = lengths.values::<i64>()?;
        let mask = mask.map(Tensor::values::<bool>).transpose()?;
        dispatch_float!(OP, self.dtype(), T, {
            let from = self.values::<T>()?;
            cpu::for_rows(y.values_mut::<T>()?, dim, dim, |first, rows| {
                for (index, y) in rows.chunks_exact_mut(dim).enumerate() {
                    let (b, i) = ((first + index) / n, (first + index) % n);
                    let position = (starts[b] as usize + i).min(capacity - 1);
                    let row = |position: usize| &from[(b * capacity + position) * dim..][..dim];
                    y.copy_from_slice(row(position));
                    for (t, (y, &amount)) in y.chunks_exact_mut(chunk).zip(amounts).enumerate() {
                        if amount == 0 {
                            continue;
                        }
                        let kept = |&source: &usize| mask.is_none_or(|mask| mask[b * capacity + source] != 0);
                        match position.checked_sub(amount as usize).filter(kept) {
                            Some(source) => y.copy_from_slice(&row(source)[t * chunk..][..chunk]),
                            None => y.fill(T::from_f64(0.0)),
                        }
                    }
                }
            });
            Ok(())
        })?;
        computed(OP, y, &[self])
    }
}

fn write<E: Element>(buffer: &mut Tensor, rows: &Tensor, lengths: &Tensor, offset: usize) -> Result<()> {
    let [heads, capacity, d, n] = [buffer.shape()[1], buffer.shape()[2], buffer.shape()[3], rows.shape()[2]];
    let (starts, from, layout) = (lengths.values::<i64>()?, rows.storage::<E>()?, *rows.layout());
    cpu::for_rows(buffer.values_mut::<E>()?, capacity * d, n * d, |first, buffers| {
        for (index, buffer) in buffers.chunks_exact_mut(capacity * d).enumerate() {
            let head = first + index;
            let start = offset + starts[head / heads] as usize;
            for i in 0..n.min(capacity.saturating_sub(start)) {
                let at = layout.row_offset(head * n + i);
                buffer[(start + i) * d..][..d].copy_from_slice(&from[at..at + d]);
            }
        }
    });
    Ok(())
}

vectorized! {
    fn rotate_row<T: Float>(row: &mut [T], table: &[T::Acc]) {
        let pairs = table.len() / 2;
        let (cosines, sines) = table.split_at(pairs);
        let (a, b) = row[..2 * pairs].split_at_mut(pairs);
        for (((a, b), &cos), &sin) in a.iter_mut().zip(b).zip(cosines).zip(sines) {
            let (x, y) = (a.to_acc(), b.to_acc());
            *a = T::from_acc(x * cos - y * sin);
            *b = T::from_acc(y * cos + x * sin);
        }
    }
}
