//! The feedforward branch.

use super::{Linear, Norm};
use crate::{
    ParamStore, Result, Tensor,
    config::{FeedForwardPlan, NormPlan},
    error::ErrorContext,
    ops::Activation,
};

/// Feedforward `W₂ act(W₁ x)`, or gated: `W₂ (a ⊙ act(b))` with `[a, b] = W₁ x` (Shazeer,
/// <https://arxiv.org/abs/2002.05202>).
#[derive(Clone, Debug)]
#[doc(alias = "MLP")]
#[doc(alias = "FFN")]
pub struct FeedForward {
    project_in: Linear,
    activation: Activation,
    gated: bool,
    norm: Option<Norm>,
    dropout: f64,
    project_out: Linear,
}

impl FeedForward {
    /// Creates the planned feedforward.
    ///
    /// Errors: an invalid plan.
    pub fn new(plan: &FeedForwardPlan, store: &ParamStore) -> Result<Self> {
        plan.check()?;
        let net = store.at("net");
        let (place, width) = if plan.glu { ("0.proj", 2 * plan.inner) } else { ("0.0", plan.inner) };
        let project_in = Linear::maybe_biased(&net.at(place), plan.dim, width, plan.bias)?;
        let norm = plan.post_act_ln.then(|| Norm::new(NormPlan::LAYER, plan.inner, &net.at(1))).transpose()?;
        let project_out = Linear::output(&net.at(3), plan.inner, plan.dim_out, plan.bias, plan.zero_init)?;
        let FeedForwardPlan { activation, glu: gated, dropout, .. } = *plan;
        Ok(Self { project_in, activation, gated, norm, dropout, project_out })
    }

    /// Returns the linear layers, for quantization.
    pub(super) fn linears_mut(&mut self) -> impl Iterator<Item = &mut Linear> {
        [&mut self.project_in, &mut self.project_out].into_iter()
    }

    /// Computes the feedforward: `[.., dim] → [.., dim_out]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let inner = match self.gated {
            true => self.project_in.gated(x, self.activation),
            false => self.project_in.activated(x, self.activation),
        };
        let mut inner = inner.context("net.0")?;
        if let Some(norm) = &self.norm {
            inner = norm.forward(&inner).context("net.1")?;
        }
        self.project_out.forward(&inner.dropout(self.dropout)?).context("net.3")
    }
}
