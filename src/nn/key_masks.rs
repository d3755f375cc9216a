//! Masks of keys: padding of tokens and memories, and tokens of a context that training leaves out.

use crate::{DType, Result, Tensor, autograd::dropout_stream, collect::CollectVec, sort::sort_by};

/// Returns the mask of the keys: that of the `n` tokens, preceded by that of the memories, `true` by default.
pub(super) fn key_mask(
    mask: Option<&Tensor>,
    mem: Option<&Tensor>,
    mem_mask: Option<&Tensor>,
    n: usize,
) -> Result<Option<Tensor>> {
    let Some(mem) = mem.filter(|_| mask.is_some() || mem_mask.is_some()) else { return Ok(mask.cloned()) };
    let kept = |n: usize| Tensor::ones([mem.dim(0)?, n], DType::Bool, mem.device());
    let memories = mem_mask.map_or_else(|| kept(mem.dim(1)?), |mask| Ok(mask.clone()))?;
    let tokens = mask.map_or_else(|| kept(n), |mask| Ok(mask.clone()))?;
    Tensor::cat(&[&memories, &tokens], 1).map(Some)
}

/// Draws which tokens of a context `[b, n, dim]` training leaves out, beside those that are masked: `[b, n]`. `None`
/// outside of training.
pub(crate) fn drop_tokens(context: &Tensor, mask: Option<&Tensor>, share: f64, padded: bool) -> Result<Option<Tensor>> {
    let Some(draws) = dropout_stream("cross_attn_tokens_dropout") else { return Ok(None) };
    let (b, n) = (context.dim(0)?, context.dim(1)?);
    let mut keep = mask.map_or_else(|| Ok(vec![true; b * n]), |mask| mask.to_vec::<bool>())?;
    for (row, keep) in keep.chunks_mut(n.max(1)).enumerate() {
        let mut left: Vec<usize> = (0..n).filter(|&at| keep[at]).collect_vec();
        let kept = left.len() as f64 * (1.0 - share);
        // A row of padded ones keeps whole tokens rounded up, others rounded down, like x-transformers.
        let kept = if padded { kept.ceil() as usize } else { (kept as usize).max(1) };
        let draw = |at: usize| draws.uniform((row * n + at) as u64);
        sort_by(&mut left, |&a, &b| draw(a).total_cmp(&draw(b)));
        left.into_iter().skip(kept).for_each(|at| keep[at] = false);
    }
    Tensor::from_vec(keep, [b, n], context.device()).map(Some)
}
