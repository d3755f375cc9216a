//! What modules know about positions.

use super::Embedding;
use crate::{
    Init, Param, Result, Store, Tensor,
    config::{AlibiPlan, BiasPlan, T5Plan},
};

/// A table of learned positions, times `dim^-½`.
#[derive(Clone, Debug)]
pub struct AbsolutePositionalEmbedding {
    emb: Embedding,
    scale: f64,
}

impl AbsolutePositionalEmbedding {
    /// A table for sequences of up to `max_seq_len`.
    pub fn new(dim: usize, max_seq_len: usize, store: &Store) -> Result<Self> {
        let emb = Embedding::new(&store.at("emb"), max_seq_len, dim, Init::Normal(1.0))?;
        Ok(Self { emb, scale: (dim as f64).powf(-0.5) })
    }

    /// The first `n` positions, `[n, dim]`.
    ///
    /// Errors: more than the table has.
    pub fn forward(&self, n: usize) -> Result<Tensor> {
        self.emb.table().narrow(0, 0, n)?.affine(self.scale, 0.0)
    }
}

/// `1 / 10000^(2k / dim)` for `k` from 0 to `⌈dim / 2⌉`, in f32 as PyTorch computes them.
pub(super) fn inverse_frequencies(dim: usize, store: &Store) -> Result<Tensor> {
    let frequency = |k: usize| {
        let exponent = (2 * k) as f32 / dim as f32;
        1.0 / libm::pow(10000.0, f64::from(exponent)) as f32
    };
    let values = Tensor::generate([dim.div_ceil(2)], store.dtype(), store.device(), |k| frequency(k) as f64)?;
    store.buffer("inv_freq", values)
}

/// A bias on the scores, the same in every layer.
#[derive(Clone, Debug)]
pub enum PositionBias {
    /// None.
    None,
    /// T5's table (Raffel et al., <https://arxiv.org/abs/1910.10683>).
    T5 {
        /// Buckets and their factor.
        plan: T5Plan,
        /// One row per bucket, `[buckets, heads]`.
        table: Embedding,
    },
    /// ALiBi with the slopes of the paper (Press et al., <https://arxiv.org/abs/2108.12409>), `[heads, 1, 1]`.
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
    pub fn new(plan: BiasPlan, store: &Store) -> Result<Self> {
        Ok(match plan {
            BiasPlan::None => Self::None,
            BiasPlan::T5(plan) => {
                let store = store.at("relative_attention_bias");
                Self::T5 { plan, table: Embedding::new(&store, plan.buckets.count, plan.heads, Init::Normal(1.0))? }
            }
            BiasPlan::Alibi(plan) if plan.learned => {
                let slopes = plan.slopes();
                let logslopes = store.param("learned_logslopes", [1, plan.sloped, 1, 1], Init::Constant(0.0))?;
                let start = Tensor::generate([1, plan.sloped, 1, 1], store.dtype(), store.device(), |head| {
                    f64::from(libm::log(f64::from(slopes[head])) as f32)
                })?;
                logslopes.set(start)?;
                Self::LearnedAlibi { heads: plan.heads, logslopes }
            }
            BiasPlan::Alibi(plan) => Self::Alibi(fixed_slopes(&plan, store)?),
        })
    }

    /// The bias as a tensor that broadcasts to `[batch, heads, query, key]`: `[heads, query, key]` or `[heads, 1, key]`.
    ///
    /// Queries count from 0 in T5's, even when memories precede the keys; ALiBi depends on the key alone.
    pub fn forward(&self, queries: usize, keys: usize) -> Result<Option<Tensor>> {
        match self {
            Self::None => Ok(None),
            Self::T5 { plan, table } => {
                table.table().relative_position_bias(queries, keys, plan.buckets, plan.scale).map(Some)
            }
            Self::Alibi(slopes) => linear_bias(slopes, keys).map(Some),
            Self::LearnedAlibi { heads, logslopes } => {
                let logslopes = logslopes.tensor();
                let sloped = logslopes.dim(1)?;
                let slopes = logslopes.exp()?.reshape([sloped, 1, 1])?;
                let flat = Tensor::zeros([heads - sloped, 1, 1], slopes.dtype(), slopes.device())?;
                linear_bias(&Tensor::cat(&[&slopes, &flat], 0)?, keys).map(Some)
            }
        }
    }
}

/// The slopes of all heads, those without one at 0: `[heads, 1, 1]`.
fn fixed_slopes(plan: &AlibiPlan, store: &Store) -> Result<Tensor> {
    let slopes = plan.slopes();
    Tensor::generate([plan.heads, 1, 1], store.dtype(), store.device(), |head| {
        slopes.get(head).copied().unwrap_or(0.0).into()
    })
}

/// `slope[h] · key`: `[heads, 1, 1] → [heads, 1, keys]`.
fn linear_bias(slopes: &Tensor, keys: usize) -> Result<Tensor> {
    slopes.mul(&Tensor::arange(keys, slopes.device())?.to_dtype(slopes.dtype())?)
}
