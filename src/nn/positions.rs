//! What modules know about positions.

use super::Embedding;
use crate::{
    Buffer, DType, Init, Param, ParamStore, Result, Tensor,
    config::{BiasPlan, RotaryPlan, T5Plan},
    ops,
};

/// A table of learned positions, times `dim^-½` or as it is.
#[derive(Clone, Debug)]
pub struct AbsolutePositionalEmbedding {
    emb: Embedding,
    scale: f64,
}

impl AbsolutePositionalEmbedding {
    /// A table for sequences of up to `max_seq_len`; `scaled` says whether it is multiplied by `dim^-½`.
    pub fn new(dim: usize, max_seq_len: usize, scaled: bool, store: &ParamStore) -> Result<Self> {
        let emb = Embedding::new(&store.at("emb"), max_seq_len, dim, Init::Normal(1.0))?;
        Ok(Self { emb, scale: if scaled { (dim as f64).powf(-0.5) } else { 1.0 } })
    }

    /// The first `n` positions, `[n, dim]`.
    ///
    /// Errors: more than the table has.
    pub fn forward(&self, n: usize) -> Result<Tensor> {
        self.emb.table().narrow(0, 0, n)?.affine(self.scale, 0.0)
    }

    /// These positions: `[..] → [.., dim]`.
    ///
    /// Errors: more than the table has.
    pub fn at(&self, positions: &Tensor) -> Result<Tensor> {
        self.emb.forward(positions)?.affine(self.scale, 0.0)
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.emb.table().shape()[0]
    }
}

/// The frequencies of a rotation, `[⌈dim / 2⌉]`, in f32 whatever the model's dtype: half types would turn far positions by
/// wrong angles.
pub(super) fn inverse_frequencies(plan: &RotaryPlan, store: &ParamStore) -> Result<Buffer> {
    let values = Tensor::generate([plan.dim.div_ceil(2)], DType::F32, store.device(), |k| plan.frequency(k))?;
    store.buffer("inv_freq", values)
}

/// A bias on the scores, the same in every layer.
#[derive(Clone, Debug)]
pub enum PositionBias {
    /// None.
    None,
    /// T5's table (Raffel et al., <https://arxiv.org/abs/1910.10683>).
    T5 {
        /// How distances become rows of the table.
        plan: T5Plan,
        /// One row per bucket, `[buckets, heads]`.
        table: Embedding,
    },
    /// ALiBi with the slopes of the paper (Press et al., <https://arxiv.org/abs/2108.12409>), `[heads]`.
    Alibi(Tensor),
    /// ALiBi with learned slopes.
    LearnedAlibi {
        /// All heads.
        heads: usize,
        /// Logarithms of the slopes of the first heads, `[1, heads, 1, 1]`.
        logslopes: Param,
    },
}

impl PositionBias {
    /// As planned; the place is `rel_pos`.
    pub fn new(plan: BiasPlan, store: &ParamStore) -> Result<Self> {
        Ok(match plan {
            BiasPlan::None => Self::None,
            BiasPlan::T5(plan) => {
                let store = store.at("relative_attention_bias");
                Self::T5 { plan, table: Embedding::new(&store, plan.buckets, plan.heads, Init::Normal(1.0))? }
            }
            BiasPlan::Alibi(plan) => {
                let slopes = plan.slopes();
                let slope = |head: usize| f64::from(slopes.get(head).copied().unwrap_or(0.0));
                if !plan.learned {
                    return Ok(Self::Alibi(Tensor::generate([plan.heads], DType::F32, store.device(), slope)?));
                }
                let shape = [1, plan.sloped, 1, 1];
                let logslopes = store.param("learned_logslopes", shape, Init::Constant(0.0))?;
                let start = |head: usize| f64::from(libm::log(slope(head)) as f32);
                logslopes.set(Tensor::generate(shape, store.dtype(), store.device(), start)?)?;
                Self::LearnedAlibi { heads: plan.heads, logslopes }
            }
        })
    }

    /// What the layers need of it in one forward pass.
    pub fn forward(&self) -> Result<Option<ScoreBias>> {
        Ok(match self {
            Self::None => None,
            Self::T5 { plan, table } => Some(ScoreBias::T5 { plan: *plan, table: table.table() }),
            Self::Alibi(slopes) => Some(ScoreBias::Alibi { slopes: slopes.clone() }),
            Self::LearnedAlibi { heads, logslopes } => {
                let slopes = logslopes.tensor().exp()?.flatten(0, 3)?;
                let flat = Tensor::zeros([heads - slopes.dim(0)?], slopes.dtype(), slopes.device())?;
                Some(ScoreBias::Alibi { slopes: Tensor::cat(&[&slopes, &flat], 0)? })
            }
        })
    }
}

/// A bias on the scores of one forward pass. Queries count from 0, even when memories precede the keys.
#[derive(Clone, Debug)]
pub enum ScoreBias {
    /// A table by buckets of distances, `[buckets, heads]`.
    T5 {
        /// How distances become rows of the table.
        plan: T5Plan,
        /// The table.
        table: Tensor,
    },
    /// `slopes[head] · key`, `[heads]`.
    Alibi {
        /// The slopes.
        slopes: Tensor,
    },
}

impl ScoreBias {
    /// As an argument of the fused op.
    pub(super) fn fused(&self) -> ops::PositionBias<'_> {
        match self {
            Self::T5 { plan, table } => {
                ops::PositionBias::T5 { table, scale: plan.scale, causal: plan.causal, max_distance: plan.max_distance }
            }
            Self::Alibi { slopes } => ops::PositionBias::Alibi { slopes },
        }
    }

    /// As a tensor of this dtype that broadcasts to `[batch, heads, query, key]`: `[heads, query, key]` or
    /// `[heads, 1, key]`.
    pub(super) fn dense(&self, queries: usize, keys: usize, dtype: DType) -> Result<Tensor> {
        match self {
            Self::T5 { plan, table } => {
                table.relative_position_bias(queries, keys, plan.causal, plan.max_distance, plan.scale)
            }
            Self::Alibi { slopes } => {
                // Half types do not hold all positions: the product is rounded once.
                let keys = Tensor::arange(keys, slopes.device())?.to_dtype(DType::F64)?;
                slopes.to_dtype(DType::F64)?.reshape([slopes.dim(0)?, 1, 1])?.mul(&keys)?.to_dtype(dtype)
            }
        }
    }

    /// By the distance of a key behind a query's position, when `prefix_len` keys are in front of a causal sequence: `[heads,
    /// distances]` of this dtype. Relative to the key at the query's position where only differences count.
    pub(super) fn bias_by_distance(&self, prefix_len: usize, distances: usize, dtype: DType) -> Result<Tensor> {
        match self {
            Self::T5 { plan, table } => {
                // Queries count from 0 in front of which there is nothing: nearer keys are in the future, in bucket 0.
                let table = table.detach().to_dtype(dtype)?;
                let bias = |n: usize| table.relative_position_bias(n, 1, plan.causal, plan.max_distance, plan.scale);
                let past = bias(distances.saturating_sub(prefix_len).max(1))?.squeeze(-1)?;
                let now = past.narrow(1, 0, 1)?.expand([past.dim(0)?, prefix_len])?;
                Tensor::cat(&[&now, &past], 1)
            }
            Self::Alibi { slopes } => {
                let distances = Tensor::arange(distances, slopes.device())?.to_dtype(DType::F64)?.affine(-1.0, 0.0)?;
                let slopes = slopes.detach().to_dtype(DType::F64)?;
                slopes.reshape([slopes.dim(0)?, 1])?.mul(&distances)?.to_dtype(dtype)
            }
        }
    }

    /// The tensor that gradients flow into.
    pub(super) fn weights_mut(&mut self) -> &mut Tensor {
        match self {
            Self::T5 { table, .. } => table,
            Self::Alibi { slopes } => slopes,
        }
    }
}
