//! Llama-like models as GGUF describes them: metadata, and where each tensor comes from.

use std::collections::BTreeMap;

use serde_json::Value;

use super::{
    Family, gguf,
    llama::{Rotation, Scaling, Sizes},
    names::Source,
    rope,
};
use crate::{
    Error, Result, Tensor,
    config::{Config, Llama3Scaling, TransformerWrapperConfig},
    error::ensure,
    io::Metadata,
};

/// Model that is written to a GGUF file.
pub(super) struct Described {
    pub(super) metadata: BTreeMap<String, Metadata>,
    pub(super) tensors: Vec<Written>,
    /// Divisors of the rotary frequencies, the tensor [`rope::FREQ_FACTORS`].
    pub(super) factors: Option<Vec<f64>>,
    /// If `true`, logits are computed with the table of embeddings.
    pub(super) tied: bool,
}

/// Tensor of the file, made from a parameter.
pub(super) struct Written {
    /// Name in the file.
    pub(super) name: String,
    /// Name of the parameter in this crate.
    pub(super) ours: String,
    pub(super) part: Part,
}

/// Part of a parameter that is a tensor of the file.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    Whole,
    /// The first or the second half of its rows.
    Half(usize),
    /// All rows, of this number of heads, permuted from pairs across two halves to adjacent feature pairs.
    Pairs(usize),
}

impl Part {
    /// Returns the part of a parameter, unless it is a half, which the caller has read as such.
    pub(super) fn of(self, tensor: Tensor) -> Result<Tensor> {
        let Self::Pairs(heads) = self else { return Ok(tensor) };
        let rows = tensor.dim(0)?;
        let columns = if tensor.rank() == 1 { 1 } else { tensor.dim(1)? };
        let halves = tensor.reshape([heads, 2, rows / heads / 2, columns])?;
        halves.transpose(1, 2)?.reshape(&tensor.shape()[..])
    }
}

/// Describes a model with these options.
///
/// Errors: options that no model of the architecture has.
pub(super) fn describe(config: &TransformerWrapperConfig, family: Family) -> Result<Described> {
    let sizes = sizes(config)?;
    ensure!(
        sizes.max_attend_past.is_none(),
        Error::option("attn_max_attend_past", "cannot be described in GGUF: its models attend to all earlier tokens")
    );
    ensure!(
        sizes.positions > 0,
        Error::option("max_seq_len", "is 0, no limit; GGUF needs a context length, expected at least 1")
    );
    let architecture = if family == Family::Qwen2 { "qwen2" } else { "llama" };
    let mut metadata = BTreeMap::new();
    metadata.insert("general.architecture".to_string(), Metadata::Text(architecture.to_string()));
    let mut put = |key: &str, value: Metadata| drop(metadata.insert(format!("{architecture}.{key}"), value));
    for (key, size) in [
        ("vocab_size", sizes.tokens),
        ("context_length", sizes.positions),
        ("embedding_length", sizes.dim),
        ("block_count", sizes.depth),
        ("feed_forward_length", sizes.inner),
        ("attention.head_count", sizes.heads),
        ("attention.head_count_kv", sizes.kv_heads),
        ("attention.key_length", sizes.dim_head),
        ("attention.value_length", sizes.dim_head),
        ("rope.dimension_count", sizes.dim_head),
    ] {
        put(key, Metadata::Int(size as i64));
    }
    put("attention.layer_norm_rms_epsilon", Metadata::Float(sizes.eps));
    put("rope.freq_base", Metadata::Float(sizes.rotation.base));
    let mut factors = sizes.rotation.factors.clone();
    match sizes.rotation.scaling {
        Scaling::None => {}
        Scaling::Linear(factor) => {
            put("rope.scaling.type", Metadata::Text("linear".to_string()));
            put("rope.scaling.factor", Metadata::Float(factor));
        }
        Scaling::Llama3(scaling) => {
            ensure!(
                factors.is_none(),
                Error::option("rotary_freq_factors", "cannot be described in GGUF with `rotary_llama3_scaling`")
            );
            factors = Some(llama3_factors(&scaling, sizes.rotation.base, sizes.dim_head));
        }
        Scaling::Yarn(scaling) => {
            ensure!(
                scaling.truncate,
                Error::option("rotary_yarn_scaling", "cannot be described in GGUF with `truncate` = false")
            );
            put("rope.scaling.type", Metadata::Text("yarn".to_string()));
            put("rope.scaling.factor", Metadata::Float(scaling.factor));
            let original = scaling.original_max_position_embeddings as i64;
            put("rope.scaling.original_context_length", Metadata::Int(original));
            let own = scaling.attention_factor / rope::mscale(scaling.factor, 1.0);
            put("rope.scaling.attn_factor", Metadata::Float(own));
            put("rope.scaling.yarn_beta_fast", Metadata::Float(scaling.beta_fast));
            put("rope.scaling.yarn_beta_slow", Metadata::Float(scaling.beta_slow));
        }
    }
    let mut tensors = Vec::new();
    for weight in gguf::names(&sizes, family).weights {
        let ours = weight.ours;
        let mut put = |name: String, part| tensors.push(Written { name, ours: ours.clone(), part });
        match weight.theirs {
            Source::One(name) => put(name, Part::Whole),
            Source::Stacked([first, second]) => {
                put(first, Part::Half(0));
                put(second, Part::Half(1));
            }
            Source::Halves(name, heads) => put(name, Part::Pairs(heads)),
        }
    }
    Ok(Described { metadata, tensors, factors, tied: sizes.tied })
}

/// Returns the sizes of a model that has the architecture of Llama.
///
/// Errors: another architecture, with the first option that it differs in.
pub(super) fn sizes(config: &TransformerWrapperConfig) -> Result<Sizes> {
    let layers = &config.attn_layers;
    let (attn, ff) = (&layers.attn, &layers.ff);
    let scaling = match (layers.rotary_llama3_scaling, layers.rotary_yarn_scaling) {
        (Some(llama3), _) => Scaling::Llama3(llama3),
        (None, Some(yarn)) => Scaling::Yarn(yarn),
        _ if layers.rotary_interpolation_factor != 1.0 => Scaling::Linear(layers.rotary_interpolation_factor),
        _ => Scaling::None,
    };
    let sizes = Sizes {
        tokens: config.num_tokens,
        positions: config.max_seq_len,
        dim: layers.dim,
        depth: layers.depth,
        heads: layers.heads,
        kv_heads: attn.kv_heads.unwrap_or(layers.heads),
        dim_head: attn.dim_head,
        inner: (layers.dim as f64 * ff.mult) as usize,
        eps: layers.norm_eps.unwrap_or(1e-6),
        rotation: Rotation { base: layers.rotary_base, scaling, factors: layers.rotary_freq_factors.clone() },
        biases: [attn.qkv_bias, attn.out_bias, !ff.no_bias],
        max_attend_past: attn.max_attend_past,
        tied: config.tie_embedding,
    };
    let llama = sizes.config();
    if llama.plan()? == config.plan()? {
        return Ok(sizes);
    }
    // Spelt otherwise, the same sizes are no difference.
    let own = TransformerWrapperConfig {
        attn_layers: crate::config::AttentionLayersConfig {
            ff: crate::config::FeedForwardConfig { mult: llama.attn_layers.ff.mult, ..ff.clone() },
            attn: crate::config::AttentionConfig { kv_heads: llama.attn_layers.attn.kv_heads, ..attn.clone() },
            ..layers.clone()
        },
        ..config.clone()
    };
    let [expected, found] = [llama, own].map(|config| Config::TransformerWrapper(config).to_value());
    let (key, expected, found) = difference(&expected, &found).unwrap_or_default();
    let shown = |value: &Value| if value.is_null() { "the default".to_string() } else { format!("`{value}`") };
    Err(Error::option(
        "architecture",
        format_args!("expected that of Llama: `{key}` is {}, expected {}", shown(&found), shown(&expected)),
    ))
}

/// Returns the first key that has another value, with both values.
fn difference(expected: &Value, found: &Value) -> Option<(String, Value, Value)> {
    let (expected, found) = (expected.as_object()?, found.as_object()?);
    let keys = expected.keys().chain(found.keys());
    for key in keys {
        let [one, other] = [expected, found].map(|map| map.get(key).unwrap_or(&Value::Null));
        if let Some(inner) = difference(one, other) {
            return Some(inner);
        }
        if one != other && !(one.is_object() && other.is_object()) {
            return Some((key.clone(), one.clone(), other.clone()));
        }
    }
    None
}

/// Returns the divisors that stand for Llama 3.1's scaling, one per feature pair.
fn llama3_factors(scaling: &Llama3Scaling, base: f64, dim_head: usize) -> Vec<f64> {
    let original = scaling.original_max_position_embeddings as f64;
    let divisor = |pair: usize| {
        let wavelength = 2.0 * std::f64::consts::PI * base.powf(2.0 * pair as f64 / dim_head as f64);
        if wavelength < original / scaling.high_freq_factor {
            return 1.0;
        }
        if wavelength > original / scaling.low_freq_factor {
            return scaling.factor;
        }
        let smooth =
            (original / wavelength - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor);
        1.0 / ((1.0 - smooth) / scaling.factor + smooth)
    };
    (0..dim_head / 2).map(divisor).collect()
}
