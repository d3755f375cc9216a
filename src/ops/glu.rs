//! Gated linear units: one half of the features times an activation of the other.

use super::{
    activation::{Activation, COST, TILE, bias_gradient, check_bias, partial_sums, sums_mut},
    norm::{packed, reuse, widen},
    pointwise::{Gelu, GeluTanh, Keep, ReluSquared, Sigmoid, Silu, Unary},
};
use crate::{
    Device, Error, Result, Tensor,
    autograd::{Backward, InputGrads, record_cheap},
    device::{Grid, args, cpu, simd::vectorized, size32},
    dtype::{Float, Real, dispatch_float},
};

impl Tensor {
    /// `value ⊙ activation(gate)`, where the first half of the features is the value and the second the gate
    /// (Shazeer, GLU variants improve transformer, <https://arxiv.org/abs/2002.05202>).
    ///
    /// Shapes: `[.., 2 dim] → [.., dim]`. Saves: the input alone; the activation is computed again in the backward pass.
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
    pub fn glu(&self, activation: Activation) -> Result<Tensor> {
        gated("glu", self, None, activation)
    }

    /// [`Tensor::glu`] of the sum with a bias, in one pass, the sum never being rounded: what follows the matrix product
    /// of a dense layer.
    ///
    /// Shapes: `[.., 2 dim]`, bias `[2 dim]` → `[.., dim]`. Saves: the inputs; the sum and the activation are computed
    /// again in the backward pass, which adds up the gradient of the bias as it goes.
    ///
    /// Errors: as [`Tensor::glu`], a bias of another shape, or dtypes or devices that differ.
    pub fn add_glu(&self, bias: &Tensor, activation: Activation) -> Result<Tensor> {
        gated("add_glu", self, Some(bias), activation)
    }
}

fn gated(op: &'static str, x: &Tensor, bias: Option<&Tensor>, activation: Activation) -> Result<Tensor> {
    let width = x.shape().last().copied();
    let Some(width) = width.filter(|width| width.is_multiple_of(2)) else {
        let shape = x.shape();
        return Err(Error::shape(op, format!("expected an even number of features [.., 2 dim], got {shape:?}")));
    };
    x.dtype().expect_float(op)?;
    bias.map_or(Ok(()), |bias| check_bias(op, x, bias))?;
    let x = x.contiguous()?;
    match activation {
        Activation::Gelu => glu::<Gelu>(op, &x, bias, width / 2),
        Activation::GeluTanh => glu::<GeluTanh>(op, &x, bias, width / 2),
        Activation::ReluSquared => glu::<ReluSquared>(op, &x, bias, width / 2),
        Activation::Sigmoid => glu::<Sigmoid>(op, &x, bias, width / 2),
        Activation::Silu => glu::<Silu>(op, &x, bias, width / 2),
        Activation::Relu | Activation::QuickGelu => {
            let x = bias.map(|bias| x.add(bias)).transpose()?.unwrap_or(x);
            x.narrow(-1, 0, width / 2)?.mul(&activation.of(&x.narrow(-1, width / 2, width / 2)?)?)
        }
    }
}

fn glu<F: Unary>(op: &'static str, x: &Tensor, bias: Option<&Tensor>, dim: usize) -> Result<Tensor> {
    let mut y = Tensor::uninit(x.shape().with_dim(x.rank() - 1, dim), x.dtype(), x.device())?;
    match x.device() {
        Device::Cpu => dispatch_float!(op, x.dtype(), T, {
            let (from, bias) = (x.values::<T>()?, widen::<T>(bias, 2 * dim, <T as Float>::Acc::ZERO)?);
            cpu::for_rows(y.values_mut::<T>()?, dim, COST * dim, |row, y| {
                forward::<T, F>(&from[2 * row * dim..][..2 * y.len()], &bias, y);
            });
            Ok(())
        })?,
        Device::Gpu(gpu) => {
            let rows = y.numel().checked_div(dim).unwrap_or(0);
            let (rows_per_chunk, chunks) = Grid::chunks(rows, dim, x.dtype());
            let bias = packed(bias)?;
            let args = args![&mut y, x, bias.as_ref(), rows as i64, rows_per_chunk as i64, size32(dim)?];
            gpu.kernel("glu_fwd", &[("DTYPE", x.dtype().name()), ("ACTIVATION", F::NAME)])?
                .launch(Grid::columns(dim, chunks, x.dtype()), args)?;
        }
    }
    let (kept, summand) = (x.detach(), bias.map(Tensor::detach));
    let again = move || glu::<F>(op, &kept, summand.as_ref(), dim);
    let backward = |_: &Tensor| GluBackward::<F> {
        op,
        x: x.detach(),
        bias: bias.map(Tensor::detach),
        activation: std::marker::PhantomData,
    };
    let inputs: Vec<&Tensor> = std::iter::once(x).chain(bias).collect();
    record_cheap(op, y, &inputs, backward, again)
}

vectorized! {
    fn forward<T: Float, F: Unary>(x: &[T], bias: &[T::Acc], y: &mut [T]) {
        let dim = bias.len() / 2;
        let (to_value, to_gate) = bias.split_at(dim);
        for (x, y) in x.chunks_exact(2 * dim).zip(y.chunks_exact_mut(dim)) {
            let (value, gate) = x.split_at(dim);
            let biases = to_value.iter().zip(to_gate);
            for (((y, value), gate), (&to_value, &to_gate)) in y.iter_mut().zip(value).zip(gate).zip(biases) {
                *y = T::from_acc((value.to_acc() + to_value) * F::value::<T::Acc, FUSED>(gate.to_acc() + to_gate));
            }
        }
    }
}

struct GluBackward<F> {
    op: &'static str,
    x: Tensor,
    bias: Option<Tensor>,
    activation: std::marker::PhantomData<F>,
}

impl<F: Unary> Backward for GluBackward<F> {
    fn name(&self) -> &'static str {
        self.op
    }

    /// `dvalue = g ⊙ activation(gate)`, `dgate = g ⊙ value ⊙ activation'(gate)`, `dbias = Σ_rows dx`
    fn backward(self: Box<Self>, grad: Tensor, need: &[bool]) -> Result<InputGrads> {
        let Self { op, x, bias, .. } = *self;
        let grad = grad.contiguous()?;
        let dim = grad.dim(-1)?;
        let rows = grad.numel().checked_div(dim).unwrap_or(0);
        let bias_needed = need.get(1).is_some_and(|&need| need);
        // Nobody else may hold the input: then its gradient takes its place.
        let (mut dx, source) = reuse(x)?;
        let sums = match grad.device() {
            Device::Cpu => {
                // Rows are summed up in blocks whose size depends on the shape alone.
                let block = cpu::rows_per_task(rows, 2 * COST * dim);
                let mut sums = partial_sums(&grad, bias_needed.then(|| rows.div_ceil(block)), 2 * dim)?;
                dispatch_float!(op, grad.dtype(), T, {
                    let source = source.as_ref().map(|source| source.values::<T>()).transpose()?;
                    let bias = widen::<T>(bias.as_ref(), 2 * dim, <T as Float>::Acc::ZERO)?;
                    let g = grad.values::<T>()?;
                    let run = |row: usize, dx: &mut [T], sums: &mut [<T as Float>::Acc]| {
                        let source = source.map(|source| &source[2 * row * dim..][..dx.len()]);
                        backward::<T, F>(source, &g[row * dim..][..dx.len() / 2], &bias, dx, sums);
                    };
                    let (to, sums) = (dx.values_mut::<T>()?, sums_mut::<T>(&mut sums)?);
                    cpu::for_blocks(to, sums, (2 * dim, 2 * dim), block, 2 * COST * dim, run);
                    Ok(())
                })?;
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
                gpu.kernel("glu_bwd", &[("DTYPE", dtype.name()), ("ACTIVATION", F::NAME)])?
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

vectorized! {
    /// Writes `dx` over the input, which `source` holds unless `dx` does already; `sums`, if not empty, gets the sums of
    /// its columns.
    fn backward<T: Float, F: Unary>(
        source: Option<&[T]>,
        g: &[T],
        bias: &[T::Acc],
        dx: &mut [T],
        sums: &mut [T::Acc],
    ) {
        let dim = bias.len() / 2;
        sums.fill(T::Acc::ZERO);
        for (row, (g, dx)) in g.chunks_exact(dim).zip(dx.chunks_exact_mut(2 * dim)).enumerate() {
            if let Some(source) = source {
                dx.copy_from_slice(&source[2 * row * dim..][..2 * dim]);
            }
            let (dvalue, dgate) = dx.split_at_mut(dim);
            let tiles = dvalue.chunks_mut(TILE).zip(dgate.chunks_mut(TILE)).zip(g.chunks(TILE));
            for (tile, ((dvalue, dgate), g)) in tiles.enumerate() {
                let start = tile * TILE;
                let biases = [&bias[start..][..g.len()], &bias[dim + start..][..g.len()]];
                let [dv, du] = backward_tile::<T, F, FUSED>(dvalue, dgate, biases, g);
                if let Some(sums) = sums.get_mut(start..) {
                    sums.iter_mut().zip(&dv[..g.len()]).for_each(|(sum, &dv)| *sum += dv);
                }
                if let Some(sums) = sums.get_mut(dim + start..) {
                    sums.iter_mut().zip(&du[..g.len()]).for_each(|(sum, &du)| *sum += du);
                }
            }
        }
    }
}

/// The gradients of a tile, unrounded too. The loops write one array each, so that they vectorise.
#[inline(always)]
fn backward_tile<T: Float, F: Unary, const FUSED: bool>(
    value: &mut [T],
    gate: &mut [T],
    [to_value, to_gate]: [&[T::Acc]; 2],
    g: &[T],
) -> [[T::Acc; TILE]; 2] {
    let (mut dv, mut du) = ([T::Acc::ZERO; TILE], [T::Acc::ZERO; TILE]);
    for (((activated, slope), gate), &to_gate) in dv.iter_mut().zip(&mut du).zip(&*gate).zip(to_gate) {
        let gate = gate.to_acc() + to_gate;
        *activated = F::value::<T::Acc, FUSED>(gate);
        *slope = F::derivative::<T::Acc, FUSED>(match F::KEEP {
            Keep::Input => gate,
            Keep::Output => *activated,
        });
    }
    // Where it gates to 0 no gradient passes, be the value infinite.
    let selects = F::NAME == ReluSquared::NAME;
    for (((du, value), &to_value), g) in du.iter_mut().zip(&*value).zip(to_value).zip(g) {
        let product = *du * g.to_acc() * (value.to_acc() + to_value);
        *du = if selects && *du == T::Acc::ZERO { T::Acc::ZERO } else { product };
    }
    for (dv, g) in dv.iter_mut().zip(g) {
        *dv *= g.to_acc();
    }
    for (gate, &du) in gate.iter_mut().zip(&du) {
        *gate = T::from_acc(du);
    }
    for (value, &dv) in value.iter_mut().zip(&dv) {
        *value = T::from_acc(dv);
    }
    [dv, du]
}
