//! The GPU of tests that need one, and the functions that the emulated driver exports beside those of CUDA.

#![allow(dead_code)]

use std::{
    ffi::{CString, c_char},
    io::Write,
    ops::Deref,
    sync::{Mutex, MutexGuard, PoisonError},
};

use x_transformers::Device;

/// The GPU to test. Its counters, its memory and what its kernels report are those of the process, so that one test at a
/// time has it.
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

/// The GPU that `XT_TEST_DEVICE` names, or a note that there is none.
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

/// The emulated GPU, or a note that there is none: only that fails on demand.
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

/// A function that the emulated driver exports beside those of CUDA.
fn exported<F: Copy>(name: &str) -> F {
    // SAFETY: the library is open already; the caller names the function's type.
    unsafe {
        let library = libloading::Library::new("libcuda.so.1").expect("the emulated driver");
        let function = *library.get::<F>(name.as_bytes()).expect("an exported function");
        std::mem::forget(library);
        function
    }
}

/// Makes the `n`-th call of a kind from now on fail; 0 makes none fail.
pub fn fail(kind: &str, n: u64) {
    let arrange: unsafe extern "C" fn(*const c_char, u64) -> i32 = exported("xt_emulator_fail");
    let kind = CString::new(kind).expect("a name");
    // SAFETY: the text ends with a zero.
    assert_eq!(unsafe { arrange(kind.as_ptr(), n) }, 1);
}

/// Number of calls of a kind so far.
pub fn count(kind: &str) -> u64 {
    let get: unsafe extern "C" fn(*const c_char) -> u64 = exported("xt_emulator_count");
    let kind = CString::new(kind).expect("a name");
    // SAFETY: the text ends with a zero.
    unsafe { get(kind.as_ptr()) }
}

/// Number of things of a kind that were made and not destroyed: `graph`, `stream`, `module`, …
pub fn alive(thing: &str) -> i64 {
    let get: unsafe extern "C" fn(*const c_char) -> i64 = exported("xt_emulator_alive");
    let thing = CString::new(thing).expect("a name");
    // SAFETY: the text ends with a zero.
    unsafe { get(thing.as_ptr()) }
}

/// Bytes of device memory that were not given back.
pub fn live_bytes() -> u64 {
    let get: unsafe extern "C" fn() -> u64 = exported("xt_emulator_live_bytes");
    // SAFETY: it has no conditions.
    unsafe { get() }
}

/// Makes a context usable again that a kernel has cost.
pub fn clear() {
    let clear: unsafe extern "C" fn() = exported("xt_emulator_clear");
    // SAFETY: it has no conditions.
    unsafe { clear() }
}
