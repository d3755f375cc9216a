//! Training steps as one CUDA graph.

use std::{cell::RefCell, collections::BTreeMap};

use super::{AdamW, Optimizer, StepInfo, optimizer::check};
use crate::{DType, Device, Error, ErrorKind, Graph, ParamMap, Result, Tape, Tensor, error::ensure};

/// Training step as a CUDA graph: loss, gradients, clipping and AdamW, recorded once and replayed with one driver call.
///
/// The numbers that change from step to step lie in a small buffer on the device, which [`RecordedStep::step`] fills
/// before the replay: the learning rate, the factors that follow from the number of the step, and the scale of the
/// loss. The weights are those of [`AdamW`]'s own step to the bit, if all parameters have one dtype.
///
/// Weights and state are updated in place: a step is an error while another tensor shares them, for instance one from
/// [`ParamMap::state_dict`].
pub struct RecordedStep {
    graph: Graph<Recorded>,
    params: ParamMap,
    optimizer: AdamW,
    clip: Option<f64>,
}

/// Results of a recorded step, on the device.
struct Recorded {
    loss: Tensor,
    /// Norm of the gradients, and their factor.
    norm: Tensor,
    /// Names of the parameters that have gradients.
    names: Vec<String>,
}

/// Outcome of a recorded step.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct RecordedInfo {
    /// Loss on the device, not read back; the next step overwrites it.
    pub loss: Tensor,
    /// Norm of the gradients and number of updated parameters.
    pub info: StepInfo,
}

impl std::fmt::Debug for RecordedStep {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RecordedStep").field("graph", &self.graph).field("clip", &self.clip).finish_non_exhaustive()
    }
}

impl RecordedStep {
    /// Records the step that begins with `loss`, a function of the inputs and the parameters, which is called three
    /// times. Recording changes no weight.
    ///
    /// `inputs`: packed tensors on one GPU, with the shapes of all later ones. `clip`: as in [`Optimizer::step`].
    ///
    /// Errors: dropout, whose masks a graph would repeat; a loss of more than one element; gradients of several dtypes;
    /// and those of [`Graph::capture`].
    pub fn new(
        optimizer: AdamW,
        params: &ParamMap,
        inputs: &[Tensor],
        clip: Option<f64>,
        loss: impl Fn(&[Tensor]) -> Result<Tensor>,
    ) -> Result<Self> {
        check(0.0, clip)?;
        let device = inputs.first().map_or(Device::Cpu, |input| input.device().clone());
        ensure!(device != Device::Cpu, Error::argument("graph", "expected at least one input on a GPU"));
        let optimizer = RefCell::new(optimizer);
        let factors = optimizer.borrow().engine.factors(params, 0.0, 0);
        // NaN: the run before the recording computes everything and updates nothing.
        let numbers = numbers(&[f64::NAN, 1.0], &factors, &device)?;
        let scale = Tensor::full([1], 1.0, DType::F64, &device)?;
        let all: Vec<Tensor> = inputs.iter().cloned().chain(numbers).chain([scale]).collect();
        let count = inputs.len();
        let record = |all: &[Tensor]| {
            let (inputs, [given, factors, scale]) = (&all[..count], [&all[count], &all[count + 1], &all[count + 2]]);
            // A training tape: dropout is an error instead of being omitted.
            let mut tape = Tape::train(0);
            let loss = loss(inputs)?;
            ensure!(loss.numel() == 1, Error::new(ErrorKind::NotScalar { shape: loss.shape().to_vec() }));
            let grads = tape.backward_with(&loss, &scale.to_dtype(loss.dtype())?.reshape(*loss.shape())?)?;
            let (norm, names) = optimizer.borrow_mut().engine.record(params, &grads, given, factors, true)?;
            Ok(Recorded { loss: loss.detach(), norm, names })
        };
        // Creates the optimizer's state, which must not lie in memory that the graph reuses.
        drop(record(&all)?);
        let graph = Graph::capture(&all, params, record)?;
        Ok(Self { graph, params: params.clone(), optimizer: optimizer.into_inner(), clip })
    }

    /// Runs one step with this learning rate.
    ///
    /// `scale` multiplies the loss before the backward pass and divides the gradients after it; 1 except for f16
    /// ([`super::GradScaler`]).
    ///
    /// Errors, with nothing changed: a rate that is negative or not finite, a scale that is not positive, inputs other
    /// than those of the recording, weights or a state that other tensors share, and [`ErrorKind::NonFinite`] for
    /// gradients with NaN or infinity.
    pub fn step(&mut self, inputs: &[Tensor], lr: f64, scale: f64) -> Result<RecordedInfo> {
        check(lr, self.clip)?;
        ensure!(
            scale > 0.0 && scale.is_finite(),
            Error::argument("scale", format_args!("expected a finite number above 0, got {scale}"))
        );
        for (name, param) in self.params.unique() {
            ensure!(
                param.lock().is_unique(),
                Error::argument(
                    "graph",
                    format_args!(
                        "another tensor shares the storage of `{name}`, which the step overwrites; drop or copy that \
                         tensor"
                    )
                )
            );
        }
        ensure!(
            self.optimizer.engine.is_unique(),
            Error::argument(
                "graph",
                "another tensor shares the optimizer's state, which the step overwrites; drop or copy that tensor"
            )
        );
        let device = self.graph.output().norm.device().clone();
        let given = [1.0 / scale, self.clip.unwrap_or(f64::INFINITY)];
        let numbers = numbers(&given, &self.optimizer.engine.factors(&self.params, lr, 0), &device)?;
        let scale = Tensor::full([1], scale, DType::F64, &device)?;
        let all: Vec<Tensor> = inputs.iter().cloned().chain(numbers).chain([scale]).collect();
        let Recorded { loss, norm, names } = self.graph.replay(&all)?;
        let grad_norm = norm.to_vec::<f64>()?[0];
        ensure!(
            grad_norm.is_finite(),
            Error::new(ErrorKind::NonFinite { step: self.optimizer.steps(), what: "gradient norm".to_string() })
        );
        let info = StepInfo { grad_norm, updated: names.len() };
        self.optimizer.engine.advance(names.iter().map(String::as_str));
        Ok(RecordedInfo { loss: loss.clone(), info })
    }

    /// Returns the number of steps so far, including those before the recording.
    pub fn steps(&self) -> u64 {
        self.optimizer.steps()
    }

    /// Returns a copy of the optimizer's state, as [`Optimizer::state_dict`] does.
    pub fn state_dict(&self) -> Result<BTreeMap<String, Tensor>> {
        let copy = |(name, tensor): (String, Tensor)| Ok((name, tensor.to_owned_copy()?));
        self.optimizer.state_dict()?.into_iter().map(copy).collect()
    }

    /// Returns the optimizer, to continue without the graph.
    pub fn into_optimizer(self) -> AdamW {
        self.optimizer
    }
}

/// Returns the scale and the clip, `[2]`, and the factors of each parameter, `[parameters, 7]`, on the device.
fn numbers(given: &[f64; 2], factors: &[f64], device: &Device) -> Result<[Tensor; 2]> {
    Ok([Tensor::from_slice(given, [2], device)?, Tensor::from_slice(factors, [factors.len() / 7, 7], device)?])
}
