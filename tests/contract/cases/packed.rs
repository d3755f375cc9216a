use x_transformers::{DType, Device, ErrorKind, Philox, QuantType, Tensor, ops::PackedMatrix};

use crate::{
    case::{Array, Case, Input},
    common::device,
    refused::{argument, dtype, floats, refused, shape, tokens},
};

fn kinds() -> impl Iterator<Item = QuantType> {
    QuantType::ALL.into_iter().filter(|kind| kind.is_packed())
}

/// A matrix on the device, and its values.
fn matrix(kind: QuantType, rows: usize, columns: usize) -> (PackedMatrix, Vec<f32>) {
    let random = Philox::new(5, kind as u64);
    let weights: Vec<f32> = (0..rows * columns).map(|i| random.normal(i as u64) as f32).collect();
    let blocks = kind.quantize(&weights).expect("whole blocks of finite values");
    let mut values = vec![0.0; rows * columns];
    kind.dequantize(&blocks, &mut values).expect("whole blocks");
    let matrix = PackedMatrix::new(kind, [rows, columns], &blocks).expect("a packed type");
    (matrix.to_device(device()).expect("memory"), values)
}

/// Inputs that rounding to 8 bits leaves as they are: integers, of which each 32 have one of magnitude 127.
fn integers(count: usize, columns: usize) -> Input {
    let random = Philox::new(6, 0);
    let value = |i: usize| if i % 32 == 7 { -127.0 } else { random.below(i as u64, 255) as f64 - 127.0 };
    Input::Values { shape: vec![count, columns], values: (0..count * columns).map(value).collect() }
}

fn linear(kind: QuantType, count: usize, rows: usize, columns: usize) -> Case {
    let (matrix, values) = matrix(kind, rows, columns);
    let inputs = vec![integers(count, columns), Input::float(&[rows])];
    let reference = move |x: &[Array]| {
        Array::from_fn(&[count, rows], |i| {
            let product = |k| x[0].at(&[i[0], k]) * f64::from(values[i[1] * columns + k]);
            (0..columns).map(product).sum::<f64>() + x[1].at(&[i[1]])
        })
    };
    let name = format!("{kind} {count} {rows} {columns}");
    // Gradients on a card are compared with the processor's.
    let run = move |x: &[Tensor]| matrix.to_device(x[0].device())?.linear(&x[0], Some(&x[1]));
    Case::new("packed_linear", name, inputs, run, reference)
}

fn embedding(kind: QuantType, indices: &[usize]) -> Case {
    let (rows, columns) = (19, 256);
    let (matrix, values) = matrix(kind, rows, columns);
    let inputs = vec![Input::int(indices, rows as u64), Input::Values { shape: vec![], values: vec![0.0] }];
    let shape = [indices, &[columns]].concat();
    let reference = move |x: &[Array]| {
        Array::from_fn(&shape, |i| {
            let (k, at) = i.split_last().expect("rank 1 or more");
            f64::from(values[x[0].at(at) as usize * columns + k])
        })
    };
    // The second input only names the dtype.
    Case::new("packed_embedding", kind.name(), inputs, move |x| matrix.embedding(&x[0], x[1].dtype()), reference)
}

pub fn cases() -> Vec<Case> {
    let mut cases: Vec<Case> = kinds().map(|kind| linear(kind, 3, 21, 512)).collect();
    // More than a GPU takes without dequantising, and more than a panel is deep; no inputs; no rows.
    cases.extend([
        linear(QuantType::Q4_1, 20, 35, 1056),
        linear(QuantType::Q6K, 9, 16, 1280),
        linear(QuantType::Q8_0, 0, 5, 64),
        linear(QuantType::Q5_0, 2, 0, 96),
        linear(QuantType::Q4_0, 1, 1, 32),
    ]);
    cases.extend(kinds().map(|kind| embedding(kind, &[2, 5])));
    cases.push(embedding(QuantType::Q4_0, &[0, 3]));
    cases
}

#[test]
fn errors() {
    let _alone = crate::alone();
    let (matrix, _) = matrix(QuantType::Q8_0, 5, 64);
    for bad in [5, -1] {
        refused(
            matrix.embedding(&tokens(&[0, bad]), DType::F32),
            |error| matches!(error.kind(), ErrorKind::Index { what: "token", limit: 5, .. }),
            &["embedding", &format!("token {bad}"), "0 to 4"],
        );
    }
    refused(matrix.embedding(&floats(&[2]), DType::F32), dtype, &["packed_embedding", "i64", "f32"]);
    refused(matrix.embedding(&tokens(&[0]), DType::I64), dtype, &["i64"]);
    refused(matrix.dequantize(DType::Bool), dtype, &["bool"]);
    refused(matrix.linear(&floats(&[2, 63]), None), shape, &["packed_linear", "[.., 64]", "[2, 63]"]);
    refused(matrix.linear(&tokens(&[0; 64]), None), shape, &["packed_linear", "i64"]);
    refused(matrix.linear(&floats(&[2, 64]), Some(&floats(&[4]))), shape, &["packed_linear", "bias [5]", "[4]"]);
    let packed = |kind, shape, bytes: usize| PackedMatrix::new(kind, shape, &vec![0; bytes])?.dequantize(DType::F32);
    refused(packed(QuantType::Q2K, [1, 256], 84), argument, &["Q2_K", "dequantise"]);
    refused(packed(QuantType::Q4K, [1, 255], 0), shape, &["blocks of 256", "255"]);
    refused(packed(QuantType::Q4_0, [2, 32], 35), argument, &["2 rows of 18 bytes", "35"]);
    refused(
        PackedMatrix::new(QuantType::Q8_0, [1, 32], &[0xFF; 34]).and_then(|w| w.dequantize(DType::F32)),
        argument,
        &["finite"],
    );
    let weight = Tensor::full([2, 32], f64::NAN, DType::F32, &Device::Cpu).expect("memory");
    let quantized = |weight: &Tensor| PackedMatrix::quantize(weight, QuantType::Q8_0)?.dequantize(DType::F32);
    refused(quantized(&weight), argument, &["finite"]);
    refused(quantized(&floats(&[32])), shape, &["[out, in]"]);
}
