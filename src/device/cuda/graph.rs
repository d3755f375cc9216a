//! CUDA graphs: a computation of fixed shapes, recorded once and replayed with one call of the driver.

use std::{fmt, sync::atomic::Ordering};

use cudarc::driver::{result, sys};

use super::{CudaDevice, GraphTables, error, memory::Block};
use crate::{Device, Error, ParamMap, Result, Tensor, core::discrete, device::cuda::pool::FreeBlocks};

/// A recorded computation on a GPU. Replaying it costs one launch instead of one per kernel.
///
/// What is recorded are the kernels, with the addresses and numbers that they were given: shapes, scalars and the path
/// through the program are those of the recording; what is to change from replay to replay must be an input. Inputs are copied into place by [`Graph::replay`];
/// parameters are read where they are, so that an optimizer may update them between replays.
pub struct Graph<R> {
    executable: Executable,
    inputs: Vec<Tensor>,
    /// Each parameter's name and address.
    params: Vec<(String, u64)>,
    map: ParamMap,
    output: R,
    /// What the recorded kernels find tensors by.
    _tables: Vec<Tensor>,
    /// The memory that the recorded kernels use between inputs and output: nobody else may have it.
    _memory: FreeBlocks<Block>,
    device: &'static CudaDevice,
}

impl<R> fmt::Debug for Graph<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Graph").field("device", &self.device).field("inputs", &self.inputs).finish_non_exhaustive()
    }
}

struct Executable {
    handle: sys::CUgraphExec,
    device: &'static CudaDevice,
}

impl Drop for Executable {
    fn drop(&mut self) {
        // Its memory goes back to the pool next: the device must be done with it. An error leaves nothing to do.
        let _ = self.device.synchronize();
        // SAFETY: instantiated in `capture`, not used again.
        let _ = unsafe { result::graph::exec_destroy(self.handle) };
    }
}

impl<R> Graph<R> {
    /// Records `f`. It is called twice: once to compile kernels and to find out what memory it needs, once to be
    /// recorded, which computes nothing. It must not read values back, and no other thread may use the device meanwhile.
    ///
    /// `params`: the parameters that `f` reads.
    ///
    /// Errors: inputs that are not packed tensors on one GPU or require a gradient, or whatever `f` does that a graph cannot hold.
    pub fn capture(inputs: &[Tensor], params: &ParamMap, f: impl Fn(&[Tensor]) -> Result<R>) -> Result<Self> {
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
        // Copies of their own: a replay writes into them.
        let inputs = inputs.iter().map(Tensor::to_owned_copy).collect::<Result<Vec<_>>>()?;
        let mut memory = FreeBlocks::default();
        device.pool.exchange(&mut memory, true);
        *device.graph_tables() = Some(GraphTables::default());
        let recorded = f(&inputs).and_then(|warm| {
            drop(warm);
            device.synchronize()?;
            device.record(|| f(&inputs))
        });
        let tables = device.graph_tables().take().unwrap_or_default().made;
        device.pool.exchange(&mut memory, false);
        let (handle, output) = recorded?;
        let executable = Executable { handle, device };
        let fill = |(mut table, values): (Tensor, Vec<i64>)| {
            device.upload(table.address_mut()?, bytemuck::cast_slice(&values)).map(|()| table)
        };
        let tables = tables.into_iter().map(fill).collect::<Result<Vec<_>>>()?;
        let address = |(name, param): (&str, &crate::Param)| Ok((name.to_string(), param.tensor().storage_address()?));
        let addresses = params.iter().map(address).collect::<Result<_>>()?;
        let map = params.clone();
        Ok(Self { executable, inputs, params: addresses, map, output, _tables: tables, _memory: memory, device })
    }

    /// Copies new values into the inputs and enqueues the recorded computation. The output is the same memory each time:
    /// what it holds is overwritten by the next replay.
    ///
    /// Errors: inputs of other shapes, dtypes or devices, a parameter that was replaced since the recording, or an
    /// error of the driver.
    pub fn replay(&mut self, inputs: &[Tensor]) -> Result<&R> {
        if inputs.len() != self.inputs.len() {
            let (given, expected) = (inputs.len(), self.inputs.len());
            return Err(Error::argument("graph", format!("{given} inputs, {expected} were recorded")));
        }
        discrete("graph", &inputs.iter().collect::<Vec<_>>())?;
        for (name, address) in &self.params {
            if self.map.get(name).map(|param| param.tensor().storage_address()).transpose()? != Some(*address) {
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
            let from = from.detach().contiguous()?;
            self.device.copy(to.address()?, from.address()?, to.elements() * to.dtype().size())?;
        }
        self.device.bind()?;
        // SAFETY: the graph and all memory that it uses are alive.
        let outcome = unsafe { result::graph::launch(self.executable.handle, self.device.stream) };
        self.device.check("cuGraphLaunch", outcome)?;
        self.device.launches.fetch_add(1, Ordering::Relaxed);
        Ok(&self.output)
    }

    /// What the recorded function returned. Before the first replay its tensors hold nothing.
    pub fn output(&self) -> &R {
        &self.output
    }
}

impl CudaDevice {
    fn record<R>(&self, f: impl FnOnce() -> Result<R>) -> Result<(sys::CUgraphExec, R)> {
        self.bind()?;
        let mode = sys::CUstreamCaptureMode_enum::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream lives as long as the process.
        self.check("cuStreamBeginCapture", unsafe { result::stream::begin_capture(self.stream, mode) })?;
        self.capturing.store(true, Ordering::Relaxed);
        let output = f();
        self.capturing.store(false, Ordering::Relaxed);
        // SAFETY: as above. Ended in any case, or the stream would stay in capture.
        let graph = self.check("cuStreamEndCapture", unsafe { result::stream::end_capture(self.stream) });
        let output = output?;
        let graph = graph?;
        if graph.is_null() {
            return Err(error("the driver gave no graph".into()));
        }
        let flags = sys::CUgraphInstantiate_flags(0);
        // SAFETY: the graph was made above.
        let executable = self.check("cuGraphInstantiate", unsafe { result::graph::instantiate(graph, flags) });
        // SAFETY: as above; what was instantiated does not need it any more.
        self.check("cuGraphDestroy", unsafe { result::graph::destroy(graph) })?;
        Ok((executable?, output))
    }

    /// Enqueues a copy within the device.
    pub(crate) fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        self.bind()?;
        // SAFETY: both are memory of this device with this many bytes, by the caller.
        self.check("cuMemcpyDtoDAsync", unsafe { result::memcpy_dtod_async(to, from, bytes, self.stream) })
    }
}
