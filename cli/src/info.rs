//! `xt info`: what a model consists of and what it costs, without building it in memory.

use std::{fs, path::PathBuf};

use clap::{ArgGroup, Args, value_parser};
use indicatif::HumanCount;
use x_transformers::{
    DType, Device, ParamMap, Store,
    config::{Config, LayersPlan},
    models::Model,
    train::Checkpoint,
};

use crate::{
    cost::{Batch, Cost, Sizes},
    failure::{Failure, Result, print},
    files,
    progress::{bytes, operations},
};

#[derive(Args)]
#[command(group = ArgGroup::new("model").required(true))]
pub struct InfoArgs {
    /// JSON config of a model
    #[arg(long, value_name = "FILE", group = "model")]
    config: Option<PathBuf>,

    /// Folder that `xt train` wrote
    #[arg(long, value_name = "DIR", group = "model")]
    checkpoint: Option<PathBuf>,

    /// Sequences of a training step
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = value_parser!(u32).range(1..))]
    batch_size: u32,

    /// Length of the sequences [default: the longest that the model takes]
    #[arg(long, value_name = "N", value_parser = value_parser!(u32).range(1..))]
    seq_len: Option<u32>,
}

pub fn run(args: InfoArgs) -> Result<()> {
    let config = read(&args)?;
    let store = Store::shapes(DType::F32, &Device::Cpu);
    let params = Model::new(&config, &store)?.params().clone();
    let layers = config.layers()?;
    print(modules(&params, &layers))?;
    for (name, plan) in &layers {
        let order: Vec<String> =
            plan.layers.iter().map(|layer| layer.branch.layer_type().letter().to_string()).collect();
        let of = if name.is_empty() { String::new() } else { format!(" of {name}") };
        print(format_args!("\nlayer order{of}: {}\n", order.join(" ")))?;
        print(plan)?;
    }
    let sizes = Sizes { rows: args.batch_size as usize, tokens: args.seq_len.map(|tokens| tokens as usize) };
    match Cost::of_model(&config, sizes)? {
        Some((batch, cost)) => print(step(&params, batch, cost)),
        None => Ok(()),
    }
}

fn read(args: &InfoArgs) -> Result<Config> {
    match (&args.config, &args.checkpoint) {
        (Some(path), _) => {
            let text = fs::read_to_string(path).map_err(|error| Failure::io(path, &error))?;
            Config::from_json(&text).map_err(|error| Failure::from(error).within(path))
        }
        (None, Some(dir)) => {
            let dir = files::checkpoint(dir);
            Config::from_value(Checkpoint::load_config(&dir)?).map_err(|error| Failure::from(error).within(&dir))
        }
        (None, None) => Err(Failure::new("give --config or --checkpoint")),
    }
}

/// Modules with their parameters; sublayers are modules of their own.
fn modules(params: &ParamMap, layers: &[(&'static str, LayersPlan)]) -> String {
    // In the order of first sight, sublayers by number.
    let mut rows: Vec<(String, usize)> = Vec::new();
    for (name, param) in params.unique() {
        let (module, elements) = (module(name, layers), param.tensor().elements());
        match rows.iter_mut().find(|(known, _)| *known == module) {
            Some((_, sum)) => *sum += elements,
            None => rows.push((module, elements)),
        }
    }
    rows.sort_by_cached_key(|(module, _)| {
        let (place, number) = module.rsplit_once('.').unwrap_or(("", module));
        match number.parse::<usize>() {
            Ok(number) => (place.to_string(), number),
            Err(_) => (module.clone(), 0),
        }
    });
    rows.push(("total".to_string(), params.elements()));
    let width = rows.iter().map(|(module, _)| module.len()).max().unwrap_or(0);
    let mut text = format!("{:width$}  {:>15}\n", "module", "parameters");
    for (module, elements) in rows {
        text += &format!("{module:width$}  {:>15}\n", HumanCount(elements as u64).to_string());
    }
    text
}

/// The module that a parameter is counted under.
fn module(name: &str, layers: &[(&'static str, LayersPlan)]) -> String {
    for (prefix, _) in layers {
        let place = if prefix.is_empty() { String::new() } else { format!("{prefix}.") };
        let Some(inner) = name.strip_prefix(&place) else { continue };
        let mut parts = inner.split('.');
        return match (parts.next(), parts.next()) {
            (Some("layers"), Some(number)) => format!("{place}layers.{number}"),
            (Some(first), _) => format!("{place}{first}"),
            _ => name.to_string(),
        };
    }
    name.rsplit_once('.').map_or(name, |(module, _)| module).to_string()
}

/// What a training step computes and holds.
fn step(params: &ParamMap, batch: Batch, cost: Cost) -> String {
    const FLOAT: f64 = 4.0;
    let weights = FLOAT * params.elements() as f64;
    let activations = FLOAT * cost.saved;
    let size = |count: f64| bytes(count as u64);
    format!(
        "\na training step of {} x {} in f32\n\
         forward pass   {}\n\
         whole step     {}, backward pass included\n\
         memory         {}: weights {}, gradients {}, Adam moments {}, activations {}\n",
        batch.rows,
        batch.tokens,
        operations(cost.forward),
        operations(cost.training()),
        size(4.0 * weights + activations),
        size(weights),
        size(weights),
        size(2.0 * weights),
        size(activations),
    )
}
