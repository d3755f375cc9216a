//! Activations of a sum with a bias, as behind the matrix product of a dense layer.

use super::{
    norm::{reuse, widen},
    pointwise::{Gelu, GeluTanh, Keep, ReluSquared, Sigmoid, Silu, Unary},
    reduce::sum_chunks,
};
use crate::{
    Device, Error, Result, Tensor,
    autograd::{Backward, InputGrads, record_cheap},
    device::{Grid, args, cpu, simd::vectorized, size32},
    dtype::{Float, Real, dispatch_float},
    error::ensure,
    shape::Shape,
    tensor::same_kind,
};

/// The function in [`Tensor::add_activation`] and of the gate in [`Tensor::glu`].
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
    /// `max(x, 0)`: [`Tensor::relu`].
    Relu,
    /// `x / (1 + e^(−1.702 x))`, an approximation of GELU.
    QuickGelu,
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
            Self::Relu => x.relu(),
            Self::QuickGelu => x.mul(&x.affine(1.702, 0.0)?.sigmoid()?),
        }
    }
}

impl Tensor {
    /// `activation(x + bias)` in one pass, the sum never being rounded; [`Activation::Relu`] and [`Activation::QuickGelu`]
    /// take several passes.
    ///
    /// Shapes: `[.., dim]`, bias `[dim]` → `[.., dim]`. Computed in f32 (f64 for f64). Saves: the inputs; the sum is
    /// computed again in the backward pass, which adds up the gradient of the bias as it goes.
    ///
    /// Errors: rank 0, a bias of another shape, dtypes or devices that differ, or a dtype that is not float.
    ///
    /// ```
    /// use x_transformers::{Device, Tensor, ops::Activation};
    /// # fn main() -> x_transformers::Result<()> {
    /// let x = Tensor::from_slice(&[1.0f32, -5.0], [2], &Device::Cpu)?;
    /// let bias = Tensor::from_slice(&[2.0f32, 3.0], [2], &Device::Cpu)?;
    /// assert_eq!(x.add_activation(&bias, Activation::ReluSquared)?.to_vec::<f32>()?, [9.0, 0.0]);
    /// # Ok(())
    /// # }
    /// ```
    pub fn add_activation(&self, bias: &Tensor, activation: Activation) -> Result<Tensor> {
        self.dtype().expect_float(OP)?;
        ensure!(self.rank() > 0, Error::shape(OP, "expected at least one dimension, got a scalar"));
        check_bias(OP, self, bias)?;
        let x = self.contiguous()?;
        match activation {
            Activation::Gelu => activate::<Gelu>(&x, bias),
            Activation::GeluTanh => activate::<GeluTanh>(&x, bias),
            Activation::ReluSquared => activate::<ReluSquared>(&x, bias),
            Activation::Sigmoid => activate::<Sigmoid>(&x, bias),
            Activation::Silu => activate::<Silu>(&x, bias),
            Activation::Relu | Activation::QuickGelu => activation.of(&x.add(bias)?),
        }
    }
}

const OP: &str = "add_activation";

/// Element operations that an activation counts for.
pub(super) const COST: usize = 12;

/// Features that a backward pass handles together: its loops write one array each, so that they vectorise.
pub(super) const TILE: usize = 64;

/// Checks that a bias has an element for each feature.
pub(super) fn check_bias(op: &'static str, x: &Tensor, bias: &Tensor) -> Result<()> {
    same_kind(op, x, bias)?;
    let features = x.dim(-1)?;
    ensure!(
        **bias.shape() == [features],
        Error::shape(op, format!("expected a bias of shape [{features}] for {:?}, got {:?}", x.shape(), bias.shape()))
    );
    Ok(())
}

fn activate<F: Unary>(x: &Tensor, bias: &Tensor) -> Result<Tensor> {
    let mut y = x.uninit_like()?;
    let dim = x.dim(-1)?;
    match x.device() {
        Device::Cpu => dispatch_float!(OP, x.dtype(), T, {
            let (from, bias) = (x.values::<T>()?, widen::<T>(Some(bias), dim, <T as Float>::Acc::ZERO)?);
            cpu::for_rows(y.values_mut::<T>()?, dim, COST * dim, |row, y| {
                forward::<T, F>(&from[row * dim..][..y.len()], &bias, y);
            });
            Ok(())
        })?,
        Device::Gpu(gpu) => {
            let rows = x.numel().checked_div(dim).unwrap_or(0);
            let (rows_per_chunk, chunks) = Grid::chunks(rows, dim, x.dtype());
            let bias = bias.detach().contiguous()?;
            let args = args![&mut y, x, &bias, rows as i64, rows_per_chunk as i64, size32(dim)?];
            gpu.kernel("activation_fwd", &[("DTYPE", x.dtype().name()), ("ACTIVATION", F::NAME)])?
                .launch(Grid::columns(dim, chunks, x.dtype()), args)?;
        }
    }
    let (kept, summand) = (x.detach(), bias.detach());
    let again = move || activate::<F>(&kept, &summand);
    let backward = |_: &Tensor| ActivationBackward::<F> {
        x: x.detach(),
        bias: bias.detach(),
        activation: std::marker::PhantomData,
    };
    record_cheap(OP, y, &[x, bias], backward, again)
}

vectorized! {
    fn forward<T: Float, F: Unary>(x: &[T], bias: &[T::Acc], y: &mut [T]) {
        for (x, y) in x.chunks_exact(bias.len()).zip(y.chunks_exact_mut(bias.len())) {
            for ((y, x), &bias) in y.iter_mut().zip(x).zip(bias) {
                *y = T::from_acc(F::value::<T::Acc, FUSED>(x.to_acc() + bias));
            }
        }
    }
}

struct ActivationBackward<F> {
    x: Tensor,
    bias: Tensor,
    activation: std::marker::PhantomData<F>,
}

impl<F: Unary> Backward for ActivationBackward<F> {
    fn name(&self) -> &'static str {
        OP
    }

    /// `dx = g ⊙ activation'(x + bias)`, `dbias = Σ_rows dx`
    fn backward(self: Box<Self>, grad: Tensor, need: &[bool]) -> Result<InputGrads> {
        let Self { x, bias, .. } = &*self;
        let dim = x.dim(-1)?;
        let rows = x.numel().checked_div(dim).unwrap_or(0);
        let (mut dx, source) = reuse(grad)?;
        let sums = match *dx.device() {
            Device::Cpu => {
                // Rows are summed up in blocks whose size depends on the shape alone.
                let block = cpu::rows_per_task(rows, COST * dim);
                let mut sums = partial_sums(x, need[1].then(|| rows.div_ceil(block)), dim)?;
                dispatch_float!(OP, dx.dtype(), T, {
                    let (x, bias) = (x.values::<T>()?, widen::<T>(Some(bias), dim, <T as Float>::Acc::ZERO)?);
                    let source = source.as_ref().map(|source| source.values::<T>()).transpose()?;
                    let run = |row: usize, dx: &mut [T], sums: &mut [<T as Float>::Acc]| {
                        let part = row * dim..row * dim + dx.len();
                        let source = source.map(|source| &source[part.clone()]);
                        backward::<T, F>(&x[part], source, &bias, dx, sums);
                    };
                    let sums = sums_mut::<T>(&mut sums)?;
                    cpu::for_blocks(dx.values_mut::<T>()?, sums, (dim, dim), block, COST * dim, run);
                    Ok(())
                })?;
                sums
            }
            Device::Gpu(gpu) => {
                let dtype = dx.dtype();
                let (rows_per_chunk, chunks) = Grid::chunks(rows, dim, dtype);
                let mut sums = partial_sums(x, need[1].then_some(chunks), dim)?;
                let bias = bias.contiguous()?;
                let args = args![
                    &mut dx,
                    sums.as_mut(),
                    x,
                    &bias,
                    source.as_ref().unwrap_or(&dx),
                    rows as i64,
                    rows_per_chunk as i64,
                    size32(dim)?
                ];
                gpu.kernel("activation_bwd", &[("DTYPE", dtype.name()), ("ACTIVATION", F::NAME)])?
                    .launch(Grid::columns(dim, chunks, dtype), args)?;
                sums
            }
        };
        Ok(InputGrads::whole([need[0].then_some(dx), bias_gradient(sums, x)?]))
    }
}

/// Room for sums over blocks of rows, `[blocks, width]`, in the accumulation type of `x`.
pub(super) fn partial_sums(x: &Tensor, blocks: Option<usize>, width: usize) -> Result<Option<Tensor>> {
    let room = |blocks| Tensor::uninit(Shape::new(&[blocks, width])?, x.dtype().accumulator(), x.device());
    blocks.map(room).transpose()
}

/// The values of such sums, none if they are not wanted.
pub(super) fn sums_mut<T: Float>(sums: &mut Option<Tensor>) -> Result<&mut [T::Acc]> {
    sums.as_mut().map_or(Ok(&mut []), |sums| sums.values_mut::<T::Acc>())
}

/// The gradient of a bias of `x` from sums over blocks of rows.
pub(super) fn bias_gradient(sums: Option<Tensor>, x: &Tensor) -> Result<Option<Tensor>> {
    let Some(sums) = sums else { return Ok(None) };
    match *x.device() {
        Device::Cpu => sums.sum(&[0])?.to_dtype(x.dtype()).map(Some),
        Device::Gpu(gpu) => {
            let [gradient, _] = sum_chunks(gpu, &sums, x.dtype(), sums.dim(1)?, [true, false])?;
            Ok(gradient)
        }
    }
}

vectorized! {
    /// Writes `dx` over the gradient of the output, which `source` holds unless `dx` does already; `sums`, if not empty,
    /// gets the sums of its columns.
    fn backward<T: Float, F: Unary>(
        x: &[T],
        source: Option<&[T]>,
        bias: &[T::Acc],
        dx: &mut [T],
        sums: &mut [T::Acc],
    ) {
        let dim = bias.len();
        sums.fill(T::Acc::ZERO);
        for (row, (x, dx)) in x.chunks_exact(dim).zip(dx.chunks_exact_mut(dim)).enumerate() {
            if let Some(source) = source {
                dx.copy_from_slice(&source[row * dim..][..dim]);
            }
            for ((dx, x), &bias) in dx.iter_mut().zip(x).zip(bias) {
                let sum = x.to_acc() + bias;
                let kept = match F::KEEP {
                    Keep::Input => sum,
                    Keep::Output => F::value::<T::Acc, FUSED>(sum),
                };
                *dx = T::from_acc(F::gradient::<T::Acc, FUSED>(dx.to_acc(), kept));
            }
            // A loop of its own, which finds the row in the cache: each writes one array, so that both vectorise.
            for (sum, dx) in sums.iter_mut().zip(&*dx) {
                *sum += dx.to_acc();
            }
        }
    }
}
