//! Every memory-bound op, forward and backward, as a share of the bandwidth of a copy.
//!
//! `cargo bench --bench ops -- softmax` times one op. Counts only the bytes that the formula must read and write; an op
//! on tensors that fit the caches can exceed the peak.

mod peak;

use std::{
    hint::black_box,
    time::{Duration, Instant},
};

use criterion::{Criterion, criterion_group, criterion_main};
use peak::{Group, Work};
use x_transformers::{
    DType, Device, Init, IntoShape, ParamStore, Philox, QuantType, Result, Tape, Tensor,
    ops::{Activation, NAMES, PackedMatrix, SampleFilter, SampleSpec, UNARY},
    train::{AdamW, AdamWOptions, Optimizer},
};

/// Ops whose benchmarks count operations, each in a separate file.
const ELSEWHERE: [&str; 6] = ["attention", "attention_decode", "matmul", "linear", "packed_linear", "packed_embedding"];

/// Activations of eight sequences.
const X: &[usize] = &[8, 512, 1024];

/// Three gates for each activation.
const GATES: &[usize] = &[8, 512, 3072];

/// An input of an op.
#[derive(Clone, Copy)]
enum Input {
    /// Differentiated, uniform in `0.5..1.5`, so that every function is defined.
    Float(&'static [usize]),
    /// The same, not differentiated.
    Constant(&'static [usize]),
    Mask(&'static [usize]),
    /// Integers below 1024.
    Tokens(&'static [usize]),
}

impl Input {
    fn tensor(self, float: DType) -> Result<Tensor> {
        let random = Philox::new(0, 0);
        let draw = |shape: &[usize], dtype, f: &dyn Fn(f64) -> f64| {
            Tensor::generate(shape.into_shape()?, dtype, &Device::Cpu, |i| f(random.uniform(i as u64)))
        };
        match self {
            Self::Float(shape) => draw(shape, float, &|u| 0.5 + u)?.requires_grad(),
            Self::Constant(shape) => draw(shape, float, &|u| 0.5 + u),
            Self::Tokens(shape) => draw(shape, DType::I64, &|u| (1024.0 * u).floor()),
            Self::Mask(shape) => draw(shape, DType::Bool, &|u| (u < 0.5) as u8 as f64),
        }
    }
}

type Run = Box<dyn Fn(&[Tensor]) -> Result<Tensor>>;

/// An op, and the number of tensors of the size of its first input that its backward pass reads besides the gradient;
/// `None` for ops without gradient.
struct Op {
    name: &'static str,
    inputs: Vec<Input>,
    saved: Option<usize>,
    run: Run,
}

fn op(name: &'static str, inputs: &[Input], saved: Option<usize>, run: fn(&[Tensor]) -> Result<Tensor>) -> Op {
    Op { name, inputs: inputs.to_vec(), saved, run: Box::new(run) }
}

fn ops() -> Vec<Op> {
    use Input::{Constant, Float, Mask, Tokens};
    let (x, two, row) = ([Float(X)], [Float(X), Float(X)], [Float(X), Float(&[1024])]);
    let masks = [Mask(X), Mask(X)];
    let mut ops = vec![
        op("add_activation", &row, Some(1), |x| x[0].add_activation(&x[1], Activation::Gelu)),
        op("contiguous", &x, Some(0), |x| x[0].transpose(1, 2)?.contiguous()),
        op("to_dtype", &x, Some(0), |x| {
            x[0].to_dtype(if x[0].dtype() == DType::F32 { DType::BF16 } else { DType::F32 })
        }),
        op("cat", &two, Some(0), |x| Tensor::cat(&[&x[0], &x[1]], -1)),
        op("cross_entropy", &[Float(X), Tokens(&[8, 512])], Some(1), |x| x[0].cross_entropy(&x[1], -100)),
        op("dropout", &x, Some(0), |x| x[0].dropout(0.1)),
        op("dropout_add", &two, Some(0), |x| x[0].dropout_add(&x[1], 0.1)),
        op("embedding", &[Float(&[1024, 1024]), Tokens(&[8, 512])], Some(0), |x| x[0].embedding(&x[1])),
        op("entmax15", &x, Some(1), |x| x[0].entmax15()),
        op("glu", &x, Some(1), |x| x[0].glu(Activation::Gelu)),
        op("add_glu", &row, Some(1), |x| x[0].add_glu(&x[1], Activation::Gelu)),
        op("gru_gate", &[Float(X), Float(GATES), Float(GATES)], Some(7), |x| x[0].gru_gate(&x[1], &x[2])),
        op("linear_cross_entropy", &[Float(X), Float(&[4096, 1024]), Tokens(&[8, 512])], Some(2), |x| {
            x[0].linear_cross_entropy(&x[1], None, &x[2], -100)
        }),
        op("layer_norm", &[Float(X), Float(&[1024]), Float(&[1024])], Some(1), |x| {
            x[0].layer_norm(Some(&x[1]), Some(&x[2]), 1e-5)
        }),
        op("clamped_rms_norm", &row, Some(1), |x| x[0].clamped_rms_norm(&x[1], 1e-8)),
        op("rms_norm", &row, Some(1), |x| x[0].rms_norm(&x[1], 1e-6)),
        op("scale_norm", &[Float(X), Float(&[1])], Some(1), |x| x[0].scale_norm(&x[1], 1e-5)),
        op("add_layer_norm", &[Float(X), Constant(X), Float(&[1024]), Float(&[1024])], Some(1), |x| {
            Ok(x[0].add_layer_norm(&x[1], Some(&x[2]), Some(&x[3]), 1e-5)?.1)
        }),
        op("add_clamped_rms_norm", &[Float(X), Constant(X), Float(&[1024])], Some(1), |x| {
            Ok(x[0].add_clamped_rms_norm(&x[1], &x[2], 1e-8)?.1)
        }),
        op("add_rms_norm", &[Float(X), Constant(X), Float(&[1024])], Some(1), |x| {
            Ok(x[0].add_rms_norm(&x[1], &x[2], 1e-6)?.1)
        }),
        op("add_scale_norm", &[Float(X), Constant(X), Float(&[1])], Some(1), |x| {
            Ok(x[0].add_scale_norm(&x[1], &x[2], 1e-5)?.1)
        }),
        op("affine", &x, Some(0), |x| x[0].affine(0.5, 1.0)),
        op("add", &row, Some(0), |x| x[0].add(&x[1])),
        op("sub", &two, Some(0), |x| x[0].sub(&x[1])),
        op("mul", &two, Some(2), |x| x[0].mul(&x[1])),
        op("div", &two, Some(2), |x| x[0].div(&x[1])),
        op("eq", &two, None, |x| x[0].detach().eq(&x[1].detach())),
        op("ne", &two, None, |x| x[0].detach().ne(&x[1].detach())),
        op("lt", &two, None, |x| x[0].detach().lt(&x[1].detach())),
        op("le", &two, None, |x| x[0].detach().le(&x[1].detach())),
        op("gt", &two, None, |x| x[0].detach().gt(&x[1].detach())),
        op("ge", &two, None, |x| x[0].detach().ge(&x[1].detach())),
        op("logical_and", &masks, None, |x| x[0].logical_and(&x[1])),
        op("logical_or", &masks, None, |x| x[0].logical_or(&x[1])),
        op("logical_not", &[Mask(X)], None, |x| x[0].logical_not()),
        op("where_cond", &[Mask(X), Float(X), Float(X)], Some(1), |x| x[0].where_cond(&x[1], &x[2])),
        op("masked_fill", &[Float(X), Mask(&[8, 1, 1024])], Some(0), |x| x[0].masked_fill(&x[1], -1.0)),
        op("relative_position_bias", &[Float(&[32, 8])], Some(0), |x| {
            x[0].relative_position_bias(512, 512, true, 128, 8.0)
        }),
        op("sinusoid", &[Constant(&[512])], None, |x| x[0].sinusoid(0, 4096, DType::F32)),
        op("sum", &x, Some(0), |x| x[0].sum(&[-1])),
        op("mean", &x, Some(0), |x| x[0].mean(&[-1])),
        op("sum_to", &x, Some(0), |x| x[0].sum_to([1024].into_shape()?)),
        op("max", &x, Some(0), |x| x[0].max(-1)),
        op("argmax", &x, None, |x| x[0].detach().argmax(-1)),
        op("rotary", &[Float(&[8, 8, 512, 128]), Constant(&[32])], Some(0), |x| x[0].rotary(&x[1], 0)),
        op("sample", &[Constant(&[8, 32_768])], None, |x| {
            let spec = SampleSpec { filter: SampleFilter::Best(3277), temperature: 0.8, seed: 0 };
            x[0].sample(&spec, &Tensor::scalar(0i64, x[0].device())?)
        }),
        op("shift_tokens", &x, Some(0), |x| x[0].shift_tokens(&[0, 1], None)),
        op("softmax", &x, Some(1), |x| x[0].softmax()),
        op("top_k_mask", &x, None, |x| x[0].detach().top_k_mask(64)),
    ];
    ops.extend(UNARY.iter().map(|&(name, run)| Op {
        name,
        inputs: x.to_vec(),
        saved: Some(usize::from(name != "neg")),
        run: Box::new(move |x| run(&x[0])),
    }));
    ops
}

fn bytes(tensor: &Tensor) -> usize {
    tensor.numel() * tensor.dtype().size()
}

fn bench_op(criterion: &mut Criterion, op: &Op) -> Result<()> {
    let mut group = Group::new(criterion, op.name);
    let dtypes: &[DType] = if matches!(op.inputs[0], Input::Mask(_)) && op.saved.is_none() {
        &[DType::Bool]
    } else {
        &[DType::F32, DType::BF16]
    };
    for &dtype in dtypes {
        let inputs = op.inputs.iter().map(|input| input.tensor(dtype)).collect::<Result<Vec<_>>>()?;
        let output = (op.run)(&inputs)?;
        let read: usize = inputs.iter().map(bytes).sum();
        group.bench(&format!("forward {dtype}"), Work::Bytes(read + bytes(&output)), || {
            let _tape = Tape::train(0);
            (op.run)(&inputs).map(drop).expect("it ran above");
        });
        let Some(saved) = op.saved else { continue };
        let cotangent = Tensor::ones(*output.shape(), output.dtype(), &Device::Cpu)?;
        let leaves = op.inputs.iter().zip(&inputs).filter(|(input, _)| matches!(input, Input::Float(_)));
        let written: usize = leaves.map(|(_, leaf)| bytes(leaf)).sum();
        let traffic = Work::Bytes(bytes(&output) + saved * bytes(&inputs[0]) + written);
        group.bench_part(&format!("backward {dtype}"), traffic, || backward(op, &inputs, &cotangent).expect("it ran"));
    }
    group.finish();
    Ok(())
}

/// Times only the backward pass.
fn backward(op: &Op, inputs: &[Tensor], cotangent: &Tensor) -> Result<Duration> {
    let mut tape = Tape::train(0);
    let output = (op.run)(inputs)?;
    let start = Instant::now();
    let gradients = tape.backward_with(&output, cotangent)?;
    let elapsed = start.elapsed();
    drop(gradients);
    Ok(elapsed)
}

/// A step over eight parameters. It reads the gradients twice, for their norm and for the update, and reads and writes
/// parameters and both moments: eight times four bytes per value.
fn bench_adamw(criterion: &mut Criterion) -> Result<()> {
    let store = ParamStore::new(0, DType::F32, &Device::Cpu);
    let mut tape = Tape::grad();
    let mut loss = Tensor::scalar(0.0f32, &Device::Cpu)?;
    for index in 0..8 {
        let weight = store.at(index).param("weight", [1024, 512], Init::Normal(0.02))?;
        loss = loss.add(&weight.tensor().square()?.sum(&[])?)?;
    }
    let (gradients, params) = (tape.backward(&loss)?, store.params());
    let mut optimizer = AdamW::new(AdamWOptions::default())?;
    let mut group = Group::new(criterion, "adamw");
    group.bench("step f32", Work::Bytes(8 * 4 * params.numel()), || {
        optimizer.step(&params, &gradients, 1e-4, Some(1.0)).map(drop).expect("finite gradients");
    });
    group.finish();
    Ok(())
}

/// Products with quantised weights, one row at a time and many, and rows of a quantised table.
fn bench_packed(criterion: &mut Criterion) -> Result<()> {
    let random = Philox::new(1, 0);
    let normal = |shape: [usize; 2]| Tensor::generate(shape, DType::F32, &Device::Cpu, |i| random.normal(i as u64));
    let weight = normal([2048, 512])?;
    let tokens = Tensor::generate([512], DType::I64, &Device::Cpu, |i| ((i * 7919) % 2048) as f64)?;
    let mut group = Group::new(criterion, "packed");
    for kind in [QuantType::Q8_0, QuantType::Q4_0, QuantType::Q4K] {
        let matrix = PackedMatrix::quantize(&weight, kind)?;
        for rows in [1, 128] {
            let x = normal([rows, 512])?;
            group.bench(&format!("packed_linear {kind}, {rows} rows"), Work::Flops(2 * rows * weight.numel()), || {
                black_box(matrix.linear(&x, None)).map(drop).expect("memory");
            });
        }
        group.bench(&format!("packed_embedding {kind}"), Work::Bytes(512 * 512 * 4), || {
            black_box(matrix.embedding(&tokens, DType::F32)).map(drop).expect("memory");
        });
    }
    group.finish();
    Ok(())
}

fn bench_ops(criterion: &mut Criterion) {
    let ops = ops();
    for name in NAMES {
        let known = ELSEWHERE.contains(name) || ops.iter().any(|op| op.name == *name);
        assert!(known, "op `{name}` has no benchmark");
    }
    for op in &ops {
        if let Err(error) = bench_op(criterion, op) {
            panic!("{}: {error}", op.name);
        }
    }
    if let Err(error) = bench_packed(criterion) {
        panic!("packed: {error}");
    }
    if let Err(error) = bench_adamw(criterion) {
        panic!("adamw: {error}");
    }
}

criterion_group!(benches, bench_ops);
criterion_main!(benches);
