//! A loop of one's own over several processes: each learns from its part of a batch, and all have the same weights.
//!
//!     cargo build --release --features mpi --example data_parallel
//!     mpirun -n 2 target/release/examples/data_parallel
//!
//! Without the feature `mpi`, or without `mpirun`, it is one process, which accumulates as many parts as its argument says
//! (default 2): the weights have the same bits. `scripts/check-mpi` compares them.

use std::sync::Arc;

use x_transformers::{
    DType, Device, Gradients, ParamStore, Philox, Result, Tape, Tensor,
    config::{AttentionLayersConfig, AutoregressiveConfig, TransformerWrapperConfig},
    distributed::{Communicator, DataParallel},
    models::{AutoregressiveWrapper, ForwardOptions},
    train::{AdamW, AdamWOptions, Optimizer},
};

const LENGTH: usize = 32;

#[cfg(feature = "mpi")]
fn ranks() -> Result<Arc<dyn Communicator>> {
    Ok(Arc::new(x_transformers::distributed::Mpi::new()?))
}

#[cfg(not(feature = "mpi"))]
fn ranks() -> Result<Arc<dyn Communicator>> {
    Ok(Arc::new(x_transformers::distributed::Alone))
}

/// Four texts of part `part` of the batch of a step: counts upwards from drawn numbers.
fn batch(step: u64, part: usize) -> Result<Tensor> {
    let random = Philox::new(part as u64, step);
    Tensor::generate([4, LENGTH + 1], DType::I64, &Device::Cpu, |i| {
        ((random.below((i / (LENGTH + 1)) as u64, 64) + (i % (LENGTH + 1)) as u64) % 64) as f64
    })
}

fn main() -> Result<()> {
    let ranks = ranks()?;
    // Parts of a batch: one for each rank, or all for one process.
    let parts = std::env::args().nth(1).and_then(|text| text.parse().ok()).unwrap_or(2);
    let mine = if ranks.size() > 1 { ranks.rank()..ranks.rank() + 1 } else { 0..parts };
    let all = if ranks.size() > 1 { ranks.size() } else { parts };

    let store = ParamStore::new(ranks.rank() as u64, DType::F32, &Device::Cpu);
    let layers = AttentionLayersConfig { heads: 2, ..AttentionLayersConfig::decoder(64, 2) };
    let net = TransformerWrapperConfig::new(64, LENGTH, layers);
    let model = AutoregressiveWrapper::new(&AutoregressiveConfig { net, ..Default::default() }, &store)?;
    let params = store.params();
    let parallel = DataParallel::new(&params, ranks.clone())?; // all get the weights of rank 0
    let mut optimizer = AdamW::new(AdamWOptions::default())?;
    for step in 0..50 {
        let (mut grads, mut sum) = (Gradients::default(), 0.0);
        for part in mine.clone() {
            let mut tape = Tape::train(step * all as u64 + part as u64);
            let loss = model.loss(&batch(step, part)?, &ForwardOptions::default())?;
            sum += loss.item()? / all as f64;
            grads.accumulate(tape.backward(&loss)?)?;
        }
        let grads = parallel.reduce(grads)?;
        optimizer.step_scaled(&params, &grads, 1.0 / all as f64, 1e-3, Some(1.0))?;
        let loss = ranks.all_reduce(&Tensor::full([], sum, DType::F64, &Device::Cpu)?)?.item()?;
        if ranks.rank() == 0 && (step + 1) % 10 == 0 {
            println!("step {}: loss {loss:.4}", step + 1);
        }
    }
    let bits = |tensor: Tensor| Ok(tensor.to_vec::<f32>()?.into_iter().fold(0, mix));
    let weights = params.iter().map(|(_, param)| bits(param.tensor())).collect::<Result<Vec<u64>>>()?;
    println!("weights of rank {}: {:016x}", ranks.rank(), weights.into_iter().fold(0, u64::wrapping_add));
    Ok(())
}

fn mix(hash: u64, value: f32) -> u64 {
    (hash ^ u64::from(value.to_bits())).wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(29)
}
