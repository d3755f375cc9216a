//! Memory that a run needs, before its first step.

use std::fs;

use x_transformers::{
    DType, Device, ParamStore,
    config::Config,
    models::AutoregressiveWrapper,
    train::{OptimizerKind, TrainModel, TrainOptions},
};

use crate::{
    cost::{Cost, Sizes},
    failure::{Failure, Result},
    progress::bytes,
};

/// Refuses a run on the CPU whose weights, gradients, optimizer and activations do not fit into the memory that is left.
pub fn check(config: &Config, options: &TrainOptions, device: &Device) -> Result<()> {
    let (Device::Cpu, Some(available)) = (device, available()) else { return Ok(()) };
    let needed = needed(config, options)?;
    if needed <= available as f64 {
        return Ok(());
    }
    Err(Failure::new(format_args!(
        "a step needs about {}, but {} of memory are available; use a smaller model, `--batch-size` (with `--accumulate`) or \
         `--seq-len`",
        bytes(needed as u64),
        bytes(available)
    )))
}

/// Bytes of a step.
fn needed(config: &Config, options: &TrainOptions) -> Result<f64> {
    let store = ParamStore::shapes(DType::F32, &Device::Cpu);
    <AutoregressiveWrapper as TrainModel>::build(config, &store)?;
    let float = if matches!(options.dtype, DType::BF16 | DType::F16) { 2.0 } else { 4.0 };
    let moments = match options.optimizer {
        OptimizerKind::AdamW => 8.0,
        OptimizerKind::Adafactor => 0.0,
        _ => 4.0,
    };
    let master = if float < 4.0 { 4.0 } else { 0.0 };
    let average = if options.ema_decay.is_some() { 4.0 } else { 0.0 };
    let weights = store.params().numel() as f64 * (2.0 * float + moments + master + average);
    let sizes = Sizes { rows: options.batch_size, tokens: Some(options.seq_len) };
    let saved = Cost::of_model(config, sizes)?.map_or(0.0, |(_, cost)| cost.saved);
    // Of one layer at a time; its share is small.
    let saved = if options.recompute { 0.0 } else { saved };
    Ok(weights + float * saved)
}

/// Bytes that the system can give, where Linux tells it.
fn available() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let field = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim_start_matches(':').trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()
    };
    Some((field("MemAvailable")? + field("SwapFree").unwrap_or(0)) * 1024)
}
