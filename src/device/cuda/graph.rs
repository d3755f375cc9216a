//! CUDA graphs: the work of a closure, captured once and replayed with one driver call.

use std::sync::{Arc, atomic::Ordering};

use cudarc::driver::{result, sys};

use super::{
    CudaDevice, error,
    faults::Origins,
    memory::{Block, CudaMemory},
    pool::Source,
    tables::GraphTables,
};
use crate::{
    Result,
    device::gpu::{Memory, Replay},
};

/// Implements [`Gpu::record`](crate::device::Gpu::record) and
/// [`Gpu::record_patiently`](crate::device::Gpu::record_patiently).
pub(super) fn record(
    device: &'static CudaDevice,
    patient: bool,
    f: &mut dyn FnMut(bool) -> Result<()>,
) -> Result<Box<dyn Replay>> {
    let recording = Recording::begin(device, patient)?;
    recording.warm(|| f(false))?;
    let captured = recording.capture(|| f(true))?;
    Ok(Box::new(recording.finish(captured)?))
}

/// An instantiated graph, and the memory that its work uses.
struct Executable {
    handle: sys::CUgraphExec,
    blocks: Vec<Arc<Block>>,
    /// Tables of addresses that the recorded kernels read.
    tables: Vec<Arc<dyn Memory>>,
    /// The thread in whose place its kernels report.
    origins: Origins,
    device: &'static CudaDevice,
}

// SAFETY: the driver's calls work from any thread in which the device's context is bound, as each of them does first;
// the handle is this value's alone, which is used by one thread at a time since it is not `Sync`.
unsafe impl Send for Executable {}

impl Replay for Executable {
    fn replay(&self) -> Result<()> {
        let device = self.device;
        self.origins.adopt();
        let _pass = device.enter_outside("a replay")?;
        device.bind()?;
        // SAFETY: the executable graph is alive, and so is all memory that it uses: it has the blocks of every tensor
        // whose address was recorded, and the tables.
        let outcome = unsafe { result::graph::launch(self.handle, device.stream.0) };
        device.check("cuGraphLaunch", outcome)?;
        device.launches.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

impl Drop for Executable {
    fn drop(&mut self) {
        self.device.discard(ToDestroy { handle: self.handle, device: self.device });
        // A replay may still be running; work of the next owners of its memory is enqueued after it.
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
        // SAFETY: the stream lives as long as the device. Waits for the last replay, and leaves faults of kernels to
        // the next read-back. An error leaves nothing to do.
        let _ = unsafe { result::stream::synchronize(self.device.stream.0) };
        // SAFETY: instantiated in `finish`, not used again. `discard` calls this outside of captures.
        let _ = unsafe { result::graph::exec_destroy(self.handle) };
    }
}

/// A captured graph, not yet instantiated.
struct Captured(sys::CUgraph);

impl Drop for Captured {
    fn drop(&mut self) {
        if !self.0.is_null() {
            // SAFETY: the driver made it for us, and what is instantiated does not need it any more.
            let _ = unsafe { result::graph::destroy(self.0) };
        }
    }
}

/// A recording in progress, which ends even if the recorded function fails or panics: without [`Recording::finish`],
/// dropping it restores the previous state.
struct Recording {
    device: &'static CudaDevice,
    open: bool,
}

impl Recording {
    /// Begins a recording. Tensors still use the pool's common blocks.
    fn begin(device: &'static CudaDevice, patient: bool) -> Result<Self> {
        device.begin_recording(patient)?;
        *device.graph_tables() = GraphTables::default();
        Ok(Self { device, open: true })
    }

    /// Runs the function in memory reserved for it, and allocates what the recording needs beyond the memory free by
    /// then: the size of the tensors that the function stored elsewhere.
    fn warm(&self, f: impl FnOnce() -> Result<()>) -> Result<()> {
        self.device.pool.record();
        f()?;
        self.device.read_back_at(0, &mut [])?;
        let pool = &self.device.pool;
        pool.set_source(Source::Fresh);
        // A failed allocation is not an error: the recording may not need it, and reports it otherwise.
        let spare = pool.escaped().into_iter().filter_map(|bytes| CudaMemory::new(bytes, self.device).ok());
        drop(spare.collect::<Vec<_>>());
        pool.set_source(Source::Freed);
        Ok(())
    }

    /// Captures the work that `f` enqueues.
    fn capture(&self, f: impl FnOnce() -> Result<()>) -> Result<Captured> {
        let device = self.device;
        device.bind()?;
        let mode = sys::CUstreamCaptureMode_enum::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        device.gate.switch(|| {
            // SAFETY: the stream lives as long as the device, and no other thread is about to use it.
            let begun = unsafe { result::stream::begin_capture(device.stream.0, mode) };
            (begun.is_ok(), device.check("cuStreamBeginCapture", begun))
        })?;
        let outcome = f();
        // Ended even after an error, or the stream would stay in capture mode.
        let captured = self.end_capture();
        outcome?;
        let captured = captured?;
        if captured.0.is_null() {
            return Err(error("the driver returned no graph".into()));
        }
        Ok(captured)
    }

    fn end_capture(&self) -> Result<Captured> {
        let device = self.device;
        device.gate.switch(|| {
            // SAFETY: the stream lives as long as the device; this thread has begun the capture.
            let graph = unsafe { result::stream::end_capture(device.stream.0) };
            (false, device.check("cuStreamEndCapture", graph).map(Captured))
        })
    }

    /// Creates the graph, which owns all memory that its work uses, and uploads the content of its tables.
    fn finish(mut self, captured: Captured) -> Result<Executable> {
        let device = self.device;
        let flags = sys::CUgraphInstantiate_flags(0);
        // SAFETY: the graph was captured and is alive.
        let handle = unsafe { result::graph::instantiate(captured.0, flags) };
        let handle = device.check("cuGraphInstantiate", handle)?;
        self.open = false;
        let mut executable = Executable {
            handle,
            blocks: device.pool.finish(),
            tables: Vec::new(),
            origins: Origins::this_thread(),
            device,
        };
        for (table, values) in std::mem::take(&mut *device.graph_tables()).made {
            device.upload_at(table.address(), bytemuck::cast_slice(&values))?;
            executable.tables.push(table);
        }
        Ok(executable)
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        if self.device.captures() {
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
