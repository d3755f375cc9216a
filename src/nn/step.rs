//! New positions of a call that continues sequences, and the tables in which it looks up positions.

use super::{RelativePositionBias, Rotation};
use crate::{DType, Result, Tensor, collect::CollectVec, ops::rotary::rotary_table};

/// Tables that depend only on positions, shared by all layers.
#[derive(Clone, Debug, Default)]
pub(super) struct Tables {
    /// Cosines and sines, `[positions, features]`.
    pub rotary: Option<Tensor>,
    /// `[positions, dim]`
    pub sinusoids: Option<Tensor>,
    /// Position bias, and `true` if it depends on the distance alone.
    pub bias: Option<(RelativePositionBias, bool)>,
}

/// New positions of one call.
#[derive(Clone, Debug)]
pub(super) struct DecodeStep {
    /// Lengths of the sequences before the call, `[b]` I64.
    pub device_lengths: Tensor,
    pub lengths: Vec<usize>,
    /// Number of new positions per row.
    pub n: usize,
    pub capacity: usize,
    /// If `true`, all sequences start with this call.
    pub first: bool,
    /// Padding mask of the new positions, `[b, n]`; `true` marks a real token.
    pub mask: Option<Tensor>,
    /// Padding mask of all positions, `[b, 1, capacity, 1]`.
    pub whole_mask: Option<Tensor>,
    /// The same mask by rows.
    pub kept: Option<Vec<Vec<bool>>>,
}

impl Tables {
    /// Creates tables for sequences of up to this number of positions, including memories.
    pub fn new(
        positions: usize,
        rotary: Option<&Rotation>,
        infused: Option<&Rotation>,
        bias: Option<(RelativePositionBias, bool)>,
        dtype: DType,
    ) -> Result<Self> {
        let rotary = rotary
            .map(|rotation| rotary_table(&rotation.frequencies()?, positions, dtype.accumulator()))
            .transpose()?;
        let sinusoids = infused.map(|rotation| rotation.frequencies()?.sinusoid(0, positions, dtype)).transpose()?;
        Ok(Self { rotary, sinusoids, bias })
    }

    /// Returns the position bias by the distance of a key before its query, `[heads, distances]`, for sequences after
    /// `prefix_len` keys.
    pub fn by_distance(&self, prefix_len: usize, distances: usize, dtype: DType) -> Result<Option<Tensor>> {
        Ok(match &self.bias {
            None => None,
            Some((bias, false)) => Some(bias.forward()?.by_distance(prefix_len, distances, dtype)?),
            Some((bias, true)) => {
                let values = bias.by_distance(distances.saturating_sub(1), 0, dtype)?;
                Some(values.detach().to_dtype(dtype)?.transpose(0, 1)?.contiguous()?)
            }
        })
    }
}

impl DecodeStep {
    /// Returns the positions of the step, offset by `first` and kept below `limit`: `[b, n]` I64.
    pub fn positions(&self, first: usize, limit: usize) -> Result<Tensor> {
        let row = |&length: &usize| (0..self.n).map(move |i| (first + length + i).min(limit - 1) as i64);
        let positions: Vec<i64> = self.lengths.iter().flat_map(row).collect_vec();
        Tensor::from_vec(positions, [self.lengths.len(), self.n], self.device_lengths.device())
    }

    /// Returns the maximum number of keys that a query of the step sees, including the prefix.
    pub fn keys(&self, prefix_len: usize) -> usize {
        let longest = self.lengths.iter().copied().max().unwrap_or(0);
        prefix_len + (longest + self.n).min(self.capacity)
    }
}
