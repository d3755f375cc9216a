//! What happens when the driver fails: an error, nothing lost, and everything works again afterwards.
//!
//! Only the emulated driver fails on demand: `XT_TEST_DEVICE=cuda:0 scripts/emulated cargo test --test cuda_faults`.

#![cfg(feature = "cuda")]

use std::{ffi::CString, fs, io::Write, path::PathBuf, process::Command, sync::Mutex};

use x_transformers::{
    DType, Device, Error, Result,
    config::{AttentionLayersConfig, AutoregressiveConfig, TransformerWrapperConfig},
    train::{ByteText, Checkpoint, TrainOptions, Trainer},
};

/// The driver's counters are those of the process.
static ALONE: Mutex<()> = Mutex::new(());

/// The emulated device, or a note that there is none.
fn gpu(test: &str) -> Option<Device> {
    let device = std::env::var("XT_TEST_DEVICE").ok().filter(|name| name != "cpu");
    match device {
        Some(name) if std::env::var_os("XT_EMULATOR").is_some() => Some(Device::parse(&name).expect("a device")),
        _ => {
            // Straight to the stream: the harness hides what a passing test prints.
            let _ = writeln!(std::io::stderr(), "skipped: {test}: only the emulated driver fails on demand");
            None
        }
    }
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
fn fail(kind: &str, n: u64) {
    let arrange: unsafe extern "C" fn(*const std::ffi::c_char, u64) -> i32 = exported("xt_emulator_fail");
    let kind = CString::new(kind).expect("a name");
    // SAFETY: the text ends with a zero.
    assert_eq!(unsafe { arrange(kind.as_ptr(), n) }, 1);
}

fn count(kind: &str) -> u64 {
    let get: unsafe extern "C" fn(*const std::ffi::c_char) -> u64 = exported("xt_emulator_count");
    let kind = CString::new(kind).expect("a name");
    // SAFETY: the text ends with a zero.
    unsafe { get(kind.as_ptr()) }
}

struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("xt-cuda-faults-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        Self(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn text() -> Result<ByteText> {
    ByteText::from_bytes("the cat sat on the mat and looked at the hat. ".repeat(40).into_bytes())
}

fn trainer(device: &Device) -> Result<Trainer> {
    let mut layers = AttentionLayersConfig { heads: 2, rel_pos_bias: true, ..AttentionLayersConfig::decoder(16, 1) };
    layers.attn.dim_head = 8;
    layers.attn.dropout = 0.1;
    let net = TransformerWrapperConfig { num_tokens: 256, max_seq_len: 8, attn_layers: layers, ..Default::default() };
    let options = TrainOptions { steps: 1000, batch_size: 2, seq_len: 8, dtype: DType::BF16, ..Default::default() };
    Trainer::new(AutoregressiveConfig { net, ..Default::default() }, options, text()?, device)
}

/// One step and a checkpoint of it, with the driver failing at call after call, until it runs through.
#[test]
fn every_failing_call_is_an_error_and_costs_nothing() -> Result<()> {
    let Some(gpu) = gpu("every_failing_call_is_an_error_and_costs_nothing") else { return Ok(()) };
    let _alone = ALONE.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    // Every allocation asks the driver.
    gpu.set_cache_limit(0);
    let folder = Folder::new("calls");
    let mut first = trainer(&gpu)?;
    first.step()?;
    first.save(&folder.0)?;
    drop(first);
    // The `+` makes all later ones fail too: a single failure is made good by giving the cache back.
    for kind in ["alloc+", "launch", "copy"] {
        let (mut n, live) = (1, gpu.memory().live);
        loop {
            let mut trainer = Trainer::resume(&folder.0, text()?, &gpu)?;
            let step = trainer.steps_done();
            let before = count(kind);
            fail(kind, n);
            let outcome = trainer.step().and_then(|_| trainer.save(&folder.0));
            fail(kind, 0);
            let calls = count(kind) - before;
            drop(trainer);
            assert_eq!(gpu.memory().live, live, "{kind} {n}: memory is left");
            let saved = Checkpoint::load(&folder.0)?.training.step;
            if calls < n {
                outcome?;
                assert_eq!(saved, step + 1);
                break;
            }
            let Err(error) = outcome else {
                panic!("{kind} {n}: no error, {calls} calls, saved {saved}, before {step}")
            };
            let right = match (kind, error.root()) {
                ("alloc+", Error::OutOfMemory { requested, .. }) => *requested > 0,
                ("launch" | "copy", Error::Device { op: "cuda", message }) => {
                    message.contains("CUDA_ERROR") || message.contains("CUBLAS_STATUS")
                }
                _ => false,
            };
            assert!(right, "{kind} {n}: {error}");
            assert_eq!(saved, step, "{kind} {n}: what was saved is whole, and that of the step before");
            n += 1;
        }
        assert!(n > 10, "{kind}: a step has {n} of them");
    }
    gpu.set_cache_limit(usize::MAX);
    Ok(())
}

/// A single allocation that fails is made good by giving back what is kept for reuse.
#[test]
fn an_allocation_that_fails_once_is_made_good() -> Result<()> {
    let Some(gpu) = gpu("an_allocation_that_fails_once_is_made_good") else { return Ok(()) };
    let _alone = ALONE.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let run = |failing: bool| -> Result<f64> {
        let mut trainer = trainer(&gpu)?;
        trainer.step()?;
        gpu.trim();
        let mut loss = 0.0;
        for _ in 0..3 {
            fail("alloc", if failing { 5 } else { 0 });
            loss = trainer.step()?.loss;
            fail("alloc", 0);
        }
        Ok(loss)
    };
    assert_eq!(run(true)?.to_bits(), run(false)?.to_bits());
    Ok(())
}

/// A kernel that cannot be compiled is an error, and is compiled when it is needed again.
#[test]
fn a_compilation_that_fails_is_repeated() -> Result<()> {
    let Some(gpu) = gpu("a_compilation_that_fails_is_repeated") else { return Ok(()) };
    if std::env::var("XT_KERNEL_CACHE").as_deref() != Ok("off") {
        // In a process of its own, which has no kernels yet and finds none on the disk.
        let this = std::env::current_exe().expect("the path of this test");
        let arguments = ["a_compilation_that_fails_is_repeated", "--exact"];
        let output = Command::new(this).args(arguments).env("XT_KERNEL_CACHE", "off").output().expect("a process");
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success() && out.contains("1 passed"), "{out}{err}");
        return Ok(());
    }
    let mut failures = 0;
    loop {
        // The first of those that are missing succeeds, and stays.
        fail("compile", if failures == 0 { 1 } else { 2 });
        let outcome = trainer(&gpu).and_then(|mut trainer| trainer.step());
        fail("compile", 0);
        match outcome {
            Ok(_) => break,
            Err(error) => assert!(error.to_string().contains("kernels"), "{error}"),
        }
        failures += 1;
        assert!(failures < 1000, "no end");
    }
    assert!(failures > 10, "{failures}");
    trainer(&gpu)?.step()?;
    Ok(())
}
