//! Fused linear layer and cross-entropy, which never stores the logits of all rows at once.

use super::{
    cross_entropy::{
        COST, Losses as RowLosses, check_targets, count_targets, forward, forward_rows, launch_gradient, launch_mean,
        launch_rows, rows_and_gradient,
    },
    matmul::{check_linear, product, product_and_bias, product_and_row_sums, product_sums},
    norm::widen,
};
use crate::{
    DType, Device, Error, Result, Tensor,
    autograd::{Backward, InputGrads, needs, record},
    collect::CollectVec,
    device::{
        Address, Arg, Gpu, Grid, args,
        floats::FloatsMut,
        rows::{Out, Sums, for_rows_of},
        simd::vectorized,
        size32,
    },
    dtype::{Real, dispatch_real},
    error::ensure,
    profile::{self, BackwardCost, Cost},
    shape::Shape,
};

const OP: &str = "linear_cross_entropy";

/// Bytes of logits computed at a time. Every block of rows reads the weight twice and adds to its gradient: with half
/// the size a training step with a vocabulary of 20,000 tokens is 3 % slower.
const BLOCK_ON_CPU: usize = 96 << 20;

/// The same on a GPU, where memory is faster and products must be large.
const BLOCK_ON_GPU: usize = 256 << 20;

/// On a GPU zeros make the number of classes a multiple of this: cuBLAS has its fast kernels for sizes whose rows are
/// whole packets of 16 bytes, also in half types, and vocabularies such as the 50257 tokens of GPT-2 are odd.
const MULTIPLE: usize = 8;

/// Minimum number of rows per block, however long they are.
const FEWEST_ROWS: usize = 256;

/// Bytes of f32 logits at a time, out of these, if a block has a half type. Each part packs the weight again.
const PART_ON_CPU: usize = 40 << 20;
const PART_ON_GPU: usize = 64 << 20;

/// Minimum number of rows per such part, however long they are.
const FEWEST_ROWS_OF_PART: usize = 64;

/// Returns the maximum number of rows of logits that [`Tensor::linear_cross_entropy`] computes at a time.
pub fn rows_of_logits(classes: usize, dtype: DType, device: &Device) -> usize {
    rows_at_a_time(classes, dtype, device)[0]
}

/// Returns the number of rows per block, and per part of a block.
fn rows_at_a_time(classes: usize, dtype: DType, device: &Device) -> [usize; 2] {
    let (block, part) = if *device == Device::Cpu { (BLOCK_ON_CPU, PART_ON_CPU) } else { (BLOCK_ON_GPU, PART_ON_GPU) };
    let rows = |bytes: usize, dtype: DType| bytes / classes.saturating_mul(dtype.size()).max(1);
    let sums = dtype.accumulator();
    if dtype == sums {
        return [rows(block, dtype).max(FEWEST_ROWS); 2];
    }
    [rows(block - part, dtype).max(FEWEST_ROWS), rows(part, sums).max(FEWEST_ROWS_OF_PART)]
}

impl Tensor {
    /// Computes [`Tensor::cross_entropy`] of [`Tensor::linear`] in blocks of rows: the head and loss of a language
    /// model.
    ///
    /// Shapes: `x [.., in]`, `weight [classes, in]`, `bias [classes]`, targets `[..]` of [`DType::I64`] → `[]` in f32
    /// (f64 for f64). Of the `[rows, classes]` logits one block exists at a time, in f32 (f64 for f64): half types
    /// never round them, as [`Tensor::linear`] would, so an offset shared by all classes does not change the loss.
    /// Their gradient overwrites them, or is rounded to the half type, and the resulting gradients of `x`, the weight
    /// and the bias are accumulated in f32 (f64 for f64), so that the backward pass only multiplies by the gradient of
    /// the loss; Hsu et al., "Liger Kernel" (<https://arxiv.org/abs/2410.10989>). Without a tape only the loss is
    /// computed.
    ///
    /// Saves: the gradients of `x`, the weight and the bias, of those that need one. Errors: those of both ops.
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
        let rows_at_a_time = rows_at_a_time(weight.shape()[0], self.dtype(), self.device());
        self.linear_cross_entropy_by(weight, bias, targets, ignore_index, rows_at_a_time)
    }

    /// Like [`Tensor::linear_cross_entropy`], but with a given maximum number of rows per block, and per f32 part of a
    /// block of a half type.
    ///
    /// Errors: those of [`Tensor::linear_cross_entropy`], or a maximum of 0 rows.
    #[doc(hidden)]
    pub fn linear_cross_entropy_by(
        &self,
        weight: &Tensor,
        bias: Option<&Tensor>,
        targets: &Tensor,
        ignore_index: i64,
        rows_at_a_time: [usize; 2],
    ) -> Result<Tensor> {
        check_linear(OP, self, weight, bias)?;
        ensure!(!rows_at_a_time.contains(&0), Error::argument(OP, "expected at least one row per block, got 0"));
        let (&inputs, batch) = self.shape().split_last().unwrap_or((&0, &[]));
        check_targets(OP, self, batch, targets)?;
        let rows = targets.numel();
        ensure!(rows > 0, Error::no_targets(0, ignore_index));
        let x = self.detach().reshape(Shape::new(&[rows, inputs])?)?.contiguous()?;
        let targets = targets.reshape(Shape::new(&[rows])?)?.contiguous()?;
        let [need_x, need_weight, need_bias] = needs(OP, [self, weight, bias.unwrap_or(weight)])?;
        let need = [need_x, need_weight, need_bias && bias.is_some()];
        let packed = bias.map(|bias| bias.detach().contiguous()).transpose()?;
        let classes = weight.dim(0)?;
        let padded = |x: Tensor| match x.device() {
            Device::Cpu => Ok(x),
            Device::Gpu(_) => pad_rows(x, classes.next_multiple_of(MULTIPLE)),
        };
        let layer = Layer {
            x,
            weight: padded(weight.detach())?,
            bias: packed.map(padded).transpose()?,
            classes,
            targets,
            ignore_index,
        };
        let (loss, gradients) = layer.run(need, rows_at_a_time)?;
        profile::cost(|| {
            // All products are in the forward pass.
            let products = 1 + u8::from(need_x) + u8::from(need_weight);
            let operations = 2.0 * f64::from(products) * rows as f64 * weight.numel() as f64;
            Cost { operations, backward: BackwardCost::Times(0.0) }
        });
        let backward = |_: &Tensor| LinearCrossEntropyBackward { gradients, shape: *self.shape(), dtype: self.dtype() };
        match bias {
            Some(bias) => record(OP, loss, &[self, weight, bias], backward),
            None => record(OP, loss, &[self, weight], backward),
        }
    }
}

/// Inputs of the op, as constants.
struct Layer {
    /// `[rows, in]`, packed.
    x: Tensor,
    /// `[classes, in]`; on a GPU followed by rows of zeros, see [`MULTIPLE`].
    weight: Tensor,
    /// One element per row of `weight`.
    bias: Option<Tensor>,
    classes: usize,
    /// `[rows]`, packed.
    targets: Tensor,
    ignore_index: i64,
}

/// Gradients in the accumulation type, where they are needed.
struct Gradients {
    /// `[rows, in]`
    x: Option<Tensor>,
    /// `[classes, in]`
    weight: Option<Tensor>,
    /// `[1, classes]`
    bias: Option<Tensor>,
    /// Divisor still to be applied: one element of f64; `None` if it is 1.
    divisor: Option<Tensor>,
}

impl Layer {
    /// Computes the mean loss and the gradients that are needed.
    fn run(self, need: [bool; 3], [rows_at_a_time, rows_of_part]: [usize; 2]) -> Result<(Tensor, Gradients)> {
        let (rows, inputs, padded) = (self.x.dim(0)?, self.x.dim(1)?, self.weight.dim(0)?);
        let (device, dtype) = (self.x.device().clone(), self.x.dtype());
        // The gradients of a mean over many rows underflow in f16.
        let divide_at_last = device != Device::Cpu || dtype == DType::F16;
        let count = match device {
            Device::Cpu => count_targets(self.targets.values::<i64>()?, self.classes, self.ignore_index)? as f64,
            Device::Gpu(_) => 1.0,
        };
        let scale = if divide_at_last { 1.0 } else { 1.0 / count };
        let of_sums = |shape: &[usize]| Tensor::uninit(Shape::new(shape)?, dtype.accumulator(), &device);
        let wanted = |wanted: bool, shape: &[usize]| wanted.then(|| of_sums(shape)).transpose();
        let mut of_x = Vec::new();
        let (mut of_weight, mut of_bias) = (wanted(need[1], &[padded, inputs])?, wanted(need[2], &[1, padded])?);
        let mut losses = Losses::default();
        for (first, height) in of_about_one_size(rows, rows_at_a_time) {
            let (x, targets) = (self.x.narrow(0, first, height)?, self.targets.narrow(0, first, height)?);
            let needed = need.contains(&true);
            let gradient = match &device {
                Device::Gpu(gpu) => self.block_on_gpu(*gpu, &x, &targets, needed, rows_of_part, &mut losses)?,
                Device::Cpu if dtype == dtype.accumulator() => {
                    Some(self.block(&x, &targets, needed, scale, &mut losses)?)
                }
                Device::Cpu => self.block_in_parts(&x, &targets, needed, scale, rows_of_part, &mut losses)?,
            };
            let Some(gradient) = gradient.filter(|_| needed) else { continue };
            if need[0] {
                let mut of_block = of_sums(&[height, inputs])?;
                product_sums(&gradient, &self.weight, false, &mut of_block)?;
                of_x.push(of_block);
            }
            let turned = gradient.transpose(0, 1)?;
            if height == rows
                && need[1]
                && need[2]
                && let Some([weight, bias]) = product_and_row_sums(&turned, &x, dtype.accumulator())?
            {
                (of_weight, of_bias) = (Some(weight), Some(bias.unsqueeze(0)?));
                continue;
            }
            if let Some(of_weight) = &mut of_weight {
                product_sums(&turned, &x, first > 0, of_weight)?;
            }
            if let Some(of_bias) = &mut of_bias {
                let ones = Tensor::ones([1, height], dtype, &device)?;
                product_sums(&ones, &gradient, first > 0, of_bias)?;
            }
        }
        let (loss, count) = match &device {
            Device::Cpu => {
                let loss = Tensor::full((), losses.sum / count, dtype.accumulator(), &device)?;
                (loss, Tensor::scalar(count, &device)?)
            }
            Device::Gpu(gpu) => {
                let losses = joined(losses.of_rows)?;
                launch_mean(*gpu, dtype, &losses, &self.targets, self.ignore_index)?
            }
        };
        let x = if of_x.is_empty() { None } else { Some(joined(of_x)?) };
        let divisor = divide_at_last.then_some(count);
        let weight = of_weight.map(|of_weight| of_weight.narrow(0, 0, self.classes)).transpose()?;
        let bias = of_bias.map(|of_bias| of_bias.narrow(1, 0, self.classes)).transpose()?;
        Ok((loss, Gradients { x, weight, bias, divisor }))
    }

    /// Computes the gradient of a block of logits in the accumulation type if it is needed, otherwise the logits.
    fn block(&self, x: &Tensor, targets: &Tensor, needed: bool, scale: f64, losses: &mut Losses) -> Result<Tensor> {
        let (height, classes, dtype) = (x.dim(0)?, self.weight.dim(0)?, x.dtype());
        let mut logits = product(x, &self.weight.transpose(0, 1)?, self.bias.as_ref())?;
        let mut statistics = Tensor::uninit(Shape::new(&[height, 2])?, dtype, x.device())?;
        dispatch_real!(dtype, R, {
            losses.sum += if needed {
                let to = targets.values::<i64>()?;
                rows_and_gradient::<R>(logits.values_mut::<R>()?, to, classes, self.ignore_index, scale)
            } else {
                forward_rows::<R>(&logits, targets, classes, self.ignore_index, &mut statistics)?
            };
        });
        Ok(logits)
    }

    /// Computes the gradient of a block of logits in a half type, if it is needed. The logits before it are in f32, a
    /// few rows at a time.
    fn block_in_parts(
        &self,
        x: &Tensor,
        targets: &Tensor,
        needed: bool,
        scale: f64,
        rows_of_part: usize,
        losses: &mut Losses,
    ) -> Result<Option<Tensor>> {
        let (height, classes, dtype) = (x.dim(0)?, self.weight.dim(0)?, x.dtype());
        let (device, sums) = (x.device(), dtype.accumulator());
        let block = || Tensor::uninit(Shape::new(&[height, classes])?, dtype, device);
        let mut gradient = needed.then(block).transpose()?;
        for (first, rows) in of_about_one_size(height, rows_of_part) {
            let (x, targets) = (x.narrow(0, first, rows)?, targets.narrow(0, first, rows)?);
            let mut logits = Tensor::uninit(Shape::new(&[rows, classes])?, sums, device)?;
            product_sums(&x, &self.weight.transpose(0, 1)?, false, &mut logits)?;
            let bias = self.bias.as_ref().map(|bias| widen::<f32>(OP, Some(bias), classes, 0.0)).transpose()?;
            let to = match &mut gradient {
                Some(gradient) => gradient.floats_mut(OP)?.range(first * classes..(first + rows) * classes),
                None => FloatsMut::of::<f32>(&mut []),
            };
            let ends = (targets.values::<i64>()?, self.ignore_index);
            let bias = bias.as_deref().unwrap_or_default();
            losses.sum += rows_and_rounded_gradient(logits.values_mut::<f32>()?, bias, ends, scale, to);
        }
        Ok(gradient)
    }

    /// Computes the gradient of a block of logits in the type of `x`, if it is needed. The logits are in the
    /// accumulation type: for half types only a few rows at a time, otherwise the gradient overwrites them.
    fn block_on_gpu(
        &self,
        gpu: &'static dyn Gpu,
        x: &Tensor,
        targets: &Tensor,
        needed: bool,
        rows_of_part: usize,
        losses: &mut Losses,
    ) -> Result<Option<Tensor>> {
        let (height, padded, dtype) = (x.dim(0)?, self.weight.dim(0)?, x.dtype());
        let (device, sums) = (x.device(), dtype.accumulator());
        let is_half = dtype != sums;
        let uninit = |rows: usize, dtype: DType| Tensor::uninit(Shape::new(&[rows, padded])?, dtype, device);
        let mut gradient = (needed && is_half).then(|| uninit(height, dtype)).transpose()?;
        let bias = self.bias.as_ref().map(|bias| bias.to_dtype(sums)).transpose()?;
        for (first, rows) in of_about_one_size(height, if is_half { rows_of_part } else { height }) {
            let (x, targets) = (x.narrow(0, first, rows)?, targets.narrow(0, first, rows)?);
            let mut logits = uninit(rows, sums)?;
            product_and_bias(&x, &self.weight.transpose(0, 1)?, bias.as_ref(), &mut logits)?;
            let mut statistics = Tensor::uninit(Shape::new(&[rows, 2])?, sums, device)?;
            let ends = (self.classes, self.ignore_index);
            losses.of_rows.push(launch_rows(gpu, &logits, &targets, ends, &mut statistics)?);
            if let Some(gradient) = &mut gradient {
                let to = gradient.address_mut()?.plus(first * padded * dtype.size());
                launch_rounded_gradient(gpu, dtype, to, &logits, &statistics, &targets, ends)?;
            } else if needed {
                let ones = Tensor::ones([], dtype, device)?;
                let one = Tensor::ones([], DType::F64, device)?;
                launch_gradient(gpu, &mut logits, None, &statistics, &targets, ends, [&ones, &one])?;
                gradient = Some(logits);
            }
        }
        Ok(gradient)
    }
}

/// Appends rows of zeros to `x` `[rows, ..]`, up to `rows` in total.
fn pad_rows(x: Tensor, rows: usize) -> Result<Tensor> {
    if x.dim(0)? == rows {
        return Ok(x);
    }
    let mut shape = x.shape().to_vec();
    shape[0] = rows - shape[0];
    let zeros = Tensor::zeros(Shape::new(&shape)?, x.dtype(), x.device())?;
    Ok(Tensor::joined(&[&x, &zeros], 0)?.0)
}

/// Joins blocks of rows.
fn joined(mut blocks: Vec<Tensor>) -> Result<Tensor> {
    match blocks.pop() {
        Some(only) if blocks.is_empty() => Ok(only),
        last => Ok(Tensor::joined(&blocks.iter().chain(&last).collect_vec(), 0)?.0),
    }
}

/// Losses of rows, in the form that their device computes.
#[derive(Default)]
struct Losses {
    /// On the processor, their sum.
    sum: f64,
    /// On a GPU, one of f64 for each row of a block.
    of_rows: Vec<Tensor>,
}

/// Divides rows into blocks of about equal size: first row and number of rows of each.
fn of_about_one_size(rows: usize, most: usize) -> impl Iterator<Item = (usize, usize)> {
    let height = rows.div_ceil(rows.div_ceil(most).max(1)).max(1);
    (0..rows).step_by(height).map(move |first| (first, height.min(rows - first)))
}

/// Adds the bias, unless it is empty, to these rows of logits and returns the sum of their losses. Writes `(softmax(x)
/// − onehot(target)) scale` to `dx`, unless that is empty.
fn rows_and_rounded_gradient(
    x: &mut [f32],
    bias: &[f32],
    (targets, ignore_index): (&[i64], i64),
    scale: f64,
    dx: FloatsMut,
) -> f64 {
    let (losses, classes) = (RowLosses::new(targets.len()), x.len().checked_div(targets.len()).unwrap_or(0));
    let outs = [Out::over(FloatsMut::of(x), classes, None), Out::new(dx, classes)];
    for_rows_of::<f32, 2, 0>(outs, [], Sums::none(), 2 * COST * classes, &|row, [x, dx], [], _| {
        let mut dx = dx.chunks_exact_mut(classes);
        let rows = x.chunks_exact_mut(classes).zip(&targets[row..]);
        losses.set(
            row,
            rows.map(|(x, &target)| {
                x.iter_mut().zip(bias).for_each(|(x, &bias)| *x += bias);
                let mut statistics = [0.0; 2];
                let loss = forward(x, target, ignore_index, &mut statistics);
                if let Some(dx) = dx.next() {
                    let class = (target != ignore_index).then_some(target as usize);
                    gradient(x, statistics, class, scale as f32, dx);
                }
                loss
            }),
        );
    });
    losses.sum()
}

vectorized! {
    /// Writes the gradient of a row with these statistics, maximum and inverse sum; 0 for a row without a class.
    fn gradient(x: &[f32], statistics: [f32; 2], class: Option<usize>, scale: f32, dx: &mut [f32]) {
        let [max, inverse] = statistics;
        let Some(class) = class else { return dx.fill(0.0) };
        let factor = inverse * scale;
        for (dx, &x) in dx.iter_mut().zip(x) {
            *dx = (x - max).probability::<FUSED>() * factor;
        }
        dx[class] = ((x[class] - max).probability::<FUSED>() * inverse - 1.0) * scale;
    }
}

/// Writes `softmax(x) − onehot(target)`, rounded to the half type, to this address, in rows as long as those of `x`
/// `[rows, pitch]`, of which the first `classes` elements count; of the others the gradient is 0.
fn launch_rounded_gradient(
    gpu: &dyn Gpu,
    dtype: DType,
    to: Address,
    x: &Tensor,
    statistics: &Tensor,
    targets: &Tensor,
    (classes, ignore_index): (usize, i64),
) -> Result<()> {
    let (rows, pitch) = (targets.numel(), x.dim(-1)?);
    gpu.kernel("linear_cross_entropy_bwd", &[("DTYPE", dtype.name())])?.launch(
        Grid::rows(rows, classes),
        args![Arg::Output(to), x, statistics, targets, rows as i64, size32(classes)?, size32(pitch)?, ignore_index],
    )
}

/// Returns `x · grad / divisor`, rounded to a dtype, for up to three `x` by one launch; `grad` in the type of `x`,
/// `divisor` in f64, one element each.
fn launch_scaled(
    gpu: &dyn Gpu,
    dtype: DType,
    x: [Option<Tensor>; 3],
    grad: &Tensor,
    divisor: Option<&Tensor>,
) -> Result<[Option<Tensor>; 3]> {
    let [x0, x1, x2] = x.map(|x| x.map(|x| x.packed()).transpose());
    let x = [x0?, x1?, x2?];
    let uninit = |x: &Option<Tensor>| x.as_ref().map(|x| Tensor::uninit(*x.shape(), dtype, x.device())).transpose();
    let grad = grad.contiguous()?;
    let mut y = [uninit(&x[0])?, uninit(&x[1])?, uninit(&x[2])?];
    let counts = x.each_ref().map(|x| x.as_ref().map_or(0, Tensor::numel));
    let largest = counts.into_iter().max().unwrap_or(0);
    let [y0, y1, y2] = &mut y;
    let [x0, x1, x2] = &x;
    let [n0, n1, n2] = counts.map(|count| count as i64);
    let args =
        args![y0.as_mut(), y1.as_mut(), y2.as_mut(), x0.as_ref(), x1.as_ref(), x2.as_ref(), &grad, divisor, n0, n1, n2];
    gpu.kernel("scale_elements", &[("DTYPE", dtype.name())])?.launch(Grid::packets(largest, grad.dtype()), args)?;
    Ok(y)
}

struct LinearCrossEntropyBackward {
    gradients: Gradients,
    /// Shape of `x`.
    shape: Shape,
    dtype: DType,
}

impl Backward for LinearCrossEntropyBackward {
    fn name(&self) -> &'static str {
        OP
    }

    /// Multiplies the gradients of the forward pass by the gradient of the loss.
    fn backward(self: Box<Self>, grad: Tensor, need: &[bool]) -> Result<InputGrads> {
        let Self { gradients: Gradients { x, weight, bias, divisor }, shape, dtype } = *self;
        let with_bias = need.len() > 2;
        if let Device::Gpu(gpu) = *grad.device() {
            let [x, weight, bias] = launch_scaled(gpu, dtype, [x, weight, bias], &grad, divisor.as_ref())?;
            let x = x.map(|x| x.reshape(shape)).transpose()?;
            let bias = bias.map(|bias| bias.squeeze(0)).transpose()?;
            let grads = [x, weight, bias].into_iter().take(if with_bias { 3 } else { 2 });
            return Ok(InputGrads::whole(grads));
        }
        let factor = match divisor {
            Some(divisor) => grad.div(&divisor.to_dtype(grad.dtype())?)?,
            None => grad,
        };
        // On the CPU the value is available, and usually 1.
        let is_one = *factor.device() == Device::Cpu && factor.item()? == 1.0;
        let finish = |gradient: Option<Tensor>| -> Result<Option<Tensor>> {
            let Some(gradient) = gradient else { return Ok(None) };
            let gradient = if is_one { gradient } else { gradient.mul(&factor)? };
            gradient.to_dtype(dtype).map(Some)
        };
        let x = finish(x)?.map(|x| x.reshape(shape)).transpose()?;
        let mut grads = vec![x, finish(weight)?];
        if with_bias {
            grads.push(finish(bias)?.map(|bias| bias.squeeze(0)).transpose()?);
        }
        Ok(InputGrads::whole(grads))
    }
}
