//! Options with the names, defaults and meanings of x-transformers 2.31.
//!
//! A config that says `"version": "2"` has them; without it options are those of x-transformers 0.22. Both resolve to
//! the same plans, which say what is computed and under which names of a state dict.

mod around;
mod convert;
mod fields;
mod json;
mod layers;
mod refused;
mod resolve;
mod resolve_attention;
mod resolve_wrappers;
mod wrappers;

pub use around::{BeliefStateConfig, GptVaeConfig, NeoMlpConfig};
pub use convert::Conversion;
pub(super) use json::check_call;
pub use layers::{AttentionConfig, AttentionLayersConfig, FeedForwardConfig, LayersKind, PerLayer, SwitchOrFactor};
pub use wrappers::{
    AttentionPoolConfig, AutoregressiveConfig, ContinuousAutoregressiveConfig, ContinuousTransformerWrapperConfig,
    DpoConfig, FilterConfig, MultiInputConfig, NonAutoregressiveConfig, SamplingConfig, TransformerWrapperConfig,
    ViTransformerWrapperConfig, XTransformerConfig, XValAutoregressiveConfig, XValConfig, XlAutoregressiveConfig,
};

use super::{AroundPlan, LayersPlan, ModelPlan};
use crate::Result;

/// Config of any model of version 2: in JSON the options of a class, its name under `model`, and `"version": "2"`.
///
/// ```
/// use x_transformers::{DType, Device, ParamStore, config::Config, models::Model};
/// # fn main() -> x_transformers::Result<()> {
/// let json = r#"{
///     "version": "2", "model": "TransformerWrapper", "num_tokens": 256, "max_seq_len": 128,
///     "attn_layers": {"kind": "Decoder", "dim": 64, "depth": 2, "rotary_pos_emb": true, "attn_flash": true}
/// }"#;
/// let config = Config::from_json(json)?;
/// assert_eq!(Config::from_json(&config.to_json())?, config);
/// let model = Model::new(&config, &ParamStore::new(0, DType::F32, &Device::Cpu))?;
/// assert!(model.params().get("attn_layers.final_norm.gamma").is_some());
///
/// let old = Config::from_json(&json.replace("\"attn_flash\"", "\"use_qk_norm_attn\"")).unwrap_err();
/// assert!(old.to_string().contains("0.22"));
/// # Ok(())
/// # }
/// ```
#[derive(Clone, PartialEq, Debug)]
#[non_exhaustive]
pub enum Config {
    /// `TransformerWrapper`: tokens in, logits out.
    TransformerWrapper(TransformerWrapperConfig),
    /// `ContinuousTransformerWrapper`: vectors in, vectors out.
    ContinuousTransformerWrapper(ContinuousTransformerWrapperConfig),
    /// `ViTransformerWrapper`: images in, classes out.
    ViTransformerWrapper(ViTransformerWrapperConfig),
    /// `XTransformer`: a sequence in, another one out.
    XTransformer(Box<XTransformerConfig>),
    /// `AutoregressiveWrapper`: a decoder with its loss and its sampling.
    AutoregressiveWrapper(AutoregressiveConfig),
    /// `ContinuousAutoregressiveWrapper`: predicts vectors.
    ContinuousAutoregressiveWrapper(ContinuousAutoregressiveConfig),
    /// Attention layers without a wrapper.
    AttentionLayers(Box<AttentionLayersConfig>),
    /// `MultiInputTransformerWrapper`: several rows of tokens in, logits of each out.
    MultiInput(MultiInputConfig),
    /// `XValTransformerWrapper`: tokens and numbers in, logits and numbers out.
    XVal(XValConfig),
    /// `XValAutoregressiveWrapper`: the loss of tokens and numbers.
    XValAutoregressive(XValAutoregressiveConfig),
    /// `XLAutoregressiveWrapper`: long sequences in segments with memories.
    XlAutoregressive(XlAutoregressiveConfig),
    /// `DPO`: direct preference optimization.
    Dpo(DpoConfig),
    /// `NonAutoregressiveWrapper`: masked tokens that are filled in.
    NonAutoregressive(Box<NonAutoregressiveConfig>),
    /// `BeliefStateWrapper`: text from both sides.
    BeliefState(Box<BeliefStateConfig>),
    /// `NeoMLP`: attention between the nodes of an MLP.
    NeoMlp(Box<NeoMlpConfig>),
    /// `GPTVAE`: a style of each sequence.
    GptVae(Box<GptVaeConfig>),
    /// `AttentionPool`: learned queries attend to a sequence.
    AttentionPool(AttentionPoolConfig),
    /// `SamplingFilter`: not a model, but the step from logits to probabilities.
    SamplingFilter(SamplingConfig),
}

impl Config {
    /// Resolves the options.
    ///
    /// Errors: options that are illegal alone or in combination.
    pub fn plan(&self) -> Result<ModelPlan> {
        Ok(match self {
            Self::TransformerWrapper(config) => ModelPlan::Transformer(config.plan()?),
            Self::ContinuousTransformerWrapper(config) => ModelPlan::Continuous(config.plan()?),
            Self::ViTransformerWrapper(config) => ModelPlan::Vision(config.plan()?),
            Self::XTransformer(config) => ModelPlan::EncoderDecoder(Box::new(config.plan()?)),
            Self::AutoregressiveWrapper(config) => ModelPlan::Autoregressive(config.plan()?),
            Self::ContinuousAutoregressiveWrapper(config) => ModelPlan::ContinuousAutoregressive(config.plan()?),
            Self::AttentionLayers(config) => ModelPlan::Layers(config.plan()?),
            Self::AttentionPool(config) => ModelPlan::Pool(config.plan()?),
            Self::MultiInput(config) => config.plan()?.into(),
            Self::XVal(config) => AroundPlan::XVal(config.plan()?).into(),
            Self::XValAutoregressive(config) => config.plan()?.into(),
            Self::XlAutoregressive(config) => config.plan()?.into(),
            Self::NonAutoregressive(config) => config.plan()?.into(),
            Self::Dpo(config) => config.plan()?.into(),
            Self::BeliefState(config) => config.plan()?.into(),
            Self::GptVae(config) => config.plan()?.into(),
            Self::NeoMlp(config) => ModelPlan::NeoMlp(Box::new(config.plan()?)),
            Self::SamplingFilter(config) => ModelPlan::Filter(config.sampling()?),
        })
    }
}

impl AttentionLayersConfig {
    /// Resolves the options.
    ///
    /// Errors: [`ErrorKind::Option`](crate::ErrorKind::Option) for the first one that is illegal, alone or with
    /// another.
    pub fn plan(&self) -> Result<LayersPlan> {
        resolve::layers(self)
    }
}
