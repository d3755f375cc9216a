//! The feedforward branch.

use super::{Linear, Norm, attention::soft_clamp};
use crate::{
    Init, Param, ParamStore, Result, Tensor,
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
    tanh: bool,
    /// Norm after SoLU.
    solu: Option<Norm>,
    softclamp: Option<f64>,
    /// Bounds of the gate and of the other factor.
    glu_softclamp: Option<[f64; 2]>,
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
        let place = match (plan.glu, plan.softclamp) {
            (true, _) => "0.act.norm",
            (false, None) => "0.1.norm",
            (false, Some(_)) => "0.2.norm",
        };
        let plain = NormPlan::Gamma { eps: 1e-5, offset: 0.0 };
        let solu = plan.solu.then(|| Norm::new(plain, plan.inner, &net.at(place))).transpose()?;
        let out = net.at(plan.place.1);
        let project_out =
            Linear::output_at(&out, [plan.inner, plan.dim_out], plan.bias[1], plan.zero_init, plan.output_depth)?;
        Ok(Self {
            project_in,
            activation: plan.activation,
            tanh: plan.tanh,
            solu,
            softclamp: plan.softclamp,
            glu_softclamp: plan.glu_softclamp,
            gated: plan.glu,
            mult_bias,
            norm,
            dropouts: [plan.dropout, plan.sublayer_dropout],
            project_out,
            place: plan.place,
        })
    }

    /// Returns the linear layers, for quantization.
    pub(super) fn linears_mut(&mut self) -> impl Iterator<Item = &mut Linear> {
        [&mut self.project_in, &mut self.project_out].into_iter()
    }

    /// Computes the feedforward: `[.., dim] → [.., dim_out]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let own = self.tanh || self.solu.is_some() || self.softclamp.is_some() || self.glu_softclamp.is_some();
        let inner = match self.gated {
            _ if own => self.by_parts(x),
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

    /// Computes the first layer and an activation that is not fused, which gates the other half if the feedforward is
    /// gated.
    fn by_parts(&self, x: &Tensor) -> Result<Tensor> {
        let hidden = self.project_in.forward(x)?;
        if !self.gated {
            return self.activated(match self.softclamp {
                Some(bound) => soft_clamp(&hidden, bound)?,
                None => hidden,
            });
        }
        let half = hidden.dim(-1)? / 2;
        let (up, gate) = (hidden.narrow(-1, 0, half)?, hidden.narrow(-1, half, half)?.contiguous()?);
        match self.glu_softclamp {
            None => up.mul(&self.activated(gate)?),
            Some([of_gate, of_up]) => {
                soft_clamp(&up, of_up)?.mul(&self.activated(gate.clone())?.mul(&clamped_share(&gate, of_gate)?)?)
            }
        }
    }

    fn activated(&self, x: Tensor) -> Result<Tensor> {
        match &self.solu {
            Some(norm) => norm.forward(&x.softmax()?.mul(&x)?),
            None if self.tanh => x.tanh(),
            None => self.activation.of(&x),
        }
    }
}

/// Computes `bound · tanh(x / bound) / x`.
fn clamped_share(x: &Tensor, bound: f64) -> Result<Tensor> {
    let x = x.affine(1.0 / bound, 0.0)?;
    let square = x.square()?;
    let limit = Tensor::full((), 1e-4, x.dtype(), x.device())?;
    let small = square.detach().lt(&limit)?;
    // 1 − x² / 3 + 2 x⁴ / 15, whose error is below 1e-13 there.
    let series = square.mul(&square.affine(2.0 / 15.0, -1.0 / 3.0)?)?.affine(1.0, 1.0)?;
    let divisor = small.where_cond(&Tensor::ones((), x.dtype(), x.device())?, &x)?;
    small.where_cond(&series, &divisor.tanh()?.div(&divisor)?)
}
