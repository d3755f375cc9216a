//! Padding of queries, and queries that see no key.

use std::borrow::Cow;

use super::{Attention, AttentionInput};
use crate::{DType, Result, Tensor, config::PaddingPlan};

impl Attention {
    /// Returns the padding mask of the queries if scores depend on it.
    pub(super) fn query_mask<'i>(&self, input: &'i AttentionInput) -> Option<&'i Tensor> {
        input.query_mask.as_ref().filter(|_| self.plan.padding == PaddingPlan::Queries)
    }

    /// Lets the attention mask keep the zero key, which it does not know.
    pub(super) fn with_zero_key<'i>(&self, input: &'i AttentionInput) -> Result<Cow<'i, AttentionInput>> {
        let Some(mask) = input.attn_mask.as_ref().filter(|_| self.plan.zero_kv) else {
            return Ok(Cow::Borrowed(input));
        };
        let mask = padded(mask, 1, &Tensor::ones((), DType::Bool, mask.device())?)?;
        Ok(Cow::Owned(AttentionInput { attn_mask: Some(mask), ..input.clone() }))
    }

    /// Returns the dense bias with zeros for the keys before all others.
    pub(super) fn dense_bias(&self, input: &AttentionInput) -> Result<Option<Tensor>> {
        input.dense_bias.as_ref().map(|bias| zeros_first(bias, self.plan.prefix_len())).transpose()
    }

    /// Returns the mask of the keys that the window leaves to each query, `[i, j]`.
    pub(super) fn window_mask(&self, i: usize, j: usize, like: &Tensor) -> Result<Option<Tensor>> {
        let prefix = if self.plan.mem_kv_counted { 0 } else { self.plan.prefix_len() };
        let Some(mask) = self.plan.window.mask(i, j - prefix, like.device())? else { return Ok(None) };
        padded(&mask, prefix, &Tensor::ones((), DType::Bool, like.device())?).map(Some)
    }

    /// Returns where the masks leave no key to a query whose output is then 0: Bool, broadcasts to `[b, heads, i, 1]`.
    pub(super) fn empty_rows(&self, q: &Tensor, k: &Tensor, input: &AttentionInput) -> Result<Option<Tensor>> {
        let with_causality = self.plan.causal && self.plan.padding == PaddingPlan::OutputCausal;
        let key_mask = input.key_mask.as_ref().filter(|_| input.keys_may_be_empty);
        let masked = input.attn_mask.is_some() || key_mask.is_some();
        if self.plan.padding == PaddingPlan::Queries || self.plan.prefix_len() > 0 || !masked {
            return Ok(None);
        }
        let (i, j) = (q.dim(2)?, k.dim(2)?);
        let mut keep: Option<Tensor> = None;
        let parts = [
            key_mask.or(input.key_mask.as_ref()).map(|mask| mask.unsqueeze(1)?.unsqueeze(1)).transpose()?,
            input.attn_mask.clone(),
            self.window_mask(i, j, q)?,
            if with_causality { Some(causal_mask(i, j, q)?) } else { None },
        ];
        for part in parts.into_iter().flatten() {
            keep = Some(match keep {
                Some(keep) => keep.logical_and(&part)?,
                None => part,
            });
        }
        let seen = keep.map(|keep| keep.to_dtype(DType::F32)?.sum(&[-1])?.unsqueeze(-1)).transpose()?;
        seen.map(|seen| seen.lt(&Tensor::full((), 0.5, DType::F32, q.device())?)).transpose()
    }

    /// Sets the output at padded queries to 0, `[b, i, dim]`.
    pub(super) fn without_padding(&self, out: Tensor, input: &AttentionInput) -> Result<Tensor> {
        match &input.query_mask {
            Some(mask) if self.plan.padding != PaddingPlan::Queries => {
                out.masked_fill(&mask.logical_not()?.unsqueeze(-1)?, 0.0)
            }
            _ => Ok(out),
        }
    }
}

/// Puts columns of zeros in front of those of `x`.
pub(super) fn zeros_first(x: &Tensor, columns: usize) -> Result<Tensor> {
    padded(x, columns, &Tensor::zeros((), x.dtype(), x.device())?)
}

/// Puts columns of a value in front of those of `x`.
fn padded(x: &Tensor, columns: usize, value: &Tensor) -> Result<Tensor> {
    if columns == 0 {
        return Ok(x.clone());
    }
    let mut shape = x.shape().to_vec();
    let last = shape.len() - 1;
    shape[last] = columns;
    Tensor::cat(&[&value.expand(&shape[..])?, x], -1)
}

/// Returns the mask of the keys up to each query, the last of which is aligned with the last key: Bool `[i, j]`.
pub(in crate::nn) fn causal_mask(i: usize, j: usize, like: &Tensor) -> Result<Tensor> {
    // Both sides are shifted so that neither is negative.
    let position = |first: usize, n: usize| Tensor::arange(first + n, like.device())?.narrow(0, first, n);
    position(j, i)?.unsqueeze(1)?.ge(&position(i, j)?)
}
