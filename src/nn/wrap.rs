//! Wrappers of a branch: ReZero, token shift, the macaron's factor ½.

use super::cache::Decode;
use crate::{Init, Param, ParamStore, Result, Tensor, config::WrapPlan};

/// Wrappers of one branch, outermost first.
#[derive(Clone, Debug)]
pub(super) struct Wrap {
    rezero: Option<Param>,
    shifts: Option<Vec<isize>>,
    half: bool,
}

impl Wrap {
    /// Creates the planned wrappers; also returns the place of the branch, one level down for each wrapper.
    pub fn new(plan: &WrapPlan, store: &ParamStore) -> Result<(Self, ParamStore)> {
        let rezero = plan.rezero.then(|| store.param("g", [1], Init::Constant(0.0))).transpose()?;
        let levels = [plan.rezero, plan.shifts.is_some(), plan.half].into_iter().filter(|&level| level);
        let store = levels.fold(store.clone(), |store, _| store.at("fn"));
        Ok((Self { rezero, shifts: plan.shifts.clone(), half: plan.half }, store))
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

    /// Applies the wrappers after the branch.
    pub fn output(&self, x: Tensor) -> Result<Tensor> {
        let x = if self.half { x.affine(0.5, 0.0)? } else { x };
        match &self.rezero {
            Some(g) => x.mul(&g.tensor()),
            None => Ok(x),
        }
    }
}
