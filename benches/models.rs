//! The models of `benches/configs`: a forward pass and a training step, as a share of the multiply-add peak in f32.
//! Processors with units for half types can exceed it. Counts the operations that a profile counts: products and
//! attention.

mod peak;

use std::collections::BTreeMap;

use criterion::{Criterion, criterion_group, criterion_main};
use peak::{Group, Work};
use x_transformers::{
    DType, Device, ParamStore, Philox, Result, Tape, Tensor,
    config::{Call, Config},
    models::{Model, RunOptions},
    profile::Profile,
    train::{AdamW, AdamWOptions, Optimizer},
};

/// A model and the size of its batch. The loss is the model's own, or the cross-entropy of its logits.
struct Case {
    name: &'static str,
    config: &'static str,
    batch: usize,
    length: usize,
}

const CASES: [Case; 4] = [
    Case { name: "decoder", config: include_str!("configs/decoder.json"), batch: 1, length: 1024 },
    Case { name: "bytes", config: include_str!("configs/decoder-bytes.json"), batch: 4, length: 256 },
    Case { name: "encoder", config: include_str!("configs/encoder.json"), batch: 1, length: 1024 },
    Case { name: "encoder-decoder", config: include_str!("configs/encoder-decoder.json"), batch: 1, length: 1024 },
];

fn tokens(batch: usize, length: usize, limit: usize) -> Result<Tensor> {
    let random = Philox::new(0, 0);
    Tensor::generate([batch, length], DType::I64, &Device::Cpu, |i| random.below(i as u64, limit as u64) as f64)
}

/// Inputs, and the targets of logits.
fn inputs(config: &Config, case: &Case) -> Result<(BTreeMap<String, Tensor>, Option<Tensor>)> {
    let (batch, length) = (case.batch, case.length);
    let mask = || Tensor::ones([batch, length], DType::Bool, &Device::Cpu);
    let (named, targets) = match config {
        Config::AutoregressiveWrapper(config) => (vec![("x", tokens(batch, length + 1, config.net.num_tokens)?)], None),
        Config::TransformerWrapper(config) => {
            let x = tokens(batch, length, config.num_tokens)?;
            (vec![("x", x.clone()), ("mask", mask()?)], Some(x))
        }
        Config::XTransformer(config) => {
            let src = tokens(batch, length, config.enc.num_tokens)?;
            let tgt = tokens(batch, length + 1, config.dec.num_tokens)?;
            (vec![("src", src), ("tgt", tgt), ("src_mask", mask()?)], None)
        }
        other => panic!("{other:?} is none of the cases"),
    };
    Ok((named.into_iter().map(|(name, tensor)| (name.to_string(), tensor)).collect(), targets))
}

fn bench_case(group: &mut Group, case: &Case, dtype: DType) -> Result<()> {
    let config = Config::from_json(case.config)?;
    let (inputs, targets) = inputs(&config, case)?;
    let model = Model::new(&config, &ParamStore::new(0, dtype, &Device::Cpu))?;
    let loss = || {
        let output = model.forward(&inputs, &Call::default(), &RunOptions::default())?;
        match &targets {
            Some(targets) => output.cross_entropy(targets, -100),
            None => Ok(output),
        }
    };
    let mut optimizer = AdamW::new(AdamWOptions::default())?;
    let mut step = || {
        let mut tape = Tape::train(optimizer.steps());
        let gradients = tape.backward(&loss()?)?;
        optimizer.step(model.params(), &gradients, 1e-4, None).map(drop)
    };
    let counted = |run: &mut dyn FnMut() -> Result<()>| -> Result<usize> {
        let profile = Profile::start()?;
        run()?;
        Ok(profile.finish().ops().map(|op| op.operations).sum::<f64>() as usize)
    };
    let id = |what: &str| format!("{} {}x{} {what} {dtype}", case.name, case.batch, case.length);
    let operations = counted(&mut || loss().map(drop))?;
    group.bench(&id("forward"), Work::Flops(operations), || loss().map(drop).expect("a loss"));
    let operations = counted(&mut step)?;
    group.bench(&id("training step"), Work::Flops(operations), || step().expect("finite gradients"));
    Ok(())
}

fn bench_models(criterion: &mut Criterion) {
    let mut group = Group::new(criterion, "models");
    for (case, dtype) in CASES.iter().flat_map(|case| [(case, DType::F32), (case, DType::BF16)]) {
        if let Err(error) = bench_case(&mut group, case, dtype) {
            panic!("{} {dtype}: {error}", case.name);
        }
    }
    group.finish();
}

criterion_group!(benches, bench_models);
criterion_main!(benches);
