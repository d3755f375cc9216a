//! Mask of the largest entries of each row.

use std::cmp::Ordering;

use crate::{
    DType, Device, Error, Result, Tensor,
    autograd::{computed, discrete},
    device::{Grid, args, cpu, size32},
    dtype::{Float, dispatch_real},
    error::ensure,
};

impl Tensor {
    /// Returns a mask that is `true` where an entry is at least the `k`-th largest of its row: at least `k` entries,
    /// more if values tie.
    ///
    /// Shapes: `[.., j] → [.., j]` Bool; a scalar is treated as a row of one element. NaN counts as the largest, as in
    /// PyTorch's `topk`. Errors: `k` = 0, a dtype that is not float, or a tensor that requires a gradient (use
    /// `detach`).
    pub fn top_k_mask(&self, k: usize) -> Result<Tensor> {
        const OP: &str = "top_k_mask";
        discrete(OP, &[self])?;
        if self.rank() == 0 {
            return self.unsqueeze(0)?.top_k_mask(k)?.squeeze(0);
        }
        self.dtype().expect_float(OP)?;
        ensure!(k > 0, Error::argument(OP, "expected k of at least 1, got 0"));
        let x = self.contiguous()?;
        let width = x.dim(-1)?;
        if k >= width {
            return Tensor::ones(*x.shape(), DType::Bool, x.device());
        }
        let mut keep = Tensor::uninit(*x.shape(), DType::Bool, x.device())?;
        match x.device() {
            Device::Cpu => {
                let from = x.floats(OP)?;
                dispatch_real!(x.dtype(), R, {
                    cpu::for_rows(keep.values_mut::<bool>()?, width, 16 * width, |row, rows| {
                        let (mut order, mut memory) = (Vec::with_capacity(width), Vec::new());
                        for (row, keep) in (row..).zip(rows.chunks_exact_mut(width)) {
                            let x = from.range(row * width..(row + 1) * width).to_slice::<R>(&mut memory);
                            order.clear();
                            order.extend_from_slice(x);
                            let (_, &mut kth, _) = order.select_nth_unstable_by(k - 1, |a, b| descending(*a, *b));
                            for (x, keep) in x.iter().zip(keep) {
                                *keep = u8::from(descending(*x, kth) != Ordering::Greater);
                            }
                        }
                    });
                });
            }
            Device::Gpu(gpu) => {
                let rows = x.numel() / width;
                gpu.kernel("topk_mask", &[("DTYPE", x.dtype().name())])?
                    .launch(Grid::rows(rows, width), args![&mut keep, &x, rows as i64, size32(width)?, size32(k)?])?;
            }
        }
        computed(OP, keep, &[&x])
    }
}

/// Orders the largest first, NaN before all.
fn descending<T: Float>(a: T, b: T) -> Ordering {
    let is_nan = |x: T| x.partial_cmp(&x).is_none();
    b.partial_cmp(&a).unwrap_or_else(|| is_nan(b).cmp(&is_nan(a)))
}
