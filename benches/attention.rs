//! Causal attention, forward and forward with backward: four operations per feature of each kept score forward, ten
//! backward, as a share of the multiply-add peak in f32. Processors with units for half types can exceed it.

mod peak;

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use peak::{Group, Work};
use x_transformers::{
    DType, Device, Philox, Result, Tape, Tensor,
    ops::{AttentionSpec, attention},
};

const HEADS: usize = 8;
const WIDTH: usize = 64;

/// `[1, n, heads, width]`, the layout that a projection returns.
fn operand(n: usize, dtype: DType, stream: u64) -> Result<Tensor> {
    let random = Philox::new(1, stream);
    Tensor::generate([1, n, HEADS, WIDTH], dtype, &Device::Cpu, |i| random.normal(i as u64))?.requires_grad()
}

fn bench(criterion: &mut Criterion) {
    let mut group = Group::new(criterion, "attention causal 1×8×n×64");
    let spec = AttentionSpec { scale: (WIDTH as f64).powf(-0.5), causal: true, ..AttentionSpec::default() };
    for (n, dtype) in [1024, 4096].into_iter().flat_map(|n| [(n, DType::F32), (n, DType::BF16)]) {
        let operands = [0, 1, 2].map(|stream| operand(n, dtype, stream).expect("operand"));
        let forward = || {
            let [q, k, v] = operands.each_ref().map(|x| x.transpose(1, 2).expect("heads"));
            attention(&q, &k, &v, &spec).expect("attention").transpose(1, 2).expect("rows")
        };
        let kept = HEADS * (n * (n + 1) / 2) * WIDTH;
        group.bench(&format!("forward {dtype} {n}"), Work::Flops(4 * kept), || drop(black_box(forward())));
        let cotangent = operand(n, dtype, 3).expect("cotangent").detach();
        group.bench(&format!("forward and backward {dtype} {n}"), Work::Flops(14 * kept), || {
            let mut tape = Tape::grad();
            let out = forward();
            tape.backward_with(&out, &cotangent).map(black_box).map(drop).expect("backward");
        });
    }
    group.finish();
}

criterion_group!(benches, bench);
criterion_main!(benches);
