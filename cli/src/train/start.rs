//! `--from`: runs that begin with the weights of another model.

use std::{collections::BTreeMap, path::Path};

use x_transformers::{
    DType, Device, Tensor,
    config::{Config, ModelPlan},
    models::AutoregressiveWrapper,
    pretrained::Pretrained,
    train::{Checkpoint, Classifier, ClassifierConfig, LoraConfig, LoraModel, TrainModel, Trainer},
};

use super::{
    RATES, TrainArgs, begin as begin_run, check_vocabulary,
    data::{About, Data, Own},
    fit, length, longest,
    task::Kind,
};
use crate::{
    failure::{Failure, Result, warn},
    files,
};

/// Begins a run with the model at a path: all of its weights are trained, or an adapter.
pub fn begin(args: &TrainArgs, from: &Path, device: &Device) -> Result<()> {
    let lora = args.lora.options();
    if lora.is_some() {
        args.keep_reference(from)?;
    }
    if Pretrained::is_one(from) {
        let pretrained = Pretrained::open(from)?;
        let own = match Own::of_pretrained(&pretrained, args.data.tokenizer()) {
            // Token files need none.
            Err(_) if args.data.are_tokens() => None,
            own => Some(own?),
        };
        if let Some(lora) = lora {
            drop(pretrained);
            return adapter(args, LoraConfig::new(from, lora, args.options.seed)?, own, device);
        }
        let (config, weights) = pretrained.state_dict()?;
        return whole(args, config.into(), weights, RATES[1], own, device);
    }
    let folder = files::checkpoint(from);
    let own = Own::of_run(&folder, &args.data)?;
    if let Some(config) = LoraConfig::read(&folder)? {
        if lora.is_some() {
            let why = "trains an adapter, on which another one cannot be trained; export the merged model first";
            return Err(Failure::new(why).within(from));
        }
        let (_, params) = LoraModel::load(&folder, DType::F32, &Device::Cpu, false)?.merged()?;
        return whole(args, config.base_config()?, params.state_dict(), RATES[1], own, device);
    }
    if let Some(lora) = lora {
        return adapter(args, LoraConfig::new(&folder, lora, args.options.seed)?, own, device);
    }
    let (config, weights) = Checkpoint::load_averaged(&folder)?;
    if !matches!(config.plan().map_err(|error| Failure::from(error).within(from))?, ModelPlan::Autoregressive(_)) {
        let why = "expected an AutoregressiveWrapper; name a folder that `xt train` wrote";
        return Err(Failure::new(why).within(from));
    }
    whole(args, config, weights, RATES[0], own, device)
}

/// Begins a run that trains an encoder with a head on texts with labels.
pub fn labelled(args: &TrainArgs, from: &Path, device: &Device) -> Result<()> {
    if args.lora.options().is_some() {
        return Err(Failure::new("`--lora-rank` requires `--task lm`; an encoder is trained in full"));
    }
    if !Pretrained::is_one(from) {
        return Err(Failure::new("is not a pretrained encoder, such as MiniLM").within(from));
    }
    let pretrained = Pretrained::open(from)?;
    let own = Own::of_pretrained(&pretrained, args.data.tokenizer())?;
    let classes = (args.task == Kind::Classify).then_some(&args.labels[..]);
    let (Data { source, about }, labels) = args.data.labelled(own, classes)?;
    let (config, weights) = ClassifierConfig::of_pretrained(&pretrained, labels, args.options.seed)?;
    drop(pretrained);
    let longest = <Classifier as TrainModel>::max_seq_len(&config);
    let options = args.train_options(length(longest), RATES[1]);
    let trainer = args.build(|| Trainer::<Classifier>::start_from(config, &weights, options, source, device))?;
    drop(weights);
    begin_run(args, trainer, about, device)
}

/// Begins a run that trains all weights.
fn whole(
    args: &TrainArgs,
    config: Config,
    weights: BTreeMap<String, Tensor>,
    rate: f64,
    own: Option<Own>,
    device: &Device,
) -> Result<()> {
    let (longest, num_tokens) = (longest(&config), num_tokens(&config));
    let options = args.train_options(longest, rate);
    fit::check(args, &config, &options, device)?;
    let Data { source, about } = open(args, own, options.seq_len, num_tokens)?;
    let trainer =
        args.build(|| Trainer::<AutoregressiveWrapper>::start_from(config, &weights, options, source, device))?;
    drop(weights);
    begin_run(args, trainer, about, device)
}

/// Begins a run that trains an adapter.
fn adapter(args: &TrainArgs, config: LoraConfig, own: Option<Own>, device: &Device) -> Result<()> {
    let base = config.base_config()?;
    let options = args.train_options(longest(&base), RATES[2]);
    let Data { source, about } = open(args, own, options.seq_len, num_tokens(&base))?;
    begin_run(args, args.build(|| Trainer::<LoraModel>::start(config, options, source, device))?, about, device)
}

fn num_tokens(config: &Config) -> usize {
    <AutoregressiveWrapper as TrainModel>::num_tokens(config)
}

/// Opens the data, with a warning about chats that are cut.
fn open(args: &TrainArgs, own: Option<Own>, seq_len: usize, num_tokens: usize) -> Result<Data> {
    let data = args.data.open(own)?;
    check_vocabulary(&data.about, num_tokens)?;
    warn_of_cut(&data.about, seq_len);
    Ok(data)
}

fn warn_of_cut(about: &About, seq_len: usize) {
    let longer = about.lengths.iter().filter(|&&length| length > seq_len + 1).count();
    if longer > 0 {
        let count = about.lengths.len();
        warn(format_args!("{longer} of {count} chats are cut to {seq_len} tokens; `--seq-len` changes it"));
    }
}
