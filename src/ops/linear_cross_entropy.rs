//! Cross-entropy of the logits of a dense layer, which are never stored for all rows at once.

use super::{
    cross_entropy::{
        check_targets, count_targets, forward_rows, launch_gradient, launch_mean, launch_rows, rows_and_gradient,
    },
    matmul::{check_linear, product, product_sums},
};
use crate::{
    DType, Device, Error, Result, Tensor,
    core::{Backward, Contributions, Shape, dispatch_float, needs, record},
    error::ensure,
    profile,
};

const OP: &str = "linear_cross_entropy";

/// Bytes of logits that are made at a time. Every block of rows reads the weight twice and adds to its gradient: with
/// half of it a step of a model with 20,000 tokens is 3 % slower.
const BLOCK_ON_CPU: usize = 96 << 20;

/// The same where the memory is faster and the products must be large.
const BLOCK_ON_GPU: usize = 256 << 20;

/// Rows of a block however long they are.
const FEWEST_ROWS: usize = 256;

/// The most rows of logits, of so many classes each, that [`Tensor::linear_cross_entropy`] makes at a time.
pub fn rows_of_logits(classes: usize, dtype: DType, device: &Device) -> usize {
    let most = if *device == Device::Cpu { BLOCK_ON_CPU } else { BLOCK_ON_GPU };
    (most / classes.saturating_mul(dtype.size()).max(1)).max(FEWEST_ROWS)
}

impl Tensor {
    /// [`Tensor::cross_entropy`] of [`Tensor::linear`], in blocks of rows: what a language model ends with.
    ///
    /// Shapes: `x [.., in]`, `weight [classes, in]`, `bias [classes]`, targets `[..]` of [`DType::I64`] → `[]` in f32
    /// (f64 for f64). Of the `[rows, classes]` logits one block exists at a time, in the dtype of `x`. While it does, its
    /// gradient is written over it, and what that gives for `x`, the weight and the bias is added up in f32 (f64 for
    /// f64), so that the backward pass has only to multiply by the gradient of the loss; Hsu et al., "Liger Kernel"
    /// (<https://arxiv.org/abs/2410.10989>). Without a tape there is but the loss.
    ///
    /// Saves: the gradients of `x`, the weight and the bias, of those that need one. Errors: as those of both ops.
    ///
    /// ```
    /// use x_transformers::{Device, Tensor};
    /// # fn main() -> x_transformers::Result<()> {
    /// let x = Tensor::from_slice(&[1.0f32, 0.0, 0.0, 1.0], [2, 2], &Device::Cpu)?;
    /// let weight = Tensor::from_slice(&[2.0f32, 0.0, 0.0, 2.0, 1.0, 1.0], [3, 2], &Device::Cpu)?;
    /// let targets = Tensor::from_slice(&[0i64, 1], [2], &Device::Cpu)?;
    /// let loss = x.linear_cross_entropy(&weight, None, &targets, -100)?;
    /// assert_eq!(loss.item()?, x.linear(&weight, None)?.cross_entropy(&targets, -100)?.item()?);
    /// # Ok(())
    /// # }
    /// ```
    pub fn linear_cross_entropy(
        &self,
        weight: &Tensor,
        bias: Option<&Tensor>,
        targets: &Tensor,
        ignore_index: i64,
    ) -> Result<Tensor> {
        check_linear(OP, self, weight, bias)?;
        let rows_at_a_time = rows_of_logits(weight.shape()[0], self.dtype(), self.device());
        self.linear_cross_entropy_by(weight, bias, targets, ignore_index, rows_at_a_time)
    }

    /// As [`Tensor::linear_cross_entropy`], with at most so many rows at a time.
    ///
    /// Errors: no row at a time.
    #[doc(hidden)]
    pub fn linear_cross_entropy_by(
        &self,
        weight: &Tensor,
        bias: Option<&Tensor>,
        targets: &Tensor,
        ignore_index: i64,
        rows_at_a_time: usize,
    ) -> Result<Tensor> {
        check_linear(OP, self, weight, bias)?;
        ensure!(rows_at_a_time > 0, Error::argument(OP, "expected at least one row at a time"));
        let (&inputs, batch) = self.shape().split_last().unwrap_or((&0, &[]));
        check_targets(OP, self, batch, targets)?;
        let rows = targets.elements();
        ensure!(rows > 0, Error::no_targets(0, ignore_index));
        let x = self.detach().reshape(Shape::new(&[rows, inputs])?)?.contiguous()?;
        let targets = targets.reshape(Shape::new(&[rows])?)?.contiguous()?;
        let [need_x, need_weight, need_bias] = needs(OP, [self, weight, bias.unwrap_or(weight)])?;
        let need = [need_x, need_weight, need_bias && bias.is_some()];
        let packed = bias.map(|bias| bias.detach().contiguous()).transpose()?;
        let layer = Layer { x, weight: weight.detach(), bias: packed, targets, ignore_index };
        let (loss, gradients) = layer.run(need, rows_at_a_time)?;
        profile::operations(|| {
            let products = 1 + u8::from(need_x) + u8::from(need_weight);
            2.0 * f64::from(products) * rows as f64 * weight.elements() as f64
        });
        let backward = |_: &Tensor| LinearCrossEntropyBackward { gradients, shape: *self.shape(), dtype: self.dtype() };
        match bias {
            Some(bias) => record(OP, loss, &[self, weight, bias], backward),
            None => record(OP, loss, &[self, weight], backward),
        }
    }
}

/// The inputs of the op, as constants.
struct Layer {
    /// `[rows, in]`, packed.
    x: Tensor,
    weight: Tensor,
    bias: Option<Tensor>,
    /// `[rows]`, packed.
    targets: Tensor,
    ignore_index: i64,
}

/// Gradients in the type of sums, as far as they are needed.
struct Gradients {
    /// `[rows, in]`
    x: Option<Tensor>,
    /// `[classes, in]`
    weight: Option<Tensor>,
    /// `[1, classes]`
    bias: Option<Tensor>,
    /// What they must still be divided by: one element of f64, unless that is 1.
    divisor: Option<Tensor>,
}

impl Layer {
    /// The mean loss, and the gradients that are needed.
    fn run(self, need: [bool; 3], rows_at_a_time: usize) -> Result<(Tensor, Gradients)> {
        let (rows, inputs, classes) = (self.x.dim(0)?, self.x.dim(1)?, self.weight.dim(0)?);
        let (device, dtype) = (self.x.device().clone(), self.x.dtype());
        // The values of f16 end before those of a mean over many rows.
        let divide_at_last = device != Device::Cpu || dtype == DType::F16;
        let count = match device {
            Device::Cpu => count_targets(self.targets.values::<i64>()?, classes, self.ignore_index)? as f64,
            Device::Cuda(_) => 1.0,
        };
        let scale = if divide_at_last { 1.0 } else { 1.0 / count };
        let of_sums = |shape: &[usize]| Tensor::uninit(Shape::new(shape)?, dtype.accumulator(), &device);
        let wanted = |wanted: bool, shape: &[usize]| wanted.then(|| of_sums(shape)).transpose();
        let mut of_x = Vec::new();
        let (mut of_weight, mut of_bias) = (wanted(need[1], &[classes, inputs])?, wanted(need[2], &[1, classes])?);
        let ones = Tensor::ones([], dtype.accumulator(), &device)?;
        let one = Tensor::ones([], DType::F64, &device)?;
        let (mut sum, mut losses) = (0.0, Vec::new());
        // Blocks of about one size.
        let blocks = rows.div_ceil(rows_at_a_time);
        let height = rows.div_ceil(blocks.max(1));
        for first in (0..rows).step_by(height.max(1)) {
            let height = height.min(rows - first);
            let (x, targets) = (self.x.narrow(0, first, height)?, self.targets.narrow(0, first, height)?);
            let mut logits = product(&x, &self.weight.transpose(0, 1)?, self.bias.as_ref())?;
            let needed = need.contains(&true);
            match &device {
                Device::Cpu => dispatch_float!(OP, dtype, T, {
                    let to = targets.values::<i64>()?;
                    sum += if needed {
                        rows_and_gradient::<T>(logits.values_mut::<T>()?, to, classes, self.ignore_index, scale)
                    } else {
                        let mut statistics = of_sums(&[height, 2])?;
                        forward_rows::<T>(&logits, &targets, classes, self.ignore_index, &mut statistics)?
                    };
                    Ok(())
                })?,
                Device::Cuda(gpu) => {
                    let mut statistics = of_sums(&[height, 2])?;
                    losses.push(launch_rows(gpu, &logits, &targets, classes, self.ignore_index, &mut statistics)?);
                    if needed {
                        let scale = [&ones, &one];
                        launch_gradient(gpu, &mut logits, None, &statistics, &targets, self.ignore_index, scale)?;
                    }
                }
            }
            if need[0] {
                let mut of_block = of_sums(&[height, inputs])?;
                product_sums(&logits, &self.weight, false, &mut of_block)?;
                of_x.push(of_block);
            }
            if let Some(of_weight) = &mut of_weight {
                product_sums(&logits.transpose(0, 1)?, &x, first > 0, of_weight)?;
            }
            if let Some(of_bias) = &mut of_bias {
                let ones = Tensor::ones([1, height], dtype, &device)?;
                product_sums(&ones, &logits, first > 0, of_bias)?;
            }
        }
        let (loss, count) = match &device {
            Device::Cpu => {
                (Tensor::full((), sum / count, dtype.accumulator(), &device)?, Tensor::scalar(count, &device)?)
            }
            Device::Cuda(gpu) => {
                let (losses, ..) = Tensor::joined(&losses.iter().collect::<Vec<_>>(), 0)?;
                launch_mean(gpu, dtype, &losses, &self.targets, self.ignore_index)?
            }
        };
        let x = match of_x.len() {
            0 | 1 => of_x.pop(),
            _ => Some(Tensor::joined(&of_x.iter().collect::<Vec<_>>(), 0)?.0),
        };
        let divisor = divide_at_last.then_some(count);
        Ok((loss, Gradients { x, weight: of_weight, bias: of_bias, divisor }))
    }
}

struct LinearCrossEntropyBackward {
    gradients: Gradients,
    /// Of `x`.
    shape: Shape,
    dtype: DType,
}

impl Backward for LinearCrossEntropyBackward {
    fn name(&self) -> &'static str {
        OP
    }

    /// What the forward pass has made, times the gradient of the loss.
    fn backward(self: Box<Self>, grad: Tensor, need: &[bool]) -> Result<Contributions> {
        let Self { gradients: Gradients { x, weight, bias, divisor }, shape, dtype } = *self;
        let factor = match divisor {
            Some(divisor) => grad.div(&divisor.to_dtype(grad.dtype())?)?,
            None => grad,
        };
        // On the CPU the value is at hand, and mostly 1.
        let is_one = *factor.device() == Device::Cpu && factor.item()? == 1.0;
        let finish = |gradient: Option<Tensor>| -> Result<Option<Tensor>> {
            let Some(gradient) = gradient else { return Ok(None) };
            let gradient = if is_one { gradient } else { gradient.mul(&factor)? };
            gradient.to_dtype(dtype).map(Some)
        };
        let x = finish(x)?.map(|x| x.reshape(shape)).transpose()?;
        let mut grads = vec![x, finish(weight)?];
        if need.len() > 2 {
            grads.push(finish(bias)?.map(|bias| bias.squeeze(0)).transpose()?);
        }
        Ok(Contributions::whole(grads))
    }
}
