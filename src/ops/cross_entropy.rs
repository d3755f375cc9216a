//! Softmax cross-entropy from logits, without storing the probabilities.

use std::sync::atomic::{AtomicU64, Ordering};

use super::{
    norm::reuse,
    reduce::{BLOCK, fold, max_slice, sum_slice},
};
use crate::{
    DType, Device, Error, Result, Tensor,
    autograd::{Backward, InputGrads, record},
    device::{
        Arg, Gpu, Grid, args,
        floats::FloatsMut,
        rows::{In, Out, Sums, for_rows_of},
        simd::vectorized,
        size32,
    },
    dtype::{Float, Real, dispatch_real},
    error::ensure,
    shape::Shape,
};

const OP: &str = "cross_entropy";

impl Tensor {
    /// Computes the mean over the rows of `−ln softmax(logits)[target]`, without the rows whose target is
    /// `ignore_index` (PyTorch's default is −100).
    ///
    /// Shapes: `[.., classes]`, targets `[..]` of [`DType::I64`] → `[]`, PyTorch has the classes second, `[n, classes,
    /// ..]`: move them to the end with [`Tensor::permute`]. The result is f32 (f64 for f64), also for half-precision
    /// logits. Rows are computed in the same type, their mean in f64. Saves: the logits, and the maximum and sum of
    /// exponentials of each row; the backward pass recomputes the probabilities, in place of the logits if no other
    /// handle shares them.
    ///
    /// Infinities and NaN are as in PyTorch, with two exceptions. The gradient of ignored rows is 0, even where their
    /// logits are not finite and PyTorch gives NaN. An infinite gradient of the loss gives −∞ at the target, where
    /// PyTorch computes ∞ − ∞.
    ///
    /// Errors: targets of another shape or dtype, a target that is not a class
    /// ([`ErrorKind::Index`](crate::ErrorKind::Index)), no target to average over (PyTorch gives NaN), or logits that
    /// are not float. A GPU reports invalid targets at the next read-back. On a GPU exponentials of half types have
    /// errors of up to 2⁻¹⁷ on the way to the loss.
    ///
    /// ```
    /// use x_transformers::{Device, Tensor};
    /// # fn main() -> x_transformers::Result<()> {
    /// let logits = Tensor::from_slice(&[0.0f32, 0.0, 5.0, 5.0], [2, 2], &Device::Cpu)?;
    /// let targets = Tensor::from_slice(&[1i64, -100], [2], &Device::Cpu)?;
    /// let loss = logits.cross_entropy(&targets, -100)?.item()?;
    /// assert!((loss - std::f64::consts::LN_2).abs() < 1e-6);
    /// # Ok(())
    /// # }
    /// ```
    #[doc(alias = "CrossEntropyLoss")]
    #[doc(alias = "nll_loss")]
    pub fn cross_entropy(&self, targets: &Tensor, ignore_index: i64) -> Result<Tensor> {
        let Some((&classes, batch)) = self.shape().split_last() else {
            return Err(Error::shape(OP, "expected logits of shape [.., classes], got a scalar"));
        };
        check_targets(OP, self, batch, targets)?;
        let (x, targets) = (self.contiguous()?, targets.contiguous()?);
        let shape = Shape::new(&[targets.numel(), 2])?;
        let mut statistics = Tensor::uninit(shape, x.dtype().accumulator(), x.device())?;
        let (loss, count) = match x.device() {
            Device::Cpu => {
                let count = count_targets(targets.values::<i64>()?, classes, ignore_index)?;
                let sum = dispatch_real!(x.dtype(), R, {
                    forward_rows::<R>(&x, &targets, classes, ignore_index, &mut statistics)?
                });
                let loss = Tensor::full((), sum / count as f64, statistics.dtype(), x.device())?;
                (loss, Tensor::scalar(count as f64, x.device())?)
            }
            Device::Gpu(gpu) => {
                let losses = launch_rows(*gpu, &x, &targets, (classes, ignore_index), &mut statistics)?;
                launch_mean(*gpu, x.dtype(), &losses, &targets, ignore_index)?
            }
        };
        record(OP, loss, &[&x], |_| CrossEntropyBackward {
            logits: x.detach(),
            statistics,
            targets,
            ignore_index,
            count,
        })
    }
}

/// Checks that `targets`, one for each row of `batch`, are of I64 and lie where `x` does, which are floats.
pub(super) fn check_targets(op: &'static str, x: &Tensor, batch: &[usize], targets: &Tensor) -> Result<()> {
    ensure!(
        **targets.shape() == *batch,
        Error::shape(
            op,
            format_args!("expected targets of shape {batch:?} for {:?}, got {:?}", x.shape(), targets.shape())
        )
    );
    ensure!(
        targets.dtype() == DType::I64,
        Error::dtype(op, format_args!("expected targets of i64, got {}", targets.dtype()))
    );
    ensure!(
        x.device() == targets.device(),
        Error::device(
            op,
            format_args!(
                "the values are on {} but the targets are on {}; move one with `to_device`",
                x.device(),
                targets.device()
            )
        )
    );
    x.dtype().expect_float(op)
}

/// Computes the loss, in f64, of each row of `x` `[rows, pitch]`, of which the first `classes` elements count; writes
/// maxima and sums to `statistics`.
pub(super) fn launch_rows(
    gpu: &dyn Gpu,
    x: &Tensor,
    targets: &Tensor,
    (classes, ignore_index): (usize, i64),
    statistics: &mut Tensor,
) -> Result<Tensor> {
    let rows = targets.numel();
    let mut losses = Tensor::uninit(Shape::new(&[rows])?, DType::F64, x.device())?;
    gpu.kernel("cross_entropy_fwd", &[("DTYPE", x.dtype().name())])?.launch(
        Grid::rows(rows, classes),
        args![
            statistics,
            &mut losses,
            Arg::Output(gpu.faults()),
            x,
            targets,
            rows as i64,
            size32(classes)?,
            size32(x.dim(-1)?)?,
            ignore_index
        ],
    )?;
    Ok(losses)
}

/// Computes the mean of these losses, in the accumulator of `dtype`, and the number of targets that count, in f64.
pub(super) fn launch_mean(
    gpu: &dyn Gpu,
    dtype: DType,
    losses: &Tensor,
    targets: &Tensor,
    ignore_index: i64,
) -> Result<(Tensor, Tensor)> {
    let scalar = Shape::new(&[])?;
    let mut loss = Tensor::uninit(scalar, dtype.accumulator(), losses.device())?;
    let mut count = Tensor::uninit(scalar, DType::F64, losses.device())?;
    gpu.kernel("cross_entropy_mean", &[("DTYPE", dtype.name())])?.launch(
        Grid::new([1, 1, 1], [512, 1, 1]),
        args![&mut loss, &mut count, Arg::Output(gpu.faults()), losses, targets, targets.numel() as i64, ignore_index],
    )?;
    Ok((loss, count))
}

/// Writes `(softmax(x) − onehot(target)) g / count` over the logits `x` `[rows, pitch]`, of which the first `classes`
/// of each row count.
pub(super) fn launch_gradient(
    gpu: &dyn Gpu,
    x: &mut Tensor,
    source: Option<&Tensor>,
    statistics: &Tensor,
    targets: &Tensor,
    (classes, ignore_index): (usize, i64),
    [g, count]: [&Tensor; 2],
) -> Result<()> {
    let (rows, pitch) = (targets.numel(), x.dim(-1)?);
    let kernel = gpu.kernel("cross_entropy_bwd", &[("DTYPE", x.dtype().name())])?;
    let to = x.address_mut()?;
    let from = source.map_or(Ok(to), Tensor::address)?;
    kernel.launch(
        Grid::rows(rows, classes),
        args![
            Arg::Output(to),
            Arg::Input(from),
            statistics,
            targets,
            g,
            count,
            rows as i64,
            size32(classes)?,
            size32(pitch)?,
            ignore_index
        ],
    )
}

/// Returns the number of targets that count.
pub(super) fn count_targets(targets: &[i64], classes: usize, ignore_index: i64) -> Result<usize> {
    let mut count = 0;
    for &target in targets.iter().filter(|&&target| target != ignore_index) {
        // A negative target becomes a large number.
        ensure!((target as u64) < classes as u64, Error::index(OP, "class", target, classes));
        count += 1;
    }
    ensure!(count > 0, Error::no_targets(targets.len(), ignore_index));
    Ok(count)
}

/// Losses of rows, each of which one thread writes.
pub(super) struct Losses(Vec<AtomicU64>);

impl Losses {
    pub fn new(rows: usize) -> Self {
        Self((0..rows).map(|_| AtomicU64::new(0)).collect())
    }

    /// Sets the losses starting at a row.
    pub fn set(&self, row: usize, losses: impl IntoIterator<Item = f64>) {
        for (to, loss) in self.0[row..].iter().zip(losses) {
            to.store(loss.to_bits(), Ordering::Relaxed);
        }
    }

    /// Sums the losses in order, whatever the number of threads.
    pub fn sum(self) -> f64 {
        self.0.into_iter().map(|loss| f64::from_bits(loss.into_inner())).sum()
    }
}

/// Returns the sum of the losses and writes `[maximum, 1 / Σ exp(x − maximum)]` of each row to `statistics`.
pub(super) fn forward_rows<R: Real>(
    x: &Tensor,
    targets: &Tensor,
    classes: usize,
    ignore_index: i64,
    statistics: &mut Tensor,
) -> Result<f64> {
    let (losses, targets) = (Losses::new(targets.numel()), targets.values::<i64>()?);
    let (x, save) = (In::new(x.floats(OP)?, classes), Out::new(statistics.floats_mut(OP)?, 2));
    for_rows_of::<R, 1, 1>([save], [x], Sums::none(), COST * classes, &|row, [statistics], [x], _| {
        let rows = x.chunks_exact(classes).zip(&targets[row..]).zip(statistics.chunks_exact_mut(2));
        losses.set(row, rows.map(|((x, &target), statistics)| forward(x, target, ignore_index, statistics)));
    });
    Ok(losses.sum())
}

/// Returns the sum of the losses of these rows of logits and overwrites them with `(softmax(x) − onehot(target))
/// scale`.
pub(super) fn rows_and_gradient<R: Real>(
    x: &mut [R],
    targets: &[i64],
    classes: usize,
    ignore_index: i64,
    scale: f64,
) -> f64 {
    let (losses, scale) = (Losses::new(targets.len()), R::from_f64(scale));
    let x = Out::over(FloatsMut::of(x), classes, None);
    for_rows_of::<R, 1, 0>([x], [], Sums::none(), 2 * COST * classes, &|row, [x], [], _| {
        // Row by row, so that the second pass finds the row in the cache.
        let rows = x.chunks_exact_mut(classes).zip(&targets[row..]);
        losses.set(
            row,
            rows.map(|(x, &target)| {
                let mut statistics = [R::ZERO; 2];
                let loss = forward(x, target, ignore_index, &mut statistics);
                backward(statistics, target, ignore_index, scale, &[], x);
                loss
            }),
        );
    });
    losses.sum()
}

/// Cost of an exponential, in element operations.
pub(super) const COST: usize = 8;

vectorized! {
    /// Returns the loss of a row and writes `[maximum, 1 / Σ exp(x − maximum)]` to `statistics`.
    pub(super) fn forward<R: Real>(x: &[R], target: i64, ignore_index: i64, statistics: &mut [R]) -> f64 {
        if target == ignore_index {
            statistics.fill(R::ZERO);
            return 0.0;
        }
        let (max, sum) = maximum_and_sum::<R, FUSED>(x);
        statistics[0] = max;
        statistics[1] = R::ONE / sum;
        // Not from a rounded log-sum-exp: its error would grow with the logits.
        (max - x[target as usize]).to_f64() + Real::ln(sum.to_f64())
    }
}

/// Computes the maximum of a row and `Σ exp(x − maximum)` in one pass over memory: adds up a block's exponentials while
/// finding the maximum of the next, and rescales the sum when the maximum grows.
#[inline(always)]
fn maximum_and_sum<T: Float, const FUSED: bool>(row: &[T]) -> (T::Acc, T::Acc) {
    let (mut max, mut sum) = (T::Acc::NEG_INFINITY, T::Acc::ZERO);
    let mut blocks = row.chunks(BLOCK);
    let mut block = blocks.next().unwrap_or_default();
    let mut found = max_slice(block);
    while !block.is_empty() {
        if found > max {
            sum *= (max - found).probability::<FUSED>();
            max = found;
        }
        // A block of only −∞ adds nothing; if the whole row is −∞, the loss is NaN.
        let shift = if max == T::Acc::NEG_INFINITY { T::Acc::ZERO } else { max };
        let next = blocks.next().unwrap_or_default();
        let exp = |x: T| (x.to_acc() - shift).probability::<FUSED>();
        if next.len() == BLOCK {
            // Enough lanes that no addition waits for another.
            let (mut largest, mut sums) = ([T::Acc::NEG_INFINITY; 64], [T::Acc::ZERO; 64]);
            for (block, next) in block.as_chunks::<64>().0.iter().zip(next.as_chunks::<64>().0) {
                for (largest, x) in largest.iter_mut().zip(next) {
                    *largest = largest.max(x.to_acc());
                }
                for (sum, &x) in sums.iter_mut().zip(block) {
                    *sum += exp(x);
                }
            }
            found = max_slice(&largest);
            sum += sum_slice(&sums);
        } else {
            sum += fold(block, T::Acc::ZERO, exp);
            found = max_slice(next);
        }
        block = next;
    }
    (max, sum)
}

struct CrossEntropyBackward {
    logits: Tensor,
    statistics: Tensor,
    targets: Tensor,
    ignore_index: i64,
    /// Number of targets averaged over: one f64.
    count: Tensor,
}

impl Backward for CrossEntropyBackward {
    fn name(&self) -> &'static str {
        OP
    }

    /// Computes `dx = (softmax(x) − onehot(target)) g / count`; zero for rows that are left out.
    fn backward(self: Box<Self>, grad: Tensor, _need: &[bool]) -> Result<InputGrads> {
        let Self { logits, statistics, targets, ignore_index, count } = *self;
        let classes = logits.dim(-1)?;
        let (mut dx, source) = reuse(logits)?;
        match grad.device() {
            Device::Cpu => {
                let source = source.as_ref().map(|source| source.floats(OP)).transpose()?;
                let (saved, targets) = (In::new(statistics.floats(OP)?, 2), targets.values::<i64>()?);
                let scale = grad.item()? / count.item()?;
                let (out, logits) = Out::from_or_over(dx.floats_mut(OP)?, classes, source);
                dispatch_real!(statistics.dtype(), R, {
                    let scale = R::from_f64(scale);
                    let (ins, cost) = ([saved, logits], COST * classes);
                    for_rows_of::<R, 1, 2>([out], ins, Sums::none(), cost, &|row, [dx], [saved, logits], _| {
                        let saved = saved.as_chunks().0.iter().zip(&targets[row..]);
                        let mut logits = logits.chunks_exact(classes);
                        for (dx, (&statistics, &target)) in dx.chunks_exact_mut(classes).zip(saved) {
                            let logits = logits.next().unwrap_or_default();
                            backward(statistics, target, ignore_index, scale, logits, dx);
                        }
                    });
                });
            }
            Device::Gpu(gpu) => {
                let source = source.as_ref();
                launch_gradient(
                    *gpu,
                    &mut dx,
                    source,
                    &statistics,
                    &targets,
                    (classes, ignore_index),
                    [&grad, &count],
                )?;
            }
        }
        Ok(InputGrads::one(dx))
    }
}

vectorized! {
    /// Computes the gradient of a row of logits, which `dx` holds if `logits` is empty.
    fn backward<R: Real>(
        statistics: [R; 2],
        target: i64,
        ignore_index: i64,
        scale: R,
        logits: &[R],
        dx: &mut [R],
    ) {
        if target == ignore_index {
            return dx.fill(R::ZERO);
        }
        let [max, inverse] = statistics;
        let factor = inverse * scale;
        let probability = |x: R| (x - max).probability::<FUSED>();
        let chosen = probability(*logits.get(target as usize).unwrap_or(&dx[target as usize])) * inverse;
        if logits.is_empty() {
            dx.iter_mut().for_each(|dx| *dx = probability(*dx) * factor);
        } else {
            dx.iter_mut().zip(logits).for_each(|(dx, x)| *dx = probability(*x) * factor);
        }
        dx[target as usize] = (chosen - R::ONE) * scale;
    }
}
