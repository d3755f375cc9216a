//! Backward rules: how an op returns the gradients of its inputs.

use crate::{
    Result,
    shape::Shape,
    tensor::{GradSlice, Tensor},
};

/// One backward rule: a struct of what the op saved.
#[doc(alias = "Function")]
#[doc(alias = "CustomOp")]
pub trait Backward {
    /// The op, for messages.
    fn name(&self) -> &'static str;

    /// Takes the gradient of the output and returns one contribution per recorded input.
    ///
    /// `need[i]`: if `true`, input `i` wants one. `grad` has the output's shape and dtype, any layout, and may be
    /// overwritten if it is the only handle on its storage.
    fn backward(self: Box<Self>, grad: Tensor, need: &[bool]) -> Result<InputGrads>;

    /// Optional fusion hook: receives the gradient that later ops have given to the first input so far.
    ///
    /// A rule that can add it to its own in the same pass keeps it, returns `None`, and returns the sum of both as a
    /// whole contribution. The default returns it unchanged. What is returned must have the input's shape, dtype and
    /// device.
    fn accumulate_into(&mut self, sum: Tensor) -> Option<Tensor> {
        Some(sum)
    }
}

/// A backward rule's gradient for one input.
#[derive(Debug)]
pub enum InputGrad {
    /// Nothing.
    None,
    /// A gradient of the input's shape, dtype and device.
    Whole(Tensor),
    /// A gradient for a part of the input, the rest being zero; saves building full-size zeros per view.
    Slice {
        /// Of the whole input.
        shape: Shape,
        /// The elements of it that the gradient covers.
        part: GradSlice,
        /// The gradient of the part.
        value: Tensor,
    },
}

/// The gradients that a backward rule returns.
#[derive(Debug)]
pub struct InputGrads {
    pub(super) inputs: Vec<InputGrad>,
}

impl InputGrads {
    /// One contribution per input, in the order in which they were recorded.
    pub fn new(inputs: Vec<InputGrad>) -> Self {
        Self { inputs }
    }

    /// For an op with one differentiable input.
    pub fn one(grad: Tensor) -> Self {
        Self::new(vec![InputGrad::Whole(grad)])
    }

    /// Whole gradients, or none where the input needs none.
    pub fn whole(grads: impl IntoIterator<Item = Option<Tensor>>) -> Self {
        Self::new(grads.into_iter().map(|grad| grad.map_or(InputGrad::None, InputGrad::Whole)).collect())
    }
}
