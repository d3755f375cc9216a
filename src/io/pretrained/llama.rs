//! Llama, and what is built as it is, in the names of `transformers` and of GGUF.

use serde_json::Value;

use super::{
    super::names::{Source, Weight},
    Described, Family, Names, Options, TensorFile, ff_mult,
};
use crate::{
    Error, Result,
    config::{
        AttentionConfig, AttentionLayersConfig, FeedForwardConfig, FinalNorm, Llama3Scaling, TransformerWrapperConfig,
    },
    io::Metadata,
};

/// The sizes of a model.
struct Sizes {
    tokens: usize,
    positions: usize,
    dim: usize,
    depth: usize,
    heads: usize,
    kv_heads: usize,
    dim_head: usize,
    inner: usize,
    eps: f64,
    base: f64,
    scaling: Scaling,
    /// Biases of queries, keys and values, and of the attention's output.
    biases: [bool; 2],
    max_attend_past: Option<usize>,
    tied: bool,
}

/// How the rotation is stretched to longer texts.
#[derive(Clone, Copy)]
enum Scaling {
    None,
    Linear(f64),
    Llama3(Llama3Scaling),
}

impl Sizes {
    fn config(&self) -> TransformerWrapperConfig {
        let layers = AttentionLayersConfig {
            heads: self.heads,
            use_rmsnorm: true,
            norm_eps: Some(self.eps),
            final_norm: FinalNorm::Same,
            rotary_pos_emb: true,
            rotary_emb_dim: Some(self.dim_head),
            rotary_qk_only: true,
            rotary_base: self.base,
            rotary_interpolation_factor: if let Scaling::Linear(factor) = self.scaling { factor } else { 1.0 },
            rotary_llama3_scaling: if let Scaling::Llama3(scaling) = self.scaling { Some(scaling) } else { None },
            attn: AttentionConfig {
                dim_head: self.dim_head,
                kv_heads: Some(self.kv_heads),
                qkv_bias: self.biases[0],
                out_bias: self.biases[1],
                max_attend_past: self.max_attend_past,
                ..AttentionConfig::default()
            },
            ff: FeedForwardConfig {
                mult: ff_mult(self.dim, self.inner),
                glu: true,
                swish: true,
                no_bias: true,
                ..FeedForwardConfig::default()
            },
            ..AttentionLayersConfig::decoder(self.dim, self.depth)
        };
        TransformerWrapperConfig {
            tie_embedding: self.tied,
            logits_bias: self.tied,
            ..TransformerWrapperConfig::new(self.tokens, self.positions, layers)
        }
    }
}

/// The places of one block here: attention, then feedforward.
fn places(layer: usize) -> [String; 2] {
    [2 * layer, 2 * layer + 1].map(|index| format!("attn_layers.layers.{index}"))
}

/// The rotation that a config asks for.
fn scaling(options: &Options, rope: Option<&Value>) -> Result<Scaling> {
    let value = |key: &str| rope.and_then(|rope| rope.get(key)).filter(|value| !value.is_null());
    let number = |key: &str| {
        let number = value(key).and_then(Value::as_f64);
        number.ok_or_else(|| options.refuse("rope_scaling", format!("has no number `{key}`")))
    };
    match value("rope_type").or_else(|| value("type")).and_then(Value::as_str) {
        None | Some("default") => Ok(Scaling::None),
        Some("linear") => Ok(Scaling::Linear(number("factor")?)),
        Some("llama3") => Ok(Scaling::Llama3(Llama3Scaling {
            factor: number("factor")?,
            low_freq_factor: number("low_freq_factor")?,
            high_freq_factor: number("high_freq_factor")?,
            original_max_position_embeddings: number("original_max_position_embeddings")? as usize,
        })),
        Some(kind) => {
            Err(options.refuse("rope_scaling", format!("is of type `{kind}`, expected default, linear or llama3")))
        }
    }
}

/// How far back tokens attend, if not to the first one.
fn max_attend_past(options: &Options, family: Family, depth: usize, positions: usize) -> Result<Option<usize>> {
    const KEY: &str = "sliding_window";
    let default = match family {
        // Set to null it is none; left out it is this.
        Family::Mistral if !options.has(KEY) => Some(4096),
        Family::Mistral => None,
        Family::Qwen2 if options.flag("use_sliding_window", false)? => {
            let first = options.size("max_window_layers", Some(28))?;
            if first < depth {
                return Err(options.refuse("max_window_layers", format!("is {first}, so that layers differ")));
            }
            return Ok(None);
        }
        _ => return Ok(None),
    };
    if options.get(KEY).is_none() && default.is_none() {
        return Ok(None);
    }
    // The window has the token itself in it.
    Ok(Some(options.size(KEY, default)? - 1).filter(|&past| past + 1 < positions))
}

pub(super) fn of_json(options: &Options, family: Family) -> Result<Described> {
    options.only("hidden_act", "silu")?;
    options.only("mlp_bias", false)?;
    let rope = options.get("rope_parameters").or_else(|| options.get("rope_scaling"));
    let theta = rope.and_then(|rope| rope.get("rope_theta")).and_then(|theta| theta.as_f64());
    let dim = options.size("hidden_size", Some(4096))?;
    let heads = options.size("num_attention_heads", Some(32))?;
    let depth = options.depth(32)?;
    // What the classes of transformers have where a file says nothing: tokens, positions, inner features, key heads.
    let (tokens, positions, inner, kv_heads) = match family {
        Family::Mistral => (32000, 4096 * 32, 14336, 8),
        Family::Qwen2 => (151936, 32768, 22016, 32),
        _ => (32000, 2048, 11008, heads),
    };
    let positions = options.size("max_position_embeddings", Some(positions))?;
    let sizes = Sizes {
        tokens: options.size("vocab_size", Some(tokens))?,
        positions,
        dim,
        depth,
        heads,
        kv_heads: options.size("num_key_value_heads", Some(kv_heads))?,
        dim_head: options.size("head_dim", Some(dim / heads))?,
        inner: options.size("intermediate_size", Some(inner))?,
        eps: options.number("rms_norm_eps", 1e-6)?,
        base: theta.map_or_else(|| options.number("rope_theta", 10000.0), Ok)?,
        scaling: scaling(options, rope)?,
        biases: match family {
            Family::Mistral => [false, false],
            Family::Qwen2 => [true, false],
            _ => [options.flag("attention_bias", false)?; 2],
        },
        max_attend_past: max_attend_past(options, family, depth, positions)?,
        tied: options.flag("tie_word_embeddings", false)?,
    };
    let mut names = Names::default();
    names.one("token_emb.weight", "model.embed_tokens.weight");
    names.one("norm.g", "model.norm.weight");
    for layer in 0..sizes.depth {
        let ([own, ff], theirs) = (places(layer), format!("model.layers.{layer}"));
        names.one(format!("{own}.0.0.g"), format!("{theirs}.input_layernorm.weight"));
        names.one(format!("{ff}.0.0.g"), format!("{theirs}.post_attention_layernorm.weight"));
        for (here, there) in [("to_q", "q_proj"), ("to_k", "k_proj"), ("to_v", "v_proj"), ("to_out", "o_proj")] {
            let (here, there) = (format!("{own}.1.{here}"), format!("{theirs}.self_attn.{there}"));
            if sizes.biases[usize::from(there.ends_with("o_proj"))] {
                names.affine(&here, &there);
            } else {
                names.one(format!("{here}.weight"), format!("{there}.weight"));
            }
        }
        let gated = ["up_proj", "gate_proj"].map(|name| format!("{theirs}.mlp.{name}.weight"));
        names.weights.push(Weight { ours: format!("{ff}.1.net.0.proj.weight"), theirs: Source::Stacked(gated) });
        names.one(format!("{ff}.1.net.3.weight"), format!("{theirs}.mlp.down_proj.weight"));
        names.left_out.push(format!("{theirs}.self_attn.rotary_emb.inv_freq"));
    }
    if sizes.tied {
        names.copies.push(("lm_head.weight".to_string(), "model.embed_tokens.weight".to_string()));
    } else {
        names.one("to_logits.weight", "lm_head.weight");
    }
    Ok((sizes.config(), names))
}

pub(super) fn of_gguf(file: &TensorFile) -> Result<Described> {
    let metadata = file.metadata();
    let refuse = |key: &str, why: String| Error::file(file.path(), format!("`{key}` {why}"));
    let architecture = metadata.get("general.architecture").and_then(Metadata::as_str).unwrap_or("missing");
    if architecture != "llama" {
        return Err(refuse("general.architecture", format!("is {architecture}, expected llama")));
    }
    let size = |key: &str, default: Option<usize>| {
        let value = metadata.get(key).map_or(default, Metadata::as_usize);
        value.filter(|value| (1..=1 << 30).contains(value)).ok_or_else(|| {
            let found = metadata.get(key).map_or_else(|| "missing".to_string(), |found| format!("{found:?}"));
            refuse(key, format!("is {found}, expected a number from 1 to {}", 1 << 30))
        })
    };
    let number = |key: &str, default: f64| {
        let value = metadata.get(key).map_or(Some(default), Metadata::as_f64);
        value.ok_or_else(|| refuse(key, "is no number".to_string()))
    };
    if let Some(kind) = metadata.get("llama.rope.scaling.type").filter(|kind| kind.as_str() != Some("none")) {
        return Err(refuse("llama.rope.scaling.type", format!("is {kind:?}, only plain rotation is known")));
    }
    if metadata.get("llama.expert_count").and_then(Metadata::as_usize).is_some_and(|count| count > 0) {
        return Err(refuse("llama.expert_count", "is not 0: mixtures of experts are not known".to_string()));
    }
    let dim = size("llama.embedding_length", None)?;
    let heads = size("llama.attention.head_count", None)?;
    let kv_heads = size("llama.attention.head_count_kv", Some(heads))?;
    let dim_head = size("llama.attention.key_length", Some(dim / heads))?;
    if size("llama.rope.dimension_count", Some(dim_head))? != dim_head {
        return Err(refuse("llama.rope.dimension_count", format!("is not the {dim_head} features of a head")));
    }
    let table = file.info("token_embd.weight").and_then(|info| info.shape.first().copied());
    let sizes = Sizes {
        tokens: size("llama.vocab_size", table)?,
        positions: size("llama.context_length", None)?,
        dim,
        depth: size("llama.block_count", None)?,
        heads,
        kv_heads,
        dim_head,
        inner: size("llama.feed_forward_length", None)?,
        eps: number("llama.attention.layer_norm_rms_epsilon", 1e-5)?,
        base: number("llama.rope.freq_base", 10000.0)?,
        scaling: Scaling::None,
        biases: [false, false],
        max_attend_past: None,
        tied: file.info("output.weight").is_none(),
    };
    if sizes.depth > file.names().count() {
        return Err(refuse("llama.block_count", format!("is {}, more than there are tensors", sizes.depth)));
    }
    let mut names = Names::default();
    names.one("token_emb.weight", "token_embd.weight");
    names.one("norm.g", "output_norm.weight");
    for layer in 0..sizes.depth {
        let ([own, ff], theirs) = (places(layer), format!("blk.{layer}"));
        names.one(format!("{own}.0.0.g"), format!("{theirs}.attn_norm.weight"));
        names.one(format!("{ff}.0.0.g"), format!("{theirs}.ffn_norm.weight"));
        for (here, there, heads) in [("to_q", "attn_q", heads), ("to_k", "attn_k", kv_heads)] {
            let theirs = Source::Halves(format!("{theirs}.{there}.weight"), heads);
            names.weights.push(Weight { ours: format!("{own}.1.{here}.weight"), theirs });
        }
        names.one(format!("{own}.1.to_v.weight"), format!("{theirs}.attn_v.weight"));
        names.one(format!("{own}.1.to_out.weight"), format!("{theirs}.attn_output.weight"));
        let gated = ["ffn_up", "ffn_gate"].map(|name| format!("{theirs}.{name}.weight"));
        names.weights.push(Weight { ours: format!("{ff}.1.net.0.proj.weight"), theirs: Source::Stacked(gated) });
        names.one(format!("{ff}.1.net.3.weight"), format!("{theirs}.ffn_down.weight"));
    }
    if !sizes.tied {
        names.one("to_logits.weight", "output.weight");
    }
    Ok((sizes.config(), names))
}
