//! Classification and regression of texts by an encoder with a head.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{
    LabelledBatch, TrainModel, TrainOptions,
    encoder::{check_is_encoder, encoder, max_seq_len},
};
use crate::{
    DType, Device, Error, Init, ParamStore, Result, Tensor,
    config::{Config, TransformerWrapperConfig},
    error::{ErrorContext, ensure},
    models::{ForwardOptions, TransformerWrapper},
    nn::Linear,
    pretrained::Pretrained,
};

/// Standard deviation of the head's initial weights, as in BERT.
const DEVIATION: f64 = 0.02;

/// Options of a [`Classifier`]: `config.json` in the checkpoint of its run.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClassifierConfig {
    model: Class,
    /// Options of the encoder, a [`TransformerWrapper`] with a `pooler`.
    pub net: Value,
    /// Names of the classes, in order; empty for a regression, which predicts one number.
    pub labels: Vec<String>,
    /// Dropout of the pooled vector before the head.
    pub dropout: f64,
}

/// The value of `model` by which these options are known.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
enum Class {
    Classifier,
}

impl ClassifierConfig {
    /// Creates the options of a head on an encoder, with BERT's dropout of 0.1.
    ///
    /// Errors: a single class; options of an encoder that are illegal.
    pub fn new(net: TransformerWrapperConfig, labels: Vec<String>) -> Result<Self> {
        ensure!(labels.len() != 1, Error::option("labels", format_args!("expected at least 2, got {labels:?} alone")));
        let net = TransformerWrapperConfig {
            pooler: true,
            mlm_head: false,
            tie_embedding: false,
            return_only_embed: true,
            ..net
        };
        let net = Config::TransformerWrapper(net);
        net.plan()?;
        Ok(Self { model: Class::Classifier, net: net.to_value(), labels, dropout: 0.1 })
    }

    /// Creates the options and the weights of a classifier with a pretrained encoder, such as BERT or MiniLM. The head, and
    /// the pooler of a file that has none, are random.
    ///
    /// Errors: a model that generates text; weights that cannot be read.
    pub fn of_pretrained(
        pretrained: &Pretrained,
        labels: Vec<String>,
        seed: u64,
    ) -> Result<(Self, BTreeMap<String, Tensor>)> {
        check_is_encoder(pretrained)?;
        let (net, weights) = pretrained.encoder_state_dict()?;
        let config = Self::new(net, labels)?;
        let store = ParamStore::new(seed, DType::F32, &Device::Cpu);
        Classifier::build(&config, &store)?;
        let mut all = store.params().state_dict();
        for (name, value) in weights {
            if let Some(own) = all.get_mut(&format!("net.{name}")) {
                *own = value;
            }
        }
        Ok((config, all))
    }

    /// Reads the options of the checkpoint in a folder; `None` if it is not that of a classifier.
    ///
    /// Errors: a `config.json` that cannot be read, or is damaged.
    pub fn read(folder: impl AsRef<std::path::Path>) -> Result<Option<Self>> {
        super::checkpoint::config_of(folder.as_ref(), "Classifier")
    }

    fn encoder(&self) -> Result<TransformerWrapperConfig> {
        encoder(&self.net)
    }
}

/// Encoder with a linear layer on its pooled vector, `BertForSequenceClassification`: the classes of texts, or a number.
///
/// The loss is the cross-entropy of the classes, or the mean square error of a regression.
///
/// ```
/// use x_transformers::{prelude::*, train::{Classifier, ClassifierConfig, Label, LabelledText, LabelledTexts}};
/// # fn main() -> x_transformers::Result<()> {
/// let net = TransformerWrapperConfig::new(40, 16, AttentionLayersConfig::encoder(16, 1));
/// let config = ClassifierConfig::new(net, vec!["bad".into(), "good".into()])?;
/// let text = |token, class| LabelledText { tokens: vec![2, token, 3], label: Label::Class(class) };
/// let texts = vec![text(7, 0), text(8, 1)];
/// let source = LabelledTexts::new(texts.clone(), texts, 2)?;
/// let options = TrainOptions { steps: 8, warmup: 1, batch_size: 2, seq_len: 16, lr: 1e-2, ..Default::default() };
/// let mut trainer = Trainer::<Classifier>::start(config, options, source, &Device::Cpu)?;
/// let before = trainer.validate()?;
/// while trainer.steps_done() < 8 {
///     trainer.step()?;
/// }
/// assert!(trainer.validate()? < before);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
#[doc(alias = "BertForSequenceClassification")]
pub struct Classifier {
    net: TransformerWrapper,
    head: Linear,
    dropout: f64,
    config: ClassifierConfig,
}

impl Classifier {
    /// Reads the checkpoint of a run, with the averaged weights of one that has them.
    ///
    /// Errors: those of [`Checkpoint::load`](super::Checkpoint::load).
    pub fn load(folder: impl AsRef<std::path::Path>, dtype: DType, device: &Device) -> Result<Self> {
        super::model::load(folder.as_ref(), dtype, device)
    }

    /// Returns the options.
    pub fn config(&self) -> &ClassifierConfig {
        &self.config
    }

    /// Returns the encoder.
    pub fn net(&self) -> &TransformerWrapper {
        &self.net
    }

    /// Computes a logit for each class, or the number of a regression: `[b, n] → [b, classes]`. `mask` marks real tokens.
    ///
    /// Errors: tokens that the model does not have.
    pub fn logits(&self, tokens: &Tensor, mask: &Tensor) -> Result<Tensor> {
        self.logits_with(tokens, mask, false)
    }

    fn logits_with(&self, tokens: &Tensor, mask: &Tensor, checkpoint_layers: bool) -> Result<Tensor> {
        let mask = Some(mask.clone());
        let options = ForwardOptions { mask, return_embeddings: true, checkpoint_layers, ..ForwardOptions::default() };
        let hidden = self.net.forward(tokens, &options).context("net")?.out;
        let pooled = self.net.pooled(&hidden).context("net")?.dropout(self.dropout)?;
        self.head.forward(&pooled).context("classifier")
    }

    fn loss_of(&self, logits: &Tensor, batch: &LabelledBatch) -> Result<Tensor> {
        let logits = logits.to_dtype(logits.dtype().accumulator())?;
        let classes = batch.labels.dtype() == DType::I64;
        ensure!(
            classes != self.config.labels.is_empty(),
            Error::argument("classifier", "expected classes for a classification, values for a regression")
        );
        if classes {
            return logits.cross_entropy(&batch.labels, -100);
        }
        logits.squeeze(1)?.sub(&batch.labels.to_dtype(logits.dtype())?)?.square()?.mean(&[])
    }
}

impl TrainModel for Classifier {
    type Config = ClassifierConfig;
    type Batch = LabelledBatch;

    fn build(config: &ClassifierConfig, store: &ParamStore) -> Result<Self> {
        let net = config.encoder()?;
        ensure!(
            (0.0..1.0).contains(&config.dropout),
            Error::option("dropout", format_args!("expected at least 0 and below 1, got {}", config.dropout))
        );
        let model = TransformerWrapper::new(&net, &store.at("net"))?;
        let (weight, bias) = (Init::Normal(DEVIATION), Some(Init::Constant(0.0)));
        let outputs = config.labels.len().max(1);
        let head = Linear::with_init(&store.at("classifier"), net.attn_layers.dim, outputs, weight, bias)?;
        Ok(Self { net: model, head, dropout: config.dropout, config: config.clone() })
    }

    fn loss(&self, batch: &LabelledBatch) -> Result<Tensor> {
        self.loss_of(&self.logits(&batch.tokens, &batch.mask)?, batch)
    }

    fn loss_recomputed(&self, batch: &LabelledBatch) -> Result<Tensor> {
        self.loss_of(&self.logits_with(&batch.tokens, &batch.mask, true)?, batch)
    }

    fn check(config: &ClassifierConfig, options: &TrainOptions) -> Result<()> {
        config.encoder()?;
        options.refuse_document_mask()
    }

    fn config_to_json(config: &ClassifierConfig) -> Value {
        serde_json::to_value(config).unwrap_or_default()
    }

    fn config_from_json(json: Value) -> Result<ClassifierConfig> {
        super::model::parse(json, "a classifier")
    }

    fn num_tokens(config: &ClassifierConfig) -> usize {
        config.encoder().map_or(0, |net| net.num_tokens)
    }

    fn max_seq_len(config: &ClassifierConfig) -> usize {
        config.encoder().map_or(0, |net| max_seq_len(&net))
    }
}
