//! One more token for each sequence of a batch, keys and values being kept, as a share of the bandwidth of a copy: every
//! weight of a product is read for it, and all keys and values.

mod peak;

use criterion::{Criterion, criterion_group, criterion_main};
use peak::{Group, Work};
use x_transformers::{
    DType, Device, Philox, Result, Store, Tensor,
    config::Config,
    models::{ForwardOptions, TransformerWrapper},
};

/// Tokens before the new one.
const PROMPT: usize = 512;

fn bench_batch(group: &mut Group, batch: usize, dtype: DType) -> Result<()> {
    let Config::AutoregressiveWrapper(config) = Config::from_json(include_str!("configs/decoder.json"))? else {
        panic!("the decoder of the benchmarks generates");
    };
    let store = Store::new(0, dtype, &Device::Cpu);
    let model = TransformerWrapper::new(&config.net, &store)?;
    let random = Philox::new(0, 0);
    let limit = config.net.num_tokens as u64;
    let tokens =
        Tensor::generate([batch, PROMPT + 1], DType::I64, &Device::Cpu, |i| random.below(i as u64, limit) as f64)?;
    let mut cache = model.cache(batch, PROMPT + 1, &ForwardOptions::default())?;
    model.extend(&tokens.narrow(1, 0, PROMPT)?, &vec![PROMPT; batch], None, &mut cache)?;
    let next = tokens.narrow(1, PROMPT, 1)?;

    let params = store.params();
    let matrices = params.unique().filter(|(name, _)| name.ends_with(".weight") && !name.contains("_emb."));
    let weights: usize = matrices
        .map(|(_, param)| param.tensor())
        .filter(|weight| weight.rank() == 2)
        .map(|weight| weight.elements())
        .sum();
    let layers = &config.net.attn_layers;
    let kept = 2 * batch * layers.depth * layers.heads * layers.attn.dim_head * (PROMPT + 1);
    let mut step = || -> Result<()> {
        let hidden = model.extend(&next, &vec![1; batch], None, &mut cache)?;
        model.logits(&hidden)?;
        cache.truncate(&vec![PROMPT; batch])
    };
    let work = Work::Bytes((weights + kept) * dtype.size());
    group.bench(&format!("{batch} after {PROMPT} {dtype}"), work, || step().expect("it fits"));
    Ok(())
}

fn bench_decode(criterion: &mut Criterion) {
    let mut group = Group::new(criterion, "decode");
    for (batch, dtype) in [1, 8].into_iter().flat_map(|batch| [(batch, DType::F32), (batch, DType::BF16)]) {
        if let Err(error) = bench_batch(&mut group, batch, dtype) {
            panic!("{batch} {dtype}: {error}");
        }
    }
    group.finish();
}

criterion_group!(benches, bench_decode);
criterion_main!(benches);
