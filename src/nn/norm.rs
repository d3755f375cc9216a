//! LayerNorm, ScaleNorm and RMSNorm.

use crate::{Init, Param, ParamStore, Result, Tensor, config::NormPlan};

/// A norm over the features.
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
    /// PyTorch's `nn.LayerNorm`, eps 1e-5 unless told otherwise. <https://arxiv.org/abs/1607.06450>
    Layer {
        /// Starts at 1, `[dim]`.
        weight: Param,
        /// Starts at 0, `[dim]`.
        bias: Param,
        /// Added to the variance.
        eps: f64,
    },
    /// `x / max(|x| dim^-½, 1e-5) · g`. <https://arxiv.org/abs/1910.05895>
    Scale {
        /// Starts at 1, `[1]`.
        g: Param,
        /// The least length.
        eps: f64,
    },
    /// `x / max(|x| dim^-½, 1e-8) ⊙ g`. <https://arxiv.org/abs/1910.07467>
    ClampedRms {
        /// Starts at 1, `[dim]`.
        g: Param,
        /// The least length.
        eps: f64,
    },
    /// `x / √(mean(x²) + eps) ⊙ g`, PyTorch's `nn.RMSNorm`.
    Rms {
        /// Starts at 1, `[dim]`.
        g: Param,
        /// Added to the mean square.
        eps: f64,
    },
}

impl Norm {
    /// The planned norm over `dim` features.
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

    /// `[.., dim] → [.., dim]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Layer { weight, bias, eps } => x.layer_norm(Some(&weight.tensor()), Some(&bias.tensor()), *eps),
            Self::Scale { g, eps } => x.scale_norm(&g.tensor(), *eps),
            Self::ClampedRms { g, eps } => x.clamped_rms_norm(&g.tensor(), *eps),
            Self::Rms { g, eps } => x.rms_norm(&g.tensor(), *eps),
        }
    }

    /// The sum of two tensors `[.., dim]`, and the norm of it.
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
