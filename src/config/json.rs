//! JSON of the wrappers whose options are not those of their fields alone.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    AttentionLayersConfig, AutoregressiveConfig, TransformerWrapperConfig, XTransformerConfig,
    kwargs::{self, Map},
};
use crate::{Error, Result, collect::CollectVec, error::ensure};

impl AutoregressiveConfig {
    pub(super) fn from_map(mut map: Map) -> Result<Self> {
        let net = map.get_mut("net").and_then(Value::as_object_mut);
        let model = net.and_then(|net| net.remove("model")).unwrap_or_else(|| json!("TransformerWrapper"));
        ensure!(
            model == "TransformerWrapper",
            Error::option("model", format_args!("expected \"TransformerWrapper\", got {model}")).context("net")
        );
        kwargs::read(map)
    }

    pub(super) fn to_map(&self) -> Map {
        let mut map = kwargs::write(self);
        if let Some(net) = map.get_mut("net").and_then(Value::as_object_mut) {
            net.insert("model".to_string(), json!("TransformerWrapper"));
        }
        map
    }
}

/// Options of a wrapper that are options of [`XTransformerConfig`] too.
const SIDE_OPTIONS: [&str; 5] = ["num_tokens", "max_seq_len", "emb_dropout", "num_memory_tokens", "logits_bias"];

/// Options of attention layers that [`XTransformerConfig`] sets itself.
const SIDE_FIXED: [&str; 3] = ["kind", "dim", "cross_attend"];

impl XTransformerConfig {
    /// The keys of one side, without the prefix.
    fn side_keys(prefix: &str) -> Vec<String> {
        let layers = kwargs::flat(&mut AttentionLayersConfig::default());
        let layers = layers.into_iter().map(|(key, _)| key).filter(|key| !SIDE_FIXED.contains(&key.as_str()));
        // Only the decoder has logits.
        let other = if prefix == "enc_" { "logits_bias" } else { "num_memory_tokens" };
        let options = SIDE_OPTIONS.iter().filter(|&&key| key != other);
        layers.chain(options.map(|key| key.to_string())).collect_vec()
    }

    pub(super) fn from_map(map: Map) -> Result<Self> {
        let sides = ["enc_", "dec_"].map(|prefix| (prefix, Self::side_keys(prefix)));
        let all = sides.iter().flat_map(|(prefix, keys)| keys.iter().map(move |key| format!("{prefix}{key}")));
        let mut all: Vec<String> = all.chain(["dim".to_string(), "tie_token_emb".to_string()]).collect_vec();
        all.push("dec_alibi_pos_emb".to_string());
        kwargs::check_known(&map, &all)?;
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
            kwargs::read(options).map_err(|error| kwargs::with_prefix(error, prefix))
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
