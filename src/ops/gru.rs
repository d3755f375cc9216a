//! The pointwise part of a GRU cell.

use crate::{
    Device, Error, Result, Tensor,
    autograd::{Backward, InputGrads, record},
    collect::CollectVec,
    device::{
        Gpu, Grid, args,
        rows::{In, Out, Sums, for_rows_of},
        simd::vectorized,
        size32,
    },
    dtype::{Float, Real, dispatch_real},
    error::ensure,
    shape::Shape,
    tensor::same_kind,
};

impl Tensor {
    /// Computes a GRU cell's step from its projections, with gates in PyTorch's order (reset, update, new) and this
    /// tensor as the hidden state `h`: `r = σ(i_r + h_r)`, `z = σ(i_z + h_z)`, `n = tanh(i_n + r ⊙ h_n)`, `h' = (1 − z)
    /// ⊙ n + z ⊙ h`.
    ///
    /// Shapes: `self [.., dim]`, `input` and `hidden [.., 3 · dim]`, result `[.., dim]`. Saves: its inputs; the
    /// backward pass recomputes the gates. Errors: shapes, dtypes or devices that do not match.
    pub fn gru_gate(&self, input: &Tensor, hidden: &Tensor) -> Result<Tensor> {
        const OP: &str = "gru_gate";
        self.dtype().expect_float(OP)?;
        same_kind(OP, self, input)?;
        same_kind(OP, self, hidden)?;
        ensure!(self.rank() > 0, Error::shape(OP, "expected at least one dimension, got a scalar"));
        let dim = self.dim(-1)?;
        let mut dims = self.shape().to_vec();
        dims[self.rank() - 1] = 3 * dim;
        let gates = Shape::new(&dims)?;
        ensure!(
            *input.shape() == gates && *hidden.shape() == gates,
            Error::shape(
                OP,
                format_args!(
                    "expected gates {gates:?} for {:?}, got {:?} and {:?}",
                    self.shape(),
                    input.shape(),
                    hidden.shape()
                )
            )
        );
        let (h, input, hidden) = (self.contiguous()?, input.contiguous()?, hidden.contiguous()?);
        let mut y = h.uninit_like()?;
        match h.device() {
            Device::Cpu => {
                let gates = [&input, &hidden].map(|gates| gates.floats(OP).map(|gates| In::new(gates, 3 * dim)));
                let [i, u] = gates;
                let ins = [In::new(h.floats(OP)?, dim), i?, u?];
                let y = Out::new(y.floats_mut(OP)?, dim);
                dispatch_real!(h.dtype(), R, {
                    for_rows_of::<R, 1, 3>([y], ins, Sums::none(), 32 * dim, &|_, [y], [h, i, u], _| {
                        forward::<R>(h, i, u, y, dim);
                    });
                });
            }
            Device::Gpu(gpu) => {
                let rows = h.numel().checked_div(dim).unwrap_or(0);
                gpu.kernel("gru_fwd", &[("DTYPE", h.dtype().name())])?
                    .launch(Grid::rows(rows, dim), args![&mut y, &h, &input, &hidden, rows as i64, size32(dim)?])?;
            }
        }
        record(OP, y, &[&h, &input, &hidden], |_| GruGateBackward {
            h: h.detach(),
            input: input.detach(),
            hidden: hidden.detach(),
        })
    }
}

vectorized! {
    fn forward<T: Float>(h: &[T], input: &[T], hidden: &[T], y: &mut [T], dim: usize) {
        let rows = h.chunks_exact(dim).zip(y.chunks_exact_mut(dim));
        for ((h, y), (i, u)) in rows.zip(input.chunks_exact(3 * dim).zip(hidden.chunks_exact(3 * dim))) {
            for (k, (h, y)) in h.iter().zip(y).enumerate() {
                let gate = |part: usize| (i[part * dim + k].to_acc(), u[part * dim + k].to_acc());
                let [_, z, n] = gates::<T::Acc, FUSED>(gate(0), gate(1), gate(2));
                *y = T::from_acc((T::Acc::ONE - z) * n + z * h.to_acc());
            }
        }
    }
}

/// Computes `r`, `z` and `n` from the parts of input and hidden state.
#[inline(always)]
fn gates<A: Real, const FUSED: bool>(r: (A, A), z: (A, A), n: (A, A)) -> [A; 3] {
    let (r, z) = ((r.0 + r.1).sigmoid::<FUSED>(), (z.0 + z.1).sigmoid::<FUSED>());
    [r, z, (n.0 + r * n.1).fused_tanh::<FUSED>()]
}

struct GruGateBackward {
    h: Tensor,
    input: Tensor,
    hidden: Tensor,
}

impl Backward for GruGateBackward {
    fn name(&self) -> &'static str {
        "gru_gate"
    }

    fn backward(self: Box<Self>, grad: Tensor, _need: &[bool]) -> Result<InputGrads> {
        let grad = grad.contiguous()?;
        let parts = match grad.device() {
            Device::Cpu => self.backward_rows(&grad)?,
            Device::Gpu(gpu) => self.backward_cuda(*gpu, &grad)?,
        };
        Ok(InputGrads::whole(parts.into_iter().map(Some)))
    }
}

impl GruGateBackward {
    /// Computes the gradients of state, input and hidden state.
    fn backward_rows(&self, grad: &Tensor) -> Result<Vec<Tensor>> {
        let dim = self.h.dim(-1)?;
        let rows = self.h.numel().checked_div(dim).unwrap_or(0);
        // One buffer for the three gradients of a row: 3 · dim, 3 · dim and dim.
        let mut all = Tensor::uninit(Shape::new(&[rows, 7 * dim])?, grad.dtype(), grad.device())?;
        let op = "gru_gate";
        let ins = [
            In::new(self.h.floats(op)?, dim),
            In::new(self.input.floats(op)?, 3 * dim),
            In::new(self.hidden.floats(op)?, 3 * dim),
            In::new(grad.floats(op)?, dim),
        ];
        let out = Out::new(all.floats_mut(op)?, 7 * dim);
        dispatch_real!(grad.dtype(), R, {
            for_rows_of::<R, 1, 4>([out], ins, Sums::none(), 64 * dim, &|_, [all], [h, i, u, g], _| {
                backward::<R>(h, i, u, g, all, dim);
            });
        });
        let parts = all.split(&[dim, 3 * dim, 3 * dim], 1)?;
        let shapes = [*self.h.shape(), *self.input.shape(), *self.hidden.shape()];
        parts.iter().zip(shapes).map(|(part, shape)| part.contiguous()?.reshape(shape)).try_collect_vec()
    }

    /// Computes the gradients of [`GruGateBackward::backward_rows`] on a GPU.
    fn backward_cuda(&self, gpu: &dyn Gpu, grad: &Tensor) -> Result<Vec<Tensor>> {
        let Self { h, input, hidden } = self;
        let dim = h.dim(-1)?;
        let rows = h.numel().checked_div(dim).unwrap_or(0);
        let (mut dh, mut di, mut du) = (h.uninit_like()?, input.uninit_like()?, hidden.uninit_like()?);
        gpu.kernel("gru_bwd", &[("DTYPE", h.dtype().name())])?.launch(
            Grid::rows(rows, dim),
            args![&mut dh, &mut di, &mut du, h, input, hidden, grad, rows as i64, size32(dim)?],
        )?;
        Ok(vec![dh, di, du])
    }
}

vectorized! {
    fn backward<T: Float>(h: &[T], input: &[T], hidden: &[T], grad: &[T], all: &mut [T], dim: usize) {
        let rows = h.chunks_exact(dim).zip(grad.chunks_exact(dim)).zip(all.chunks_exact_mut(7 * dim));
        for (((h, g), all), (i, u)) in rows.zip(input.chunks_exact(3 * dim).zip(hidden.chunks_exact(3 * dim))) {
            for (k, (h, g)) in h.iter().zip(g).enumerate() {
                let (h, g, one) = (h.to_acc(), g.to_acc(), T::Acc::ONE);
                let gate = |part: usize| (i[part * dim + k].to_acc(), u[part * dim + k].to_acc());
                let [r, z, n] = gates::<T::Acc, FUSED>(gate(0), gate(1), gate(2));
                let dn = g * (one - z) * (one - n * n);
                let dr = dn * gate(2).1 * r * (one - r);
                let dz = g * (h - n) * z * (one - z);
                // Hidden state, then the gates of the input, then those of the hidden state.
                for (part, value) in [g * z, dr, dz, dn, dr, dz, dn * r].into_iter().enumerate() {
                    all[part * dim + k] = T::from_acc(value);
                }
            }
        }
    }
}
