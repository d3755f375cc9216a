//! Memory that a run needs, before its first step.

use std::fs;

use x_transformers::{
    DType, Device, ParamStore, Result as LibraryResult,
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
    check_as(config, options, device, &|store| <AutoregressiveWrapper as TrainModel>::build(config, store).map(drop))
}

/// [`check`] of a model that `build` makes, whose steps cost as much as those of the config.
pub fn check_as(config: &Config, options: &TrainOptions, device: &Device, build: Build) -> Result<()> {
    let (Device::Cpu, Some(available)) = (device, available()) else { return Ok(()) };
    let needed = needed(config, options, build)?;
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

/// Function that registers the parameters of a model.
type Build<'b> = &'b dyn Fn(&ParamStore) -> LibraryResult<()>;

/// Returns the bytes of a step.
fn needed(config: &Config, options: &TrainOptions, build: Build) -> Result<f64> {
    let store = ParamStore::shapes(DType::F32, &Device::Cpu);
    build(&store)?;
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

/// Returns the number of bytes that the system can give, where Linux tells it.
fn available() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let field = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim_start_matches(':').trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()
    };
    Some((field("MemAvailable")? + field("SwapFree").unwrap_or(0)) * 1024)
}
