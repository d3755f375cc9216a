//! Masked language models.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{
    Checkpoint, MaskedBatch, TrainModel, TrainOptions,
    encoder::{check_is_encoder, encoder, max_seq_len},
};
use crate::{
    DType, Device, Error, ParamStore, Result, Tensor,
    config::{Config, LayersKind, TransformerWrapperConfig},
    error::{ErrorContext, ensure},
    models::{ForwardOptions, TransformerWrapper},
    ordered::ordered,
    pretrained::Pretrained,
};

/// Options of a [`MaskedLm`]: `config.json` in the checkpoint of its run.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MaskedLmConfig {
    model: Class,
    /// Options of the encoder, a [`TransformerWrapper`] with logits.
    pub net: Value,
    /// Token that stands for a masked one.
    pub mask_token: i64,
    /// Probability that a token is masked.
    pub mask_probability: f64,
}

/// The value of `model` by which these options are known.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
enum Class {
    MaskedLm,
}

impl MaskedLmConfig {
    /// Creates the options of an encoder with logits; 15 % of the tokens are masked.
    ///
    /// Errors: a decoder; an encoder without logits; a mask token out of the vocabulary; options that are illegal.
    pub fn new(net: TransformerWrapperConfig, mask_token: i64) -> Result<Self> {
        ensure!(
            net.attn_layers.kind == LayersKind::Encoder,
            Error::option("attn_layers", "must be an Encoder: a masked token is predicted from both sides")
        );
        ensure!(!net.return_only_embed, Error::option("return_only_embed", "must be false: masked tokens need logits"));
        ensure!(
            (0..net.num_tokens as i64).contains(&mask_token),
            Error::option("mask_token", format_args!("expected 0 to {}, got {mask_token}", net.num_tokens.max(1) - 1))
        );
        let net = Config::TransformerWrapper(TransformerWrapperConfig { pooler: false, ..net });
        net.plan()?;
        Ok(Self { model: Class::MaskedLm, net: net.to_value(), mask_token, mask_probability: 0.15 })
    }

    /// Creates the options and the weights of a pretrained BERT or ALBERT with its masked-LM head.
    ///
    /// Errors: a model that generates text; a file without the head; weights that cannot be read.
    pub fn of_pretrained(pretrained: &Pretrained, mask_token: i64) -> Result<(Self, BTreeMap<String, Tensor>)> {
        let path = pretrained.file().path();
        check_is_encoder(pretrained)?;
        ensure!(
            pretrained.config().mlm_head,
            Error::file(
                path,
                "has no masked-LM head tied to the embeddings (`cls.predictions`); use BertForMaskedLM's weights"
            )
        );
        let (net, mut weights) = pretrained.encoder_state_dict()?;
        weights.retain(|name, _| !name.starts_with("pooler."));
        let weights = ordered(weights.into_iter().map(|(name, value)| (format!("net.{name}"), value)));
        Ok((Self::new(net, mask_token)?, weights))
    }

    /// Reads the options of the checkpoint in a folder; `None` if it is not that of a masked language model.
    ///
    /// Errors: a `config.json` that cannot be read, or is damaged.
    pub fn read(folder: impl AsRef<std::path::Path>) -> Result<Option<Self>> {
        super::checkpoint::config_of(folder.as_ref(), "MaskedLm")
    }

    /// Reads the options and the weights of the checkpoint in a folder, with the averaged weights of a run that has them.
    ///
    /// Errors: those of [`Checkpoint::load`].
    pub fn load(folder: impl AsRef<std::path::Path>) -> Result<(Self, BTreeMap<String, Tensor>)> {
        Checkpoint::<Self>::averaged(folder.as_ref())
    }

    /// Reads the checkpoint in a folder, with the averaged weights of a run that has them: the options of its encoder, and the
    /// weights by the names of a [`TransformerWrapper`].
    ///
    /// Errors: those of [`Checkpoint::load`].
    pub fn load_encoder(
        folder: impl AsRef<std::path::Path>,
    ) -> Result<(TransformerWrapperConfig, BTreeMap<String, Tensor>)> {
        let (config, weights) = Self::load(folder)?;
        let weights = weights.into_iter().filter_map(|(name, value)| Some((name.strip_prefix("net.")?.into(), value)));
        Ok((config.encoder()?, ordered(weights)))
    }

    /// Returns the options of the encoder.
    ///
    /// Errors: options of another model.
    pub fn encoder(&self) -> Result<TransformerWrapperConfig> {
        encoder(&self.net)
    }
}

/// Encoder that predicts masked tokens, `BertForMaskedLM` (Devlin et al., <https://arxiv.org/abs/1810.04805>), trained on
/// [`Masked`](super::Masked) rows. The loss is the cross-entropy of the masked tokens; logits of the others are not computed.
///
/// ```
/// use x_transformers::{prelude::*, train::{Masked, MaskedLm, MaskedLmConfig}};
/// # fn main() -> x_transformers::Result<()> {
/// let net = TransformerWrapperConfig::new(257, 16, AttentionLayersConfig::encoder(16, 1));
/// let config = MaskedLmConfig::new(net, 256)?; // bytes, and a mask token
/// let text = ByteText::from_bytes("It was the best of times, it was the worst of times. ".repeat(10))?;
/// let options = TrainOptions { steps: 8, warmup: 1, seq_len: 16, lr: 1e-2, ..Default::default() };
/// let source = Masked::new(text, 256, vec![])?;
/// let mut trainer = Trainer::<MaskedLm>::start(config, options, source, &Device::Cpu)?;
/// let before = trainer.validate()?;
/// while trainer.steps_done() < 8 {
///     trainer.step()?;
/// }
/// assert!(trainer.validate()? < before);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
#[doc(alias = "BertForMaskedLM")]
pub struct MaskedLm {
    net: TransformerWrapper,
    config: MaskedLmConfig,
}

impl MaskedLm {
    /// Reads the checkpoint of a run, with the averaged weights of one that has them.
    ///
    /// Errors: those of [`Checkpoint::load`].
    pub fn load(folder: impl AsRef<std::path::Path>, dtype: DType, device: &Device) -> Result<Self> {
        super::model::load(folder.as_ref(), dtype, device)
    }

    /// Returns the options.
    pub fn config(&self) -> &MaskedLmConfig {
        &self.config
    }

    /// Returns the encoder.
    pub fn net(&self) -> &TransformerWrapper {
        &self.net
    }

    /// Returns the likeliest token for each target of a batch, `[targets]` I64.
    ///
    /// Errors: tokens that the model does not have.
    pub fn predict(&self, batch: &MaskedBatch) -> Result<Tensor> {
        self.net.logits(&self.hidden(batch, false)?)?.argmax(-1)
    }

    /// Returns normed hidden states of the targets, `[targets, dim]`.
    fn hidden(&self, batch: &MaskedBatch, checkpoint_layers: bool) -> Result<Tensor> {
        let options = ForwardOptions { return_embeddings: true, checkpoint_layers, ..ForwardOptions::default() };
        let hidden = self.net.forward(&batch.tokens, &options).context("net")?.out;
        let [b, n, dim] = [hidden.dim(0)?, hidden.dim(1)?, hidden.dim(2)?];
        hidden.reshape([b * n, dim])?.embedding(&batch.positions)
    }

    fn loss_with(&self, batch: &MaskedBatch, checkpoint_layers: bool) -> Result<Tensor> {
        self.net.cross_entropy(&self.hidden(batch, checkpoint_layers)?, &batch.labels, -100).context("net")
    }
}

impl TrainModel for MaskedLm {
    type Config = MaskedLmConfig;
    type Batch = MaskedBatch;

    fn build(config: &MaskedLmConfig, store: &ParamStore) -> Result<Self> {
        Ok(Self { net: TransformerWrapper::new(&config.encoder()?, &store.at("net"))?, config: config.clone() })
    }

    fn loss(&self, batch: &MaskedBatch) -> Result<Tensor> {
        self.loss_with(batch, false)
    }

    fn loss_recomputed(&self, batch: &MaskedBatch) -> Result<Tensor> {
        self.loss_with(batch, true)
    }

    fn check(config: &MaskedLmConfig, options: &TrainOptions) -> Result<()> {
        config.encoder()?;
        options.refuse_document_mask()
    }

    fn config_to_json(config: &MaskedLmConfig) -> Value {
        serde_json::to_value(config).unwrap_or_default()
    }

    fn config_from_json(json: Value) -> Result<MaskedLmConfig> {
        super::model::parse(json, "a masked language model")
    }

    fn num_tokens(config: &MaskedLmConfig) -> usize {
        config.encoder().map_or(0, |net| net.num_tokens)
    }

    fn max_seq_len(config: &MaskedLmConfig) -> usize {
        config.encoder().map_or(0, |net| max_seq_len(&net))
    }
}
