//! Normalisation of rows: layer norm, and RMS norm and scale norm in the form with a floor.

use super::{
    copy::same_kind,
    reduce::{fold, sum_slice},
};
use crate::{
    Device, Error, Result, Tensor,
    core::{Backward, Contributions, Float, Real, Shape, dispatch_float, record_cheap},
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
        let dim = self.shape().last().copied().unwrap_or(0);
        normalize("layer_norm", self, weight.map(|weight| (weight, dim)), bias, Form::Centred, eps)
    }

    /// RMS norm over the last dimension: `y = x / max(|x| dim^-½, eps) ⊙ g`. <https://arxiv.org/abs/1910.07467>
    ///
    /// As in x-transformers `eps` is a floor (1e-8 there), not a summand; where it acts, the divisor is a constant
    /// for the gradient.
    ///
    /// Shapes: `[.., dim]`, `g` `[dim]` → `[.., dim]`. Saves: `x`, and the inverse divisor of each row.
    /// Errors: as [`Tensor::layer_norm`].
    pub fn rms_norm(&self, g: &Tensor, eps: f64) -> Result<Tensor> {
        let dim = self.shape().last().copied().unwrap_or(0);
        normalize("rms_norm", self, Some((g, dim)), None, Form::Floored, eps)
    }

    /// Scale norm over the last dimension: as [`Tensor::rms_norm`] with one factor for all features (`eps` is 1e-5 in
    /// x-transformers). <https://arxiv.org/abs/1910.05895>
    ///
    /// Shapes: `[.., dim]`, `g` `[1]` → `[.., dim]`. Saves: `x`, and the inverse divisor of each row.
    /// Errors: as [`Tensor::layer_norm`].
    pub fn scale_norm(&self, g: &Tensor, eps: f64) -> Result<Tensor> {
        normalize("scale_norm", self, Some((g, 1)), None, Form::Floored, eps)
    }
}

/// What is subtracted from a row and what it is divided by.
#[derive(Clone, Copy, PartialEq)]
enum Form {
    /// The mean, and `√(variance + eps)`.
    Centred,
    /// Nothing, and `max(√mean(x²), eps)`.
    Floored,
}

impl Form {
    /// Numbers that are saved per row: mean and inverse divisor, or the latter alone.
    fn statistics(self) -> usize {
        match self {
            Self::Centred => 2,
            Self::Floored => 1,
        }
    }
}

/// All three norms; the weight comes with the number of elements that it must have.
fn normalize(
    op: &'static str,
    x: &Tensor,
    weight: Option<(&Tensor, usize)>,
    bias: Option<&Tensor>,
    form: Form,
    eps: f64,
) -> Result<Tensor> {
    ensure!(x.rank() > 0, Error::shape(op, "expected at least one dimension, got a scalar"));
    ensure!(
        eps >= 0.0 && eps.is_finite(),
        Error::argument(op, format!("eps must be a number that is not negative, got {eps}"))
    );
    x.dtype().expect_float(op)?;
    let dim = x.dim(-1)?;
    for (name, operand, expected) in [("weight", weight.map(|w| w.0), weight.map_or(dim, |w| w.1)), ("bias", bias, dim)]
    {
        if let Some(operand) = operand {
            same_kind(op, x, operand)?;
            ensure!(
                **operand.shape() == [expected],
                Error::shape(
                    op,
                    format!("expected a {name} of shape [{expected}] for {:?}, got {:?}", x.shape(), operand.shape())
                )
            );
        }
    }
    let x = x.contiguous()?;
    let weight = weight.map(|weight| weight.0);
    let mut y = x.uninit_like()?;
    let shape = Shape::new(&[rows(&x)?, form.statistics()])?;
    let mut statistics = Tensor::uninit(shape, x.dtype().accumulator(), x.device())?;
    match x.device() {
        Device::Cpu => dispatch_float!(op, x.dtype(), T, {
            forward_rows::<T>(&x, [weight, bias], form, <T as Float>::Acc::from_f64(eps), &mut y, &mut statistics)
        })?,
        Device::Cuda(gpu) => forward_cuda(gpu, &x, [weight, bias], form, eps, &mut y, &mut statistics)?,
    }
    let inputs: Vec<&Tensor> = [Some(&x), weight, bias].into_iter().flatten().collect();
    let backward = |_: &Tensor| NormBackward {
        op,
        x: x.detach(),
        statistics,
        weight: weight.map(Tensor::detach),
        has_bias: bias.is_some(),
        form,
        eps,
    };
    let (kept, operands) = (x.detach(), [weight, bias].map(|operand| operand.map(Tensor::detach)));
    let again = move || {
        let [weight, bias] = operands.each_ref().map(Option::as_ref);
        normalize(op, &kept, weight.map(|weight| (weight, weight.elements())), bias, form, eps)
    };
    record_cheap(op, y, &inputs, backward, again)
}

/// Number of rows that are normalised.
fn rows(x: &Tensor) -> Result<usize> {
    Ok(x.elements().checked_div(x.dim(-1)?).unwrap_or(0))
}

fn forward_rows<T: Float>(
    x: &Tensor,
    [weight, bias]: [Option<&Tensor>; 2],
    form: Form,
    eps: T::Acc,
    y: &mut Tensor,
    statistics: &mut Tensor,
) -> Result<()> {
    let (width, per_row) = (x.dim(-1)?, form.statistics());
    let (weight, bias) = (widen::<T>(weight, width, T::Acc::ONE)?, widen::<T>(bias, width, T::Acc::ZERO)?);
    let from = x.values::<T>()?;
    let (to, save) = (y.values_mut::<T>()?, statistics.values_mut::<T::Acc>()?);
    cpu::for_rows2(to, save, (width, per_row), 4 * width, |row, y, statistics| {
        forward::<T>(&from[row * width..][..y.len()], &weight, &bias, form, eps, y, statistics);
    });
    Ok(())
}

fn forward_cuda(
    gpu: &CudaDevice,
    x: &Tensor,
    [weight, bias]: [Option<&Tensor>; 2],
    form: Form,
    eps: f64,
    y: &mut Tensor,
    statistics: &mut Tensor,
) -> Result<()> {
    let (rows, columns) = (rows(x)?, x.dim(-1)?);
    let (weight, bias) = (packed(weight)?, packed(bias)?);
    let weights = weight.as_ref().map_or(0, Tensor::elements);
    let centred = u32::from(form == Form::Centred);
    let args = args![
        y,
        statistics,
        x,
        weight.as_ref(),
        bias.as_ref(),
        rows as i64,
        size32(columns)?,
        weights as u32,
        centred,
        eps
    ];
    gpu.kernel("norm_fwd", &[("DTYPE", x.dtype().name())])?.launch(Grid::rows(rows, columns), args)
}

fn packed(values: Option<&Tensor>) -> Result<Option<Tensor>> {
    values.map(|values| values.detach().contiguous()).transpose()
}

/// A weight or bias in the accumulation type, one per feature, so that the loops have one form.
fn widen<T: Float>(values: Option<&Tensor>, width: usize, default: T::Acc) -> Result<Vec<T::Acc>> {
    let Some(values) = packed(values)? else { return Ok(vec![default; width]) };
    Ok(match values.values::<T>()? {
        [one] => vec![one.to_acc(); width],
        each => each.iter().map(|value| value.to_acc()).collect(),
    })
}

vectorized! {
    fn forward<T: Float>(
        x: &[T],
        weight: &[T::Acc],
        bias: &[T::Acc],
        form: Form,
        eps: T::Acc,
        y: &mut [T],
        statistics: &mut [T::Acc],
    ) {
        let width = weight.len();
        let count = T::Acc::from_f64(width as f64);
        let rows = x.chunks_exact(width).zip(y.chunks_exact_mut(width));
        for ((x, y), statistics) in rows.zip(statistics.chunks_exact_mut(form.statistics())) {
            let (mean, inverse) = match form {
                Form::Centred => {
                    // Deviations from the mean, and not x² − mean²: no cancellation for rows far from zero.
                    let mean = sum_slice(x) / count;
                    let variance = fold(x, T::Acc::ZERO, |x| (x.to_acc() - mean) * (x.to_acc() - mean)) / count;
                    (mean, T::Acc::ONE / (variance + eps).sqrt())
                }
                Form::Floored => {
                    let square = fold(x, T::Acc::ZERO, |x| x.to_acc() * x.to_acc()) / count;
                    (T::Acc::ZERO, T::Acc::ONE / square.sqrt().max(eps))
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
    eps: f64,
}

impl Backward for NormBackward {
    fn name(&self) -> &'static str {
        self.op
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

/// Rows whose sums for weight and bias one chunk adds up on a GPU; and how many chunks there are at most, which bounds
/// the memory for them.
const ROWS_PER_CHUNK: usize = 64;
const MOST_CHUNKS: usize = 256;

impl NormBackward {
    /// The gradient of the input if it is wanted, and, if they are, the sums for the gradients of weight and bias over
    /// blocks of rows, `[blocks, 2 · dim]`.
    fn backward_rows<T: Float>(&self, grad: Tensor, wanted: (bool, bool)) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (width, rows, per_row) = (self.x.dim(-1)?, rows(&self.x)?, self.form.statistics());
        let weight = widen::<T>(self.weight.as_ref(), width, T::Acc::ONE)?;
        let (mut dx, source) = reuse(grad)?;
        let source = source.as_ref().map(|source| source.values::<T>()).transpose()?;
        let (x, statistics) = (self.x.values::<T>()?, self.statistics.values::<T::Acc>()?);
        let floor = (self.form == Form::Floored).then(|| T::Acc::ONE / T::Acc::from_f64(self.eps));

        // Rows are summed up in blocks whose size depends on the shape alone.
        let block = cpu::rows_per_task(rows, 8 * width);
        let shape = Shape::new(&[rows.div_ceil(block), 2 * width])?;
        let mut partials = Tensor::uninit(shape, self.statistics.dtype(), self.x.device())?;
        let run = |first: usize, dx: &mut [T], partial: &mut [T::Acc]| {
            let part = first * width..first * width + dx.len();
            let statistics = &statistics[first * per_row..][..part.len() / width * per_row];
            let source = source.map(|source| &source[part.clone()]);
            backward::<T>(&x[part], source, &weight, statistics, floor, wanted.0, dx, partial);
        };
        let to = dx.values_mut::<T>()?;
        if wanted.1 {
            let sums = partials.values_mut::<T::Acc>()?;
            cpu::for_rows2(to, sums, (block * width, 2 * width), 8 * block * width, |first, dx, partials| {
                let parts = dx.chunks_mut(block * width).zip(partials.chunks_exact_mut(2 * width));
                parts.enumerate().for_each(|(index, (dx, partial))| run((first + index) * block, dx, partial));
            });
        } else {
            cpu::for_rows(to, width, 8 * width, |first, dx| run(first, dx, &mut []));
        }
        Ok((wanted.0.then_some(dx), wanted.1.then_some(partials)))
    }

    /// As [`NormBackward::backward_rows`].
    fn backward_cuda(
        &self,
        gpu: &CudaDevice,
        grad: Tensor,
        wanted: (bool, bool),
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let Self { x, statistics, weight, .. } = self;
        let (rows, columns) = (rows(x)?, x.dim(-1)?);
        let (centred, dtype) = (u32::from(self.form == Form::Centred), [("DTYPE", x.dtype().name())]);
        let (mut dx, source) = reuse(grad)?;
        // The sums first: the gradient of the output may be overwritten then.
        let partials = wanted.1.then(|| {
            let rows_per_chunk = rows.div_ceil(MOST_CHUNKS).max(ROWS_PER_CHUNK);
            let chunks = rows.div_ceil(rows_per_chunk);
            let mut partials = Tensor::uninit(Shape::new(&[chunks, 2 * columns])?, statistics.dtype(), x.device())?;
            // 32 threads side by side, each for 16 bytes of a row.
            let tiles = columns.div_ceil(32 * 16 / x.dtype().size());
            let grid = Grid::new([tiles as u32, size32(chunks)?, 1], [32, 8, 1]);
            let g = source.as_ref().unwrap_or(&dx);
            let sizes = (rows as i64, rows_per_chunk as i64, size32(columns)?);
            let args = args![&mut partials, x, g, statistics, sizes.0, sizes.1, sizes.2, centred];
            gpu.kernel("norm_bwd_sums", &dtype)?.launch(grid, args)?;
            Ok(partials)
        });
        let partials = partials.transpose()?;
        if !wanted.0 {
            return Ok((None, partials));
        }
        let weight = packed(weight.as_ref())?;
        let weights = weight.as_ref().map_or(0, Tensor::elements) as u32;
        let sizes = (rows as i64, size32(columns)?);
        let args = args![
            &mut dx,
            x,
            source.as_ref(),
            weight.as_ref(),
            statistics,
            sizes.0,
            sizes.1,
            weights,
            centred,
            self.eps
        ];
        gpu.kernel("norm_bwd", &dtype)?.launch(Grid::rows(rows, columns), args)?;
        Ok((Some(dx), partials))
    }
}

vectorized! {
    /// Writes `dx` over the gradient of the output, which `source` holds unless `dx` does already. `partial`, if not
    /// empty, gets the sums for weight and bias; `floor` is the inverse divisor of rows where the floor acts.
    fn backward<T: Float>(
        x: &[T],
        source: Option<&[T]>,
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
        let (dweight, dbias) = partial.split_at_mut(partial.len() / 2);
        let rows = x.chunks_exact(width).zip(dx.chunks_exact_mut(width));
        for (row, ((x, dx), statistics)) in rows.zip(statistics.chunks_exact(per_row)).enumerate() {
            if let Some(source) = source {
                dx.copy_from_slice(&source[row * width..][..width]);
            }
            let inverse = statistics[per_row - 1];
            let mean = if floor.is_some() { T::Acc::ZERO } else { statistics[0] };
            for (((x, g), dweight), dbias) in x.iter().zip(&*dx).zip(&mut *dweight).zip(&mut *dbias) {
                *dweight += g.to_acc() * ((x.to_acc() - mean) * inverse);
                *dbias += g.to_acc();
            }
            if !input_needed {
                continue;
            }
            let (sum, dot) = sums(x, dx, weight, mean, inverse);
            let along = if floor.is_some() { T::Acc::ZERO } else { sum / count };
            let across = if floor.is_some_and(|floor| inverse >= floor) { T::Acc::ZERO } else { dot / count };
            for ((dx, x), &weight) in dx.iter_mut().zip(x).zip(weight) {
                let normal = (x.to_acc() - mean) * inverse;
                *dx = T::from_acc((dx.to_acc() * weight - along - normal * across) * inverse);
            }
        }
    }
}

/// `Σ g ⊙ weight` and `Σ g ⊙ weight ⊙ (x − mean) · inverse`.
#[inline(always)]
fn sums<T: Float>(x: &[T], g: &[T], weight: &[T::Acc], mean: T::Acc, inverse: T::Acc) -> (T::Acc, T::Acc) {
    // So many lanes that the compiler keeps the inner loop and turns it into vector operations as a whole.
    const LANES: usize = 64;
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
