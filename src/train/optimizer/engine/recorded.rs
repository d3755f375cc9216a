//! Steps of AdamW that a graph holds: their numbers are on the device.

use std::borrow::Cow;

use super::{Engine, Named, Planned, State, settings, with_gradients};
use crate::{
    Error, Gradients, ParamMap, Result, Tensor,
    collect::CollectVec,
    ops::{
        adamw::{Rule, adamw_recorded, clip_on_device, compile},
        momentum::Sgd,
    },
    ordered::OrderedMap,
    train::optimizer::{OptimizerOptions, groups::Resolved},
};

impl Engine {
    /// Enqueues a step of AdamW whose numbers are on the device when it runs. Gives the norm and the factor of the
    /// gradients as [`clip_on_device`] does, and the names of the parameters, whose step the caller counts.
    ///
    /// `given`: what gradients are multiplied by and the largest norm. `factors`: [`Engine::factors`]. `creates`: if `true`,
    /// states that are missing are created, which a graph must not do; otherwise they are an error.
    pub(in crate::train) fn record(
        &mut self,
        params: &ParamMap,
        grads: &Gradients,
        given: &Tensor,
        factors: &Tensor,
        creates: bool,
    ) -> Result<(Tensor, Vec<String>)> {
        let (named, packed) = with_gradients(params, grads)?;
        if let Some((name, _)) = named.iter().find(|(name, _)| !creates && self.state.get(*name).is_none()) {
            return Err(Error::argument("graph", format_args!("`{name}` had no gradient in the steps before")));
        }
        let norm = clip_on_device(&packed, given)?;
        let grad_scale = norm.narrow(0, 1, 1)?;
        let positions: OrderedMap<&str, usize> = params.unique().map(|(name, _)| name).zip(0..).collect();
        let place = |(name, _): &Named| factors.narrow(0, positions[name], 1)?.address();
        let places = named.iter().map(place).try_collect_vec()?;
        compile(named.iter().zip(&packed).map(|((_, param), grad)| {
            let value = param.tensor();
            ("adamw_recorded", value.device().clone(), [value.dtype(), grad.dtype()])
        }))?;
        self.prepare(&named, &self.resolve(params, &named))?;
        // The rule is the kernel's own: only the tensors count.
        let rule = Rule::Sgd(Sgd::direction(1.0, 0.0));
        let plan = packed.iter().map(|grad| Planned { rule, grad: Cow::Borrowed(grad), next: None }).collect_vec();
        self.update(&named, &plan, |updates| adamw_recorded(updates, &places, &grad_scale))?;
        Ok((norm, named.into_iter().map(|(name, _)| name.to_string()).collect_vec()))
    }

    /// Returns AdamW's numbers of the next step of every parameter, or of a later one with `ahead` steps before it, in the
    /// order of [`ParamMap::unique`].
    pub(in crate::train) fn factors(&self, params: &ParamMap, lr: f64, ahead: u64) -> Vec<f64> {
        let named = params.unique().collect_vec();
        let next = |name: &str| self.state.get(name).map_or(0, |state| state.step) + 1 + ahead;
        let factors = |((name, _), Resolved { options, lr: ratio }): (&Named, Resolved)| match options {
            OptimizerOptions::AdamW(options) => settings(options, next(name), lr * ratio, 1.0).factors(),
            // No other optimizer is recorded.
            _ => [0.0; 7],
        };
        named.iter().zip(self.resolve(params, &named)).flat_map(factors).collect_vec()
    }

    /// Returns `true` if nothing else shares the tensors of the state, which a recorded step updates in place.
    pub(in crate::train) fn is_unique(&mut self) -> bool {
        let states = self.state.values_mut().iter_mut();
        states.flat_map(|State { tensors, master, .. }| tensors.iter_mut().chain(master)).all(Tensor::is_unique)
    }
}
