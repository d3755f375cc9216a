//! Sentence embeddings by contrastive loss.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{
    Checkpoint, GroupBatch, TrainModel, TrainOptions,
    encoder::{encoder, max_seq_len},
};
use crate::{
    DType, Device, Error, Init, Param, ParamStore, Result, Tensor,
    collect::CollectVec,
    config::{Config, TransformerWrapperConfig},
    error::{ErrorContext, ensure},
    models::{
        DenseActivation, DenseLayer, DenseResidual, Features, Pooling, SentenceEncoder, SentenceModule,
        TransformerWrapper, embed_by, normalized,
    },
    ordered::ordered,
    pretrained::{Pretrained, SentenceOptions},
};

/// Options of an [`Embedder`]: `config.json` in the checkpoint of its run.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EmbedderConfig {
    model: Class,
    /// Options of the encoder, a [`TransformerWrapper`].
    pub net: Value,
    modules: Vec<Module>,
    /// Text settings of the encoder, such as its prompts.
    pub options: SentenceOptions,
    /// Factor of the cosines before the softmax, the inverse of its temperature. Default 20.
    pub scale: f64,
}

/// The value of `model` by which these options are known.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
enum Class {
    Embedder,
}

/// A [`SentenceModule`] without its weights.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
enum Module {
    Pooling { modes: Vec<Pooling>, include_prompt: bool },
    Dense { sizes: [usize; 2], bias: bool, activation: DenseActivation, residual: Residual, features: Features },
    LayerNorm { dim: usize },
    Normalize { features: Features },
    Truncate { dim: usize },
}

/// A [`DenseResidual`] without its weight.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Residual {
    None,
    Input,
    Projected,
}

impl Module {
    /// Splits a module into its options and its weights, by their names.
    fn of(module: SentenceModule) -> (Self, Vec<(&'static str, Tensor)>) {
        match module {
            SentenceModule::Pooling { modes, include_prompt } => (Self::Pooling { modes, include_prompt }, Vec::new()),
            SentenceModule::Dense(DenseLayer { weight, bias, activation, residual }, features) => {
                let sizes = [weight.shape()[1], weight.shape()[0]];
                let (residual, projection) = match residual {
                    DenseResidual::None => (Residual::None, None),
                    DenseResidual::Input => (Residual::Input, None),
                    DenseResidual::Projected(weight) => (Residual::Projected, Some(weight)),
                };
                let own = Self::Dense { sizes, bias: bias.is_some(), activation, residual, features };
                let optional = [("linear.bias", bias), ("residual.weight", projection)];
                let optional = optional.into_iter().filter_map(|(name, weight)| Some((name, weight?)));
                (own, std::iter::once(("linear.weight", weight)).chain(optional).collect())
            }
            SentenceModule::LayerNorm { weight, bias } => {
                (Self::LayerNorm { dim: weight.numel() }, vec![("norm.weight", weight), ("norm.bias", bias)])
            }
            SentenceModule::Normalize(features) => (Self::Normalize { features }, Vec::new()),
            SentenceModule::Truncate(dim) => (Self::Truncate { dim }, Vec::new()),
        }
    }

    /// Registers the weights, in the order of [`Module::with`].
    fn params(&self, place: &ParamStore) -> Result<Vec<Param>> {
        let mut params = Vec::new();
        match *self {
            Self::Dense { sizes: [columns, rows], bias, residual, .. } => {
                params.push(place.param("linear.weight", [rows, columns], Init::linear(columns))?);
                if bias {
                    params.push(place.param("linear.bias", [rows], Init::Constant(0.0))?);
                }
                if residual == Residual::Projected {
                    params.push(place.param("residual.weight", [rows, columns], Init::linear(columns))?);
                }
            }
            Self::LayerNorm { dim } => {
                params.push(place.param("norm.weight", [dim], Init::Constant(1.0))?);
                params.push(place.param("norm.bias", [dim], Init::Constant(0.0))?);
            }
            _ => {}
        }
        Ok(params)
    }

    /// Returns the module with the present values of its weights.
    fn with(&self, params: &[Param]) -> SentenceModule {
        let value = |index: usize| params[index].tensor();
        match self {
            Self::Pooling { modes, include_prompt } => {
                SentenceModule::Pooling { modes: modes.clone(), include_prompt: *include_prompt }
            }
            Self::Dense { bias, activation, residual, features, .. } => {
                let residual = match residual {
                    Residual::None => DenseResidual::None,
                    Residual::Input => DenseResidual::Input,
                    Residual::Projected => DenseResidual::Projected(value(params.len() - 1)),
                };
                let bias = bias.then(|| value(1));
                SentenceModule::Dense(
                    DenseLayer { weight: value(0), bias, activation: *activation, residual },
                    *features,
                )
            }
            Self::LayerNorm { .. } => SentenceModule::LayerNorm { weight: value(0), bias: value(1) },
            Self::Normalize { features } => SentenceModule::Normalize(*features),
            Self::Truncate { dim } => SentenceModule::Truncate(*dim),
        }
    }
}

impl EmbedderConfig {
    /// Creates the options of an encoder with a pooling; `normalize` scales vectors to length 1.
    ///
    /// Errors: options of an encoder that are illegal.
    pub fn new(net: TransformerWrapperConfig, pooling: Pooling, normalize: bool) -> Result<Self> {
        let mut modules = vec![Module::Pooling { modes: vec![pooling], include_prompt: true }];
        modules.extend(normalize.then_some(Module::Normalize { features: Features::Texts }));
        Self::with_modules(net, modules, SentenceOptions::default())
    }

    fn with_modules(net: TransformerWrapperConfig, modules: Vec<Module>, options: SentenceOptions) -> Result<Self> {
        let pools =
            |module: &Module| matches!(module, Module::Pooling { modes, .. } if modes.contains(&Pooling::Pooler));
        let pooler = modules.iter().any(pools);
        let net = TransformerWrapperConfig {
            pooler,
            mlm_head: false,
            tie_embedding: false,
            logits_bias: true,
            return_only_embed: true,
            ..net
        };
        let net = Config::TransformerWrapper(net);
        net.plan()?;
        Ok(Self { model: Class::Embedder, net: net.to_value(), modules, options, scale: 20.0 })
    }

    /// Creates the options and the weights of a pretrained encoder with the modules that its folder lists
    /// (sentence-transformers), or mean pooling if it lists none.
    ///
    /// Errors: those of [`Pretrained::sentence_encoder`].
    pub fn of_pretrained(pretrained: &Pretrained) -> Result<(Self, BTreeMap<String, Tensor>)> {
        pretrained.check_sentences()?;
        let (net, weights) = pretrained.encoder_state_dict()?;
        let modules = pretrained.sentence_modules(DType::F32, &Device::Cpu)?.into_iter().map(Module::of);
        let (modules, values): (Vec<Module>, Vec<Vec<_>>) = modules.unzip();
        let config = Self::with_modules(net, modules, pretrained.sentence_options()?)?;
        let mut weights = config.own_weights(weights)?;
        for (index, values) in values.into_iter().enumerate() {
            weights.extend(values.into_iter().map(|(name, value)| (format!("modules.{index}.{name}"), value)));
        }
        Ok((config, weights))
    }

    /// Creates the options and the weights of an encoder with mean pooling that this crate trained, from those of its wrapper.
    ///
    /// Errors: a model that is not an encoder; weights that do not fit.
    pub fn of_encoder(
        net: TransformerWrapperConfig,
        weights: BTreeMap<String, Tensor>,
    ) -> Result<(Self, BTreeMap<String, Tensor>)> {
        let config = Self::new(net, Pooling::Mean, false)?;
        let weights = config.own_weights(weights)?;
        Ok((config, weights))
    }

    /// Returns the weights of the encoder that the model has, by its names.
    fn own_weights(&self, weights: BTreeMap<String, Tensor>) -> Result<BTreeMap<String, Tensor>> {
        let store = ParamStore::shapes(DType::F32, &Device::Cpu);
        Embedder::build(self, &store)?;
        let own = store.params();
        let named = weights.into_iter().map(|(name, value)| (format!("net.{name}"), value));
        Ok(ordered(named.filter(|(name, _)| own.get(name).is_some())))
    }

    /// Reads the options of the checkpoint in a folder; `None` if it is not that of an embedder.
    ///
    /// Errors: a `config.json` that cannot be read, or is damaged.
    pub fn read(folder: impl AsRef<std::path::Path>) -> Result<Option<Self>> {
        super::checkpoint::config_of(folder.as_ref(), "Embedder")
    }

    /// Reads the options and the weights of the checkpoint in a folder, with the averaged weights of a run that has them.
    ///
    /// Errors: those of [`Checkpoint::load`].
    pub fn load(folder: impl AsRef<std::path::Path>) -> Result<(Self, BTreeMap<String, Tensor>)> {
        Checkpoint::<Self>::averaged(folder.as_ref())
    }

    fn encoder(&self) -> Result<TransformerWrapperConfig> {
        encoder(&self.net)
    }
}

/// Encoder with the modules of sentence-transformers, trained on [`Groups`](super::Groups) of texts that belong together.
///
/// Without scores the loss is `MultipleNegativesRankingLoss` (<https://arxiv.org/abs/1705.00652>): the cross-entropy of an
/// anchor's positive among the positives and negatives of the whole batch, by cosines times [`EmbedderConfig::scale`]. Pairs
/// with scores have `CoSENTLoss` (<https://kexue.fm/archives/8847>): `ln(1 + Σ exp(s_i − s_j))` over the pairs of the batch of
/// which `i` has the lower score.
///
/// ```
/// use x_transformers::{models::Pooling, prelude::*, train::{Embedder, EmbedderConfig, Group, Groups, Sequence}};
/// # fn main() -> x_transformers::Result<()> {
/// let net = TransformerWrapperConfig::new(40, 16, AttentionLayersConfig::encoder(16, 1));
/// let config = EmbedderConfig::new(net, Pooling::Mean, true)?;
/// let text = |token| Sequence { tokens: vec![2, token, 3], loss_mask: vec![] };
/// let pairs: Vec<_> = (5..9).map(|token| Group { sequences: vec![text(token), text(token + 20)], score: None }).collect();
/// let source = Groups::new(pairs.clone(), pairs)?;
/// let options = TrainOptions { steps: 8, warmup: 1, batch_size: 4, seq_len: 16, lr: 1e-2, ..Default::default() };
/// let mut trainer = Trainer::<Embedder>::start(config, options, source, &Device::Cpu)?;
/// let before = trainer.validate()?;
/// while trainer.steps_done() < 8 {
///     trainer.step()?;
/// }
/// assert!(trainer.validate()? < before);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
#[doc(alias = "SentenceTransformerTrainer")]
#[doc(alias = "MultipleNegativesRankingLoss")]
#[doc(alias = "CoSENTLoss")]
pub struct Embedder {
    net: TransformerWrapper,
    modules: Vec<Vec<Param>>,
    config: EmbedderConfig,
}

impl Embedder {
    /// Reads the checkpoint of a run, with the averaged weights of one that has them.
    ///
    /// Errors: those of [`Checkpoint::load`].
    pub fn load(folder: impl AsRef<std::path::Path>, dtype: DType, device: &Device) -> Result<Self> {
        super::model::load(folder.as_ref(), dtype, device)
    }

    /// Returns the options.
    pub fn config(&self) -> &EmbedderConfig {
        &self.config
    }

    /// Returns the encoder.
    pub fn net(&self) -> &TransformerWrapper {
        &self.net
    }

    /// Returns the model as it is now, to embed texts with.
    ///
    /// Errors: modules that do not fit the encoder.
    pub fn sentence_encoder(&self) -> Result<SentenceEncoder> {
        SentenceEncoder::with_modules(self.net.clone(), self.modules())
    }

    fn modules(&self) -> Vec<SentenceModule> {
        self.config.modules.iter().zip(&self.modules).map(|(module, params)| module.with(params)).collect_vec()
    }

    /// Embeds tokens: `[b, n] → [b, dim]`. `mask` marks real tokens.
    ///
    /// Errors: tokens that the model does not have.
    pub fn embed(&self, tokens: &Tensor, mask: &Tensor) -> Result<Tensor> {
        embed_by(&self.net, &self.modules(), tokens, Some(mask), 0, false)
    }

    /// Computes the cosines of a batch: of each anchor with the positives of the batch and then its negatives,
    /// `[b, (sequences − 1) b]`, so that an anchor's own positive has its number; or of pairs with scores, `[b]`.
    ///
    /// Errors: those of [`Embedder::embed`].
    pub fn cosines(&self, batch: &GroupBatch) -> Result<Tensor> {
        self.cosines_with(batch, false)
    }

    fn cosines_with(&self, batch: &GroupBatch, checkpoint_layers: bool) -> Result<Tensor> {
        let [b, count, n] = [batch.tokens.dim(0)?, batch.tokens.dim(1)?, batch.tokens.dim(2)?];
        let rows = |tensor: &Tensor| tensor.reshape([b * count, n]);
        let (tokens, mask) = (rows(&batch.tokens)?, rows(&batch.mask)?);
        let vectors =
            embed_by(&self.net, &self.modules(), &tokens, Some(&mask), 0, checkpoint_layers).context("net")?;
        let vectors = normalized(&vectors.to_dtype(vectors.dtype().accumulator())?)?;
        let vectors = vectors.reshape([b, count, vectors.dim(1)?])?;
        let texts: Vec<Tensor> = (0..count).map(|at| vectors.select(1, at)).try_collect_vec()?;
        let [anchors, others @ ..] = &texts[..] else { return Err(Error::argument("groups", "expected texts")) };
        if batch.scores.is_some() {
            let other = others.first().ok_or_else(|| Error::argument("groups", "expected pairs"))?;
            return anchors.mul(other)?.sum(&[-1]);
        }
        anchors.matmul(&Tensor::cat(&others.iter().collect_vec(), 0)?.transpose(0, 1)?)
    }

    fn loss_with(&self, batch: &GroupBatch, checkpoint_layers: bool) -> Result<Tensor> {
        let cosines = self.cosines_with(batch, checkpoint_layers)?.affine(self.config.scale, 0.0)?;
        let b = cosines.dim(0)?;
        let Some(scores) = &batch.scores else {
            return cosines.cross_entropy(&Tensor::arange(b, cosines.device())?, -100);
        };
        // The log of a sum of exponentials, of which the first is e^0: a cross-entropy with the target 0.
        let lower = scores.unsqueeze(1)?.lt(&scores.unsqueeze(0)?)?;
        let differences =
            cosines.unsqueeze(1)?.sub(&cosines.unsqueeze(0)?)?.masked_fill(&lower.logical_not()?, -1e12)?;
        let zero = Tensor::zeros([1, 1], cosines.dtype(), cosines.device())?;
        let logits = Tensor::cat(&[&zero, &differences.reshape([1, b * b])?], 1)?;
        logits.cross_entropy(&Tensor::full([1], 0.0, DType::I64, cosines.device())?, -100)
    }
}

impl TrainModel for Embedder {
    type Config = EmbedderConfig;
    type Batch = GroupBatch;

    fn build(config: &EmbedderConfig, store: &ParamStore) -> Result<Self> {
        ensure!(
            config.scale.is_finite() && config.scale > 0.0,
            Error::option("scale", format_args!("expected a positive number, got {}", config.scale))
        );
        let net = TransformerWrapper::new(&config.encoder()?, &store.at("net"))?;
        let place = store.at("modules");
        let modules = config.modules.iter().enumerate().map(|(index, module)| module.params(&place.at(index)));
        let model = Self { net, modules: modules.try_collect_vec()?, config: config.clone() };
        model.sentence_encoder()?;
        Ok(model)
    }

    fn loss(&self, batch: &GroupBatch) -> Result<Tensor> {
        self.loss_with(batch, false)
    }

    fn loss_recomputed(&self, batch: &GroupBatch) -> Result<Tensor> {
        self.loss_with(batch, true)
    }

    fn check(config: &EmbedderConfig, options: &TrainOptions) -> Result<()> {
        config.encoder()?;
        options.refuse_document_mask()
    }

    fn config_to_json(config: &EmbedderConfig) -> Value {
        serde_json::to_value(config).unwrap_or_default()
    }

    fn config_from_json(json: Value) -> Result<EmbedderConfig> {
        super::model::parse(json, "an embedder")
    }

    fn num_tokens(config: &EmbedderConfig) -> usize {
        config.encoder().map_or(0, |net| net.num_tokens)
    }

    fn max_seq_len(config: &EmbedderConfig) -> usize {
        config.encoder().map_or(0, |net| max_seq_len(&net))
    }
}
