//! The backward pass: the gradient of each row, and sums over rows for weight and bias.

use bytemuck::{cast_slice, cast_slice_mut};
use half::f16;

use super::{Form, LANES, packed, reuse, rows};
use crate::{
    Device, Element, Result, Tensor,
    autograd::{Backward, InputGrads},
    device::{
        cpu,
        f16_rows::{is_f16, narrow, widen},
        scratch::{User, aligned, lend},
        simd::vectorized,
    },
    dtype::{Float, Real, dispatch_float},
    ops::reduce::{late_sum, sum_slice},
    shape::Shape,
};

pub(super) struct NormBackward {
    pub(super) op: &'static str,
    pub(super) x: Tensor,
    /// `[rows, 2]` or `[rows, 1]`, see [`Form::statistics`]; never rounded to a half type.
    pub(super) statistics: Tensor,
    pub(super) weight: Option<Tensor>,
    pub(super) has_bias: bool,
    pub(super) form: Form,
    /// See [`Form::floor`].
    pub(super) eps: f64,
    /// Gradient to which the input's gradient is added.
    pub(super) onto: Option<Tensor>,
}

impl Backward for NormBackward {
    fn name(&self) -> &'static str {
        self.op
    }

    fn accumulate_into(&mut self, sum: Tensor) -> Option<Tensor> {
        self.onto.replace(sum)
    }

    /// With `x̂ = (x − mean) / divisor` and `h = g ⊙ weight`: `dx = (h − mean h − x̂ mean(h ⊙ x̂)) / divisor`,
    /// `dweight = Σ g ⊙ x̂` and `dbias = Σ g` over rows. Without centring, `mean h` falls out; where the floor acts,
    /// the other mean does.
    fn backward(self: Box<Self>, grad: Tensor, need: &[bool]) -> Result<InputGrads> {
        let weight_needed = self.weight.is_some() && need[1];
        let bias_needed = self.has_bias && need[1 + self.weight.is_some() as usize];
        let wanted = (need[0], weight_needed || bias_needed);
        let width = self.x.dim(-1)?;
        let (dx, partials) = match self.x.device() {
            Device::Cpu => dispatch_float!(self.op, grad.dtype(), T, self.backward_rows::<T>(grad, wanted))?,
            Device::Gpu(gpu) => {
                let (dx, partials) = self.backward_cuda(*gpu, grad, wanted)?;
                let each = self.weight.as_ref().is_none_or(|weight| weight.numel() == width);
                if let (true, Some(partials)) = (each, &partials) {
                    let dtype = self.x.dtype();
                    let sum = |part: usize| late_sum(partials, [part * width, width], dtype);
                    let mut late = Vec::new();
                    late.extend(weight_needed.then(|| (1, sum(0))));
                    late.extend(bias_needed.then(|| (need.len() - 1, sum(1))));
                    let grads = [dx].into_iter().chain(need[1..].iter().map(|_| None));
                    return Ok(InputGrads::whole(grads).with_late_sums(late));
                }
                (dx, partials)
            }
        };
        let sums = partials.map(|partials| partials.sum(&[0])).transpose()?;
        let part = |start: usize, needed: bool| -> Result<Option<Tensor>> {
            let sums = sums.as_ref().filter(|_| needed);
            sums.map(|sums| sums.narrow(0, start, width)?.to_dtype(self.x.dtype())).transpose()
        };
        let mut grads = vec![dx];
        if let Some(weight) = &self.weight {
            grads.push(match (weight.numel() == width, &sums) {
                // One weight scales all features: its gradient is the sum over them.
                (false, Some(sums)) if weight_needed => {
                    Some(sums.narrow(0, 0, width)?.sum(&[])?.reshape([1])?.to_dtype(weight.dtype())?)
                }
                _ => part(0, weight_needed)?,
            });
        }
        if self.has_bias {
            grads.push(part(width, bias_needed)?);
        }
        Ok(InputGrads::whole(grads))
    }
}

impl NormBackward {
    /// Computes the gradient of the input and the sums over blocks of rows for the gradients of weight and bias,
    /// `[blocks, 2 · dim]`, each if wanted.
    fn backward_rows<T: Float>(&self, grad: Tensor, wanted: (bool, bool)) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (width, rows, per_row) = (self.x.dim(-1)?, rows(&self.x)?, self.form.statistics());
        let weight = super::widen::<T::Acc>(self.op, self.weight.as_ref(), width, T::Acc::ONE)?;
        let onto = packed(self.onto.as_ref())?;
        let onto = onto.as_ref().map_or(Ok(&[][..]), |onto| onto.values::<T>())?;
        let (mut dx, source) = reuse(grad)?;
        let g = source.as_ref().map_or(Ok(&[][..]), |source| source.values::<T>())?;
        let (x, statistics) = (self.x.values::<T>()?, self.statistics.values::<T::Acc>()?);
        let floor = (self.form != Form::Centred).then(|| T::Acc::ONE / T::Acc::from_f64(self.eps));

        // bf16 is read where it lies: through rows in f32 this takes a sixth longer.
        let some = |values: &[T], first: usize, len: usize| if values.is_empty() { 0..0 } else { first..first + len };
        let of_rows = |row: usize, dx: &mut [T], partial: &mut [T::Acc]| {
            let (first, len) = (row * width, dx.len());
            let statistics = &statistics[row * per_row..][..len / width * per_row];
            let (g, onto) = (&g[some(g, first, len)], &onto[some(onto, first, len)]);
            let x = &x[first..first + len];
            if const { is_f16::<T>() } {
                backward_of_f16(
                    cast_slice(x),
                    cast_slice(g),
                    cast_slice(onto),
                    cast_slice(&weight),
                    cast_slice(statistics),
                    floor.map(T::Acc::to_f32),
                    wanted.0,
                    cast_slice_mut(dx),
                    cast_slice_mut(partial),
                );
            } else {
                backward::<T>(x, g, onto, &weight, statistics, floor, wanted.0, dx, partial);
            }
        };
        if !wanted.1 {
            cpu::for_rows(dx.values_mut::<T>()?, width, 8 * width, |row, dx| of_rows(row, dx, &mut []));
            return Ok((wanted.0.then_some(dx), None));
        }
        // Rows are summed in blocks whose size depends only on the shape.
        let block = cpu::rows_per_task(rows, 8 * width);
        let shape = Shape::new(&[rows.div_ceil(block), 2 * width])?;
        let mut partials = Tensor::uninit(shape, self.statistics.dtype(), self.x.device())?;
        let (parts, sums) = (dx.values_mut::<T>()?, partials.values_mut::<T::Acc>()?);
        let widths = (block * width, 2 * width);
        cpu::for_rows2(parts, sums, widths, 8 * block * width, &|first, parts, sums| {
            let blocks = parts.chunks_mut(block * width).zip(sums.chunks_exact_mut(2 * width));
            for (block_index, (dx, sums)) in blocks.enumerate() {
                sums.fill(T::Acc::ZERO);
                of_rows((first + block_index) * block, dx, sums);
            }
        });
        Ok((wanted.0.then_some(dx), Some(partials)))
    }
}

/// Like [`backward`], through f32.
#[allow(clippy::too_many_arguments)]
fn backward_of_f16(
    x: &[f16],
    g: &[f16],
    onto: &[f16],
    weight: &[f32],
    statistics: &[f32],
    floor: Option<f32>,
    input_needed: bool,
    dx: &mut [f16],
    partial: &mut [f32],
) {
    /// Number of values of each operand at a time, which stay in the cache.
    const PIECE: usize = 2048;
    let width = weight.len();
    let (piece, per_row) = ((PIECE / width).max(1) * width, if floor.is_some() { 1 } else { 2 });
    lend(User::Rows, |areas| {
        let mut memory = aligned::<f32>(&mut areas[0], 4 * piece).chunks_exact_mut(piece);
        let [of_x, of_g, of_onto, of_dx] = std::array::from_fn(|_| memory.next().unwrap_or_default());
        for (index, dx) in dx.chunks_mut(piece).enumerate() {
            let (first, len) = (index * piece, dx.len());
            let read = |from: &[f16], to: &mut [f32]| {
                let len = if from.is_empty() { 0 } else { len };
                widen(&from[first.min(from.len())..][..len], &mut to[..len]);
                len
            };
            let (of_dx, x) = (&mut of_dx[..len], read(x, of_x));
            let (g, onto) = (read(g, of_g), read(onto, of_onto));
            if g == 0 {
                widen(dx, of_dx);
            }
            let statistics = &statistics[first / width * per_row..][..len / width * per_row];
            let (x, g, onto) = (&of_x[..x], &of_g[..g], &of_onto[..onto]);
            backward::<f32>(x, g, onto, weight, statistics, floor, input_needed, of_dx, partial);
            if input_needed {
                narrow(of_dx, dx);
            }
        }
    });
}

vectorized! {
    /// Computes `dx` from `g`, the gradient of the output, or from what `dx` holds if `g` is empty, and adds `onto` to
    /// it unless that is empty. `partial`, if not empty, gets the sums for weight and bias; `floor` is the inverse divisor of rows where the
    /// floor acts.
    fn backward<T: Float>(
        x: &[T],
        g: &[T],
        onto: &[T],
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
        let (mut quarters, quarter) = (Vec::new(), T::Acc::from_f64(0.25));
        // Rows that deviate so far from their mean that the difference could overflow.
        let farthest = T::Acc::from_f64(8.0 / -T::Acc::DTYPE.lowest());
        let rows = x.chunks_exact(width).zip(dx.chunks_exact_mut(width));
        for (row, ((x, dx), statistics)) in rows.zip(statistics.chunks_exact(per_row)).enumerate() {
            let part = row * width..(row + 1) * width;
            let inverse = statistics[per_row - 1];
            let mean = if floor.is_some() { T::Acc::ZERO } else { statistics[0] };
            let (x, mean, slope) = if inverse < farthest && mean != T::Acc::ZERO {
                quarters.clear();
                quarters.extend(x.iter().map(|x| T::from_acc(x.to_acc() * quarter)));
                (&quarters[..], mean * quarter, inverse / quarter)
            } else {
                (x, mean, inverse)
            };
            let (sum, dot) = {
                let g = g.get(part.clone()).unwrap_or(dx);
                if partial.is_empty() {
                    sums(x, g, weight, mean, slope)
                } else {
                    let (dweight, dbias) = partial.split_at_mut(width);
                    sums_and_partials(x, g, weight, mean, slope, dweight, dbias)
                }
            };
            if !input_needed {
                continue;
            }
            let along = if floor.is_some() { T::Acc::ZERO } else { sum / count };
            let across = if floor.is_some_and(|floor| inverse >= floor) { T::Acc::ZERO } else { dot / count };
            let gradient = |g: T, x: &T, weight: T::Acc| {
                let normal = (x.to_acc() - mean) * slope;
                (g.to_acc() * weight - along - normal * across) * inverse
            };
            let onto = onto.get(part.clone());
            if let Some(g) = g.get(part) {
                if size_of::<T>() == size_of::<f32>() && onto.is_none() {
                    for (((dx, x), &weight), g) in dx.iter_mut().zip(x).zip(weight).zip(g) {
                        *dx = T::from_acc(gradient(*g, x, weight));
                    }
                    continue;
                }
                dx.copy_from_slice(g);
            }
            let row = dx.iter_mut().zip(x).zip(weight);
            match onto {
                None => row.for_each(|((dx, x), &weight)| *dx = T::from_acc(gradient(*dx, x, weight))),
                Some(onto) => {
                    for (((dx, x), &weight), onto) in row.zip(onto) {
                        *dx = T::from_acc(gradient(*dx, x, weight) + onto.to_acc());
                    }
                }
            }
        }
    }
}

/// Computes `Σ g ⊙ weight` and `Σ g ⊙ weight ⊙ (x − mean) · inverse`.
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

/// Like [`sums`], but also adds in the same pass: `dweight += g ⊙ (x − mean) · inverse` and `dbias += g`.
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
        // Copies, so that the compiler knows that they alias neither each other nor the inputs.
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
