//! Events of a device's stream, and device time measured with them.

use std::time::Duration;

use cudarc::driver::{result, sys};

use super::{CudaDevice, libraries};
use crate::Result;

impl CudaDevice {
    /// Measures the device time of the work that `f` enqueues. This excludes the time of enqueuing if the device is
    /// still busy with earlier work when `f` begins. Waits for the end of the work.
    ///
    /// Errors: those of `f` and of the driver, or a graph that is being recorded.
    pub fn time<R>(&self, f: impl FnOnce() -> Result<R>) -> Result<(Duration, R)> {
        const WHAT: &str = "a measurement of time";
        let flags = sys::CUevent_flags::CU_EVENT_DEFAULT;
        let begin = || {
            let _pass = self.enter_outside(WHAT)?;
            self.bind()?;
            let (start, end) = (Event::new(self, flags)?, Event::new(self, flags)?);
            start.record(self)?;
            Ok((start, end))
        };
        let (start, end) = begin()?;
        let output = f()?;
        let _pass = self.enter_outside(WHAT)?;
        self.bind()?;
        end.record(self)?;
        end.wait(self)?;
        let elapsed = libraries::elapsed_time().map_err(super::error)?;
        let mut milliseconds = 0f32;
        // SAFETY: both events were recorded on one stream, the later one was waited for, and the number is valid for
        // the write.
        let outcome = unsafe { elapsed(&mut milliseconds, start.handle, end.handle) }.result();
        self.check("cuEventElapsedTime", outcome)?;
        Ok((Duration::from_secs_f64(f64::from(milliseconds.max(0.0)) / 1e3), output))
    }
}

/// A point in a device's stream.
pub(super) struct Event {
    handle: sys::CUevent,
}

impl Event {
    /// The device's context must be current, here and in the methods.
    pub fn new(device: &CudaDevice, flags: sys::CUevent_flags) -> Result<Self> {
        Ok(Self { handle: device.check("cuEventCreate", result::event::create(flags))? })
    }

    /// Records the event after all work enqueued so far.
    pub fn record(&self, device: &CudaDevice) -> Result<()> {
        // SAFETY: event and stream belong to the device's context and are alive.
        device.check("cuEventRecord", unsafe { result::event::record(self.handle, device.stream.0) })
    }

    /// Returns `true` if the device has reached the point at which the event was last recorded.
    pub fn is_reached(&self, device: &CudaDevice) -> Result<bool> {
        // SAFETY: the event is alive.
        match unsafe { sys::cuEventQuery(self.handle) } {
            sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            outcome => device.check("cuEventQuery", outcome.result()).map(|()| true),
        }
    }

    /// Waits until the device reaches the point at which the event was last recorded.
    pub fn wait(&self, device: &CudaDevice) -> Result<()> {
        // SAFETY: the event is alive.
        device.check("cuEventSynchronize", unsafe { result::event::synchronize(self.handle) })
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: created in `new`, not used again; one that was not reached yet is freed when it is. An error leaves
        // nothing to do.
        let _ = unsafe { result::event::destroy(self.handle) };
    }
}
