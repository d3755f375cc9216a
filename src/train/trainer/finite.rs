//! Losses, gradients and parameters that are not finite.

use super::Trainer;
use crate::{
    Error, ErrorKind, Gradients, Param, Result, Tensor, collect::CollectVec, ops::adamw::square_norms,
    train::TrainModel,
};

impl<M: TrainModel> Trainer<M> {
    /// Returns the error for a loss that is not finite, with a parameter that is not finite either.
    pub(super) fn diverged(&self, grads: &Gradients) -> Error {
        let mut what = "loss".to_string();
        // Out of memory for packed copies: the message then omits the parameter.
        if let Ok(Some(name)) = self.weight_not_finite() {
            what = format!("loss (and the parameter {name})");
        } else if let Ok(Some(name)) = self.not_finite(|tensor| grads.get(tensor).cloned()) {
            what = format!("loss (and the gradient of {name})");
        }
        Error::new(ErrorKind::NonFinite { step: self.step, what })
    }

    /// Returns the first parameter that has NaN or infinity: of those that are divided among ranks, this rank's part.
    pub(super) fn weight_not_finite(&self) -> Result<Option<String>> {
        let own = match self.not_finite(|tensor| (!tensor.is_absent()).then(|| tensor.detach()))? {
            Some(name) => Some(name.to_string()),
            None => self.ranks.divided_not_finite()?,
        };
        self.first_of_all(own)
    }

    /// Returns the first parameter whose tensor has NaN or infinity.
    fn not_finite(&self, tensor: impl Fn(&Tensor) -> Option<Tensor>) -> Result<Option<&str>> {
        let given = |(name, param): (_, &Param)| Some((name, tensor(&param.tensor())?.contiguous()));
        let (names, tensors): (Vec<_>, Vec<_>) = self.params.unique().filter_map(given).unzip();
        let squares = square_norms(&tensors.into_iter().try_collect_vec()?)?;
        Ok(squares.iter().position(|square| !square.is_finite()).map(|index| names[index]))
    }
}
