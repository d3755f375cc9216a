//! Versions of driver, NVRTC and card, as the library sees them: the pairs that work, and the errors for the others.

use x_transformers::{
    DType, Device, Tensor,
    device::{
        CudaDevice,
        cuda::{self, Target, cubin_in},
        describe,
        kernels::KernelSource,
    },
};

use crate::{emulated, here};

/// A kernel that runs, on the target that the library chose.
fn runs(target: &str) {
    let device = CudaDevice::open(0).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(device.target().to_string(), target);
    let (time, y) = device
        .time(|| Tensor::from_slice(&[1f32, 2.0], [2], &Device::Gpu(device))?.affine(2.0, 1.0))
        .unwrap_or_else(|error| panic!("{error}"));
    assert_eq!((y.dtype(), y.to_f64_vec().unwrap()), (DType::F32, vec![3.0, 5.0]));
    assert!(time.as_secs_f64() < 60.0);
}

/// The device cannot be opened, and the reason has these parts.
fn refuses(parts: &[&str]) {
    let why = CudaDevice::open(0).unwrap_err().to_string();
    assert!(parts.iter().all(|part| why.contains(part)), "{parts:?}: {why}");
}

#[test]
fn the_newest_versions_work() {
    emulated(here!(), &[("XT_KERNEL_CACHE", "off")], || runs("sm_80"));
}

/// A function of CUDA 12.8 that only benchmarks use is not a reason to refuse a driver.
#[test]
fn a_driver_without_the_second_elapsed_time() {
    let versions = [("XT_EMULATOR_DRIVER", "12.0"), ("XT_EMULATOR_NVRTC", "12.6"), ("XT_KERNEL_CACHE", "off")];
    emulated(here!(), &versions, || {
        // SAFETY: the symbol is only looked up.
        let second = unsafe { cudarc::driver::sys::culib().get::<fn()>(b"cuEventElapsedTime_v2") };
        assert!(second.is_err(), "the driver has the function");
        // A compiler of a later minor version makes machine code that this driver loads.
        runs("sm_80");
    });
}

#[test]
fn a_compiler_of_a_later_major_version() {
    let versions = [("XT_EMULATOR_DRIVER", "12.4"), ("XT_EMULATOR_NVRTC", "13.5")];
    emulated(here!(), &versions, || {
        refuses(&["NVRTC 13.5", "CUDA 12.4", "driver 580 or later", "pip install nvidia-cuda-nvrtc-cu12"]);
    });
}

#[test]
fn a_gpu_that_the_compiler_does_not_support() {
    let versions = [
        ("XT_EMULATOR_ARCH", "100"),
        ("XT_EMULATOR_DRIVER", "13.0"),
        ("XT_EMULATOR_NVRTC", "12.0"),
        ("XT_EMULATOR_NVRTC_ARCHS", "75,80,86,89,90"),
    ];
    emulated(here!(), &versions, || runs("compute_90"));
}

#[test]
fn a_gpu_that_no_installed_version_supports() {
    let versions = [
        ("XT_EMULATOR_ARCH", "120"),
        ("XT_EMULATOR_DRIVER", "12.8"),
        ("XT_EMULATOR_NVRTC", "12.9"),
        ("XT_EMULATOR_NVRTC_ARCHS", "75,80,90"),
    ];
    emulated(here!(), &versions, || {
        refuses(&["NVRTC 12.9 does not support", "sm_120", "CUDA 12.8", "nvidia-cuda-nvrtc"])
    });
}

#[test]
fn gpus_and_drivers_that_are_too_old() {
    emulated(here!(), &[("XT_EMULATOR_ARCH", "70")], || refuses(&["sm_70", "sm_75 (Turing) or later", "`cpu`"]));
}

#[test]
fn drivers_that_are_too_old() {
    emulated(here!(), &[("XT_EMULATOR_DRIVER", "11.8")], || refuses(&["CUDA 11.8", "install driver 525 or later"]));
}

/// The library finds machine code that was compiled ahead of time without a card: nothing is compiled.
#[test]
fn code_compiled_ahead_is_found() {
    let folder = std::env::temp_dir().join(format!("xt-ahead-{}", std::process::id()));
    let cache = folder.to_str().expect("a path in Unicode");
    let body = || {
        if let Some(cache) = std::env::var_os("XT_COMPILE_INTO") {
            let affine = KernelSource::named("affine").expect("the source");
            let target = "90a".parse().unwrap_or_else(|error| panic!("{error}"));
            let cached = cubin_in(cache.as_ref(), affine, &[("DTYPE", "f32")], target);
            return assert!(cached.is_ok_and(|cached| cached.unwritten.is_none()), "compiled and kept");
        }
        let device = Device::Gpu(CudaDevice::open(0).unwrap());
        let x = || Tensor::from_slice(&[1f32, 2.0], [2], &device).unwrap();
        let y = x().affine(2.0, 1.0).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(y.to_f64_vec().unwrap(), [3.0, 5.0]);
        // No other one is there, and this compiler fails.
        assert!(x().softmax().unwrap_err().to_string().contains("OUT_OF_MEMORY"), "the compiler was not asked");
    };
    emulated(here!(), &[("XT_COMPILE_INTO", cache)], body);
    let card = [("XT_EMULATOR_ARCH", "90"), ("XT_KERNEL_CACHE", cache), ("XT_EMULATOR_FAIL", "compile+:1")];
    emulated(here!(), &card, body);
    let _ = std::fs::remove_dir_all(&folder);
}

/// A cache folder that others can write to is neither read nor written, and `describe` says so.
#[test]
fn a_cache_that_others_may_write_is_not_read() {
    use std::{fs, os::unix::fs::PermissionsExt};

    let folder = std::env::temp_dir().join(format!("xt-foreign-{}", std::process::id()));
    let cache = folder.to_str().expect("a path in Unicode");
    emulated(here!(), &[("XT_KERNEL_CACHE", cache)], || {
        let folder = cuda::folder().expect("a folder");
        let affine = KernelSource::named("affine").expect("the source");
        let get = || cubin_in(&folder, affine, &[("DTYPE", "f32")], Target::of(80)).unwrap();
        let mode =
            |path: &std::path::Path, mode: u32| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        assert!(!get().found);
        assert_eq!(fs::metadata(&folder).unwrap().permissions().mode() & 0o777, 0o700, "a cache is the user's own");
        assert!(get().found);
        for wrong in [0o777, 0o1777, 0o775, 0o702] {
            mode(&folder, wrong);
            let cached = get();
            assert!(!cached.found, "mode {wrong:o}");
            let why = cached.unwritten.expect("a reason").to_string();
            assert!(why.contains("is writable by others") && why.contains("chmod 700"), "{why}");
            assert!(describe().iter().any(|line| line.contains("is writable by others")));
        }
        // A file that others may write, in a folder that others may enter.
        let file = fs::read_dir(&folder).unwrap().next().expect("a file").unwrap().path();
        for (of_folder, of_file, found) in [(0o755, 0o644, true), (0o755, 0o666, false), (0o700, 0o666, true)] {
            mode(&folder, of_folder);
            mode(&file, of_file);
            assert_eq!(get().found, found, "{of_folder:o} {of_file:o}");
        }
        // Of another user.
        if std::os::unix::fs::chown(&folder, Some(12345), None).is_ok() {
            let why = get().unwritten.expect("a reason").to_string();
            assert!(why.contains("belongs to user 12345"), "{why}");
            std::os::unix::fs::chown(&folder, Some(0), None).unwrap();
        }
        fs::remove_dir_all(&folder).unwrap();
    });
}
