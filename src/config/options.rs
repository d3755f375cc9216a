//! The keyword arguments of attention layers, with the names and defaults of x-transformers 0.22.0.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::kwargs::{self, Keywords};
use crate::ops::Activation;

/// Class of attention layers.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[non_exhaustive]
pub enum LayersKind {
    /// Attends in both directions, as BERT.
    #[default]
    Encoder,
    /// Causal, as GPT.
    Decoder,
    /// Cross-attention and feedforward alone.
    CrossAttender,
}

/// One sublayer of a [`AttentionLayersConfig::custom_layers`] order.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[non_exhaustive]
pub enum LayerType {
    /// `a`: self-attention.
    #[serde(rename = "a")]
    SelfAttention,
    /// `c`: cross-attention.
    #[serde(rename = "c")]
    CrossAttention,
    /// `f`: feedforward.
    #[serde(rename = "f")]
    FeedForward,
}

impl LayerType {
    /// `a`, `c` or `f`.
    pub fn letter(self) -> char {
        match self {
            Self::SelfAttention => 'a',
            Self::CrossAttention => 'c',
            Self::FeedForward => 'f',
        }
    }
}

/// Distance by which tokens are shifted: one number for all sublayers, or one for each.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(untagged)]
#[non_exhaustive]
pub enum ShiftTokens {
    /// The same in every sublayer; 0 is off.
    All(usize),
    /// One number per sublayer.
    Each(Vec<usize>),
}

impl Default for ShiftTokens {
    fn default() -> Self {
        Self::All(0)
    }
}

/// The norm that a wrapper has behind its layers.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum FinalNorm {
    /// LayerNorm, whatever the branches have: as x-transformers 0.22.
    #[default]
    Layer,
    /// The kind that the branches have: as today's x-transformers. With `pre_norm` = false it is that of the last sum.
    Same,
    /// None; with `pre_norm` = false the last sum has its norm as the others do.
    None,
}

/// Llama 3.1's stretch of the rotation to longer texts (<https://arxiv.org/abs/2407.21783>): frequencies with fewer
/// than `low_freq_factor` turns in the original context are divided by `factor`, those with more than
/// `high_freq_factor` turns stay, and in between one goes over into the other. The names are those of `transformers`.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Llama3Scaling {
    /// Divides the slow frequencies, at least 1.
    pub factor: f64,
    /// Turns of the slow frequencies, above 0.
    pub low_freq_factor: f64,
    /// Turns of the fast frequencies, more than those of the slow ones.
    pub high_freq_factor: f64,
    /// Tokens that the model saw before it was stretched.
    pub original_max_position_embeddings: usize,
}

/// YaRN's way to stretch the rotation to longer texts (Peng et al., <https://arxiv.org/abs/2309.00071>): frequencies
/// with fewer than `beta_slow` turns in the original context are divided by `factor`, those with more than `beta_fast`
/// turns stay, and in between one changes into the other; queries and keys are multiplied by `attention_factor`. The
/// names are those of `transformers`.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct YarnScaling {
    /// Divides the slow frequencies, at least 1.
    pub factor: f64,
    /// Number of tokens that the model saw before it was stretched.
    pub original_max_position_embeddings: usize,
    /// Multiplies rotated queries and keys, above 0. The paper's value is `0.1 ln(factor) + 1`.
    pub attention_factor: f64,
    /// Number of turns of the fast frequencies, above 0; the paper's value is 32.
    pub beta_fast: f64,
    /// Number of turns of the slow frequencies, above 0; the paper's value is 1.
    pub beta_slow: f64,
    /// If `true`, as in the paper, the ends of the transition are rounded outward to whole pairs of features.
    pub truncate: bool,
}

impl YarnScaling {
    /// The scaling of the paper, with its attention factor.
    pub fn new(factor: f64, original_max_position_embeddings: usize) -> Self {
        Self {
            factor,
            original_max_position_embeddings,
            attention_factor: 0.1 * factor.max(1.0).ln() + 1.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            truncate: true,
        }
    }
}

/// Keyword arguments of `Encoder`, `Decoder` and `CrossAttender`.
///
/// In JSON the keys are flat, as in Python: those of [`AttentionConfig`] begin with `attn_`, those of
/// [`FeedForwardConfig`] with `ff_`. Unknown keys are errors. What is legal together is decided by
/// [`LayersPlan::new`](super::LayersPlan::new).
///
/// ```
/// use x_transformers::config::{AttentionLayersConfig, FeedForwardConfig};
/// let layers = AttentionLayersConfig {
///     rotary_pos_emb: true,
///     ff: FeedForwardConfig { glu: true, ..Default::default() },
///     ..AttentionLayersConfig::decoder(512, 6)
/// };
/// let json = serde_json::json!({"kind": "Decoder", "dim": 512, "depth": 6, "rotary_pos_emb": true, "ff_glu": true});
/// assert_eq!(serde_json::to_value(&layers).unwrap(), json);
/// assert_eq!(serde_json::from_value::<AttentionLayersConfig>(json).unwrap(), layers);
/// ```
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(remote = "Self", default)]
pub struct AttentionLayersConfig {
    /// The class. Required.
    pub kind: LayersKind,
    /// Width of the model. Required.
    pub dim: usize,
    /// Number of blocks. Required.
    pub depth: usize,
    /// Attention heads. Default 8.
    pub heads: usize,
    /// Blocks attend to a context too: `a c f`.
    pub cross_attend: bool,
    /// With `cross_attend`: no self-attention, `c f`.
    pub only_cross: bool,
    /// ScaleNorm instead of LayerNorm. <https://arxiv.org/abs/1910.05895>
    pub use_scalenorm: bool,
    /// RMSNorm instead of LayerNorm; wins over `use_scalenorm`. <https://arxiv.org/abs/1910.07467>
    pub use_rmsnorm: bool,
    /// Each branch times a learned scalar that starts at 0, in place of all norms of branches: with it the options of
    /// norms (`use_scalenorm`, `use_rmsnorm`, `sandwich_norm`, `pre_norm`) have nothing to act on, as upstream.
    /// <https://arxiv.org/abs/2003.04887>
    pub use_rezero: bool,
    /// Linear position bias; causal models only. `alibi_pos_emb` is accepted too. <https://arxiv.org/abs/2108.12409>
    pub alibi_pos_bias: bool,
    /// The first so many heads get the ALiBi bias. Default all.
    pub alibi_num_heads: Option<usize>,
    /// The ALiBi slopes are learned, as logarithms.
    pub alibi_learned: bool,
    /// T5's relative position bias, shared by all layers. <https://arxiv.org/abs/1910.10683>
    pub rel_pos_bias: bool,
    /// Buckets of the relative position bias. Default 32.
    pub rel_pos_num_buckets: usize,
    /// Distance from which on all positions share a bucket. Default 128.
    pub rel_pos_max_distance: usize,
    /// Sinusoids added to the inputs of queries and keys. <https://arxiv.org/abs/2012.15832>
    pub position_infused_attn: bool,
    /// Added to the variance in LayerNorm, default 1e-5. Of RMSNorm it is added to the mean square, in place of 0.22's
    /// lower bound on the length; of ScaleNorm it is that bound.
    pub norm_eps: Option<f64>,
    /// The norm behind all layers, which belongs to the wrapper. Default LayerNorm. (Today's x-transformers:
    /// `pre_norm_has_final_norm`.)
    pub final_norm: FinalNorm,
    /// All blocks are one, which is run `depth` times (Lan et al., ALBERT, <https://arxiv.org/abs/1909.11942>).
    pub weight_tie_layers: bool,
    /// Rotary position embedding of queries, keys and values. <https://arxiv.org/abs/2104.09864>
    pub rotary_pos_emb: bool,
    /// Features of a head that are rotated, at least 32 as in 0.22, or 2 with `rotary_qk_only`. Default half of the
    /// head.
    pub rotary_emb_dim: Option<usize>,
    /// With `rotary_pos_emb`: values are not rotated, as in the paper and in later versions.
    pub rotary_qk_only: bool,
    /// The base of the rotation's frequencies, also called theta. Default 10000.
    pub rotary_base: f64,
    /// Positions are divided by this number: a model that was trained with it sees so many times further. Default 1.
    /// <https://arxiv.org/abs/2306.15595>
    pub rotary_interpolation_factor: f64,
    /// The frequencies are those of Llama 3.1, the slow ones made slower. Default none.
    pub rotary_llama3_scaling: Option<Llama3Scaling>,
    /// The frequencies are those of YaRN, the slow ones made slower. Needs `rotary_qk_only` and a rotation of whole
    /// heads; cannot be used with the two above. Default none.
    pub rotary_yarn_scaling: Option<YarnScaling>,
    /// Divides the frequency of each pair of features by a number of its own, as `rope_freqs.weight` of GGUF files
    /// does: one number above 0 for each pair. Default none.
    pub rotary_freq_factors: Option<Vec<f64>>,
    /// Rotates neighbours `2k, 2k + 1`, as today's x-transformers and GPT-J, and not `k, k + r/2`, as 0.22 and Llama in
    /// `transformers`. Needs `rotary_qk_only`.
    pub rotary_interleaved: bool,
    /// The order of sublayers in place of `depth` blocks; wins over the two below, and over `only_cross`.
    pub custom_layers: Option<Vec<LayerType>>,
    /// Number of attention sublayers that come first, and of feedforwards that come last.
    /// <https://arxiv.org/abs/1911.03864>
    pub sandwich_coef: Option<usize>,
    /// Fewer attention sublayers, in the first two thirds; wins over `sandwich_coef`.
    /// <https://arxiv.org/abs/2009.04534>
    pub par_ratio: Option<usize>,
    /// Scores are added to those of the next self-attention. <https://arxiv.org/abs/2012.11747>
    pub residual_attn: bool,
    /// The same for cross-attention.
    pub cross_residual_attn: bool,
    /// A feedforward in front of each block, all of them halved. <https://arxiv.org/abs/1906.02762>
    pub macaron: bool,
    /// Norms before the branches; otherwise after the sums. Default true. <https://arxiv.org/abs/2002.04745>
    pub pre_norm: bool,
    /// Residuals through a GRU cell. <https://arxiv.org/abs/1910.06764>
    pub gate_residual: bool,
    /// The residual stream times a learned vector before each sum.
    pub scale_residual: bool,
    /// Shifts chunks of features along the sequence before each branch.
    pub shift_tokens: ShiftTokens,
    /// Another norm on each branch's output. <https://arxiv.org/abs/2105.13290>
    pub sandwich_norm: bool,
    /// Cosine attention with a learned temperature. <https://arxiv.org/abs/2010.04245>
    pub use_qk_norm_attn: bool,
    /// Sequence length from which that temperature starts. Default as for 1024 or so.
    pub qk_norm_attn_seq_len: Option<usize>,
    /// The last linear layer of each branch starts at 0; the gated one of `attn_on_attn` too, where upstream fails.
    pub zero_init_branch_output: bool,
    /// Keywords `attn_*`.
    pub attn: AttentionConfig,
    /// Keywords `ff_*`.
    pub ff: FeedForwardConfig,
}

impl Default for AttentionLayersConfig {
    fn default() -> Self {
        Self {
            kind: LayersKind::default(),
            dim: 0,
            depth: 0,
            heads: 8,
            cross_attend: false,
            only_cross: false,
            use_scalenorm: false,
            use_rmsnorm: false,
            norm_eps: None,
            final_norm: FinalNorm::default(),
            weight_tie_layers: false,
            use_rezero: false,
            alibi_pos_bias: false,
            alibi_num_heads: None,
            alibi_learned: false,
            rel_pos_bias: false,
            rel_pos_num_buckets: 32,
            rel_pos_max_distance: 128,
            position_infused_attn: false,
            rotary_pos_emb: false,
            rotary_emb_dim: None,
            rotary_qk_only: false,
            rotary_base: 10000.0,
            rotary_interpolation_factor: 1.0,
            rotary_llama3_scaling: None,
            rotary_yarn_scaling: None,
            rotary_freq_factors: None,
            rotary_interleaved: false,
            custom_layers: None,
            sandwich_coef: None,
            par_ratio: None,
            residual_attn: false,
            cross_residual_attn: false,
            macaron: false,
            pre_norm: true,
            gate_residual: false,
            scale_residual: false,
            shift_tokens: ShiftTokens::default(),
            sandwich_norm: false,
            use_qk_norm_attn: false,
            qk_norm_attn_seq_len: None,
            zero_init_branch_output: false,
            attn: AttentionConfig::default(),
            ff: FeedForwardConfig::default(),
        }
    }
}

impl AttentionLayersConfig {
    /// An encoder of this width and depth, all else at its default.
    pub fn encoder(dim: usize, depth: usize) -> Self {
        Self { kind: LayersKind::Encoder, dim, depth, ..Self::default() }
    }

    /// A decoder of this width and depth, all else at its default.
    pub fn decoder(dim: usize, depth: usize) -> Self {
        Self { kind: LayersKind::Decoder, dim, depth, ..Self::default() }
    }

    /// A cross-attender of this width and depth, all else at its default.
    pub fn cross_attender(dim: usize, depth: usize) -> Self {
        Self { kind: LayersKind::CrossAttender, dim, depth, ..Self::default() }
    }
}

impl Keywords for AttentionLayersConfig {
    const REQUIRED: &'static [&'static str] = &["kind", "dim", "depth"];
    const GROUPS: &'static [(&'static str, &'static str)] = &[("attn_", "attn"), ("ff_", "ff")];
    // The documentation of x-transformers teaches this name, its code reads the other.
    const ALIASES: &'static [(&'static str, &'static str)] = &[("alibi_pos_emb", "alibi_pos_bias")];

    fn to_nested(&self) -> serde_json::Result<Value> {
        Self::serialize(self, serde_json::value::Serializer)
    }

    fn from_nested(value: Value) -> serde_json::Result<Self> {
        Self::deserialize(value)
    }
}

impl Serialize for AttentionLayersConfig {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        Serialize::serialize(&kwargs::write(self), serializer)
    }
}

impl<'de> Deserialize<'de> for AttentionLayersConfig {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        kwargs::read(Deserialize::deserialize(deserializer)?).map_err(serde::de::Error::custom)
    }
}

/// Keyword arguments of attention, written with the prefix `attn_` among those of the layers.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct AttentionConfig {
    /// Features of a head. Default 64, whatever the width of the model.
    pub dim_head: usize,
    /// Heads of keys and values, each shared by as many heads of queries: head `h` of queries uses head
    /// `h / (heads / kv_heads)`, as in Llama (in today's x-transformers `h % kv_heads`). Default all `heads`.
    /// <https://arxiv.org/abs/2305.13245>
    pub kv_heads: Option<usize>,
    /// The projections of queries, keys and values have biases, as in BERT.
    pub qkv_bias: bool,
    /// The output projection has a bias. Default true.
    pub out_bias: bool,
    /// Scores are mixed across heads before and after the softmax. <https://arxiv.org/abs/2003.02436>
    pub talking_heads: bool,
    /// A learned factor per head on its output. <https://arxiv.org/abs/2110.09456>
    pub head_scale: bool,
    /// Heads share queries and keys, and mix their features. Together with `num_mem_kv`, which upstream refuses, each
    /// head's memory keys have the shared width. <https://arxiv.org/abs/2006.16362>
    pub collab_heads: bool,
    /// Shared features relative to those of all heads. Default 0.3.
    pub collab_compression: f64,
    /// Attention to the so many best keys of each query. <https://arxiv.org/abs/1912.11637>
    pub sparse_topk: Option<usize>,
    /// 1.5-entmax instead of softmax. <https://arxiv.org/abs/1905.05702>
    pub use_entmax15: bool,
    /// Learned keys and values in front of the others. <https://arxiv.org/abs/1907.01470>
    pub num_mem_kv: usize,
    /// Dropout of attention weights.
    pub dropout: f64,
    /// Attention on attention: a gated output projection. <https://arxiv.org/abs/1908.06954>
    pub on_attn: bool,
    /// A gate on the aggregated values, computed from the layer's input.
    pub gate_values: bool,
    /// The output projection starts at 0.
    pub zero_init_output: bool,
    /// Keys further in the past are masked.
    pub max_attend_past: Option<usize>,
    /// Cosine attention, without the move of norms that `use_qk_norm_attn` brings.
    pub qk_norm: bool,
    /// Start of the logarithm of its temperature. Default -3.
    pub scale_init_value: Option<f64>,
}

impl Default for AttentionConfig {
    fn default() -> Self {
        Self {
            dim_head: 64,
            kv_heads: None,
            qkv_bias: false,
            out_bias: true,
            talking_heads: false,
            head_scale: false,
            collab_heads: false,
            collab_compression: 0.3,
            sparse_topk: None,
            use_entmax15: false,
            num_mem_kv: 0,
            dropout: 0.0,
            on_attn: false,
            gate_values: false,
            zero_init_output: false,
            max_attend_past: None,
            qk_norm: false,
            scale_init_value: None,
        }
    }
}

/// Keyword arguments of the feedforward, written with the prefix `ff_` among those of the layers.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct FeedForwardConfig {
    /// Inner width relative to that of the model, rounded down. Default 4.
    pub mult: f64,
    /// A gated activation; adds half as many weights again. <https://arxiv.org/abs/2002.05202>
    pub glu: bool,
    /// Activation. Default GELU. In JSON each other one is an option of its own, [`Activation::option`], that is true:
    /// `ff_relu_squared`, `ff_swish`, …
    #[serde(flatten, with = "activation")]
    pub activation: Activation,
    /// No biases in either layer; of a gated one too, where today's x-transformers keeps them in the first.
    pub no_bias: bool,
    /// A LayerNorm after the activation. <https://arxiv.org/abs/2110.09456>
    pub post_act_ln: bool,
    /// Dropout before the output layer.
    pub dropout: f64,
    /// The output layer starts at 0.
    pub zero_init_output: bool,
}

impl Default for FeedForwardConfig {
    fn default() -> Self {
        Self {
            mult: 4.0,
            glu: false,
            activation: Activation::Gelu,
            no_bias: false,
            post_act_ln: false,
            dropout: 0.0,
            zero_init_output: false,
        }
    }
}

/// An activation as options, of which one at most is true.
mod activation {
    use std::collections::BTreeMap;

    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    use crate::ops::Activation;

    pub fn serialize<S: Serializer>(activation: &Activation, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(Activation::ALL.iter().filter_map(|one| Some((one.option()?, one == activation))))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Activation, D::Error> {
        let options = BTreeMap::<String, bool>::deserialize(deserializer)?;
        let selected = |one: &Activation| one.option().is_some_and(|option| options.get(option) == Some(&true));
        let selected: Vec<Activation> = Activation::ALL.iter().copied().filter(selected).collect();
        match selected[..] {
            [] => Ok(Activation::Gelu),
            [activation] => Ok(activation),
            _ => {
                let names = selected.iter().filter_map(|one| Some(format!("`ff_{}`", one.option()?)));
                let names = names.collect::<Vec<_>>().join(" and ");
                Err(D::Error::custom(format!("only one activation can be chosen, got {names}")))
            }
        }
    }
}
