//! The forward pass: statistics of each row, and the row normalised by them.

use super::{Form, LANES, Spec, rows, widen};
use crate::{
    DType, Device, Result, Tensor,
    device::{
        floats::{Floats, FloatsMut, round_to},
        rows::{In, Out, Sums, for_rows_of},
        simd::vectorized,
    },
    dtype::{Real, dispatch_real},
    ops::reduce::sum_slice,
    shape::Shape,
};

/// Results of the forward pass.
pub(super) struct Forward {
    pub(super) y: Tensor,
    /// The sum, if there is a residual.
    pub(super) sum: Option<Tensor>,
    /// `[rows, 2]` or `[rows, 1]`, see [`Form::statistics`]; never rounded to a half type.
    pub(super) statistics: Tensor,
}

impl Forward {
    /// Normalises `x`, or `x + residual`; both must be packed.
    pub(super) fn of(op: &'static str, x: &Tensor, residual: Option<&Tensor>, spec: &Spec) -> Result<Self> {
        let shape = Shape::new(&[rows(x)?, spec.form.statistics()])?;
        let mut forward = Self {
            y: x.uninit_like()?,
            sum: residual.map(|x| x.uninit_like()).transpose()?,
            statistics: Tensor::uninit(shape, x.dtype().accumulator(), x.device())?,
        };
        match x.device() {
            Device::Cpu => dispatch_real!(x.dtype(), R, forward.rows::<R>(op, x, residual, spec))?,
            Device::Gpu(gpu) => forward.cuda(*gpu, x, residual, spec)?,
        }
        Ok(forward)
    }

    fn rows<R: Real>(&mut self, op: &'static str, x: &Tensor, residual: Option<&Tensor>, spec: &Spec) -> Result<()> {
        let (width, per_row, dtype) = (x.dim(-1)?, spec.form.statistics(), x.dtype());
        let weight = widen::<R>(op, spec.weight, width, R::ONE)?;
        let bias = widen::<R>(op, spec.bias, width, R::ZERO)?;
        let eps = R::from_f64(spec.eps);
        let wide = |x: &Option<&Tensor>| if x.is_some() { width } else { 0 };
        let none = Floats::of::<R>(&[]);
        let residuals = residual.map_or(Ok(none), |residual| residual.floats(op))?;
        let ins = [In::new(x.floats(op)?, width), In::new(residuals, wide(&residual))];
        let mut empty: [R; 0] = [];
        let sum = match &mut self.sum {
            Some(sum) => sum.floats_mut(op)?,
            None => FloatsMut::of::<R>(&mut empty),
        };
        let outs = [
            Out::new(self.y.floats_mut(op)?, width),
            Out::new(sum, wide(&residual)),
            Out::new(self.statistics.floats_mut(op)?, per_row),
        ];
        for_rows_of::<R, 3, 2>(outs, ins, Sums::none(), 4 * width, &|_, [y, sum, statistics], [x, residual], _| {
            if sum.is_empty() {
                return forward::<R>(x, &weight, &bias, spec.form, eps, y, statistics);
            }
            let rows = x.chunks_exact(width).zip(y.chunks_exact_mut(width)).zip(statistics.chunks_exact_mut(per_row));
            // Row by row, so that the sum is in the cache when it is normalised.
            let sums = sum.chunks_exact_mut(width).zip(residual.chunks_exact(width));
            for (((x, y), statistics), (sum, residual)) in rows.zip(sums) {
                add_rows(x, residual, sum);
                // The backward pass uses the rounded sum.
                round_to(dtype, sum);
                forward::<R>(sum, &weight, &bias, spec.form, eps, y, statistics);
            }
        });
        Ok(())
    }
}

vectorized! {
    /// Computes `sum = x + residual`.
    fn add_rows<R: Real>(x: &[R], residual: &[R], sum: &mut [R]) {
        for ((sum, x), residual) in sum.iter_mut().zip(x).zip(residual) {
            *sum = *x + *residual;
        }
    }
}

vectorized! {
    /// Normalises rows.
    fn forward<R: Real>(x: &[R], weight: &[R], bias: &[R], form: Form, eps: R, y: &mut [R], statistics: &mut [R]) {
        let (width, per_row) = (weight.len(), form.statistics());
        let count = R::from_f64(width as f64);
        let rows = x.chunks_exact(width).zip(y.chunks_exact_mut(width)).zip(statistics.chunks_exact_mut(per_row));
        for ((x, y), statistics) in rows {
            let (mean, square) = match form {
                Form::Centred => {
                    // Deviations from the mean instead of x² − mean²: no cancellation for rows far from zero.
                    let mean = sum_of(x, |x| x) / count;
                    (mean, sum_of(x, |x| (x - mean) * (x - mean)) / count)
                }
                Form::Floored | Form::Rms => (R::ZERO, sum_of(x, |x| x * x) / count),
            };
            if !(square < -R::NEG_INFINITY) {
                shrunk::<R>(x, weight, bias, form, eps, y, statistics);
                continue;
            }
            let inverse = R::ONE / form.divisor(square, eps);
            for (((y, x), &weight), &bias) in y.iter_mut().zip(x).zip(weight).zip(bias) {
                *y = (*x - mean) * inverse * weight + bias;
            }
            statistics[0] = mean;
            statistics[per_row - 1] = inverse;
        }
    }
}

/// Like [`forward`], but for a row whose squares or sum may have overflowed: normalises the row times a power of two
/// that neither overflows nor loses significant digits. A row with NaN or an infinity becomes NaN here too.
#[cold]
fn shrunk<R: Real>(x: &[R], weight: &[R], bias: &[R], form: Form, eps: R, y: &mut [R], statistics: &mut [R]) {
    // As in `kernels/norm.cu`: squares that overflow come from numbers above 2^48 (2^495 in f64) in rows of up to 2^32.
    let (shrink, grow) = match R::DTYPE {
        DType::F64 => (2f64.powi(-600), 2f64.powi(600)),
        _ => (2f64.powi(-80), 2f64.powi(80)),
    };
    let [shrink, grow, count] = [shrink, grow, x.len() as f64].map(R::from_f64);
    let mut mean = R::ZERO;
    if form == Form::Centred {
        mean = sum_of(x, |x| x * shrink) / count;
        // Subtract the rounding error of the mean, or a row of equal numbers would have a deviation.
        mean += sum_of(x, |x| x * shrink - mean) / count;
    }
    let square = sum_of(x, |x| (x * shrink - mean) * (x * shrink - mean)) / count;
    let floored = form == Form::Floored;
    let divisor = form.divisor(square, if floored { eps * shrink } else { eps * shrink * shrink });
    let equal = form == Form::Centred && square == R::ZERO && eps > R::ZERO;
    let inverse = if equal { R::ZERO } else { R::ONE / divisor };
    for (((y, x), &weight), &bias) in y.iter_mut().zip(x).zip(weight).zip(bias) {
        *y = (*x * shrink - mean) * inverse * weight + bias;
    }
    statistics[0] = mean * grow;
    statistics[form.statistics() - 1] = if equal { R::ONE / eps.sqrt() } else { inverse * shrink };
}

/// Computes `Σ f(x)`.
#[inline(always)]
fn sum_of<R: Real>(x: &[R], f: impl Fn(R) -> R) -> R {
    let mut lanes = [R::ZERO; LANES];
    let (blocks, rest) = x.as_chunks::<LANES>();
    for block in blocks {
        for (lane, x) in lanes.iter_mut().zip(block) {
            *lane += f(*x);
        }
    }
    for (lane, x) in lanes.iter_mut().zip(rest) {
        *lane += f(*x);
    }
    sum_slice(&lanes)
}
