//! The feedforward branch.

use super::{Linear, Norm};
use crate::{Result, Store, Tensor, config, config::FeedForwardPlan, error::At, ops::Activation};

/// `W₂ act(W₁ x)`, or gated: `W₂ (a ⊙ act(b))` with `[a, b] = W₁ x` (Shazeer, <https://arxiv.org/abs/2002.05202>).
#[derive(Clone, Debug)]
pub struct FeedForward {
    project_in: Linear,
    activation: Activate,
    norm: Option<Norm>,
    dropout: f64,
    project_out: Linear,
}

/// What follows the first projection.
#[derive(Clone, Copy, Debug)]
enum Activate {
    Gelu,
    ReluSquared,
    Gated(Activation),
}

impl FeedForward {
    /// As planned.
    pub fn new(plan: &FeedForwardPlan, store: &Store) -> Result<Self> {
        let net = store.at("net");
        let (project_in, activation) = match (plan.glu, plan.activation) {
            (true, gate) => (Linear::new(&net.at("0.proj"), plan.dim, 2 * plan.inner)?, Activate::Gated(gate)),
            (false, Activation::ReluSquared) => {
                (Linear::new(&net.at("0.0"), plan.dim, plan.inner)?, Activate::ReluSquared)
            }
            (false, _) => (Linear::new(&net.at("0.0"), plan.dim, plan.inner)?, Activate::Gelu),
        };
        let norm = plan.post_act_ln.then(|| Norm::new(config::Norm::Layer, plan.inner, &net.at(1))).transpose()?;
        let project_out = Linear::output(&net.at(3), plan.inner, plan.dim_out, plan.zero_init)?;
        Ok(Self { project_in, activation, norm, dropout: plan.dropout, project_out })
    }

    /// Its linear layers.
    pub(super) fn linears_mut(&mut self) -> impl Iterator<Item = &mut Linear> {
        [&mut self.project_in, &mut self.project_out].into_iter()
    }

    /// `[.., dim] → [.., dim_out]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let inner = self.project_in.forward(x).at("net.0")?;
        let mut inner = match self.activation {
            Activate::Gelu => inner.gelu()?,
            Activate::ReluSquared => inner.relu_squared()?,
            Activate::Gated(gate) => inner.glu(gate)?,
        };
        if let Some(norm) = &self.norm {
            inner = norm.forward(&inner).at("net.1")?;
        }
        self.project_out.forward(&inner.dropout(self.dropout)?).at("net.3")
    }
}
