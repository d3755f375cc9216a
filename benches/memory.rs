//! The memory of a training step (loss, backward pass, AdamW) of the plain decoder of dim 512, depth 6, heads 8 and 256
//! tokens, at growing lengths: the largest use by tensors, and the peak that the system counts for the process.
//!
//!     cargo bench --bench memory [-- LENGTH…]

use std::time::Instant;

use x_transformers::{
    DType, Device, ParamStore, Philox, Result, Tape, Tensor,
    config::{AttentionLayersConfig, AutoregressiveConfig, TransformerWrapperConfig},
    models::{AutoregressiveWrapper, ForwardOptions},
    train::{AdamW, AdamWOptions, Optimizer},
};

const NUM_TOKENS: usize = 256;

/// Runs two steps on one sequence, the first of which creates the optimizer's state; returns the seconds of the second.
fn train(length: usize) -> Result<f64> {
    let net = TransformerWrapperConfig {
        num_tokens: NUM_TOKENS,
        max_seq_len: length,
        attn_layers: AttentionLayersConfig::decoder(512, 6),
        ..Default::default()
    };
    let store = ParamStore::new(0, DType::F32, &Device::Cpu);
    let model = AutoregressiveWrapper::new(&AutoregressiveConfig { net, ..Default::default() }, &store)?;
    let params = store.params();
    let random = Philox::new(0, 0);
    let token = |i: usize| random.below(i as u64, NUM_TOKENS as u64) as f64;
    let tokens = Tensor::generate([1, length + 1], DType::I64, &Device::Cpu, token)?;
    let mut optimizer = AdamW::new(AdamWOptions::default())?;
    let mut seconds = 0.0;
    for step in 0..2 {
        let start = Instant::now();
        let mut tape = Tape::train(step);
        let loss = model.loss(&tokens, &ForwardOptions::default())?;
        let gradients = tape.backward(&loss)?;
        optimizer.step(&params, &gradients, 1e-4, Some(1.0))?;
        seconds = start.elapsed().as_secs_f64();
    }
    Ok(seconds)
}

/// Returns the peak resident memory of this process in bytes, if the system reports it.
fn resident() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kilobytes: f64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(1024.0 * kilobytes)
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let given: Vec<usize> = arguments.iter().filter_map(|argument| argument.parse().ok()).collect();
    let lengths = match given.is_empty() {
        _ if arguments.iter().any(|argument| argument == "--test") => vec![64],
        true => vec![1024, 2048, 4096, 8192],
        false => given,
    };
    println!("| length | tensors, GB | process, GB | seconds |\n|---|---|---|---|");
    for length in lengths {
        Device::Cpu.reset_peak_memory();
        let seconds = train(length)?;
        let tensors = Device::Cpu.memory().peak as f64 / 1e9;
        let process = resident().map_or("unknown".into(), |bytes| format!("{:.2}", bytes / 1e9));
        println!("| {length} | {tensors:.2} | {process} | {seconds:.1} |");
    }
    Ok(())
}
