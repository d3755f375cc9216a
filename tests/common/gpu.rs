//! The GPU for tests that need one, and the functions that the emulated driver exports besides CUDA's.

#![allow(dead_code)]

use std::{
    ffi::{CStr, CString, c_char},
    io::Write,
    ops::Deref,
    sync::{Mutex, MutexGuard, PoisonError},
};

use x_transformers::Device;

/// The GPU under test. Its counters, memory and kernel reports are per process, so only one test uses it at a time.
pub struct Gpu {
    device: Device,
    _alone: MutexGuard<'static, ()>,
}

impl Deref for Gpu {
    type Target = Device;

    fn deref(&self) -> &Device {
        &self.device
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        self.device.set_cache_limit(usize::MAX);
    }
}

/// Returns the GPU that `XT_TEST_DEVICE` names; prints a note if there is none.
pub fn gpu(test: &str) -> Option<Gpu> {
    static ALONE: Mutex<()> = Mutex::new(());
    match std::env::var("XT_TEST_DEVICE") {
        Ok(name) if name != "cpu" => {
            let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
            Some(Gpu { device: Device::parse(&name).expect("the device of XT_TEST_DEVICE"), _alone: alone })
        }
        _ => skip(test, "XT_TEST_DEVICE names no GPU"),
    }
}

/// Returns the emulated GPU, the only one that fails on demand; prints a note if there is none.
pub fn emulated(test: &str) -> Option<Gpu> {
    if is_emulated() { gpu(test) } else { skip(test, "only the emulated driver fails on demand") }
}

pub fn is_emulated() -> bool {
    std::env::var_os("XT_EMULATOR").is_some()
}

fn skip<T>(test: &str, why: &str) -> Option<T> {
    // Straight to the stream: the harness hides what a passing test prints.
    let _ = writeln!(std::io::stderr(), "skipped: {test}: {why}");
    None
}

/// Returns a function that the emulated driver exports besides CUDA's.
fn exported<F: Copy>(name: &str) -> F {
    // SAFETY: the library is open already; the caller names the function's type.
    unsafe {
        let library = libloading::Library::new("libcuda.so.1").expect("the emulated driver");
        let function = *library.get::<F>(name.as_bytes()).expect("an exported function");
        std::mem::forget(library);
        function
    }
}

/// Makes the `n`-th call of a kind from now on fail; 0 disables failures.
pub fn fail(kind: &str, n: u64) {
    let arrange: unsafe extern "C" fn(*const c_char, u64) -> i32 = exported("xt_emulator_fail");
    let kind = CString::new(kind).expect("a name");
    // SAFETY: the text ends with a zero.
    assert_eq!(unsafe { arrange(kind.as_ptr(), n) }, 1);
}

/// Returns the number of calls of a kind so far.
pub fn count(kind: &str) -> u64 {
    let get: unsafe extern "C" fn(*const c_char) -> u64 = exported("xt_emulator_count");
    let kind = CString::new(kind).expect("a name");
    // SAFETY: the text ends with a zero.
    unsafe { get(kind.as_ptr()) }
}

/// Returns the names of the kernels, products, copies and fills that `f` enqueues, and its result.
pub fn traced<T>(f: impl FnOnce() -> T) -> (Vec<String>, T) {
    let trace: unsafe extern "C" fn(i32) -> *const c_char = exported("xt_emulator_trace");
    // SAFETY: it has no conditions; the text is read before the next call.
    let result = unsafe {
        trace(1);
        f()
    };
    // SAFETY: as above; the text ends with a zero.
    let names = unsafe { CStr::from_ptr(trace(0)) }.to_string_lossy().lines().map(str::to_string).collect();
    (names, result)
}

/// Returns the number of live objects of a kind: `graph`, `stream`, `module`, …
pub fn alive(thing: &str) -> i64 {
    let get: unsafe extern "C" fn(*const c_char) -> i64 = exported("xt_emulator_alive");
    let thing = CString::new(thing).expect("a name");
    // SAFETY: the text ends with a zero.
    unsafe { get(thing.as_ptr()) }
}

/// Returns the bytes of device memory that were not freed.
pub fn live_bytes() -> u64 {
    let get: unsafe extern "C" fn() -> u64 = exported("xt_emulator_live_bytes");
    // SAFETY: it has no conditions.
    unsafe { get() }
}

/// Restores a context that a kernel fault has lost.
pub fn clear() {
    let clear: unsafe extern "C" fn() = exported("xt_emulator_clear");
    // SAFETY: it has no conditions.
    unsafe { clear() }
}
