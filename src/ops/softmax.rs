//! Softmax over the last dimension.

use crate::{
    Device, Result, Tensor,
    autograd::{Backward, InputGrads, record},
    device::{
        Grid, args,
        rows::{In, Out, Sums, for_rows_of},
        simd::vectorized,
        size32,
    },
    dtype::{Real, dispatch_real},
    ops::reduce::{fold2, max_slice, sum_slice},
};

const OP: &str = "softmax";

impl Tensor {
    /// Computes softmax over the last dimension: `y_j = exp(x_j − max x) / Σ exp(x − max x)`.
    ///
    /// Shapes: `[.., j] → [.., j]`; a scalar is treated as a row of one element. A row that contains NaN or +∞, or only
    /// −∞, gives NaN, as in PyTorch. Statistics in f32 (f64 for f64). Saves: `y`. Errors: a dtype that is not float.
    ///
    /// On a GPU exponentials of half types have errors of up to 2⁻¹⁷, which their rounding hides.
    ///
    /// ```
    /// use x_transformers::{Device, Tensor};
    /// let x = Tensor::from_slice(&[0.0f32, 0.0], [1, 2], &Device::Cpu)?;
    /// assert_eq!(x.softmax()?.to_vec::<f32>()?, [0.5, 0.5]);
    /// # Ok::<(), x_transformers::Error>(())
    /// ```
    #[doc(alias = "F.softmax")]
    pub fn softmax(&self) -> Result<Tensor> {
        if self.rank() == 0 {
            return self.unsqueeze(0)?.softmax()?.squeeze(0);
        }
        self.dtype().expect_float(OP)?;
        let x = self.contiguous()?;
        let mut y = x.uninit_like()?;
        let width = x.dim(-1)?;
        match x.device() {
            Device::Cpu => {
                let (x, y) = (In::new(x.floats(OP)?, width), Out::new(y.floats_mut(OP)?, width));
                dispatch_real!(self.dtype(), R, {
                    for_rows_of::<R, 1, 1>([y], [x], Sums::none(), 8 * width, &|_, [y], [x], _| forward(x, y, width));
                });
            }
            Device::Gpu(gpu) => {
                let rows = x.numel().checked_div(width).unwrap_or(0);
                gpu.kernel("softmax_fwd", &[("DTYPE", x.dtype().name())])?
                    .launch(Grid::held_rows(rows, width, x.dtype()), args![&mut y, &x, rows as i64, size32(width)?])?;
            }
        }
        record(OP, y, &[&x], |y| SoftmaxBackward { y: y.detach() })
    }
}

vectorized! {
    fn forward<R: Real>(x: &[R], y: &mut [R], width: usize) {
        for (x, y) in x.chunks_exact(width).zip(y.chunks_exact_mut(width)) {
            let max = max_slice(x);
            for (x, y) in x.iter().zip(y.iter_mut()) {
                *y = (*x - max).probability::<FUSED>();
            }
            let scale = R::ONE / sum_slice(y);
            for y in y {
                *y *= scale;
            }
        }
    }
}

struct SoftmaxBackward {
    y: Tensor,
}

impl Backward for SoftmaxBackward {
    fn name(&self) -> &'static str {
        OP
    }

    /// Computes `dx = y ⊙ (g − ⟨g, y⟩)`.
    fn backward(self: Box<Self>, grad: Tensor, _need: &[bool]) -> Result<InputGrads> {
        let grad = grad.contiguous()?;
        let mut dx = self.y.uninit_like()?;
        let width = self.y.dim(-1)?;
        match dx.device() {
            Device::Cpu => {
                let ins = [In::new(self.y.floats(OP)?, width), In::new(grad.floats(OP)?, width)];
                let dx = Out::new(dx.floats_mut(OP)?, width);
                dispatch_real!(grad.dtype(), R, {
                    for_rows_of::<R, 1, 2>([dx], ins, Sums::none(), 4 * width, &|_, [dx], [y, g], _| {
                        backward(y, g, dx, width);
                    });
                });
            }
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
    fn backward<R: Real>(y: &[R], g: &[R], dx: &mut [R], width: usize) {
        for ((y, g), dx) in y.chunks_exact(width).zip(g.chunks_exact(width)).zip(dx.chunks_exact_mut(width)) {
            let dot = fold2(y, g, R::ZERO, |y, g| y * g);
            for ((y, g), dx) in y.iter().zip(g).zip(dx) {
                *dx = *y * (*g - dot);
            }
        }
    }
}
