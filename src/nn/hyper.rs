//! Hyper-connections: several residual streams that each sublayer reads from, mixes and writes to.

use crate::{Init, Param, ParamStore, Result, Tensor, config::HyperPlan};

/// Manifold-constrained hyper-connection (<https://arxiv.org/abs/2409.19606>, <https://arxiv.org/abs/2512.24880>).
#[derive(Clone, Debug)]
pub(super) struct HyperConnection {
    /// `[dim]`
    norm: Param,
    /// `[streams]`
    static_beta: Param,
    /// `[streams, 1 + streams]`
    static_alpha: Param,
    /// `[dim, streams + 1]`
    dynamic_alpha_fn: Param,
    dynamic_alpha_scale: Param,
    /// `[dim]`
    dynamic_beta_fn: Param,
    dynamic_beta_scale: Param,
}

impl HyperConnection {
    pub fn new(plan: HyperPlan, dim: usize, store: &ParamStore) -> Result<Self> {
        let streams = plan.streams;
        let (zero, one, small) = (Init::Constant(0.0), Init::Constant(1.0), Init::Constant(1e-2));
        let static_alpha = store.param("static_alpha", [streams, 1 + streams], zero)?;
        let start = |index: usize| {
            let (stream, column) = (index / (1 + streams), index % (1 + streams));
            let reads = if column == 0 { plan.layer % streams == stream } else { column - 1 == stream };
            f64::from(u8::from(reads))
        };
        let value = Tensor::generate([streams, 1 + streams], store.dtype(), store.device(), start)?;
        static_alpha.set(value)?;
        Ok(Self {
            norm: store.at("norm").param("weight", [dim], one)?,
            static_beta: store.param("static_beta", [streams], one)?,
            static_alpha,
            dynamic_alpha_fn: store.param("dynamic_alpha_fn", [dim, streams + 1], zero)?,
            dynamic_alpha_scale: store.param("dynamic_alpha_scale", (), small)?,
            dynamic_beta_fn: store.param("dynamic_beta_fn", [dim], zero)?,
            dynamic_beta_scale: store.param("dynamic_beta_scale", (), small)?,
        })
    }

    /// Returns the input of the branch, `[b, n, dim]`, the mixed streams, `[b, n, 1, dim]`, and the weights with
    /// which the branch's output is added to them, `[b, n, streams, 1]`.
    pub fn prepare(&self, x: &Tensor) -> Result<[Tensor; 3]> {
        let normed = x.layer_norm(Some(&self.norm.tensor()), None, 1e-5)?;
        let reads = self.dynamic_alpha_fn.tensor().narrow(1, 0, 1)?;
        let dynamic = normed.matmul(&reads)?.mul(&self.dynamic_alpha_scale.tensor())?;
        let alpha = dynamic.add(&self.static_alpha.tensor().narrow(1, 0, 1)?)?.sigmoid()?;
        let weight = normed.matmul(&self.dynamic_beta_fn.tensor().unsqueeze(1)?)?.sigmoid()?.affine(2.0, 0.0)?;
        let beta = weight.mul(&self.dynamic_beta_scale.tensor())?.add(&self.static_beta.tensor().unsqueeze(1)?)?;
        let input = x.mul(&alpha)?.sum(&[2])?;
        // Each stream becomes the sum of all: x-transformers runs Sinkhorn's algorithm on single rows, whose entries
        // become 1.
        let mixed = x.sum(&[2])?.unsqueeze(2)?;
        Ok([input, mixed, beta.sigmoid()?.affine(2.0, 0.0)?])
    }

    /// Adds the output of the branch, `[b, n, dim]`, to the streams.
    pub fn join(&self, branch: &Tensor, streams: &Tensor, beta: &Tensor) -> Result<Tensor> {
        branch.unsqueeze(2)?.mul(beta)?.add(streams)
    }
}
