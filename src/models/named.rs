//! Models with inputs and outputs of their own, run by name.

use std::fmt;

use super::{RunOptions, model_inputs::Inputs};
use crate::{
    Error, Result, Tensor,
    config::{Call, GenerateCall},
};

/// A model whose forward pass has one output.
pub(super) trait NamedModel: fmt::Debug + Send + Sync {
    /// Returns the output and its name, `loss` or `out`.
    fn pass(&self, inputs: &mut Inputs, call: &Call, run: &RunOptions) -> Result<(&'static str, Tensor)>;

    /// Returns `true` if the model generates the tokens between a prompt and a suffix. Default `false`.
    fn generates_to_suffix(&self) -> bool {
        false
    }

    /// Generates tokens.
    fn generate(
        &self,
        _inputs: &mut Inputs,
        _call: &Call,
        _generate: &GenerateCall,
        _run: &RunOptions,
    ) -> Result<Tensor> {
        Err(Error::option("method", "\"generate\" requires a model that generates tokens").context("call"))
    }
}
