//! Classification of images by a vision transformer.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{ImageBatch, ImageTransform, TrainModel, TrainOptions};
use crate::{
    DType, Device, Error, ParamStore, Result, Tensor,
    config::{Config, ModelPlan, ViTransformerPlan, v2},
    error::{ErrorContext, ensure},
    models::ViTransformerWrapper,
};

/// Options of an [`ImageClassifier`]: `config.json` in the checkpoint of its run.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageClassifierConfig {
    model: Class,
    /// Options of the model, a [`ViTransformerWrapper`] of either version.
    pub net: Value,
    /// Names of the classes, in order.
    pub labels: Vec<String>,
    /// Preparation of the images.
    pub transform: ImageTransform,
    /// If `true`, half of the images of training steps are mirrored. Default `false`.
    pub flip: bool,
}

/// The value of `model` by which these options are known.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
enum Class {
    ImageClassifier,
}

impl ImageClassifierConfig {
    /// Creates the options of a classifier of images as large as the model takes. A model without `num_classes` gets them.
    ///
    /// Errors: another model than a `ViTransformerWrapper`, illegal options, or `num_classes` other than the number of labels.
    pub fn new(net: impl Into<Config>, labels: Vec<String>) -> Result<Self> {
        let mut net = net.into();
        let classes = |own: &mut Option<usize>| *own.get_or_insert(labels.len());
        let (count, size) = match &mut net {
            Config::ViTransformerWrapper(net) => (classes(&mut net.num_classes), net.image_size),
            Config::V2(config) => match &mut **config {
                v2::Config::ViTransformerWrapper(net) => (classes(&mut net.num_classes), net.image_size),
                _ => return Err(not_vision()),
            },
            _ => return Err(not_vision()),
        };
        ensure!(
            count == labels.len(),
            Error::option("num_classes", format_args!("is {count}, but there are {} labels; omit it", labels.len()))
        );
        let ModelPlan::Vision(plan) = net.plan()? else { return Err(not_vision()) };
        let transform = ImageTransform::new(size, plan.channels);
        Ok(Self { model: Class::ImageClassifier, net: net.to_value(), labels, transform, flip: false })
    }

    /// Reads the options of the checkpoint in a folder; `None` if it is not that of a classifier of images.
    ///
    /// Errors: a `config.json` that cannot be read, or is damaged.
    pub fn read(folder: impl AsRef<Path>) -> Result<Option<Self>> {
        super::checkpoint::config_of(folder.as_ref(), "ImageClassifier")
    }

    fn plan(&self) -> Result<ViTransformerPlan> {
        let ModelPlan::Vision(plan) = Config::from_value(self.net.clone())?.plan()? else { return Err(not_vision()) };
        self.transform.check().context("transform")?;
        ensure!(
            plan.channels == self.transform.channels(),
            Error::option(
                "channels",
                format_args!(
                    "the model has {}, the transform {}; use 1 or 3",
                    plan.channels,
                    self.transform.channels()
                )
            )
        );
        ensure!(!self.labels.is_empty(), Error::option("labels", "expected at least one, got none"));
        Ok(plan)
    }
}

fn not_vision() -> Error {
    Error::argument("config", "expected a ViTransformerWrapper, got another model")
}

/// Classifier of images: a [`ViTransformerWrapper`] whose loss is the cross-entropy of the classes. Its parameters have
/// the names of PyTorch's state dict.
///
/// ```
/// use x_transformers::{
///     config::ViTransformerWrapperConfig,
///     prelude::*,
///     train::{Image, ImageClassifier, ImageClassifierConfig, LabelledImages},
/// };
/// # fn main() -> x_transformers::Result<()> {
/// let net = ViTransformerWrapperConfig {
///     image_size: 8,
///     patch_size: 4,
///     attn_layers: AttentionLayersConfig::encoder(16, 1),
///     ..Default::default()
/// };
/// let net = x_transformers::config::Config::ViTransformerWrapper(net);
/// let config = ImageClassifierConfig::new(net, vec!["dark".into(), "bright".into()])?;
/// let (transform, own) = (config.transform.clone(), config.transform.clone());
/// let load = move |number| own.crop(&Image::new(8, 8, 3, vec![200 * number as u8; 8 * 8 * 3])?);
/// let source = LabelledImages::new("greys", vec![(0, 0), (1, 1)], vec![(1, 1)], 2, transform, load)?;
/// let options = TrainOptions { steps: 4, warmup: 1, batch_size: 2, lr: 1e-2, ..Default::default() };
/// let mut trainer = Trainer::<ImageClassifier>::start(config, options, source, &Device::Cpu)?;
/// let before = trainer.validate()?;
/// while trainer.steps_done() < 4 {
///     trainer.step()?;
/// }
/// assert!(trainer.validate()? < before);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
#[doc(alias = "ViTForImageClassification")]
pub struct ImageClassifier {
    net: ViTransformerWrapper,
    dtype: DType,
    config: ImageClassifierConfig,
}

impl ImageClassifier {
    /// Reads the checkpoint of a run, with the averaged weights of one that has them.
    ///
    /// Errors: those of [`Checkpoint::load`](super::Checkpoint::load).
    pub fn load(folder: impl AsRef<Path>, dtype: DType, device: &Device) -> Result<Self> {
        super::model::load(folder.as_ref(), dtype, device)
    }

    /// Returns the options.
    pub fn config(&self) -> &ImageClassifierConfig {
        &self.config
    }

    /// Returns the model.
    pub fn net(&self) -> &ViTransformerWrapper {
        &self.net
    }

    /// Computes a logit for each class: `[b, channels, height, width] → [b, classes]`.
    ///
    /// Errors: images that the model does not take.
    pub fn logits(&self, images: &Tensor) -> Result<Tensor> {
        self.logits_with(images, false)
    }

    fn logits_with(&self, images: &Tensor, checkpoint_layers: bool) -> Result<Tensor> {
        let embeddings = self.net.embeddings_with(&images.to_dtype(self.dtype)?, checkpoint_layers)?;
        self.net.head(&embeddings)
    }

    fn loss_with(&self, batch: &ImageBatch, checkpoint_layers: bool) -> Result<Tensor> {
        let logits = self.logits_with(&batch.images, checkpoint_layers)?;
        logits.to_dtype(self.dtype.accumulator())?.cross_entropy(&batch.labels, -100)
    }
}

impl TrainModel for ImageClassifier {
    type Config = ImageClassifierConfig;
    type Batch = ImageBatch;

    fn build(config: &ImageClassifierConfig, store: &ParamStore) -> Result<Self> {
        let net = ViTransformerWrapper::from_plan(config.plan()?, store)?;
        Ok(Self { net, dtype: store.dtype(), config: config.clone() })
    }

    fn loss(&self, batch: &ImageBatch) -> Result<Tensor> {
        self.loss_with(batch, false)
    }

    fn loss_recomputed(&self, batch: &ImageBatch) -> Result<Tensor> {
        self.loss_with(batch, true)
    }

    fn check(config: &ImageClassifierConfig, options: &TrainOptions) -> Result<()> {
        config.plan()?;
        options.refuse_document_mask()
    }

    fn config_to_json(config: &ImageClassifierConfig) -> Value {
        serde_json::to_value(config).unwrap_or_default()
    }

    fn config_from_json(json: Value) -> Result<ImageClassifierConfig> {
        super::model::parse(json, "a classifier of images")
    }
}
