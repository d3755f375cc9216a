//! `--task mlm`: encoders that predict masked tokens.

use std::{collections::BTreeMap, path::Path};

use x_transformers::{
    Device, Result as LibraryResult, Tensor,
    config::{Config, LayersKind, LayersPlan, TransformerWrapperConfig},
    pretrained::Pretrained,
    train::{Masked, MaskedBatch, MaskedLm, MaskedLmConfig, TrainModel, TrainOptions, Trainer},
};

use super::{
    RATES, TrainArgs, begin as begin_run, check_vocabulary,
    data::{About, Data, DataArgs, Own},
    fit, length,
    task::Task,
};
use crate::{
    failure::{Failure, Result},
    files,
    metrics::Target,
    tokenizer::Tokenizer,
};

/// Begins a run of a new encoder, or with the one at `--from`.
pub fn begin(args: &TrainArgs, device: &Device) -> Result<()> {
    if args.lora.options().is_some() {
        return Err(Failure::new("`--lora-rank` requires `--task lm` or `dpo`; an encoder is trained in full"));
    }
    let Some(from) = &args.from else {
        let data = args.data.open(None)?;
        let mask = mask_token(&data)?;
        let config = with_probability(MaskedLmConfig::new(encoder(args, &data, mask)?, mask)?, args);
        // As for classes of texts.
        let rate = if args.preset.is_some() { RATES[0] / 10.0 } else { RATES[0] };
        return start(args, config, None, data, rate, device);
    };
    if Pretrained::is_one(from) {
        let pretrained = Pretrained::open(from)?;
        let own = Own::of_pretrained(&pretrained, args.data.tokenizer())?;
        let missing = || Failure::new("has no mask token, such as [MASK]").within(from);
        let mask = mask_of(own.tokenizer()?).ok_or_else(missing)?;
        let (config, weights) = MaskedLmConfig::of_pretrained(&pretrained, mask)?;
        let data = args.data.open(Some(own))?;
        return start(args, with_probability(config, args), Some(weights), data, RATES[1], device);
    }
    let folder = files::checkpoint(from);
    if MaskedLmConfig::read(&folder)?.is_none() {
        let why = "is not a masked language model: expected a pretrained BERT with its head, or a run of `--task mlm`";
        return Err(Failure::new(why).within(from));
    }
    let (config, weights) = MaskedLmConfig::load(&folder)?;
    let own = Own::of_run(&folder, &args.data)?;
    start(args, with_probability(config, args), Some(weights), args.data.open(own)?, RATES[0], device)
}

fn with_probability(mut config: MaskedLmConfig, args: &TrainArgs) -> MaskedLmConfig {
    config.mask_probability = args.mask_prob.unwrap_or(config.mask_probability);
    config
}

fn start(
    args: &TrainArgs,
    config: MaskedLmConfig,
    weights: Option<BTreeMap<String, Tensor>>,
    data: Data,
    rate: f64,
    device: &Device,
) -> Result<()> {
    let (longest, num_tokens) =
        (<MaskedLm as TrainModel>::max_seq_len(&config), <MaskedLm as TrainModel>::num_tokens(&config));
    let options = args.train_options(length(longest), rate);
    check_vocabulary(&data.about, num_tokens)?;
    fit::check_as(args, &Config::TransformerWrapper(config.encoder()?), &options, device, &|store| {
        MaskedLm::build(&config, store).map(drop)
    })?;
    let Data { source, about } = masked(data, &config)?;
    let trainer = match &weights {
        Some(weights) => args.build(|| Trainer::<MaskedLm>::start_from(config, weights, options, source, device))?,
        None => args.build(|| Trainer::<MaskedLm>::start(config, options, source, device))?,
    };
    drop(weights);
    begin_run(args, trainer, about, device)
}

/// Returns the mask token of a tokenizer, by its usual names.
fn mask_of(tokenizer: &Tokenizer) -> Option<i64> {
    ["[MASK]", "<mask>", "<|mask|>"].iter().find_map(|name| tokenizer.token(name))
}

/// Returns the mask token of the data: that of the tokenizer, or one after its vocabulary.
fn mask_token(data: &Data) -> Result<i64> {
    let own = data.about.language.as_ref().and_then(|language| mask_of(language.tokenizer()?));
    let after = data.about.num_tokens.map(|count| count as i64);
    own.or(after)
        .ok_or_else(|| Failure::new("the token files do not say the size of their vocabulary; give `--tokenizer`"))
}

/// Returns the options of a new encoder.
fn encoder(args: &TrainArgs, data: &Data, mask: i64) -> Result<TransformerWrapperConfig> {
    let num_tokens = data.about.num_tokens.unwrap_or_default().max(mask as usize + 1);
    let config = match (&args.preset, &args.config) {
        (Some(preset), _) => {
            let bert = preset.encoder(Some(num_tokens))?;
            let head = TransformerWrapperConfig {
                pooler: false,
                return_only_embed: false,
                tie_embedding: true,
                mlm_head: true,
                ..bert
            };
            Config::TransformerWrapper(head)
        }
        (None, Some(path)) => {
            let broken = |error: x_transformers::Error| Failure::from(error).within(path);
            Config::from_json(&files::config(path)?).map_err(broken)?
        }
        (None, None) => {
            let mut attn_layers = args.model.layers(false);
            attn_layers.kind = LayersKind::Encoder;
            let max_seq_len = args.options.seq_len.unwrap_or(TrainOptions::default().seq_len);
            Config::TransformerWrapper(TransformerWrapperConfig {
                num_tokens,
                max_seq_len,
                attn_layers,
                ..Default::default()
            })
        }
    };
    match args.keywords.apply(config)? {
        Config::TransformerWrapper(net) if net.attn_layers.kind == LayersKind::Encoder => Ok(net),
        _ => {
            let why = "`--task mlm` trains a TransformerWrapper with an Encoder";
            let failure = Failure::new(why);
            Err(args.config.as_ref().map_or_else(|| Failure::new(why), |path| failure.within(path)))
        }
    }
}

/// Returns the data with masks.
fn masked(data: Data, config: &MaskedLmConfig) -> Result<Data<MaskedBatch>> {
    let Data { source, mut about } = data;
    if about.chats {
        return Err(Failure::new("chats are for `--task lm` and `dpo`; masked tokens are predicted in texts"));
    }
    // Files of tokens may have no tokenizer; what ends their texts is special.
    let special = match about.language.as_ref().map(|language| language.tokenizer()) {
        Some(Some(tokenizer)) => tokenizer.special_tokens(),
        Some(None) => Vec::new(),
        None => about.prompt.clone(),
    };
    (about.target, about.baseline, about.bytes_per_token, about.prompt) = (Target::Masked, None, None, Vec::new());
    let source = Masked::new(source, config.mask_token, special)?.with_probability(config.mask_probability)?;
    Ok(Data { source: Box::new(source), about })
}

impl Task for MaskedLm {
    /// Targets that the model predicts, and all.
    type Seen = [usize; 2];

    fn data(args: &DataArgs, own: Option<Own>, checkpoint: &Path) -> Result<Data<MaskedBatch>> {
        let missing = || Failure::new("is not a run of `--task mlm`").within(checkpoint);
        masked(args.open(own)?, &MaskedLmConfig::read(checkpoint)?.ok_or_else(missing)?)
    }

    fn layers(&self) -> &LayersPlan {
        &self.net().plan().layers
    }

    fn hint(dir: &str, about: &About) -> Option<String> {
        // Sentences are embedded by a tokenizer.
        about.tokenizer.as_ref().map(|_| format!("train --task embed --from {dir} --jsonl …"))
    }

    fn see(&self, batch: &MaskedBatch, [right, all]: &mut Self::Seen) -> LibraryResult<()> {
        if batch.labels.numel() > 0 {
            let (predicted, labels) = (self.predict(batch)?.to_vec::<i64>()?, batch.labels.to_vec::<i64>()?);
            *right += predicted.iter().zip(&labels).filter(|(one, other)| one == other).count();
            *all += labels.len();
        }
        Ok(())
    }

    fn scores(&self, [right, all]: Self::Seen, loss: f64) -> Vec<(&'static str, f64)> {
        vec![("perplexity", loss.exp()), ("accuracy", right as f64 / all.max(1) as f64)]
    }
}
