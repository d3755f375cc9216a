//! The forward pass: statistics of each row, and the row by them.

use super::{Form, LANES, Spec, packed, rows, widen};
use crate::{
    DType, Device, Element, Result, Tensor,
    device::{Gpu, Grid, args, cpu, simd::vectorized, size32},
    dtype::{Float, Real, dispatch_float},
    ops::reduce::sum_slice,
    shape::Shape,
};

/// Results of the forward pass.
pub(super) struct Forward {
    pub(super) y: Tensor,
    /// With a residual.
    pub(super) sum: Option<Tensor>,
    /// `[rows, 2]` or `[rows, 1]`, see [`Form::statistics`]; never rounded to a half type.
    pub(super) statistics: Tensor,
}

impl Forward {
    /// The norm of `x`, or of `x + residual`; both packed.
    pub(super) fn of(op: &'static str, x: &Tensor, residual: Option<&Tensor>, spec: &Spec) -> Result<Self> {
        let shape = Shape::new(&[rows(x)?, spec.form.statistics()])?;
        let mut forward = Self {
            y: x.uninit_like()?,
            sum: residual.map(|x| x.uninit_like()).transpose()?,
            statistics: Tensor::uninit(shape, x.dtype().accumulator(), x.device())?,
        };
        match x.device() {
            Device::Cpu => dispatch_float!(op, x.dtype(), T, forward.rows::<T>(x, residual, spec))?,
            Device::Gpu(gpu) => forward.cuda(*gpu, x, residual, spec)?,
        }
        Ok(forward)
    }

    fn rows<T: Float>(&mut self, x: &Tensor, residual: Option<&Tensor>, spec: &Spec) -> Result<()> {
        let (width, per_row) = (x.dim(-1)?, spec.form.statistics());
        let weight = widen::<T>(spec.weight, width, T::Acc::ONE)?;
        let bias = widen::<T>(spec.bias, width, T::Acc::ZERO)?;
        let (x, eps) = (x.values::<T>()?, T::Acc::from_f64(spec.eps));
        let residual = residual.map(|residual| residual.values::<T>()).transpose()?;
        let (y, save) = (self.y.values_mut::<T>()?, self.statistics.values_mut::<T::Acc>()?);
        let sum = self.sum.as_mut().map(|sum| sum.values_mut::<T>()).transpose()?.unwrap_or_default();
        cpu::for_rows3(y, save, sum, (width, per_row, width), 4 * width, |row, y, statistics, sum| {
            let part = row * width..row * width + y.len();
            let residual = residual.map(|residual| &residual[part.clone()]);
            forward::<T>(&x[part], residual, &weight, &bias, spec.form, eps, y, sum, statistics);
        });
        Ok(())
    }

    fn cuda(&mut self, gpu: &dyn Gpu, x: &Tensor, residual: Option<&Tensor>, spec: &Spec) -> Result<()> {
        let (rows, columns) = (rows(x)?, x.dim(-1)?);
        let (weight, bias) = (packed(spec.weight)?, packed(spec.bias)?);
        let weights = weight.as_ref().map_or(0, Tensor::numel);
        let form = spec.form.code();
        let args = args![
            &mut self.y,
            self.sum.as_mut(),
            &mut self.statistics,
            x,
            residual,
            weight.as_ref(),
            bias.as_ref(),
            rows as i64,
            size32(columns)?,
            size32(weights)?,
            form,
            spec.eps
        ];
        gpu.kernel("norm_fwd", &[("DTYPE", x.dtype().name())])?.launch(Grid::held_rows(rows, columns, x.dtype()), args)
    }
}

vectorized! {
    /// `sum` is empty without a residual.
    fn forward<T: Float>(
        x: &[T],
        residual: Option<&[T]>,
        weight: &[T::Acc],
        bias: &[T::Acc],
        form: Form,
        eps: T::Acc,
        y: &mut [T],
        sum: &mut [T],
        statistics: &mut [T::Acc],
    ) {
        let width = weight.len();
        let count = T::Acc::from_f64(width as f64);
        let rows = x.chunks_exact(width).zip(y.chunks_exact_mut(width));
        for (row, ((x, y), statistics)) in rows.zip(statistics.chunks_exact_mut(form.statistics())).enumerate() {
            let part = row * width..(row + 1) * width;
            let x = match residual {
                Some(residual) => {
                    let sum = &mut sum[part.clone()];
                    for ((sum, x), residual) in sum.iter_mut().zip(x).zip(&residual[part]) {
                        *sum = T::from_acc(x.to_acc() + residual.to_acc());
                    }
                    &*sum
                }
                None => x,
            };
            let (mean, square) = match form {
                Form::Centred => {
                    // Deviations from the mean, and not x² − mean²: no cancellation for rows far from zero.
                    let mean = sum_of(x, |x| x) / count;
                    (mean, sum_of(x, |x| (x - mean) * (x - mean)) / count)
                }
                Form::Floored | Form::Rms => (T::Acc::ZERO, sum_of(x, |x| x * x) / count),
            };
            if !(square < -T::Acc::NEG_INFINITY) {
                shrunk::<T>(x, weight, bias, form, eps, y, statistics);
                continue;
            }
            let inverse = T::Acc::ONE / form.divisor(square, eps);
            for (((y, x), &weight), &bias) in y.iter_mut().zip(x).zip(weight).zip(bias) {
                *y = T::from_acc((x.to_acc() - mean) * inverse * weight + bias);
            }
            statistics[0] = mean;
            statistics[form.statistics() - 1] = inverse;
        }
    }
}

/// As [`forward`] for one row whose squares or whose sum may have overflowed: the norm of the row times a power of two that
/// neither overflows nor loses what counts. A row with NaN or an infinity becomes NaN here too.
#[cold]
fn shrunk<T: Float>(
    x: &[T],
    weight: &[T::Acc],
    bias: &[T::Acc],
    form: Form,
    eps: T::Acc,
    y: &mut [T],
    statistics: &mut [T::Acc],
) {
    // As in `kernels/norm.cu`: squares that overflow come from numbers above 2^48 (2^495 in f64) in rows of up to 2^32.
    let (shrink, grow) = match T::Acc::DTYPE {
        DType::F64 => (2f64.powi(-600), 2f64.powi(600)),
        _ => (2f64.powi(-80), 2f64.powi(80)),
    };
    let [shrink, grow, count] = [shrink, grow, x.len() as f64].map(T::Acc::from_f64);
    let mut mean = T::Acc::ZERO;
    if form == Form::Centred {
        mean = sum_of(x, |x| x * shrink) / count;
        // Subtract the rounding error of the mean, or a row of equal numbers would have a deviation.
        mean += sum_of(x, |x| x * shrink - mean) / count;
    }
    let square = sum_of(x, |x| (x * shrink - mean) * (x * shrink - mean)) / count;
    let floored = form == Form::Floored;
    let divisor = form.divisor(square, if floored { eps * shrink } else { eps * shrink * shrink });
    let equal = form == Form::Centred && square == T::Acc::ZERO && eps > T::Acc::ZERO;
    let inverse = if equal { T::Acc::ZERO } else { T::Acc::ONE / divisor };
    for (((y, x), &weight), &bias) in y.iter_mut().zip(x).zip(weight).zip(bias) {
        *y = T::from_acc((x.to_acc() * shrink - mean) * inverse * weight + bias);
    }
    statistics[0] = mean * grow;
    statistics[form.statistics() - 1] = if equal { T::Acc::ONE / eps.sqrt() } else { inverse * shrink };
}

/// `Σ f(x)`
#[inline(always)]
fn sum_of<T: Float>(x: &[T], f: impl Fn(T::Acc) -> T::Acc) -> T::Acc {
    let mut lanes = [T::Acc::ZERO; LANES];
    let (blocks, rest) = x.as_chunks::<LANES>();
    for block in blocks {
        for (lane, x) in lanes.iter_mut().zip(block) {
            *lane += f(x.to_acc());
        }
    }
    for (lane, x) in lanes.iter_mut().zip(rest) {
        *lane += f(x.to_acc());
    }
    sum_slice(&lanes)
}
