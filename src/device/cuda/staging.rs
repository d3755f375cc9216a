//! Copies to the device, by way of page-locked memory.
//!
//! Of a copy from pageable memory the driver says neither that it is done nor that it has read its source when the call
//! returns; a system whose cards read the processor's page tables (ATS, HMM) may copy from the source itself, later. A
//! source of ours may change or be freed at once. So its bytes go to page-locked memory first, from which the copy is
//! asynchronous by definition, and that memory is used again when an event says that the copy is done.

use std::sync::{PoisonError, atomic::Ordering};

use cudarc::driver::{result, sys};

use super::{CudaDevice, timer::Event};
use crate::Result;

/// Bytes of one slot: large enough that a copy of its size takes far longer than its calls.
const SLOT: usize = 1 << 20;
/// One slot is filled while others are copied.
const SLOTS: usize = 4;

/// Page-locked memory in a few slots, which are filled in turn.
#[derive(Default)]
pub(super) struct Staging {
    /// Made on first use.
    slots: Vec<Slot>,
    current: usize,
    /// Bytes of the current slot that copies were enqueued from.
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
    /// Enqueues a copy whose source may change as soon as this returns. The context must be current.
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
            // SAFETY: the caller's memory at `to` has room for `from` and is freed on this stream, after this copy. What
            // it reads stays as it is until `turn` has waited for the slot's event.
            let copied = unsafe { result::memcpy_htod_async(to + sent as u64, staged, device.stream.0) };
            device.check("cuMemcpyHtoDAsync", copied)?;
            sent += part.len();
        }
        Ok(())
    }

    /// Goes on to the next slot, once the copies from it are done. After an error the present one is still full.
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
