//! Attention in blocks, with the fused op.

use super::{Attention, AttentionInput};
use crate::{
    Result, Tensor,
    config::Temperature,
    ops::{AttentionSpec, PositionBias, Window, attention},
};

impl Attention {
    /// Computes attention in blocks, without the matrix of scores.
    pub(super) fn fused(&self, q: &Tensor, k: &Tensor, v: &Tensor, input: &AttentionInput) -> Result<Tensor> {
        let prefix = self.plan.prefix_len();
        let uncounted = prefix > 0 && !self.plan.mem_kv_counted && self.plan.window != Window::default();
        let mut mask = input.attn_mask.clone();
        if uncounted && let Some(window) = self.window_mask(q.dim(2)?, k.dim(2)?, q)? {
            mask = Some(mask.map_or_else(|| Ok(window.clone()), |mask| mask.logical_and(&window))?);
        }
        let mask = mask.map(|mask| self.grouped(&mask, -3)).transpose()?;
        let bias = self.dense_bias(input)?;
        let bias = bias.map(|bias| self.grouped(&bias.to_dtype(q.dtype())?, -3)).transpose()?;
        let sink = self.grouped_sink()?;
        let spec = AttentionSpec {
            scale: self.scale(),
            causal: self.plan.causal,
            mask: mask.as_ref(),
            query_mask: self.query_mask(input),
            key_mask: input.key_mask.as_ref(),
            mem_keys: prefix,
            window: if uncounted { Window::default() } else { self.plan.window },
            bias: bias.as_ref(),
            position_bias: input.bias.as_ref().map(|bias| self.grouped_bias(bias)).transpose()?,
            unbiased_keys: self.unbiased_keys(),
            softclamp: self.plan.softclamp,
            sink: sink.as_ref(),
            dropout: self.plan.dropout,
        };
        self.ungrouped(&attention(&self.grouped(q, 1)?, k, v, &spec)?)
    }

    /// Returns the constant factor of the logits.
    pub(super) fn scale(&self) -> f64 {
        match self.plan.temperature {
            Temperature::Fixed(scale) => scale,
            Temperature::Learned(_) => 1.0,
        }
    }

    /// Returns `true` if query heads are not in the order of the fused op, in which those of a key head are neighbours.
    fn regroups(&self) -> bool {
        self.plan.kv_interleaved && (2..self.plan.heads).contains(&self.plan.kv_heads)
    }

    /// Orders heads along this axis as the fused op has them; an axis of size 1, or none, stays.
    pub(super) fn grouped(&self, x: &Tensor, axis: isize) -> Result<Tensor> {
        let at = if axis < 0 { x.rank() as isize + axis } else { axis };
        if !self.regroups() || at < 0 || x.dim(at)? == 1 {
            return Ok(x.clone());
        }
        self.reordered(x, at as usize, [self.plan.heads / self.plan.kv_heads, self.plan.kv_heads])
    }

    pub(super) fn grouped_bias(&self, bias: &PositionBias) -> Result<PositionBias> {
        let mut bias = bias.clone();
        *bias.weights_mut() = self.grouped(bias.weights(), bias.heads_axis())?;
        Ok(bias)
    }

    /// Returns the sink's score of each head in the order of the fused op.
    pub(super) fn grouped_sink(&self) -> Result<Option<Tensor>> {
        self.sink.as_ref().map(|sink| self.grouped(&sink.tensor(), 0)).transpose()
    }

    /// Returns the number of leading keys without a position bias.
    pub(super) fn unbiased_keys(&self) -> usize {
        if self.plan.mem_kv_counted { 0 } else { self.plan.prefix_len() }
    }

    /// Orders the heads of an output of the fused op as the model has them.
    pub(super) fn ungrouped(&self, x: &Tensor) -> Result<Tensor> {
        if !self.regroups() {
            return Ok(x.clone());
        }
        self.reordered(x, 1, [self.plan.kv_heads, self.plan.heads / self.plan.kv_heads])
    }

    fn reordered(&self, x: &Tensor, axis: usize, [outer, inner]: [usize; 2]) -> Result<Tensor> {
        let mut shape = x.shape().to_vec();
        shape.splice(axis..=axis, [outer, inner]);
        let at = axis as isize;
        x.reshape(&shape[..])?.transpose(at, at + 1)?.flatten(at, at + 1)
    }
}
