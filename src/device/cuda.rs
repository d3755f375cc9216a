//! CUDA: what of driver, NVRTC and cuBLAS is on this machine.
//!
//! The libraries are looked up when a program asks, so that one binary serves machines with and without a GPU.

use cudarc::{cublas, driver, nvrtc};

use crate::{Error, Result};

/// A CUDA device. This version can find the libraries but has no kernels yet, so that no value of the type exists.
pub enum CudaDevice {}

impl CudaDevice {
    /// Errors: always, naming what is missing.
    pub fn open(ordinal: usize) -> Result<Self> {
        let missing: Vec<_> = libraries().into_iter().filter(|library| !library.present).collect();
        let message = if missing.is_empty() {
            format!("cuda:{ordinal}: the CUDA libraries are present, but this version has no CUDA backend; use the CPU")
        } else {
            let names: Vec<_> = missing.iter().map(|library| format!("{} ({})", library.what, library.hint)).collect();
            format!("cuda:{ordinal} is not usable, missing: {}; use the CPU", names.join(", "))
        };
        Err(Error::Device { op: "device", message })
    }
}

struct Library {
    what: &'static str,
    hint: &'static str,
    present: bool,
}

fn libraries() -> [Library; 3] {
    // SAFETY: these calls only try to open a shared library by name; its initialisers are NVIDIA's.
    let (driver, nvrtc, cublas) =
        unsafe { (driver::sys::is_culib_present(), nvrtc::sys::is_culib_present(), cublas::sys::is_culib_present()) };
    [
        Library { what: "driver", hint: "libcuda, comes with the NVIDIA driver", present: driver },
        Library { what: "NVRTC", hint: "libnvrtc, from the CUDA toolkit", present: nvrtc },
        Library { what: "cuBLAS", hint: "libcublas, from the CUDA toolkit", present: cublas },
    ]
}

/// One line per library.
pub fn describe() -> Vec<String> {
    let line = |library: &Library| {
        let state = if library.present { "found" } else { "not found" };
        format!("cuda: {} {state} ({})", library.what, library.hint)
    };
    let mut lines: Vec<_> = libraries().iter().map(line).collect();
    lines.push("cuda: this version runs on the CPU only".into());
    lines
}
