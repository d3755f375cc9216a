//! Plans of feedforward and attention.

use std::fmt;

use super::{
    plan::NormPlan,
    ranges::{WIDEST, at_least_one, probability},
    rotary::RotaryPlan,
};
use crate::{
    Error, Result,
    error::ensure,
    ops::{Activation, Window, gpu_needs_scores},
};

/// Feedforward.
#[derive(Clone, PartialEq, Debug)]
pub struct FeedForwardPlan {
    /// Width of the input.
    pub dim: usize,
    /// Width between the layers.
    pub inner: usize,
    /// Width of the output.
    pub dim_out: usize,
    /// The activation.
    pub activation: Activation,
    /// If `true`, tanh takes the place of the activation.
    pub tanh: bool,
    /// If `true`, SoLU takes the place of the activation.
    pub solu: bool,
    /// Bound of a soft clamp before the activation.
    pub softclamp: Option<f64>,
    /// Bounds of the gate and of the other factor.
    pub glu_softclamp: Option<[f64; 2]>,
    /// If `true`, the activation gates the other half of the first projection.
    pub glu: bool,
    /// If `true`, the first and the last layer have biases.
    pub bias: [bool; 2],
    /// If `true`, the gated activation is multiplied by a learned vector.
    pub mult_bias: bool,
    /// Norm after the activation.
    pub norm: Option<NormPlan>,
    /// Dropout before the output layer.
    pub dropout: f64,
    /// Dropout of the output.
    pub sublayer_dropout: f64,
    /// Name of the layers in a state dict, and number of the output layer among them.
    pub place: (&'static str, usize),
    /// If `true`, the output layer starts at 0.
    pub zero_init: bool,
    /// Depth of the block, if the output layer starts the smaller the deeper it is.
    pub output_depth: Option<usize>,
}

/// Attention.
#[derive(Clone, PartialEq, Debug)]
pub struct AttentionPlan {
    /// Width of the model.
    pub dim: usize,
    /// Width of the source of keys and values.
    pub dim_context: usize,
    /// Heads.
    pub heads: usize,
    /// Number of key and value heads; a divisor of `heads`.
    pub kv_heads: usize,
    /// If `true`, query head `h` uses key head `h % kv_heads`, otherwise `h / (heads / kv_heads)`.
    pub kv_interleaved: bool,
    /// If `true`, the projections of queries, keys and values have biases.
    pub qkv_bias: bool,
    /// If `true`, the output projection has a bias.
    pub out_bias: bool,
    /// If `false`, there is no output projection: the heads' features are the output.
    pub project_out: bool,
    /// Number of features per head of the queries and keys, unless heads share them.
    pub dim_head: usize,
    /// Number of features per head of the values.
    pub dim_value: usize,
    /// For collaborative heads: width of the queries and keys that all heads share.
    pub shared: Option<usize>,
    /// If `true`, queries attend only to keys up to their own position.
    pub causal: bool,
    /// Limits of the keys that a query attends to.
    pub window: Window,
    /// Treatment of padding.
    pub padding: PaddingPlan,
    /// Scale of the logits.
    pub temperature: Temperature,
    /// L2 norms of queries and keys.
    pub qk_norm: Option<QkNormPlan>,
    /// RMS norms of queries, keys and values, with a scale per head.
    pub rms_norms: [bool; 3],
    /// Rotation.
    pub rotary: Option<RotaryPlan>,
    /// If `true`, polar positions turn softplus of queries and keys into twice as many features.
    pub polar: bool,
    /// Mixture of the values with those of the first layer.
    pub value_residual: ValueResidual,
    /// Number of learned memory keys and values before the others.
    pub num_mem_kv: usize,
    /// If `true`, a key and value of zeros precedes all others.
    pub zero_kv: bool,
    /// If `true`, position biases and the window count the memory key/values; otherwise these have no bias and are
    /// always seen.
    pub mem_kv_counted: bool,
    /// Mixture of the scores across heads.
    pub talking_heads: TalkingHeads,
    /// Bound of the scores, which `bound · tanh(score / bound)` keeps softly.
    pub softclamp: Option<f64>,
    /// If `true`, scores are negative squared distances of queries and keys in place of products.
    pub l2_distance: bool,
    /// If `true`, weights of the scores' magnitudes take the signs of the scores (Cog attention).
    pub cog_signed: bool,
    /// If `true`, the first head's scores lower those of later queries to the same keys (selective attention).
    pub selective: bool,
    /// If `true`, each head has a learned score whose weight goes to no value.
    pub sink: bool,
    /// Number of highest-scoring keys that each query attends to.
    pub sparse_topk: Option<usize>,
    /// If `true`, the gradient of top-k is that of the softmax of all scores.
    pub straight_through: bool,
    /// Function from scores to weights.
    pub normalize: Normalize,
    /// If given, training adds Gumbel noise to the scores, and this divides them.
    pub gumbel: Option<f64>,
    /// Scores that are passed on to the next attention of the same kind.
    pub residual: ScoreResidual,
    /// Dropout of the weights.
    pub dropout: f64,
    /// Dropout of the output.
    pub sublayer_dropout: f64,
    /// Bound of the values, whose exponentials are averaged (LASER).
    pub laser: Option<f64>,
    /// If `true`, each head's output has a learned factor.
    pub head_scale: bool,
    /// If `true`, each head's output is gated by the layer's input.
    pub gate_heads: bool,
    /// Gate of the values by the layer's input.
    pub gate_values: ValueGate,
    /// Form of that gate.
    pub gate_form: GateForm,
    /// If `true`, gates of values and of the output are SiLUs of their sum, otherwise sigmoids.
    pub silu_gates: bool,
    /// Gate of the output by itself, which adds to that of the values.
    pub output_gate: Option<GateForm>,
    /// If `true`, the output projection has a gate.
    pub on_attn: bool,
    /// If `true`, the output projection starts at 0.
    pub zero_init: bool,
    /// Depth of the block, if the output projection starts the smaller the deeper it is.
    pub output_depth: Option<usize>,
    /// If given, queries are projected from a latent vector of this width.
    pub latent_q: Option<usize>,
    /// If given, keys and values are projected from a latent vector of this width.
    pub latent_kv: Option<usize>,
    /// Number of key heads, the last ones, that are projected from the input and not from the latent vector.
    pub latent_rope: usize,
    /// Number of heads, the last ones, that rotate; `None`: all.
    pub rotated_heads: Option<usize>,
    /// If `true`, weights are multiplied by a mixture of the scores across heads.
    pub pre_scale: bool,
    /// If `true`, the softmax is over the queries of each key, and weights of each query are divided by their sum.
    pub inverted: bool,
    /// Bias from the content of the tokens.
    pub forget: Forget,
    /// Number and length of the curves by distance that queries weigh.
    pub rel_proj: Option<[usize; 2]>,
    /// Contextual positions.
    pub cope: Option<CopePlan>,
}

/// Form of a gate.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct GateForm {
    /// Rank of the projection; `None`: full.
    pub rank: Option<usize>,
    /// If `true`, the gate has one number per head.
    pub headwise: bool,
    /// If `true`, a projection of low rank has a SiLU between its layers.
    pub silu: bool,
}

/// Gates that lower the scores of earlier tokens.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[non_exhaustive]
pub enum Forget {
    /// None.
    #[default]
    None,
    /// One gate per token.
    Tokens,
    /// One gate per query and token, from this number of features.
    Rows(usize),
}

/// Positions that are counted by what a query attends to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CopePlan {
    /// Number of positions.
    pub positions: usize,
    /// If `true`, scores are mixed across heads first.
    pub talking: bool,
}

/// Scale of the logits.
#[derive(Clone, Copy, PartialEq, Debug)]
#[non_exhaustive]
pub enum Temperature {
    /// A constant.
    Fixed(f64),
    /// Queries and keys are normalised; the temperature is learned per head, as a logarithm that starts here.
    Learned(f64),
}

/// Function from scores to weights.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Normalize {
    /// Softmax.
    Softmax,
    /// 1.5-entmax.
    Entmax15,
    /// All weight on the highest score, with the gradient of the softmax.
    Hard,
    /// Sigmoid of each score.
    Sigmoid,
}

/// Treatment of padding in attention.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum PaddingPlan {
    /// Padded queries see memory key/values only; a query without keys attends to all equally.
    Queries,
    /// Only keys are masked; the output is 0 at padded queries and where the masks alone leave no key.
    Output,
    /// Like `Output`, and also 0 where the masks and causality together leave no key.
    OutputCausal,
}

/// L2 norms of queries and keys.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct QkNormPlan {
    /// Number of parts of a head that are normalised separately.
    pub groups: usize,
    /// If `true`, a learned vector per head follows.
    pub scales: bool,
}

/// Mixture of an attention's values with those of the first attention of its kind.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum ValueResidual {
    /// None.
    None,
    /// Equal parts.
    Half,
    /// Learned, per token and head.
    Learned,
}

/// Mixture of scores across heads.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum TalkingHeads {
    /// None.
    None,
    /// Matrices `[in, out]` before and after the softmax.
    Matrices,
    /// Convolutions `[out, in, 1, 1]`: one before the softmax, added to the scores, and one after it.
    Convolutions([bool; 2]),
}

/// Scores that are passed on to the next attention of the same kind.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum ScoreResidual {
    /// None.
    None,
    /// Scaled products.
    Scaled,
    /// Scores after talking heads, biases, clamp and masks.
    Masked,
}

/// Gate of the values by the layer's input.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum ValueGate {
    /// None.
    None,
    /// Sigmoid of a linear layer with a bias, which starts almost open.
    Biased,
    /// Sigmoid of a linear layer without a bias.
    Sigmoid,
    /// SiLU of a linear layer without a bias.
    Silu,
}

/// Code path of an attention layer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum AttentionPath {
    /// Fused: in blocks, without a tensor of all scores.
    Fused,
    /// Explicit: from the matrix of scores, for this reason.
    Explicit(&'static str),
}

impl fmt::Display for AttentionPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fused => f.write_str("fused"),
            Self::Explicit(why) => write!(f, "explicit: {why}"),
        }
    }
}

impl FeedForwardPlan {
    /// Creates a plan `dim → inner → dim` with GELU and biases, x-transformers' default (with `inner = 4 · dim`).
    pub fn new(dim: usize, inner: usize) -> Self {
        Self {
            dim,
            inner,
            dim_out: dim,
            activation: Activation::Gelu,
            tanh: false,
            solu: false,
            softclamp: None,
            glu_softclamp: None,
            glu: false,
            bias: [true; 2],
            mult_bias: false,
            norm: None,
            dropout: 0.0,
            sublayer_dropout: 0.0,
            place: ("net", 3),
            zero_init: false,
            output_depth: None,
        }
    }

    /// Checks a plan that was not resolved from options.
    ///
    /// Errors: [`ErrorKind::Option`](crate::ErrorKind::Option) for a width of 0 or one that could not be addressed, or
    /// a dropout that is not a probability.
    pub fn check(&self) -> Result<()> {
        at_least_one("dim", self.dim)?;
        at_least_one("inner", self.inner)?;
        at_least_one("dim_out", self.dim_out)?;
        probability("ff_sublayer_dropout", self.sublayer_dropout)?;
        probability("ff_dropout", self.dropout)
    }
}

impl AttentionPlan {
    /// Creates a plan with `heads` heads of `dim_head` features, softmax of products over `√dim_head`, no mask, and a
    /// bias of the output only: x-transformers' default for an encoder.
    pub fn new(dim: usize, heads: usize, dim_head: usize) -> Self {
        Self {
            dim,
            dim_context: dim,
            heads,
            kv_heads: heads,
            kv_interleaved: false,
            qkv_bias: false,
            out_bias: true,
            project_out: true,
            dim_head,
            dim_value: dim_head,
            shared: None,
            causal: false,
            window: Window::default(),
            padding: PaddingPlan::Queries,
            temperature: Temperature::Fixed((dim_head as f64).powf(-0.5)),
            qk_norm: None,
            rms_norms: [false; 3],
            rotary: None,
            polar: false,
            value_residual: ValueResidual::None,
            num_mem_kv: 0,
            zero_kv: false,
            mem_kv_counted: true,
            talking_heads: TalkingHeads::None,
            softclamp: None,
            l2_distance: false,
            cog_signed: false,
            selective: false,
            sink: false,
            sparse_topk: None,
            straight_through: false,
            normalize: Normalize::Softmax,
            gumbel: None,
            residual: ScoreResidual::None,
            dropout: 0.0,
            sublayer_dropout: 0.0,
            laser: None,
            head_scale: false,
            gate_heads: false,
            gate_values: ValueGate::None,
            gate_form: GateForm::default(),
            silu_gates: false,
            output_gate: None,
            on_attn: false,
            zero_init: false,
            output_depth: None,
            latent_q: None,
            latent_kv: None,
            latent_rope: 0,
            rotated_heads: None,
            pre_scale: false,
            inverted: false,
            forget: Forget::None,
            rel_proj: None,
            cope: None,
        }
    }

    /// Checks that every number is in its range.
    ///
    /// Errors: [`ErrorKind::Option`](crate::ErrorKind::Option) for the first number that is out of its range.
    pub fn check(&self) -> Result<()> {
        at_least_one("dim", self.dim)?;
        at_least_one("heads", self.heads)?;
        at_least_one("attn_dim_head", self.dim_head)?;
        at_least_one("attn_value_dim_head", self.dim_value)?;
        at_least_one("attn_dim_context", self.dim_context)?;
        let width = self.dim_head.max(self.dim_value).checked_mul(self.heads).filter(|&width| width <= WIDEST);
        if width.is_none() {
            let why = format!(
                "{} heads of {} features exceed the limit of {WIDEST} features in total",
                self.heads, self.dim_head
            );
            return Err(Error::option("attn_dim_head", why));
        }
        let kv_heads = self.kv_heads;
        ensure!(
            kv_heads > 0 && self.heads.is_multiple_of(kv_heads),
            Error::option(
                "attn_kv_heads",
                format_args!("expected a divisor of `heads` ({}), got {kv_heads}", self.heads)
            )
        );
        ensure!(
            kv_heads == self.heads || self.shared.is_none(),
            Error::option("attn_kv_heads", "cannot be used with `attn_collab_heads`, whose heads already share keys")
        );
        self.shared.map_or(Ok(()), |shared| at_least_one("attn_collab_compression", shared))?;
        probability("attn_dropout", self.dropout)?;
        probability("attn_sublayer_dropout", self.sublayer_dropout)?;
        ensure!(
            self.project_out || self.heads * self.dim_value == self.dim,
            Error::option(
                "attn_dim_head",
                format_args!(
                    "one head has no output projection: expected `dim` = {}, got {}",
                    self.dim, self.dim_value
                )
            )
        );
        ensure!(self.sparse_topk != Some(0), Error::option("attn_sparse_topk", "expected at least 1, got 0"));
        ensure!(
            self.num_mem_kv <= WIDEST,
            Error::option("attn_num_mem_kv", format_args!("expected at most {WIDEST}, got {}", self.num_mem_kv))
        );
        Ok(())
    }

    /// Returns the number of features per head of queries and keys.
    pub fn dim_qk(&self) -> usize {
        self.shared.unwrap_or(self.dim_head)
    }

    /// Returns the number of keys before all others: the zero key and memory key/values.
    pub fn prefix_len(&self) -> usize {
        usize::from(self.zero_kv) + self.num_mem_kv
    }

    /// Returns the code path of a call with default options.
    pub fn path(&self) -> AttentionPath {
        self.needs_scores().map_or(AttentionPath::Fused, AttentionPath::Explicit)
    }

    /// Returns `Some(reason)` if the matrix of scores is needed, `None` if the fused op computes exactly this.
    pub fn needs_scores(&self) -> Option<&'static str> {
        if self.talking_heads != TalkingHeads::None || self.pre_scale {
            return Some("talking heads mix scores across heads");
        }
        if self.sparse_topk.is_some() {
            return Some("top-k needs whole rows of scores");
        }
        if self.gumbel.is_some() {
            return Some("Gumbel noise is added to scores");
        }
        match self.normalize {
            Normalize::Softmax => {}
            Normalize::Entmax15 => return Some("entmax needs whole rows of scores"),
            Normalize::Hard => return Some("hard attention needs whole rows of scores"),
            Normalize::Sigmoid => return Some("sigmoid attention is not a softmax"),
        }
        if self.l2_distance {
            return Some("scores are distances");
        }
        if self.inverted {
            return Some("queries compete for keys");
        }
        if self.cope.is_some() {
            return Some("contextual positions are counted from scores");
        }
        if self.cog_signed {
            return Some("weights have the signs of their scores");
        }
        if self.selective {
            return Some("selective attention reads the scores of earlier queries");
        }
        if self.residual != ScoreResidual::None {
            return Some("residual attention passes scores to the next layer");
        }
        None
    }
}

impl fmt::Display for AttentionPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} heads of {}", self.heads, self.dim_head)?;
        if self.kv_heads != self.heads {
            write!(f, ", {} of keys and values", self.kv_heads)?;
        }
        let marks = [
            (self.causal, "causal"),
            (self.shared.is_some(), "collaborative"),
            (self.qk_norm.is_some(), "normed queries and keys"),
            (self.rms_norms.contains(&true), "RMSNorm of heads"),
            (self.rotary.is_some(), "rotary"),
            (self.polar, "polar"),
            (self.value_residual != ValueResidual::None, "values of the first layer"),
            (self.zero_kv, "zero key/value"),
            (self.num_mem_kv > 0, "memory key/values"),
            (self.window != Window::default(), "limited past"),
            (matches!(self.temperature, Temperature::Learned(_)), "learned temperature"),
            (self.softclamp.is_some(), "soft clamp"),
            (self.sink, "learned sink"),
            (self.gumbel.is_some(), "Gumbel noise"),
            (self.head_scale, "head scale"),
            (self.gate_heads, "gated heads"),
            (self.gate_values != ValueGate::None, "gated values"),
            (self.on_attn, "gated output"),
        ];
        marks.iter().filter(|mark| mark.0).try_for_each(|mark| write!(f, ", {}", mark.1))?;
        write!(f, "; {}", self.path())?;
        match (self.path(), gpu_needs_scores((self.dim_qk() * if self.polar { 2 } else { 1 }).max(self.dim_value))) {
            (AttentionPath::Fused, Some(why)) => write!(f, ", on a GPU explicit: {why}"),
            _ => Ok(()),
        }
    }
}

impl fmt::Display for FeedForwardPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let activation = if self.tanh { "tanh" } else { self.activation.title() };
        write!(f, "{} -> {} -> {}, {activation}", self.dim, self.inner, self.dim_out)?;
        let marks = [(self.glu, "gated"), (self.norm.is_some(), "inner LayerNorm")];
        marks.iter().filter(|mark| mark.0).try_for_each(|mark| write!(f, ", {}", mark.1))
    }
}
