//! Recorded graphs: a computation of fixed shapes, recorded once and replayed with one driver call.

use std::fmt;

use crate::{
    Device, Error, Param, ParamMap, Result, Tensor,
    autograd::{discrete, is_recording},
    collect::CollectVec,
    device::{Address, Gpu, Replay},
    error::ensure,
    shape::Layout,
};

/// Recorded computation on a GPU. Replaying it costs one launch instead of one per kernel.
///
/// The recording consists of kernels with the addresses and numbers of their arguments: shapes, scalars and control
/// flow are fixed; anything that changes between replays must be an input. [`Graph::replay`] copies inputs into place;
/// parameters are read in place, so an optimizer may update them between replays.
///
/// The graph keeps alive the memory of everything that its kernels read or write: tensors that the function captured, a
/// model that has been dropped, tensors that the function stores elsewhere. It does not share the tensors themselves,
/// so an optimizer or a cache may keep writing to them in place.
///
/// ```no_run
/// use x_transformers::{DType, Device, Graph, ParamMap, Tensor};
/// # fn main() -> x_transformers::Result<()> {
/// let gpu = Device::cuda(0)?;
/// let (x, w) = (Tensor::ones([64], DType::F32, &gpu)?, Tensor::full([64], 2.0, DType::F32, &gpu)?);
/// let mut graph = Graph::capture(&[x], &ParamMap::default(), move |inputs| inputs[0].mul(&w))?;
/// let y = graph.replay(&[Tensor::full([64], 3.0, DType::F32, &gpu)?])?;
/// assert_eq!(y.to_vec::<f32>()?, [6.0; 64]);
/// # Ok(())
/// # }
/// ```
#[doc(alias = "CUDAGraph")]
pub struct Graph<R> {
    recorded: Box<dyn Replay>,
    inputs: Vec<Tensor>,
    /// Address and layout of each parameter at the recording.
    params: Vec<(String, Place)>,
    map: ParamMap,
    output: R,
    device: &'static dyn Gpu,
}

impl<R> fmt::Debug for Graph<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Graph").field("device", &self.device).field("inputs", &self.inputs).finish_non_exhaustive()
    }
}

/// Function that is run and then recorded.
type Function<'f> = &'f mut dyn FnMut(bool) -> Result<()>;

/// Address and layout of a parameter.
pub(crate) type Place = (Address, Layout);

fn place(value: &Tensor) -> Result<Place> {
    Ok((value.storage_address()?, *value.layout()))
}

/// Returns the places of parameters, by name.
pub(crate) fn places(params: &ParamMap) -> Result<Vec<(String, Place)>> {
    params.iter().map(|(name, param)| Ok((name.to_string(), place(&param.tensor())?))).try_collect_vec()
}

impl<R> Graph<R> {
    /// Records `f`. It is called twice: once to compile kernels and to find out how much memory it needs, and once to
    /// be recorded, which computes nothing. It must not read values back. Meanwhile calls of other threads to the
    /// device return errors.
    ///
    /// `params`: the parameters that `f` reads. If one of them is replaced, a replay returns an error; anything else
    /// that `f` reads is the memory of the recording.
    ///
    /// Errors: inputs that are not on one GPU or require a gradient, a tape of this thread, another recording that has
    /// not ended, or an operation in `f` that a graph cannot record. The device stays usable, even if `f` panics.
    pub fn capture(inputs: &[Tensor], params: &ParamMap, f: impl Fn(&[Tensor]) -> Result<R>) -> Result<Self> {
        Self::capture_by(inputs, params, f, |device, f| device.record(f))
    }

    /// Records `f` like [`Graph::capture`], but the calls of other threads to the device wait for it.
    pub(crate) fn capture_patiently(
        inputs: &[Tensor],
        params: &ParamMap,
        f: impl Fn(&[Tensor]) -> Result<R>,
    ) -> Result<Self> {
        Self::capture_by(inputs, params, f, |device, f| device.record_patiently(f))
    }

    fn capture_by(
        inputs: &[Tensor],
        params: &ParamMap,
        f: impl Fn(&[Tensor]) -> Result<R>,
        record: fn(&'static dyn Gpu, Function) -> Result<Box<dyn Replay>>,
    ) -> Result<Self> {
        ensure!(
            !is_recording(),
            Error::argument(
                "graph",
                "a tape is recording on this thread, but gradients do not flow through a graph; record the graph \
                 before starting the tape, or start a tape inside the recorded function"
            )
        );
        let device = match inputs.first().map(Tensor::device) {
            Some(&Device::Gpu(device)) => device,
            _ => return Err(Error::argument("graph", "expected at least one input on a GPU")),
        };
        let here = Device::Gpu(device);
        if let Some(other) = inputs.iter().find(|input| *input.device() != here) {
            return Err(Error::argument(
                "graph",
                format_args!("expected all inputs on one device, got {here} and {}", other.device()),
            ));
        }
        discrete("graph", &inputs.iter().collect::<Vec<_>>())?;
        // Separate copies: a replay writes into them.
        let inputs = inputs.iter().map(Tensor::to_owned_copy).collect::<Result<Vec<_>>>()?;
        let (mut params_at, mut output) = (Vec::new(), None);
        let recorded = record(device, &mut |capturing| {
            let value = f(&inputs)?;
            let now = places(params)?;
            if capturing {
                if let Some((_, (name, _))) = now.iter().zip(&params_at).find(|(now, before)| now != before) {
                    return Err(Error::argument("graph", format_args!("`{name}` was replaced during the recording")));
                }
                output = Some(value);
            } else {
                params_at = now;
            }
            Ok(())
        })?;
        let output = output.ok_or_else(|| Error::argument("graph", "the device recorded nothing"))?;
        Ok(Self { recorded, inputs, params: params_at, map: params.clone(), output, device })
    }

    /// Copies new values into the inputs and enqueues the recorded computation. The output is the same memory each
    /// time: the next replay overwrites it.
    ///
    /// Errors: inputs of other shapes, dtypes or devices, a parameter that was replaced since the recording, a graph
    /// that is being recorded, or a driver error.
    pub fn replay(&mut self, inputs: &[Tensor]) -> Result<&R> {
        self.check(inputs)?;
        if let Some(name) = self.replaced()? {
            let message = format_args!("`{name}` was replaced since the recording; record again");
            return Err(Error::argument("graph", message));
        }
        self.enqueue(inputs)?;
        Ok(&self.output)
    }

    /// Replays a graph that writes its parameters, or returns `None` if one was replaced or another tensor shares it.
    ///
    /// The parameters are locked together and in the order of their identity, so that other threads see the weights of
    /// one step, and keep what they have read.
    pub(crate) fn replay_in_place(&mut self, inputs: &[Tensor]) -> Result<Option<&R>> {
        self.check(inputs)?;
        let mut locked = self.map.in_order_of_locks().map(|param| (param.leaf(), param.lock())).collect_vec();
        if locked.iter_mut().any(|(_, value)| !value.is_unique()) {
            return Ok(None);
        }
        for (name, recorded) in &self.params {
            let leaf = self.map.get(name).map(Param::leaf);
            let at = leaf.and_then(|leaf| locked.binary_search_by(|(of, _)| of.cmp(&leaf)).ok());
            if at.map(|at| place(&locked[at].1)).transpose()?.as_ref() != Some(recorded) {
                return Ok(None);
            }
        }
        self.enqueue(inputs)?;
        drop(locked);
        Ok(Some(&self.output))
    }

    /// Checks inputs of a replay.
    fn check(&self, inputs: &[Tensor]) -> Result<()> {
        self.device.refuse_while_capturing("a replay")?;
        if inputs.len() != self.inputs.len() {
            let (given, expected) = (inputs.len(), self.inputs.len());
            return Err(Error::argument("graph", format_args!("expected {expected} inputs as recorded, got {given}")));
        }
        discrete("graph", &inputs.iter().collect::<Vec<_>>())?;
        for (index, (to, from)) in self.inputs.iter().zip(inputs).enumerate() {
            if to.shape() != from.shape() || to.dtype() != from.dtype() || to.device() != from.device() {
                return Err(Error::argument(
                    "graph",
                    format_args!(
                        "input {index} is {:?} {} on {}, but was recorded as {:?} {} on {}",
                        from.shape(),
                        from.dtype(),
                        from.device(),
                        to.shape(),
                        to.dtype(),
                        to.device()
                    ),
                ));
            }
        }
        Ok(())
    }

    fn enqueue(&self, inputs: &[Tensor]) -> Result<()> {
        for (to, from) in self.inputs.iter().zip(inputs) {
            let from = from.detach().contiguous()?;
            self.device.copy(to.address()?, from.address()?, to.numel() * to.dtype().size())?;
        }
        self.recorded.replay()
    }

    /// Returns the name of a parameter that was replaced since the recording.
    pub(crate) fn replaced(&self) -> Result<Option<&str>> {
        for (name, recorded) in &self.params {
            if self.map.get(name).map(|param| place(&param.tensor())).transpose()?.as_ref() != Some(recorded) {
                return Ok(Some(name));
            }
        }
        Ok(None)
    }

    /// Returns the value that the recorded function returned. Before the first replay the contents of its tensors are
    /// undefined.
    pub fn output(&self) -> &R {
        &self.output
    }
}
