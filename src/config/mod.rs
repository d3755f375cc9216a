//! Options with x-transformers' names, and the plans that they resolve to.
//!
//! Two steps spare the modules from checking which options can be combined:
//!
//! * Config structs hold options. They read and write JSON as flat as Python's calls; an unknown key is an error that
//!   names the nearest known one.
//! * Plans ([`LayersPlan`]) describe the model to build. Creating one checks all options and their combinations;
//!   nothing is checked later.

mod around_plan;
mod branch_plan;
mod call;
mod json;
mod kwargs;
mod later;
mod model_plan;
mod options;
mod order;
mod plan;
mod ranges;
mod recurrence_plan;
mod resolve;
mod rotary;
pub mod v2;
mod wrapper_plan;
mod wrappers;

pub use around_plan::{AroundPlan, BeliefPlan, CriticPlan, GptVaePlan, MaskedPlan, NeoMlpPlan};
pub use branch_plan::{
    AttentionPath, AttentionPlan, CopePlan, FeedForwardPlan, Forget, GateForm, Normalize, PaddingPlan, QkNormPlan,
    ScoreResidual, TalkingHeads, Temperature, ValueGate, ValueResidual,
};
pub use call::{BeamCall, Call, GenerateCall, MaskedCall};
pub use model_plan::ModelPlan;
pub use options::{
    AttentionConfig, AttentionLayersConfig, FeedForwardConfig, FinalNorm, LayerType, LayersKind, Llama3Scaling,
    ShiftTokens, YarnScaling,
};
pub use plan::{
    AlibiPlan, BranchPlan, ConditionPlan, DropPlan, DynamicPlan, Gain, HyperPlan, LayerPlan, LayerScalePlan,
    LayersPlan, LinkPlan, NormPlan, PolarPlan, PositionBiasPlan, Positions, ResidualPlan, T5Plan, WrapPlan,
};
pub use recurrence_plan::{LoopedLoss, Recurrence};
pub use rotary::RotaryPlan;
pub use wrapper_plan::{
    AbsolutePositions, AttentionPoolPlan, AutoregressivePlan, ContinuousAutoregressivePlan, ContinuousLoss,
    ContinuousPlan, LossPlan, MemoryPlan, PoolerPlan, TransformerPlan, ViTransformerPlan, VisionHead, XTransformerPlan,
};
pub use wrappers::{
    AutoregressiveConfig, ContinuousTransformerWrapperConfig, FilterLogits, SamplingConfig, TransformerWrapperConfig,
    ViTransformerWrapperConfig, XTransformerConfig,
};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::{
    Error, ErrorKind, Result,
    error::{ErrorContext, ensure},
};
use kwargs::object;

/// Config of any model: in JSON the options of a class, and its name under `model`.
///
/// ```
/// use x_transformers::{Error, config::Config};
/// # fn main() -> x_transformers::Result<()> {
/// let json = r#"{
///     "model": "AutoregressiveWrapper",
///     "net": {
///         "model": "TransformerWrapper", "num_tokens": 256, "max_seq_len": 128,
///         "attn_layers": {"kind": "Decoder", "dim": 64, "depth": 2, "rotary_pos_emb": true, "ff_glu": true}
///     }
/// }"#;
/// let config = Config::from_json(json)?;
/// assert_eq!(Config::from_json(&config.to_json())?, config);
///
/// let misspelt = Config::from_json(&json.replace("rotary_pos_emb", "rotary_pos_embd"));
/// assert_eq!(
///     misspelt.unwrap_err().to_string(),
///     "net.attn_layers: unknown option `rotary_pos_embd`, did you mean `rotary_pos_emb`?"
/// );
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
    /// `Encoder`, `Decoder` or `CrossAttender`: attention layers without a wrapper.
    AttentionLayers(AttentionLayersConfig),
    /// `SamplingFilter`: not a model, but the step from logits to probabilities.
    SamplingFilter(SamplingConfig),
    /// A model of version 2: options with the names and meanings of x-transformers 2.31.
    V2(Box<v2::Config>),
}

/// The names that `model` can have.
const MODELS: [&str; 9] = [
    "TransformerWrapper",
    "ContinuousTransformerWrapper",
    "ViTransformerWrapper",
    "XTransformer",
    "AutoregressiveWrapper",
    "Encoder",
    "Decoder",
    "CrossAttender",
    "SamplingFilter",
];

impl Config {
    /// Reads JSON.
    ///
    /// Errors: text that is not a JSON object; [`ErrorKind::UnknownOption`]; [`ErrorKind::Option`] for a missing option
    /// or a value of another type. [`Config::layers`] and the models check combinations.
    pub fn from_json(json: &str) -> Result<Self> {
        let value = serde_json::from_slice(json.as_bytes());
        let value = value.map_err(|error| Error::argument("config", format_args!("expected JSON: {error}")))?;
        Self::from_value(value)
    }

    /// Reads JSON that may have the key `call`, the options of one call, beside the options of the model.
    ///
    /// Errors: those of [`Config::from_json`] and [`Call::from_value`].
    pub fn with_call(json: &str) -> Result<(Self, Call)> {
        let value = serde_json::from_slice(json.as_bytes());
        let mut value: Value =
            value.map_err(|error| Error::argument("config", format_args!("expected JSON: {error}")))?;
        let call = value.as_object_mut().and_then(|map| map.remove("call"));
        let two = value.get("version").is_some_and(is_two);
        let call = call.map_or_else(|| Ok(Call::default()), |call| Call::from_value(call, two).context("call"))?;
        Ok((Self::from_value(value)?, call))
    }

    /// Reads a JSON value like [`Config::from_json`].
    pub fn from_value(value: Value) -> Result<Self> {
        let mut map = object("config", value)?;
        match map.remove("version") {
            None => {}
            Some(version) if is_two(&version) => return v2::Config::from_map(map).map(Box::new).map(Self::V2),
            Some(version) => ensure!(
                version == "0.22" || version == "0.22.0",
                Error::option("version", format_args!("expected \"2\" or \"0.22\", got {version}"))
            ),
        }
        let model = match map.remove("model") {
            Some(Value::String(model)) => model,
            Some(other) => return Err(Error::option("model", format_args!("expected a name, got {other}"))),
            None => {
                return Err(Error::option("model", format_args!("missing, expected one of {}", MODELS.join(", "))));
            }
        };
        match model.as_str() {
            "TransformerWrapper" => kwargs::read(map).map(Self::TransformerWrapper),
            "ContinuousTransformerWrapper" => kwargs::read(map).map(Self::ContinuousTransformerWrapper),
            "ViTransformerWrapper" => kwargs::read(map).map(Self::ViTransformerWrapper),
            "XTransformer" => XTransformerConfig::from_map(map).map(Box::new).map(Self::XTransformer),
            "AutoregressiveWrapper" => AutoregressiveConfig::from_map(map).map(Self::AutoregressiveWrapper),
            "Encoder" | "Decoder" | "CrossAttender" => {
                ensure!(
                    !map.contains_key("kind"),
                    Error::new(ErrorKind::UnknownOption {
                        key: "kind".to_string(),
                        nearest: Some("model".to_string()),
                        later: false
                    })
                );
                map.insert("kind".to_string(), json!(model));
                kwargs::read(map).map(Self::AttentionLayers)
            }
            "SamplingFilter" => kwargs::read(map).map(Self::SamplingFilter),
            other => Err(Error::option("model", format_args!("expected one of {}, got `{other}`", MODELS.join(", ")))),
        }
    }

    /// Returns the options as JSON, without those at their defaults.
    pub fn to_value(&self) -> Value {
        let (model, mut map) = match self {
            Self::TransformerWrapper(config) => ("TransformerWrapper", kwargs::write(config)),
            Self::ContinuousTransformerWrapper(config) => ("ContinuousTransformerWrapper", kwargs::write(config)),
            Self::ViTransformerWrapper(config) => ("ViTransformerWrapper", kwargs::write(config)),
            Self::XTransformer(config) => ("XTransformer", config.to_map()),
            Self::AutoregressiveWrapper(config) => ("AutoregressiveWrapper", config.to_map()),
            Self::SamplingFilter(config) => ("SamplingFilter", kwargs::write(config)),
            Self::V2(config) => return Value::Object(config.to_map()),
            Self::AttentionLayers(config) => {
                let mut map = kwargs::write(config);
                map.remove("kind");
                let model = match config.kind {
                    LayersKind::Encoder => "Encoder",
                    LayersKind::Decoder => "Decoder",
                    LayersKind::CrossAttender => "CrossAttender",
                };
                (model, map)
            }
        };
        map.insert("model".to_string(), json!(model));
        Value::Object(map)
    }

    /// Returns [`Config::to_value`] as indented text.
    pub fn to_json(&self) -> String {
        format!("{:#}", self.to_value())
    }

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
            Self::AttentionLayers(config) => ModelPlan::Layers(LayersPlan::new(config)?),
            Self::SamplingFilter(config) => ModelPlan::Filter(config.clone()),
            Self::V2(config) => config.plan()?,
        })
    }

    /// Returns the version of x-transformers whose names and meanings the options have.
    pub fn version(&self) -> &'static str {
        if matches!(self, Self::V2(_)) { "2" } else { "0.22" }
    }

    /// Returns the plans of all attention layers in the model, with the prefixes of their parameters' names.
    ///
    /// Errors: options that are illegal alone or in combination.
    pub fn layers(&self) -> Result<Vec<(&'static str, LayersPlan)>> {
        Ok(self.plan()?.layers().into_iter().map(|(name, plan)| (name, plan.clone())).collect())
    }
}

/// Returns `true` if this is the name of version 2.
fn is_two(version: &Value) -> bool {
    version == "2" || version == "2.31"
}

impl From<AutoregressiveConfig> for Config {
    fn from(config: AutoregressiveConfig) -> Self {
        Self::AutoregressiveWrapper(config)
    }
}

impl From<v2::AutoregressiveConfig> for Config {
    fn from(config: v2::AutoregressiveConfig) -> Self {
        Self::V2(Box::new(v2::Config::AutoregressiveWrapper(config)))
    }
}

impl Serialize for Config {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        self.to_value().serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Config {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        Self::from_value(Value::deserialize(deserializer)?).map_err(serde::de::Error::custom)
    }
}
