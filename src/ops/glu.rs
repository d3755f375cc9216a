//! Gated linear units: one half of the features times an activation of the other.

use super::pointwise::{Gelu, GeluTanh, Keep, ReluSquared, Sigmoid, Silu, Unary};
use crate::{
    Device, Error, Result, Tensor,
    core::{Backward, Contributions, Float, Real, dispatch_float, record_cheap},
    device::{Grid, args, cpu, simd::vectorized, size32},
};

/// The function of the gate in [`Tensor::glu`].
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Activation {
    /// `x Φ(x)`, the exact form: [`Tensor::gelu`].
    Gelu,
    /// Its approximation by tanh: [`Tensor::gelu_tanh`].
    GeluTanh,
    /// `max(x, 0)²`: [`Tensor::relu_squared`].
    ReluSquared,
    /// `1 / (1 + e^−x)`: [`Tensor::sigmoid`].
    Sigmoid,
    /// `x / (1 + e^−x)`: [`Tensor::silu`].
    Silu,
}

impl Activation {
    /// The function of each element.
    ///
    /// Errors: a dtype that is not float.
    pub fn of(self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Gelu => x.gelu(),
            Self::GeluTanh => x.gelu_tanh(),
            Self::ReluSquared => x.relu_squared(),
            Self::Sigmoid => x.sigmoid(),
            Self::Silu => x.silu(),
        }
    }
}

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
        let width = self.shape().last().copied();
        let Some(width) = width.filter(|width| width.is_multiple_of(2)) else {
            let shape = self.shape();
            return Err(Error::shape("glu", format!("expected an even number of features [.., 2 dim], got {shape:?}")));
        };
        self.dtype().expect_float("glu")?;
        let x = self.contiguous()?;
        match activation {
            Activation::Gelu => glu::<Gelu>(&x, width / 2),
            Activation::GeluTanh => glu::<GeluTanh>(&x, width / 2),
            Activation::ReluSquared => glu::<ReluSquared>(&x, width / 2),
            Activation::Sigmoid => glu::<Sigmoid>(&x, width / 2),
            Activation::Silu => glu::<Silu>(&x, width / 2),
        }
    }
}

/// Element operations that an activation counts for.
const COST: usize = 12;

fn glu<F: Unary>(x: &Tensor, dim: usize) -> Result<Tensor> {
    let mut y = Tensor::uninit(x.shape().with_dim(x.rank() - 1, dim), x.dtype(), x.device())?;
    match x.device() {
        Device::Cpu => dispatch_float!("glu", x.dtype(), T, {
            let from = x.values::<T>()?;
            cpu::for_rows(y.values_mut::<T>()?, dim, COST * dim, |row, y| {
                forward::<T, F>(&from[2 * row * dim..][..2 * y.len()], dim, y);
            });
            Ok(())
        })?,
        Device::Cuda(gpu) => {
            let rows = y.elements().checked_div(dim).unwrap_or(0);
            gpu.kernel("glu_fwd", &[("DTYPE", x.dtype().name()), ("ACTIVATION", F::NAME)])?
                .launch(Grid::rows(rows, dim), args![&mut y, x, rows as i64, size32(dim)?])?;
        }
    }
    let kept = x.detach();
    let again = move || glu::<F>(&kept, dim);
    let backward = |_: &Tensor| GluBackward::<F> { x: x.detach(), activation: std::marker::PhantomData };
    record_cheap("glu", y, &[x], backward, again)
}

vectorized! {
    fn forward<T: Float, F: Unary>(x: &[T], dim: usize, y: &mut [T]) {
        for (x, y) in x.chunks_exact(2 * dim).zip(y.chunks_exact_mut(dim)) {
            let (value, gate) = x.split_at(dim);
            for ((y, value), gate) in y.iter_mut().zip(value).zip(gate) {
                *y = T::from_acc(value.to_acc() * F::value(gate.to_acc()));
            }
        }
    }
}

struct GluBackward<F> {
    x: Tensor,
    activation: std::marker::PhantomData<F>,
}

impl<F: Unary> Backward for GluBackward<F> {
    fn name(&self) -> &'static str {
        "glu"
    }

    /// `dvalue = g ⊙ activation(gate)`, `dgate = g ⊙ value ⊙ activation'(gate)`
    fn backward(self: Box<Self>, grad: Tensor, _need: &[bool]) -> Result<Contributions> {
        let grad = grad.contiguous()?;
        let dim = grad.dim(-1)?;
        // Nobody else may hold the input: then its gradient takes its place.
        let (mut dx, source) = super::norm::reuse(self.x)?;
        match grad.device() {
            Device::Cpu => dispatch_float!("glu", grad.dtype(), T, {
                let source = source.as_ref().map(|source| source.values::<T>()).transpose()?;
                let g = grad.values::<T>()?;
                cpu::for_rows(dx.values_mut::<T>()?, 2 * dim, 2 * COST * dim, |row, dx| {
                    let source = source.map(|source| &source[2 * row * dim..][..dx.len()]);
                    backward::<T, F>(source, &g[row * dim..][..dx.len() / 2], dim, dx);
                });
                Ok(())
            })?,
            Device::Cuda(gpu) => {
                let rows = grad.elements().checked_div(dim).unwrap_or(0);
                gpu.kernel("glu_bwd", &[("DTYPE", grad.dtype().name()), ("ACTIVATION", F::NAME)])?
                    .launch(Grid::rows(rows, dim), args![&mut dx, source.as_ref(), &grad, rows as i64, size32(dim)?])?;
            }
        }
        Ok(Contributions::one(dx))
    }
}

vectorized! {
    /// Writes `dx` over the input, which `source` holds unless `dx` does already.
    fn backward<T: Float, F: Unary>(source: Option<&[T]>, g: &[T], dim: usize, dx: &mut [T]) {
        for (row, (g, dx)) in g.chunks_exact(dim).zip(dx.chunks_exact_mut(2 * dim)).enumerate() {
            if let Some(source) = source {
                dx.copy_from_slice(&source[2 * row * dim..][..2 * dim]);
            }
            let (dvalue, dgate) = dx.split_at_mut(dim);
            let tiles = dvalue.chunks_mut(TILE).zip(dgate.chunks_mut(TILE));
            for ((dvalue, dgate), g) in tiles.zip(g.chunks(TILE)) {
                backward_tile::<T, F>(dvalue, dgate, g);
            }
        }
    }
}

/// Features that the backward pass handles together.
const TILE: usize = 64;

/// The loops write one array each, so that they vectorise.
#[inline(always)]
fn backward_tile<T: Float, F: Unary>(dvalue: &mut [T], dgate: &mut [T], g: &[T]) {
    let (mut activated, mut slope) = ([T::Acc::ZERO; TILE], [T::Acc::ZERO; TILE]);
    for ((activated, slope), gate) in activated.iter_mut().zip(&mut slope).zip(&*dgate) {
        let gate = gate.to_acc();
        *activated = F::value(gate);
        *slope = F::derivative(match F::KEEP {
            Keep::Input => gate,
            Keep::Output => *activated,
        });
    }
    for (((dgate, value), g), &slope) in dgate.iter_mut().zip(&*dvalue).zip(g).zip(&slope) {
        *dgate = T::from_acc(g.to_acc() * value.to_acc() * slope);
    }
    for ((dvalue, g), &activated) in dvalue.iter_mut().zip(g).zip(&activated) {
        *dvalue = T::from_acc(g.to_acc() * activated);
    }
}
