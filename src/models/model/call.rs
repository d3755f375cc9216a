//! Checks of calls against the class of a model.

use super::{Kind, Model};
use crate::{
    Error, Result,
    autograd::dropout_stream,
    config::{Call, Recurrence},
    error::ensure,
    models::TransformerWrapper,
};

impl Model {
    /// Returns the wrapper that a call runs with its options, if the model has one.
    fn net(&self) -> Option<&TransformerWrapper> {
        match &self.kind {
            Kind::Transformer(net) | Kind::MultiInput(net, _) => Some(net),
            Kind::Autoregressive(model) => Some(&model.net),
            Kind::XValLoss(model) => Some(&model.net),
            Kind::Xl(model) => Some(&model.net),
            Kind::Masked(model) => Some(&model.net),
            _ => None,
        }
    }

    /// Checks that the model uses the options of a call.
    ///
    /// Errors: one that it would ignore.
    pub(super) fn check_call(&self, call: &Call) -> Result<()> {
        let recurs = self.net().is_some();
        let has_layers = matches!(self.kind, Kind::Layers(_) | Kind::Continuous(_) | Kind::ContinuousAutoregressive(_));
        let to_suffix = matches!(&self.kind, Kind::Named(model) if model.generates_to_suffix());
        let ignored = [
            ("layers_execute_order", call.layers_execute_order.is_some() && !recurs && !has_layers),
            ("recycle_steps", call.recycle_steps.is_some() && !recurs),
            ("looped_steps", call.looped_steps.is_some() && !recurs),
        ];
        if let Some((name, _)) = ignored.into_iter().find(|(_, ignored)| *ignored) {
            return Err(Error::option(name, "not supported by this model").context("call"));
        }
        ensure!(
            to_suffix || !call.suffix_cond,
            Error::option("method", "\"generate_with_suffix_cond\" is for BeliefStateWrapper").context("call")
        );
        Ok(())
    }

    /// Checks that a call outside of training gives the number of passes of a model with `recycling`, like
    /// x-transformers.
    ///
    /// Errors: a call without it.
    pub(super) fn check_recycled(&self, call: &Call) -> Result<()> {
        let recycles = self.net().is_some_and(|net| matches!(net.plan().recurrence, Recurrence::Recycled(_)));
        ensure!(
            !recycles || call.recycle_steps.is_some() || dropout_stream("recycle_steps").is_some(),
            Error::argument("recycle_steps", "is missing: only training draws it")
        );
        Ok(())
    }
}
