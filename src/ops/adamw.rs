//! What training does to all parameters at once: the norm of the gradients, the AdamW update, the moving average.
//!
//! Tensors are cut into chunks of a fixed size and every chunk of every tensor is a task of one parallel loop, or a block
//! of one launch, so that many small parameters keep all threads as busy as one large one. The cut depends on the sizes
//! alone: the results have the same bits for any number of threads.

use std::sync::Mutex;

use super::many::{Group, Table, by_device};
use crate::{
    DType, Error, Result, Tensor,
    core::{Float, Real, Shape, dispatch_float},
    device::{CudaDevice, Grid, args, cpu, simd::vectorized},
    error::ensure,
};

/// Elements of one task: enough to pay for handing it over, few enough to balance.
const CHUNK: usize = 16 * 1024;

/// Makes a tensor the packed and only owner of its values, so that it can be written in place.
pub(crate) fn own(tensor: &mut Tensor) -> Result<()> {
    if !tensor.is_unique() {
        *tensor = tensor.to_owned_copy()?;
    }
    Ok(())
}

/// The sum of the squares of each tensor, in f64. The tensors are packed. Those on a GPU cost one read-back per dtype.
pub(crate) fn square_norms(tensors: &[Tensor]) -> Result<Vec<f64>> {
    let mut sums = vec![0.0; tensors.len()];
    let indexed = tensors.iter().enumerate().filter(|(_, tensor)| tensor.elements() > 0);
    let (on_cpu, groups) = by_device(indexed, |(_, tensor)| (tensor.device().clone(), tensor.dtype()));
    for Group { gpu, key: dtype, items } in groups {
        let norms = square_norms_cuda(gpu, dtype, items.iter().map(|(_, tensor)| *tensor))?;
        for ((index, _), norm) in items.iter().zip(norms) {
            sums[*index] = norm;
        }
    }
    type Part<'a> = Box<dyn Fn() -> f64 + Send + Sync + 'a>;
    let mut parts: Vec<(usize, Part)> = Vec::new();
    for (index, tensor) in on_cpu {
        dispatch_float!("gradient_norm", tensor.dtype(), T, {
            for chunk in tensor.values::<T>()?.chunks(CHUNK) {
                parts.push((index, Box::new(move || square_norm::<T>(chunk))));
            }
            Ok(())
        })?;
    }
    let mut squares = vec![0.0; parts.len()];
    cpu::for_rows(&mut squares, 1, CHUNK, |first, squares| {
        for (square, (_, part)) in squares.iter_mut().zip(&parts[first..]) {
            *square = part();
        }
    });
    for ((index, _), square) in parts.iter().zip(squares) {
        sums[*index] += square;
    }
    Ok(sums)
}

/// The sums of tensors that all have elements.
fn square_norms_cuda<'a>(
    gpu: &'static CudaDevice,
    dtype: DType,
    tensors: impl Iterator<Item = &'a Tensor>,
) -> Result<Vec<f64>> {
    let rows = tensors.map(|tensor| Ok(([tensor.address()?], tensor.elements())));
    let table = Table::new(gpu, &format!("square_norm {dtype}"), rows)?;
    let uninit = |n: usize| Tensor::uninit(Shape::new(&[n])?, DType::F64, table.rows.device());
    let (mut partials, mut totals) = (uninit(table.chunks)?, uninit(table.tensors)?);
    let options = [("DTYPE", dtype.name())];
    gpu.kernel("square_norm_chunks", &options)?
        .launch(table.grid(), args![&mut partials, &table.rows, table.tensors as u32])?;
    gpu.kernel("square_norm_totals", &options)?
        .launch(Grid::new([table.tensors as u32, 1, 1], [256, 1, 1]), args![&mut totals, &partials, &table.rows])?;
    totals.to_vec::<f64>()
}

vectorized! {
    fn square_norm<T: Float>(x: &[T]) -> f64 {
        // Sixteen sums side by side: a fixed order of additions that every vector width can keep.
        let mut lanes = [0.0f64; 16];
        let blocks = x.chunks_exact(16);
        let rest = blocks.remainder();
        for block in blocks {
            for (sum, x) in lanes.iter_mut().zip(block) {
                let x = x.to_acc().to_f64();
                *sum += x * x;
            }
        }
        for (sum, x) in lanes.iter_mut().zip(rest) {
            let x = x.to_acc().to_f64();
            *sum += x * x;
        }
        lanes.iter().sum()
    }
}

/// One parameter of an AdamW step. All tensors are packed, of one shape, and the written ones uniquely owned.
pub(crate) struct Update<'a> {
    pub value: &'a mut Tensor,
    /// Of the parameter's dtype, or of the state's.
    pub grad: &'a Tensor,
    /// The running means of the gradient and of its square, f64 for an f64 parameter and f32 otherwise.
    pub exp_avg: &'a mut Tensor,
    pub exp_avg_sq: &'a mut Tensor,
    /// The parameter in f32, which the value of a half type is rounded from.
    pub master: Option<&'a mut Tensor>,
    /// Updates of this parameter including this one.
    pub step: u64,
}

/// What is the same for all parameters of an AdamW step.
#[derive(Clone, Copy)]
pub(crate) struct Settings {
    pub lr: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    pub weight_decay: f64,
    /// Gradients are multiplied by this first: clipping without a pass of its own.
    pub grad_scale: f64,
}

/// One AdamW step of all parameters.
///
/// Errors, before anything is changed: a gradient of a dtype that is neither the parameter's nor its state's, of another
/// shape or on another device.
pub(crate) fn adamw(updates: Vec<Update<'_>>, settings: Settings) -> Result<()> {
    for Update { value, grad, .. } in &updates {
        ensure!(
            value.shape() == grad.shape() && value.device() == grad.device(),
            Error::shape(
                "adamw",
                format!(
                    "the parameter is {:?} {}, its gradient {:?} {}",
                    value.shape(),
                    value.device(),
                    grad.shape(),
                    grad.device()
                )
            )
        );
        ensure!(
            [value.dtype(), value.dtype().accumulator()].contains(&grad.dtype()),
            Error::dtype("adamw", format!("the parameter is {}, its gradient {}", value.dtype(), grad.dtype()))
        );
    }
    let (on_cpu, groups) = by_device(updates, |update| {
        (update.value.device().clone(), (update.value.dtype(), update.grad.dtype(), update.step))
    });
    for (index, Group { gpu, key: (dtype, of_grad, step), items }) in groups.into_iter().enumerate() {
        adamw_cuda(gpu, &format!("adamw {index}"), [dtype, of_grad], items, Factors::<f64>::new(settings, step))?;
    }
    let mut tasks = Vec::new();
    for update in on_cpu {
        let (value, grad) = (&update.value, update.grad);
        dispatch_float!("adamw", value.dtype(), T, {
            if value.dtype() == grad.dtype() {
                cut::<T, T>(update, settings, &mut tasks)
            } else {
                cut::<T, <T as Float>::Acc>(update, settings, &mut tasks)
            }
        })?;
    }
    run(tasks);
    Ok(())
}

/// One step of parameters of one dtype that have had as many updates, in one launch.
fn adamw_cuda(
    gpu: &'static CudaDevice,
    name: &str,
    [dtype, of_grad]: [DType; 2],
    updates: Vec<Update<'_>>,
    factors: Factors<f64>,
) -> Result<()> {
    let rows = updates.into_iter().map(|update| {
        let master = update.master.map_or(Ok(0), Tensor::address_mut)?;
        let state = [update.exp_avg.address_mut()?, update.exp_avg_sq.address_mut()?];
        let (value, grad) = (update.value.address_mut()?, update.grad.address()?);
        Ok(([value, grad, state[0], state[1], master], update.grad.elements()))
    });
    let table = Table::new(gpu, name, rows)?;
    let Factors { grad_scale, decay, mean, beta2, square, rate, correction, eps } = factors;
    gpu.kernel("adamw_step", &[("DTYPE", dtype.name()), ("GRAD", of_grad.name())])?.launch(
        table.grid(),
        args![&table.rows, table.tensors as u32, grad_scale, decay, mean, beta2, square, rate, correction, eps],
    )
}

/// The work on one chunk.
type Task<'a> = Box<dyn FnMut() + Send + 'a>;

/// Does each task once, in parallel.
fn run(tasks: Vec<Task<'_>>) {
    // Never contended: the lock shows the compiler that one thread at a time has a task.
    let tasks: Vec<Mutex<Task>> = tasks.into_iter().map(Mutex::new).collect();
    cpu::for_tasks(tasks.len(), |index| {
        let mut task = tasks[index].lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        task();
    });
}

fn cut<'a, T: Float, G: Float<Acc = T::Acc>>(
    update: Update<'a>,
    settings: Settings,
    tasks: &mut Vec<Task<'a>>,
) -> Result<()> {
    let factors = Factors::<T::Acc>::new(settings, update.step);
    let chunks = update
        .value
        .values_mut::<T>()?
        .chunks_mut(CHUNK)
        .zip(update.grad.values::<G>()?.chunks(CHUNK))
        .zip(update.exp_avg.values_mut::<T::Acc>()?.chunks_mut(CHUNK))
        .zip(update.exp_avg_sq.values_mut::<T::Acc>()?.chunks_mut(CHUNK))
        .map(|(((value, grad), mean), square)| (value, grad, mean, square));
    match update.master {
        None => tasks.extend(chunks.map(|(value, grad, mean, square)| -> Task<'a> {
            Box::new(move || step_chunk::<T, G>(value, grad, mean, square, factors))
        })),
        Some(master) => {
            let master = master.values_mut::<T::Acc>()?.chunks_mut(CHUNK);
            tasks.extend(chunks.zip(master).map(|((value, grad, mean, square), master)| -> Task<'a> {
                Box::new(move || step_rounded::<T, G>(value, master, grad, mean, square, factors))
            }));
        }
    }
    Ok(())
}

/// The numbers of an AdamW step as the state's type, computed in f64 as PyTorch does.
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

    /// The new value of one weight; `mean` and `square` are its state.
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
    fn step_chunk<T: Float, G: Float<Acc = T::Acc>>(
        value: &mut [T],
        grad: &[G],
        mean: &mut [T::Acc],
        square: &mut [T::Acc],
        factors: Factors<T::Acc>,
    ) {
        for (((value, grad), mean), square) in value.iter_mut().zip(grad).zip(mean).zip(square) {
            *value = T::from_acc(factors.apply(value.to_acc(), grad.to_acc(), mean, square));
        }
    }
}

vectorized! {
    fn step_rounded<T: Float, G: Float<Acc = T::Acc>>(
        value: &mut [T],
        master: &mut [T::Acc],
        grad: &[G],
        mean: &mut [T::Acc],
        square: &mut [T::Acc],
        factors: Factors<T::Acc>,
    ) {
        for ((((value, master), grad), mean), square) in value.iter_mut().zip(master).zip(grad).zip(mean).zip(square) {
            // A value that is not the rounded master was set by someone else since, and counts.
            let weight = if T::from_acc(*master) == *value { *master } else { value.to_acc() };
            *master = factors.apply(weight, grad.to_acc(), mean, square);
            *value = T::from_acc(*master);
        }
    }
}

/// One step of the moving averages: `average += (1 − decay) · (value − average)`.
///
/// The averages are uniquely owned and packed, f64 for f64 values and f32 otherwise; the values are packed.
pub(crate) fn average(averages: Vec<&mut Tensor>, values: &[Tensor], decay: f64) -> Result<()> {
    let pairs = averages.into_iter().zip(values);
    let (on_cpu, groups) = by_device(pairs, |(_, value)| (value.device().clone(), value.dtype()));
    for Group { gpu, key: dtype, items } in groups {
        let rows = items
            .into_iter()
            .map(|(average, value)| Ok(([average.address_mut()?, value.address()?], value.elements())));
        let table = Table::new(gpu, &format!("ema {dtype}"), rows)?;
        gpu.kernel("ema_update", &[("DTYPE", dtype.name())])?
            .launch(table.grid(), args![&table.rows, table.tensors as u32, 1.0 - decay])?;
    }
    let mut tasks: Vec<Task> = Vec::new();
    for (average, value) in on_cpu {
        dispatch_float!("ema", value.dtype(), T, {
            let weight = <<T as Float>::Acc as Float>::from_f64(1.0 - decay);
            let chunks = average.values_mut::<<T as Float>::Acc>()?.chunks_mut(CHUNK);
            for (average, value) in chunks.zip(value.values::<T>()?.chunks(CHUNK)) {
                tasks.push(Box::new(move || average_chunk::<T>(average, value, weight)));
            }
            Ok(())
        })?;
    }
    run(tasks);
    Ok(())
}

vectorized! {
    fn average_chunk<T: Float>(average: &mut [T::Acc], value: &[T], weight: T::Acc) {
        for (average, value) in average.iter_mut().zip(value) {
            *average += weight * (value.to_acc() - *average);
        }
    }
}
