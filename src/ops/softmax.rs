//! Softmax over the last dimension.

use crate::{
    Device, Result, Tensor,
    autograd::{Backward, InputGrads, record},
    device::{Grid, args, cpu, simd::vectorized, size32},
    dtype::{Float, Real, dispatch_float},
    ops::reduce::{fold, fold2, max_slice, sum_slice},
};

impl Tensor {
    /// Softmax over the last dimension: `y_j = exp(x_j − max x) / Σ exp(x − max x)`.
    ///
    /// Shapes: `[.., j] → [.., j]`; a scalar counts as a row of one. A row that holds NaN or +∞, or nothing but −∞, gives
    /// NaN, as in PyTorch. Statistics in f32 (f64 for f64). Saves: `y`. Errors: a dtype that is not float.
    ///
    /// On a GPU exponentials of half types have errors of up to 2⁻¹⁷, which their rounding hides.
    pub fn softmax(&self) -> Result<Tensor> {
        if self.rank() == 0 {
            return self.unsqueeze(0)?.softmax()?.squeeze(0);
        }
        self.dtype().expect_float("softmax")?;
        let x = self.contiguous()?;
        let mut y = x.uninit_like()?;
        let width = x.dim(-1)?;
        match x.device() {
            Device::Cpu => dispatch_float!("softmax", x.dtype(), T, {
                let from = x.values::<T>()?;
                cpu::for_rows(y.values_mut::<T>()?, width, 8 * width, |row, y| {
                    forward::<T>(&from[row * width..][..y.len()], y, width);
                });
                Ok(())
            })?,
            Device::Gpu(gpu) => {
                let rows = x.numel().checked_div(width).unwrap_or(0);
                gpu.kernel("softmax_fwd", &[("DTYPE", x.dtype().name())])?
                    .launch(Grid::held_rows(rows, width, x.dtype()), args![&mut y, &x, rows as i64, size32(width)?])?;
            }
        }
        record("softmax", y, &[&x], |y| SoftmaxBackward { y: y.detach() })
    }
}

vectorized! {
    fn forward<T: Float>(x: &[T], y: &mut [T], width: usize) {
        for (x, y) in x.chunks_exact(width).zip(y.chunks_exact_mut(width)) {
            let max = max_slice(x);
            if size_of::<T>() < size_of::<T::Acc>() {
                // Computed twice, because `y` cannot hold the exponentials without rounding them first.
                let scale = T::Acc::ONE / fold(x, T::Acc::ZERO, |x| (x.to_acc() - max).probability::<FUSED>());
                for (x, y) in x.iter().zip(y) {
                    *y = T::from_acc((x.to_acc() - max).probability::<FUSED>() * scale);
                }
            } else {
                for (x, y) in x.iter().zip(y.iter_mut()) {
                    *y = T::from_acc((x.to_acc() - max).probability::<FUSED>());
                }
                let scale = T::Acc::ONE / sum_slice(y);
                for y in y {
                    *y = T::from_acc(y.to_acc() * scale);
                }
            }
        }
    }
}

struct SoftmaxBackward {
    y: Tensor,
}

impl Backward for SoftmaxBackward {
    fn name(&self) -> &'static str {
        "softmax"
    }

    /// `dx = y ⊙ (g − ⟨g, y⟩)`
    fn backward(self: Box<Self>, grad: Tensor, _need: &[bool]) -> Result<InputGrads> {
        let grad = grad.contiguous()?;
        let mut dx = self.y.uninit_like()?;
        let width = self.y.dim(-1)?;
        match dx.device() {
            Device::Cpu => dispatch_float!("softmax", dx.dtype(), T, {
                let (y, g) = (self.y.values::<T>()?, grad.values::<T>()?);
                cpu::for_rows(dx.values_mut::<T>()?, width, 4 * width, |row, dx| {
                    backward::<T>(&y[row * width..][..dx.len()], &g[row * width..][..dx.len()], dx, width);
                });
                Ok(())
            })?,
            Device::Gpu(gpu) => {
                let rows = grad.numel().checked_div(width).unwrap_or(0);
                gpu.kernel("softmax_bwd", &[("DTYPE", grad.dtype().name())])?.launch(
                    Grid::held_rows(rows, width, grad.dtype()),
                    args![&mut dx, &self.y, &grad, rows as i64, size32(width)?],
                )?;
            }
        }
        Ok(InputGrads::one(dx))
    }
}

vectorized! {
    fn backward<T: Float>(y: &[T], g: &[T], dx: &mut [T], width: usize) {
        for ((y, g), dx) in y.chunks_exact(width).zip(g.chunks_exact(width)).zip(dx.chunks_exact_mut(width)) {
            let dot = fold2(y, g, T::Acc::ZERO, |y, g| y.to_acc() * g.to_acc());
            for ((y, g), dx) in y.iter().zip(g).zip(dx) {
                *dx = T::from_acc(y.to_acc() * (g.to_acc() - dot));
            }
        }
    }
}
