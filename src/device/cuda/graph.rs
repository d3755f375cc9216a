//! CUDA graphs: a computation of fixed shapes, recorded once and replayed with one call of the driver.

use std::{
    fmt,
    sync::{Arc, atomic::Ordering},
};

use cudarc::driver::{result, sys};

use super::{
    CudaDevice, error,
    memory::{Block, CudaBuffer},
    pool::Source,
    tables::GraphTables,
};
use crate::{
    Device, Error, ParamMap, Result, Tensor,
    autograd::{discrete, is_recording},
    error::ensure,
    shape::Layout,
};

/// A recorded computation on a GPU. Replaying it costs one launch instead of one per kernel.
///
/// The recording consists of kernels, with the addresses and numbers that they were given: shapes, scalars and the path
/// through the program are those of the recording; what is to change from replay to replay must be an input. Inputs are
/// copied into place by [`Graph::replay`]; parameters are read where they are, so that an optimizer may update them
/// between replays.
///
/// The graph keeps the memory of everything that its kernels read or write for as long as it lives: of tensors that the
/// function captured, of a model that is dropped, of tensors that the function stores elsewhere. It does not share the
/// tensors themselves, so that an optimizer or a cache may go on writing to them in place.
///
/// ```no_run
/// use x_transformers::{DType, Device, ParamMap, Tensor, device::cuda::Graph};
/// # fn main() -> x_transformers::Result<()> {
/// let gpu = Device::cuda(0)?;
/// let (x, w) = (Tensor::ones([64], DType::F32, &gpu)?, Tensor::full([64], 2.0, DType::F32, &gpu)?);
/// let mut graph = Graph::capture(&[x], &ParamMap::default(), move |inputs| inputs[0].mul(&w))?;
/// let y = graph.replay(&[Tensor::full([64], 3.0, DType::F32, &gpu)?])?;
/// assert_eq!(y.to_vec::<f32>()?, [6.0; 64]);
/// # Ok(())
/// # }
/// ```
pub struct Graph<R> {
    executable: Executable,
    inputs: Vec<Tensor>,
    /// Where each parameter was, and how it lay there.
    params: Vec<(String, (u64, Layout))>,
    map: ParamMap,
    output: R,
    /// Tables of addresses that the recorded kernels read.
    _tables: Vec<Tensor>,
    device: &'static CudaDevice,
}

impl<R> fmt::Debug for Graph<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Graph").field("device", &self.device).field("inputs", &self.inputs).finish_non_exhaustive()
    }
}

/// A graph that can be launched, and the memory that its work uses.
struct Executable {
    handle: sys::CUgraphExec,
    blocks: Vec<Arc<Block>>,
    device: &'static CudaDevice,
}

impl Drop for Executable {
    fn drop(&mut self) {
        self.device.discard(ToDestroy { handle: self.handle, device: self.device });
        // A replay may still be at work; what is enqueued for the next owners of its memory comes after it.
        self.blocks.drain(..).for_each(|block| self.device.pool.give(block));
    }
}

struct ToDestroy {
    handle: sys::CUgraphExec,
    device: &'static CudaDevice,
}

// SAFETY: nobody else has the handle, and any thread may destroy it.
unsafe impl Send for ToDestroy {}

impl Drop for ToDestroy {
    fn drop(&mut self) {
        let _ = self.device.bind();
        // SAFETY: the stream lives as long as the device. Waits for the last replay, and leaves faults of kernels to the
        // next read-back. An error leaves nothing to do.
        let _ = unsafe { result::stream::synchronize(self.device.stream.0) };
        // SAFETY: instantiated in `capture`, not used again. `discard` calls this outside of captures.
        let _ = unsafe { result::graph::exec_destroy(self.handle) };
    }
}

/// A captured graph, until it is instantiated.
struct Captured(sys::CUgraph);

impl Drop for Captured {
    fn drop(&mut self) {
        if !self.0.is_null() {
            // SAFETY: the driver made it for us, and what is instantiated does not need it any more.
            let _ = unsafe { result::graph::destroy(self.0) };
        }
    }
}

/// A recording that ends, whatever happens in the recorded function: without [`Recording::finish`] everything is as
/// before it.
struct Recording {
    device: &'static CudaDevice,
    open: bool,
}

impl Recording {
    /// Tensors still lie in common memory.
    fn begin(device: &'static CudaDevice) -> Result<Self> {
        device.begin_recording()?;
        *device.graph_tables() = GraphTables::default();
        Ok(Self { device, open: true })
    }

    /// Runs what will be recorded, in memory of its own, and provides what the recording needs beyond what is free by
    /// then: as much as the tensors have that the function stored elsewhere.
    fn warm<R>(&self, f: impl FnOnce() -> Result<R>) -> Result<()> {
        self.device.pool.record();
        drop(f()?);
        self.device.synchronize()?;
        let pool = &self.device.pool;
        pool.set_source(Source::Fresh);
        // The recording may do without what cannot be had; if not, it says so.
        let spare = pool.escaped().into_iter().filter_map(|bytes| CudaBuffer::new(bytes, self.device).ok());
        drop(spare.collect::<Vec<_>>());
        pool.set_source(Source::Freed);
        Ok(())
    }

    /// Captures what `f` enqueues.
    fn capture<R>(&self, f: impl FnOnce() -> Result<R>) -> Result<(Captured, R)> {
        let device = self.device;
        device.bind()?;
        let mode = sys::CUstreamCaptureMode_enum::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        device.gate.switch(|| {
            // SAFETY: the stream lives as long as the device, and no other thread is about to use it.
            let begun = unsafe { result::stream::begin_capture(device.stream.0, mode) };
            (begun.is_ok(), device.check("cuStreamBeginCapture", begun))
        })?;
        let output = f();
        // Ended in any case, or the stream would stay in capture.
        let captured = self.end_capture();
        let (output, captured) = (output?, captured?);
        if captured.0.is_null() {
            return Err(error("the driver gave no graph".into()));
        }
        Ok((captured, output))
    }

    fn end_capture(&self) -> Result<Captured> {
        let device = self.device;
        device.gate.switch(|| {
            // SAFETY: the stream lives as long as the device; this thread has begun the capture.
            let graph = unsafe { result::stream::end_capture(device.stream.0) };
            (false, device.check("cuStreamEndCapture", graph).map(Captured))
        })
    }

    /// Makes the graph, which has all memory that its work uses, and its tables with what belongs in them.
    fn finish(mut self, captured: Captured) -> Result<(Executable, Vec<Tensor>)> {
        let device = self.device;
        let flags = sys::CUgraphInstantiate_flags(0);
        // SAFETY: the graph was captured and is alive.
        let handle = unsafe { result::graph::instantiate(captured.0, flags) };
        let handle = device.check("cuGraphInstantiate", handle)?;
        self.open = false;
        let executable = Executable { handle, blocks: device.pool.finish(), device };
        let tables = std::mem::take(&mut *device.graph_tables()).made;
        let fill = |(mut table, values): (Tensor, Vec<i64>)| {
            device.upload(table.address_mut()?, bytemuck::cast_slice(&values)).map(|()| table)
        };
        Ok((executable, tables.into_iter().map(fill).collect::<Result<_>>()?))
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        if self.device.is_capturing() {
            // The recorded function panicked.
            drop(self.end_capture());
        }
        if self.open {
            *self.device.graph_tables() = GraphTables::default();
            self.device.pool.abandon();
        }
        self.device.end_recording();
    }
}

/// Where a parameter is, and how it lies there.
fn place(param: &crate::Param) -> Result<(u64, Layout)> {
    let value = param.tensor();
    Ok((value.storage_address()?, *value.layout()))
}

impl<R> Graph<R> {
    /// Records `f`. It is called twice: once to compile kernels and to find out what memory it needs, once to be
    /// recorded, which computes nothing. It must not read values back. Meanwhile other threads cannot use the device:
    /// their calls are errors.
    ///
    /// `params`: the parameters that `f` reads. If one of these is replaced, a replay is an error; what `f` reads
    /// besides them is what was there at the recording.
    ///
    /// Errors: inputs that are not on one GPU or require a gradient, a tape of this thread, another recording that has not
    /// ended, or whatever `f` does that a graph cannot hold. The device is as usable as before, also if `f` panics.
    pub fn capture(inputs: &[Tensor], params: &ParamMap, f: impl Fn(&[Tensor]) -> Result<R>) -> Result<Self> {
        ensure!(
            !is_recording(),
            Error::argument(
                "graph",
                "a tape of this thread records, but gradients do not flow through a graph; record the graph before the \
                 tape begins, or let the recorded function begin one of its own"
            )
        );
        let device = match inputs.first().map(Tensor::device) {
            Some(&Device::Cuda(device)) => device,
            _ => return Err(Error::argument("graph", "expected at least one input, on a GPU")),
        };
        if let Some(other) = inputs.iter().find(|input| *input.device() != Device::Cuda(device)) {
            return Err(Error::argument(
                "graph",
                format!("inputs are on cuda:{} and {}", device.ordinal, other.device()),
            ));
        }
        discrete("graph", &inputs.iter().collect::<Vec<_>>())?;
        let recording = Recording::begin(device)?;
        // Copies of their own: a replay writes into them.
        let inputs = inputs.iter().map(Tensor::to_owned_copy).collect::<Result<Vec<_>>>()?;
        recording.warm(|| f(&inputs))?;
        let place = |(name, param): (&str, &crate::Param)| Ok((name.to_string(), place(param)?));
        let params_at = params.iter().map(place).collect::<Result<Vec<_>>>()?;
        let (captured, output) = recording.capture(|| f(&inputs))?;
        for (now, recorded) in params.iter().map(place).zip(&params_at) {
            if now? != *recorded {
                return Err(Error::argument("graph", format!("`{}` was replaced during the recording", recorded.0)));
            }
        }
        let (executable, tables) = recording.finish(captured)?;
        Ok(Self { executable, inputs, params: params_at, map: params.clone(), output, _tables: tables, device })
    }

    /// Copies new values into the inputs and enqueues the recorded computation. The output is the same memory each time:
    /// what it holds is overwritten by the next replay.
    ///
    /// Errors: inputs of other shapes, dtypes or devices, a parameter that was replaced since the recording, a graph
    /// that is being recorded, or an error of the driver.
    pub fn replay(&mut self, inputs: &[Tensor]) -> Result<&R> {
        self.device.refuse_while_capturing("a replay")?;
        if inputs.len() != self.inputs.len() {
            let (given, expected) = (inputs.len(), self.inputs.len());
            return Err(Error::argument("graph", format!("{given} inputs, {expected} were recorded")));
        }
        discrete("graph", &inputs.iter().collect::<Vec<_>>())?;
        for (name, recorded) in &self.params {
            if self.map.get(name).map(place).transpose()?.as_ref() != Some(recorded) {
                return Err(Error::argument(
                    "graph",
                    format!("`{name}` was replaced since the recording; record again"),
                ));
            }
        }
        for (index, (to, from)) in self.inputs.iter().zip(inputs).enumerate() {
            if to.shape() != from.shape() || to.dtype() != from.dtype() || to.device() != from.device() {
                return Err(Error::argument(
                    "graph",
                    format!(
                        "input {index} is {:?} {} on {}, recorded was {:?} {} on {}",
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
        for (to, from) in self.inputs.iter().zip(inputs) {
            let from = from.detach().contiguous()?;
            self.device.copy(to.address()?, from.address()?, to.numel() * to.dtype().size())?;
        }
        let _pass = self.device.enter_outside("a replay")?;
        self.device.bind()?;
        // SAFETY: the executable graph is alive, and so is all memory that it uses: it has the blocks of every tensor
        // whose address was recorded, the inputs and the tables.
        let outcome = unsafe { result::graph::launch(self.executable.handle, self.device.stream.0) };
        self.device.check("cuGraphLaunch", outcome)?;
        self.device.launches.fetch_add(1, Ordering::Relaxed);
        Ok(&self.output)
    }

    /// The value that the recorded function returned. Before the first replay its tensors hold nothing.
    pub fn output(&self) -> &R {
        &self.output
    }
}
