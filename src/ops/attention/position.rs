//! Biases that depend on the distance between key and query: one value per head and distance.

use std::{ops::Range, sync::OnceLock};

use super::{OP, Sizes};
use crate::{
    DType, Device, Error, Result, Tensor,
    collect::CollectVec,
    dtype::{Real, dispatch_float},
    error::ensure,
};

/// Bias that depends only on the positions of query and key; it is never expanded to `[heads, query, key]`.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum PositionBias {
    /// ALiBi: `slopes[head] · (key − position)`, where the last query is at the position of the last key. Without a soft
    /// clamp or a sink, `slopes[head] · key` is the same (Press et al., <https://arxiv.org/abs/2108.12409>).
    Alibi {
        /// Float `[heads]`; has a gradient.
        slopes: Tensor,
    },
    /// ALiBi on both sides: `−slopes[head] · |position − key|`.
    SymmetricAlibi {
        /// Float `[heads]`; has a gradient.
        slopes: Tensor,
    },
    /// A curve by distance: `table[position − key + queries − 1, head]`, for the distances `1 − queries` to `keys − 1`,
    /// not counting unbiased keys.
    ByDistance {
        /// Float `[queries + keys − 1, heads]`; has a gradient.
        table: Tensor,
    },
    /// T5: `scale · table[bucket(query − key), head]`, both counted from 0 (Raffel et al.,
    /// <https://arxiv.org/abs/1910.10683>).
    ///
    /// With `r = query − key` and `B` buckets, `e = B / 2`: bucket `r` below `e`, above it
    /// `min(B − 1, e + ⌊ln(r / e) / ln(max_distance / e) · (B − e)⌋)`.
    T5 {
        /// Float `[buckets, heads]`; has a gradient.
        table: Tensor,
        /// Multiplies the table; `sqrt(dim_head)` in x-transformers.
        scale: f64,
        /// If `true`, keys after the query share bucket 0. Otherwise they take half of the buckets, with `r = |r|`.
        causal: bool,
        /// Distance from which all keys share the last bucket; 128 in x-transformers.
        max_distance: usize,
    },
}

impl PositionBias {
    /// Returns the tensor that has a gradient.
    pub(crate) fn weights(&self) -> &Tensor {
        match self {
            Self::Alibi { slopes } | Self::SymmetricAlibi { slopes } => slopes,
            Self::T5 { table, .. } | Self::ByDistance { table } => table,
        }
    }

    /// Returns the tensor that has a gradient, for replacing it.
    pub(crate) fn weights_mut(&mut self) -> &mut Tensor {
        match self {
            Self::Alibi { slopes } | Self::SymmetricAlibi { slopes } => slopes,
            Self::T5 { table, .. } | Self::ByDistance { table } => table,
        }
    }

    /// Returns the axis of the heads in the tensor that has a gradient.
    pub(crate) fn heads_axis(&self) -> isize {
        match self {
            Self::Alibi { .. } | Self::SymmetricAlibi { .. } => 0,
            Self::T5 { .. } | Self::ByDistance { .. } => 1,
        }
    }

    /// Returns the bias of biased keys as a tensor of this dtype that broadcasts to `[batch, heads, query, key]`: `[heads,
    /// query, key]` or `[heads, 1, key]`.
    pub(crate) fn dense(&self, queries: usize, keys: usize, dtype: DType) -> Result<Tensor> {
        match self {
            Self::T5 { table, scale, causal, max_distance } => {
                table.relative_position_bias(queries, keys, *causal, *max_distance, *scale)
            }
            Self::Alibi { slopes } => {
                // Half types do not hold all positions: the product is rounded once.
                let keys = Tensor::arange(keys, slopes.device())?.to_dtype(DType::F64)?;
                slopes.to_dtype(DType::F64)?.reshape([slopes.dim(0)?, 1, 1])?.mul(&keys)?.to_dtype(dtype)
            }
            Self::SymmetricAlibi { slopes } => {
                let position = |at: usize| (at / keys + keys) as f64 - queries as f64;
                let distance = |at: usize| -(position(at) - (at % keys) as f64).abs();
                let distances = Tensor::generate([queries, keys], DType::F64, slopes.device(), distance)?;
                slopes.to_dtype(DType::F64)?.reshape([slopes.dim(0)?, 1, 1])?.mul(&distances)?.to_dtype(dtype)
            }
            Self::ByDistance { table } => {
                let row = |at: usize| (at / keys + keys - 1 - at % keys) as i64;
                let index =
                    Tensor::from_vec((0..queries * keys).map(row).collect_vec(), [queries, keys], table.device())?;
                table.embedding(&index)?.permute(&[2, 0, 1])?.to_dtype(dtype)
            }
        }
    }

    /// Returns the bias by the distance of a key before a query's position, when `prefix_len` keys precede a causal
    /// sequence: `[heads, distances]` of this dtype. Where only differences matter, it is relative to the key at the
    /// query's position.
    pub(crate) fn by_distance(&self, prefix_len: usize, distances: usize, dtype: DType) -> Result<Tensor> {
        match self {
            Self::T5 { table, scale, causal, max_distance } => {
                // Queries count from 0, before which there is nothing: nearer keys are in the future, in bucket 0.
                let table = table.detach().to_dtype(dtype)?;
                let bias = |n: usize| table.relative_position_bias(n, 1, *causal, *max_distance, *scale);
                let past = bias(distances.saturating_sub(prefix_len).max(1))?.squeeze(-1)?;
                let now = past.narrow(1, 0, 1)?.expand([past.dim(0)?, prefix_len])?;
                Tensor::cat(&[&now, &past], 1)
            }
            Self::ByDistance { .. } => Err(Error::argument(OP, "a curve has the distances of its own call")),
            Self::Alibi { slopes } | Self::SymmetricAlibi { slopes } => {
                let distances = Tensor::arange(distances, slopes.device())?.to_dtype(DType::F64)?.affine(-1.0, 0.0)?;
                let slopes = slopes.detach().to_dtype(DType::F64)?;
                slopes.reshape([slopes.dim(0)?, 1])?.mul(&distances)?.to_dtype(dtype)
            }
        }
    }
}

/// [`PositionBias`] in a uniform form: `weights[parameter(distance), head] · factor(distance)`, `distance = key −
/// query`, both counted from 0.
pub(super) struct Position {
    /// `[parameters, heads]`, or `[heads]` for one parameter.
    weights: Tensor,
    kind: Kind,
    parameters: usize,
    heads: usize,
    /// From `1 − queries` to `keys − 1`.
    distances: Range<i64>,
    /// Parameter and factor of each distance, for the processor.
    terms: OnceLock<Vec<(usize, f64)>>,
}

#[derive(Clone, Copy)]
enum Kind {
    /// Counted from the distance `shift` of the query's position instead of from 0: the softmax does not see the
    /// difference, and small numbers keep their digits.
    Alibi {
        shift: i64,
    },
    SymmetricAlibi {
        shift: i64,
    },
    /// The parameter of distance 0.
    ByDistance {
        zero: i64,
    },
    T5 {
        causal: bool,
        max_distance: usize,
        scale: f64,
    },
}

impl Position {
    /// `unbiased`: number of leading keys without a bias.
    pub fn new(bias: &PositionBias, sizes: &Sizes, unbiased: usize, device: &Device) -> Result<Self> {
        let shift = sizes.keys as i64 - sizes.queries as i64;
        let (weights, parameters, kind) = match bias {
            PositionBias::Alibi { slopes } => {
                expect_weights("slopes", slopes, &[sizes.heads], device)?;
                (slopes, 1, Kind::Alibi { shift })
            }
            PositionBias::SymmetricAlibi { slopes } => {
                expect_weights("slopes", slopes, &[sizes.heads], device)?;
                (slopes, 1, Kind::SymmetricAlibi { shift })
            }
            PositionBias::ByDistance { table } => {
                let rows = sizes.queries.saturating_sub(1) + 1 + (sizes.keys - unbiased).saturating_sub(1);
                expect_weights("table", table, &[rows, sizes.heads], device)?;
                (table, rows, Kind::ByDistance { zero: sizes.keys as i64 - 1 })
            }
            &PositionBias::T5 { ref table, scale, causal, max_distance } => {
                let buckets = table.shape().first().copied().unwrap_or(0);
                expect_weights("table", table, &[buckets, sizes.heads], device)?;
                ensure!(
                    scale.is_finite(),
                    Error::argument(OP, format_args!("expected a finite T5 scale, got {scale}"))
                );
                let one_side = if causal { buckets } else { buckets / 2 };
                ensure!(
                    one_side >= 2 && max_distance > one_side / 2,
                    Error::argument(
                        OP,
                        format_args!(
                            "the T5 table has {buckets} buckets and max_distance {max_distance}; expected at least {} \
                             buckets and a max_distance above {}",
                            if causal { 2 } else { 4 },
                            one_side / 2
                        )
                    )
                );
                (table, buckets, Kind::T5 { causal, max_distance, scale })
            }
        };
        Ok(Self {
            weights: weights.detach(),
            kind,
            parameters,
            heads: sizes.heads,
            distances: 1 - sizes.queries as i64..sizes.keys as i64,
            terms: OnceLock::new(),
        })
    }

    fn terms(&self) -> &[(usize, f64)] {
        let term = |distance: i64| match self.kind {
            Kind::Alibi { shift } => (0, (distance - shift) as f64),
            Kind::SymmetricAlibi { shift } => (0, -((distance - shift).abs() as f64)),
            // The distances of unbiased keys have none.
            Kind::ByDistance { zero } => ((zero - distance).clamp(0, self.parameters as i64 - 1) as usize, 1.0),
            Kind::T5 { scale, .. } => (self.bucket(-distance), scale),
        };
        self.terms.get_or_init(|| self.distances.clone().map(term).collect())
    }

    /// Returns the parameter of T5 for a distance `query − key`.
    pub fn bucket(&self, distance: i64) -> usize {
        match self.kind {
            Kind::T5 { causal, max_distance, .. } => bucket(distance, causal, self.parameters, max_distance),
            _ => 0,
        }
    }

    /// Returns the number by which kernels know the form of the curve: 1 if it is a slope times the distance, 2 if times
    /// the magnitude of the distance, otherwise 0.
    pub fn slope(&self) -> i32 {
        match self.kind {
            Kind::Alibi { .. } => 1,
            Kind::SymmetricAlibi { .. } => 2,
            Kind::T5 { .. } | Kind::ByDistance { .. } => 0,
        }
    }

    /// Returns `causal`, `max_distance` and `scale` of T5.
    pub fn t5(&self) -> Option<(bool, usize, f64)> {
        match self.kind {
            Kind::T5 { causal, max_distance, scale } => Some((causal, max_distance, scale)),
            _ => None,
        }
    }

    /// Returns the weights, whose shape the gradient has.
    pub fn weights(&self) -> &Tensor {
        &self.weights
    }

    /// Returns the number of weights per head.
    pub fn parameters(&self) -> usize {
        self.parameters
    }

    /// Returns the bias of each head and distance, `[heads, distances]`.
    pub fn curves<A: Real>(&self) -> Result<Vec<A>> {
        let weights = self.weights.to_f64_vec()?;
        let curve = |head: usize| {
            let weights = &weights;
            self.terms()
                .iter()
                .map(move |&(parameter, factor)| A::from_f64(weights[parameter * self.heads + head] * factor))
        };
        Ok((0..self.heads).flat_map(curve).collect())
    }

    /// Adds the gradients of the distances from number `first` on to the gradients of one head's weights.
    pub fn reduce<A: Real>(&self, gradients: &[A], first: usize, into: &mut [f64]) {
        for (gradient, &(parameter, factor)) in gradients.iter().zip(&self.terms()[first..]) {
            into[parameter] += gradient.to_f64() * factor;
        }
    }

    /// Returns the gradient of the weights from that of each head, `[heads, parameters]`.
    pub fn gradient(&self, per_head: &[f64]) -> Result<Tensor> {
        let mut gradient = self.weights.contiguous()?.uninit_like()?;
        dispatch_float!(OP, gradient.dtype(), T, {
            for (at, to) in gradient.values_mut::<T>()?.iter_mut().enumerate() {
                let (parameter, head) = (at / self.heads, at % self.heads);
                *to = <T as crate::dtype::Float>::from_f64(per_head[head * self.parameters + parameter]);
            }
            Ok(())
        })?;
        Ok(gradient)
    }
}

pub(super) fn expect_weights(name: &str, weights: &Tensor, shape: &[usize], device: &Device) -> Result<()> {
    ensure!(
        weights.dtype().is_float(),
        Error::dtype(OP, format_args!("expected {name} to be a float tensor, got {}", weights.dtype()))
    );
    ensure!(
        weights.device() == device,
        Error::device(
            OP,
            format_args!("{name} is on {} but q is on {device}; move one with `to_device`", weights.device())
        )
    );
    ensure!(
        weights.shape()[..] == *shape,
        Error::shape(OP, format_args!("expected {name} of shape {shape:?}, got {:?}", weights.shape()))
    );
    Ok(())
}

/// Returns the T5 bucket of a distance `query − key`. The quotient is computed in f64: with the usual sizes, powers of
/// two fall exactly on bucket edges.
pub(crate) fn bucket(distance: i64, causal: bool, buckets: usize, max_distance: usize) -> usize {
    let (side, buckets, distance) = match (causal, distance < 0) {
        (true, _) => (0, buckets, distance.max(0) as usize),
        (false, behind) => (if behind { buckets / 2 } else { 0 }, buckets / 2, distance.unsigned_abs() as usize),
    };
    let exact = buckets / 2;
    if distance < exact {
        return side + distance;
    }
    let part = libm::log(distance as f64 / exact as f64) / libm::log(max_distance as f64 / exact as f64);
    side + (exact + (part * (buckets - exact) as f64) as usize).min(buckets - 1)
}

#[cfg(test)]
mod tests {
    use super::bucket;

    #[test]
    fn attention_t5_buckets() {
        let causal: Vec<usize> =
            [-5, 0, 1, 15, 16, 17, 18, 19, 32, 64, 113, 128, 5000].map(|r| bucket(r, true, 32, 128)).into();
        assert_eq!(causal, [0, 0, 1, 15, 16, 16, 16, 17, 21, 26, 31, 31, 31]);
        let both: Vec<usize> = [0, 1, 7, 8, 16, 32, 64, 128, -1, -8, -64].map(|r| bucket(r, false, 32, 128)).into();
        assert_eq!(both, [0, 1, 7, 8, 10, 12, 14, 15, 17, 24, 30]);
    }
}
