//! Mask of the largest entries of each row.

use crate::{
    DType, Device, Error, Result, Tensor,
    autograd::{computed, discrete},
    device::{Grid, args, cpu, floats::Floats, size32},
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
                cpu::for_rows(keep.values_mut::<bool>()?, width, 16 * width, |row, rows| {
                    let (mut keys, mut order, mut values) = (Vec::new(), Vec::new(), Vec::new());
                    for (row, keep) in (row..).zip(rows.chunks_exact_mut(width)) {
                        keys.clear();
                        match from.range(row * width..(row + 1) * width) {
                            Floats::F64(x) => keys.extend(x.iter().map(|&x| ascending(x))),
                            x => keys.extend(x.to_slice::<f32>(&mut values).iter().map(|&x| ascending(x.into()))),
                        }
                        order.clone_from(&keys);
                        let (_, &mut kth, _) = order.select_nth_unstable(width - k);
                        for (key, keep) in keys.iter().zip(keep) {
                            *keep = u8::from(*key >= kth);
                        }
                    }
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

/// Returns an integer in the order of the numbers, NaN above all.
fn ascending(x: f64) -> u64 {
    // Both zeros are +0.
    let bits = (x + 0.0).to_bits();
    match x.is_nan() {
        true => u64::MAX,
        false if bits >> 63 == 1 => !bits,
        false => bits | 1 << 63,
    }
}
