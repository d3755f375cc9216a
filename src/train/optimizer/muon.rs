//! Directions of Muon.

use super::{MuonOptions, adafactor::at_least};
use crate::{Result, Tensor, collect::CollectVec};

/// Largest number of elements that are orthogonalized at a time, unless one matrix has more: small matrices share
/// products, and large ones need no copy of all of them.
const BATCH: usize = 1 << 22;

/// Returns the new running mean of gradients, and the matrix to orthogonalize. All are of the state's type.
pub(super) fn momentum(grad: &Tensor, mean: &Tensor, options: MuonOptions) -> Result<(Tensor, Tensor)> {
    let MuonOptions { momentum, nesterov, .. } = options;
    let grad_part = grad.affine(1.0 - momentum, 0.0)?;
    let mean = mean.affine(momentum, 0.0)?.add(&grad_part)?;
    let direction = if nesterov { grad_part.add(&mean.affine(momentum, 0.0)?)? } else { mean.clone() };
    Ok((mean, direction))
}

/// Replaces matrices by the nearest ones whose singular values are all near 1. Equal shapes are computed together.
pub(super) fn orthogonalize(matrices: &mut [(Tensor, MuonOptions)]) -> Result<()> {
    let mut done = vec![false; matrices.len()];
    for first in 0..matrices.len() {
        if done[first] {
            continue;
        }
        let (like, options) = matrices[first].clone();
        let most = (BATCH / like.numel().max(1)).max(1);
        let alike = |(matrix, its): &(Tensor, MuonOptions)| {
            matrix.shape() == like.shape()
                && matrix.dtype() == like.dtype()
                && matrix.device() == like.device()
                && *its == options
        };
        let batch: Vec<usize> =
            (first..matrices.len()).filter(|&at| !done[at] && alike(&matrices[at])).take(most).collect();
        let stacked = batch.iter().map(|&at| matrices[at].0.unsqueeze(0)).try_collect_vec()?;
        let results = newton_schulz(&Tensor::cat(&stacked.iter().collect_vec(), 0)?, options)?;
        for (index, &at) in batch.iter().enumerate() {
            matrices[at].0 = results.narrow(0, index, 1)?.squeeze(0)?.contiguous()?;
            done[at] = true;
        }
    }
    Ok(())
}

/// Orthogonalizes each matrix of a batch, `[batch, rows, cols]`.
fn newton_schulz(x: &Tensor, options: MuonOptions) -> Result<Tensor> {
    let MuonOptions { ns_coefficients: [a, b, c], ns_steps, eps, .. } = options;
    if x.numel() == 0 {
        return Ok(x.clone());
    }
    let tall = x.shape()[1] > x.shape()[2];
    let mut x = if tall { x.transpose(1, 2)?.contiguous()? } else { x.clone() };
    let norm = x.square()?.sum(&[-2, -1])?.sqrt()?.unsqueeze(-1)?.unsqueeze(-1)?;
    // The largest singular value is at most the norm.
    x = x.div(&at_least(&norm, eps)?)?;
    for _ in 0..ns_steps {
        let gram = x.matmul(&x.transpose(1, 2)?)?;
        let update = gram.affine(b, 0.0)?.add(&gram.matmul(&gram)?.affine(c, 0.0)?)?;
        x = x.affine(a, 0.0)?.add(&update.matmul(&x)?)?;
    }
    if tall { x.transpose(1, 2) } else { Ok(x) }
}
