//! Llama and models with the same architecture, by the names of `transformers`.

use super::{
    Described, Family, Names, Options, TensorFile, ff_mult,
    names::{Source, Weight, equal},
    rope,
};
use crate::{
    Result,
    config::{
        AttentionConfig, AttentionLayersConfig, FeedForwardConfig, FinalNorm, Llama3Scaling, TransformerWrapperConfig,
        YarnScaling,
    },
    error::ensure,
    ops::Activation,
};

/// Sizes of a model.
pub(super) struct Sizes {
    pub(super) tokens: usize,
    pub(super) positions: usize,
    pub(super) dim: usize,
    pub(super) depth: usize,
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) dim_head: usize,
    pub(super) inner: usize,
    pub(super) eps: f64,
    pub(super) rotation: Rotation,
    /// Biases of queries, keys and values, of the attention's output, and of the feedforward.
    pub(super) biases: [bool; 3],
    pub(super) max_attend_past: Option<usize>,
    pub(super) tied: bool,
}

/// Rotation of queries and keys.
pub(super) struct Rotation {
    pub(super) base: f64,
    pub(super) scaling: Scaling,
    /// Divisors of the frequencies, one per feature pair.
    pub(super) factors: Option<Vec<f64>>,
}

/// RoPE scaling for longer contexts.
#[derive(Clone, Copy)]
pub(super) enum Scaling {
    None,
    Linear(f64),
    Llama3(Llama3Scaling),
    Yarn(YarnScaling),
}

impl Sizes {
    pub(super) fn config(&self) -> TransformerWrapperConfig {
        let Rotation { base, scaling, factors } = &self.rotation;
        let layers = AttentionLayersConfig {
            heads: self.heads,
            use_rmsnorm: true,
            norm_eps: Some(self.eps),
            final_norm: FinalNorm::Same,
            rotary_pos_emb: true,
            rotary_emb_dim: Some(self.dim_head),
            rotary_qk_only: true,
            rotary_base: *base,
            rotary_interpolation_factor: if let Scaling::Linear(factor) = *scaling { factor } else { 1.0 },
            rotary_llama3_scaling: if let Scaling::Llama3(scaling) = *scaling { Some(scaling) } else { None },
            rotary_yarn_scaling: if let Scaling::Yarn(scaling) = *scaling { Some(scaling) } else { None },
            rotary_freq_factors: factors.clone(),
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
                activation: Activation::Silu,
                no_bias: !self.biases[2],
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

/// Returns the names of one block in this crate: attention, then feedforward.
pub(super) fn places(layer: usize) -> [String; 2] {
    [2 * layer, 2 * layer + 1].map(|index| format!("attn_layers.layers.{index}"))
}

/// Returns the attention window, if tokens do not attend to all earlier ones.
fn max_attend_past(options: &Options, family: Family, depth: usize, positions: usize) -> Result<Option<usize>> {
    const KEY: &str = "sliding_window";
    let window = match family {
        // Null means none; the default is this.
        Family::Mistral if !options.has(KEY) => Some(4096),
        Family::Qwen2 if !options.flag("use_sliding_window", false)? => return Ok(None),
        Family::Qwen2 if !options.has(KEY) => Some(4096),
        Family::Mistral | Family::Qwen2 if options.get(KEY).is_some() => Some(options.size(KEY, None)?),
        _ => return Ok(None),
    };
    // A window as wide as the text has no effect, in whichever layers it is.
    let window = window.filter(|&window| window < positions);
    if window.is_none() || family == Family::Qwen2 && !all_slide(options, depth)? {
        return Ok(None);
    }
    // The window includes the token itself.
    Ok(window.map(|window| window - 1))
}

/// Returns `true` if every layer of a Qwen2 model has the window, `false` if none has.
fn all_slide(options: &Options, depth: usize) -> Result<bool> {
    const LAYERS: &str = "layer_types";
    const FIRST: &str = "max_window_layers";
    if let Some(kinds) = options.get(LAYERS) {
        let kinds = kinds.as_array().map_or(&[][..], Vec::as_slice);
        let all = |kind: &str| kinds.len() == depth && kinds.iter().all(|found| found == kind);
        ensure!(
            all("sliding_attention") || all("full_attention"),
            options.refuse(LAYERS, "must be sliding_attention or full_attention for all layers")
        );
        return Ok(all("sliding_attention"));
    }
    let first = match options.get(FIRST) {
        None => 28,
        Some(value) => {
            value.as_u64().ok_or_else(|| options.refuse(FIRST, format!("is {value}, expected a layer index")))?
        }
    };
    let differ = || {
        options.refuse(
            FIRST,
            format!("is {first}, so only layers {first} to {depth} have a window; expected none ({depth}) or all (0)"),
        )
    };
    ensure!(first == 0 || first >= depth as u64, differ());
    Ok(first == 0)
}

/// Names of the token embeddings and of the logits' weights.
pub(super) const TABLE: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

/// Returns `true` if a file has a head with values other than the embeddings', which then takes precedence over the
/// config, as in `transformers` since version 5.
fn has_own_head(file: &TensorFile) -> Result<bool> {
    let both = file.info(HEAD).is_some() && file.info(TABLE).is_some();
    Ok(both && !equal(file, HEAD, TABLE)?)
}

pub(super) fn of_json(options: &Options, family: Family, file: &TensorFile) -> Result<Described> {
    options.only("hidden_act", "silu")?;
    let dim = options.size("hidden_size", Some(4096))?;
    let heads = options.size("num_attention_heads", Some(32))?;
    let depth = options.depth(32)?;
    // Defaults of the classes of transformers: tokens, positions, inner features, key heads.
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
        rotation: rope::of_json(options, positions)?,
        biases: match family {
            Family::Mistral => [false; 3],
            Family::Qwen2 => [true, false, false],
            _ => {
                let attention = options.flag("attention_bias", false)?;
                [attention, attention, options.flag("mlp_bias", false)?]
            }
        },
        max_attend_past: max_attend_past(options, family, depth, positions)?,
        tied: options.flag("tie_word_embeddings", false)? && !has_own_head(file)?,
    };
    // Of two tables with the same values a file may have either.
    let table = if sizes.tied && file.info(TABLE).is_none() { HEAD } else { TABLE };
    let names = names(&sizes, table);
    Ok((sizes.config(), names))
}

/// Names of the weights in `transformers`; `table`: of the embeddings.
pub(super) fn names(sizes: &Sizes, table: &str) -> Names {
    let mut names = Names::default();
    names.one("token_emb.weight", table);
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
        for part in if sizes.biases[2] { &["weight", "bias"][..] } else { &["weight"] } {
            let gated = ["up_proj", "gate_proj"].map(|name| format!("{theirs}.mlp.{name}.{part}"));
            let ours = format!("{ff}.1.net.0.proj.{part}");
            names.weights.push(Weight { ours, theirs: Source::Stacked(gated) });
            names.one(format!("{ff}.1.net.3.{part}"), format!("{theirs}.mlp.down_proj.{part}"));
        }
    }
    if sizes.tied {
        names.left_out.push(HEAD.to_string());
    } else {
        names.one("to_logits.weight", HEAD);
    }
    names
}
