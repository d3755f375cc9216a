//! The library and its kernels on the emulated card, compared with the CPU. The contract suite does this for every op
//! on request; these few run with the emulator's own tests.

use x_transformers::{
    DType, Device, Philox, Result, Tape, Tensor,
    ops::{AttentionSpec, PositionBias, Window, attention, attention_rung},
};

use crate::{emulated, here};

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

#[test]
fn softmax_follows_the_cpu() {
    emulated(here!(), &[], || {
        let gpu = Device::cuda(0).unwrap();
        for (dtype, bound) in [(DType::F64, 1e-14), (DType::F32, 1e-6), (DType::BF16, 8e-3), (DType::F16, 1e-3)] {
            for columns in [1, 7, 64, 203, 1040] {
                let actual = softmax(&gpu, dtype, columns).unwrap();
                let expected = softmax(&Device::Cpu, dtype, columns).unwrap();
                let error = actual.iter().zip(&expected).map(|(a, e)| (a - e).powi(2)).sum::<f64>().sqrt();
                assert!(error <= bound, "{dtype} {columns}: {error:e}");
            }
        }
    });
}

#[test]
fn copies_and_dropout_match_the_cpu() {
    emulated(here!(), &[], || {
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
    });
}

/// Output and gradients of attention, on a device, in a type, of operands that bf16 holds.
fn attend(device: &Device, dtype: DType, [heads, kv_heads, queries, keys, d, e]: [usize; 6]) -> Result<Vec<Vec<f64>>> {
    let random = |stream: u64, shape: [usize; 4]| {
        let random = Philox::new(5, stream);
        let value = |i: usize| half::bf16::from_f64(random.normal(i as u64)).to_f64();
        Tensor::generate(shape, dtype, device, value)?.requires_grad()
    };
    let (q, k) = (random(1, [2, heads, queries, d])?, random(2, [2, kv_heads, keys, d])?);
    let (v, bias) = (random(3, [2, kv_heads, keys, e])?, random(4, [1, heads, queries, keys])?);
    let slopes = Tensor::generate([heads], DType::F32, device, |h| 0.25 / (h + 1) as f64)?;
    // The second sequence has no key in front, and a query without any.
    let key_mask =
        Tensor::from_vec((0..2 * keys).map(|i| i < keys || i > keys + 70).collect::<Vec<_>>(), [2, keys], device)?;
    let mask = Tensor::from_vec((0..queries * keys).map(|i| i % 7 > 0).collect::<Vec<_>>(), [queries, keys], device)?;
    let plain = AttentionSpec { scale: (d as f64).powf(-0.5), ..AttentionSpec::default() };
    let alibi = Some(PositionBias::Alibi { slopes });
    let specs = [
        plain.clone(),
        AttentionSpec { causal: true, key_mask: Some(&key_mask), ..plain.clone() },
        AttentionSpec { causal: true, window: Window::past(40), position_bias: alibi, ..plain.clone() },
        AttentionSpec { mask: Some(&mask), bias: Some(&bias), dropout: 0.2, ..plain },
    ];
    let mut results = Vec::new();
    for spec in specs {
        let mut tape = Tape::train(3);
        let out = attention(&q, &k, &v, &spec)?;
        let grads = tape.backward(&out.mul(&random(6, [2, heads, queries, e])?.detach())?.sum(&[])?)?;
        results.push(out.to_f64_vec()?);
        for x in [&q, &k, &v] {
            results.push(grads.get(x).expect("a gradient").to_f64_vec()?);
        }
    }
    Ok(results)
}

#[test]
fn attention_of_warpgroups_follows_the_cpu() {
    emulated(here!(), &[("XT_EMULATOR_ARCH", "90"), ("XT_ATTENTION", "wgmma")], || {
        let gpu = Device::cuda(0).unwrap();
        for (dtype, sizes, bound) in
            [(DType::BF16, [2, 1, 140, 150, 64, 40], 1e-2), (DType::F16, [2, 2, 70, 200, 72, 128], 2e-3)]
        {
            let rung = attention_rung(&gpu, dtype, sizes[4], sizes[5]).unwrap();
            assert!(rung.starts_with("warpgroup"), "{rung}");
            let actual = attend(&gpu, dtype, sizes).unwrap();
            let expected = attend(&Device::Cpu, DType::F32, sizes).unwrap();
            for (i, (actual, expected)) in actual.iter().zip(&expected).enumerate() {
                let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
                let error = norm(&mut actual.iter().zip(expected).map(|(a, e)| a - e));
                let size = norm(&mut expected.iter().copied());
                let name = ["out", "dq", "dk", "dv"][i % 4];
                assert!(error <= bound * size, "{dtype}, case {}, {name}: {error:e} of {size:e}", i / 4);
            }
        }
    });
}
