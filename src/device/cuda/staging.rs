//! Copies to the device through page-locked memory.
//!
//! When a copy from pageable memory returns, the driver guarantees neither that it is complete nor that it has read its
//! source; systems whose GPUs read the CPU's page tables (ATS, HMM) may read the source later. Our sources may change
//! or be freed at once. So their bytes are first copied to page-locked memory, from which copies are asynchronous by
//! definition, and which is reused after an event signals that the copy is complete.

use std::sync::{PoisonError, atomic::Ordering};

use cudarc::driver::{result, sys};

use super::{CudaDevice, timer::Event};
use crate::Result;

/// Bytes per slot: large enough that copying them takes far longer than the calls.
const SLOT: usize = 1 << 20;
/// Number of slots: one is filled while others are copied.
const SLOTS: usize = 4;

/// Page-locked memory in slots that are filled in turn.
#[derive(Default)]
pub(super) struct Staging {
    /// Allocated on first use.
    slots: Vec<Slot>,
    current: usize,
    /// Number of bytes of the current slot from which copies have been enqueued.
    used: usize,
}

struct Slot {
    memory: *mut u8,
    /// Recorded after the last copy from the slot.
    done: Event,
}

// SAFETY: the memory is this value's alone, and any thread may use it and the event.
unsafe impl Send for Slot {}

impl Slot {
    /// The device's context must be current.
    fn new(device: &CudaDevice) -> Result<Self> {
        let done = Event::new(device, sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)?;
        // SAFETY: the context is current; freed once, when the slot is dropped.
        let memory = device.check("cuMemHostAlloc", unsafe { result::malloc_host(SLOT, 0) })?;
        Ok(Self { memory: memory.cast(), done })
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` and not used again. A device lives as long as the process, or fails to open before
        // anything was copied.
        let _ = unsafe { result::free_host(self.memory.cast()) };
    }
}

impl Staging {
    /// Enqueues a copy; the source may change as soon as this returns. The context must be current.
    fn send(&mut self, device: &CudaDevice, to: u64, from: &[u8]) -> Result<()> {
        let mut sent = 0;
        while sent < from.len() {
            if self.slots.is_empty() {
                self.slots.push(Slot::new(device)?);
            }
            if self.used == SLOT {
                self.turn(device)?;
            }
            let part = &from[sent..from.len().min(sent + SLOT - self.used)];
            // SAFETY: the slot has room for the part, and nothing reads there: what was enqueued from it before lies in
            // front, or was waited for by `turn`.
            let staged = unsafe {
                let staged = self.slots[self.current].memory.add(self.used);
                std::ptr::copy_nonoverlapping(part.as_ptr(), staged, part.len());
                std::slice::from_raw_parts(staged, part.len())
            };
            self.used += part.len();
            // SAFETY: the caller's memory at `to` has room for `from` and is freed on this stream, after this copy.
            // The staged bytes stay unchanged until `turn` has waited for the slot's event.
            let copied = unsafe { result::memcpy_htod_async(to + sent as u64, staged, device.stream.0) };
            device.check("cuMemcpyHtoDAsync", copied)?;
            sent += part.len();
        }
        Ok(())
    }

    /// Waits for the copies from the next slot and makes it current. After an error the current slot stays full.
    fn turn(&mut self, device: &CudaDevice) -> Result<()> {
        self.slots[self.current].done.record(device)?;
        let next = (self.current + 1) % SLOTS;
        match self.slots.get(next) {
            Some(slot) => slot.done.wait(device)?,
            None => self.slots.push(Slot::new(device)?),
        }
        (self.current, self.used) = (next, 0);
        Ok(())
    }
}

impl CudaDevice {
    /// Enqueues a copy to the device. The source may be changed or freed as soon as this returns.
    pub(super) fn upload_at(&self, to: u64, from: &[u8]) -> Result<()> {
        if from.is_empty() {
            return Ok(());
        }
        let _pass = self.enter_outside("an upload")?;
        self.bind()?;
        self.staging.lock().unwrap_or_else(PoisonError::into_inner).send(self, to, from)?;
        self.uploads.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}
