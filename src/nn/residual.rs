//! The residual stream, and how a branch joins it.

use super::Norm;
use crate::{Init, Param, ParamStore, Result, Tensor, config::ResidualPlan};

/// The residual stream between sublayers, `[.., dim]`: a sum is left to the norm after it, which computes it on the
/// way.
#[derive(Clone, Debug)]
pub(super) enum Stream {
    Whole(Tensor),
    /// A branch and what it is added to.
    Sum(Tensor, Tensor),
}

impl Stream {
    pub fn whole(self) -> Result<Tensor> {
        match self {
            Self::Whole(x) => Ok(x),
            Self::Sum(branch, residual) => branch.add(&residual),
        }
    }

    /// The stream, and its norm if there is one, else the stream again.
    pub fn normed(self, norm: Option<&Norm>) -> Result<(Tensor, Tensor)> {
        match (self, norm) {
            (Self::Sum(branch, residual), Some(norm)) => norm.forward_sum(&branch, &residual),
            (stream, norm) => {
                let x = stream.whole()?;
                let normed = norm.map_or_else(|| Ok(x.clone()), |norm| norm.forward(&x))?;
                Ok((x, normed))
            }
        }
    }
}

/// A sum, or a GRU cell (Parisotto et al., <https://arxiv.org/abs/1910.06764>); the residual may be scaled first.
#[derive(Clone, Debug)]
pub struct Residual {
    scale: Option<Param>,
    gru: Option<GruCell>,
}

impl Residual {
    /// The planned residual over `dim` features.
    pub fn new(plan: ResidualPlan, dim: usize, store: &ParamStore) -> Result<Self> {
        let scale = plan.scaled.then(|| store.param("residual_scale", [dim], Init::Constant(1.0))).transpose()?;
        let gru = plan.gated.then(|| GruCell::new(dim, &store.at("gru"))).transpose()?;
        Ok(Self { scale, gru })
    }

    /// `branch + residual`, or the GRU cell's new state; both `[.., dim]`.
    ///
    /// Errors: shapes or dtypes that do not fit.
    pub fn forward(&self, branch: &Tensor, residual: &Tensor) -> Result<Tensor> {
        self.stream(branch.clone(), residual.clone())?.whole()
    }

    /// As [`Residual::forward`], a sum being left to what follows.
    pub(super) fn stream(&self, branch: Tensor, residual: Tensor) -> Result<Stream> {
        let residual = match &self.scale {
            Some(scale) => residual.mul(&scale.tensor())?,
            None => residual,
        };
        match &self.gru {
            Some(gru) => gru.forward(&branch, &residual).map(Stream::Whole),
            None => Ok(Stream::Sum(branch, residual)),
        }
    }
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
