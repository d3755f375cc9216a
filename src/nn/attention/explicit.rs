//! Attention computed from the matrix of scores.

use super::{Attention, AttentionInput, padding::causal_mask, soft_clamp};
use crate::{
    DType, Param, Result, Tensor,
    autograd::dropout_stream,
    config::{Normalize, ScoreResidual, TalkingHeads},
};

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
        let mut scores = self.scores(q, k)?;
        if let Some(prev) = &input.prev {
            scores = scores.add(prev)?;
        }
        let scaled = (self.plan.residual == ScoreResidual::Scaled).then(|| scores.clone());
        let pre_scale = self.pre_scale.as_ref().map(|mixing| self.convolve_heads(&scores, mixing)).transpose()?;
        if let Some(before) = &self.talking[0] {
            let mixed = self.mix_heads(&scores, before)?;
            let adds = matches!(self.plan.talking_heads, TalkingHeads::Convolutions(_));
            scores = if adds { scores.add(&mixed)? } else { mixed };
        }
        if let Some(bias) = bias {
            scores = scores.add(&bias)?;
        }
        if let Some(bound) = self.plan.softclamp {
            scores = soft_clamp(&scores, bound)?;
        }
        // The gradient of a magnitude at 0 is 0.
        let mut signs = self.plan.cog_signed.then(|| signs(&scores)).transpose()?;
        if let Some(signs) = &signs {
            scores = scores.mul(signs)?;
        }
        let lowest = Tensor::full((), scores.dtype().lowest(), scores.dtype(), scores.device())?;
        let mut dropped = None;
        match (keep, &input.query_mask) {
            (keep, rows) if self.plan.inverted => {
                dropped = keep.map(|keep| keep.logical_not()).transpose()?;
                if let Some(rows) = rows {
                    let rows = rows.reshape([rows.dim(0)?, 1, rows.dim(1)?, 1])?;
                    scores = rows.where_cond(&scores, &lowest)?;
                }
            }
            (Some(keep), _) => scores = keep.where_cond(&scores, &lowest)?,
            (None, _) => {}
        }
        scores = self.with_contextual_positions(q, scores)?;
        if self.plan.selective {
            scores = selected(&scores)?;
        }
        if let Some(sink) = &self.sink {
            let shape = [scores.dim(0)?, self.plan.heads, scores.dim(2)?, 1];
            let mut sink = sink.tensor().reshape([1, self.plan.heads, 1, 1])?.expand(shape)?;
            if let Some(of_scores) = signs {
                let of_sink = self::signs(&sink)?;
                sink = sink.mul(&of_sink)?;
                signs = Some(Tensor::cat(&[&of_sink, &of_scores], -1)?);
            }
            scores = Tensor::cat(&[&sink, &scores], -1)?;
        }
        let passed_on = match scaled {
            Some(scaled) => Some(scaled),
            None => (self.plan.residual == ScoreResidual::Masked || input.return_scores).then(|| scores.clone()),
        };
        let mut weights = match self.plan.inverted {
            true => competed(&scores, dropped.as_ref())?,
            false => self.weights(&scores, &lowest)?,
        };
        if let Some(signs) = &signs {
            weights = weights.mul(signs)?;
        }
        let attn = input.return_attn.then(|| weights.clone());
        if self.sink.is_some() {
            weights = weights.narrow(-1, 1, weights.dim(-1)? - 1)?;
        }
        weights = weights.dropout(self.plan.dropout)?;
        if let Some(after) = &self.talking[1] {
            weights = self.mix_heads(&weights, after)?;
        }
        if let Some(factors) = pre_scale {
            weights = weights.mul(&factors)?;
        }
        Ok((weights.matmul(v)?, passed_on, attn))
    }

    /// Returns the weights of the values.
    fn weights(&self, scores: &Tensor, lowest: &Tensor) -> Result<Tensor> {
        // The value of the first, with the gradient of the second.
        let straight = |value: &Tensor, soft: &Tensor| value.detach().add(soft)?.sub(&soft.detach());
        let noisy = self.plan.gumbel.map(|divisor| noisy(scores, divisor, lowest)).transpose()?;
        let scores = noisy.as_ref().unwrap_or(scores);
        if let Some(k) = self.plan.sparse_topk {
            let best = scores.detach().top_k_mask(k)?.where_cond(scores, lowest)?;
            let weights = self.normalize(&best)?;
            return if self.plan.straight_through { straight(&weights, &self.normalize(scores)?) } else { Ok(weights) };
        }
        if self.plan.normalize != Normalize::Hard {
            return self.normalize(scores);
        }
        let best = scores.detach().argmax(-1)?.unsqueeze(-1)?;
        let one = Tensor::arange(scores.dim(-1)?, scores.device())?.eq(&best)?.to_dtype(scores.dtype())?;
        straight(&one, &scores.softmax()?)
    }

    fn normalize(&self, scores: &Tensor) -> Result<Tensor> {
        match self.plan.normalize {
            Normalize::Entmax15 => scores.entmax15(),
            Normalize::Sigmoid => scores.sigmoid(),
            Normalize::Softmax | Normalize::Hard => scores.softmax(),
        }
    }

    /// Returns the scaled products of queries and keys, or their negative squared distances.
    fn scores(&self, q: &Tensor, k: &Tensor) -> Result<Tensor> {
        // The queries are scaled instead of the scores, since there are fewer of them.
        let scale = if self.plan.l2_distance { 2.0 * self.scale() } else { self.scale() };
        let products = q.affine(scale, 0.0)?.matmul(&k.transpose(-1, -2)?)?;
        if !self.plan.l2_distance {
            return Ok(products);
        }
        let squares = |x: &Tensor| x.square()?.sum(&[-1])?.affine(self.scale(), 0.0);
        products.sub(&squares(q)?.unsqueeze(-1)?)?.sub(&squares(k)?.unsqueeze(-2)?)
    }

    /// Returns the mask of the scores, which broadcasts to them; `true` keeps. `None` keeps all.
    pub(super) fn keep(&self, q: &Tensor, j: usize, input: &AttentionInput) -> Result<Option<Tensor>> {
        let (b, i, prefix) = (q.dim(0)?, q.dim(2)?, self.plan.prefix_len());
        let device = q.device();
        let mut parts: Vec<Tensor> = Vec::new();
        let query_mask = self.query_mask(input);
        if query_mask.is_some() || input.key_mask.is_some() {
            let seen = |size: usize| Tensor::ones([b, size], DType::Bool, device);
            let keys = input.key_mask.clone().map_or_else(|| seen(j - prefix), Ok)?;
            let keys = keys.reshape([b, 1, 1, keys.dim(1)?])?;
            let (pairs, rows) = match query_mask {
                Some(queries) => (queries.reshape([b, 1, i, 1])?.logical_and(&keys)?, i),
                None => (keys, 1),
            };
            let memory = Tensor::ones([b, 1, rows, prefix], DType::Bool, device)?;
            parts.push(Tensor::cat(&[&memory, &pairs], 3)?);
        }
        parts.extend(input.attn_mask.clone());
        parts.extend(self.window_mask(i, j, q)?);
        if self.plan.causal {
            // Query `q` is at key `q + j − i`.
            parts.push(causal_mask(i, j, q)?);
        }
        let mut parts = parts.into_iter();
        let Some(first) = parts.next() else { return Ok(None) };
        parts.try_fold(first, |keep, part| keep.logical_and(&part)).map(Some)
    }

    /// Repeats key or value heads for all query heads: `[b, kv_heads, n, d] → [b, heads, n, d]`.
    pub(super) fn repeat_heads(&self, x: &Tensor) -> Result<Tensor> {
        let (b, kv_heads, n, d) = (x.dim(0)?, x.dim(1)?, x.dim(2)?, x.dim(3)?);
        if kv_heads == self.plan.heads {
            return Ok(x.clone());
        }
        let group = self.plan.heads / kv_heads;
        let repeated = match self.plan.kv_interleaved {
            true => x.unsqueeze(1)?.expand([b, group, kv_heads, n, d])?,
            false => x.unsqueeze(2)?.expand([b, kv_heads, group, n, d])?,
        };
        repeated.reshape([b, self.plan.heads, n, d])
    }

    /// Computes `y[b, k, i, j] = Σ_h x[b, h, i, j] · mixing[h, k]` (Shazeer et al.,
    /// <https://arxiv.org/abs/2003.02436>); a convolution has the transposed matrix.
    fn mix_heads(&self, x: &Tensor, mixing: &Param) -> Result<Tensor> {
        match self.plan.talking_heads {
            TalkingHeads::Convolutions(_) => self.convolve_heads(x, mixing),
            _ => mixing.tensor().transpose(0, 1)?.matmul(&x.flatten(2, 3)?)?.reshape(*x.shape()),
        }
    }

    /// Applies a convolution `[heads, heads, 1, 1]` across heads.
    pub(super) fn convolve_heads(&self, x: &Tensor, mixing: &Param) -> Result<Tensor> {
        let mixing = mixing.tensor().reshape([self.plan.heads, self.plan.heads])?;
        mixing.matmul(&x.flatten(2, 3)?)?.reshape(*x.shape())
    }
}

/// Returns weights for which queries compete: a softmax over the queries of each key, and then the share of each key
/// (<https://openreview.net/forum?id=WgQZNoQ5AB>).
fn competed(scores: &Tensor, dropped: Option<&Tensor>) -> Result<Tensor> {
    let mut weights = scores.transpose(-1, -2)?.contiguous()?.softmax()?.transpose(-1, -2)?.contiguous()?;
    if let Some(dropped) = dropped {
        weights = weights.masked_fill(dropped, 0.0)?;
    }
    // In f16 the least sum would be 0.
    let wide = weights.to_dtype(scores.dtype().accumulator())?;
    let sums = wide.sum(&[-1])?.unsqueeze(-1)?;
    let least = Tensor::full((), 1e-8, sums.dtype(), sums.device())?;
    wide.div(&sums.detach().lt(&least)?.where_cond(&least, &sums)?)?.to_dtype(scores.dtype())
}

/// Returns scores plus, in training, the noise whose largest sum is a draw from their softmax (Jang et al.,
/// <https://arxiv.org/abs/1611.01144>), over a divisor. Masked scores stay the lowest number: over a divisor below 1
/// they would be infinite, and the weights of a row without keys NaN.
fn noisy(scores: &Tensor, divisor: f64, lowest: &Tensor) -> Result<Tensor> {
    let kept = scores.detach().gt(lowest)?;
    let scores = match dropout_stream("gumbel_softmax") {
        Some(draws) => {
            let noise = |at: usize| -libm::log(-libm::log(draws.uniform(at as u64).max(f64::MIN_POSITIVE)));
            scores.add(&Tensor::generate(*scores.shape(), scores.dtype(), scores.device(), noise)?)?
        }
        None => scores.clone(),
    };
    kept.where_cond(&scores.affine(1.0 / divisor, 0.0)?, lowest)
}

/// Returns the signs of scores, without a gradient.
fn signs(scores: &Tensor) -> Result<Tensor> {
    let scores = scores.detach();
    let zero = Tensor::zeros((), scores.dtype(), scores.device())?;
    let above = scores.gt(&zero)?.to_dtype(scores.dtype())?;
    above.sub(&scores.lt(&zero)?.to_dtype(scores.dtype())?)
}

/// Lowers scores by what earlier queries of the first head gave their keys: the first key keeps its scores, and no
/// query lowers its own key (Leviathan et al., <https://arxiv.org/abs/2410.02703>).
fn selected(scores: &Tensor) -> Result<Tensor> {
    let (i, j) = (scores.dim(2)?, scores.dim(3)?);
    let (dtype, device) = (scores.dtype(), scores.device());
    // Keys before those of the queries, the first of these, and each query's own are spared.
    let spared = |at: usize| at % j <= j - i || at % j == at / j + j - i;
    let lowers = Tensor::generate([i, j], dtype, device, |at| if spared(at) { 0.0 } else { 1.0 })?;
    let earlier = Tensor::generate([i, i], dtype, device, |at| if at % i < at / i { 1.0 } else { 0.0 })?;
    let gate = scores.narrow(1, 0, 1)?.relu()?.mul(&lowers)?;
    scores.sub(&earlier.matmul(&gate)?)
}
