//! Plans: the structs that modules are built from. `resolve.rs` creates them from options.

use std::fmt;

use super::{
    options::LayerType,
    ranges::{WIDEST, at_least_one, probability},
    rotary::RotaryPlan,
};
use crate::{
    Error, Result,
    collect::CollectVec,
    error::ensure,
    ops::{Activation, Window, gpu_needs_scores},
};

/// A stack of sublayers, resolved from [`AttentionLayersConfig`](super::AttentionLayersConfig).
///
/// Its `Display` is a table of the sublayers: kind, norms, and for attention the path that computes it.
///
/// ```
/// use x_transformers::config::{AttentionLayersConfig, LayersPlan};
/// # fn main() -> x_transformers::Result<()> {
/// let plan = LayersPlan::new(&AttentionLayersConfig::decoder(64, 1))?;
/// assert_eq!(
///     plan.to_string(),
///     "0  self-attention   norms: LayerNorm before  8 heads of 64, causal; fused\n\
///      1  feedforward      norms: LayerNorm before  64 -> 256 -> 64, GELU\n"
/// );
/// # Ok(())
/// # }
/// ```
#[derive(Clone, PartialEq, Debug)]
#[non_exhaustive]
pub struct LayersPlan {
    /// Width of the model.
    pub dim: usize,
    /// If `true`, a call must have a context.
    pub cross_attend: bool,
    /// Position schemes of self-attention.
    pub positions: Positions,
    /// The sublayers in their order.
    pub layers: Vec<LayerPlan>,
    /// Number of sublayers with weights of their own; the rest repeat them.
    pub distinct: usize,
    /// Final norm after the last layer (owned by the wrapper).
    pub final_norm: Option<NormPlan>,
}

/// Position schemes of self-attention; absolute embeddings belong to the wrappers.
#[derive(Clone, PartialEq, Debug, Default)]
#[non_exhaustive]
pub struct Positions {
    /// Sinusoids on the inputs of queries and keys.
    pub infused: bool,
    /// Rotation of queries and keys.
    pub rotary: Option<RotaryPlan>,
    /// A bias on the scores.
    pub bias: PositionBiasPlan,
}

impl Positions {
    /// Returns `true` if a wrapper leaves out its absolute positions. ALiBi does not turn them off.
    pub fn replace_absolute(&self) -> bool {
        self.infused || self.rotary.is_some() || matches!(self.bias, PositionBiasPlan::T5(_))
    }
}

/// A bias on the scores that depends on positions.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
#[non_exhaustive]
pub enum PositionBiasPlan {
    /// No bias.
    #[default]
    None,
    /// T5's table of buckets.
    T5(T5Plan),
    /// Linear in the position of the key.
    Alibi(AlibiPlan),
}

/// T5's relative position bias.
#[derive(Clone, Copy, PartialEq, Debug)]
#[non_exhaustive]
pub struct T5Plan {
    /// Heads.
    pub heads: usize,
    /// Factor on the table, `√dim_head`.
    pub scale: f64,
    /// Rows of the table.
    pub buckets: usize,
    /// Distance from which on all positions share a bucket.
    pub max_distance: usize,
    /// If `true`, keys after the query share bucket 0.
    pub causal: bool,
}

/// ALiBi.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct AlibiPlan {
    /// All heads.
    pub heads: usize,
    /// The first heads, which have a slope.
    pub sloped: usize,
    /// If `true`, slopes are parameters.
    pub learned: bool,
}

impl AlibiPlan {
    /// Returns the paper's slopes, in f32 like PyTorch: `2^(−8k/H)` for a power of two, else those of the power of two
    /// below and every second one of the next.
    pub fn slopes(&self) -> Vec<f32> {
        let series = |heads: usize| (1..=heads).map(move |k| libm::exp2(-8.0 * k as f64 / heads as f64) as f32);
        let below = (self.sloped + 1).next_power_of_two() / 2;
        series(below).chain(series(2 * below).step_by(2)).take(self.sloped).collect_vec()
    }
}

/// One sublayer.
#[derive(Clone, PartialEq, Debug)]
#[non_exhaustive]
pub struct LayerPlan {
    /// Function of the sublayer.
    pub branch: BranchPlan,
    /// Norms before the branch, after it, and after the sum with the residual.
    pub norms: [Option<NormPlan>; 3],
    /// Wrappers of the branch.
    pub wrap: WrapPlan,
    /// Sum of branch and residual, or another way to join them.
    pub residual: ResidualPlan,
}

/// Function of a sublayer.
#[derive(Clone, PartialEq, Debug)]
pub enum BranchPlan {
    /// Self-attention.
    SelfAttention(AttentionPlan),
    /// Cross-attention to the context.
    CrossAttention(AttentionPlan),
    /// Feedforward.
    FeedForward(FeedForwardPlan),
    /// Custom function, passed to the layers' constructor. No option selects it.
    Custom,
}

impl BranchPlan {
    /// Returns the type of the sublayer, or `None` for a custom branch.
    pub fn layer_type(&self) -> Option<LayerType> {
        match self {
            Self::SelfAttention(_) => Some(LayerType::SelfAttention),
            Self::CrossAttention(_) => Some(LayerType::CrossAttention),
            Self::FeedForward(_) => Some(LayerType::FeedForward),
            Self::Custom => None,
        }
    }

    /// Returns the attention plan, if this is an attention sublayer.
    pub fn attention(&self) -> Option<&AttentionPlan> {
        match self {
            Self::SelfAttention(plan) | Self::CrossAttention(plan) => Some(plan),
            Self::FeedForward(_) | Self::Custom => None,
        }
    }
}

/// Kind of a norm, with its eps.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum NormPlan {
    /// LayerNorm, affine; eps is added to the variance.
    Layer(f64),
    /// ScaleNorm; eps is the lower bound on the length.
    Scale(f64),
    /// RMSNorm of x-transformers 0.22; eps is the lower bound on the length.
    ClampedRms(f64),
    /// RMSNorm; eps is added to the mean square.
    Rms(f64),
}

impl NormPlan {
    /// LayerNorm with PyTorch's default eps.
    pub const LAYER: Self = Self::Layer(1e-5);
}

/// Wrappers of a branch, outermost first.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct WrapPlan {
    /// If `true`, the branch is multiplied by a learned scalar.
    pub rezero: bool,
    /// Amounts by which chunks of features move along the sequence.
    pub shifts: Option<Vec<isize>>,
    /// If `true`, the branch is multiplied by one half: feedforwards with `macaron`.
    pub half: bool,
}

/// Sum of branch and residual, or another way to join them.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ResidualPlan {
    /// If `true`, a GRU cell joins branch and residual, otherwise a sum.
    pub gated: bool,
    /// If `true`, the residual is multiplied by a learned vector first.
    pub scaled: bool,
}

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
    /// If `true`, the activation gates the other half of the first projection.
    pub glu: bool,
    /// If `true`, both layers have biases.
    pub bias: bool,
    /// If `true`, a LayerNorm follows the activation.
    pub post_act_ln: bool,
    /// Dropout before the output layer.
    pub dropout: f64,
    /// If `true`, the output layer starts at 0.
    pub zero_init: bool,
}

/// Attention.
#[derive(Clone, PartialEq, Debug)]
pub struct AttentionPlan {
    /// Width of the model.
    pub dim: usize,
    /// Heads.
    pub heads: usize,
    /// Number of key and value heads; a divisor of `heads`.
    pub kv_heads: usize,
    /// If `true`, the projections of queries, keys and values have biases.
    pub qkv_bias: bool,
    /// If `true`, the output projection has a bias.
    pub out_bias: bool,
    /// Number of features per head of the values, and of the queries and keys unless heads share them.
    pub dim_head: usize,
    /// For collaborative heads: width of the queries and keys that all heads share.
    pub shared: Option<usize>,
    /// If `true`, queries attend only to keys up to their own position.
    pub causal: bool,
    /// Limits of the keys that a query attends to.
    pub window: Window,
    /// Scale of the logits.
    pub temperature: Temperature,
    /// Rotation.
    pub rotary: Option<RotaryPlan>,
    /// Number of learned memory keys and values before the others.
    pub num_mem_kv: usize,
    /// If `true`, scores are mixed across heads.
    pub talking_heads: bool,
    /// Number of highest-scoring keys that each query attends to.
    pub sparse_topk: Option<usize>,
    /// Function from scores to weights.
    pub normalize: Normalize,
    /// If `true`, scores are passed on to the next attention of the same kind.
    pub residual: bool,
    /// Dropout of the weights.
    pub dropout: f64,
    /// If `true`, each head's output has a learned factor.
    pub head_scale: bool,
    /// If `true`, values are gated by the layer's input.
    pub gate_values: bool,
    /// If `true`, the output projection has a gate.
    pub on_attn: bool,
    /// If `true`, the output projection starts at 0.
    pub zero_init: bool,
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
            glu: false,
            bias: true,
            post_act_ln: false,
            dropout: 0.0,
            zero_init: false,
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
        probability("ff_dropout", self.dropout)
    }
}

impl AttentionPlan {
    /// Creates a plan with `heads` heads of `dim_head` features, softmax of products over `√dim_head`, no mask, and a
    /// bias of the output only: x-transformers' default for an encoder.
    pub fn new(dim: usize, heads: usize, dim_head: usize) -> Self {
        Self {
            dim,
            heads,
            kv_heads: heads,
            qkv_bias: false,
            out_bias: true,
            dim_head,
            shared: None,
            causal: false,
            window: Window::default(),
            temperature: Temperature::Fixed((dim_head as f64).powf(-0.5)),
            rotary: None,
            num_mem_kv: 0,
            talking_heads: false,
            sparse_topk: None,
            normalize: Normalize::Softmax,
            residual: false,
            dropout: 0.0,
            head_scale: false,
            gate_values: false,
            on_attn: false,
            zero_init: false,
        }
    }

    /// Checks that every number is in its range.
    ///
    /// Errors: [`ErrorKind::Option`](crate::ErrorKind::Option) for the first number that is out of its range.
    pub fn check(&self) -> Result<()> {
        at_least_one("dim", self.dim)?;
        at_least_one("heads", self.heads)?;
        at_least_one("attn_dim_head", self.dim_head)?;
        let width = self.dim_head.checked_mul(self.heads).filter(|&width| width <= WIDEST);
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

    /// Returns the code path of a call with default options.
    pub fn path(&self) -> AttentionPath {
        self.needs_scores().map_or(AttentionPath::Fused, AttentionPath::Explicit)
    }

    /// Returns `Some(reason)` if the matrix of scores is needed, `None` if the fused op computes exactly this.
    pub fn needs_scores(&self) -> Option<&'static str> {
        if self.talking_heads {
            return Some("talking heads mix scores across heads");
        }
        if self.sparse_topk.is_some() {
            return Some("top-k needs whole rows of scores");
        }
        if self.normalize != Normalize::Softmax {
            return Some("entmax needs whole rows of scores");
        }
        if self.residual {
            return Some("residual attention passes scores to the next layer");
        }
        None
    }
}

impl LayersPlan {
    /// Returns the number of self-attention sublayers; each has a memory.
    pub fn self_attentions(&self) -> usize {
        self.layers.iter().filter(|layer| matches!(layer.branch, BranchPlan::SelfAttention(_))).count()
    }
}

impl fmt::Display for LayersPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.layers.len().saturating_sub(1).to_string().len();
        self.layers.iter().enumerate().try_for_each(|(index, layer)| writeln!(f, "{index:width$}  {layer}"))
    }
}

impl fmt::Display for LayerPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.branch {
            BranchPlan::SelfAttention(_) => "self-attention",
            BranchPlan::CrossAttention(_) => "cross-attention",
            BranchPlan::FeedForward(_) => "feedforward",
            BranchPlan::Custom => "custom",
        };
        let places = ["before", "inside", "after"];
        let norms: Vec<String> = self
            .norms
            .iter()
            .zip(places)
            .filter_map(|(norm, place)| Some(format!("{} {place}", norm.as_ref()?)))
            .collect_vec();
        let norms = if norms.is_empty() { "none".to_string() } else { norms.join(", ") };
        write!(f, "{kind:15}  norms: {norms}  ")?;
        match &self.branch {
            BranchPlan::SelfAttention(plan) | BranchPlan::CrossAttention(plan) => write!(f, "{plan}")?,
            BranchPlan::FeedForward(plan) => write!(f, "{plan}")?,
            BranchPlan::Custom => f.write_str("a custom function")?,
        }
        let marks = [
            (self.wrap.rezero, "re-zero"),
            (self.wrap.shifts.is_some(), "shifted tokens"),
            (self.wrap.half, "halved"),
            (self.residual.gated, "gated residual"),
            (self.residual.scaled, "scaled residual"),
        ];
        marks.iter().filter(|mark| mark.0).try_for_each(|mark| write!(f, ", {}", mark.1))
    }
}

impl fmt::Display for NormPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Layer(_) => "LayerNorm",
            Self::Scale(_) => "ScaleNorm",
            Self::ClampedRms(_) | Self::Rms(_) => "RMSNorm",
        })
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
            (self.rotary.is_some(), "rotary"),
            (self.num_mem_kv > 0, "memory key/values"),
            (self.window != Window::default(), "limited past"),
            (matches!(self.temperature, Temperature::Learned(_)), "learned temperature"),
            (self.head_scale, "head scale"),
            (self.gate_values, "gated values"),
            (self.on_attn, "gated output"),
        ];
        marks.iter().filter(|mark| mark.0).try_for_each(|mark| write!(f, ", {}", mark.1))?;
        write!(f, "; {}", self.path())?;
        match (self.path(), gpu_needs_scores(self.dim_qk().max(self.dim_head))) {
            (AttentionPath::Fused, Some(why)) => write!(f, ", on a GPU explicit: {why}"),
            _ => Ok(()),
        }
    }
}

impl fmt::Display for FeedForwardPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let activation = self.activation.title();
        write!(f, "{} -> {} -> {}, {activation}", self.dim, self.inner, self.dim_out)?;
        let marks = [(self.glu, "gated"), (self.post_act_ln, "inner LayerNorm")];
        marks.iter().filter(|mark| mark.0).try_for_each(|mark| write!(f, ", {}", mark.1))
    }
}
