//! Gates of the aggregated values.

use super::Attention;
use crate::{
    Init, ParamStore, Result, Tensor,
    config::{GateForm, ValueGate},
    error::ErrorContext,
    nn::Linear,
};

/// Projection to the logits of a gate.
#[derive(Clone, Debug)]
pub(super) enum Gate {
    /// One layer.
    Full(Linear),
    /// Two layers, and `true` if there is a SiLU between them.
    LowRank([Linear; 2], bool),
}

impl Gate {
    /// Creates a gate of `width` features, or one per head; a full one has these initial values.
    pub fn new(
        store: &ParamStore,
        [dim, width, heads]: [usize; 3],
        form: GateForm,
        weight: Init,
        bias: Option<Init>,
    ) -> Result<Self> {
        let width = if form.headwise { heads } else { width };
        let Some(rank) = form.rank else { return Ok(Self::Full(Linear::with_init(store, dim, width, weight, bias)?)) };
        let down = Linear::without_bias(&store.at("down"), dim, rank)?;
        Ok(Self::LowRank([down, Linear::output(&store.at("up"), rank, width, false, true)?], form.silu))
    }

    /// Computes the logits: `[b, n, dim] → [b, n, width]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Full(linear) => linear.forward(x),
            Self::LowRank([down, up], silu) => {
                let inner = down.forward(x).context("down")?;
                up.forward(&if *silu { inner.silu()? } else { inner }).context("up")
            }
        }
    }

    /// Returns the linear layers.
    pub fn linears_mut(&mut self) -> impl Iterator<Item = &mut Linear> {
        let linears: &mut [Linear] = match self {
            Self::Full(linear) => std::slice::from_mut(linear),
            Self::LowRank(linears, _) => linears,
        };
        linears.iter_mut()
    }
}

impl Attention {
    /// Multiplies the output of the heads, `[b, n, heads · d]`, by the gates of the layer's input and of itself.
    pub(super) fn gated(&self, x: &Tensor, out: Tensor) -> Result<Tensor> {
        let of_input = self.to_v_gate.as_ref().map(|gate| gate.forward(x).context("to_v_gate")).transpose()?;
        let of_output = self.to_output_gate.as_ref().map(|gate| gate.forward(&out).context("to_output_gate"));
        let heads = self.plan.heads;
        let by_head = |x: &Tensor| x.reshape([x.dim(0)?, x.dim(1)?, heads, x.dim(2)? / heads]);
        let logits = match (of_input, of_output.transpose()?) {
            (None, None) => return Ok(out),
            (Some(logits), None) if !self.plan.gate_form.headwise => logits,
            (Some(logits), None) | (None, Some(logits)) => by_head(&logits)?,
            (Some(a), Some(b)) => by_head(&a)?.add(&by_head(&b)?)?,
        };
        let silu = self.plan.gate_values == ValueGate::Silu || self.plan.silu_gates;
        let gate = if silu { logits.silu()? } else { logits.sigmoid()? };
        if gate.rank() == 3 { out.mul(&gate) } else { by_head(&out)?.mul(&gate)?.flatten(2, 3) }
    }
}
