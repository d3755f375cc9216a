//! Limits on the keys that a query sees by position, besides causality.

use crate::{
    Device, Result, Tensor,
    device::{
        args,
        launch::{Arg, size32},
    },
};

/// Limits on the keys that a query sees, by its position. They apply in [`attention`](super::attention) and in
/// [`attention_decode`](super::attention_decode), and where the matrix of scores is computed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[non_exhaustive]
pub struct Window {
    /// Masks keys more than this many positions before the query. Default `None`.
    pub max_attend_past: Option<usize>,
}

impl Window {
    /// Creates a window of the keys up to this distance before a query's position.
    pub fn past(keys: usize) -> Self {
        Self { max_attend_past: Some(keys) }
    }

    /// Returns the first key that a query at this position sees, 0 or below if it sees all keys before it. Never
    /// decreases with the position.
    pub fn first_key(&self, position: i64) -> i64 {
        let past = self.max_attend_past.map_or(i64::MAX, |past| i64::try_from(past).unwrap_or(i64::MAX));
        position.saturating_sub(past)
    }

    /// Returns the mask of the keys that each of `queries` queries sees, the last of which is aligned with the last
    /// key: Bool `[queries, keys]`, `true` keeps; `None` without limits.
    pub(crate) fn mask(&self, queries: usize, keys: usize, device: &Device) -> Result<Option<Tensor>> {
        let Some(past) = self.max_attend_past else { return Ok(None) };
        let past = past.min(queries + keys);
        // Both sides are shifted so that neither is negative.
        let positions = |first: usize, n: usize| Tensor::arange(first + n, device)?.narrow(0, first, n);
        positions(keys, queries)?.unsqueeze(1)?.le(&positions(queries + past, keys)?).map(Some)
    }

    /// Returns the struct `Window` of `kernels/attention_window.cuh`, for positions and distances below `reach`.
    pub(super) fn values(&self, reach: usize) -> Result<[Arg; 1]> {
        Ok(*args![size32(self.max_attend_past.map_or(reach, |past| past.min(reach)))? as i32])
    }
}
