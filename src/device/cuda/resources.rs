//! Driver resources of a device, each released on drop. An open device lives as long as the process, so only unused
//! modules and a device that failed to open are ever released.

use std::ffi::CString;

use cudarc::driver::{
    DriverError,
    result::{self, stream::StreamKind},
    sys,
};

/// A reference to a card's primary context.
pub(super) struct Context {
    handle: sys::CUcontext,
    device: sys::CUdevice,
}

// SAFETY: contexts may be used from any thread; the driver locks what its calls share.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    /// Retains the context and makes it current. `device` must come from the driver.
    pub fn retain(device: sys::CUdevice) -> Result<Self, DriverError> {
        // SAFETY: the device exists; released once, when the value is dropped.
        let context = Self { handle: unsafe { result::primary_ctx::retain(device) }?, device };
        context.make_current()?;
        Ok(context)
    }

    pub fn handle(&self) -> sys::CUcontext {
        self.handle
    }

    /// Makes this context current on the calling thread.
    pub fn make_current(&self) -> Result<(), DriverError> {
        // SAFETY: the context is retained.
        unsafe { result::ctx::set_current(self.handle) }
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: null takes the current context off the thread's stack; what else there is of it was dropped before.
        let _ = unsafe { result::ctx::set_current(std::ptr::null_mut()) };
        // SAFETY: retained in `retain`, released here only.
        let _ = unsafe { result::primary_ctx::release(self.device) };
    }
}

/// A stream that does not synchronize with the default stream.
pub(super) struct Stream(pub sys::CUstream);

// SAFETY: streams may be used from any thread whose current context is theirs; the driver locks what its calls share.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}

impl Stream {
    /// In the context, which is current.
    pub fn new(_current: &Context) -> Result<Self, DriverError> {
        result::stream::create(StreamKind::NonBlocking).map(Self)
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // SAFETY: created in `new`, not used again.
        let _ = unsafe { result::stream::destroy(self.0) };
    }
}

/// Device memory outside of the pool.
pub(super) struct Plain(sys::CUdeviceptr);

impl Plain {
    /// In the context, which is current.
    pub fn new(bytes: usize, _current: &Context) -> Result<Self, DriverError> {
        // SAFETY: the context is current; freed once, when the value is dropped.
        unsafe { result::malloc_sync(bytes) }.map(Self)
    }

    pub fn address(&self) -> u64 {
        self.0
    }
}

impl Drop for Plain {
    fn drop(&mut self) {
        // SAFETY: allocated in `new`, freed here only. The driver waits for what uses it.
        let _ = unsafe { result::free_sync(self.0) };
    }
}

/// Loaded code, unloaded on drop unless it is kept.
pub(super) struct Module(sys::CUmodule);

impl Module {
    /// # Safety
    ///
    /// A context must be current, also when the value is dropped, and `image` must be a complete CUBIN.
    pub unsafe fn load(image: &[u8]) -> Result<Self, DriverError> {
        // SAFETY: the caller's part.
        unsafe { result::module::load_data(image.as_ptr().cast()) }.map(Self)
    }

    /// Returns the kernel with this name, which is valid while the module is loaded.
    pub fn function(&self, kernel: CString) -> Result<sys::CUfunction, DriverError> {
        // SAFETY: the module is loaded.
        unsafe { result::module::get_function(self.0, kernel) }
    }

    /// Keeps the code loaded for the life of the process.
    pub fn keep(self) {
        std::mem::forget(self);
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        // SAFETY: loaded in `load`. None of its functions was launched, or it would have been kept.
        let _ = unsafe { result::module::unload(self.0) };
    }
}
