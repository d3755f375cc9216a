//! Normalisation of rows, or of the sum of two tensors: layer norm, RMS norm and scale norm in the form with a floor, and
//! RMS norm in that with a summand.

use super::{copy::same_kind, reduce::sum_slice};
use crate::{
    Device, Error, Result, Tensor,
    core::{Backward, Contributions, Float, Real, Shape, dispatch_float, record_beside, record_cheap},
    device::{CudaDevice, Grid, args, cpu, simd::vectorized, size32},
    error::ensure,
};

impl Tensor {
    /// Layer norm over the last dimension: `y = (x − mean) / √(variance + eps) ⊙ weight + bias`, the variance being
    /// the mean of the squared deviations. <https://arxiv.org/abs/1607.06450>
    ///
    /// Shapes: `[.., dim]`, weight and bias `[dim]` → `[.., dim]`; without them 1 and 0. PyTorch's default `eps` is
    /// 1e-5. Statistics in f32 (f64 for f64). Saves: `x`, and the mean and inverse deviation of each row.
    /// Errors: rank 0, a dtype that is not float or not the same for all, a weight or bias of another shape, a
    /// negative `eps`.
    pub fn layer_norm(&self, weight: Option<&Tensor>, bias: Option<&Tensor>, eps: f64) -> Result<Tensor> {
        normalize("layer_norm", self, &self.layer_spec(weight, bias, eps))
    }

    /// The sum of two tensors and its layer norm, in one pass: `(x + residual, (x + residual).layer_norm(..))`.
    ///
    /// Shapes: `x` and `residual` `[.., dim]`, otherwise as [`Tensor::layer_norm`]. Saves: the sum, and what the norm
    /// saves of each row.
    /// Errors: as [`Tensor::layer_norm`], or a residual of another shape.
    ///
    /// ```
    /// use x_transformers::{Device, Tensor};
    /// # fn main() -> x_transformers::Result<()> {
    /// let x = Tensor::from_slice(&[1.0f32, 5.0], [2], &Device::Cpu)?;
    /// let residual = Tensor::from_slice(&[2.0f32, 4.0], [2], &Device::Cpu)?;
    /// let (sum, normed) = x.add_layer_norm(&residual, None, None, 0.0)?;
    /// assert_eq!(sum.to_vec::<f32>()?, [3.0, 9.0]);
    /// assert_eq!(normed.to_vec::<f32>()?, [-1.0, 1.0]);
    /// # Ok(())
    /// # }
    /// ```
    pub fn add_layer_norm(
        &self,
        residual: &Tensor,
        weight: Option<&Tensor>,
        bias: Option<&Tensor>,
        eps: f64,
    ) -> Result<(Tensor, Tensor)> {
        normalize_sum("add_layer_norm", self, residual, &self.layer_spec(weight, bias, eps))
    }

    /// RMS norm over the last dimension: `y = x / max(|x| dim^-½, eps) ⊙ g`. <https://arxiv.org/abs/1910.07467>
    ///
    /// As in x-transformers `eps` is a floor (1e-8 there), not a summand; where it acts, the divisor is a constant
    /// for the gradient.
    ///
    /// Shapes: `[.., dim]`, `g` `[dim]` → `[.., dim]`. Saves: `x`, and the inverse divisor of each row.
    /// Errors: as [`Tensor::layer_norm`].
    pub fn rms_norm(&self, g: &Tensor, eps: f64) -> Result<Tensor> {
        normalize("rms_norm", self, &self.rms_spec(g, eps))
    }

    /// The sum of two tensors and its [`rms_norm`](Tensor::rms_norm), as [`Tensor::add_layer_norm`] gives it.
    pub fn add_rms_norm(&self, residual: &Tensor, g: &Tensor, eps: f64) -> Result<(Tensor, Tensor)> {
        normalize_sum("add_rms_norm", self, residual, &self.rms_spec(g, eps))
    }

    /// RMS norm over the last dimension as PyTorch's `nn.RMSNorm` and Llama have it, `y = x / √(mean x² + eps) ⊙ g`: unlike
    /// that of [`Tensor::rms_norm`], `eps` is a summand. <https://arxiv.org/abs/1910.07467>
    ///
    /// Shapes: `[.., dim]`, `g` `[dim]` → `[.., dim]`. Saves: `x`, and the inverse divisor of each row.
    /// Errors: as [`Tensor::layer_norm`].
    pub fn mean_square_norm(&self, g: &Tensor, eps: f64) -> Result<Tensor> {
        normalize("mean_square_norm", self, &self.mean_square_spec(g, eps))
    }

    /// The sum of two tensors and its [`mean_square_norm`](Tensor::mean_square_norm), as [`Tensor::add_layer_norm`] gives
    /// it.
    pub fn add_mean_square_norm(&self, residual: &Tensor, g: &Tensor, eps: f64) -> Result<(Tensor, Tensor)> {
        normalize_sum("add_mean_square_norm", self, residual, &self.mean_square_spec(g, eps))
    }

    /// Scale norm over the last dimension: as [`Tensor::rms_norm`] with one factor for all features (`eps` is 1e-5 in
    /// x-transformers). <https://arxiv.org/abs/1910.05895>
    ///
    /// Shapes: `[.., dim]`, `g` `[1]` → `[.., dim]`. Saves: `x`, and the inverse divisor of each row.
    /// Errors: as [`Tensor::layer_norm`].
    pub fn scale_norm(&self, g: &Tensor, eps: f64) -> Result<Tensor> {
        normalize("scale_norm", self, &Spec::floored(g, 1, eps))
    }

    /// The sum of two tensors and its [`scale_norm`](Tensor::scale_norm), as [`Tensor::add_layer_norm`] gives it.
    pub fn add_scale_norm(&self, residual: &Tensor, g: &Tensor, eps: f64) -> Result<(Tensor, Tensor)> {
        normalize_sum("add_scale_norm", self, residual, &Spec::floored(g, 1, eps))
    }

    fn features(&self) -> usize {
        self.shape().last().copied().unwrap_or(0)
    }

    fn layer_spec<'a>(&self, weight: Option<&'a Tensor>, bias: Option<&'a Tensor>, eps: f64) -> Spec<'a> {
        Spec { weight, weights: self.features(), bias, form: Form::Centred, eps }
    }

    fn rms_spec<'a>(&self, g: &'a Tensor, eps: f64) -> Spec<'a> {
        Spec::floored(g, self.features(), eps)
    }

    fn mean_square_spec<'a>(&self, g: &'a Tensor, eps: f64) -> Spec<'a> {
        Spec { form: Form::MeanSquare, ..self.rms_spec(g, eps) }
    }
}

/// What is subtracted from a row and what it is divided by.
#[derive(Clone, Copy, PartialEq)]
enum Form {
    /// The mean, and `√(variance + eps)`.
    Centred,
    /// Nothing, and `max(√mean(x²), eps)`.
    Floored,
    /// Nothing, and `√(mean(x²) + eps)`.
    MeanSquare,
}

impl Form {
    /// Numbers that are saved per row: mean and inverse divisor, or the latter alone.
    fn statistics(self) -> usize {
        match self {
            Self::Centred => 2,
            Self::Floored | Self::MeanSquare => 1,
        }
    }

    /// The number that kernels know it by.
    fn code(self) -> u32 {
        match self {
            Self::Floored => 0,
            Self::Centred => 1,
            Self::MeanSquare => 2,
        }
    }

    /// The floor of the divisor, below which it is a constant for the gradient: never one that is summed.
    fn floor(self, eps: f64) -> f64 {
        if self == Self::MeanSquare { 0.0 } else { eps }
    }
}

/// What a norm is told besides its input.
#[derive(Clone, Copy)]
struct Spec<'a> {
    weight: Option<&'a Tensor>,
    /// How many elements the weight must have.
    weights: usize,
    bias: Option<&'a Tensor>,
    form: Form,
    eps: f64,
}

impl<'a> Spec<'a> {
    fn floored(g: &'a Tensor, weights: usize, eps: f64) -> Self {
        Self { weight: Some(g), weights, bias: None, form: Form::Floored, eps }
    }

    fn check(&self, op: &'static str, x: &Tensor) -> Result<()> {
        ensure!(x.rank() > 0, Error::shape(op, "expected at least one dimension, got a scalar"));
        ensure!(
            self.eps >= 0.0 && self.eps.is_finite(),
            Error::argument(op, format!("eps must be a number that is not negative, got {}", self.eps))
        );
        x.dtype().expect_float(op)?;
        for (name, operand, expected) in [("weight", self.weight, self.weights), ("bias", self.bias, x.features())] {
            let Some(operand) = operand else { continue };
            same_kind(op, x, operand)?;
            ensure!(
                **operand.shape() == [expected],
                Error::shape(
                    op,
                    format!("expected a {name} of shape [{expected}] for {:?}, got {:?}", x.shape(), operand.shape())
                )
            );
        }
        Ok(())
    }
}

fn normalize(op: &'static str, x: &Tensor, spec: &Spec) -> Result<Tensor> {
    spec.check(op, x)?;
    let x = x.contiguous()?;
    let Forward { y, statistics, .. } = Forward::of(op, &x, None, spec)?;
    record_norm(op, &x, y, statistics, spec)
}

/// The sum, and its norm.
fn normalize_sum(op: &'static str, x: &Tensor, residual: &Tensor, spec: &Spec) -> Result<(Tensor, Tensor)> {
    spec.check(op, x)?;
    same_kind(op, x, residual)?;
    ensure!(
        x.shape() == residual.shape(),
        Error::shape(op, format!("expected a residual {:?}, got {:?}", x.shape(), residual.shape()))
    );
    let (x, residual) = (x.contiguous()?, residual.contiguous()?);
    let Forward { y, sum, statistics } = Forward::of(op, &x, Some(&residual), spec)?;
    let sum = sum.ok_or_else(|| Error::argument(op, "no sum was computed"))?;
    // Two nodes with an output each: the gradient of the sum is whole when the norm has added its part to it.
    let sum = record_beside(op, sum, &[&x, &residual], |_| SumBackward)?;
    let y = record_norm(op, &sum, y, statistics, spec)?;
    Ok((sum, y))
}

/// Records `y` as the norm of `x`.
fn record_norm(op: &'static str, x: &Tensor, y: Tensor, statistics: Tensor, spec: &Spec) -> Result<Tensor> {
    let &Spec { weight, weights, bias, form, eps } = spec;
    let inputs: Vec<&Tensor> = [Some(x), weight, bias].into_iter().flatten().collect();
    let backward = |_: &Tensor| NormBackward {
        op,
        x: x.detach(),
        statistics,
        weight: weight.map(Tensor::detach),
        has_bias: bias.is_some(),
        form,
        eps: form.floor(eps),
        onto: None,
    };
    let (kept, operands) = (x.detach(), [weight, bias].map(|operand| operand.map(Tensor::detach)));
    let again = move || {
        let [weight, bias] = operands.each_ref().map(Option::as_ref);
        Ok(Forward::of(op, &kept, None, &Spec { weight, weights, bias, form, eps })?.y)
    };
    record_cheap(op, y, &inputs, backward, again)
}

struct SumBackward;

impl Backward for SumBackward {
    fn name(&self) -> &'static str {
        "add"
    }

    fn backward(self: Box<Self>, grad: Tensor, need: &[bool]) -> Result<Contributions> {
        let residual = need[1].then(|| grad.clone());
        Ok(Contributions::whole([need[0].then_some(grad), residual]))
    }
}

/// What the forward pass computes.
struct Forward {
    y: Tensor,
    /// With a residual.
    sum: Option<Tensor>,
    /// `[rows, 2]` or `[rows, 1]`, see [`Form::statistics`]; never rounded to a half type.
    statistics: Tensor,
}

impl Forward {
    /// The norm of `x`, or of `x + residual`; both packed.
    fn of(op: &'static str, x: &Tensor, residual: Option<&Tensor>, spec: &Spec) -> Result<Self> {
        let shape = Shape::new(&[rows(x)?, spec.form.statistics()])?;
        let mut forward = Self {
            y: x.uninit_like()?,
            sum: residual.map(|x| x.uninit_like()).transpose()?,
            statistics: Tensor::uninit(shape, x.dtype().accumulator(), x.device())?,
        };
        match x.device() {
            Device::Cpu => dispatch_float!(op, x.dtype(), T, forward.rows::<T>(x, residual, spec))?,
            Device::Cuda(gpu) => forward.cuda(gpu, x, residual, spec)?,
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

    fn cuda(&mut self, gpu: &CudaDevice, x: &Tensor, residual: Option<&Tensor>, spec: &Spec) -> Result<()> {
        let (rows, columns) = (rows(x)?, x.dim(-1)?);
        let (weight, bias) = (packed(spec.weight)?, packed(spec.bias)?);
        let weights = weight.as_ref().map_or(0, Tensor::elements);
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
        gpu.kernel("norm_fwd", &[("DTYPE", x.dtype().name())])?
            .launch(Grid::rows_by(rows, threads_per_row(columns)), args)
    }
}

/// Number of rows that are normalised.
fn rows(x: &Tensor) -> Result<usize> {
    Ok(x.elements().checked_div(x.dim(-1)?).unwrap_or(0))
}

/// Elements of a row that one thread of a kernel holds in registers, and the most threads for a row.
const HELD: usize = 16;
const MOST_THREADS: usize = 256;

/// Threads for a row: so many that they hold it, if they can.
fn threads_per_row(columns: usize) -> usize {
    columns.div_ceil(HELD).min(MOST_THREADS).next_power_of_two().max(32)
}

/// A packed constant.
pub(super) fn packed(values: Option<&Tensor>) -> Result<Option<Tensor>> {
    values.map(|values| values.detach().contiguous()).transpose()
}

/// A weight or bias in the accumulation type, one per feature, so that the loops have one form.
pub(super) fn widen<T: Float>(values: Option<&Tensor>, width: usize, default: T::Acc) -> Result<Vec<T::Acc>> {
    let Some(values) = packed(values)? else { return Ok(vec![default; width]) };
    Ok(match values.values::<T>()? {
        [one] => vec![one.to_acc(); width],
        each => each.iter().map(|value| value.to_acc()).collect(),
    })
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
            let (mean, inverse) = match form {
                Form::Centred => {
                    // Deviations from the mean, and not x² − mean²: no cancellation for rows far from zero.
                    let mean = sum_of(x, |x| x) / count;
                    let variance = sum_of(x, |x| (x - mean) * (x - mean)) / count;
                    (mean, T::Acc::ONE / (variance + eps).sqrt())
                }
                Form::Floored => {
                    let square = sum_of(x, |x| x * x) / count;
                    (T::Acc::ZERO, T::Acc::ONE / square.sqrt().max(eps))
                }
                Form::MeanSquare => {
                    let square = sum_of(x, |x| x * x) / count;
                    (T::Acc::ZERO, T::Acc::ONE / (square + eps).sqrt())
                }
            };
            for (((y, x), &weight), &bias) in y.iter_mut().zip(x).zip(weight).zip(bias) {
                *y = T::from_acc((x.to_acc() - mean) * inverse * weight + bias);
            }
            statistics[0] = mean;
            statistics[form.statistics() - 1] = inverse;
        }
    }
}

struct NormBackward {
    op: &'static str,
    x: Tensor,
    /// `[rows, 2]` or `[rows, 1]`, see [`Form::statistics`]; never rounded to a half type.
    statistics: Tensor,
    weight: Option<Tensor>,
    has_bias: bool,
    form: Form,
    /// See [`Form::floor`].
    eps: f64,
    /// What the gradient of the input is added to.
    onto: Option<Tensor>,
}

impl Backward for NormBackward {
    fn name(&self) -> &'static str {
        self.op
    }

    fn add_to(&mut self, sum: Tensor) -> Option<Tensor> {
        self.onto.replace(sum)
    }

    /// With `x̂ = (x − mean) / divisor` and `h = g ⊙ weight`: `dx = (h − mean h − x̂ mean(h ⊙ x̂)) / divisor`,
    /// `dweight = Σ g ⊙ x̂` and `dbias = Σ g` over rows. Without centring, `mean h` falls out; where the floor acts, the
    /// other mean does.
    fn backward(self: Box<Self>, grad: Tensor, need: &[bool]) -> Result<Contributions> {
        let weight_needed = self.weight.is_some() && need[1];
        let bias_needed = self.has_bias && need[1 + self.weight.is_some() as usize];
        let wanted = (need[0], weight_needed || bias_needed);
        let (dx, partials) = match self.x.device() {
            Device::Cpu => dispatch_float!(self.op, grad.dtype(), T, self.backward_rows::<T>(grad, wanted))?,
            Device::Cuda(gpu) => self.backward_cuda(gpu, grad, wanted)?,
        };
        let width = self.x.dim(-1)?;
        let sums = partials.map(|partials| partials.sum(&[0])).transpose()?;
        let part = |start: usize, needed: bool| -> Result<Option<Tensor>> {
            let sums = sums.as_ref().filter(|_| needed);
            sums.map(|sums| sums.narrow(0, start, width)?.to_dtype(self.x.dtype())).transpose()
        };
        let mut grads = vec![dx];
        if let Some(weight) = &self.weight {
            grads.push(match (weight.elements() == width, &sums) {
                // One factor serves all features: its gradient is the sum of theirs.
                (false, Some(sums)) if weight_needed => {
                    Some(sums.narrow(0, 0, width)?.sum(&[])?.reshape([1])?.to_dtype(weight.dtype())?)
                }
                _ => part(0, weight_needed)?,
            });
        }
        if self.has_bias {
            grads.push(part(width, bias_needed)?);
        }
        Ok(Contributions::whole(grads))
    }
}

/// Rows whose sums for weight and bias one chunk adds up at least on a GPU; and how many chunks there are at most: two
/// for each multiprocessor of a large card, which bounds the memory for them too.
const ROWS_PER_CHUNK: usize = 16;
const MOST_CHUNKS: usize = 256;

impl NormBackward {
    /// The gradient of the input if it is wanted, and, if they are, the sums for the gradients of weight and bias over
    /// blocks of rows, `[blocks, 2 · dim]`.
    fn backward_rows<T: Float>(&self, grad: Tensor, wanted: (bool, bool)) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (width, rows, per_row) = (self.x.dim(-1)?, rows(&self.x)?, self.form.statistics());
        let weight = widen::<T>(self.weight.as_ref(), width, T::Acc::ONE)?;
        let onto = packed(self.onto.as_ref())?;
        let onto = onto.as_ref().map(|onto| onto.values::<T>()).transpose()?;
        let (mut dx, source) = reuse(grad)?;
        let source = source.as_ref().map(|source| source.values::<T>()).transpose()?;
        let (x, statistics) = (self.x.values::<T>()?, self.statistics.values::<T::Acc>()?);
        let floor = (self.form != Form::Centred).then(|| T::Acc::ONE / T::Acc::from_f64(self.eps));

        // Rows are summed up in blocks whose size depends on the shape alone.
        let block = cpu::rows_per_task(rows, 8 * width);
        let shape = Shape::new(&[rows.div_ceil(block), 2 * width])?;
        let mut partials = Tensor::uninit(shape, self.statistics.dtype(), self.x.device())?;
        let run = |first: usize, dx: &mut [T], partial: &mut [T::Acc]| {
            let part = first * width..first * width + dx.len();
            let statistics = &statistics[first * per_row..][..part.len() / width * per_row];
            let [source, onto] = [source, onto].map(|values| values.map(|values| &values[part.clone()]));
            backward::<T>(&x[part], source, onto, &weight, statistics, floor, wanted.0, dx, partial);
        };
        let sums = if wanted.1 { partials.values_mut::<T::Acc>()? } else { &mut [] };
        cpu::for_blocks(dx.values_mut::<T>()?, sums, (width, 2 * width), block, 8 * width, run);
        Ok((wanted.0.then_some(dx), wanted.1.then_some(partials)))
    }

    /// As [`NormBackward::backward_rows`].
    fn backward_cuda(
        &self,
        gpu: &CudaDevice,
        grad: Tensor,
        wanted: (bool, bool),
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let Self { x, statistics, eps, .. } = self;
        let (rows, columns) = (rows(x)?, x.dim(-1)?);
        let (centred, dtype) = (u32::from(self.form == Form::Centred), [("DTYPE", x.dtype().name())]);
        let (weight, onto) = (packed(self.weight.as_ref())?, packed(self.onto.as_ref())?);
        let (weight, onto) = (weight.as_ref(), onto.as_ref());
        let weights = size32(weight.map_or(0, Tensor::elements))?;
        let sizes = (rows as i64, size32(columns)?);
        let rows_per_chunk = rows.div_ceil(MOST_CHUNKS).max(ROWS_PER_CHUNK);
        let (chunks, per_chunk) = (rows.div_ceil(rows_per_chunk), rows_per_chunk as i64);
        let sums = || Tensor::uninit(Shape::new(&[chunks, 2 * columns])?, statistics.dtype(), x.device());

        let (mut dx, source) = reuse(grad)?;
        let threads = threads_per_row(columns);
        if wanted == (true, true) && columns <= HELD * threads {
            let mut partials = sums()?;
            let grid = Grid::new([size32(chunks)?, 1, 1], [threads as u32, (MOST_THREADS / threads) as u32, 1]);
            let args = args![
                &mut dx,
                &mut partials,
                x,
                source.as_ref().unwrap_or(&dx),
                onto,
                weight,
                statistics,
                sizes.0,
                per_chunk,
                sizes.1,
                weights,
                centred,
                *eps
            ];
            gpu.kernel("norm_bwd_whole", &dtype)?.launch(grid, args)?;
            return Ok((Some(dx), Some(partials)));
        }
        // The sums first: the gradient of the output may be overwritten then.
        let partials = wanted.1.then(|| {
            let mut partials = sums()?;
            let grid = Grid::columns(columns, chunks, x.dtype());
            let g = source.as_ref().unwrap_or(&dx);
            let args = args![&mut partials, x, g, statistics, sizes.0, per_chunk, sizes.1, centred];
            gpu.kernel("norm_bwd_sums", &dtype)?.launch(grid, args)?;
            Ok(partials)
        });
        let partials = partials.transpose()?;
        if !wanted.0 {
            return Ok((None, partials));
        }
        let args = args![
            &mut dx,
            x,
            source.as_ref().unwrap_or(&dx),
            onto,
            weight,
            statistics,
            sizes.0,
            sizes.1,
            weights,
            centred,
            *eps
        ];
        gpu.kernel("norm_bwd", &dtype)?.launch(Grid::rows_by(rows, threads_per_row(columns)), args)?;
        Ok((Some(dx), partials))
    }
}

vectorized! {
    /// Writes `dx` over the gradient of the output, which `source` holds unless `dx` does already, and adds `onto` to
    /// it. `partial`, if not empty, gets the sums for weight and bias; `floor` is the inverse divisor of rows where the
    /// floor acts.
    fn backward<T: Float>(
        x: &[T],
        source: Option<&[T]>,
        onto: Option<&[T]>,
        weight: &[T::Acc],
        statistics: &[T::Acc],
        floor: Option<T::Acc>,
        input_needed: bool,
        dx: &mut [T],
        partial: &mut [T::Acc],
    ) {
        let width = weight.len();
        let count = T::Acc::from_f64(width as f64);
        let per_row = if floor.is_some() { 1 } else { 2 };
        partial.fill(T::Acc::ZERO);
        let rows = x.chunks_exact(width).zip(dx.chunks_exact_mut(width));
        for (row, ((x, dx), statistics)) in rows.zip(statistics.chunks_exact(per_row)).enumerate() {
            let part = row * width..(row + 1) * width;
            let source = source.map(|source| &source[part.clone()]);
            let inverse = statistics[per_row - 1];
            let mean = if floor.is_some() { T::Acc::ZERO } else { statistics[0] };
            let (sum, dot) = {
                let g = source.unwrap_or(dx);
                if partial.is_empty() {
                    sums(x, g, weight, mean, inverse)
                } else {
                    let (dweight, dbias) = partial.split_at_mut(width);
                    sums_and_partials(x, g, weight, mean, inverse, dweight, dbias)
                }
            };
            if !input_needed {
                continue;
            }
            let along = if floor.is_some() { T::Acc::ZERO } else { sum / count };
            let across = if floor.is_some_and(|floor| inverse >= floor) { T::Acc::ZERO } else { dot / count };
            let gradient = |g: T, x: &T, weight: T::Acc| {
                let normal = (x.to_acc() - mean) * inverse;
                (g.to_acc() * weight - along - normal * across) * inverse
            };
            match (source, onto) {
                (Some(source), None) => {
                    for (((dx, g), x), &weight) in dx.iter_mut().zip(source).zip(x).zip(weight) {
                        *dx = T::from_acc(gradient(*g, x, weight));
                    }
                }
                (None, None) => {
                    for ((dx, x), &weight) in dx.iter_mut().zip(x).zip(weight) {
                        *dx = T::from_acc(gradient(*dx, x, weight));
                    }
                }
                (source, Some(onto)) => {
                    if let Some(source) = source {
                        dx.copy_from_slice(source);
                    }
                    for (((dx, x), &weight), onto) in dx.iter_mut().zip(x).zip(weight).zip(&onto[part]) {
                        *dx = T::from_acc(gradient(*dx, x, weight) + onto.to_acc());
                    }
                }
            }
        }
    }
}

/// Sums that are kept apart: so many that the compiler turns loops over them into vector operations as a whole, and that
/// no addition waits for another.
const LANES: usize = 64;

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

/// `Σ g ⊙ weight` and `Σ g ⊙ weight ⊙ (x − mean) · inverse`.
#[inline(always)]
fn sums<T: Float>(x: &[T], g: &[T], weight: &[T::Acc], mean: T::Acc, inverse: T::Acc) -> (T::Acc, T::Acc) {
    let (mut sums, mut dots) = ([T::Acc::ZERO; LANES], [T::Acc::ZERO; LANES]);
    for ((x, g), weight) in x.chunks(LANES).zip(g.chunks(LANES)).zip(weight.chunks(LANES)) {
        for ((((sum, dot), x), g), &weight) in sums.iter_mut().zip(&mut dots).zip(x).zip(g).zip(weight) {
            let h = g.to_acc() * weight;
            *sum += h;
            *dot += h * ((x.to_acc() - mean) * inverse);
        }
    }
    (sum_slice(&sums), sum_slice(&dots))
}

/// As [`sums`], and in the same pass `dweight += g ⊙ (x − mean) · inverse` and `dbias += g`.
#[inline(always)]
fn sums_and_partials<T: Float>(
    x: &[T],
    g: &[T],
    weight: &[T::Acc],
    mean: T::Acc,
    inverse: T::Acc,
    dweight: &mut [T::Acc],
    dbias: &mut [T::Acc],
) -> (T::Acc, T::Acc) {
    let (mut sums, mut dots) = ([T::Acc::ZERO; LANES], [T::Acc::ZERO; LANES]);
    let normal = |x: T| (x.to_acc() - mean) * inverse;
    let (x_blocks, x_rest) = x.as_chunks::<LANES>();
    let (g_blocks, g_rest) = g.as_chunks::<LANES>();
    let (weight_blocks, weight_rest) = weight.as_chunks::<LANES>();
    let (dweight_blocks, dweight_rest) = dweight.as_chunks_mut::<LANES>();
    let (dbias_blocks, dbias_rest) = dbias.as_chunks_mut::<LANES>();
    let blocks = x_blocks.iter().zip(g_blocks).zip(weight_blocks).zip(dweight_blocks).zip(dbias_blocks);
    for ((((x, g), weight), dweight), dbias) in blocks {
        // Copies, so that the compiler sees that they are neither each other nor what is read.
        let (mut dweights, mut dbiases) = (*dweight, *dbias);
        for lane in 0..LANES {
            let (normal, g) = (normal(x[lane]), g[lane].to_acc());
            let h = g * weight[lane];
            sums[lane] += h;
            dots[lane] += h * normal;
            dweights[lane] += g * normal;
            dbiases[lane] += g;
        }
        (*dweight, *dbias) = (dweights, dbiases);
    }
    let rest = x_rest.iter().zip(g_rest).zip(weight_rest).zip(dweight_rest).zip(dbias_rest);
    for (lane, ((((x, g), weight), dweight), dbias)) in rest.enumerate() {
        let (normal, g) = (normal(*x), g.to_acc());
        let h = g * *weight;
        sums[lane] += h;
        dots[lane] += h * normal;
        *dweight += g * normal;
        *dbias += g;
    }
    (sum_slice(&sums), sum_slice(&dots))
}

/// The tensor to write over, and where its values are to be read from if that is another one.
///
/// A gradient that no other handle shares is overwritten in place, which saves the memory of a second one.
pub(crate) fn reuse(x: Tensor) -> Result<(Tensor, Option<Tensor>)> {
    let packed = x.contiguous()?;
    // Otherwise this handle would be another one.
    drop(x);
    let mut x = packed;
    if x.is_unique() { Ok((x, None)) } else { Ok((x.uninit_like()?, Some(x))) }
}
