//! Fused bias and activation, as after the matrix product of a dense layer.

use super::{
    norm::reuse,
    pointwise::{Activation, sum_gradient, sum_value},
    reduce::{late_sum, sum_chunks},
};
use crate::{
    Device, Error, Result, Tensor,
    autograd::{Backward, InputGrads, record_cheap},
    device::{
        Grid, args, cpu,
        floats::Floats,
        rows::{In, Out, Sums, for_rows_of},
        simd::vectorized,
        size32,
    },
    dtype::{Real, dispatch_real},
    error::ensure,
    shape::Shape,
    tensor::same_kind,
};

impl Tensor {
    /// Computes `activation(x + bias)` in one pass, without rounding the sum.
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
        activate(activation, &x, bias)
    }
}

const OP: &str = "add_activation";

/// Cost of an activation, in element operations.
pub(super) const COST: usize = 12;

/// Number of features that a backward pass handles together: its loops write one array each, so that they vectorise.
pub(super) const TILE: usize = 64;

/// Checks that a bias has one element per feature.
pub(super) fn check_bias(op: &'static str, x: &Tensor, bias: &Tensor) -> Result<()> {
    same_kind(op, x, bias)?;
    let features = x.dim(-1)?;
    ensure!(
        **bias.shape() == [features],
        Error::shape(
            op,
            format_args!("expected a bias of shape [{features}] for {:?}, got {:?}", x.shape(), bias.shape())
        )
    );
    Ok(())
}

fn activate(f: Activation, x: &Tensor, bias: &Tensor) -> Result<Tensor> {
    let mut y = x.uninit_like()?;
    let dim = x.dim(-1)?;
    match x.device() {
        Device::Cpu => {
            let summand = bias.packed()?;
            let (from, to) = (In::new(x.floats(OP)?, dim), Out::new(y.floats_mut(OP)?, dim));
            dispatch_real!(x.dtype(), R, {
                let bias: Vec<R> = summand.floats(OP)?.to_vec();
                for_rows_of::<R, 1, 1>([to], [from], Sums::none(), COST * dim, &|_, [y], [x], _| {
                    let rows = x.chunks_exact(dim).zip(y.chunks_exact_mut(dim));
                    rows.for_each(|(x, y)| sum_value(f, x, &bias, y));
                });
            });
        }
        Device::Gpu(gpu) => {
            let rows = x.numel().checked_div(dim).unwrap_or(0);
            let (rows_per_chunk, chunks) = Grid::chunks(rows, dim, x.dtype());
            let bias = bias.detach().contiguous()?;
            let args = args![&mut y, x, &bias, rows as i64, rows_per_chunk as i64, size32(dim)?];
            gpu.kernel("activation_fwd", &[("DTYPE", x.dtype().name()), ("ACTIVATION", f.name())])?
                .launch(Grid::columns(dim, chunks, x.dtype()), args)?;
        }
    }
    let (kept, summand) = (x.detach(), bias.detach());
    let again = move || activate(f, &kept, &summand);
    let backward = |_: &Tensor| ActivationBackward { x: x.detach(), bias: bias.detach(), activation: f };
    record_cheap(OP, y, &[x, bias], backward, again)
}

struct ActivationBackward {
    x: Tensor,
    bias: Tensor,
    activation: Activation,
}

impl Backward for ActivationBackward {
    fn name(&self) -> &'static str {
        OP
    }

    /// Computes `dx = g ⊙ activation'(x + bias)`, `dbias = Σ_rows dx`.
    fn backward(self: Box<Self>, grad: Tensor, need: &[bool]) -> Result<InputGrads> {
        let Self { x, bias, activation: f } = &*self;
        let f = *f;
        let dim = x.dim(-1)?;
        let rows = x.numel().checked_div(dim).unwrap_or(0);
        let (mut dx, source) = reuse(grad)?;
        let sums = match *dx.device() {
            Device::Cpu => {
                // Rows are summed in blocks whose size depends only on the shape.
                let block = cpu::rows_per_task(rows, COST * dim);
                let mut sums = partial_sums(x, need[1].then(|| rows.div_ceil(block)), dim)?;
                let source = source.as_ref().map(|source| source.floats(OP)).transpose()?;
                let (x, summand) = (In::new(x.floats(OP)?, dim), bias.packed()?);
                let dx = Out::over(dx.floats_mut(OP)?, dim, source);
                dispatch_real!(bias.dtype(), R, {
                    let bias: Vec<R> = summand.floats(OP)?.to_vec();
                    let sums = Sums::new(sums_mut::<R>(&mut sums)?, dim, block);
                    for_rows_of::<R, 1, 1>([dx], [x], sums, COST * dim, &|_, [dx], [x], sums| {
                        for (x, dx) in x.chunks_exact(dim).zip(dx.chunks_exact_mut(dim)) {
                            sum_gradient(f, x, &bias, dx);
                            add_to(sums, dx);
                        }
                    });
                });
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
                gpu.kernel("activation_bwd", &[("DTYPE", dtype.name()), ("ACTIVATION", f.name())])?
                    .launch(Grid::columns(dim, chunks, dtype), args)?;
                sums
            }
        };
        Ok(InputGrads::whole([need[0].then_some(dx), bias_gradient(sums, x)?]))
    }
}

/// Allocates sums over blocks of rows, `[blocks, width]`, in the accumulation type of `x`.
pub(super) fn partial_sums(x: &Tensor, blocks: Option<usize>, width: usize) -> Result<Option<Tensor>> {
    let room = |blocks| Tensor::uninit(Shape::new(&[blocks, width])?, x.dtype().accumulator(), x.device());
    blocks.map(room).transpose()
}

/// Returns the values of such sums, an empty slice if they are not wanted.
pub(super) fn sums_mut<R: Real>(sums: &mut Option<Tensor>) -> Result<&mut [R]> {
    sums.as_mut().map_or(Ok(&mut []), |sums| sums.values_mut::<R>())
}

/// Returns the gradient of a bias of `x` from sums over blocks of rows.
pub(super) fn bias_gradient(sums: Option<Tensor>, x: &Tensor) -> Result<Option<Tensor>> {
    let Some(sums) = sums else { return Ok(None) };
    match *x.device() {
        Device::Cpu => sums.sum(&[0])?.to_dtype(x.dtype()).map(Some),
        Device::Gpu(_) => {
            let columns = [0, sums.dim(1)?];
            Ok(sum_chunks(&[late_sum(&sums, columns, x.dtype())])?.pop())
        }
    }
}

vectorized! {
    /// Adds a row to sums, which may be empty.
    pub(super) fn add_to<R: Real>(sums: &mut [R], row: &[R]) {
        for (sum, x) in sums.iter_mut().zip(row) {
            *sum += *x;
        }
    }
}

/// Returns a bias in the compute type, zeros without one.
pub(super) fn wide_bias<R: Real>(bias: Option<Floats>, width: usize) -> Vec<R> {
    bias.map_or_else(|| vec![R::ZERO; width], Floats::to_vec)
}
