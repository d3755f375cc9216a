//! Training steps over all parameters at once: gradient norm, update by an optimizer's rule, moving average.
//!
//! Tensors are cut into chunks of a fixed size and every chunk of every tensor is a task of one parallel loop, or a
//! block of one launch, so that many small parameters keep all threads as busy as one large one. The chunks depend only
//! on the sizes, so the results are bit-identical for any number of threads.

use std::{ops::Range, sync::Mutex};

use super::{
    many::{Group, Table, by_device},
    momentum::{Lion, Sgd, lion_chunk, sgd_chunk},
};
use crate::{
    DType, Device, Error, Result, Tensor,
    collect::CollectVec,
    device::{
        Address, Gpu, Grid, args, cpu,
        floats::{Floats, FloatsMut},
        simd::vectorized,
    },
    dtype::{Float, Real, dispatch_real},
    error::ensure,
    shape::Shape,
};

/// Number of elements per task: large enough to amortize scheduling, small enough to balance the load.
pub(crate) const CHUNK: usize = 16 * 1024;

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

/// One parameter of a step. All tensors are packed, of one shape, and the written ones uniquely owned.
pub(crate) struct Update<'a> {
    pub value: &'a mut Tensor,
    /// Gradient, in the dtype of the parameter or of its state.
    pub grad: &'a Tensor,
    /// Running mean of the gradient, and of its square, where the rule has them; f64 for an f64 parameter and f32
    /// otherwise.
    pub means: [Option<&'a mut Tensor>; 2],
    /// The parameter in f32, from which a half-precision value is rounded.
    pub master: Option<&'a mut Tensor>,
    pub rule: Rule,
}

/// Rule of a parameter's update, with its numbers for this step.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Rule {
    AdamW(Settings),
    Sgd(Sgd),
    Lion(Lion),
}

impl Rule {
    pub fn kernel(&self) -> &'static str {
        match self {
            Self::AdamW(_) => "adamw_step",
            Self::Sgd(_) => "momentum_sgd",
            Self::Lion(_) => "momentum_lion",
        }
    }
}

/// Settings of an AdamW step.
#[derive(Clone, Copy, PartialEq)]
pub(crate) struct Settings {
    /// Number of updates of the parameter, including this one.
    pub step: u64,
    pub lr: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    pub weight_decay: f64,
    /// Factor applied to the gradients first: clipping without a separate pass.
    pub grad_scale: f64,
}

fn check(updates: &[Update<'_>]) -> Result<()> {
    updates.iter().try_for_each(|Update { value, grad, .. }| check_gradient(value, grad))
}

/// Checks that a gradient belongs to a parameter.
pub(crate) fn check_gradient(value: &Tensor, grad: &Tensor) -> Result<()> {
    ensure!(
        value.shape() == grad.shape() && value.device() == grad.device(),
        Error::shape(
            "optimizer",
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
            "optimizer",
            format_args!("the parameter is {}, but its gradient is {}", value.dtype(), grad.dtype())
        )
    );
    Ok(())
}

/// Compiles these kernels for parameters and gradients of these dtypes, unless they are there already.
///
/// A first compilation takes seconds: nobody should wait for it on a parameter's lock.
pub(crate) fn compile(kinds: impl Iterator<Item = (&'static str, Device, [DType; 2])>) -> Result<()> {
    let (_, groups) = by_device(kinds, |(kernel, device, dtypes)| (device.clone(), (*kernel, *dtypes)));
    for Group { gpu, key: (kernel, [dtype, of_grad]), .. } in groups {
        gpu.kernel(kernel, &[("DTYPE", dtype.name()), ("GRAD", of_grad.name())])?;
    }
    Ok(())
}

/// Updates all parameters, each by its rule: on a GPU one launch for all that share rule, numbers and dtypes.
///
/// Errors, before anything is changed: a gradient of a dtype that is neither the parameter's nor its state's, of
/// another shape or on another device.
pub(crate) fn update(updates: Vec<Update<'_>>) -> Result<()> {
    check(&updates)?;
    let (on_cpu, groups) = by_device(updates, |update| {
        (update.value.device().clone(), ([update.value.dtype(), update.grad.dtype()], update.rule))
    });
    for (index, Group { gpu, key: (dtypes, rule), items }) in groups.into_iter().enumerate() {
        launch(gpu, &format!("update {index}"), dtypes, rule, items)?;
    }
    let mut tasks = Vec::new();
    for update in on_cpu {
        dispatch_real!(update.value.dtype(), R, cut::<R>(update, &mut tasks)?);
    }
    run(tasks);
    Ok(())
}

/// Performs an AdamW step like [`update`], but reads its numbers on the device when it runs, and does nothing if
/// `grad_scale`, a scalar there, is NaN. `factors`: addresses of the seven [`Settings::factors`] of each update.
///
/// Errors: those of [`update`], or parameters that are not all on one GPU.
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

/// Returns a parameter's row in the kernels' tables: value, gradient, both means, master.
fn row(update: Update<'_>) -> Result<([Address; 5], usize)> {
    let address = |tensor: Option<&mut Tensor>| tensor.map_or(Ok(Address::NULL), Tensor::address_mut);
    let [mean, square] = update.means;
    let (mean, square, master) = (address(mean)?, address(square)?, address(update.master)?);
    Ok(([update.value.address_mut()?, update.grad.address()?, mean, square, master], update.grad.numel()))
}

/// Performs one step, in one launch, on parameters with the same dtypes and rule.
fn launch(
    gpu: &'static dyn Gpu,
    name: &str,
    [dtype, of_grad]: [DType; 2],
    rule: Rule,
    updates: Vec<Update<'_>>,
) -> Result<()> {
    let rows = updates.into_iter().map(row);
    let table = match rule {
        Rule::AdamW(_) => Table::new(gpu, name, rows)?,
        // The kernels of at most one mean.
        _ => Table::new(
            gpu,
            name,
            rows.map(|row| row.map(|([value, grad, mean, _, master], numel)| ([value, grad, mean, master], numel))),
        )?,
    };
    let kernel = gpu.kernel(rule.kernel(), &[("DTYPE", dtype.name()), ("GRAD", of_grad.name())])?;
    let (rows, tensors, grid) = (&table.rows, table.tensors as u32, table.grid());
    match rule {
        Rule::AdamW(settings) => {
            let factors = Factors::<f64>::new(settings);
            let Factors { grad_scale, decay, mean, beta2, square, rate, correction, eps } = factors;
            kernel.launch(grid, args![rows, tensors, grad_scale, decay, mean, beta2, square, rate, correction, eps])
        }
        Rule::Sgd(Sgd { scale, couple, momentum, gain, own, mix, decay, rate }) => {
            kernel.launch(grid, args![rows, tensors, scale, couple, momentum, gain, own, mix, decay, rate])
        }
        Rule::Lion(Lion { scale, beta1, mean1, beta2, mean2, decay, rate }) => {
            kernel.launch(grid, args![rows, tensors, scale, beta1, mean1, beta2, mean2, decay, rate])
        }
    }
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

fn cut<'a, R: Real>(update: Update<'a>, tasks: &mut Vec<Task<'a>>) -> Result<()> {
    const OP: &str = "optimizer";
    let factors = match update.rule {
        Rule::AdamW(settings) => RuleOf::AdamW(Factors::<R>::new(settings)),
        Rule::Sgd(factors) => RuleOf::Sgd(factors.cast()),
        Rule::Lion(factors) => RuleOf::Lion(factors.cast()),
    };
    let grad = update.grad.floats(OP)?;
    let chunks =
        |tensor: Option<&'a mut Tensor>| tensor.map(|at| Ok(at.values_mut::<R>()?.chunks_mut(CHUNK))).transpose();
    let [mean, square] = update.means;
    let (mut means, mut squares, mut masters) = (chunks(mean)?, chunks(square)?, chunks(update.master)?);
    for (index, value) in update.value.floats_mut(OP)?.chunks(CHUNK).into_iter().enumerate() {
        let grad = grad.range(index * CHUNK..grad.len().min((index + 1) * CHUNK));
        let [mean, square, master] =
            [&mut means, &mut squares, &mut masters].map(|chunks| chunks.as_mut().and_then(Iterator::next));
        let mut chunk =
            Chunk { value, master, grad, mean: mean.unwrap_or_default(), square: square.unwrap_or_default(), factors };
        tasks.push(Box::new(move || chunk.step()));
    }
    Ok(())
}

/// Rule with its numbers in the state's type.
#[derive(Clone, Copy)]
enum RuleOf<R> {
    AdamW(Factors<R>),
    Sgd(Sgd<R>),
    Lion(Lion<R>),
}

/// Part of one parameter, updated by one task.
struct Chunk<'a, R> {
    value: FloatsMut<'a>,
    master: Option<&'a mut [R]>,
    grad: Floats<'a>,
    /// Running means, empty if the rule has none.
    mean: &'a mut [R],
    square: &'a mut [R],
    factors: RuleOf<R>,
}

impl<R: Real> Chunk<'_, R> {
    fn step(&mut self) {
        let Self { value, master, grad, mean, square, factors } = self;
        let (mut gradients, mut weights) = (Vec::new(), Vec::new());
        for tile in tiles(grad.len()) {
            let grad = grad.range(tile.clone()).to_slice(&mut gradients);
            let (mean, square) = (part(mean, &tile), part(square, &tile));
            let mut value = value.part(tile.clone());
            let mut step = |weights: &mut [R]| match *factors {
                RuleOf::AdamW(factors) => step_chunk(weights, grad, mean, square, factors),
                RuleOf::Sgd(factors) => sgd_chunk(weights, grad, mean, factors),
                RuleOf::Lion(factors) => lion_chunk(weights, grad, mean, factors),
            };
            if let Some(master) = master.as_mut().map(|master| &mut master[tile]) {
                // A value that differs from the rounded master was set elsewhere since, and takes precedence.
                value.replace_unless_rounded(master);
                step(master);
                value.write(master);
            } else if let Some(value) = value.direct_mut::<R>() {
                step(value);
            } else {
                weights.resize(grad.len(), R::ZERO);
                value.values().read(&mut weights);
                step(&mut weights);
                value.write(&weights);
            }
        }
    }
}

/// Returns a part of a running mean, which is empty if there is none.
fn part<'a, R>(mean: &'a mut [R], tile: &Range<usize>) -> &'a mut [R] {
    mean.get_mut(tile.clone()).unwrap_or_default()
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
    pub fn factors(self) -> [f64; 7] {
        let Factors { decay, mean, beta2, square, rate, correction, eps, .. } = Factors::<f64>::new(self);
        [decay, mean, beta2, square, rate, correction, eps]
    }
}

impl<A: Real> Factors<A> {
    fn new(settings: Settings) -> Self {
        let Settings { step, lr, beta1, beta2, eps, weight_decay, grad_scale } = settings;
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
/// The averages are uniquely owned and packed, f64 for f64 values and f32 otherwise; the values are packed. On a GPU
/// nothing changes if `grad_scale`, a scalar there, is NaN when the update runs.
pub(crate) fn average(
    averages: Vec<&mut Tensor>,
    values: &[Tensor],
    decay: f64,
    grad_scale: Option<&Tensor>,
) -> Result<()> {
    let pairs = averages.into_iter().zip(values);
    let (on_cpu, groups) = by_device(pairs, |(_, value)| (value.device().clone(), value.dtype()));
    for Group { gpu, key: dtype, items } in groups {
        let rows =
            items.into_iter().map(|(average, value)| Ok(([average.address_mut()?, value.address()?], value.numel())));
        let table = Table::new(gpu, &format!("ema {dtype}"), rows)?;
        gpu.kernel("ema_update", &[("DTYPE", dtype.name())])?
            .launch(table.grid(), args![&table.rows, grad_scale, table.tensors as u32, 1.0 - decay])?;
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
