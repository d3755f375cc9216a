//! 1.5-entmax over the last dimension (Peters, Niculae and Martins, <https://arxiv.org/abs/1905.05702>).

use crate::{
    Device, Error, Result, Tensor,
    autograd::{Backward, InputGrads, record},
    device::{
        Grid, args,
        rows::{In, Out, Sums, for_rows_of},
        size32,
    },
    dtype::{Float, Real, dispatch_real},
    error::ensure,
    ops::reduce::LANES,
};

const OP: &str = "entmax15";

impl Tensor {
    /// Computes 1.5-entmax over the last dimension: `y_j = max(x_j / 2 − τ, 0)²`, with `τ` such that each row sums to
    /// 1.
    ///
    /// A sparse softmax: entries far below the largest become exactly 0. `τ` is found by sorting, on a GPU by Newton's
    /// method. A row that contains NaN or +∞, or only −∞, becomes NaN.
    ///
    /// Shapes: `[.., j] → [.., j]`. Statistics in f32 (f64 for f64). Saves: `y`.
    /// Errors: rank 0, or a dtype that is not float.
    ///
    /// ```
    /// use x_transformers::{Device, Tensor};
    /// let x = Tensor::from_slice(&[3.0f32, 0.0], [1, 2], &Device::Cpu)?;
    /// assert_eq!(x.entmax15()?.to_vec::<f32>()?, [1.0, 0.0]); // exact zeros
    /// # Ok::<(), x_transformers::Error>(())
    /// ```
    pub fn entmax15(&self) -> Result<Tensor> {
        ensure!(self.rank() > 0, Error::shape(OP, "expected at least one dimension, got a scalar"));
        self.dtype().expect_float(OP)?;
        let x = self.contiguous()?;
        let mut y = x.uninit_like()?;
        let width = x.dim(-1)?;
        match x.device() {
            Device::Cpu => {
                let (from, to) = (In::new(x.floats(OP)?, width), Out::new(y.floats_mut(OP)?, width));
                dispatch_real!(x.dtype(), R, {
                    for_rows_of::<R, 1, 1>([to], [from], Sums::none(), 32 * width, &|_, [y], [x], _| {
                        let mut sorted = Vec::with_capacity(width);
                        let rows = x.chunks_exact(width).zip(y.chunks_exact_mut(width));
                        rows.for_each(|(x, y)| forward_row::<R>(x, y, &mut sorted));
                    });
                });
            }
            Device::Gpu(gpu) => {
                let rows = x.numel().checked_div(width).unwrap_or(0);
                gpu.kernel("entmax_fwd", &[("DTYPE", x.dtype().name())])?
                    .launch(Grid::rows(rows, width), args![&mut y, &x, rows as i64, size32(width)?])?;
            }
        }
        record(OP, y, &[&x], |y| Entmax15Backward { y: y.detach() })
    }
}

fn forward_row<T: Float>(x: &[T], y: &mut [T], sorted: &mut Vec<T::Acc>) {
    let (half, two) = (T::Acc::from_f64(0.5), T::Acc::from_f64(2.0));
    // NaN is larger than all, and stays the maximum.
    let is_nan = |x: T::Acc| x.partial_cmp(&x).is_none();
    let larger = |max: T::Acc, x: T::Acc| if x > max || is_nan(x) { x } else { max };
    let mut lanes = [T::Acc::NEG_INFINITY; LANES];
    for x in x.chunks(LANES) {
        lanes.iter_mut().zip(x).for_each(|(max, x)| *max = larger(*max, x.to_acc()));
    }
    let max = lanes.into_iter().fold(T::Acc::NEG_INFINITY, larger);
    // (x − max) / 2 would overflow to −∞ for masked entries first halved, never to NaN.
    let shifted = |x: T| x.to_acc() * half - max * half;
    // τ is at least −1, so entries below −1 are always 0: they need no sorting, and no squares that overflow.
    sorted.clear();
    sorted.extend(x.iter().map(|&x| shifted(x)).filter(|&z| z > -T::Acc::ONE));
    sorted.sort_unstable_by(|a, b| b.partial_cmp(a).unwrap_or(std::cmp::Ordering::Equal));
    let threshold = threshold(sorted, two);
    for (x, y) in x.iter().zip(y) {
        let root = (shifted(*x) - threshold).max(T::Acc::ZERO);
        *y = T::from_acc(root * root);
    }
}

/// Returns the threshold of the largest support whose smallest member reaches it: for the `k` largest entries `z` with
/// mean `m`, `τ_k = m − √((1 − Σ (z − m)²) / k)`.
#[inline(always)]
fn threshold<A: Real>(sorted: &[A], two: A) -> A {
    let (mut sum, mut squares, mut count) = (A::ZERO, A::ZERO, A::ZERO);
    // A row without a finite maximum has no entries here: its threshold, and so its output, is NaN.
    let mut threshold = A::NEG_INFINITY * A::ZERO;
    for &z in sorted {
        sum += z;
        squares += z * z;
        count += A::ONE;
        let mean = sum / count;
        let spread = squares - two * mean * sum + count * mean * mean;
        let delta = ((A::ONE - spread) / count).max(A::ZERO);
        let candidate = mean - delta.sqrt();
        if candidate > z {
            break;
        }
        threshold = candidate;
    }
    threshold
}

struct Entmax15Backward {
    y: Tensor,
}

impl Backward for Entmax15Backward {
    fn name(&self) -> &'static str {
        OP
    }

    /// With `s = √y`: `dx = s ⊙ (g − ⟨s, g⟩ / Σ s)`
    fn backward(self: Box<Self>, grad: Tensor, _need: &[bool]) -> Result<InputGrads> {
        let grad = grad.contiguous()?;
        let mut dx = self.y.uninit_like()?;
        let width = self.y.dim(-1)?;
        match grad.device() {
            Device::Cpu => {
                let ins = [In::new(self.y.floats(OP)?, width), In::new(grad.floats(OP)?, width)];
                let dx = Out::new(dx.floats_mut(OP)?, width);
                dispatch_real!(grad.dtype(), R, {
                    for_rows_of::<R, 1, 2>([dx], ins, Sums::none(), 8 * width, &|_, [dx], [y, g], _| {
                        let rows = y.chunks_exact(width).zip(g.chunks_exact(width)).zip(dx.chunks_exact_mut(width));
                        rows.for_each(|((y, g), dx)| backward_row::<R>(y, g, dx));
                    });
                });
            }
            Device::Gpu(gpu) => {
                let rows = grad.numel().checked_div(width).unwrap_or(0);
                gpu.kernel("entmax_bwd", &[("DTYPE", grad.dtype().name())])?
                    .launch(Grid::rows(rows, width), args![&mut dx, &self.y, &grad, rows as i64, size32(width)?])?;
            }
        }
        Ok(InputGrads::one(dx))
    }
}

fn backward_row<T: Float>(y: &[T], g: &[T], dx: &mut [T]) {
    let (mut dot, mut sum) = (T::Acc::ZERO, T::Acc::ZERO);
    for (y, g) in y.iter().zip(g) {
        let root = y.to_acc().sqrt();
        dot += root * g.to_acc();
        sum += root;
    }
    let mean = dot / sum;
    for ((y, g), dx) in y.iter().zip(g).zip(dx) {
        *dx = T::from_acc(y.to_acc().sqrt() * (g.to_acc() - mean));
    }
}
