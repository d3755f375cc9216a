//! Reading and writing the wrappers' options: nested configs separately, which keeps the type of their errors.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    AttentionLayersConfig, AutoregressiveConfig, ContinuousTransformerWrapperConfig, TransformerWrapperConfig,
    ViTransformerWrapperConfig, XTransformerConfig,
    kwargs::{self, Keywords, Map},
};
use crate::{
    Error, Result,
    error::{ErrorContext, ensure},
};

pub(super) fn object(name: &str, value: Value) -> Result<Map> {
    match value {
        Value::Object(map) => Ok(map),
        other => Err(Error::option(name, format_args!("expected a JSON object, got {other}"))),
    }
}

/// Reads the option `attn_layers` separately, which keeps the type of its errors.
fn read_wrapper<T: Keywords>(mut map: Map) -> Result<(T, AttentionLayersConfig)> {
    let layers = map.remove("attn_layers").ok_or_else(|| Error::missing_option("attn_layers"))?;
    let layers = kwargs::read(object("attn_layers", layers)?).context("attn_layers")?;
    Ok((kwargs::read(map)?, layers))
}

fn write_wrapper<T: Keywords>(config: &T, layers: &AttentionLayersConfig) -> Map {
    let mut map = kwargs::write(config);
    map.insert("attn_layers".to_string(), Value::Object(kwargs::write(layers)));
    map
}

impl TransformerWrapperConfig {
    pub(super) fn from_map(map: Map) -> Result<Self> {
        let (config, attn_layers) = read_wrapper(map)?;
        Ok(Self { attn_layers, ..config })
    }

    pub(super) fn to_map(&self) -> Map {
        write_wrapper(self, &self.attn_layers)
    }
}

impl ContinuousTransformerWrapperConfig {
    pub(super) fn from_map(map: Map) -> Result<Self> {
        let (config, attn_layers) = read_wrapper(map)?;
        Ok(Self { attn_layers, ..config })
    }

    pub(super) fn to_map(&self) -> Map {
        write_wrapper(self, &self.attn_layers)
    }
}

impl ViTransformerWrapperConfig {
    pub(super) fn from_map(map: Map) -> Result<Self> {
        let (config, attn_layers) = read_wrapper(map)?;
        Ok(Self { attn_layers, ..config })
    }

    pub(super) fn to_map(&self) -> Map {
        write_wrapper(self, &self.attn_layers)
    }
}

impl AutoregressiveConfig {
    pub(super) fn from_map(mut map: Map) -> Result<Self> {
        let net = map.remove("net").ok_or_else(|| Error::missing_option("net"))?;
        let mut net = object("net", net)?;
        let model = net.remove("model").unwrap_or_else(|| json!("TransformerWrapper"));
        ensure!(
            model == "TransformerWrapper",
            Error::option("model", format_args!("expected \"TransformerWrapper\", got {model}")).context("net")
        );
        let net = TransformerWrapperConfig::from_map(net).context("net")?;
        Ok(Self { net, ..kwargs::read(map)? })
    }

    pub(super) fn to_map(&self) -> Map {
        let mut map = kwargs::write(self);
        let mut net = self.net.to_map();
        net.insert("model".to_string(), json!("TransformerWrapper"));
        map.insert("net".to_string(), Value::Object(net));
        map
    }
}

/// Options of a wrapper that are options of [`XTransformerConfig`] too.
const SIDE_OPTIONS: [&str; 4] = ["num_tokens", "max_seq_len", "emb_dropout", "num_memory_tokens"];

/// Options of attention layers that [`XTransformerConfig`] sets itself.
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

    pub(super) fn from_map(map: Map) -> Result<Self> {
        let sides = ["enc_", "dec_"].map(|prefix| (prefix, Self::side_keys(prefix)));
        let all = sides.iter().flat_map(|(prefix, keys)| keys.iter().map(move |key| format!("{prefix}{key}")));
        let mut all: Vec<String> = all.chain(["dim".to_string(), "tie_token_emb".to_string()]).collect();
        all.push("dec_alibi_pos_emb".to_string());
        kwargs::check_known(&map, || all.iter().map(String::as_str))?;
        let dim = map.get("dim").cloned().ok_or_else(|| Error::missing_option("dim"))?;
        let tie_token_emb = match map.get("tie_token_emb") {
            None => false,
            Some(Value::Bool(tie)) => *tie,
            Some(other) => {
                return Err(Error::option("tie_token_emb", format_args!("expected true or false, got {other}")));
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
            TransformerWrapperConfig::from_map(options).map_err(|error| kwargs::with_prefix(error, prefix))
        };
        Ok(Self { enc: side("enc_", "Encoder")?, dec: side("dec_", "Decoder")?, tie_token_emb })
    }

    pub(super) fn to_map(&self) -> Map {
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
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        self.to_map().serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for XTransformerConfig {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        Self::from_map(Map::deserialize(deserializer)?).map_err(serde::de::Error::custom)
    }
}
