//! Attention computed from the matrix of scores.

use super::{Attention, AttentionInput};
use crate::{DType, Param, Result, Tensor, config::Normalize};

/// Output, scores to pass on, attention map.
type Explicit = (Tensor, Option<Tensor>, Option<Tensor>);

impl Attention {
    /// Computes attention from the matrix of scores. Returns the output, the scores to pass on, and the attention map.
    pub(super) fn explicit(
        &self,
        [q, k, v]: [&Tensor; 3],
        input: &AttentionInput,
        bias: Option<Tensor>,
        keep: Option<Tensor>,
    ) -> Result<Explicit> {
        let (k, v) = (&self.repeat_heads(k)?, &self.repeat_heads(v)?);
        // The queries are scaled instead of the scores, since there are fewer of them.
        let mut scores = q.affine(self.scale(), 0.0)?.matmul(&k.transpose(-1, -2)?)?;
        if let Some(prev) = &input.prev {
            scores = scores.add(prev)?;
        }
        let passed_on = self.plan.residual.then(|| scores.clone());
        if let Some([before, _]) = &self.talking {
            scores = mix_heads(&scores, before)?;
        }
        if let Some(bias) = bias {
            scores = scores.add(&bias)?;
        }
        let lowest = Tensor::full((), scores.dtype().lowest(), scores.dtype(), scores.device())?;
        if let Some(keep) = keep {
            scores = keep.where_cond(&scores, &lowest)?;
        }
        if let Some(k) = self.plan.sparse_topk {
            scores = scores.detach().top_k_mask(k)?.where_cond(&scores, &lowest)?;
        }
        let mut weights = match self.plan.normalize {
            Normalize::Softmax => scores.softmax()?,
            Normalize::Entmax15 => scores.entmax15()?,
        };
        let attn = input.return_attn.then(|| weights.clone());
        weights = weights.dropout(self.plan.dropout)?;
        if let Some([_, after]) = &self.talking {
            weights = mix_heads(&weights, after)?;
        }
        Ok((weights.matmul(v)?, passed_on, attn))
    }

    /// Returns the mask of the scores, which broadcasts to them; `true` keeps. `None` keeps all.
    pub(super) fn keep(&self, q: &Tensor, j: usize, input: &AttentionInput) -> Result<Option<Tensor>> {
        let (b, i) = (q.dim(0)?, q.dim(2)?);
        let device = q.device();
        let mut parts: Vec<Tensor> = Vec::new();
        if input.query_mask.is_some() || input.key_mask.is_some() {
            let seen = |size: usize| Tensor::ones([b, size], DType::Bool, device);
            let queries = input.query_mask.clone().map_or_else(|| seen(i), Ok)?;
            let keys = input.key_mask.clone().map_or_else(|| seen(j - self.plan.num_mem_kv), Ok)?;
            let pairs = queries.reshape([b, 1, i, 1])?.logical_and(&keys.reshape([b, 1, 1, keys.dim(1)?])?)?;
            let memory = Tensor::ones([b, 1, i, self.plan.num_mem_kv], DType::Bool, device)?;
            parts.push(Tensor::cat(&[&memory, &pairs], 3)?);
        }
        parts.extend(input.attn_mask.clone());
        // Query `q` is at key `q + j − i`. Both sides are shifted so that neither is negative.
        let position = |first: usize, n: usize| Tensor::arange(first + n, device)?.narrow(0, first, n);
        parts.extend(self.plan.window.mask(i, j, device)?);
        if self.plan.causal {
            parts.push(position(j, i)?.unsqueeze(1)?.ge(&position(i, j)?)?);
        }
        let mut parts = parts.into_iter();
        let Some(first) = parts.next() else { return Ok(None) };
        parts.try_fold(first, |keep, part| keep.logical_and(&part)).map(Some)
    }

    /// Repeats key or value heads for all query heads: `[b, kv_heads, n, d] → [b, heads, n, d]`.
    fn repeat_heads(&self, x: &Tensor) -> Result<Tensor> {
        let (b, kv_heads, n, d) = (x.dim(0)?, x.dim(1)?, x.dim(2)?, x.dim(3)?);
        if kv_heads == self.plan.heads {
            return Ok(x.clone());
        }
        let group = self.plan.heads / kv_heads;
        x.unsqueeze(2)?.expand([b, kv_heads, group, n, d])?.reshape([b, self.plan.heads, n, d])
    }
}

/// Computes `y[b, k, i, j] = Σ_h x[b, h, i, j] · mixing[h, k]` (Shazeer et al., <https://arxiv.org/abs/2003.02436>).
fn mix_heads(x: &Tensor, mixing: &Param) -> Result<Tensor> {
    mixing.tensor().transpose(0, 1)?.matmul(&x.flatten(2, 3)?)?.reshape(*x.shape())
}
