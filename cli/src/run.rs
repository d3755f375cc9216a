//! `xt run`: one forward and backward pass of a model, from files to a file.

use std::{collections::BTreeMap, path::PathBuf};

use clap::Args;
use x_transformers::{
    Error, ErrorKind, ParamStore,
    config::Config,
    io::{TensorFile, write_safetensors},
    models::{Model, RunOptions},
};

use crate::{
    compute::ComputeArgs,
    failure::{Failure, Result, print},
    files,
};

#[derive(Args)]
pub struct RunArgs {
    /// Path of the JSON config of a model; its key `call` holds the options of the call, such as return_mems
    #[arg(long, value_name = "FILE")]
    config: PathBuf,

    /// Path of the weights, named as in PyTorch's state dict: a safetensors file, or a file of `torch.save`, which may
    /// nest them in `model`, `state_dict` or `module`; only a SamplingFilter needs none
    #[arg(long, value_name = "FILE")]
    weights: Option<PathBuf>,

    /// Path of the input tensors, named like PyTorch's arguments: x, mask, context, mems.0, …; for gradients of an
    /// output that is not a loss, also its cotangent
    #[arg(long, value_name = "FILE")]
    inputs: PathBuf,

    /// Path of the safetensors file to write: out or loss, mems.N, attn.N, grad.NAME and grad.input.NAME, in the type
    /// of --dtype
    #[arg(long, value_name = "FILE")]
    outputs: PathBuf,

    /// Also compute the gradients of parameters and inputs
    #[arg(long)]
    grad: bool,

    #[command(flatten)]
    compute: ComputeArgs,
}

pub fn run(args: RunArgs) -> Result<()> {
    let text = files::config(&args.config)?;
    let in_config = |error: Error| Failure::from(error).within(&args.config);
    let (config, call) = Config::with_call(&text).map_err(in_config)?;
    let model =
        Model::new(&config, &ParamStore::zeros(args.compute.dtype, &args.compute.device()?)).map_err(in_config)?;
    match &args.weights {
        Some(path) => {
            let weights = TensorFile::open(path)?.state_dict(model.params())?;
            model.params().load(&weights).map_err(|error| Failure::from(error).within(path))?;
        }
        None if model.params().iter().next().is_none() => {}
        None => return Err(Failure::new("the model has parameters; name their file with --weights")),
    }
    let inputs = TensorFile::open(&args.inputs)?.tensors()?;
    let options = RunOptions { gradients: args.grad, ..RunOptions::default() };
    let outputs = model.run(&inputs, &call, &options).map_err(|error| match error.kind() {
        ErrorKind::Option { .. } => in_config(error),
        _ => Failure::from(error).within(&args.inputs),
    })?;
    write_safetensors(&args.outputs, &outputs, &BTreeMap::new())?;
    let (count, gradients) = (outputs.len(), outputs.keys().filter(|name| name.starts_with("grad.")).count());
    print(format_args!("{}: {count} tensors, {gradients} of them gradients\n", args.outputs.display()))
}
