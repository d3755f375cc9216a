//! Bytes that each rank holds in stage 3 of ZeRO. Ranks are threads of this process, whose memory is counted: the file has
//! one test.

use std::sync::{Barrier, Mutex};

use x_transformers::{
    DType, Result,
    config::{AttentionLayersConfig, AutoregressiveConfig, TransformerWrapperConfig},
    deferred_init,
    train::{ByteText, RankOptions, TrainOptions, Trainer},
};

#[path = "common/mod.rs"]
mod common;
#[path = "common/ranks.rs"]
mod threads;

use common::device;
use threads::ranks;

const DEPTH: usize = 6;

/// Trainer of a model most of whose parameters are those of layers, with averaged weights.
fn trainer(dtype: DType) -> Result<Trainer> {
    let layers = AttentionLayersConfig { heads: 4, ..AttentionLayersConfig::decoder(256, DEPTH) };
    let net = TransformerWrapperConfig::new(128, 12, layers);
    let text = ByteText::from_bytes(b"It was the best of times. ".repeat(80))?;
    let options = TrainOptions { steps: 3, batch_size: 1, seq_len: 12, dtype, ..Default::default() };
    let options = TrainOptions { recompute: true, ema_decay: Some(0.9), ..options };
    Trainer::new(AutoregressiveConfig { net, ..Default::default() }, options, text, device())
}

/// Returns the bytes of each rank at most until the weights are divided and until the end of the first step, between two
/// steps, and at most in a step and a validation.
fn measured(dtype: DType, size: usize, zero: u8) -> [f64; 4] {
    let before = device().memory().live;
    let (meeting, bytes) = (Barrier::new(size), Mutex::new([0; 4]));
    let results = ranks(size, |ranks| {
        let is_first = ranks.rank() == 0;
        let measure = |at: usize| {
            meeting.wait();
            if is_first {
                let memory = device().memory();
                bytes.lock().expect("no panic")[at] = if at == 2 { memory.live } else { memory.peak } - before;
                device().reset_peak_memory();
            }
            meeting.wait();
        };
        meeting.wait();
        if is_first {
            device().reset_peak_memory();
        }
        meeting.wait();
        let new = || trainer(dtype);
        let trainer = if zero == 3 { deferred_init(new) } else { new() };
        let mut trainer = trainer?.with_ranks(ranks, RankOptions { zero, ..Default::default() })?;
        measure(0);
        trainer.step()?;
        measure(1);
        measure(2);
        trainer.step()?;
        trainer.validate()?;
        measure(3);
        Ok::<_, x_transformers::Error>(())
    });
    results.into_iter().for_each(|result| result.expect("trained"));
    bytes.into_inner().expect("no panic").map(|bytes| bytes as f64 / size as f64)
}

#[test]
fn ranks_keep_their_part_of_all_but_one_block() {
    for (dtype, size) in [(DType::F32, 2), (DType::F32, 4), (DType::BF16, 4)] {
        let counts = {
            let trainer = trainer(dtype).expect("a trainer");
            let of = |inside: bool| {
                let counted = trainer.params().unique().filter(|(name, _)| name.contains(".layers.") == inside);
                counted.map(|(_, param)| param.tensor().numel() as f64).sum::<f64>()
            };
            let feedforward = trainer.params().unique().filter(|(name, _)| name.contains(".layers.1."));
            [of(true), of(false), feedforward.map(|(_, param)| param.tensor().numel() as f64).sum()]
        };
        let [inside, outside, block] = counts;
        let (float, sum, ranks) = (dtype.size() as f64, 4.0, size as f64);
        // Two moments, the average and, of half types, the master weights.
        let state = sum * if dtype == DType::F32 { 3.0 } else { 4.0 };
        let rest = (inside + outside) * state / ranks + inside * float / ranks + outside * float;
        let gradients = sum * (inside + outside) / ranks;
        let [start, first, between, most] = measured(dtype, size, 3);
        let [whole, _, _, second] = measured(dtype, size, 2);
        // At the start a rank has its part of the weights and of their average, and the block that is being divided.
        let divided = (inside + outside) * sum / ranks + inside * float / ranks + outside * float;
        let started = format!("{dtype}, {size} ranks: {start} until the start, {first} in the first step, {divided}");
        assert!(start <= divided + block * float, "{started}");
        assert!(first <= rest + gradients + 3.0 * sum * block, "{started}");
        assert!(start < 0.6 * whole, "{started}, in stage 2 {whole}");
        let blocks = (most - rest - gradients) / (block * float);
        // Between steps a rank has its part, up to the alignment of pieces.
        assert!((0.99..1.01).contains(&(between / rest)), "{dtype}, {size} ranks: {between}, expected {rest}");
        // In a step also its part of the gradients, and one block: its weights, as they arrive and by parameter, those of
        // the next one and its gradients in f32.
        assert!(most <= rest + gradients + 3.0 * sum * block, "{dtype}, {size} ranks: {most}, {rest}, {gradients}");
        assert!(most < 0.6 * second, "{dtype}, {size} ranks: {most}, in stage 2 {second}");
        println!(
            "{started}, in stage 2 {whole}; {between:.0} bytes between steps, expected {rest:.0}; at most {most:.0}, in stage 2 \
             {second:.0}; {blocks:.2} blocks of {:.0} bytes beside its part",
            block * float
        );
    }
}
