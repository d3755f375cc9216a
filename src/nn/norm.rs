//! LayerNorm, ScaleNorm, RMSNorm and their adaptive forms.

use super::Linear;
use crate::{
    Error, Init, Param, ParamStore, Result, Tensor,
    config::{Gain, NormPlan},
};

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
    /// LayerNorm without a bias, times `gamma + offset`.
    Gamma {
        /// Weight, `[dim]`, initially `1 − offset`.
        gamma: Param,
        /// Added to the variance.
        eps: f64,
        /// Added to the weight.
        offset: f64,
    },
    /// `x √dim / max(|x|, 1e-12)`, times `g + offset`.
    Unit {
        /// Weight, `[dim]` or `[1]`, initially `1 − offset`; `None`: 1.
        g: Option<Param>,
        /// 1 for each feature, `[dim]`.
        ones: Tensor,
        /// Added to the weight.
        offset: f64,
    },
    /// `tanh(x · scale) ⊙ gamma + beta` (Zhu et al., <https://arxiv.org/abs/2503.10622>).
    Tanh {
        /// Scale, a scalar.
        scale: Param,
        /// Weight, `[dim]`.
        gamma: Param,
        /// Bias, `[dim]`, initially 0.
        beta: Param,
        /// Added to the scale and to the weight.
        offsets: [f64; 2],
    },
    /// `erf(x · alpha + s) ⊙ gamma + beta` (Chen et al., <https://arxiv.org/abs/2512.10938>).
    Erf {
        /// Scale, a scalar, initially `0.5 − offset`.
        alpha: Param,
        /// Shift, a scalar, initially 0.
        s: Param,
        /// Weight, `[dim]`, initially `1 − offset`.
        gamma: Param,
        /// Bias, `[dim]`, initially 0.
        beta: Param,
        /// Added to the scale and to the weight.
        offset: f64,
    },
    /// LayerNorm or `x √dim / |x|`, times `W condition + 1` (Peebles and Xie, <https://arxiv.org/abs/2212.09748>).
    Adaptive {
        /// Linear layer from the condition to a scale, initially 0.
        to_gamma: Linear,
        /// 1 for each feature, `[dim]`; `None` for LayerNorm.
        ones: Option<Tensor>,
    },
}

/// Lower bound of `|x| / √dim` in [`Norm::Unit`].
fn floor(dim: usize) -> f64 {
    1e-12 * (dim as f64).powf(-0.5)
}

impl Norm {
    /// Creates the planned norm over `dim` features.
    pub fn new(plan: NormPlan, dim: usize, store: &ParamStore) -> Result<Self> {
        let one = Init::Constant(1.0);
        let ones = || Tensor::ones([dim], store.dtype(), store.device());
        Ok(match plan {
            NormPlan::Layer(eps) => Self::Layer {
                weight: store.param("weight", [dim], one)?,
                bias: store.param("bias", [dim], Init::Constant(0.0))?,
                eps,
            },
            NormPlan::Scale(eps) => Self::Scale { g: store.param("g", [1], one)?, eps },
            NormPlan::ClampedRms(eps) => Self::ClampedRms { g: store.param("g", [dim], one)?, eps },
            NormPlan::Rms(eps) => Self::Rms { g: store.param("g", [dim], one)?, eps },
            NormPlan::Gamma { eps, offset } => {
                Self::Gamma { gamma: store.param("gamma", [dim], Init::Constant(1.0 - offset))?, eps, offset }
            }
            NormPlan::Unit { gain, offset } => {
                let width = match gain {
                    Gain::None => None,
                    Gain::One => Some(1),
                    Gain::Each => Some(dim),
                };
                let g = width.map(|width| store.param("g", [width], Init::Constant(1.0 - offset))).transpose()?;
                Self::Unit { g, ones: ones()?, offset }
            }
            NormPlan::Tanh { alpha, stored_offset } => {
                let offsets = if stored_offset { [alpha, 1.0] } else { [0.0; 2] };
                Self::Tanh {
                    scale: store.param("pre_tanh_scale", (), Init::Constant(alpha - offsets[0]))?,
                    gamma: store.param("gamma", [dim], Init::Constant(1.0 - offsets[1]))?,
                    beta: store.param("beta", [dim], Init::Constant(0.0))?,
                    offsets,
                }
            }
            NormPlan::Erf { offset } => {
                let (alpha, zero) = (Init::Constant(0.5 - offset), Init::Constant(0.0));
                Self::Erf {
                    alpha: store.param("alpha", (), alpha)?,
                    s: store.param("s", (), zero)?,
                    gamma: store.param("gamma", [dim], Init::Constant(1.0 - offset))?,
                    beta: store.param("beta", [dim], zero)?,
                    offset,
                }
            }
            NormPlan::Adaptive { layer, dim_condition } => {
                let place = store.at("to_gamma");
                let to_gamma = Linear::with_init(&place, dim_condition, dim, Init::Constant(0.0), None)?;
                Self::Adaptive { to_gamma, ones: if layer { None } else { Some(ones()?) } }
            }
        })
    }

    /// Applies the norm: `[.., dim] → [.., dim]`.
    ///
    /// Errors: an adaptive norm, which needs [`Norm::forward_given`].
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Layer { weight, bias, eps } => x.layer_norm(Some(&weight.tensor()), Some(&bias.tensor()), *eps),
            Self::Scale { g, eps } => x.scale_norm(&g.tensor(), *eps),
            Self::ClampedRms { g, eps } => x.clamped_rms_norm(&g.tensor(), *eps),
            Self::Rms { g, eps } => x.rms_norm(&g.tensor(), *eps),
            Self::Gamma { gamma, eps, offset } => x.layer_norm(Some(&shifted(gamma, *offset)?), None, *eps),
            Self::Unit { g, ones, offset } => {
                let floor = floor(ones.numel());
                match g {
                    Some(g) if g.tensor().numel() == 1 => x.scale_norm(&shifted(g, *offset)?, floor),
                    Some(g) => x.clamped_rms_norm(&shifted(g, *offset)?, floor),
                    None => x.clamped_rms_norm(ones, floor),
                }
            }
            Self::Tanh { scale, gamma, beta, offsets } => {
                let bounded = x.mul(&shifted(scale, offsets[0])?)?.tanh()?;
                bounded.mul(&shifted(gamma, offsets[1])?)?.add(&beta.tensor())
            }
            Self::Erf { alpha, s, gamma, beta, offset } => {
                let bounded = x.mul(&shifted(alpha, *offset)?)?.add(&s.tensor())?.erf()?;
                bounded.mul(&shifted(gamma, *offset)?)?.add(&beta.tensor())
            }
            Self::Adaptive { .. } => Err(Error::argument("condition", "is missing: the norm is adaptive")),
        }
    }

    /// Applies the norm given the condition of adaptive ones, `[b, 1 or n, dim_condition]`.
    ///
    /// Errors: an adaptive norm without a condition.
    pub fn forward_given(&self, x: &Tensor, condition: Option<&Tensor>) -> Result<Tensor> {
        let (Self::Adaptive { to_gamma, ones }, Some(condition)) = (self, condition) else { return self.forward(x) };
        let normed = match ones {
            Some(ones) => x.clamped_rms_norm(ones, floor(ones.numel()))?,
            None => x.layer_norm(None, None, 1e-5)?,
        };
        normed.mul(&to_gamma.forward(condition)?.affine(1.0, 1.0)?)
    }

    /// Returns the sum of two tensors `[.., dim]`, and its norm.
    ///
    /// Errors: an adaptive norm.
    pub fn forward_sum(&self, x: &Tensor, residual: &Tensor) -> Result<(Tensor, Tensor)> {
        match self {
            Self::Layer { weight, bias, eps } => {
                x.add_layer_norm(residual, Some(&weight.tensor()), Some(&bias.tensor()), *eps)
            }
            Self::Scale { g, eps } => x.add_scale_norm(residual, &g.tensor(), *eps),
            Self::ClampedRms { g, eps } => x.add_clamped_rms_norm(residual, &g.tensor(), *eps),
            Self::Rms { g, eps } => x.add_rms_norm(residual, &g.tensor(), *eps),
            Self::Gamma { gamma, eps, offset } => {
                x.add_layer_norm(residual, Some(&shifted(gamma, *offset)?), None, *eps)
            }
            Self::Unit { g, ones, offset } => {
                let floor = floor(ones.numel());
                match g {
                    Some(g) if g.tensor().numel() == 1 => x.add_scale_norm(residual, &shifted(g, *offset)?, floor),
                    Some(g) => x.add_clamped_rms_norm(residual, &shifted(g, *offset)?, floor),
                    None => x.add_clamped_rms_norm(residual, ones, floor),
                }
            }
            Self::Tanh { .. } | Self::Erf { .. } => {
                let sum = x.add(residual)?;
                let normed = self.forward(&sum)?;
                Ok((sum, normed))
            }
            Self::Adaptive { .. } => Err(Error::argument("condition", "is missing: the norm is adaptive")),
        }
    }

    /// Returns `true` if the norm needs a condition.
    pub(super) fn is_adaptive(&self) -> bool {
        matches!(self, Self::Adaptive { .. })
    }
}

/// Returns a weight plus the offset that its stored value lacks.
pub(super) fn shifted(weight: &Param, offset: f64) -> Result<Tensor> {
    if offset == 0.0 { Ok(weight.tensor()) } else { weight.tensor().affine(1.0, offset) }
}
