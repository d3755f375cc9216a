//! Wrappers of a branch: ReZero, LayerScale, token shift, the macaron's factor ½.

use super::{Linear, cache::Decode, norm::shifted};
use crate::{
    Error, Init, Param, ParamStore, Result, Tensor,
    config::{LayerScalePlan, WrapPlan},
};

/// Wrappers of one branch, outermost first.
#[derive(Clone, Debug)]
pub(super) struct Wrap {
    scale: Option<f64>,
    rezero: Option<Param>,
    layer_scale: Option<LayerScale>,
    shifts: Option<Vec<isize>>,
    half: bool,
}

/// Learned factors of a branch's features.
#[derive(Clone, Debug)]
enum LayerScale {
    /// The stored factors, and what is added to them.
    Fixed(Param, f64),
    /// From the condition.
    Adaptive(Linear),
}

impl Wrap {
    /// Creates the planned wrappers; also returns the place of the branch, one level down for each wrapper.
    pub fn new(plan: &WrapPlan, dim: usize, store: &ParamStore) -> Result<(Self, ParamStore)> {
        let store = if plan.scale.is_some() { store.at("fn") } else { store.clone() };
        let rezero = plan.rezero.then(|| store.param("g", [1], Init::Constant(0.0))).transpose()?;
        let layer_scale = match plan.layer_scale {
            None => None,
            Some(LayerScalePlan::Fixed { start, offset }) => {
                let gamma = store.param("gamma", [dim], Init::Constant(start - offset))?;
                Some(LayerScale::Fixed(gamma, offset))
            }
            Some(LayerScalePlan::Adaptive(condition)) => {
                let (zero, bias) = (Init::Constant(0.0), Init::Constant(-2.0));
                let to_gamma = Linear::with_init(&store.at("to_gamma"), condition, dim, zero, Some(bias))?;
                Some(LayerScale::Adaptive(to_gamma))
            }
        };
        let levels = [plan.rezero, layer_scale.is_some(), plan.shifts.is_some(), plan.half];
        let store = levels.into_iter().filter(|&level| level).fold(store, |store, _| store.at("fn"));
        Ok((Self { scale: plan.scale, rezero, layer_scale, shifts: plan.shifts.clone(), half: plan.half }, store))
    }

    /// Applies the wrappers before the branch, to whole sequences or to the next positions of those in a cache. `mask`,
    /// `[b, n]`: the padding mask that the branch uses.
    pub fn input(&self, x: &Tensor, mask: Option<&Tensor>, decode: Option<&mut Decode<'_>>) -> Result<Tensor> {
        match (&self.shifts, decode) {
            (None, _) => Ok(x.clone()),
            (Some(amounts), None) => x.shift_tokens(amounts, mask),
            (Some(amounts), Some(Decode { cache, step, .. })) => {
                let whole_mask = step.whole_mask.as_ref().filter(|_| mask.is_some());
                cache.remember(x, step)?.shift_rows(&step.device_lengths, step.n, amounts, whole_mask)
            }
        }
    }

    /// Applies the wrappers after the branch; `condition` is that of adaptive ones, `[b, 1 or n, dim_condition]`.
    pub fn output(&self, x: Tensor, condition: Option<&Tensor>) -> Result<Tensor> {
        let mut x = if self.half { x.affine(0.5, 0.0)? } else { x };
        match (&self.layer_scale, condition) {
            (None, _) => {}
            (Some(LayerScale::Fixed(gamma, offset)), _) => x = x.mul(&shifted(gamma, *offset)?)?,
            (Some(LayerScale::Adaptive(to_gamma)), Some(condition)) => {
                x = x.mul(&to_gamma.forward(condition)?.sigmoid()?)?;
            }
            (Some(LayerScale::Adaptive(_)), None) => {
                return Err(Error::argument("condition", "is missing: the layer scale is adaptive"));
            }
        }
        let x = match &self.rezero {
            Some(g) => x.mul(&g.tensor())?,
            None => x,
        };
        match self.scale {
            Some(scale) => x.affine(scale, 0.0),
            None => Ok(x),
        }
    }
}
