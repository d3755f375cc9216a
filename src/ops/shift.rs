//! Token shift: chunks of features move along the sequence.

use crate::{
    DType, Device, Error, Result, Tensor,
    autograd::{Backward, InputGrads, record_cheap_after},
    collect::CollectVec,
    device::{Grid, args, cpu, size32},
    dtype::{Float, dispatch_float},
    error::ensure,
};

impl Tensor {
    /// Moves chunks of features along the sequence: chunk `t`, of `dim / amounts` features, by `amounts[t]` positions
    /// (positive: later). Zeros fill the gaps; leftover features stay.
    ///
    /// A position where `mask` is `false` counts as zeros for every move by an amount other than 0.
    ///
    /// Shapes: `[b, n, dim] → [b, n, dim]`, mask `[b, n]` Bool. Saves: the mask.
    /// Errors: another rank, no amounts or more than features, a mask of another shape or dtype, or a dtype that is
    /// not float.
    pub fn shift_tokens(&self, amounts: &[isize], mask: Option<&Tensor>) -> Result<Tensor> {
        const OP: &str = "shift_tokens";
        ensure!(self.rank() == 3, Error::shape(OP, format_args!("expected [batch, n, dim], got {:?}", self.shape())));
        self.dtype().expect_float(OP)?;
        let (batch, n, dim) = (self.shape()[0], self.shape()[1], self.shape()[2]);
        ensure!(
            (1..=dim).contains(&amounts.len()),
            Error::argument(
                OP,
                format_args!("expected 1 to {dim} amounts, one per chunk of features, got {amounts:?}")
            )
        );
        if let Some(mask) = mask {
            ensure!(
                **mask.shape() == [batch, n] && mask.dtype() == DType::Bool,
                Error::shape(
                    OP,
                    format_args!("expected a bool mask [{batch}, {n}], got {:?} {}", mask.shape(), mask.dtype())
                )
            );
        }
        let x = self.contiguous()?;
        let mask = mask.map(Tensor::contiguous).transpose()?;
        // A move by the whole sequence or further leaves nothing.
        let furthest = n as isize;
        let amounts: Vec<isize> = amounts.iter().map(|amount| (*amount).clamp(-furthest, furthest)).collect_vec();
        let y = moved(&x, &amounts, Masked::Source(mask.as_ref()))?;
        let rule = ShiftTokensBackward { amounts, mask };
        let again = {
            let rule = rule.clone();
            move |x| moved(&x, &rule.amounts, Masked::Source(rule.mask.as_ref()))
        };
        record_cheap_after(OP, y, &x, |_| rule, again)
    }
}

/// The end of a move that the mask applies to.
enum Masked<'a> {
    Source(Option<&'a Tensor>),
    Target(Option<&'a Tensor>),
}

fn moved(x: &Tensor, amounts: &[isize], masked: Masked) -> Result<Tensor> {
    let (n, dim) = (x.shape()[1], x.shape()[2]);
    let chunk = dim / amounts.len();
    let (mask, about_source) = match masked {
        Masked::Source(mask) => (mask, true),
        Masked::Target(mask) => (mask, false),
    };
    let mut y = x.uninit_like()?;
    if let Device::Gpu(gpu) = x.device() {
        let rows = x.numel() / dim;
        let table = Tensor::constant_on(*gpu, &format!("shift_tokens {amounts:?}"), amounts.len(), || {
            Ok(amounts.iter().map(|&amount| amount as i64).collect_vec())
        })?;
        let sizes = (rows as i64, size32(n)?, size32(dim)?, size32(amounts.len())?, size32(chunk)?);
        gpu.kernel("shift_tokens", &[("DTYPE", x.dtype().name())])?.launch(
            Grid::rows(rows, dim),
            args![&mut y, x, mask, &table, sizes.0, sizes.1, sizes.2, sizes.3, sizes.4, u32::from(about_source)],
        )?;
        return Ok(y);
    }
    let mask = mask.map(Tensor::values::<bool>).transpose()?;
    dispatch_float!("shift_tokens", x.dtype(), T, {
        let from = x.values::<T>()?;
        cpu::for_rows(y.values_mut::<T>()?, dim, dim, |first, rows| {
            for (index, y) in rows.chunks_exact_mut(dim).enumerate() {
                let row = first + index;
                y.copy_from_slice(&from[row * dim..][..dim]);
                for (y, (t, &amount)) in y.chunks_exact_mut(chunk).zip(amounts.iter().enumerate()) {
                    if amount == 0 {
                        continue;
                    }
                    let position = (row % n).checked_add_signed(-amount).filter(|&position| position < n);
                    let source = position.map(|position| row - row % n + position);
                    let kept =
                        |source: usize| mask.is_none_or(|mask| mask[if about_source { source } else { row }] != 0);
                    match source.filter(|&source| kept(source)) {
                        Some(source) => y.copy_from_slice(&from[source * dim + t * chunk..][..chunk]),
                        None => y.fill(T::from_f64(0.0)),
                    }
                }
            }
        });
        Ok(())
    })?;
    Ok(y)
}

#[derive(Clone)]
struct ShiftTokensBackward {
    amounts: Vec<isize>,
    mask: Option<Tensor>,
}

impl Backward for ShiftTokensBackward {
    fn name(&self) -> &'static str {
        "shift_tokens"
    }

    /// Moves the gradient back; masked positions get none.
    fn backward(self: Box<Self>, grad: Tensor, _need: &[bool]) -> Result<InputGrads> {
        let amounts: Vec<isize> = self.amounts.iter().map(|amount| -amount).collect_vec();
        moved(&grad.contiguous()?, &amounts, Masked::Target(self.mask.as_ref())).map(InputGrads::one)
    }
}
