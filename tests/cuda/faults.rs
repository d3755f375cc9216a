//! Faults that kernels meet: errors at the next read-back, of the thread that launched them or uses what they computed.

use std::thread;

use x_transformers::{DType, Device, Error, ErrorKind, RawKernel, Result, Tensor, device::Grid};

use super::common::gpu;

const COPY: &str = "extern \"C\" __global__ void copy(float* __restrict__ y, const float* __restrict__ x) {\n\
    \x20   y[threadIdx.x] = x[threadIdx.x];\n}\n";

#[test]
fn an_index_out_of_range_is_an_error_at_the_next_read_back() -> Result<()> {
    let Some(gpu) = gpu("an_index_out_of_range_is_an_error_at_the_next_read_back") else { return Ok(()) };
    let table = Tensor::ones([4, 3], DType::F32, &gpu)?;
    for index in [4i64, -1, i64::MAX, i64::MIN] {
        let tokens = Tensor::from_slice(&[1, index], [2], &gpu)?;
        let rows = table.embedding(&tokens)?;
        let error = rows.to_vec::<f32>().unwrap_err();
        assert!(
            matches!(error.kind(), ErrorKind::Index { op: "embedding", index: at, limit: 4, .. } if *at == index),
            "{error}"
        );
        assert_eq!(table.to_vec::<f32>()?, [1.0; 12], "the error is reported once");
    }
    let logits = Tensor::ones([2, 3], DType::F32, &gpu)?;
    let loss = logits.cross_entropy(&Tensor::from_slice(&[0i64, 3], [2], &gpu)?, -100)?;
    let error = loss.item().unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Index { op: "cross_entropy", index: 3, limit: 3, .. }), "{error}");
    gpu.synchronize()
}

/// Enqueues the lookup of a row that a table of four does not have.
fn lookup(index: i64, gpu: &Device) -> Result<Tensor> {
    Tensor::ones([4, 3], DType::F32, gpu)?.embedding(&Tensor::from_slice(&[index], [1], gpu)?)
}

fn is_index(error: &Error, index: i64) -> bool {
    matches!(error.kind(), ErrorKind::Index { op: "embedding", index: at, limit: 4, .. } if *at == index)
}

/// A thread that shares nothing with the one at fault but the device.
#[test]
fn a_fault_is_an_error_of_its_own_thread() -> Result<()> {
    let Some(gpu) = gpu("a_fault_is_an_error_of_its_own_thread") else { return Ok(()) };
    let (mine, other) = (lookup(40, &gpu)?, &gpu);
    let work = || -> Result<()> {
        let fine = lookup(3, other)?;
        other.synchronize()?;
        assert_eq!(fine.to_vec::<f32>()?, [1.0; 3]);
        // A later fault is not hidden by the one that came before it elsewhere.
        let error = lookup(41, other)?.to_vec::<f32>().unwrap_err();
        assert!(is_index(&error, 41), "{error}");
        Ok(())
    };
    thread::scope(|scope| scope.spawn(work).join().unwrap())?;
    let error = mine.to_vec::<f32>().unwrap_err();
    assert!(is_index(&error, 40), "{error}");
    gpu.synchronize()
}

/// Threads that use a thread's tensors hear of its faults, also through a third one's, and so does the thread itself.
#[test]
fn a_fault_is_an_error_of_whoever_uses_the_tensor() -> Result<()> {
    let Some(gpu) = gpu("a_fault_is_an_error_of_whoever_uses_the_tensor") else { return Ok(()) };
    for through_a_third in [false, true] {
        let rows = lookup(50, &gpu)?;
        let relayed = match through_a_third {
            false => rows,
            true => thread::scope(|scope| scope.spawn(|| rows.affine(2.0, 0.0)).join().unwrap())?,
        };
        let read = thread::scope(|scope| scope.spawn(|| relayed.to_vec::<f32>()).join().unwrap());
        let error = read.unwrap_err();
        assert!(is_index(&error, 50), "{error}");
        let error = gpu.synchronize().unwrap_err();
        assert!(is_index(&error, 50), "{error}");
        gpu.synchronize()?;
    }
    Ok(())
}

/// A tensor that another thread writes to, and hands back.
#[test]
fn a_fault_is_an_error_of_whoever_reads_what_was_written() -> Result<()> {
    let Some(gpu) = gpu("a_fault_is_an_error_of_whoever_reads_what_was_written") else { return Ok(()) };
    let kernel = RawKernel::new(&gpu, COPY, "copy", &[])?;
    let mut written = Tensor::zeros([1, 3], DType::F32, &gpu)?;
    let write = || -> Result<()> {
        let rows = lookup(60, &gpu)?;
        // SAFETY: both have three elements.
        unsafe { kernel.launch(Grid::new([1, 1, 1], [3, 1, 1]), [(&mut written).into(), (&rows).into()]) }
    };
    thread::scope(|scope| scope.spawn(write).join().unwrap())?;
    let error = written.to_vec::<f32>().unwrap_err();
    assert!(is_index(&error, 60), "{error}");
    gpu.synchronize()
}
