//! Options of attention layers, with the names and defaults of x-transformers 0.22.0.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::kwargs::{Field, Json, Visit, keywords};
use crate::ops::Activation;

/// Class of attention layers.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[non_exhaustive]
pub enum LayersKind {
    /// Bidirectional, like BERT.
    #[default]
    Encoder,
    /// Causal, like GPT.
    Decoder,
    /// Cross-attention and feedforward only.
    CrossAttender,
}

/// One sublayer in an [`AttentionLayersConfig::custom_layers`] order.
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
    /// Returns the letter of this type: `a`, `c` or `f`.
    pub fn letter(self) -> char {
        match self {
            Self::SelfAttention => 'a',
            Self::CrossAttention => 'c',
            Self::FeedForward => 'f',
        }
    }
}

/// Amount of token shift: one number for all sublayers, or one for each.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(untagged)]
#[non_exhaustive]
pub enum ShiftTokens {
    /// Same amount in every sublayer; 0 turns it off.
    All(usize),
    /// One amount per sublayer.
    Each(Vec<usize>),
}

impl Default for ShiftTokens {
    fn default() -> Self {
        Self::All(0)
    }
}

impl<'de> Deserialize<'de> for ShiftTokens {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = Value::deserialize(deserializer)?;
        let read = match value {
            Value::Array(_) => serde_json::from_value(value).map(Self::Each),
            _ => serde_json::from_value(value).map(Self::All),
        };
        read.map_err(serde::de::Error::custom)
    }
}

/// Final norm of a wrapper, after its layers.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum FinalNorm {
    /// LayerNorm, whatever norm the branches have, as in x-transformers 0.22.
    #[default]
    Layer,
    /// Same norm as the branches, as in current x-transformers. With `pre_norm = false` it is the norm of the last sum.
    Same,
    /// No final norm; with `pre_norm = false` the last sum keeps its norm like the others.
    None,
}

/// Llama 3.1's RoPE scaling for longer contexts (<https://arxiv.org/abs/2407.21783>): frequencies with fewer than
/// `low_freq_factor` turns in the original context are divided by `factor`, those with more than `high_freq_factor`
/// turns are kept, and those in between are interpolated. The names are those of `transformers`.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Llama3Scaling {
    /// Divides the slow frequencies, at least 1.
    pub factor: f64,
    /// Maximum number of turns of slow frequencies, above 0.
    pub low_freq_factor: f64,
    /// Minimum number of turns of fast frequencies, above `low_freq_factor`.
    pub high_freq_factor: f64,
    /// Context length before scaling, in tokens.
    pub original_max_position_embeddings: usize,
}

/// YaRN's RoPE scaling for longer contexts (Peng et al., <https://arxiv.org/abs/2309.00071>): frequencies with fewer
/// than `beta_slow` turns in the original context are divided by `factor`, those with more than `beta_fast` turns are
/// kept, and those in between are interpolated; queries and keys are multiplied by `attention_factor`. The names are
/// those of `transformers`.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct YarnScaling {
    /// Divides the slow frequencies, at least 1.
    pub factor: f64,
    /// Context length before scaling, in tokens.
    pub original_max_position_embeddings: usize,
    /// Multiplies rotated queries and keys, above 0; `0.1 ln(factor) + 1` in the paper.
    pub attention_factor: f64,
    /// Minimum number of turns of fast frequencies, above 0; 32 in the paper.
    pub beta_fast: f64,
    /// Maximum number of turns of slow frequencies, above 0; 1 in the paper.
    pub beta_slow: f64,
    /// If `true`, as in the paper, the ends of the transition are rounded outward to whole feature pairs.
    pub truncate: bool,
}

impl YarnScaling {
    /// Creates the paper's scaling, with its attention factor.
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

/// Options of `Encoder`, `Decoder` and `CrossAttender`.
///
/// In JSON the keys are flat, as in Python: those of [`AttentionConfig`] begin with `attn_`, those of
/// [`FeedForwardConfig`] with `ff_`. Unknown keys are errors. [`LayersPlan::new`](super::LayersPlan::new) checks
/// which options can be combined.
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
#[derive(Clone, PartialEq, Debug)]
pub struct AttentionLayersConfig {
    /// Class of the layers. Required.
    pub kind: LayersKind,
    /// Width of the model. Required.
    pub dim: usize,
    /// Number of blocks. Required.
    pub depth: usize,
    /// Number of attention heads. Default 8.
    pub heads: usize,
    /// If `true`, blocks attend to a context too: `a c f`.
    pub cross_attend: bool,
    /// If `true`, and with `cross_attend`, blocks have no self-attention: `c f`.
    pub only_cross: bool,
    /// If `true`, uses ScaleNorm instead of LayerNorm. <https://arxiv.org/abs/1910.05895>
    pub use_scalenorm: bool,
    /// If `true`, uses RMSNorm instead of LayerNorm; takes precedence over `use_scalenorm`.
    /// <https://arxiv.org/abs/1910.07467>
    pub use_rmsnorm: bool,
    /// If `true`, multiplies each branch by a learned scalar that starts at 0, in place of all branch norms: the norm
    /// options (`use_scalenorm`, `use_rmsnorm`, `sandwich_norm`, `pre_norm`) then have no effect, as upstream.
    /// <https://arxiv.org/abs/2003.04887>
    pub use_rezero: bool,
    /// If `true`, adds the ALiBi position bias; causal models only. `alibi_pos_emb` is accepted too.
    /// <https://arxiv.org/abs/2108.12409>
    pub alibi_pos_bias: bool,
    /// Number of heads, from the first, that get the ALiBi bias. Default all.
    pub alibi_num_heads: Option<usize>,
    /// If `true`, the ALiBi slopes are learned, as logarithms.
    pub alibi_learned: bool,
    /// If `true`, adds T5's relative position bias, shared by all layers. <https://arxiv.org/abs/1910.10683>
    pub rel_pos_bias: bool,
    /// Number of buckets of the relative position bias. Default 32.
    pub rel_pos_num_buckets: usize,
    /// Distance from which all positions share a bucket. Default 128.
    pub rel_pos_max_distance: usize,
    /// If `true`, adds sinusoidal positions to the inputs of queries and keys. <https://arxiv.org/abs/2012.15832>
    pub position_infused_attn: bool,
    /// Epsilon of the norms. LayerNorm adds it to the variance, default 1e-5; RMSNorm adds it to the mean square, in
    /// place of 0.22's lower bound on the length; ScaleNorm uses it as that bound.
    pub norm_eps: Option<f64>,
    /// Final norm after the last layer (owned by the wrapper). Default LayerNorm. Current x-transformers:
    /// `pre_norm_has_final_norm`.
    pub final_norm: FinalNorm,
    /// If `true`, all `depth` blocks share their weights (Lan et al., ALBERT, <https://arxiv.org/abs/1909.11942>).
    pub weight_tie_layers: bool,
    /// If `true`, applies rotary position embeddings to queries, keys and values. <https://arxiv.org/abs/2104.09864>
    pub rotary_pos_emb: bool,
    /// Number of features per head that are rotated: at least 32, as in 0.22, or 2 with `rotary_qk_only`. Default half
    /// of the head.
    pub rotary_emb_dim: Option<usize>,
    /// If `true`, and with `rotary_pos_emb`, values are not rotated, as in the paper and in later versions.
    pub rotary_qk_only: bool,
    /// Base of the rotary frequencies, also called theta. Default 10000.
    pub rotary_base: f64,
    /// Divides positions: a model that was trained with it reads contexts longer by this factor. Default 1.
    /// <https://arxiv.org/abs/2306.15595>
    pub rotary_interpolation_factor: f64,
    /// Llama 3.1's scaling of the slow rotary frequencies. Default none.
    pub rotary_llama3_scaling: Option<Llama3Scaling>,
    /// YaRN's scaling of the slow rotary frequencies. Requires `rotary_qk_only` and a rotation of whole heads; cannot
    /// be combined with `rotary_interpolation_factor` or `rotary_llama3_scaling`. Default none.
    pub rotary_yarn_scaling: Option<YarnScaling>,
    /// Divisors of the rotary frequencies, one above 0 for each feature pair, like `rope_freqs.weight` in GGUF files.
    /// Default none.
    pub rotary_freq_factors: Option<Vec<f64>>,
    /// If `true`, rotates the feature pairs `2k, 2k + 1`, as in current x-transformers and GPT-J, instead of
    /// `k, k + r/2`, as in 0.22 and Llama in `transformers`. Requires `rotary_qk_only`.
    pub rotary_interleaved: bool,
    /// Order of sublayers, in place of `depth` blocks; takes precedence over `sandwich_coef`, `par_ratio` and
    /// `only_cross`.
    pub custom_layers: Option<Vec<LayerType>>,
    /// Sandwich order: number of attention sublayers that come first, and of feedforwards that come last.
    /// <https://arxiv.org/abs/1911.03864>
    pub sandwich_coef: Option<usize>,
    /// Ratio of all sublayers to blocks with attention, which lie in the first two thirds; takes precedence over
    /// `sandwich_coef`. <https://arxiv.org/abs/2009.04534>
    pub par_ratio: Option<usize>,
    /// If `true`, adds the scores of each self-attention to those of the next. <https://arxiv.org/abs/2012.11747>
    pub residual_attn: bool,
    /// If `true`, does the same for cross-attention.
    pub cross_residual_attn: bool,
    /// If `true`, adds a feedforward before each block and halves the output of all feedforwards.
    /// <https://arxiv.org/abs/1906.02762>
    pub macaron: bool,
    /// If `true`, norms come before the branches, otherwise after the sums. Default true.
    /// <https://arxiv.org/abs/2002.04745>
    pub pre_norm: bool,
    /// If `true`, a GRU cell joins each branch and its residual. <https://arxiv.org/abs/1910.06764>
    pub gate_residual: bool,
    /// If `true`, multiplies the residual stream by a learned vector before each sum.
    pub scale_residual: bool,
    /// Token shift: moves chunks of features along the sequence before each branch.
    pub shift_tokens: ShiftTokens,
    /// If `true`, adds a norm to each branch's output. <https://arxiv.org/abs/2105.13290>
    pub sandwich_norm: bool,
    /// If `true`, uses cosine attention with a learned temperature. <https://arxiv.org/abs/2010.04245>
    pub use_qk_norm_attn: bool,
    /// Sequence length that determines the temperature's initial value. Default about 1024.
    pub qk_norm_attn_seq_len: Option<usize>,
    /// If `true`, the last linear layer of each branch starts at 0, including the gated one of `attn_on_attn`, where
    /// upstream fails.
    pub zero_init_branch_output: bool,
    /// Options `attn_*`.
    pub attn: AttentionConfig,
    /// Options `ff_*`.
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
    /// Creates the options of an encoder of this width and depth, with defaults for the rest.
    pub fn encoder(dim: usize, depth: usize) -> Self {
        Self { kind: LayersKind::Encoder, dim, depth, ..Self::default() }
    }

    /// Creates the options of a decoder of this width and depth, with defaults for the rest.
    pub fn decoder(dim: usize, depth: usize) -> Self {
        Self { kind: LayersKind::Decoder, dim, depth, ..Self::default() }
    }

    /// Creates the options of a cross-attender of this width and depth, with defaults for the rest.
    pub fn cross_attender(dim: usize, depth: usize) -> Self {
        Self { kind: LayersKind::CrossAttender, dim, depth, ..Self::default() }
    }
}

keywords! {
    AttentionLayersConfig {
        required { kind, dim, depth }
        options {
            heads, cross_attend, only_cross, use_scalenorm, use_rmsnorm, use_rezero, alibi_pos_bias, alibi_num_heads,
            alibi_learned, rel_pos_bias, rel_pos_num_buckets, rel_pos_max_distance, position_infused_attn, norm_eps,
            final_norm, weight_tie_layers, rotary_pos_emb, rotary_emb_dim, rotary_qk_only, rotary_base,
            rotary_interpolation_factor, rotary_llama3_scaling, rotary_yarn_scaling, rotary_freq_factors,
            rotary_interleaved, custom_layers, sandwich_coef, par_ratio, residual_attn, cross_residual_attn, macaron,
            pre_norm, gate_residual, scale_residual, shift_tokens, sandwich_norm, use_qk_norm_attn,
            qk_norm_attn_seq_len, zero_init_branch_output,
        }
        groups { "attn_" attn, "ff_" ff }
        // The documentation of x-transformers uses this name, its code the other.
        aliases { "alibi_pos_emb" "alibi_pos_bias" }
    }
}

/// Options of attention, with the prefix `attn_` among the options of the layers.
#[derive(Clone, PartialEq, Debug)]
pub struct AttentionConfig {
    /// Number of features per head. Default 64, whatever the width of the model.
    pub dim_head: usize,
    /// Number of key and value heads; each serves an equal group of query heads: query head `h` uses head
    /// `h / (heads / kv_heads)`, as in Llama (current x-transformers: `h % kv_heads`). Default `heads`.
    /// <https://arxiv.org/abs/2305.13245>
    pub kv_heads: Option<usize>,
    /// If `true`, the projections of queries, keys and values have biases, as in BERT.
    pub qkv_bias: bool,
    /// If `true`, the output projection has a bias. Default true.
    pub out_bias: bool,
    /// If `true`, mixes scores across heads before and after the softmax. <https://arxiv.org/abs/2003.02436>
    pub talking_heads: bool,
    /// If `true`, multiplies each head's output by a learned factor. <https://arxiv.org/abs/2110.09456>
    pub head_scale: bool,
    /// If `true`, heads share queries and keys and mix their features. Combined with `num_mem_kv`, which upstream
    /// rejects, each head's memory keys have the shared width. <https://arxiv.org/abs/2006.16362>
    pub collab_heads: bool,
    /// Ratio of shared features to the features of all heads. Default 0.3.
    pub collab_compression: f64,
    /// Number of highest-scoring keys that each query attends to. Default all. <https://arxiv.org/abs/1912.11637>
    pub sparse_topk: Option<usize>,
    /// If `true`, uses 1.5-entmax instead of softmax. <https://arxiv.org/abs/1905.05702>
    pub use_entmax15: bool,
    /// Number of learned memory keys and values before the others. <https://arxiv.org/abs/1907.01470>
    pub num_mem_kv: usize,
    /// Dropout probability of attention weights.
    pub dropout: f64,
    /// If `true`, adds attention on attention, a gated output projection. <https://arxiv.org/abs/1908.06954>
    pub on_attn: bool,
    /// If `true`, gates the aggregated values by a function of the layer's input.
    pub gate_values: bool,
    /// If `true`, the output projection starts at 0.
    pub zero_init_output: bool,
    /// Maximum distance to the past; keys further back are masked. Default none.
    pub max_attend_past: Option<usize>,
    /// If `true`, uses cosine attention, without the change of norms that `use_qk_norm_attn` makes.
    pub qk_norm: bool,
    /// Initial value of the log temperature of cosine attention. Default -3.
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

keywords! {
    AttentionConfig {
        options {
            dim_head, kv_heads, qkv_bias, out_bias, talking_heads, head_scale, collab_heads, collab_compression,
            sparse_topk, use_entmax15, num_mem_kv, dropout, on_attn, gate_values, zero_init_output, max_attend_past,
            qk_norm, scale_init_value,
        }
    }
}

/// Options of the feedforward, with the prefix `ff_` among the options of the layers.
#[derive(Clone, PartialEq, Debug)]
pub struct FeedForwardConfig {
    /// Ratio of the inner width, which is rounded down, to the width of the model. Default 4.
    pub mult: f64,
    /// If `true`, gates the activation (GLU), which adds half as many weights again. <https://arxiv.org/abs/2002.05202>
    pub glu: bool,
    /// Activation. Default GELU. Among the options of the layers each of the others is a boolean option,
    /// [`Activation::option`]: `ff_relu_squared`, `ff_swish`, …
    pub activation: Activation,
    /// If `true`, neither layer has a bias, even if gated, where current x-transformers keeps that of the first layer.
    pub no_bias: bool,
    /// If `true`, a LayerNorm follows the activation. <https://arxiv.org/abs/2110.09456>
    pub post_act_ln: bool,
    /// Dropout probability before the output layer.
    pub dropout: f64,
    /// If `true`, the output layer starts at 0.
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

keywords! {
    FeedForwardConfig {
        options { mult, glu, no_bias, post_act_ln, dropout, zero_init_output }
        special { activation activations }
    }
}

/// Each activation but the default is a boolean option, of which at most one is true.
fn activations(chosen: &mut Activation, visit: &mut Visit<'_>) {
    for &own in Activation::ALL {
        if let Some(option) = own.option() {
            visit(option, Field::One(&mut IsActivation { own, chosen }));
        }
    }
}

struct IsActivation<'a> {
    own: Activation,
    chosen: &'a mut Activation,
}

impl Json for IsActivation<'_> {
    fn get(&self) -> Value {
        Value::Bool(*self.chosen == self.own)
    }

    fn set(&mut self, value: Value) -> serde_json::Result<()> {
        match (value, self.chosen.option(), self.own.option()) {
            (Value::Bool(false), ..) => {}
            (Value::Bool(true), Some(other), Some(own)) => {
                let both = format!("expected at most one activation, got `ff_{other}` and `ff_{own}`");
                return Err(serde::de::Error::custom(both));
            }
            (Value::Bool(true), ..) => *self.chosen = self.own,
            (value, ..) => return Err(serde::de::Error::custom(format!("expected a boolean, got {value}"))),
        }
        Ok(())
    }
}
