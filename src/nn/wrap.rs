//! What lies around a branch: ReZero, token shift, the macaron's half.

use super::cache::{DecodeStep, LayerCache};
use crate::{Init, Param, ParamStore, Result, Tensor, config::WrapPlan};

/// The wrappers of one branch, outermost first.
#[derive(Clone, Debug)]
pub(super) struct Wrap {
    rezero: Option<Param>,
    shifts: Option<Vec<isize>>,
    half: bool,
}

impl Wrap {
    /// As planned; also gives the place of the branch, one level down for each wrapper.
    pub fn new(plan: &WrapPlan, store: &ParamStore) -> Result<(Self, ParamStore)> {
        let rezero = plan.rezero.then(|| store.param("g", [1], Init::Constant(0.0))).transpose()?;
        let levels = [plan.rezero, plan.shifts.is_some(), plan.half].into_iter().filter(|&level| level);
        let store = levels.fold(store.clone(), |store, _| store.at("fn"));
        Ok((Self { rezero, shifts: plan.shifts.clone(), half: plan.half }, store))
    }

    /// Before the branch. The mask, `[b, n]`, is known to attention alone.
    pub fn input(&self, x: &Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
        match &self.shifts {
            Some(amounts) => x.shift_tokens(amounts, mask),
            None => Ok(x.clone()),
        }
    }

    /// As [`Wrap::input`] for the next positions of sequences; `mask`: whether the branch knows of padding.
    pub fn next_input(&self, x: &Tensor, mask: bool, cache: &mut LayerCache, step: &DecodeStep) -> Result<Tensor> {
        let Some(amounts) = &self.shifts else { return Ok(x.clone()) };
        let history = cache.remember(x, step)?;
        let whole = step.whole_mask.as_ref().filter(|_| mask);
        history.shift_rows(&step.device_lengths, step.n, amounts, whole)
    }

    /// After the branch.
    pub fn output(&self, x: Tensor) -> Result<Tensor> {
        let x = if self.half { x.affine(0.5, 0.0)? } else { x };
        match &self.rezero {
            Some(g) => x.mul(&g.tensor()),
            None => Ok(x),
        }
    }
}
