//! `--task classify` and `--task regress` from random weights: an encoder by `--preset`.

use x_transformers::{
    Device,
    config::{Config, TransformerWrapperConfig},
    train::{Classifier, ClassifierConfig, TrainModel, Trainer},
};

use super::{
    RATES, TrainArgs,
    data::{Data, Own},
    fit, length,
    task::Kind,
};
use crate::failure::{Failure, Result};

/// Begins a run.
pub fn begin(args: &TrainArgs, device: &Device) -> Result<()> {
    let Some(preset) = args.preset else {
        return Err(Failure::new(
            "`--task classify` and `--task regress` require `--from` a pretrained encoder, such as MiniLM, or `--preset \
             bert-base`",
        ));
    };
    let Some(tokenizer) = args.data.tokenizer() else {
        return Err(Failure::new("an encoder with random weights requires `--tokenizer`, such as BERT's"));
    };
    let classes = (args.task == Kind::Classify).then_some(&args.labels[..]);
    let (Data { source, about }, labels) = args.data.labelled(Own::open(tokenizer)?, classes)?;
    let net = args.keywords.apply(Config::TransformerWrapper(preset.encoder(about.num_tokens)?))?;
    let Config::TransformerWrapper(net) = net else {
        return Err(Failure::new("`--set` cannot change the class of the model"));
    };
    let config = ClassifierConfig::new(TransformerWrapperConfig { pooler: true, ..net.clone() }, labels)?;
    let longest = length(<Classifier as TrainModel>::max_seq_len(&config));
    let options = args.train_options(longest, RATES[0] / 10.0);
    fit::check_as(args, &Config::TransformerWrapper(net), &options, device, &|store| {
        Classifier::build(&config, store).map(drop)
    })?;
    super::begin(args, args.build(|| Trainer::<Classifier>::start(config, options, source, device))?, about, device)
}
