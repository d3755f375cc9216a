//! Device memory, and copies within it and to host memory.

use std::sync::{Arc, atomic::Ordering};

use cudarc::driver::{DriverError, result, sys::CUresult};

use super::{
    CudaDevice, error,
    faults::{self, Writers},
    gate::Pass,
    pool::{Memory, Phase, size_class},
};
use crate::{
    Error, ErrorKind, Result,
    device::{faults::check, gpu},
};

/// Memory from the driver, returned to it when dropped.
pub(in crate::device) struct Block {
    address: u64,
    bytes: usize,
    device: &'static CudaDevice,
}

impl Block {
    /// Allocates memory; returns `None` if there is not enough.
    ///
    /// Errors: any other error of the driver.
    fn new(bytes: usize, device: &'static CudaDevice) -> Result<Option<Arc<Self>>> {
        device.bind()?;
        // SAFETY: the context is current; the memory is freed once, when the block is dropped.
        match unsafe { result::malloc_sync(bytes) } {
            Ok(address) => Ok(Some(Arc::new(Self { address, bytes, device }))),
            Err(DriverError(CUresult::CUDA_ERROR_OUT_OF_MEMORY)) => Ok(None),
            Err(why) => device.check("cuMemAlloc", Err(why)),
        }
    }
}

impl Memory for Block {
    fn address(&self) -> u64 {
        self.address
    }

    fn bytes(&self) -> usize {
        self.bytes
    }

    fn free(block: Arc<Self>) {
        block.device.discard(block);
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        // An error here means that the context is lost, and its memory with it.
        let _ = self.device.bind();
        // SAFETY: allocated in `new`, freed here only. Blocks leave the pool when neither a tensor nor a graph has
        // them, and `discard` drops them outside of captures; the driver waits for what was enqueued before.
        let _ = unsafe { result::free_sync(self.address) };
    }
}

/// Bytes on a device, returned to its pool on drop.
pub(super) struct CudaMemory {
    /// `Some` until the value is dropped.
    block: Option<Arc<Block>>,
    address: u64,
    writers: Writers,
    device: &'static CudaDevice,
}

impl CudaMemory {
    /// Allocates `bytes`, which must not be 0, uninitialized. The emulated driver poisons fresh memory, which reveals
    /// elements that a kernel does not write.
    ///
    /// Errors: [`ErrorKind::OutOfMemory`]; another error of the driver; while a graph is recorded, memory that the run
    /// before the recording did not need, or a recording of another thread.
    pub fn new(bytes: usize, device: &'static CudaDevice) -> Result<Self> {
        let from =
            |block: Arc<Block>| Self { address: block.address, block: Some(block), writers: Writers::new(), device };
        if let Some(block) = Self::allocate(bytes, device)? {
            return Ok(from(block));
        }
        // Returns cached blocks to the driver, which may then have enough.
        let before = device.pool.stats();
        device.pool.trim();
        let block = Self::allocate(bytes, device)?;
        let none = || Error::new(ErrorKind::OutOfMemory { requested: bytes, live: before.live, cached: before.cached });
        block.ok_or_else(none).map(from)
    }

    /// Makes the memory one whose users depend on no other thread.
    pub fn forget_writers(&self) {
        self.writers.clear();
    }

    /// Returns a block of the pool or a new one, or `None` if memory is exhausted.
    fn allocate(bytes: usize, device: &'static CudaDevice) -> Result<Option<Arc<Block>>> {
        let _pass = device.enter("an allocation")?;
        // Without caching and rounding, memory checkers detect accesses past the end of a tensor and after its release.
        let (class, other) = match device.pool.keeps_nothing() {
            true => (bytes, size_class(bytes)),
            false => (size_class(bytes), bytes),
        };
        let phase = device.phase();
        if let Some(block) = device.pool.take(class, phase) {
            return Ok(Some(block));
        }
        if phase == Phase::Capture {
            // The limit may have changed since the last call.
            if let Some(block) = device.pool.take(other, phase) {
                return Ok(Some(block));
            }
            // Memory cannot be allocated while a graph is recorded: the previous run left what this one needs.
            return Err(error(format!(
                "recording a graph needs {bytes} bytes that the run before it did not use; the closure must do the \
                 same work each time and keep no extra tensors"
            )));
        }
        let block = Block::new(class, device)?;
        // Counted after the allocation: a failed request must not raise the peak.
        Ok(block.inspect(|block| device.pool.insert(block, phase)))
    }
}

impl gpu::Memory for CudaMemory {
    fn address(&self) -> u64 {
        self.writers.read();
        self.address
    }

    fn begin_write(&self) {
        self.writers.write();
    }
}

impl Drop for CudaMemory {
    fn drop(&mut self) {
        if let Some(block) = self.block.take() {
            self.device.pool.give(block);
        }
    }
}

impl CudaDevice {
    /// Makes the graph that this thread records hold the memory at these addresses, which its next call reads or
    /// writes.
    ///
    /// Errors: an address that belongs to no tensor.
    pub(super) fn hold(&self, what: &str, addresses: impl IntoIterator<Item = u64>) -> Result<()> {
        if !self.captures() {
            return Ok(());
        }
        // Null stands for an absent or empty tensor. The fault words live as long as the process.
        let mut held = addresses.into_iter().filter(|&address| address != 0 && !self.faults.contains(address));
        match held.find(|&address| !self.pool.hold(address)) {
            None => Ok(()),
            Some(address) => Err(error(format!("{what}: no tensor of cuda:{} is at {address:#x}", self.ordinal))),
        }
    }

    /// Waits for all enqueued work and copies from the device.
    ///
    /// Errors: also those that kernels of this thread, or of one whose tensors it has used, reported since the last
    /// read-back, such as [`ErrorKind::Index`].
    pub(super) fn read_back_at(&self, from: u64, to: &mut [u8]) -> Result<()> {
        let pass = self.enter_outside("a read-back")?;
        self.bind()?;
        if !to.is_empty() {
            // SAFETY: the caller's memory at `from` holds as many bytes. The driver may write to `to` until the stream
            // has been waited for below, which happens before this function returns and lets go of it.
            let copied = unsafe { result::memcpy_dtoh_async(to, from, self.stream.0) };
            self.check("cuMemcpyDtoHAsync", copied)?;
        }
        let (reader, mut faults) = (self.faults.reader(), [0; faults::BYTES]);
        // SAFETY: as above.
        let copied = unsafe { result::memcpy_dtoh_async(&mut faults, self.faults.all(), self.stream.0) };
        // SAFETY: the stream lives as long as the device. Waited for in any case: it may be writing to `to`.
        let waited = unsafe { result::stream::synchronize(self.stream.0) };
        self.check("cuMemcpyDtoHAsync", copied)?;
        self.check("cuStreamSynchronize", waited)?;
        self.read_backs.fetch_add(1, Ordering::Relaxed);
        let (fault, reported) = self.faults.find(reader, &faults);
        if let Some(place) = reported {
            self.fill(&pass, place, faults::PLACE)?;
        }
        check(fault)
    }

    /// Enqueues a copy within the device.
    pub(super) fn copy_at(&self, to: u64, from: u64, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        let _pass = self.enter("a copy")?;
        self.hold("a copy", [to, from])?;
        self.bind()?;
        // SAFETY: both are memory of this device with this many bytes, by the caller, whose tensors are freed on this
        // stream, after this copy; a graph that it becomes part of holds both.
        self.check("cuMemcpyDtoDAsync", unsafe { result::memcpy_dtod_async(to, from, bytes, self.stream.0) })
    }

    /// Enqueues filling the memory with zeros.
    pub(super) fn fill_zero_at(&self, to: u64, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        let pass = self.enter("a fill")?;
        self.hold("a fill", [to])?;
        self.fill(&pass, to, bytes)
    }

    fn fill(&self, _pass: &Pass, to: u64, bytes: usize) -> Result<()> {
        self.bind()?;
        // SAFETY: the caller's memory at `to` has this many bytes and is freed on this stream, after this call; a graph
        // that it becomes part of holds it.
        self.check("cuMemsetD8Async", unsafe { result::memset_d8_async(to, 0, bytes, self.stream.0) })
    }
}
