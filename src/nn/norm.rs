//! LayerNorm, ScaleNorm and RMSNorm.

use crate::{Init, Param, Result, Store, Tensor, config};

const LAYER_EPS: f64 = 1e-5;
const SCALE_EPS: f64 = 1e-5;
const RMS_EPS: f64 = 1e-8;

/// A norm over the features.
#[derive(Clone, Debug)]
pub enum Norm {
    /// PyTorch's `nn.LayerNorm`, eps 1e-5. <https://arxiv.org/abs/1607.06450>
    Layer {
        /// Starts at 1, `[dim]`.
        weight: Param,
        /// Starts at 0, `[dim]`.
        bias: Param,
    },
    /// `x / max(|x| dim^-½, 1e-5) · g`. <https://arxiv.org/abs/1910.05895>
    Scale {
        /// Starts at 1, `[1]`.
        g: Param,
    },
    /// `x / max(|x| dim^-½, 1e-8) ⊙ g`. <https://arxiv.org/abs/1910.07467>
    Rms {
        /// Starts at 1, `[dim]`.
        g: Param,
    },
}

impl Norm {
    /// A norm of this kind over `dim` features.
    pub fn new(kind: config::Norm, dim: usize, store: &Store) -> Result<Self> {
        let one = Init::Constant(1.0);
        Ok(match kind {
            config::Norm::Layer => Self::Layer {
                weight: store.param("weight", [dim], one)?,
                bias: store.param("bias", [dim], Init::Constant(0.0))?,
            },
            config::Norm::Scale => Self::Scale { g: store.param("g", [1], one)? },
            config::Norm::Rms => Self::Rms { g: store.param("g", [dim], one)? },
        })
    }

    /// `[.., dim] → [.., dim]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Layer { weight, bias } => x.layer_norm(Some(&weight.tensor()), Some(&bias.tensor()), LAYER_EPS),
            Self::Scale { g } => x.scale_norm(&g.tensor(), SCALE_EPS),
            Self::Rms { g } => x.rms_norm(&g.tensor(), RMS_EPS),
        }
    }

    /// The sum of two tensors `[.., dim]`, and the norm of it.
    pub fn forward_sum(&self, x: &Tensor, residual: &Tensor) -> Result<(Tensor, Tensor)> {
        match self {
            Self::Layer { weight, bias } => {
                x.add_layer_norm(residual, Some(&weight.tensor()), Some(&bias.tensor()), LAYER_EPS)
            }
            Self::Scale { g } => x.add_scale_norm(residual, &g.tensor(), SCALE_EPS),
            Self::Rms { g } => x.add_rms_norm(residual, &g.tensor(), RMS_EPS),
        }
    }
}
