//! Training steps over all parameters at once: gradient norm, AdamW update, moving average.
//!
//! Tensors are cut into chunks of a fixed size and every chunk of every tensor is a task of one parallel loop, or a
//! block of one launch, so that many small parameters keep all threads as busy as one large one. The chunks depend only
//! on the sizes, so the results are bit-identical for any number of threads.

use std::{ops::Range, sync::Mutex};

use super::many::{Group, Table, by_device};
use crate::{
    DType, Device, Error, Result, Tensor,
    collect::CollectVec,
    device::{
        Address, Gpu, Grid, args, cpu,
        rows::{Floats, FloatsMut},
        simd::vectorized,
    },
    dtype::{Float, Real, dispatch_real},
    error::ensure,
    shape::Shape,
};

/// Number of elements per task: large enough to amortize scheduling, small enough to balance the load.
const CHUNK: usize = 16 * 1024;

/// Number of elements widened at a time, so that they stay in the L1 cache; a multiple of the number of sums in
/// [`add_squares`].
const TILE: usize = 1024;

/// Makes a tensor packed and the only owner of its values, so that it can be written in place.
pub(crate) fn own(tensor: &mut Tensor) -> Result<()> {
    if !tensor.is_unique() {
        *tensor = tensor.to_owned_copy()?;
    }
    Ok(())
}

/// Returns the sum of squares of each tensor, in f64. The tensors must be packed. Tensors on a GPU cost one read-back
/// per dtype.
pub(crate) fn square_norms(tensors: &[Tensor]) -> Result<Vec<f64>> {
    let mut sums = vec![0.0; tensors.len()];
    let indexed = tensors.iter().enumerate().filter(|(_, tensor)| tensor.numel() > 0);
    let (on_cpu, groups) = by_device(indexed, |(_, tensor)| (tensor.device().clone(), tensor.dtype()));
    for Group { gpu, key: dtype, items } in groups {
        let norms = square_norms_cuda(gpu, dtype, items.iter().map(|(_, tensor)| *tensor))?.to_vec::<f64>()?;
        for ((index, _), norm) in items.iter().zip(norms) {
            sums[*index] = norm;
        }
    }
    let mut parts: Vec<(usize, Floats)> = Vec::new();
    for (index, tensor) in on_cpu {
        let values = tensor.floats("gradient_norm")?;
        let chunks = (0..values.len()).step_by(CHUNK);
        parts.extend(chunks.map(|first| (index, values.range(first..values.len().min(first + CHUNK)))));
    }
    let mut squares = vec![0.0; parts.len()];
    cpu::for_rows(&mut squares, 1, CHUNK, |first, squares| {
        let (mut singles, mut doubles) = (Vec::new(), Vec::new());
        for (square, (_, part)) in squares.iter_mut().zip(&parts[first..]) {
            *square = match part {
                Floats::F64(_) => square_norm::<f64>(*part, &mut doubles),
                _ => square_norm::<f32>(*part, &mut singles),
            };
        }
    });
    for ((index, _), square) in parts.iter().zip(squares) {
        sums[*index] += square;
    }
    Ok(sums)
}

/// Computes the sums on the device; every tensor must have elements.
fn square_norms_cuda<'a>(
    gpu: &'static dyn Gpu,
    dtype: DType,
    tensors: impl Iterator<Item = &'a Tensor>,
) -> Result<Tensor> {
    let rows = tensors.map(|tensor| Ok(([tensor.address()?], tensor.numel())));
    let table = Table::new(gpu, &format!("square_norm {dtype}"), rows)?;
    let uninit = |n: usize| Tensor::uninit(Shape::new(&[n])?, DType::F64, table.rows.device());
    let (mut partials, mut totals) = (uninit(table.chunks)?, uninit(table.tensors)?);
    let options = [("DTYPE", dtype.name())];
    gpu.kernel("square_norm_chunks", &options)?
        .launch(table.grid(), args![&mut partials, &table.rows, table.tensors as u32])?;
    gpu.kernel("square_norm_totals", &options)?
        .launch(Grid::new([table.tensors as u32, 1, 1], [256, 1, 1]), args![&mut totals, &partials, &table.rows])?;
    Ok(totals)
}

/// Computes the norm of all gradients and the clipping factor without a read-back: `[2]` F64 on their device, the
/// factor being NaN if the norm is not finite. `given`: a factor applied to the gradients first, and the maximum norm,
/// `[2]` F64.
///
/// The tensors must be packed and of one dtype; the CPU gets the same bits from the sums of [`square_norms`].
#[cfg(feature = "cuda")]
pub(crate) fn clip_on_device(tensors: &[Tensor], given: &Tensor) -> Result<Tensor> {
    let with_elements = || tensors.iter().filter(|tensor| tensor.numel() > 0);
    let mut norm = given.uninit_like()?;
    let (Device::Gpu(gpu), Some(first)) = (given.device(), with_elements().next()) else {
        return Err(Error::argument("graph", "expected gradients on a GPU"));
    };
    let dtype = first.dtype();
    ensure!(
        with_elements().all(|tensor| tensor.dtype() == dtype && tensor.device() == given.device()),
        Error::dtype("graph", "expected all gradients on one GPU and of one dtype")
    );
    let totals = square_norms_cuda(*gpu, dtype, with_elements())?;
    gpu.kernel("square_norm_clip", &[("DTYPE", dtype.name())])?
        .launch(Grid::new([1; 3], [1; 3]), args![&mut norm, &totals, given, totals.numel() as u32])?;
    Ok(norm)
}

/// Returns ranges of at most [`TILE`] elements, in order.
fn tiles(len: usize) -> impl Iterator<Item = Range<usize>> {
    (0..len).step_by(TILE).map(move |start| start..len.min(start + TILE))
}

fn square_norm<R: Real>(values: Floats<'_>, memory: &mut Vec<R>) -> f64 {
    // Sixteen independent sums: an order of additions that every vector width can keep.
    let mut sums = [0.0f64; 16];
    tiles(values.len()).for_each(|tile| add_squares(values.range(tile).to_slice(memory), &mut sums));
    sums.iter().sum()
}

vectorized! {
    fn add_squares<R: Real>(x: &[R], sums: &mut [f64; 16]) {
        let mut lanes = *sums;
        let blocks = x.chunks_exact(16);
        let rest = blocks.remainder();
        for block in blocks {
            for (sum, x) in lanes.iter_mut().zip(block) {
                let x = x.to_f64();
                *sum += x * x;
            }
        }
        for (sum, x) in lanes.iter_mut().zip(rest) {
            let x = x.to_f64();
            *sum += x * x;
        }
        *sums = lanes;
    }
}

/// One parameter of an AdamW step. All tensors are packed, of one shape, and the written ones uniquely owned.
pub(crate) struct Update<'a> {
    pub value: &'a mut Tensor,
    /// Gradient, in the dtype of the parameter or of its state.
    pub grad: &'a Tensor,
    /// Running mean of the gradient; like that of its square below, f64 for an f64 parameter and f32 otherwise.
    pub exp_avg: &'a mut Tensor,
    pub exp_avg_sq: &'a mut Tensor,
    /// The parameter in f32, from which a half-precision value is rounded.
    pub master: Option<&'a mut Tensor>,
    /// Number of updates of this parameter, including this one.
    pub step: u64,
}

/// Settings shared by all parameters of an AdamW step.
#[derive(Clone, Copy)]
pub(crate) struct Settings {
    pub lr: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    pub weight_decay: f64,
    /// Factor applied to the gradients first: clipping without a separate pass.
    pub grad_scale: f64,
}

fn check(updates: &[Update<'_>]) -> Result<()> {
    for Update { value, grad, .. } in updates {
        ensure!(
            value.shape() == grad.shape() && value.device() == grad.device(),
            Error::shape(
                "adamw",
                format_args!(
                    "the parameter is {:?} {}, but its gradient is {:?} {}",
                    value.shape(),
                    value.device(),
                    grad.shape(),
                    grad.device()
                )
            )
        );
        ensure!(
            [value.dtype(), value.dtype().accumulator()].contains(&grad.dtype()),
            Error::dtype(
                "adamw",
                format_args!("the parameter is {}, but its gradient is {}", value.dtype(), grad.dtype())
            )
        );
    }
    Ok(())
}

/// Compiles the kernel of a step for parameters and gradients of these kinds, unless it is there already.
///
/// A first compilation takes seconds: nobody should wait for it on a parameter's lock.
pub(crate) fn compile(kernel: &'static str, kinds: impl Iterator<Item = (Device, DType, DType)>) -> Result<()> {
    for Group { gpu, key: [dtype, of_grad], .. } in
        by_device(kinds, |(device, dtype, of_grad)| (device.clone(), [*dtype, *of_grad])).1
    {
        gpu.kernel(kernel, &[("DTYPE", dtype.name()), ("GRAD", of_grad.name())])?;
    }
    Ok(())
}

/// Performs one AdamW step on all parameters.
///
/// Errors, before anything is changed: a gradient of a dtype that is neither the parameter's nor its state's, of
/// another shape or on another device.
pub(crate) fn adamw(updates: Vec<Update<'_>>, settings: Settings) -> Result<()> {
    check(&updates)?;
    let (on_cpu, groups) = by_device(updates, |update| {
        (update.value.device().clone(), (update.value.dtype(), update.grad.dtype(), update.step))
    });
    for (index, Group { gpu, key: (dtype, of_grad, step), items }) in groups.into_iter().enumerate() {
        adamw_cuda(gpu, &format!("adamw {index}"), [dtype, of_grad], items, Factors::<f64>::new(settings, step))?;
    }
    let mut tasks = Vec::new();
    for update in on_cpu {
        dispatch_real!(update.value.dtype(), R, cut::<R>(update, settings, &mut tasks)?);
    }
    run(tasks);
    Ok(())
}

/// Like [`adamw`], but reads its numbers on the device when it runs, and does nothing if `grad_scale`, a scalar there,
/// is NaN. `factors`: addresses of the seven [`Settings::factors`] of each update.
///
/// Errors: those of [`adamw`], or parameters that are not all on one GPU.
#[cfg(feature = "cuda")]
pub(crate) fn adamw_recorded(updates: Vec<Update<'_>>, factors: &[Address], grad_scale: &Tensor) -> Result<()> {
    check(&updates)?;
    let (on_cpu, groups) = by_device(updates.into_iter().zip(factors), |(update, _)| {
        (update.value.device().clone(), (update.value.dtype(), update.grad.dtype()))
    });
    let here = |device: &Device| device == grad_scale.device();
    ensure!(
        on_cpu.is_empty() && groups.iter().all(|group| here(&Device::Gpu(group.gpu))),
        Error::argument("graph", format_args!("expected every parameter on {}", grad_scale.device()))
    );
    for Group { gpu, key: (dtype, of_grad), items } in groups {
        let rows = items.into_iter().map(|(update, factors)| {
            let ([value, grad, mean, square, master], elements) = row(update)?;
            Ok(([value, grad, mean, square, master, *factors], elements))
        });
        let table = Table::new(gpu, "adamw recorded", rows)?;
        gpu.kernel("adamw_recorded", &[("DTYPE", dtype.name()), ("GRAD", of_grad.name())])?
            .launch(table.grid(), args![&table.rows, grad_scale, table.tensors as u32])?;
    }
    Ok(())
}

/// Returns a parameter's row in the kernel's table.
fn row(update: Update<'_>) -> Result<([Address; 5], usize)> {
    let master = update.master.map_or(Ok(Address::NULL), Tensor::address_mut)?;
    let state = [update.exp_avg.address_mut()?, update.exp_avg_sq.address_mut()?];
    let (value, grad) = (update.value.address_mut()?, update.grad.address()?);
    Ok(([value, grad, state[0], state[1], master], update.grad.numel()))
}

/// Performs one step, in one launch, on parameters with the same dtype and number of updates.
fn adamw_cuda(
    gpu: &'static dyn Gpu,
    name: &str,
    [dtype, of_grad]: [DType; 2],
    updates: Vec<Update<'_>>,
    factors: Factors<f64>,
) -> Result<()> {
    let table = Table::new(gpu, name, updates.into_iter().map(row))?;
    let Factors { grad_scale, decay, mean, beta2, square, rate, correction, eps } = factors;
    gpu.kernel("adamw_step", &[("DTYPE", dtype.name()), ("GRAD", of_grad.name())])?.launch(
        table.grid(),
        args![&table.rows, table.tensors as u32, grad_scale, decay, mean, beta2, square, rate, correction, eps],
    )
}

/// Work on one chunk.
type Task<'a> = Box<dyn FnMut() + Send + 'a>;

/// Runs each task once, in parallel.
fn run(tasks: Vec<Task<'_>>) {
    // Never contended: the lock proves to the compiler that one thread at a time has a task.
    let tasks: Vec<Mutex<Task>> = tasks.into_iter().map(Mutex::new).collect_vec();
    cpu::for_tasks(tasks.len(), |index| {
        let mut task = tasks[index].lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        task();
    });
}

fn cut<'a, R: Real>(update: Update<'a>, settings: Settings, tasks: &mut Vec<Task<'a>>) -> Result<()> {
    const OP: &str = "adamw";
    let factors = Factors::<R>::new(settings, update.step);
    let grad = update.grad.floats(OP)?;
    let mut masters = update.master.map(|master| Ok(master.values_mut::<R>()?.chunks_mut(CHUNK))).transpose()?;
    let chunks = update
        .value
        .floats_mut(OP)?
        .chunks(CHUNK)
        .into_iter()
        .zip(update.exp_avg.values_mut::<R>()?.chunks_mut(CHUNK))
        .zip(update.exp_avg_sq.values_mut::<R>()?.chunks_mut(CHUNK));
    for (index, ((value, mean), square)) in chunks.enumerate() {
        let grad = grad.range(index * CHUNK..grad.len().min((index + 1) * CHUNK));
        let master = masters.as_mut().and_then(Iterator::next);
        let mut chunk = Chunk { value, master, grad, mean, square, factors };
        tasks.push(Box::new(move || chunk.step()));
    }
    Ok(())
}

/// Part of one parameter, updated by one task.
struct Chunk<'a, R> {
    value: FloatsMut<'a>,
    master: Option<&'a mut [R]>,
    grad: Floats<'a>,
    mean: &'a mut [R],
    square: &'a mut [R],
    factors: Factors<R>,
}

impl<R: Real> Chunk<'_, R> {
    fn step(&mut self) {
        let Self { value, master, grad, mean, square, factors } = self;
        let (mut gradients, mut weights) = (Vec::new(), Vec::new());
        for tile in tiles(grad.len()) {
            let grad = grad.range(tile.clone()).to_slice(&mut gradients);
            let (mean, square) = (&mut mean[tile.clone()], &mut square[tile.clone()]);
            let mut value = value.part(tile.clone());
            if let Some(master) = master.as_mut().map(|master| &mut master[tile]) {
                // A value that differs from the rounded master was set elsewhere since, and takes precedence.
                value.replace_unless_rounded(master);
                step_chunk(master, grad, mean, square, *factors);
                value.write(master);
            } else if let Some(value) = value.direct_mut::<R>() {
                step_chunk(value, grad, mean, square, *factors);
            } else {
                weights.resize(grad.len(), R::ZERO);
                value.values().read(&mut weights);
                step_chunk(&mut weights, grad, mean, square, *factors);
                value.write(&weights);
            }
        }
    }
}

/// Numbers of an AdamW step in the state's type, computed in f64 as in PyTorch.
#[derive(Clone, Copy)]
struct Factors<A> {
    grad_scale: A,
    /// `1 − lr · weight_decay`
    decay: A,
    /// `1 − β₁`
    mean: A,
    beta2: A,
    /// `1 − β₂`
    square: A,
    /// `lr / (1 − β₁^t)`
    rate: A,
    /// `√(1 − β₂^t)`
    correction: A,
    eps: A,
}

impl Settings {
    /// Returns the numbers of a parameter's step that the kernel reads from memory: decay, `1 − β₁`, `β₂`, `1 − β₂`,
    /// rate, correction, eps.
    #[cfg(feature = "cuda")]
    pub fn factors(self, step: u64) -> [f64; 7] {
        let Factors { decay, mean, beta2, square, rate, correction, eps, .. } = Factors::<f64>::new(self, step);
        [decay, mean, beta2, square, rate, correction, eps]
    }
}

impl<A: Real> Factors<A> {
    fn new(settings: Settings, step: u64) -> Self {
        let Settings { lr, beta1, beta2, eps, weight_decay, grad_scale } = settings;
        let correction = |beta: f64| 1.0 - libm::pow(beta, step as f64);
        Self {
            grad_scale: A::from_f64(grad_scale),
            decay: A::from_f64(1.0 - lr * weight_decay),
            mean: A::from_f64(1.0 - beta1),
            beta2: A::from_f64(beta2),
            square: A::from_f64(1.0 - beta2),
            rate: A::from_f64(lr / correction(beta1)),
            correction: A::from_f64(correction(beta2).sqrt()),
            eps: A::from_f64(eps),
        }
    }

    /// Returns the new value of one weight and updates its state, `mean` and `square`.
    #[inline(always)]
    fn apply(&self, weight: A, grad: A, mean: &mut A, square: &mut A) -> A {
        let grad = grad * self.grad_scale;
        *mean += self.mean * (grad - *mean);
        *square = *square * self.beta2 + self.square * grad * grad;
        let denominator = square.sqrt() / self.correction + self.eps;
        weight * self.decay - self.rate * *mean / denominator
    }
}

vectorized! {
    fn step_chunk<R: Real>(value: &mut [R], grad: &[R], mean: &mut [R], square: &mut [R], factors: Factors<R>) {
        for (((value, grad), mean), square) in value.iter_mut().zip(grad).zip(mean).zip(square) {
            *value = factors.apply(*value, *grad, mean, square);
        }
    }
}

/// Updates the moving averages: `average += (1 − decay) · (value − average)`.
///
/// The averages are uniquely owned and packed, f64 for f64 values and f32 otherwise; the values are packed.
pub(crate) fn average(averages: Vec<&mut Tensor>, values: &[Tensor], decay: f64) -> Result<()> {
    let pairs = averages.into_iter().zip(values);
    let (on_cpu, groups) = by_device(pairs, |(_, value)| (value.device().clone(), value.dtype()));
    for Group { gpu, key: dtype, items } in groups {
        let rows =
            items.into_iter().map(|(average, value)| Ok(([average.address_mut()?, value.address()?], value.numel())));
        let table = Table::new(gpu, &format!("ema {dtype}"), rows)?;
        gpu.kernel("ema_update", &[("DTYPE", dtype.name())])?
            .launch(table.grid(), args![&table.rows, table.tensors as u32, 1.0 - decay])?;
    }
    let mut tasks: Vec<Task> = Vec::new();
    for (average, value) in on_cpu {
        dispatch_real!(value.dtype(), R, {
            let (value, weight) = (value.floats("ema")?, R::from_f64(1.0 - decay));
            for (index, average) in average.values_mut::<R>()?.chunks_mut(CHUNK).enumerate() {
                let value = value.range(index * CHUNK..value.len().min((index + 1) * CHUNK));
                tasks.push(Box::new(move || average_chunk(average, value.to_slice(&mut Vec::new()), weight)));
            }
        });
    }
    run(tasks);
    Ok(())
}

vectorized! {
    fn average_chunk<R: Real>(average: &mut [R], value: &[R], weight: R) {
        for (average, value) in average.iter_mut().zip(value) {
            *average += weight * (*value - *average);
        }
    }
}
