//! The small GPT of `benches/results`: a forward pass and a training step, as a share of the multiply-add peak.

mod peak;

use criterion::{Criterion, criterion_group, criterion_main};
use peak::{Group, Work};
use x_transformers::{
    DType, Device, Philox, Result, Store, Tape, Tensor,
    config::{AttentionLayersConfig, AutoregressiveConfig, TransformerWrapperConfig},
    models::{AutoregressiveWrapper, ForwardOptions},
    train::{AdamW, AdamWOptions},
};

const DIM: usize = 256;
const DEPTH: usize = 4;
const HEADS: usize = 4;
/// Features of a head, x-transformers' default.
const HEAD: usize = 64;
const BATCH: usize = 4;
const LENGTH: usize = 256;

/// Operations of a forward and of a backward pass: two for each weight of a matrix product and token, twice that
/// backward; four for each feature of a score that causality keeps, ten backward. The rest is left out.
fn flops(store: &Store) -> [usize; 2] {
    let params = store.params();
    let in_products = |name: &str| name.ends_with(".weight") && !name.contains("_emb.");
    let weights = params.unique().filter(|(name, _)| in_products(name)).map(|(_, param)| param.tensor());
    let weights: usize = weights.filter(|weight| weight.rank() == 2).map(|weight| weight.elements()).sum();
    let products = 2 * weights * BATCH * LENGTH;
    let features = DEPTH * BATCH * HEADS * HEAD * (LENGTH * (LENGTH + 1) / 2);
    [products + 4 * features, 2 * products + 10 * features]
}

fn gpt(group: &mut Group, dtype: DType) -> Result<()> {
    let net = TransformerWrapperConfig {
        num_tokens: 256,
        max_seq_len: LENGTH,
        attn_layers: AttentionLayersConfig { heads: HEADS, ..AttentionLayersConfig::decoder(DIM, DEPTH) },
        ..Default::default()
    };
    let store = Store::new(0, dtype, &Device::Cpu);
    let model = AutoregressiveWrapper::new(&AutoregressiveConfig { net, ..Default::default() }, &store)?;
    let (params, options) = (store.params(), ForwardOptions::default());
    let random = Philox::new(0, 0);
    let shape = [BATCH, LENGTH + 1];
    let tokens = Tensor::generate(shape, DType::I64, &Device::Cpu, |i| random.below(i as u64, 256) as f64)?;
    let [forward, backward] = flops(&store);

    group.bench(&format!("forward {dtype}"), Work::Flops(forward), || {
        model.loss(&tokens, &options).map(drop).expect("a loss");
    });
    let mut optimizer = AdamW::new(AdamWOptions::default())?;
    let mut step = || {
        let mut tape = Tape::train(optimizer.steps());
        let loss = model.loss(&tokens, &options)?;
        let gradients = tape.backward(&loss)?;
        optimizer.step(&params, &gradients, 1e-4, Some(1.0))
    };
    step()?;
    group.bench(&format!("training step {dtype}"), Work::Flops(forward + backward), || {
        step().map(drop).expect("finite gradients");
    });
    Ok(())
}

fn bench_models(criterion: &mut Criterion) {
    let mut group = Group::new(criterion, &format!("gpt dim {DIM} depth {DEPTH} batch {BATCH}x{LENGTH}"));
    for dtype in [DType::F32, DType::BF16] {
        if let Err(error) = gpt(&mut group, dtype) {
            panic!("gpt {dtype}: {error}");
        }
    }
    group.finish();
}

criterion_group!(benches, bench_models);
criterion_main!(benches);
