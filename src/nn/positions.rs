//! Positional encodings: learned embeddings, rotary frequencies, and biases on the scores.

use super::Embedding;
use crate::{
    Buffer, DType, Init, Param, ParamStore, Result, Tensor,
    config::{PositionBiasPlan, RotaryPlan, T5Plan},
    ops::PositionBias,
};

/// Learned positional embeddings, optionally scaled by `dim^-½`.
#[derive(Clone, Debug)]
pub struct AbsolutePositionalEmbedding {
    emb: Embedding,
    scale: f64,
}

impl AbsolutePositionalEmbedding {
    /// Creates a table for sequences of up to `max_seq_len`. If `scaled` is `true`, it is multiplied by `dim^-½`.
    pub fn new(dim: usize, max_seq_len: usize, scaled: bool, store: &ParamStore) -> Result<Self> {
        let emb = Embedding::new(&store.at("emb"), max_seq_len, dim, Init::Normal(1.0))?;
        Ok(Self { emb, scale: if scaled { (dim as f64).powf(-0.5) } else { 1.0 } })
    }

    /// Returns the embeddings of the first `n` positions, `[n, dim]`.
    ///
    /// Errors: a position past the end of the table.
    pub fn forward(&self, n: usize) -> Result<Tensor> {
        self.emb.table()?.narrow(0, 0, n)?.affine(self.scale, 0.0)
    }

    /// Returns the embeddings of these positions: `[..] → [.., dim]`.
    ///
    /// Errors: a position past the end of the table.
    pub fn at(&self, positions: &Tensor) -> Result<Tensor> {
        self.emb.forward(positions)?.affine(self.scale, 0.0)
    }

    /// Returns the number of positions.
    pub(crate) fn len(&self) -> usize {
        self.emb.count()
    }
}

/// Registers rotary frequencies as the buffer `inv_freq`, `[⌈dim / 2⌉]`, in f32 for every model dtype: half types would
/// rotate distant positions by wrong angles.
pub fn rotary_frequencies(plan: &RotaryPlan, store: &ParamStore) -> Result<Buffer> {
    let values = Tensor::generate([plan.dim.div_ceil(2)], DType::F32, store.device(), |k| plan.frequency(k))?;
    store.buffer("inv_freq", values)
}

/// Position bias on the scores, shared by all layers; its parameters are at `rel_pos`.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum RelativePositionBias {
    /// T5's table (Raffel et al., <https://arxiv.org/abs/1910.10683>).
    T5 {
        /// Maps distances to rows of the table.
        plan: T5Plan,
        /// One row per bucket, `[buckets, heads]`.
        table: Embedding,
    },
    /// ALiBi with the slopes of the paper (Press et al., <https://arxiv.org/abs/2108.12409>), `[heads]`.
    Alibi(Tensor),
    /// ALiBi with learned slopes.
    LearnedAlibi {
        /// Total number of heads.
        heads: usize,
        /// Logarithms of the slopes of the first heads, `[1, heads, 1, 1]`.
        logslopes: Param,
    },
}

impl RelativePositionBias {
    /// Creates the planned bias, or returns `None` if the plan has none.
    pub fn new(plan: PositionBiasPlan, store: &ParamStore) -> Result<Option<Self>> {
        Ok(Some(match plan {
            PositionBiasPlan::None => return Ok(None),
            PositionBiasPlan::T5(plan) => {
                let store = store.at("relative_attention_bias");
                Self::T5 { plan, table: Embedding::new(&store, plan.buckets, plan.heads, Init::Normal(1.0))? }
            }
            PositionBiasPlan::Alibi(plan) => {
                let slopes = plan.slopes();
                let slope = |head: usize| f64::from(slopes.get(head).copied().unwrap_or(0.0));
                if !plan.learned {
                    let slopes = Tensor::generate([plan.heads], DType::F32, store.device(), slope)?;
                    return Ok(Some(Self::Alibi(slopes)));
                }
                let shape = [1, plan.sloped, 1, 1];
                let logslopes = store.param("learned_logslopes", shape, Init::Constant(0.0))?;
                let start = |head: usize| f64::from(libm::log(slope(head)) as f32);
                logslopes.set(Tensor::generate(shape, store.dtype(), store.device(), start)?)?;
                Self::LearnedAlibi { heads: plan.heads, logslopes }
            }
        }))
    }

    /// Returns the bias for one forward pass.
    pub fn forward(&self) -> Result<PositionBias> {
        Ok(match self {
            Self::T5 { plan, table } => {
                let T5Plan { scale, causal, max_distance, .. } = *plan;
                PositionBias::T5 { table: table.table()?, scale, causal, max_distance }
            }
            Self::Alibi(slopes) => PositionBias::Alibi { slopes: slopes.clone() },
            Self::LearnedAlibi { heads, logslopes } => {
                let slopes = logslopes.tensor().exp()?.flatten(0, 3)?;
                let flat = Tensor::zeros([heads - slopes.dim(0)?], slopes.dtype(), slopes.device())?;
                PositionBias::Alibi { slopes: Tensor::cat(&[&slopes, &flat], 0)? }
            }
        })
    }
}
