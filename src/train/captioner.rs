//! Captions of images: a vision transformer, and a decoder that attends to it.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{CaptionBatch, ImageTransform, TrainModel, TrainOptions};
use crate::{
    DType, Device, Error, ParamStore, Result, Tensor,
    config::{AutoregressivePlan, Config, ModelPlan, ViTransformerPlan},
    error::{ErrorContext, ensure},
    models::{AutoregressiveWrapper, ForwardOptions, GenerateOptions, ViTransformerWrapper},
};

/// Options of a [`Captioner`]: `config.json` in the checkpoint of its run.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CaptionerConfig {
    model: Class,
    /// Options of the encoder, a [`ViTransformerWrapper`] without classes.
    pub encoder: Value,
    /// Options of the decoder, an [`AutoregressiveWrapper`] with `cross_attend`.
    pub decoder: Value,
    /// Preparation of the images.
    pub transform: ImageTransform,
    /// If `true`, half of the images of training steps are mirrored. Default `false`.
    pub flip: bool,
}

/// The value of `model` by which these options are known.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
enum Class {
    Captioner,
}

impl CaptionerConfig {
    /// Creates the options of an encoder, which sees images of this size, and a decoder of the same width.
    ///
    /// Errors: other models, illegal options, widths that differ.
    pub fn new(encoder: impl Into<Config>, decoder: impl Into<Config>, image_size: usize) -> Result<Self> {
        let (encoder, decoder) = (encoder.into(), decoder.into());
        let ModelPlan::Vision(plan) = encoder.plan()? else { return Err(wrong("encoder", "a ViTransformerWrapper")) };
        let config = Self {
            model: Class::Captioner,
            encoder: encoder.to_value(),
            decoder: decoder.to_value(),
            transform: ImageTransform::new(image_size, plan.channels),
            flip: false,
        };
        config.plans()?;
        Ok(config)
    }

    /// Reads the options of the checkpoint in a folder; `None` if it is not that of a captioner.
    ///
    /// Errors: a `config.json` that cannot be read, or is damaged.
    pub fn read(folder: impl AsRef<Path>) -> Result<Option<Self>> {
        super::checkpoint::config_of(folder.as_ref(), "Captioner")
    }

    fn plans(&self) -> Result<(ViTransformerPlan, AutoregressivePlan)> {
        let plan = |value: &Value| Config::from_value(value.clone())?.plan();
        let ModelPlan::Vision(encoder) = plan(&self.encoder).context("encoder")? else {
            return Err(wrong("encoder", "a ViTransformerWrapper"));
        };
        let ModelPlan::Autoregressive(decoder) = plan(&self.decoder).context("decoder")? else {
            return Err(wrong("decoder", "an AutoregressiveWrapper"));
        };
        self.transform.check().context("transform")?;
        ensure!(
            encoder.channels == self.transform.channels(),
            Error::option(
                "channels",
                format_args!("expected 1 or 3 in encoder and transform, got {}", encoder.channels)
            )
        );
        ensure!(
            decoder.net.layers.cross_attend && decoder.net.layers.dim == encoder.layers.dim,
            Error::option(
                "decoder",
                format_args!(
                    "expected `cross_attend` and the width of the encoder ({}), got {}",
                    encoder.layers.dim, decoder.net.layers.dim
                )
            )
        );
        Ok((encoder, decoder))
    }
}

fn wrong(side: &str, expected: &str) -> Error {
    Error::option(side, format_args!("expected {expected}, got another model"))
}

/// Encoder of images, and a decoder with cross-attention that writes their captions.
///
/// ```
/// use x_transformers::{
///     config::{Config, ViTransformerWrapperConfig},
///     prelude::*,
///     train::{CaptionedImages, Captioner, CaptionerConfig, Image},
/// };
/// # fn main() -> x_transformers::Result<()> {
/// let encoder = Config::ViTransformerWrapper(ViTransformerWrapperConfig {
///     image_size: 8,
///     patch_size: 4,
///     attn_layers: AttentionLayersConfig::encoder(16, 1),
///     ..Default::default()
/// });
/// let layers = AttentionLayersConfig { cross_attend: true, ..AttentionLayersConfig::decoder(16, 1) };
/// let net = TransformerWrapperConfig::new(16, 8, layers);
/// let config = CaptionerConfig::new(encoder, AutoregressiveConfig { net, ..Default::default() }, 8)?;
/// let (transform, own) = (config.transform.clone(), config.transform.clone());
/// let load = move |number| own.crop(&Image::new(8, 8, 3, vec![200 * number as u8; 8 * 8 * 3])?);
/// let captions = vec![(0, vec![5, 6]), (1, vec![7, 6])];
/// let source = CaptionedImages::new("greys", captions.clone(), captions, 0, transform, load)?;
/// let options = TrainOptions { steps: 4, warmup: 1, batch_size: 2, seq_len: 8, lr: 1e-2, ..Default::default() };
/// let mut trainer = Trainer::<Captioner>::start(config, options, source, &Device::Cpu)?;
/// let before = trainer.validate()?;
/// while trainer.steps_done() < 4 {
///     trainer.step()?;
/// }
/// assert!(trainer.validate()? < before);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
#[doc(alias = "VisionEncoderDecoderModel")]
pub struct Captioner {
    encoder: ViTransformerWrapper,
    decoder: AutoregressiveWrapper,
    dtype: DType,
    config: CaptionerConfig,
}

impl Captioner {
    /// Reads the checkpoint of a run, with the averaged weights of one that has them.
    ///
    /// Errors: those of [`Checkpoint::load`](super::Checkpoint::load).
    pub fn load(folder: impl AsRef<Path>, dtype: DType, device: &Device) -> Result<Self> {
        super::model::load(folder.as_ref(), dtype, device)
    }

    /// Returns the options.
    pub fn config(&self) -> &CaptionerConfig {
        &self.config
    }

    /// Returns the decoder.
    pub fn decoder(&self) -> &AutoregressiveWrapper {
        &self.decoder
    }

    /// Continues captions that begin with `start`, `[b, t]`, of images `[b, channels, height, width]`, like
    /// [`AutoregressiveWrapper::generate`].
    ///
    /// Errors: those of [`AutoregressiveWrapper::generate`]; images that the encoder does not take.
    pub fn generate(
        &self,
        images: &Tensor,
        start: &Tensor,
        seq_len: usize,
        options: &GenerateOptions,
        on_token: &mut dyn FnMut(&[i64]) -> bool,
    ) -> Result<Tensor> {
        let forward = ForwardOptions { context: Some(self.encode(images, false)?), ..options.forward.clone() };
        self.decoder
            .generate(start, seq_len, &GenerateOptions { forward, ..options.clone() }, on_token)
            .context("decoder")
    }

    fn encode(&self, images: &Tensor, checkpoint_layers: bool) -> Result<Tensor> {
        self.encoder.embeddings_with(&images.to_dtype(self.dtype)?, checkpoint_layers).context("encoder")
    }

    fn loss_with(&self, batch: &CaptionBatch, checkpoint_layers: bool) -> Result<Tensor> {
        let context = Some(self.encode(&batch.images, checkpoint_layers)?);
        let options = ForwardOptions { context, checkpoint_layers, ..ForwardOptions::default() };
        let captions = &batch.captions;
        match &captions.loss_mask {
            Some(mask) => self.decoder.masked_loss(&captions.tokens, mask, &options),
            None => self.decoder.loss(&captions.tokens, &options),
        }
        .context("decoder")
    }
}

impl TrainModel for Captioner {
    type Config = CaptionerConfig;
    type Batch = CaptionBatch;

    fn build(config: &CaptionerConfig, store: &ParamStore) -> Result<Self> {
        let (encoder, decoder) = config.plans()?;
        Ok(Self {
            encoder: ViTransformerWrapper::from_plan(encoder, &store.at("encoder"))?,
            decoder: AutoregressiveWrapper::from_plan(decoder, &store.at("decoder"))?,
            dtype: store.dtype(),
            config: config.clone(),
        })
    }

    fn loss(&self, batch: &CaptionBatch) -> Result<Tensor> {
        self.loss_with(batch, false)
    }

    fn loss_recomputed(&self, batch: &CaptionBatch) -> Result<Tensor> {
        self.loss_with(batch, true)
    }

    fn check(config: &CaptionerConfig, options: &TrainOptions) -> Result<()> {
        config.plans()?;
        options.refuse_document_mask()
    }

    fn config_to_json(config: &CaptionerConfig) -> Value {
        serde_json::to_value(config).unwrap_or_default()
    }

    fn config_from_json(json: Value) -> Result<CaptionerConfig> {
        super::model::parse(json, "a captioner")
    }

    fn num_tokens(config: &CaptionerConfig) -> usize {
        config.plans().map_or(0, |(_, decoder)| decoder.net.num_tokens)
    }

    fn max_seq_len(config: &CaptionerConfig) -> usize {
        match config.plans() {
            Ok((_, plan)) if plan.net.max_seq_len > 0 => plan.net.max_seq_len - usize::from(plan.loss.reads_all),
            Ok(_) => usize::MAX,
            Err(_) => 0,
        }
    }
}
