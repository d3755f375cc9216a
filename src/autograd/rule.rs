//! Backward rules: how an op returns the gradients of its inputs.

use crate::{
    DType, Result,
    collect::CollectVec,
    shape::Shape,
    tensor::{GradSlice, Tensor},
};

/// Backward rule: a struct of the values that the op saved.
#[doc(alias = "Function")]
#[doc(alias = "CustomOp")]
pub trait Backward {
    /// Returns the name of the op, for messages.
    fn name(&self) -> &'static str;

    /// Takes the gradient of the output and returns one contribution per recorded input.
    ///
    /// `need[i]`: if `true`, input `i` needs one. `grad` has the output's shape and dtype, any layout, and may be
    /// overwritten if it is the only handle on its storage.
    fn backward(self: Box<Self>, grad: Tensor, need: &[bool]) -> Result<InputGrads>;

    /// Receives, as an optional fusion hook, the gradient that later ops have given to the first input so far.
    ///
    /// A rule that can add it to its own in the same pass keeps it, returns `None`, and later returns the sum of both
    /// as a whole contribution. The default returns it unchanged. A returned gradient must have the input's shape,
    /// dtype and device.
    fn accumulate_into(&mut self, sum: Tensor) -> Option<Tensor> {
        Some(sum)
    }
}

/// Gradient that a backward rule returns for one input.
#[derive(Debug)]
pub enum InputGrad {
    /// No gradient.
    None,
    /// Gradient with the input's shape, dtype and device.
    Whole(Tensor),
    /// Gradient of a part of the input, zero elsewhere; avoids building full-size zeros per view.
    Slice {
        /// Shape of the whole input.
        shape: Shape,
        /// Elements of the input that the gradient covers.
        part: GradSlice,
        /// Gradient of that part.
        value: Tensor,
    },
}

/// Gradient of an input, `[columns]`, whose last sum may wait: one launch serves those of many ops.
#[derive(Clone, Debug)]
pub(crate) struct LateSum {
    /// Sums of parts of the rows, `[chunks, width]`, in the accumulation type.
    pub partials: Tensor,
    /// First column of the gradient in `partials`, and number of columns.
    pub columns: [usize; 2],
    /// Type of the gradient.
    pub dtype: DType,
    /// Computes the gradients of several inputs.
    pub finish: fn(&[LateSum]) -> Result<Vec<Tensor>>,
}

/// Gradients that a backward rule returns.
#[derive(Debug)]
pub struct InputGrads {
    pub(super) inputs: Vec<InputGrad>,
    /// Gradients still to be summed up, of inputs without one above.
    pub(super) late: Vec<(usize, LateSum)>,
}

impl InputGrads {
    /// Creates gradients from one contribution per input, in the order in which the inputs were recorded.
    pub fn new(inputs: Vec<InputGrad>) -> Self {
        Self { inputs, late: Vec::new() }
    }

    /// Adds gradients of inputs, by their index, that have none yet.
    pub(crate) fn with_late_sums(self, late: Vec<(usize, LateSum)>) -> Self {
        Self { late, ..self }
    }

    /// Creates the gradient of an op with one differentiable input.
    pub fn one(grad: Tensor) -> Self {
        Self::new(vec![InputGrad::Whole(grad)])
    }

    /// Creates whole gradients, with `None` where an input needs none.
    pub fn whole(grads: impl IntoIterator<Item = Option<Tensor>>) -> Self {
        Self::new(grads.into_iter().map(|grad| grad.map_or(InputGrad::None, InputGrad::Whole)).collect_vec())
    }
}
