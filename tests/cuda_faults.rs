//! Driver failures: each is an error, leaks nothing, and everything works again afterwards.
//!
//! Only the emulated driver fails on demand: `XT_TEST_DEVICE=cuda:0 scripts/emulated cargo test --test cuda_faults`.

#![cfg(feature = "cuda")]

#[path = "common/gpu.rs"]
mod common;

use std::{fs, path::PathBuf, process::Command, sync::Barrier, thread};

use common::{alive, clear, count, emulated, fail, live_bytes};
use x_transformers::{
    DType, Device, Error, ErrorKind, RawKernel, Result, Tensor,
    config::{AttentionLayersConfig, AutoregressiveConfig, TransformerWrapperConfig},
    device::{Grid, kernels::KernelSource},
    train::{ByteText, Checkpoint, TrainOptions, Trainer},
};

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
    let Some(gpu) = emulated("every_failing_call_is_an_error_and_costs_nothing") else { return Ok(()) };
    // Every allocation asks the driver.
    gpu.set_cache_limit(0);
    let folder = Folder::new("calls");
    let mut first = trainer(&gpu)?;
    first.step()?;
    first.save(&folder.0)?;
    drop(first);
    // The `+` makes all later ones fail too: a single failure is recovered by freeing the cache.
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
            let right = match (kind, error.kind()) {
                ("alloc+", ErrorKind::OutOfMemory { requested, .. }) => *requested > 0,
                ("launch" | "copy", ErrorKind::Device { op: "cuda", message }) => {
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

/// A single failed allocation is recovered by freeing the memory kept for reuse.
#[test]
fn an_allocation_that_fails_once_is_retried() -> Result<()> {
    let Some(gpu) = emulated("an_allocation_that_fails_once_is_retried") else { return Ok(()) };
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

/// Runs a test of this file with a variable that tells it so.
fn in_a_process_of_its_own(test: &str, variable: &str, value: &str) {
    let this = std::env::current_exe().expect("the path of this test");
    let output = Command::new(this).args([test, "--exact"]).env(variable, value).output().expect("a process");
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && out.contains("1 passed"), "{out}{err}");
}

/// A device that cannot be opened leaks nothing, however often it is tried.
#[test]
fn a_device_that_fails_to_open_leaves_nothing() -> Result<()> {
    const NAME: &str = "a_device_that_fails_to_open_leaves_nothing";
    if std::env::var_os("XT_EMULATOR").is_none() || std::env::var_os("XT_TEST_OPENING").is_none() {
        if emulated(NAME).is_some() {
            // In a process that has not opened it.
            in_a_process_of_its_own(NAME, "XT_TEST_OPENING", "1");
        }
        return Ok(());
    }
    let left = || (["context", "stream", "event", "blas", "pinned"].map(alive), live_bytes());
    assert_eq!(left(), ([0; 5], 0));
    // The words of faults and their zeros, cuBLAS and its workspace.
    for (kind, n) in [("alloc", 1), ("copy", 1), ("blas", 1), ("alloc", 2)] {
        for _ in 0..3 {
            fail(kind, n);
            let error = Device::cuda(0).expect_err("the driver fails");
            fail(kind, 0);
            assert_eq!(left(), ([0; 5], 0), "{kind} {n}: {error}");
        }
    }
    let gpu = Device::cuda(0)?;
    assert_eq!(Tensor::ones([3], DType::F32, &gpu)?.to_vec::<f32>()?, [1.0; 3]);
    // cuBLAS and cuBLASLt.
    assert_eq!(["context", "stream", "blas"].map(alive), [1, 1, 2]);
    Ok(())
}

/// A kernel is loaded once, even by threads that need it at the same time, and not at all if it is incomplete.
#[test]
fn modules_are_loaded_once() -> Result<()> {
    let Some(gpu) = emulated("modules_are_loaded_once") else { return Ok(()) };
    let x = Tensor::ones([2, 4], DType::F64, &gpu)?;
    let before = alive("module");
    for _ in 0..3 {
        fail("function", 1);
        assert!(x.softmax().is_err());
        fail("function", 0);
        assert_eq!(alive("module"), before);
    }
    let barrier = Barrier::new(4);
    thread::scope(|scope| {
        let softmax = || {
            barrier.wait();
            x.softmax()?.to_vec::<f64>()
        };
        let threads = [(); 4].map(|()| scope.spawn(softmax));
        for thread in threads {
            assert_eq!(thread.join().expect("no panic")?, [0.25; 8]);
        }
        Ok::<_, Error>(())
    })?;
    assert_eq!(alive("module"), before + 1);
    Ok(())
}

/// Failing to allocate page-locked memory is an error of the upload, and the next one tries again.
#[test]
fn an_upload_without_page_locked_memory_is_an_error() -> Result<()> {
    const NAME: &str = "an_upload_without_page_locked_memory_is_an_error";
    if std::env::var_os("XT_TEST_PINNING").is_none() {
        if emulated(NAME).is_some() {
            // In a process that has uploaded nothing.
            in_a_process_of_its_own(NAME, "XT_TEST_PINNING", "1");
        }
        return Ok(());
    }
    let Some(gpu) = emulated(NAME) else { return Ok(()) };
    let values: Vec<i64> = (0..1 << 18).collect();
    let mut failures = 0;
    let uploaded = loop {
        fail("pin", if failures == 0 { 1 } else { 2 });
        let outcome = Tensor::from_slice(&values, [values.len()], &gpu);
        fail("pin", 0);
        match outcome {
            Ok(tensor) => break tensor,
            Err(error) => assert!(error.to_string().contains("cuMemHostAlloc"), "{error}"),
        }
        assert_eq!(alive("event"), alive("pinned"));
        failures += 1;
    };
    assert!(failures > 1 && uploaded.to_vec::<i64>()? == values, "{failures}");
    Ok(())
}

/// A rung of the ladder returns an error for tensors that it cannot take. Only the emulated driver detects other broken
/// promises of its caller: the context is lost, and an allocation reports that, not that memory has run out.
#[test]
fn an_allocation_in_a_lost_context_is_not_out_of_memory() -> Result<()> {
    let Some(gpu) = emulated("an_allocation_in_a_lost_context_is_not_out_of_memory") else { return Ok(()) };
    gpu.set_cache_limit(0);
    let source = KernelSource::of_lab("softmax_rungs_thread").expect("a source").source;
    let rung = RawKernel::new(&gpu, source, "softmax_rungs_thread", &[("DTYPE", "f32")])?;
    let (x, mut y) = (Tensor::ones([64, 64], DType::F32, &gpu)?, Tensor::zeros([64, 64], DType::F32, &gpu)?);
    let mut launch = |x: &Tensor, rows: i64| {
        let args = [(&mut y).into(), x.into(), rows.into(), 64u32.into()];
        // SAFETY: the emulated driver checks every access of the kernel.
        unsafe { rung.launch(Grid::new([2, 1, 1], [64, 1, 1]), args) }
    };
    let elsewhere = launch(&x.to_device(&Device::Cpu)?, 64).unwrap_err();
    assert!(elsewhere.to_string().contains("on cpu"), "{elsewhere}");
    let strided = launch(&x.transpose(0, 1)?, 64).unwrap_err();
    assert!(strided.to_string().contains("contiguous"), "{strided}");
    launch(&x, 64)?;
    assert!(launch(&x, 128).is_err());
    let error = Tensor::zeros([100], DType::F32, &gpu).unwrap_err();
    clear();
    assert!(error.to_string().contains("CUDA_ERROR_ILLEGAL_ADDRESS"), "{error}");
    assert_eq!(Tensor::zeros([100], DType::F32, &gpu)?.to_vec::<f32>()?, [0.0; 100]);
    Ok(())
}

/// A kernel that fails to compile is an error, and is compiled again the next time it is needed.
#[test]
fn a_compilation_that_fails_is_repeated() -> Result<()> {
    let Some(gpu) = emulated("a_compilation_that_fails_is_repeated") else { return Ok(()) };
    if std::env::var("XT_KERNEL_CACHE").as_deref() != Ok("off") {
        // In a process that has no kernels yet and finds none on the disk.
        in_a_process_of_its_own("a_compilation_that_fails_is_repeated", "XT_KERNEL_CACHE", "off");
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
