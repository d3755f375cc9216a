//! Plans: the structs that modules are built from. `resolve.rs` creates them from options.

use std::fmt;

use super::{
    branch_plan::{AttentionPlan, FeedForwardPlan},
    options::LayerType,
    rotary::RotaryPlan,
};
use crate::collect::CollectVec;

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
    /// Number of the module that computes each sublayer; a repeated number repeats the weights.
    pub modules: Vec<usize>,
    /// Modules that compute no sublayer: they have weights in a state dict only.
    pub idle: Vec<(usize, LayerPlan)>,
    /// Bound of the output before the final norm, which `bound · tanh(x / bound)` keeps softly.
    pub softclamp: Option<f64>,
    /// Final norm after the last layer.
    pub final_norm: Option<NormPlan>,
    /// If `true`, the layers own the final norm, `final_norm`; otherwise it is the wrapper's, `norm`.
    pub owns_final_norm: bool,
    /// If `true`, memories pass the norm before a branch, like the sequence.
    pub norms_memories: bool,
    /// Condition of the adaptive norms and scales.
    pub condition: Option<ConditionPlan>,
    /// Number of residual streams; 1: the usual one.
    pub streams: usize,
    /// If `true`, queries see later keys only within the prefix that a call gives, `prefix_attn_len`.
    pub prefix: bool,
    /// Treatment of whole sublayers in training.
    pub drops: DropPlan,
    /// Inputs of sublayers from before others.
    pub links: LinkPlan,
}

/// Inputs of sublayers other than the stream.
#[derive(Clone, PartialEq, Debug, Default)]
#[non_exhaustive]
pub struct LinkPlan {
    /// For each module, the sublayer whose input is joined to its own; empty for none.
    pub skips: Vec<Option<usize>>,
    /// Mixture of all hidden states: `Some(true)` with the weights of a softmax, `Some(false)` with those of a ReLU.
    pub integrate: Option<bool>,
    /// Attention of each sublayer to all hidden states: rank of the projection that makes its query.
    pub aggregate: Option<usize>,
    /// Projection of the input of the layers: `Some(true)` with a gate.
    pub reinject: Option<bool>,
}

/// Condition of adaptive norms and scales.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ConditionPlan {
    /// Width of the condition.
    pub dim: usize,
    /// Width after a linear layer and SiLU, if there is one.
    pub inner: Option<usize>,
}

/// Dropout of whole sublayers and of tokens of the context, in training.
#[derive(Clone, PartialEq, Debug, Default)]
#[non_exhaustive]
pub struct DropPlan {
    /// Probability of leaving out each sublayer; empty for none.
    pub layers: Vec<f64>,
    /// Share of the context's tokens that each cross-attention leaves out.
    pub cross_attn_tokens: f64,
}

impl DropPlan {
    /// Returns the probability of leaving out the sublayer of this number.
    pub(crate) fn of(&self, module: usize) -> f64 {
        self.layers.get(module).or(self.layers.first()).copied().unwrap_or(0.0)
    }
}

/// Position schemes of self-attention; absolute embeddings belong to the wrappers.
#[derive(Clone, PartialEq, Debug, Default)]
#[non_exhaustive]
pub struct Positions {
    /// Sinusoids on the inputs of queries and keys.
    pub infused: bool,
    /// Rotation of queries and keys.
    pub rotary: Option<RotaryPlan>,
    /// Polar positions of queries and keys.
    pub polar: Option<PolarPlan>,
    /// A bias on the scores.
    pub bias: PositionBiasPlan,
    /// If `true`, the bias depends on the distance alone and memory key/values have none; otherwise queries count from
    /// 0 even after memories.
    pub relative: bool,
    /// If given, says whether a wrapper leaves out its absolute positions.
    pub disable_absolute: Option<bool>,
}

/// Polar positions (<https://arxiv.org/abs/2509.10534>).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PolarPlan {
    /// Heads.
    pub heads: usize,
    /// Number of features per head, each of which has a frequency.
    pub dim: usize,
}

impl Positions {
    /// Returns `true` if a wrapper leaves out its absolute positions. ALiBi does not turn them off.
    pub fn replace_absolute(&self) -> bool {
        let own = self.infused || self.rotary.is_some() || self.polar.is_some();
        self.disable_absolute.unwrap_or(own || matches!(self.bias, PositionBiasPlan::T5(_)))
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
    /// A small network on the distance.
    Dynamic(DynamicPlan),
}

/// Dynamic position bias: linear layers with SiLU on the distance.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DynamicPlan {
    /// Heads.
    pub heads: usize,
    /// Width of the network.
    pub dim: usize,
    /// Number of layers before the last.
    pub depth: usize,
    /// If `true`, the input is the signed logarithm of the distance.
    pub log_distance: bool,
    /// If `true`, norms follow the layers.
    pub norm: bool,
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
    /// LayerNorm with the scale `gamma` and no bias; the stored scale is `offset` less.
    Gamma {
        /// Added to the variance.
        eps: f64,
        /// Added to the stored scale.
        offset: f64,
    },
    /// RMSNorm whose lower bound on the length, before it is divided by `√dim`, is 1e-12.
    Unit {
        /// Scale that follows.
        gain: Gain,
        /// Added to the stored scale.
        offset: f64,
    },
    /// `tanh(x · scale) ⊙ gamma + beta`.
    Tanh {
        /// Initial scale.
        alpha: f64,
        /// If `true`, scale and gamma are stored minus their initial values.
        stored_offset: bool,
    },
    /// `erf(x · alpha + s) ⊙ gamma + beta`; alpha and gamma are stored less `offset`.
    Erf {
        /// Added to the stored alpha and gamma.
        offset: f64,
    },
    /// LayerNorm or RMSNorm whose scale is a linear function of a condition of this width, plus 1.
    Adaptive {
        /// If `true`, LayerNorm, otherwise RMSNorm.
        layer: bool,
        /// Width of the condition.
        dim_condition: usize,
    },
}

/// Learned scale of a norm, `g`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Gain {
    /// None.
    None,
    /// One number.
    One,
    /// One number per feature.
    Each,
}

impl NormPlan {
    /// LayerNorm with PyTorch's default eps.
    pub const LAYER: Self = Self::Layer(1e-5);
}

/// Wrappers of a branch, outermost first.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct WrapPlan {
    /// Constant factor of the branch.
    pub scale: Option<f64>,
    /// If `true`, the branch is multiplied by a learned scalar.
    pub rezero: bool,
    /// Learned factor of each feature.
    pub layer_scale: Option<LayerScalePlan>,
    /// Amounts by which chunks of features move along the sequence.
    pub shifts: Option<Vec<isize>>,
    /// If `true`, the branch is multiplied by one half: feedforwards with `macaron`.
    pub half: bool,
}

/// Learned factors of a branch's features.
#[derive(Clone, Copy, PartialEq, Debug)]
#[non_exhaustive]
pub enum LayerScalePlan {
    /// `gamma + offset`.
    Fixed {
        /// Initial value of the factors.
        start: f64,
        /// Added to the stored values.
        offset: f64,
    },
    /// Sigmoid of a linear function of a condition of this width.
    Adaptive(usize),
}

/// Hyper-connections of several residual streams.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HyperPlan {
    /// Number of streams.
    pub streams: usize,
    /// Number of the layer, which selects the stream that it reads at first.
    pub layer: usize,
}

/// Sum of branch and residual, or another way to join them.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct ResidualPlan {
    /// If `true`, a GRU cell joins branch and residual, otherwise a sum.
    pub gated: bool,
    /// If `true`, the residual is multiplied by a learned vector first.
    pub scaled: bool,
    /// Constant factor of the residual.
    pub constant: f64,
    /// Hyper-connections, in place of the sum.
    pub hyper: Option<HyperPlan>,
    /// If `true`, what a branch shares with the direction of the residual is left out.
    pub orthogonal: bool,
    /// If `true`, branches are centred, and means of the stream have factors of their own.
    pub split: bool,
}

impl Default for ResidualPlan {
    fn default() -> Self {
        Self { gated: false, scaled: false, constant: 1.0, hyper: None, orthogonal: false, split: false }
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
        self.layers.iter().enumerate().try_for_each(|(index, layer)| writeln!(f, "{index:width$}  {layer}"))?;
        let bias = match self.positions.bias {
            PositionBiasPlan::None => return Ok(()),
            PositionBiasPlan::T5(_) => "T5's buckets",
            PositionBiasPlan::Alibi(_) => "ALiBi",
            PositionBiasPlan::Dynamic(_) => "a network's",
        };
        writeln!(f, "position bias: {bias}, by distance in fused attention, as a matrix in explicit attention")
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
            (self.wrap.layer_scale.is_some(), "layer scale"),
            (self.wrap.shifts.is_some(), "shifted tokens"),
            (self.wrap.half, "halved"),
            (self.residual.gated, "gated residual"),
            (self.residual.scaled, "scaled residual"),
            (self.residual.hyper.is_some(), "hyper-connection"),
            (self.residual.orthogonal, "orthogonal residual"),
        ];
        marks.iter().filter(|mark| mark.0).try_for_each(|mark| write!(f, ", {}", mark.1))
    }
}

impl fmt::Display for NormPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Layer(_) | Self::Gamma { .. } => "LayerNorm",
            Self::Scale(_) | Self::Unit { gain: Gain::One, .. } => "ScaleNorm",
            Self::ClampedRms(_) | Self::Rms(_) | Self::Unit { .. } => "RMSNorm",
            Self::Tanh { .. } => "dynamic tanh",
            Self::Erf { .. } => "dynamic erf",
            Self::Adaptive { layer: true, .. } => "adaptive LayerNorm",
            Self::Adaptive { layer: false, .. } => "adaptive RMSNorm",
        })
    }
}
