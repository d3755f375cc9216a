//! LayerNorm, ScaleNorm and RMSNorm.

use crate::{Init, Param, ParamStore, Result, Tensor, config::NormPlan};

/// Norm over the features.
///
/// ```
/// use x_transformers::{DType, Device, ParamStore, Tensor, config::NormPlan, nn::Norm};
/// let store = ParamStore::new(0, DType::F32, &Device::Cpu);
/// let norm = Norm::new(NormPlan::Rms(1e-5), 8, &store)?;
/// let x = Tensor::full([2, 8], 3.0, DType::F32, &Device::Cpu)?;
/// assert!((norm.forward(&x)?.to_vec::<f32>()?[0] - 1.0).abs() < 1e-5);
/// # Ok::<(), x_transformers::Error>(())
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
#[doc(alias = "LayerNorm")]
#[doc(alias = "RMSNorm")]
#[doc(alias = "ScaleNorm")]
pub enum Norm {
    /// PyTorch's `nn.LayerNorm`, with eps 1e-5 by default. <https://arxiv.org/abs/1607.06450>
    Layer {
        /// Weight, `[dim]`, initially 1.
        weight: Param,
        /// Bias, `[dim]`, initially 0.
        bias: Param,
        /// Added to the variance.
        eps: f64,
    },
    /// Scale norm: `x / max(|x| dim^-½, 1e-5) · g`. <https://arxiv.org/abs/1910.05895>
    Scale {
        /// Weight, `[1]`, initially 1.
        g: Param,
        /// Floor of the divisor.
        eps: f64,
    },
    /// x-transformers' RMS norm: `x / max(|x| dim^-½, 1e-8) ⊙ g`. <https://arxiv.org/abs/1910.07467>
    ClampedRms {
        /// Weight, `[dim]`, initially 1.
        g: Param,
        /// Floor of the divisor.
        eps: f64,
    },
    /// PyTorch's `nn.RMSNorm`: `x / √(mean(x²) + eps) ⊙ g`.
    Rms {
        /// Weight, `[dim]`, initially 1.
        g: Param,
        /// Added to the mean square.
        eps: f64,
    },
}

impl Norm {
    /// Creates the planned norm over `dim` features.
    pub fn new(plan: NormPlan, dim: usize, store: &ParamStore) -> Result<Self> {
        let one = Init::Constant(1.0);
        Ok(match plan {
            NormPlan::Layer(eps) => Self::Layer {
                weight: store.param("weight", [dim], one)?,
                bias: store.param("bias", [dim], Init::Constant(0.0))?,
                eps,
            },
            NormPlan::Scale(eps) => Self::Scale { g: store.param("g", [1], one)?, eps },
            NormPlan::ClampedRms(eps) => Self::ClampedRms { g: store.param("g", [dim], one)?, eps },
            NormPlan::Rms(eps) => Self::Rms { g: store.param("g", [dim], one)?, eps },
        })
    }

    /// Applies the norm: `[.., dim] → [.., dim]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Layer { weight, bias, eps } => x.layer_norm(Some(&weight.tensor()), Some(&bias.tensor()), *eps),
            Self::Scale { g, eps } => x.scale_norm(&g.tensor(), *eps),
            Self::ClampedRms { g, eps } => x.clamped_rms_norm(&g.tensor(), *eps),
            Self::Rms { g, eps } => x.rms_norm(&g.tensor(), *eps),
        }
    }

    /// Returns the sum of two tensors `[.., dim]`, and its norm.
    pub fn forward_sum(&self, x: &Tensor, residual: &Tensor) -> Result<(Tensor, Tensor)> {
        match self {
            Self::Layer { weight, bias, eps } => {
                x.add_layer_norm(residual, Some(&weight.tensor()), Some(&bias.tensor()), *eps)
            }
            Self::Scale { g, eps } => x.add_scale_norm(residual, &g.tensor(), *eps),
            Self::ClampedRms { g, eps } => x.add_clamped_rms_norm(residual, &g.tensor(), *eps),
            Self::Rms { g, eps } => x.add_rms_norm(residual, &g.tensor(), *eps),
        }
    }
}
