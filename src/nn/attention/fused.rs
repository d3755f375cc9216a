//! Attention in blocks, with the fused op.

use super::{Attention, AttentionInput};
use crate::{
    Result, Tensor,
    config::Temperature,
    ops::{AttentionSpec, attention},
};

impl Attention {
    /// Computes attention in blocks, without the matrix of scores.
    pub(super) fn fused(&self, q: &Tensor, k: &Tensor, v: &Tensor, input: &AttentionInput) -> Result<Tensor> {
        let spec = AttentionSpec {
            scale: self.scale(),
            causal: self.plan.causal,
            mask: input.attn_mask.as_ref(),
            query_mask: input.query_mask.as_ref(),
            key_mask: input.key_mask.as_ref(),
            mem_keys: self.plan.num_mem_kv,
            window: self.plan.window,
            bias: None,
            position_bias: input.bias.clone(),
            dropout: self.plan.dropout,
        };
        attention(q, k, v, &spec)
    }

    /// Returns the constant factor of the logits.
    pub(super) fn scale(&self) -> f64 {
        match self.plan.temperature {
            Temperature::Fixed(scale) => scale,
            Temperature::Learned(_) => 1.0,
        }
    }
}
