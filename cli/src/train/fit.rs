//! Memory that a run needs, before its first step.

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

/// Refuses a run whose weights, gradients, optimizer and activations do not fit into the memory that the device has left.
pub fn check(config: &Config, options: &TrainOptions, device: &Device) -> Result<()> {
    check_as(config, options, device, &|store| <AutoregressiveWrapper as TrainModel>::build(config, store).map(drop))
}

/// [`check`] of a model that `build` makes, whose steps cost as much as those of the config.
pub fn check_as(config: &Config, options: &TrainOptions, device: &Device, build: Build) -> Result<()> {
    let Some(available) = device.available_memory() else { return Ok(()) };
    compare(needed(config, options, build)?, available, device)
}

fn compare(needed: f64, available: u64, device: &Device) -> Result<()> {
    if needed <= available as f64 {
        return Ok(());
    }
    Err(Failure::new(format_args!(
        "a step needs about {}, but {} of memory are available on {device}; use a smaller model, `--batch-size` (with \
         `--accumulate`), `--seq-len` or `--recompute`",
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

#[cfg(test)]
mod tests {
    use x_transformers::config::{AttentionLayersConfig, AutoregressiveConfig, TransformerWrapperConfig};

    use super::*;

    /// The memory of a step lies between that of the weights alone and that which is left.
    #[test]
    fn what_does_not_fit_is_refused() {
        let net = TransformerWrapperConfig::new(256, 64, AttentionLayersConfig::decoder(64, 2));
        let config: Config = AutoregressiveConfig { net, ..Default::default() }.into();
        let options = TrainOptions { batch_size: 4, seq_len: 64, ..Default::default() };
        let build = |store: &_| <AutoregressiveWrapper as TrainModel>::build(&config, store).map(drop);
        let step = needed(&config, &options, &build).expect("bytes");
        let more = TrainOptions { batch_size: 8, ..options.clone() };
        assert!(needed(&config, &more, &build).is_ok_and(|more| more > step && more < 2.0 * step));
        assert!(compare(step, step as u64 + 1, &Device::Cpu).is_ok());
        let message = compare(step, step as u64 - 1, &Device::Cpu).expect_err("too little").to_string();
        assert!(message.contains("are available on cpu; use a smaller model"), "{message}");
    }
}
