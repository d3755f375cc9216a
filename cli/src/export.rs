//! `xt export`: checkpoints in the layouts of other programs.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use clap::{Args, ValueEnum};
use serde_json::json;
use x_transformers::{
    DType, Device, Error, ErrorKind, ParamStore, Tensor,
    config::{Config, ModelPlan},
    io::{create_folders, write_atomically, write_safetensors},
    models::AutoregressiveWrapper,
    pretrained::{self, Pretrained},
    train::{Checkpoint, LoraConfig, LoraModel, TrainModel},
};

use crate::{
    failure::{Failure, Result, print},
    files::{self, quoted},
    language::Language,
    stored::StoredTokenizer,
    typed,
};

/// Layout of the folder that is written.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Layout {
    /// A folder of `transformers`, with an adapter merged into the weights
    Transformers,
    /// The adapter alone, as PEFT has it
    Peft,
    /// Config and weights by the names of PyTorch x-transformers, with an adapter merged
    XTransformers,
}

#[derive(Args)]
pub struct ExportArgs {
    /// Path of the model: a run of `xt train`, or a pretrained model, which may be a GGUF file
    #[arg(long, value_name = "PATH")]
    checkpoint: PathBuf,

    /// Layout of the folder
    #[arg(long, value_enum, default_value = "transformers")]
    layout: Layout,

    /// Folder to write
    #[arg(long, value_name = "DIR")]
    output: PathBuf,

    /// Write into a folder that has a model already
    #[arg(long)]
    overwrite: bool,

    /// Data type of the written weights
    #[arg(long, default_value = "f32", value_parser = crate::compute::dtypes([DType::F32, DType::BF16, DType::F16]))]
    dtype: DType,
}

/// A model that is exported: its options and weights, whose names begin with `net.`.
struct Model {
    config: Config,
    weights: BTreeMap<String, Tensor>,
    tokenizer: Option<StoredTokenizer>,
    /// Tokens that end a text.
    ends: Vec<i64>,
}

pub fn run(args: ExportArgs) -> Result<()> {
    let output = &args.output;
    let marker = if args.layout == Layout::Peft { "adapter_config.json" } else { "config.json" };
    if output.join(marker).exists() && !args.overwrite {
        let why = "holds a model already; replace it with `--overwrite`, or choose another folder";
        return Err(Failure::new(why).within(output));
    }
    let (xt, dir) = (typed::program(), quoted(output));
    match args.layout {
        Layout::Peft => {
            let base = adapter(&args.checkpoint, output)?;
            print(format_args!("wrote       an adapter of {}\n", base.display()))?;
            print(format_args!("try         {xt} chat --checkpoint {} --adapter {dir}\n", quoted(&base)))
        }
        Layout::Transformers => {
            let Model { config, weights, tokenizer, ends } = model(&args.checkpoint)?;
            let Config::AutoregressiveWrapper(config) = config else {
                return Err(Failure::new("is of x-transformers 2, which transformers has no model for")
                    .within(&args.checkpoint));
            };
            let parameter = |name: &str| {
                let name = format!("net.{name}");
                let missing = || ErrorKind::Weights { missing: vec![name.clone()], unused: vec![], mismatched: vec![] };
                weights.get(&name).ok_or_else(|| Error::new(missing()))?.to_dtype(args.dtype)
            };
            let family = pretrained::write_folder(output, &config.net, &ends, parameter)?;
            tokenizer.iter().try_for_each(|tokenizer| tokenizer.write(output))?;
            print(format_args!("wrote       a model of the {family} family to {}\n", output.display()))?;
            if tokenizer.is_some() {
                print(format_args!("try         {xt} generate --checkpoint {dir} --prompt \"The \"\n"))?;
            }
            Ok(())
        }
        Layout::XTransformers => {
            let Model { config, weights, tokenizer, .. } = model(&args.checkpoint)?;
            create_folders(output)?;
            let weights = weights.into_iter().map(|(name, value)| Ok((name, value.to_dtype(args.dtype)?)));
            let weights = weights.collect::<Result<_>>()?;
            let metadata = [("format".to_string(), "pt".to_string())].into();
            write_safetensors(output.join("model.safetensors"), &weights, &metadata)?;
            tokenizer.iter().try_for_each(|tokenizer| tokenizer.write(output))?;
            let text = format!("{:#}\n", json!(config.to_value()));
            write_atomically(output.join("config.json"), |file| file.write_all(text.as_bytes()))?;
            print(format_args!("wrote       config.json and model.safetensors to {}\n", output.display()))
        }
    }
}

/// Reads a run with its adapter merged, or a pretrained model.
fn model(path: &Path) -> Result<Model> {
    if Pretrained::is_one(path) {
        let pretrained = Pretrained::open(path)?;
        let (config, weights) = pretrained.state_dict()?;
        // A folder without a tokenizer has weights all the same.
        let tokenizer = StoredTokenizer::of_pretrained(&pretrained, None).ok().map(StoredTokenizer::without_origin);
        return Ok(Model { config: config.into(), weights, tokenizer, ends: pretrained.end_tokens().to_vec() });
    }
    let folder = files::checkpoint(path);
    let training = Checkpoint::load_training(&folder).ok();
    let kept = training.and_then(|training| training.tokenizer).map(|name| folder.join(name));
    let ends = kept.as_deref().map(Language::open).transpose()?.map_or_else(Vec::new, |own| own.ends().to_vec());
    let tokenizer = kept.as_deref().map(StoredTokenizer::read).transpose()?.map(StoredTokenizer::without_origin);
    if let Some(config) = LoraConfig::read(&folder)? {
        let (_, params) = LoraModel::load(&folder, DType::F32, &Device::Cpu, false)?.merged()?;
        return Ok(Model { config: config.base_config()?, weights: params.state_dict(), tokenizer, ends });
    }
    let (config, weights) = Checkpoint::load_averaged(&folder)?;
    let broken = |error: Error| Failure::from(error).within(path);
    if !matches!(config.plan().map_err(broken)?, ModelPlan::Autoregressive(_)) {
        let why = "expected an AutoregressiveWrapper; name a folder that `xt train` wrote";
        return Err(Failure::new(why).within(path));
    }
    // Weights that do not fit the config are an error here.
    let store = ParamStore::zeros(DType::F32, &Device::Cpu);
    <AutoregressiveWrapper as TrainModel>::build(&config, &store)?;
    store.params().load(&weights).map_err(broken)?;
    Ok(Model { config, weights: store.params().state_dict(), tokenizer, ends })
}

/// Writes the adapter of a run; gives the path of its base.
fn adapter(path: &Path, output: &Path) -> Result<PathBuf> {
    let folder = files::checkpoint(path);
    let Some(config) = LoraConfig::read(&folder)? else {
        let why = "is not a run that trained an adapter (`xt train --lora-rank`)";
        return Err(Failure::new(why).within(path));
    };
    if !Pretrained::is_one(&config.base) {
        let why = "has an adapter of a model of `xt train`, which PEFT cannot load; export the merged model";
        return Err(Failure::new(why).within(path));
    }
    let tuned = LoraModel::load(&folder, DType::F32, &Device::Cpu, true)?;
    Pretrained::open(&config.base)?.save_adapter(tuned.adapter(), output)?;
    Ok(config.base)
}
