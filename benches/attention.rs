//! Causal attention, forward and forward with backward. `Gelem/s` reads as GFLOP/s: four operations per feature of
//! each kept score forward, ten backward.

use std::{hint::black_box, time::Duration};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use x_transformers::{
    DType, Device, Philox, Result, Tape, Tensor,
    ops::{AttentionSpec, attention},
};

const HEADS: usize = 8;
const WIDTH: usize = 64;

/// `[1, n, heads, width]`, which is how a projection leaves it.
fn operand(n: usize, dtype: DType, stream: u64) -> Result<Tensor> {
    let random = Philox::new(1, stream);
    Tensor::generate([1, n, HEADS, WIDTH], dtype, &Device::Cpu, |i| random.normal(i as u64))?.requires_grad()
}

fn bench(c: &mut Criterion) {
    let mut group = c.benchmark_group("attention causal 1×8×n×64");
    group.sample_size(10).warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(2));
    let spec = AttentionSpec { scale: (WIDTH as f64).powf(-0.5), causal: true, ..AttentionSpec::default() };
    for (n, dtype) in [1024, 4096].into_iter().flat_map(|n| [(n, DType::F32), (n, DType::BF16)]) {
        let operands = [0, 1, 2].map(|stream| operand(n, dtype, stream).expect("operand"));
        let forward = || {
            let [q, k, v] = operands.each_ref().map(|x| x.transpose(1, 2).expect("heads"));
            attention(&q, &k, &v, &spec).expect("attention").transpose(1, 2).expect("rows")
        };
        let kept = (HEADS * n * (n + 1) / 2 * WIDTH) as u64;
        group.throughput(Throughput::Elements(4 * kept));
        group.bench_function(BenchmarkId::new(format!("forward {dtype}"), n), |b| b.iter(|| black_box(forward())));
        let cotangent = operand(n, dtype, 3).expect("cotangent").detach();
        group.throughput(Throughput::Elements(14 * kept));
        group.bench_function(BenchmarkId::new(format!("forward and backward {dtype}"), n), |b| {
            b.iter(|| {
                let mut tape = Tape::grad();
                let out = forward();
                tape.backward_with(&out, &cotangent).map(black_box).expect("backward")
            });
        });
    }
    group.finish();
}

criterion_group!(benches, bench);
criterion_main!(benches);
