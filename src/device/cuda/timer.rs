//! Time on the device, by events of its stream.

use std::time::Duration;

use cudarc::driver::{result, sys};

use super::CudaDevice;
use crate::Result;

impl CudaDevice {
    /// How long the device takes for what `f` enqueues, which is not the time of enqueuing as long as the device is still
    /// busy with earlier work when `f` begins. Waits for the end.
    ///
    /// Errors: those of `f` and of the driver.
    pub fn time<R>(&self, f: impl FnOnce() -> Result<R>) -> Result<(Duration, R)> {
        self.bind()?;
        let (start, end) = (Event::new(self)?, Event::new(self)?);
        start.record()?;
        let output = f()?;
        end.record()?;
        // SAFETY: the event was recorded above.
        self.check("cuEventSynchronize", unsafe { result::event::synchronize(end.handle) })?;
        // SAFETY: both events were recorded, and the later one was waited for.
        let milliseconds =
            self.check("cuEventElapsedTime", unsafe { result::event::elapsed(start.handle, end.handle) })?;
        Ok((Duration::from_secs_f64(f64::from(milliseconds.max(0.0)) / 1e3), output))
    }
}

struct Event<'a> {
    handle: sys::CUevent,
    device: &'a CudaDevice,
}

impl<'a> Event<'a> {
    fn new(device: &'a CudaDevice) -> Result<Self> {
        let handle = result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT);
        Ok(Self { handle: device.check("cuEventCreate", handle)?, device })
    }

    fn record(&self) -> Result<()> {
        // SAFETY: event and stream belong to the device's context.
        self.device.check("cuEventRecord", unsafe { result::event::record(self.handle, self.device.stream) })
    }
}

impl Drop for Event<'_> {
    fn drop(&mut self) {
        // SAFETY: created in `new`, not used again. An error leaves nothing to do.
        let _ = unsafe { result::event::destroy(self.handle) };
    }
}
