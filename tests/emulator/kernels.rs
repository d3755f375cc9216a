//! The library and its kernels on the emulated card, beside the same on the CPU. The contract suite does this for every
//! op, where it is told to; these few run with the emulator's own tests.

use x_transformers::{DType, Device, Result, Tape, Tensor};

use crate::emulated;

/// Softmax of rows of every kind, and its gradient.
fn softmax(device: &Device, dtype: DType, columns: usize) -> Result<Vec<f64>> {
    let value = |i: usize| match (i / columns, i % columns) {
        // A row that a mask filled, one with a single value that counts, and one that starts with -inf.
        (0, _) => -65504.0,
        (1, column) if column + 1 < columns => f64::NEG_INFINITY,
        (2, column) if column % 3 == 0 && column + 1 < columns => f64::NEG_INFINITY,
        _ => ((i * 37 + i * i) % 64) as f64 / 8.0 - 4.0,
    };
    let x = Tensor::generate([5, columns], dtype, device, value)?.requires_grad()?;
    let mut tape = Tape::grad();
    let y = x.softmax()?;
    let weights = Tensor::generate([5, columns], dtype, device, |i| (i % 5) as f64 - 2.0)?;
    let grads = tape.backward(&y.mul(&weights)?.sum(&[])?)?;
    let mut values = y.to_f64_vec()?;
    values.extend(grads.get(&x).expect("a gradient").to_f64_vec()?);
    Ok(values)
}

emulated! {
    fn softmax_follows_the_cpu() {
        let gpu = Device::cuda(0).unwrap();
        for (dtype, bound) in [(DType::F64, 1e-14), (DType::F32, 1e-6), (DType::BF16, 8e-3), (DType::F16, 1e-3)] {
            for columns in [1, 7, 64, 203, 1040] {
                let actual = softmax(&gpu, dtype, columns).unwrap();
                let expected = softmax(&Device::Cpu, dtype, columns).unwrap();
                let error = actual.iter().zip(&expected).map(|(a, e)| (a - e).powi(2)).sum::<f64>().sqrt();
                assert!(error <= bound, "{dtype} {columns}: {error:e}");
            }
        }
    }

    fn copies_and_dropout_are_those_of_the_cpu() {
        let values = |device: &Device, dtype: DType| -> Result<Vec<Vec<f64>>> {
            let x = Tensor::generate([4, 6, 16], dtype, device, |i| (i % 100) as f64)?;
            let mut values = vec![
                x.transpose(0, 2)?.contiguous()?.to_f64_vec()?,
                x.narrow(1, 2, 3)?.contiguous()?.to_f64_vec()?,
                x.narrow(0, 1, 1)?.expand([5, 6, 16])?.contiguous()?.to_f64_vec()?,
            ];
            if dtype.is_float() {
                let _tape = Tape::train(3);
                values.push(x.dropout(0.4)?.to_f64_vec()?);
            }
            Ok(values)
        };
        let gpu = Device::cuda(0).unwrap();
        for dtype in [DType::F64, DType::F32, DType::BF16, DType::F16, DType::I64, DType::Bool] {
            assert_eq!(values(&gpu, dtype).unwrap(), values(&Device::Cpu, dtype).unwrap(), "{dtype}");
        }
    }
}
