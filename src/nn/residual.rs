//! Residual stream and residual connections.

use super::{Norm, hyper::HyperConnection, positions::unit_length};
use crate::{Init, Param, ParamStore, Result, Tensor, config::ResidualPlan};

/// Residual stream between sublayers, `[.., dim]`: a sum is fused into the norm that follows it.
#[derive(Clone, Debug)]
pub(super) enum Stream {
    Whole(Tensor),
    /// A branch and the residual that it is added to.
    Sum(Tensor, Tensor),
}

impl Stream {
    pub fn whole(self) -> Result<Tensor> {
        match self {
            Self::Whole(x) => Ok(x),
            Self::Sum(branch, residual) => branch.add(&residual),
        }
    }

    /// Returns the stream, and its norm if there is one, otherwise the stream again. `condition` is that of adaptive
    /// norms.
    pub fn normed(self, norm: Option<&Norm>, condition: Option<&Tensor>) -> Result<(Tensor, Tensor)> {
        match (self, norm) {
            (Self::Sum(branch, residual), Some(norm)) if !norm.is_adaptive() => norm.forward_sum(&branch, &residual),
            (stream, norm) => {
                let x = stream.whole()?;
                let normed = norm.map_or_else(|| Ok(x.clone()), |norm| norm.forward_given(&x, condition))?;
                Ok((x, normed))
            }
        }
    }
}

/// Residual connection: a sum, or a GRU cell (Parisotto et al., <https://arxiv.org/abs/1910.06764>); the residual may
/// be scaled first.
#[derive(Clone, Debug)]
pub struct Residual {
    scale: Option<Param>,
    constant: f64,
    gru: Option<GruCell>,
    hyper: Option<HyperConnection>,
    /// Factors of the difference of means, and of the centred branch, `[dim]`.
    split: Option<[Param; 2]>,
    /// If `true`, adds what is orthogonal to the residual.
    orthogonal: bool,
}

impl Residual {
    /// Creates the planned residual over `dim` features.
    pub fn new(plan: ResidualPlan, dim: usize, store: &ParamStore) -> Result<Self> {
        let scale = plan.scaled.then(|| store.param("residual_scale", [dim], Init::Constant(1.0))).transpose()?;
        let gru = plan.gated.then(|| GruCell::new(dim, &store.at("gru"))).transpose()?;
        let hyper = plan.hyper.map(|plan| HyperConnection::new(plan, dim, store)).transpose()?;
        let split = || -> Result<[Param; 2]> {
            let factor = |name: &str, start: f64| store.param(name, [dim], Init::Constant(start));
            Ok([factor("alpha", 0.0)?, factor("beta", 0.03)?])
        };
        let split = plan.split.then(split).transpose()?;
        Ok(Self { scale, constant: plan.constant, gru, hyper, split, orthogonal: plan.orthogonal })
    }

    /// Computes `branch + residual`, or the GRU cell's new state; both `[.., dim]`.
    ///
    /// Errors: shapes or dtypes that do not match.
    pub fn forward(&self, branch: &Tensor, residual: &Tensor) -> Result<Tensor> {
        self.stream(branch.clone(), residual.clone(), None)?.whole()
    }

    /// Like [`Residual::forward`], but leaves a sum to the op that follows. `mask`: padding mask, `[b, n]`.
    pub(super) fn stream(&self, branch: Tensor, residual: Tensor, mask: Option<&Tensor>) -> Result<Stream> {
        if let Some([alpha, beta]) = &self.split {
            let mean = mean_of_tokens(&branch, mask)?;
            let means = mean.sub(&mean_of_tokens(&residual, mask)?)?.mul(&alpha.tensor())?;
            let centred = branch.sub(&mean)?.mul(&beta.tensor())?;
            return Ok(Stream::Whole(residual.add(&centred)?.add(&means)?));
        }
        let residual = match &self.scale {
            Some(scale) => residual.mul(&scale.tensor())?,
            None => residual,
        };
        let residual = if self.constant == 1.0 { residual } else { residual.affine(self.constant, 0.0)? };
        let branch = if self.orthogonal { orthogonal(&branch, &residual)? } else { branch };
        match &self.gru {
            Some(gru) => gru.forward(&branch, &residual).map(Stream::Whole),
            None => Ok(Stream::Sum(branch, residual)),
        }
    }
}

impl Residual {
    /// Returns the hyper-connection, if the streams have one.
    pub(super) fn hyper(&self) -> Option<&HyperConnection> {
        self.hyper.as_ref()
    }
}

/// Returns `x` less its projection onto `y`, each of whose rows is one vector over all tokens and features (Oh et al.,
/// <https://arxiv.org/abs/2505.11881>). Half types compute in f32: such rows are long.
fn orthogonal(x: &Tensor, y: &Tensor) -> Result<Tensor> {
    let wide = x.dtype().accumulator();
    let unit = unit_length(&y.flatten(1, 2)?.to_dtype(wide)?)?;
    let rows = x.flatten(1, 2)?.to_dtype(wide)?;
    let parallel = unit.mul(&rows.mul(&unit)?.sum(&[-1])?.unsqueeze(-1)?)?;
    rows.sub(&parallel)?.to_dtype(x.dtype())?.reshape(*x.shape())
}

/// Returns the mean of the tokens that the mask keeps, `[b, 1, dim]`.
fn mean_of_tokens(x: &Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
    let Some(mask) = mask else { return x.mean(&[1])?.unsqueeze(1) };
    let kept = mask.to_dtype(x.dtype())?.unsqueeze(1)?;
    let counts = kept.sum(&[-1])?.unsqueeze(-1)?;
    let none = counts.lt(&Tensor::ones((), x.dtype(), x.device())?)?;
    kept.matmul(x)?.div(&counts.masked_fill(&none, 1.0)?)
}

/// PyTorch's `nn.GRUCell`: the branch is its input, the residual its hidden state.
#[derive(Clone, Debug)]
struct GruCell {
    weight_ih: Param,
    weight_hh: Param,
    bias_ih: Param,
    bias_hh: Param,
}

impl GruCell {
    fn new(dim: usize, store: &ParamStore) -> Result<Self> {
        let init = Init::linear(dim);
        Ok(Self {
            weight_ih: store.param("weight_ih", [3 * dim, dim], init)?,
            weight_hh: store.param("weight_hh", [3 * dim, dim], init)?,
            bias_ih: store.param("bias_ih", [3 * dim], init)?,
            bias_hh: store.param("bias_hh", [3 * dim], init)?,
        })
    }

    fn forward(&self, x: &Tensor, hidden: &Tensor) -> Result<Tensor> {
        let of_input = x.linear(&self.weight_ih.tensor(), Some(&self.bias_ih.tensor()))?;
        let of_hidden = hidden.linear(&self.weight_hh.tensor(), Some(&self.bias_hh.tensor()))?;
        hidden.gru_gate(&of_input, &of_hidden)
    }
}
