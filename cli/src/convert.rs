//! `xt convert`: from the options of x-transformers 0.22 to those of version 2.

use std::{collections::BTreeMap, fs, path::PathBuf};

use clap::Args;
use x_transformers::{
    Device, Error, ParamStore, Tensor,
    config::{Config, v2::Conversion},
    io::write_atomically,
    models::Model,
    train::Checkpoint,
};

use crate::{
    failure::{Failure, Result, print},
    files,
};

#[derive(Args)]
pub struct ConvertArgs {
    /// JSON config of a model with options of x-transformers 0.22, or a folder of `xt train`
    #[arg(value_name = "PATH")]
    model: PathBuf,

    /// Config or folder to write, with the options and names of x-transformers 2
    #[arg(value_name = "OUT")]
    out: PathBuf,

    /// Replace OUT if it exists
    #[arg(long)]
    overwrite: bool,
}

/// Kinds of an optimizer's tensors, before the names of parameters.
const KINDS: [&str; 5] = ["exp_avg.", "exp_avg_sq.", "step.", "master.", "ema."];

pub fn run(args: ConvertArgs) -> Result<()> {
    if fs::symlink_metadata(&args.out).is_ok() && !args.overwrite {
        return Err(Failure::new("already exists; replace it with `--overwrite`").within(&args.out));
    }
    if args.model.is_dir() { folder(&args) } else { config(&args) }
}

fn config(args: &ConvertArgs) -> Result<()> {
    let broken = |error: Error| Failure::from(error).within(&args.model);
    let config = Config::from_json(&files::config(&args.model)?).map_err(broken)?;
    let conversion = Conversion::new(&config).map_err(broken)?;
    let json = conversion.config().to_json();
    write_atomically(&args.out, |file| file.write_all(format!("{json}\n").as_bytes()))?;
    print(format_args!("{}: options of x-transformers 2\n", args.out.display()))
}

fn folder(args: &ConvertArgs) -> Result<()> {
    let folder = files::checkpoint(&args.model);
    let broken = |error: Error| Failure::from(error).within(&folder);
    let Checkpoint { config, model, optimizer, training } = Checkpoint::load(&folder)?;
    let conversion = Conversion::new(&config).map_err(broken)?;
    let converted = |tensors: BTreeMap<String, Tensor>| -> Result<BTreeMap<String, Tensor>> {
        let kind = |key: &str| KINDS.into_iter().find(|kind| key.starts_with(kind)).unwrap_or_default();
        let kept = tensors.into_iter().filter(|(key, _)| conversion.keeps(&key[kind(key).len()..]));
        let each = kept.map(|(key, tensor)| {
            let kind = kind(&key);
            let name = &key[kind.len()..];
            // A count has no order.
            let tensor = if tensor.rank() == 0 { tensor } else { conversion.tensor(name, &tensor).map_err(broken)? };
            Ok((format!("{kind}{}", conversion.name(name)), tensor))
        });
        each.collect()
    };
    let (model, optimizer) = (converted(model)?, converted(optimizer)?);
    let config = conversion.config().clone();
    // Written weights have the names and shapes of their config.
    let shapes = ParamStore::zeros(training.options.dtype, &Device::Cpu);
    Model::new(&config, &shapes).and_then(|built| built.params().load(&model)).map_err(broken)?;
    let count = model.len();
    Checkpoint { config, model, optimizer, training }.save(&args.out)?;
    print(format_args!("{}: options of x-transformers 2, {count} tensors\n", args.out.display()))
}
