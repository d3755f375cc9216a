//! Biases on the scores that depend on positions.

use super::{Embedding, Linear, Norm};
use crate::{
    DType, Device, Error, Init, Param, ParamStore, Result, Tensor,
    collect::CollectVec,
    config::{DynamicPlan, NormPlan, PositionBiasPlan, T5Plan},
    ops::{PositionBias, relative_bucket},
};

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
    /// A small network on the distance.
    Dynamic(DynamicPositionBias),
}

impl RelativePositionBias {
    /// Creates the planned bias, or returns `None` if the plan has none.
    pub fn new(plan: PositionBiasPlan, store: &ParamStore) -> Result<Option<Self>> {
        Ok(Some(match plan {
            PositionBiasPlan::None => return Ok(None),
            PositionBiasPlan::Dynamic(plan) => Self::Dynamic(DynamicPositionBias::new(plan, store)?),
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

    /// Returns the bias for one forward pass, in which positions of queries and keys count from 0.
    ///
    /// Errors: a dynamic bias, which is a function of the distance alone.
    pub fn forward(&self) -> Result<PositionBias> {
        Ok(match self {
            Self::Dynamic(_) => return Err(Error::argument("rel_pos", "depends on the distance alone")),
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

    /// Returns the bias of distances from `−after` to `before` of a key before its query,
    /// `[after + 1 + before, heads]`.
    pub(super) fn by_distance(&self, before: usize, after: usize, dtype: DType) -> Result<Tensor> {
        let distances = || (0..=after + before).map(|index| index as i64 - after as i64);
        match self {
            Self::T5 { plan, table } => {
                let T5Plan { scale, causal, max_distance, buckets, .. } = *plan;
                let table = table.table()?;
                let bucket = |distance: i64| relative_bucket(distance, causal, buckets, max_distance) as i64;
                let index =
                    Tensor::from_vec(distances().map(bucket).collect_vec(), [after + 1 + before], table.device())?;
                table.embedding(&index)?.affine(scale, 0.0)
            }
            Self::Dynamic(network) => network.forward(&distances().map(|distance| distance as f64).collect_vec()),
            Self::Alibi(_) | Self::LearnedAlibi { .. } => {
                let slopes = self.forward()?.weights().clone();
                let values = distances().map(|distance| -(distance.unsigned_abs() as f64)).collect_vec();
                let distances = Tensor::from_vec(values, [after + 1 + before, 1], slopes.device())?;
                // Half types do not hold all positions: the product is rounded once.
                distances.mul(&slopes.to_dtype(DType::F64)?.unsqueeze(0)?)?.to_dtype(dtype)
            }
        }
    }

    /// Returns the bias of tokens at explicit positions, `[n]` or `[b, n]`: `[1 or b, heads, n, n]`.
    ///
    /// Errors: a bias other than ALiBi, as in x-transformers.
    pub(super) fn at(&self, positions: &Tensor, dtype: DType) -> Result<Tensor> {
        let Self::Alibi(slopes) = self else {
            return Err(Error::argument("pos", "acts on ALiBi, rotations and absolute positions"));
        };
        let n = positions.dim(-1)?;
        let rows = positions.numel() / n.max(1);
        let positions = positions.to_dtype(DType::F64)?.reshape([rows, n])?;
        let difference = positions.unsqueeze(1)?.sub(&positions.unsqueeze(2)?)?;
        let distance = difference.square()?.sqrt()?.affine(-1.0, 0.0)?.reshape([rows, 1, n, n])?;
        distance.mul(&slopes.to_dtype(DType::F64)?.reshape([1, slopes.numel(), 1, 1])?)?.to_dtype(dtype)
    }

    /// Returns the bias of the last `queries` of `keys` positions, a function of the distance alone. `plain`: if
    /// `true`, these are all keys.
    pub(super) fn relative(&self, queries: usize, keys: usize, plain: bool, dtype: DType) -> Result<PositionBias> {
        match self {
            Self::T5 { .. } if plain && queries == keys => self.forward(),
            Self::T5 { .. } | Self::Dynamic(_) => {
                let table = self.by_distance(keys.saturating_sub(1), queries.saturating_sub(1), dtype)?;
                Ok(PositionBias::ByDistance { table })
            }
            Self::Alibi(_) | Self::LearnedAlibi { .. } => {
                Ok(PositionBias::SymmetricAlibi { slopes: self.forward()?.weights().clone() })
            }
        }
    }
}

/// Dynamic position bias: linear layers with SiLU on the distance of a key before its query (Wang et al., CrossFormer,
/// <https://arxiv.org/abs/2108.00154>).
#[derive(Clone, Debug)]
pub struct DynamicPositionBias {
    layers: Vec<(Linear, Option<Norm>)>,
    last: Linear,
    log_distance: bool,
}

impl DynamicPositionBias {
    fn new(plan: DynamicPlan, store: &ParamStore) -> Result<Self> {
        let mlp = store.at("mlp");
        let layer = |index: usize| {
            let place = mlp.at(index);
            let width = if index == 0 { 1 } else { plan.dim };
            // The first norm is that of the layers, the others are PyTorch's.
            let norm = if index == 0 { NormPlan::Gamma { eps: 1e-5, offset: 0.0 } } else { NormPlan::LAYER };
            let norm = plan.norm.then(|| Norm::new(norm, plan.dim, &place.at(1))).transpose()?;
            Ok((Linear::new(&place.at(0), width, plan.dim)?, norm))
        };
        Ok(Self {
            layers: (0..plan.depth).map(layer).try_collect_vec()?,
            last: Linear::new(&mlp.at(plan.depth), plan.dim, plan.heads)?,
            log_distance: plan.log_distance,
        })
    }

    /// Computes the bias of these distances, `[distances, heads]`.
    fn forward(&self, distances: &[f64]) -> Result<Tensor> {
        let input = |&distance: &f64| match self.log_distance {
            true => distance.signum() * libm::log(distance.abs() + 1.0),
            false => distance,
        };
        let values = distances.iter().map(input).collect_vec();
        let like = self.last.weight()?;
        let mut x = Tensor::from_vec(values, [distances.len(), 1], &Device::Cpu)?.to_dtype(like.dtype())?;
        x = x.to_device(like.device())?;
        for (linear, norm) in &self.layers {
            x = linear.forward(&x)?;
            if let Some(norm) = norm {
                x = norm.forward(&x)?;
            }
            x = x.silu()?;
        }
        self.last.forward(&x)
    }
}
