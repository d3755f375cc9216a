//! What to build: keyword arguments with x-transformers' names, and the plans that they are turned into.
//!
//! Two steps, so that no module has to know which options go together:
//!
//! * Config structs hold keywords. They read and write JSON as flat as Python's calls; an unknown key is an error that
//!   names the nearest known one.
//! * Plans ([`LayersPlan`]) say what is built. Making one checks all that can be illegal, and nothing is checked later.

mod kwargs;
mod options;
mod order;
mod plan;
mod wrapper_plan;
mod wrappers;

pub use options::{
    AttentionConfig, AttentionLayersConfig, FeedForwardConfig, LayerType, LayersKind, ShiftTokens,
};
pub use plan::{
    AlibiPlan, AttentionPath, AttentionPlan, BiasPlan, BranchPlan, FeedForwardPlan, LayerPlan, LayersPlan, Norm,
    Normalize, Positions, ResidualPlan, RotaryPlan, Temperature, WrapPlan,
};
pub use wrapper_plan::{ContinuousPlan, TransformerPlan, ViTransformerPlan, XTransformerPlan};
pub use wrappers::{
    AutoregressiveConfig, ContinuousTransformerWrapperConfig, FilterLogits, SamplingConfig, TransformerWrapperConfig,
    ViTransformerWrapperConfig, XTransformerConfig,
};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::{
    Error, Result,
    error::{At, ensure},
};
use kwargs::{Keywords, Map};

/// Any model: in JSON the keywords of a class, and its name under `model`.
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
    XTransformer(XTransformerConfig),
    /// `AutoregressiveWrapper`: a decoder with its loss and its sampling.
    AutoregressiveWrapper(AutoregressiveConfig),
    /// `Encoder`, `Decoder` or `CrossAttender`: attention layers alone.
    AttentionLayers(AttentionLayersConfig),
    /// `SamplingFilter`: no model, but the step from logits to probabilities.
    SamplingFilter(SamplingConfig),
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
    /// Errors: text that is not a JSON object; [`Error::UnknownOption`]; [`Error::Option`] for a missing keyword or a
    /// value of another type. What is illegal in combination is found by [`Config::layers`] and by the models.
    pub fn from_json(json: &str) -> Result<Self> {
        let value = serde_json::from_str(json);
        let value = value.map_err(|error| Error::argument("config", format!("expected JSON: {error}")))?;
        Self::from_value(value)
    }

    /// Reads a JSON value, as [`Config::from_json`].
    pub fn from_value(value: Value) -> Result<Self> {
        let mut map = object("config", value)?;
        let model = match map.remove("model") {
            Some(Value::String(model)) => model,
            Some(other) => return Err(Error::option("model", format!("expected a name, got {other}"))),
            None => return Err(Error::option("model", format!("is required: one of {}", MODELS.join(", ")))),
        };
        match model.as_str() {
            "TransformerWrapper" => TransformerWrapperConfig::from_map(map).map(Self::TransformerWrapper),
            "ContinuousTransformerWrapper" => {
                ContinuousTransformerWrapperConfig::from_map(map).map(Self::ContinuousTransformerWrapper)
            }
            "ViTransformerWrapper" => ViTransformerWrapperConfig::from_map(map).map(Self::ViTransformerWrapper),
            "XTransformer" => XTransformerConfig::from_map(map).map(Self::XTransformer),
            "AutoregressiveWrapper" => AutoregressiveConfig::from_map(map).map(Self::AutoregressiveWrapper),
            "Encoder" | "Decoder" | "CrossAttender" => {
                ensure!(
                    !map.contains_key("kind"),
                    Error::UnknownOption { key: "kind".to_string(), nearest: Some("model".to_string()) }
                );
                map.insert("kind".to_string(), json!(model));
                kwargs::read(map).map(Self::AttentionLayers)
            }
            "SamplingFilter" => kwargs::read(map).map(Self::SamplingFilter),
            other => Err(Error::option("model", format!("expected one of {}, got `{other}`", MODELS.join(", ")))),
        }
    }

    /// The keywords as JSON, those at their defaults left out.
    pub fn to_value(&self) -> Value {
        let (model, mut map) = match self {
            Self::TransformerWrapper(config) => ("TransformerWrapper", config.to_map()),
            Self::ContinuousTransformerWrapper(config) => ("ContinuousTransformerWrapper", config.to_map()),
            Self::ViTransformerWrapper(config) => ("ViTransformerWrapper", config.to_map()),
            Self::XTransformer(config) => ("XTransformer", config.to_map()),
            Self::AutoregressiveWrapper(config) => ("AutoregressiveWrapper", config.to_map()),
            Self::SamplingFilter(config) => ("SamplingFilter", kwargs::write(config)),
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

    /// As [`Config::to_value`], indented text.
    pub fn to_json(&self) -> String {
        format!("{:#}", self.to_value())
    }

    /// The plans of all attention layers in the model, with the names that their parameters begin with.
    ///
    /// Errors: whatever the options cannot do alone or together.
    pub fn layers(&self) -> Result<Vec<(&'static str, LayersPlan)>> {
        Ok(match self {
            Self::TransformerWrapper(config) => vec![("attn_layers", config.plan()?.layers)],
            Self::ContinuousTransformerWrapper(config) => vec![("attn_layers", config.plan()?.layers)],
            Self::ViTransformerWrapper(config) => vec![("attn_layers", config.plan()?.layers)],
            Self::XTransformer(config) => {
                let plan = config.plan()?;
                vec![("encoder.attn_layers", plan.enc.layers), ("decoder.net.attn_layers", plan.dec.layers)]
            }
            Self::AutoregressiveWrapper(config) => vec![("net.attn_layers", config.net.plan().at("net")?.layers)],
            Self::AttentionLayers(config) => vec![("", LayersPlan::new(config)?)],
            Self::SamplingFilter(_) => Vec::new(),
        })
    }
}

impl Serialize for Config {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.to_value().serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Config {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::from_value(Value::deserialize(deserializer)?).map_err(serde::de::Error::custom)
    }
}

fn object(name: &str, value: Value) -> Result<Map> {
    match value {
        Value::Object(map) => Ok(map),
        other => Err(Error::option(name, format!("expected a JSON object, got {other}"))),
    }
}

/// Reads the keyword `attn_layers` apart, so that its errors keep their type.
fn read_wrapper<T: Keywords>(mut map: Map) -> Result<(T, AttentionLayersConfig)> {
    let layers = map.remove("attn_layers").ok_or_else(|| Error::option("attn_layers", "is required, and missing"))?;
    let layers = kwargs::read(object("attn_layers", layers)?).at("attn_layers")?;
    Ok((kwargs::read(map)?, layers))
}

fn write_wrapper<T: Keywords>(config: &T, layers: &AttentionLayersConfig) -> Map {
    let mut map = kwargs::write(config);
    map.insert("attn_layers".to_string(), Value::Object(kwargs::write(layers)));
    map
}

impl TransformerWrapperConfig {
    fn from_map(map: Map) -> Result<Self> {
        let (config, attn_layers) = read_wrapper(map)?;
        Ok(Self { attn_layers, ..config })
    }

    fn to_map(&self) -> Map {
        write_wrapper(self, &self.attn_layers)
    }
}

impl ContinuousTransformerWrapperConfig {
    fn from_map(map: Map) -> Result<Self> {
        let (config, attn_layers) = read_wrapper(map)?;
        Ok(Self { attn_layers, ..config })
    }

    fn to_map(&self) -> Map {
        write_wrapper(self, &self.attn_layers)
    }
}

impl ViTransformerWrapperConfig {
    fn from_map(map: Map) -> Result<Self> {
        let (config, attn_layers) = read_wrapper(map)?;
        Ok(Self { attn_layers, ..config })
    }

    fn to_map(&self) -> Map {
        write_wrapper(self, &self.attn_layers)
    }
}

impl AutoregressiveConfig {
    fn from_map(mut map: Map) -> Result<Self> {
        let net = map.remove("net").ok_or_else(|| Error::option("net", "is required, and missing"))?;
        let mut net = object("net", net)?;
        let model = net.remove("model").unwrap_or_else(|| json!("TransformerWrapper"));
        ensure!(
            model == "TransformerWrapper",
            Error::option("model", format!("expected \"TransformerWrapper\", got {model}")).at("net")
        );
        let net = TransformerWrapperConfig::from_map(net).at("net")?;
        Ok(Self { net, ..kwargs::read(map)? })
    }

    fn to_map(&self) -> Map {
        let mut map = kwargs::write(self);
        let mut net = self.net.to_map();
        net.insert("model".to_string(), json!("TransformerWrapper"));
        map.insert("net".to_string(), Value::Object(net));
        map
    }
}

/// The options of a wrapper that are options of [`XTransformerConfig`] too.
const SIDE_OPTIONS: [&str; 4] = ["num_tokens", "max_seq_len", "emb_dropout", "num_memory_tokens"];

/// The keywords of attention layers that [`XTransformerConfig`] sets itself.
const SIDE_FIXED: [&str; 3] = ["kind", "dim", "cross_attend"];

impl XTransformerConfig {
    /// The keys of one side, without the prefix.
    fn side_keys(prefix: &str) -> Vec<String> {
        let layers = kwargs::flat(&AttentionLayersConfig::default());
        let layers = layers.into_iter().map(|(key, _)| key).filter(|key| !SIDE_FIXED.contains(&key.as_str()));
        let memory = prefix == "enc_";
        let options = SIDE_OPTIONS.iter().filter(|&&key| memory || key != "num_memory_tokens");
        layers.chain(options.map(|key| key.to_string())).collect()
    }

    fn from_map(map: Map) -> Result<Self> {
        let sides = ["enc_", "dec_"].map(|prefix| (prefix, Self::side_keys(prefix)));
        let all = sides.iter().flat_map(|(prefix, keys)| keys.iter().map(move |key| format!("{prefix}{key}")));
        let mut all: Vec<String> = all.chain(["dim".to_string(), "tie_token_emb".to_string()]).collect();
        all.push("dec_alibi_pos_emb".to_string());
        kwargs::check_known(&map, || all.iter().map(String::as_str))?;
        let dim = map.get("dim").cloned().ok_or_else(|| Error::option("dim", "is required, and missing"))?;
        let tie_token_emb = match map.get("tie_token_emb") {
            None => false,
            Some(Value::Bool(tie)) => *tie,
            Some(other) => {
                return Err(Error::option("tie_token_emb", format!("expected true or false, got {other}")));
            }
        };
        let side = |prefix: &str, kind: &str| -> Result<TransformerWrapperConfig> {
            let mut options = Map::new();
            let mut layers = Map::new();
            for (key, value) in &map {
                let Some(key) = key.strip_prefix(prefix) else { continue };
                let into = if SIDE_OPTIONS.contains(&key) { &mut options } else { &mut layers };
                into.insert(key.to_string(), value.clone());
            }
            layers.insert("kind".to_string(), json!(kind));
            layers.insert("dim".to_string(), dim.clone());
            layers.insert("cross_attend".to_string(), json!(kind == "Decoder"));
            options.insert("attn_layers".to_string(), Value::Object(layers));
            TransformerWrapperConfig::from_map(options).map_err(|error| match error {
                Error::At { source, .. } => kwargs::with_prefix(*source, prefix),
                error => kwargs::with_prefix(error, prefix),
            })
        };
        Ok(Self { enc: side("enc_", "Encoder")?, dec: side("dec_", "Decoder")?, tie_token_emb })
    }

    fn to_map(&self) -> Map {
        let mut map = Map::new();
        for (prefix, side) in [("enc_", &self.enc), ("dec_", &self.dec)] {
            let options = kwargs::write(side).into_iter().filter(|(key, _)| key != "attn_layers");
            let layers = kwargs::write(&side.attn_layers);
            let layers = layers.into_iter().filter(|(key, _)| !SIDE_FIXED.contains(&key.as_str()));
            map.extend(options.chain(layers).map(|(key, value)| (format!("{prefix}{key}"), value)));
        }
        map.insert("dim".to_string(), json!(self.enc.attn_layers.dim));
        if self.tie_token_emb {
            map.insert("tie_token_emb".to_string(), json!(true));
        }
        map
    }
}

impl Serialize for XTransformerConfig {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.to_map().serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for XTransformerConfig {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::from_map(Map::deserialize(deserializer)?).map_err(serde::de::Error::custom)
    }
}
