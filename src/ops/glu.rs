//! Gated linear units: half of the features times an activation of the other half.

use super::{
    activation::{COST, TILE, add_to, bias_gradient, check_bias, partial_sums, sums_mut, wide_bias},
    norm::{packed, reuse},
    pointwise::{Activation, sum_value, sum_value_and_slope},
};
use crate::{
    Device, Error, Result, Tensor,
    autograd::{Backward, InputGrads, record_cheap},
    collect::CollectVec,
    device::{
        Grid, args, cpu,
        rows::{In, Out, Sums, for_rows_of},
        simd::vectorized,
        size32,
    },
    dtype::{Real, dispatch_real},
};

impl Tensor {
    /// Computes `value ⊙ activation(gate)`, where the first half of the features is the value and the second the gate
    /// (Shazeer, GLU variants improve transformer, <https://arxiv.org/abs/2002.05202>).
    ///
    /// Shapes: `[.., 2 dim] → [.., dim]`. Saves: the input; the backward pass recomputes the activation.
    ///
    /// Errors: rank 0, an odd number of features, or a dtype that is not float.
    ///
    /// ```
    /// use x_transformers::{Device, Tensor, ops::Activation};
    /// # fn main() -> x_transformers::Result<()> {
    /// let x = Tensor::from_slice(&[3.0f32, 5.0, 2.0, -1.0], [4], &Device::Cpu)?;
    /// assert_eq!(x.glu(Activation::ReluSquared)?.to_vec::<f32>()?, [12.0, 0.0]);
    /// # Ok(())
    /// # }
    /// ```
    #[doc(alias = "SwiGLU")]
    #[doc(alias = "GEGLU")]
    pub fn glu(&self, activation: Activation) -> Result<Tensor> {
        gated("glu", self, None, activation)
    }

    /// Computes [`Tensor::glu`] of `x + bias` in one pass, without rounding the sum: for use after the matrix product
    /// of a dense layer.
    ///
    /// Shapes: `[.., 2 dim]`, bias `[2 dim]` → `[.., dim]`. Saves: the inputs; the backward pass recomputes the sum and
    /// the activation, and accumulates the gradient of the bias as it goes.
    ///
    /// Errors: those of [`Tensor::glu`], a bias of another shape, or dtypes or devices that differ.
    pub fn add_glu(&self, bias: &Tensor, activation: Activation) -> Result<Tensor> {
        gated("add_glu", self, Some(bias), activation)
    }
}

fn gated(op: &'static str, x: &Tensor, bias: Option<&Tensor>, activation: Activation) -> Result<Tensor> {
    let width = x.shape().last().copied();
    let Some(width) = width.filter(|width| width.is_multiple_of(2)) else {
        let shape = x.shape();
        return Err(Error::shape(op, format_args!("expected an even number of features [.., 2 dim], got {shape:?}")));
    };
    x.dtype().expect_float(op)?;
    bias.map_or(Ok(()), |bias| check_bias(op, x, bias))?;
    let x = x.contiguous()?;
    glu(op, activation, &x, bias, width / 2)
}

fn glu(op: &'static str, f: Activation, x: &Tensor, bias: Option<&Tensor>, dim: usize) -> Result<Tensor> {
    let mut y = Tensor::uninit(x.shape().with_dim(x.rank() - 1, dim), x.dtype(), x.device())?;
    match x.device() {
        Device::Cpu => {
            let summand = packed(bias)?;
            let summand = summand.as_ref().map(|bias| bias.floats(op)).transpose()?;
            let (from, to) = (In::new(x.floats(op)?, 2 * dim), Out::new(y.floats_mut(op)?, dim));
            dispatch_real!(x.dtype(), R, {
                let bias: Vec<R> = wide_bias(summand, 2 * dim);
                for_rows_of::<R, 1, 1>([to], [from], Sums::none(), COST * dim, &|_, [y], [x], _| {
                    forward(f, x, &bias, y);
                });
            });
        }
        Device::Gpu(gpu) => {
            let rows = y.numel().checked_div(dim).unwrap_or(0);
            let (rows_per_chunk, chunks) = Grid::chunks(rows, dim, x.dtype());
            let bias = packed(bias)?;
            let args = args![&mut y, x, bias.as_ref(), rows as i64, rows_per_chunk as i64, size32(dim)?];
            gpu.kernel("glu_fwd", &[("DTYPE", x.dtype().name()), ("ACTIVATION", f.name())])?
                .launch(Grid::columns(dim, chunks, x.dtype()), args)?;
        }
    }
    let (kept, summand) = (x.detach(), bias.map(Tensor::detach));
    let again = move || glu(op, f, &kept, summand.as_ref(), dim);
    let backward = |_: &Tensor| GluBackward { op, x: x.detach(), bias: bias.map(Tensor::detach), activation: f };
    let inputs: Vec<&Tensor> = std::iter::once(x).chain(bias).collect_vec();
    record_cheap(op, y, &inputs, backward, again)
}

fn forward<R: Real>(f: Activation, x: &[R], bias: &[R], y: &mut [R]) {
    let dim = bias.len() / 2;
    let (to_value, to_gate) = bias.split_at(dim);
    for (x, y) in x.chunks_exact(2 * dim).zip(y.chunks_exact_mut(dim)) {
        let (value, gate) = x.split_at(dim);
        sum_value(f, gate, to_gate, y);
        multiply_sum(value, to_value, y);
    }
}

vectorized! {
    /// Computes `y = (x + bias) ⊙ y`.
    fn multiply_sum<R: Real>(x: &[R], bias: &[R], y: &mut [R]) {
        for ((y, x), &bias) in y.iter_mut().zip(x).zip(bias) {
            *y = (*x + bias) * *y;
        }
    }
}

struct GluBackward {
    op: &'static str,
    x: Tensor,
    bias: Option<Tensor>,
    activation: Activation,
}

impl Backward for GluBackward {
    fn name(&self) -> &'static str {
        self.op
    }

    /// Computes `dvalue = g ⊙ activation(gate)`, `dgate = g ⊙ value ⊙ activation'(gate)`, `dbias = Σ_rows dx`.
    fn backward(self: Box<Self>, grad: Tensor, need: &[bool]) -> Result<InputGrads> {
        let Self { op, x, bias, activation: f } = *self;
        let grad = grad.contiguous()?;
        let dim = grad.dim(-1)?;
        let rows = grad.numel().checked_div(dim).unwrap_or(0);
        let bias_needed = need.get(1).is_some_and(|&need| need);
        // If nothing else holds the input, its gradient takes its place.
        let (mut dx, source) = reuse(x)?;
        let sums = match grad.device() {
            Device::Cpu => {
                // Rows are summed in blocks whose size depends only on the shape.
                let block = cpu::rows_per_task(rows, 2 * COST * dim);
                let mut sums = partial_sums(&grad, bias_needed.then(|| rows.div_ceil(block)), 2 * dim)?;
                let source = source.as_ref().map(|source| source.floats(op)).transpose()?;
                let summand = packed(bias.as_ref())?;
                let summand = summand.as_ref().map(|bias| bias.floats(op)).transpose()?;
                let g = In::new(grad.floats(op)?, dim);
                let dx = Out::over(dx.floats_mut(op)?, 2 * dim, source);
                dispatch_real!(grad.dtype(), R, {
                    let bias: Vec<R> = wide_bias(summand, 2 * dim);
                    let sums = Sums::new(sums_mut::<R>(&mut sums)?, 2 * dim, block);
                    for_rows_of::<R, 1, 1>([dx], [g], sums, 2 * COST * dim, &|_, [dx], [g], sums| {
                        backward(f, g, &bias, dx, sums);
                    });
                });
                sums
            }
            Device::Gpu(gpu) => {
                let dtype = grad.dtype();
                let (rows_per_chunk, chunks) = Grid::chunks(rows, dim, dtype);
                let mut sums = partial_sums(&grad, bias_needed.then_some(chunks), 2 * dim)?;
                let bias = packed(bias.as_ref())?;
                let args = args![
                    &mut dx,
                    sums.as_mut(),
                    source.as_ref(),
                    bias.as_ref(),
                    &grad,
                    rows as i64,
                    rows_per_chunk as i64,
                    size32(dim)?
                ];
                gpu.kernel("glu_bwd", &[("DTYPE", dtype.name()), ("ACTIVATION", f.name())])?
                    .launch(Grid::columns(dim, chunks, dtype), args)?;
                sums
            }
        };
        let mut grads = vec![need[0].then_some(dx)];
        if bias.is_some() {
            grads.push(bias_gradient(sums, &grad)?);
        }
        Ok(InputGrads::whole(grads))
    }
}

/// Overwrites the input with `dx`; `sums`, if not empty, gets the sums of its columns.
fn backward<R: Real>(f: Activation, g: &[R], bias: &[R], dx: &mut [R], sums: &mut [R]) {
    let dim = bias.len() / 2;
    let closes = f.closes();
    let (mut activated, mut slopes) = ([R::ZERO; TILE], [R::ZERO; TILE]);
    for (g, dx) in g.chunks_exact(dim).zip(dx.chunks_exact_mut(2 * dim)) {
        let (dvalue, dgate) = dx.split_at_mut(dim);
        let tiles = dvalue.chunks_mut(TILE).zip(dgate.chunks_mut(TILE)).zip(g.chunks(TILE));
        for (tile, ((dvalue, dgate), g)) in tiles.enumerate() {
            let start = tile * TILE;
            let (to_value, to_gate) = (&bias[start..][..g.len()], &bias[dim + start..][..g.len()]);
            let (activated, slopes) = (&mut activated[..g.len()], &mut slopes[..g.len()]);
            sum_value_and_slope(f, dgate, to_gate, activated, slopes);
            gradients(closes, g, to_value, activated, slopes, dvalue, dgate);
        }
        add_to(sums, dx);
    }
}

vectorized! {
    /// Computes the gradients of value and gate, the former in place of the value.
    fn gradients<R: Real>(
        closes: bool,
        g: &[R],
        to_value: &[R],
        activated: &[R],
        slopes: &[R],
        value: &mut [R],
        gate: &mut [R],
    ) {
        if closes {
            for (((gate, slope), g), (value, &to_value)) in
                gate.iter_mut().zip(slopes).zip(g).zip(value.iter().zip(to_value))
            {
                let product = *slope * *g * (*value + to_value);
                *gate = if *slope == R::ZERO { R::ZERO } else { product };
            }
        } else {
            for (((gate, slope), g), (value, &to_value)) in
                gate.iter_mut().zip(slopes).zip(g).zip(value.iter().zip(to_value))
            {
                *gate = *slope * *g * (*value + to_value);
            }
        }
        for ((value, activated), g) in value.iter_mut().zip(activated).zip(g) {
            *value = *activated * *g;
        }
    }
}
