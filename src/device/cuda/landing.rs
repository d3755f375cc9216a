//! Copies from the device that nobody waits for yet, through page-locked memory: an event tells when they are there.

use std::sync::{PoisonError, atomic::Ordering};

use cudarc::driver::{result, sys};

use super::{
    CudaDevice,
    faults::{self, Reader},
    timer::Event,
};
use crate::{
    Result,
    device::{faults::check, gpu::ReadBack},
};

/// Bytes of the words in which kernels report faults; they arrive in front of the others.
const FAULTS: usize = faults::BYTES;

/// Page-locked memory, and the event of the last copy into it.
pub(super) struct Landing {
    memory: *mut u8,
    size: usize,
    done: Event,
}

// SAFETY: the memory is this value's alone, and any thread may use it and the event.
unsafe impl Send for Landing {}

impl Landing {
    /// The device's context must be current.
    fn new(size: usize, device: &CudaDevice) -> Result<Self> {
        let done = Event::new(device, sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)?;
        // SAFETY: the context is current; freed once, when the landing is dropped.
        let memory = device.check("cuMemHostAlloc", unsafe { result::malloc_host(size, 0) })?;
        Ok(Self { memory: memory.cast(), size, done })
    }

    /// Enqueues a copy of `bytes` bytes to byte `at`. The caller waits for the event before it reads or frees them.
    fn copy(&mut self, device: &CudaDevice, from: u64, at: usize, bytes: usize) -> Result<()> {
        debug_assert!(at + bytes <= self.size);
        // SAFETY: inside of the memory, which nothing else reads or writes until the event was waited for.
        let to = unsafe { std::slice::from_raw_parts_mut(self.memory.add(at), bytes) };
        // SAFETY: the caller's memory at `from` has as many bytes and is freed on this stream, after this copy.
        let copied = unsafe { result::memcpy_dtoh_async(to, from, device.stream.0) };
        device.check("cuMemcpyDtoHAsync", copied)
    }
}

impl Drop for Landing {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` and not used again: whoever has enqueued a copy has waited for it.
        let _ = unsafe { result::free_host(self.memory.cast()) };
    }
}

/// A copy that was enqueued.
struct Arriving {
    /// `None` once it was waited for.
    landing: Option<Landing>,
    bytes: usize,
    reader: Reader,
    device: &'static CudaDevice,
}

impl Arriving {
    /// Waits for the copy; returns its bytes and those of the faults.
    fn finish(&mut self) -> Result<Vec<u8>> {
        let Some(landing) = self.landing.take() else { return Ok(Vec::new()) };
        if let Err(error) = self.device.bind().and_then(|()| landing.done.wait(self.device)) {
            // The copy may still be on its way: the memory is never freed.
            std::mem::forget(landing);
            return Err(error);
        }
        // SAFETY: written by the copies, which are done.
        let read = unsafe { std::slice::from_raw_parts(landing.memory, FAULTS + self.bytes) }.to_vec();
        self.device.landings.lock().unwrap_or_else(PoisonError::into_inner).push(landing);
        Ok(read)
    }
}

impl ReadBack for Arriving {
    fn wait(mut self: Box<Self>) -> Result<(Vec<u8>, Result<()>)> {
        let mut read = self.finish()?;
        let rest = read.split_off(FAULTS);
        if read.is_empty() {
            return Ok((rest, Ok(())));
        }
        let (fault, reported) = self.device.faults.find(self.reader, &read);
        if let Some(place) = reported {
            self.device.fill_zero_at(place, faults::PLACE)?;
        }
        Ok((rest, check(fault)))
    }
}

impl Drop for Arriving {
    fn drop(&mut self) {
        // An error leaves nothing to do.
        let _ = self.finish();
    }
}

impl CudaDevice {
    /// Enqueues a copy from the device. See [`Gpu::read_back_later`](crate::device::Gpu::read_back_later).
    pub(super) fn read_back_later_at(&'static self, from: u64, bytes: usize) -> Result<Box<dyn ReadBack>> {
        let _pass = self.enter_outside("a read-back")?;
        self.bind()?;
        let size = (FAULTS + bytes).next_power_of_two().max(4096);
        let kept = {
            let mut landings = self.landings.lock().unwrap_or_else(PoisonError::into_inner);
            let fits = landings.iter().position(|landing| landing.size >= size);
            fits.map(|at| landings.swap_remove(at))
        };
        let landing = kept.map_or_else(|| Landing::new(size, self), Ok)?;
        // Waits for what was enqueued when it is dropped, also after an error.
        let mut arriving = Box::new(Arriving { landing: None, bytes, reader: self.faults.reader(), device: self });
        let landing = arriving.landing.insert(landing);
        let copied = landing
            .copy(self, self.faults.all(), 0, FAULTS)
            .and_then(|()| if bytes > 0 { landing.copy(self, from, FAULTS, bytes) } else { Ok(()) });
        landing.done.record(self)?;
        copied?;
        self.read_backs.fetch_add(1, Ordering::Relaxed);
        Ok(arriving)
    }
}
