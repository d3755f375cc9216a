//! Device memory, and copies between it and the processor's.

use std::sync::atomic::Ordering;

use cudarc::driver::result;

use super::{CudaDevice, FAULT_WORDS, error};
use crate::{
    Error, Result,
    device::cuda::pool::{Reusable, size_class},
    ops::broken_logits,
};

/// Memory from the driver, given back to it when dropped.
pub(in crate::device) struct Block {
    address: u64,
    bytes: usize,
    device: &'static CudaDevice,
}

impl Block {
    fn new(bytes: usize, device: &'static CudaDevice) -> Option<Self> {
        device.bind().ok()?;
        // SAFETY: the context is current; the memory is freed once, when the block is dropped.
        let address = unsafe { result::malloc_sync(bytes) }.ok()?;
        Some(Self { address, bytes, device })
    }
}

impl Reusable for Block {
    /// By address: where the tensors of a step are depends on the step alone then, not on the order in which those of
    /// the last one were freed, and tables of addresses stay as they are.
    fn goes_before(&self, earlier: &Self) -> bool {
        self.address < earlier.address
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        // An error here means that the context is lost, and its memory with it.
        let _ = self.device.bind();
        // SAFETY: allocated in `new`, freed here only; the driver waits for what was enqueued before.
        let _ = unsafe { result::free_sync(self.address) };
    }
}

/// Bytes on a device, returned to its pool on drop.
pub(crate) struct CudaBuffer {
    block: Option<Block>,
    device: &'static CudaDevice,
}

impl CudaBuffer {
    /// The content is whatever was there: the emulated driver poisons it, which finds what a kernel forgets.
    pub fn new(bytes: usize, device: &'static CudaDevice) -> Result<Self> {
        if bytes == 0 {
            return Ok(Self { block: None, device });
        }
        // Nothing kept, nothing rounded: checkers of memory then see accesses beyond a tensor and after its end.
        let class = if device.pool.keeps_nothing() { bytes } else { size_class(bytes) };
        let block = if device.is_capturing() {
            // Memory cannot be asked for while a graph is recorded: the run before has left what this one needs.
            let why = || error(format!("a graph needs {bytes} bytes more than in the run before its recording"));
            device.pool.take(class).ok_or_else(why)?
        } else {
            device.pool.allocate(class, bytes, || Block::new(class, device))?
        };
        Ok(Self { block: Some(block), device })
    }

    /// Its first byte; null if it is empty.
    pub fn address(&self) -> u64 {
        self.block.as_ref().map_or(0, |block| block.address)
    }
}

impl Drop for CudaBuffer {
    fn drop(&mut self) {
        if let Some(block) = self.block.take() {
            self.device.pool.give(block.bytes, block);
        }
    }
}

impl CudaDevice {
    /// Enqueues a copy to the device. The source may be changed as soon as this returns.
    pub(crate) fn upload(&self, to: u64, from: &[u8]) -> Result<()> {
        if from.is_empty() {
            return Ok(());
        }
        self.refuse_while_capturing("an upload")?;
        self.bind()?;
        // SAFETY: the caller's memory at `to` has room for `from`, which the driver has read when this returns, since
        // it is not page-locked.
        self.check("cuMemcpyHtoDAsync", unsafe { result::memcpy_htod_async(to, from, self.stream) })?;
        self.uploads.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// Waits for all that was enqueued, and copies from the device.
    ///
    /// Errors: also what a kernel reported since the last read-back, for instance [`Error::Index`].
    pub(crate) fn read_back_at(&self, from: u64, to: &mut [u8]) -> Result<()> {
        self.refuse_while_capturing("a read-back")?;
        self.bind()?;
        if !to.is_empty() {
            // SAFETY: the caller's memory at `from` holds as many bytes; `to` lives until the stream has been waited for.
            self.check("cuMemcpyDtoHAsync", unsafe { result::memcpy_dtoh_async(to, from, self.stream) })?;
        }
        let mut faults = [0i64; FAULT_WORDS];
        // SAFETY: as above.
        let copied = unsafe { result::memcpy_dtoh_async(&mut faults, self.faults, self.stream) };
        // SAFETY: the stream lives as long as the process. Waited for in any case: it may be writing to `to`.
        let waited = unsafe { result::stream::synchronize(self.stream) };
        self.check("cuMemcpyDtoHAsync", copied)?;
        self.check("cuStreamSynchronize", waited)?;
        self.read_backs.fetch_add(1, Ordering::Relaxed);
        let [kind, index, limit] = faults;
        if kind == 0 {
            return Ok(());
        }
        self.fill_zero(self.faults, size_of_val(&faults))?;
        let limit = limit.max(0) as usize;
        let (op, what) = match kind {
            1 => ("embedding", "token"),
            2 => ("cross_entropy", "class"),
            3 => return Err(Error::no_targets(limit, index)),
            4 => return Err(broken_logits()),
            _ => return Err(error(format!("a kernel reported the unknown fault {kind}"))),
        };
        Err(Error::Index { op, what, index, limit })
    }

    /// Enqueues writing zeros.
    pub(crate) fn fill_zero(&self, to: u64, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        self.bind()?;
        // SAFETY: the caller's memory at `to` has this many bytes.
        self.check("cuMemsetD8Async", unsafe { result::memset_d8_async(to, 0, bytes, self.stream) })
    }

    pub(crate) fn refuse_while_capturing(&self, what: &str) -> Result<()> {
        if self.is_capturing() {
            return Err(error(format!("cuda:{}: {what} cannot be part of a graph", self.ordinal)));
        }
        Ok(())
    }

    pub(crate) fn is_capturing(&self) -> bool {
        self.capturing.load(Ordering::Relaxed)
    }
}
