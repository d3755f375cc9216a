//! Steps as one recorded graph: losses, gradients, clipping, AdamW and the moving average, with everything that changes
//! from step to step in device memory: the batches, the seeds of dropout, the learning rate, the scale of the loss.
//!
//! A step is enqueued on the assumption that the one before it was finite. If it was not, neither of them changes
//! anything: its norm, which is NaN or infinite, is an input of the next one and makes that one's NaN too. The trainer finds
//! out when it reads the report, and runs the step again without a graph, which says what is wrong or backs off the scale.

use std::{cell::RefCell, sync::Arc};

use super::{
    Trainer,
    ranks::Part,
    step::{loss, widen},
};
use crate::{
    DType, Device, Error, Gradients, Graph, Result, Shape, Tape, Tensor,
    collect::CollectVec,
    device::{Gpu, ReadBack},
    graph::{Place, places},
    profile,
    train::{Batch, StepReport, TrainModel, TrainOptions, random::tape_seed},
};

/// Number of recordings after which a run goes on without: something replaces or shares the weights again and again.
const MOST: u32 = 4;

/// Graph of a trainer's steps, if there is one.
pub(super) struct Graphs {
    allowed: bool,
    recorded: Option<Recorded>,
    /// Number of recordings so far.
    recordings: u32,
    /// Shapes of the last step that could have been recorded.
    last: Option<Shapes>,
    reasons: Vec<String>,
}

/// Shapes and types of the tensors of a step's batches.
type Shapes = Vec<(Shape, DType)>;

struct Recorded {
    graph: Graph<Output>,
    shapes: Shapes,
    others: Others,
}

/// Values that a step reads beside the trained parameters, and which of these have a gradient.
#[derive(PartialEq)]
struct Others {
    frozen: Vec<(String, Place)>,
    requires_grad: Vec<bool>,
}

/// Results of a step, on the device.
struct Output {
    /// Losses of the micro-batches and the norm of the gradients, `[micros + 1]` F64.
    report: Tensor,
    /// Norm of the gradients and their factor, `[2]` F64.
    norm: Tensor,
    /// Names of the parameters that have gradients.
    names: Arc<Vec<String>>,
}

impl Default for Graphs {
    fn default() -> Self {
        Self { allowed: true, recorded: None, recordings: 0, last: None, reasons: Vec::new() }
    }
}

impl Graphs {
    pub fn allow(&mut self, allowed: bool) {
        *self = Self { allowed, reasons: std::mem::take(&mut self.reasons), ..Self::default() };
    }

    pub fn has_one(&self) -> bool {
        self.recorded.is_some()
    }

    pub fn reasons(&self) -> &[String] {
        &self.reasons
    }

    /// Notes why a step is eager, unless the same was noted before.
    fn note(&mut self, reason: impl Into<String>) {
        let reason = reason.into();
        if !self.reasons.contains(&reason) {
            self.reasons.push(reason);
        }
    }

    /// Notes why all further steps are eager.
    fn end(&mut self, reason: String) {
        self.allow(false);
        self.note(reason);
    }
}

/// Step that was enqueued, and whose report was not read yet.
pub(super) struct Pending<B> {
    lr: f64,
    /// Its batches, for a step that runs again.
    batches: Vec<B>,
    /// Weight and number of targets of each micro-batch.
    micros: Vec<(f64, u64)>,
    /// Names of the parameters that it updates.
    names: Arc<Vec<String>>,
    report: Box<dyn ReadBack>,
}

/// Outcome of [`Trainer::enqueue`].
pub(super) enum Enqueued<B> {
    Replayed(Pending<B>),
    /// The caller runs it, with these batches if there are any.
    Eager(Vec<B>),
}

impl<B> Enqueued<B> {
    /// Returns the batches of the step.
    pub fn into_batches(self) -> Vec<B> {
        match self {
            Self::Replayed(Pending { batches, .. }) | Self::Eager(batches) => batches,
        }
    }
}

/// Outcome of [`Trainer::settle`].
pub(super) enum Settled<B> {
    Done(StepReport),
    /// The loss or the gradients are not finite: nothing has changed, and the caller runs the step with these batches.
    Again(Vec<B>),
}

impl<M: TrainModel> Trainer<M> {
    /// Enqueues the step after those that are done and the one that is pending, if it can be replayed. `ready`: its
    /// batches on the device, or none, which are then built.
    pub(super) fn enqueue(
        &mut self,
        before: Option<&Pending<M::Batch>>,
        ready: Vec<M::Batch>,
    ) -> Result<Enqueued<M::Batch>> {
        let (Device::Gpu(gpu), true) = (self.device.clone(), self.graphs.allowed) else {
            return Ok(Enqueued::Eager(ready));
        };
        let refused = if self.ranks.exchanges() {
            "several ranks train together"
        } else if self.optimizer.as_adamw().is_none() {
            "only those of AdamW are recorded"
        } else {
            ""
        };
        if !refused.is_empty() {
            self.graphs.end(format!("steps run without a graph: {refused}"));
            return Ok(Enqueued::Eager(ready));
        }
        if profile::active() {
            return Ok(Enqueued::Eager(ready));
        }
        let step = self.step + u64::from(before.is_some());
        let micros = 0..self.options.accumulate as u64;
        let batches = match ready.is_empty() {
            true => micros.map(|micro| self.batch(step, micro)?.to_device(&self.device)).try_collect_vec()?,
            false => ready,
        };
        self.replay(step, before, batches, gpu)
    }

    /// Replays a step with these batches, or returns them if it must run eagerly. The graph is recorded first if there is
    /// none.
    fn replay(
        &mut self,
        step: u64,
        before: Option<&Pending<M::Batch>>,
        mut batches: Vec<M::Batch>,
        gpu: &'static dyn Gpu,
    ) -> Result<Enqueued<M::Batch>> {
        let Some(mut inputs) = tensors(&mut batches) else {
            self.graphs.end("steps run without a graph: the type of the batches does not support it".to_string());
            return Ok(Enqueued::Eager(batches));
        };
        let &TrainOptions { batch_size, seed, clip, .. } = &self.options;
        let micros = batches.iter().map(|batch| (batch.weight() / batch_size as f64, batch.targets())).collect_vec();
        if micros.iter().any(|(weight, _)| *weight == 0.0) {
            self.graphs.note("steps with a batch of which no target counts run without the graph");
            return Ok(Enqueued::Eager(batches));
        }
        let shapes = inputs.iter().map(|input| (*input.shape(), input.dtype())).collect_vec();
        let again = self.graphs.last.replace(shapes.clone()).is_some_and(|last| last == shapes);
        if !self.may_write()? {
            return Ok(Enqueued::Eager(batches));
        }
        match &self.graphs.recorded {
            Some(recorded) if recorded.shapes != shapes => {
                self.graphs.note("steps whose batches have other shapes than the recorded ones run without the graph");
                return Ok(Enqueued::Eager(batches));
            }
            Some(_) => {}
            // The first steps compile kernels and create the optimizer's state.
            None if !again || self.optimizer.steps() == 0 => return Ok(Enqueued::Eager(batches)),
            None => {
                if let Err(error) = self.record(&mut batches, &inputs, shapes) {
                    self.graphs.end(format!("steps run without a graph: {error}"));
                    return Ok(Enqueued::Eager(batches));
                }
            }
        }
        let ahead = u64::from(before.is_some());
        let mut scaler = self.scaler;
        scaler.iter_mut().for_each(|scaler| (0..ahead).for_each(|_| scaler.update(true)));
        let scale = scaler.map_or(1.0, |scaler| scaler.scale());
        let weight = micros.iter().fold(0.0, |sum, (weight, _)| sum + weight);
        let lr = self.options.schedule().at(step);
        let device = Device::Gpu(gpu);
        let (Some(recorded), Some(optimizer)) = (&mut self.graphs.recorded, self.optimizer.as_adamw()) else {
            return Ok(Enqueued::Eager(batches));
        };
        let seeds = (0..micros.len() as u64).map(|micro| tape_seed(seed, step, micro) as i64).collect_vec();
        inputs.push(Tensor::from_vec(seeds, [micros.len()], &device)?);
        let mut numbers = vec![1.0 / weight / scale, clip];
        numbers.extend(micros.iter().map(|(weight, _)| scale * weight));
        let count = numbers.len();
        inputs.push(Tensor::from_vec(numbers, [count], &device)?);
        let factors = optimizer.engine.factors(&self.params, lr, ahead);
        let count = factors.len() / 7;
        inputs.push(Tensor::from_vec(factors, [count, 7], &device)?);
        // The norm of the step that is pending, which must be finite.
        inputs.push(match before {
            Some(_) => recorded.graph.output().norm.clone(),
            None => Tensor::zeros([2], DType::F64, &device)?,
        });
        let Some(Output { report, names, .. }) = recorded.graph.replay_in_place(&inputs)? else {
            // Another thread has read or replaced a weight just now.
            self.may_write()?;
            return Ok(Enqueued::Eager(batches));
        };
        let report = gpu.read_back_later(report.address()?, report.numel() * 8)?;
        Ok(Enqueued::Replayed(Pending { lr, batches, micros, names: names.clone(), report }))
    }

    /// Returns what a step reads beside the trained parameters.
    fn others(&self) -> Result<Others> {
        let requires_grad = self.params.unique().map(|(_, param)| param.requires_grad()).collect_vec();
        Ok(Others { frozen: places(&self.model.frozen_params())?, requires_grad })
    }

    /// Drops the graph if an eager step would give what it writes another place: something shares that.
    pub(super) fn release_shared(&mut self) -> Result<()> {
        if self.graphs.has_one() { self.may_write().map(drop) } else { Ok(()) }
    }

    /// Drops the graph and its memory for good, if there is one. Returns `true` if there was.
    pub(super) fn free_graph(&mut self) -> bool {
        let had = self.graphs.has_one();
        if had {
            self.graphs.end("steps run without a graph: the memory that it keeps was needed".to_string());
        }
        had
    }

    /// Returns `true` if nothing shares what a graph writes in place; drops a graph whose parameters were replaced.
    fn may_write(&mut self) -> Result<bool> {
        let replaced = match &self.graphs.recorded {
            Some(recorded) => recorded.graph.replaced()?.is_some() || recorded.others != self.others()?,
            None => false,
        };
        let shared = self.params.unique().any(|(_, param)| !param.lock().is_unique())
            || self.optimizer.as_adamw().is_none_or(|optimizer| !optimizer.engine.is_unique())
            || self.ema.as_mut().is_some_and(|ema| !ema.is_unique());
        if replaced || shared {
            self.graphs.recorded = None;
            self.graphs.note(
                "steps run without the graph, which is then recorded again, after weights were replaced, frozen or thawed, \
                 or while another tensor shares them",
            );
            if self.graphs.recordings >= MOST {
                self.graphs.end(format!("steps run without a graph after {MOST} recordings"));
            }
        }
        Ok(!replaced && !shared)
    }

    /// Records the step of these batches.
    fn record(&mut self, batches: &mut [M::Batch], inputs: &[Tensor], shapes: Shapes) -> Result<()> {
        let others = self.others()?;
        let Self { model, params, optimizer, ema, options, device, graphs, .. } = self;
        let Some(optimizer) = optimizer.as_adamw() else { return Ok(()) };
        graphs.recordings += 1;
        let (micros, count, recompute) = (batches.len(), inputs.len(), options.recompute);
        let factors = optimizer.engine.factors(params, 0.0, 0);
        let rows = factors.len() / 7;
        let mut all = inputs.to_vec();
        all.push(Tensor::zeros([micros], DType::I64, device)?);
        // NaN: the run before the recording updates nothing.
        all.push(Tensor::full([2 + micros], f64::NAN, DType::F64, device)?);
        all.push(Tensor::from_vec(factors, [rows, 7], device)?);
        all.push(Tensor::zeros([2], DType::F64, device)?);
        let state = RefCell::new((&mut *batches, &mut optimizer.engine, ema));
        let recorded = Graph::capture_patiently(&all, params, |all| {
            let mut state = state.borrow_mut();
            let (batches, engine, ema) = &mut *state;
            let [seeds, numbers, factors, before] = &all[count..] else {
                return Err(Error::argument("graph", "expected four inputs after the batches"));
            };
            replace(batches, &all[..count]);
            let (mut grads, mut losses) = (Gradients::default(), Vec::new());
            for (micro, batch) in batches.iter().enumerate() {
                let mut tape = Tape::recorded(&seeds.narrow(0, micro, 1)?);
                let output = loss(&*model, batch, recompute)?;
                if let Some(op) = tape.drew_on_host() {
                    let message = format_args!("`{op}` draws numbers on the host, which each replay would repeat");
                    return Err(Error::argument("graph", message));
                }
                let start = numbers.narrow(0, 2 + micro, 1)?.to_dtype(output.dtype())?.reshape(*output.shape())?;
                let mut part = tape.backward_with(&output, &start)?;
                if micros > 1 {
                    widen(&mut part)?;
                }
                grads.accumulate(part)?;
                losses.push(output.detach().to_dtype(DType::F64)?.reshape([1])?);
            }
            let given = numbers.narrow(0, 0, 2)?.add(&doubt(&losses, before)?)?;
            let (norm, names) = engine.record(params, &grads, &given, factors, false)?;
            if let Some(ema) = ema.as_mut() {
                ema.update_unless_nan(params, Some(&norm.narrow(0, 1, 1)?))?;
            }
            let norm_of_all = norm.narrow(0, 0, 1)?;
            let parts = losses.iter().chain([&norm_of_all]).collect_vec();
            Ok(Output { report: Tensor::cat(&parts, 0)?, norm, names: Arc::new(names) })
        });
        replace(batches, inputs);
        graphs.recorded = Some(Recorded { graph: recorded?, shapes, others });
        Ok(())
    }

    /// Waits for a pending step and counts it, unless its loss or gradients are not finite.
    ///
    /// Errors: those that its kernels have reported, with nothing changed; or those of another thread, after it is counted.
    pub(super) fn settle(&mut self, pending: Pending<M::Batch>) -> Result<Settled<M::Batch>> {
        let Pending { lr, batches, micros, names, report } = pending;
        let (bytes, faults) = report.wait()?;
        let values = bytes.as_chunks::<8>().0.iter().map(|bytes| f64::from_le_bytes(*bytes)).collect_vec();
        let Some((&norm, losses)) = values.split_last() else { return Ok(Settled::Again(batches)) };
        let weighted = |(loss, &(weight, targets)): (&f64, &(f64, u64))| [loss * weight, weight, targets as f64];
        let part = Part::of(&losses.iter().zip(&micros).map(weighted).collect_vec());
        if !(norm.is_finite() && (part.loss * (1.0 / part.weight)).is_finite()) {
            faults?;
            self.graphs.note("steps with NaN or infinity run again without the graph");
            return Ok(Settled::Again(batches));
        }
        if let Some(optimizer) = self.optimizer.as_adamw() {
            optimizer.engine.advance(names.iter().map(String::as_str));
        }
        self.scaler.iter_mut().for_each(|scaler| scaler.update(true));
        let report = self.count(part, Some(norm), lr);
        // A fault that was reported after the step had checked for some.
        faults.map(|()| Settled::Done(report))
    }
}

/// Returns 0, or NaN if a loss is not finite, if the norm of the step before is not, or if a kernel has reported a fault:
/// `[1]` F64.
fn doubt(losses: &[Tensor], before: &Tensor) -> Result<Tensor> {
    let mut fault = Tensor::zeros([3], DType::I64, before.device())?;
    if let Device::Gpu(gpu) = before.device()
        && !gpu.faults().is_null()
    {
        gpu.copy(fault.address_mut()?, gpu.faults(), 3 * 8)?;
    }
    // Infinite unless the code is 0.
    let fault = fault.narrow(0, 0, 1)?.to_dtype(DType::F64)?.affine(1e308, 0.0)?.affine(1e308, 0.0)?;
    let before = before.narrow(0, 0, 1)?;
    let all = losses.iter().chain([&before, &fault]).collect_vec();
    Tensor::cat(&all, 0)?.affine(0.0, 0.0)?.sum(&[0])?.reshape([1])
}

/// Returns the tensors of batches, or `None` if losses depend on more.
fn tensors<B: Batch>(batches: &mut [B]) -> Option<Vec<Tensor>> {
    let mut tensors = Vec::new();
    let whole = batches.iter_mut().all(|batch| batch.visit_tensors(&mut |tensor| tensors.push(tensor.clone())));
    whole.then_some(tensors)
}

/// Replaces the tensors of batches by these, in the order of [`tensors`].
fn replace<B: Batch>(batches: &mut [B], tensors: &[Tensor]) {
    let mut tensors = tensors.iter();
    for batch in batches {
        batch.visit_tensors(&mut |tensor| {
            if let Some(next) = tensors.next() {
                *tensor = next.clone();
            }
        });
    }
}
