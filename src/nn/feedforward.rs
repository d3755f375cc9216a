//! The feedforward branch.

use super::{Linear, Norm};
use crate::{Init, Param, ParamStore, Result, Tensor, config::FeedForwardPlan, error::ErrorContext, ops::Activation};

/// Feedforward `W₂ act(W₁ x)`, or gated: `W₂ (a ⊙ act(b))` with `[a, b] = W₁ x` (Shazeer,
/// <https://arxiv.org/abs/2002.05202>).
#[derive(Clone, Debug)]
#[doc(alias = "MLP")]
#[doc(alias = "FFN")]
pub struct FeedForward {
    project_in: Linear,
    activation: Activation,
    tanh: bool,
    gated: bool,
    mult_bias: Option<Param>,
    norm: Option<Norm>,
    dropouts: [f64; 2],
    project_out: Linear,
    place: (&'static str, usize),
}

impl FeedForward {
    /// Creates the planned feedforward.
    ///
    /// Errors: an invalid plan.
    pub fn new(plan: &FeedForwardPlan, store: &ParamStore) -> Result<Self> {
        plan.check()?;
        let net = store.at(plan.place.0);
        let (place, width) = if plan.glu { ("0.proj", 2 * plan.inner) } else { ("0.0", plan.inner) };
        let project_in = Linear::maybe_biased(&net.at(place), plan.dim, width, plan.bias[0])?;
        let mult_bias =
            plan.mult_bias.then(|| net.at(0).param("mult_bias", [plan.inner], Init::Constant(1.0))).transpose()?;
        let norm = plan.norm.map(|norm| Norm::new(norm, plan.inner, &net.at(1))).transpose()?;
        let out = net.at(plan.place.1);
        let project_out = Linear::output(&out, plan.inner, plan.dim_out, plan.bias[1], plan.zero_init)?;
        let FeedForwardPlan { activation, tanh, glu: gated, dropout, sublayer_dropout, place, .. } = *plan;
        let dropouts = [dropout, sublayer_dropout];
        Ok(Self { project_in, activation, tanh, gated, mult_bias, norm, dropouts, project_out, place })
    }

    /// Returns the linear layers, for quantization.
    pub(super) fn linears_mut(&mut self) -> impl Iterator<Item = &mut Linear> {
        [&mut self.project_in, &mut self.project_out].into_iter()
    }

    /// Computes the feedforward: `[.., dim] → [.., dim_out]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let inner = match self.gated {
            _ if self.tanh => self.by_tanh(x),
            true => self.project_in.gated(x, self.activation),
            false => self.project_in.activated(x, self.activation),
        };
        let (net, last) = self.place;
        let mut inner = inner.context(0).context(net)?;
        if let Some(bias) = &self.mult_bias {
            inner = inner.mul(&bias.tensor())?;
        }
        if let Some(norm) = &self.norm {
            inner = norm.forward(&inner).context(1).context(net)?;
        }
        let out = self.project_out.forward(&inner.dropout(self.dropouts[0])?).context(last).context(net)?;
        out.dropout(self.dropouts[1])
    }

    /// Computes the first layer and tanh, which gates the other half if the feedforward is gated.
    fn by_tanh(&self, x: &Tensor) -> Result<Tensor> {
        let hidden = self.project_in.forward(x)?;
        if !self.gated {
            return hidden.tanh();
        }
        let half = hidden.dim(-1)? / 2;
        hidden.narrow(-1, 0, half)?.mul(&hidden.narrow(-1, half, half)?.tanh()?)
    }
}
