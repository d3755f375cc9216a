//! Memory that a run needs, before its first step.

use x_transformers::{
    DType, Device, ParamStore, Result as LibraryResult,
    config::Config,
    models::AutoregressiveWrapper,
    train::{OptimizerKind, TrainModel, TrainOptions},
};

use super::TrainArgs;
use crate::{
    cost::{Cost, Sizes},
    failure::{Failure, Result},
    progress::bytes,
    ranks,
    scaling::layer_of,
};

/// Refuses a run whose weights, gradients, optimizer and activations do not fit into the memory that the device has left.
pub fn check(args: &TrainArgs, config: &Config, options: &TrainOptions, device: &Device) -> Result<()> {
    check_as(args, config, options, device, &|store| {
        <AutoregressiveWrapper as TrainModel>::build(config, store).map(drop)
    })
}

/// [`check`] of a model that `build` makes, whose steps cost as much as those of the config.
pub fn check_as(
    args: &TrainArgs,
    config: &Config,
    options: &TrainOptions,
    device: &Device,
    build: Build,
) -> Result<()> {
    let Some(available) = device.available_memory() else { return Ok(()) };
    let shares = Shares { ranks: ranks::count(), zero: args.zero };
    compare(needed(config, options, shares, build)?, available, device, [options.recompute, shares.ranks == 1])
}

/// Number of processes that share the memory of a run, and the stage of ZeRO by which they do.
#[derive(Clone, Copy)]
struct Shares {
    ranks: usize,
    zero: u8,
}

impl Shares {
    /// Returns the part of a quantity, which is divided from a stage on, that a process has.
    fn part(self, from_stage: u8) -> f64 {
        if self.zero >= from_stage { 1.0 / self.ranks as f64 } else { 1.0 }
    }
}

fn compare(needed: f64, available: u64, device: &Device, [recomputes, is_alone]: [bool; 2]) -> Result<()> {
    if needed <= available as f64 {
        return Ok(());
    }
    let mut cures = vec!["a smaller model", "`--batch-size` (with `--accumulate`)", "`--seq-len`"];
    cures.extend((!recomputes).then_some("`--recompute`"));
    cures.extend((!is_alone).then_some("`--zero`"));
    let last = cures.pop().unwrap_or_default();
    Err(Failure::new(format_args!(
        "a step needs about {}, but {} of memory are available on {device}; use {} or {last}",
        bytes(needed as u64),
        bytes(available),
        cures.join(", ")
    )))
}

/// Function that registers the parameters of a model.
type Build<'b> = &'b dyn Fn(&ParamStore) -> LibraryResult<()>;

/// Returns the bytes of a step in one process.
fn needed(config: &Config, options: &TrainOptions, shares: Shares, build: Build) -> Result<f64> {
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
    let (state, gradients) = ((moments + master + average) * shares.part(1), float * shares.part(2));
    let params = store.params();
    let sizes = params.unique().map(|(name, param)| (layer_of(name).is_some(), param.tensor().numel() as f64));
    // Those of layers are divided in stage 3, but for one layer, which is little.
    let held = sizes.map(|(layers, numel)| numel * if layers { shares.part(3) } else { 1.0 }).sum::<f64>();
    let weights = params.numel() as f64 * (gradients + state) + held * float;
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

    /// A run is refused exactly when its step needs more than is available, and ZeRO divides what it needs.
    #[test]
    fn what_does_not_fit_is_refused() {
        let net = TransformerWrapperConfig::new(256, 64, AttentionLayersConfig::decoder(64, 2));
        let config: Config = AutoregressiveConfig { net, ..Default::default() }.into();
        let options = TrainOptions { batch_size: 4, seq_len: 64, ..Default::default() };
        let build = |store: &_| <AutoregressiveWrapper as TrainModel>::build(&config, store).map(drop);
        let needed = |options: &_, ranks, zero| needed(&config, options, Shares { ranks, zero }, &build);
        let step = needed(&options, 1, 0).expect("bytes");
        let more = TrainOptions { batch_size: 8, ..options.clone() };
        assert!(needed(&more, 1, 0).is_ok_and(|more| more > step && more < 2.0 * step));
        let by_stage = [0, 1, 2, 3].map(|zero| needed(&options, 4, zero).expect("bytes"));
        assert!(by_stage[0] == step && by_stage.is_sorted_by(|a, b| a > b), "{by_stage:?}");
        let averaged = TrainOptions { ema_decay: Some(0.9), ..options.clone() };
        let more = |zero| needed(&averaged, 4, zero).expect("bytes") - by_stage[usize::from(zero)];
        assert!((more(1) - more(0) / 4.0).abs() < 1.0, "averages are divided too");
        assert!(compare(step, step as u64 + 1, &Device::Cpu, [false, true]).is_ok());
        let message = |cures| compare(step, step as u64 - 1, &Device::Cpu, cures).expect_err("too little").to_string();
        let alone = message([false, true]);
        assert!(alone.contains("are available on cpu; use a smaller model, `--batch-size`"), "{alone}");
        assert!(alone.ends_with("`--seq-len` or `--recompute`"), "{alone}");
        assert!(message([true, false]).ends_with("`--seq-len` or `--zero`"));
    }
}
