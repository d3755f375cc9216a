//! Dynamic loss scaling.

use serde::{Deserialize, Serialize};

use crate::{Error, Result, error::ensure};

/// Loss scaling, which keeps small gradients of f16 models from becoming zero (Micikevicius et al., Mixed precision
/// training, <https://arxiv.org/abs/1710.03740>), with the rules and constants of PyTorch's `GradScaler`.
///
/// The backward pass starts from `scale` instead of 1, and the optimizer divides by it. A step whose gradients have
/// NaN or infinity does not update the weights and halves the scale; 2000 steps without one double it.
///
/// ```
/// use x_transformers::train::GradScaler;
/// let mut scaler = GradScaler::default();
/// scaler.update(false);
/// assert_eq!((scaler.scale(), scaler.skipped()), (32768.0, 1));
/// ```
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[doc(alias = "amp")]
#[doc(alias = "autocast")]
pub struct GradScaler {
    scale: f64,
    /// Number of steps since the scale changed.
    growth_tracker: u64,
    skipped: u64,
}

impl Default for GradScaler {
    /// Creates a scaler with a scale of 65536.
    fn default() -> Self {
        Self { scale: 65536.0, growth_tracker: 0, skipped: 0 }
    }
}

impl GradScaler {
    /// Factor on the scale after [`GradScaler::GROWTH_INTERVAL`] steps.
    pub const GROWTH_FACTOR: f64 = 2.0;
    /// Factor on the scale after a skipped step.
    pub const BACKOFF_FACTOR: f64 = 0.5;
    /// Number of consecutive steps with finite gradients after which the scale grows.
    pub const GROWTH_INTERVAL: u64 = 2000;

    /// Returns the factor on the loss.
    pub fn scale(&self) -> f64 {
        self.scale
    }

    /// Returns the number of skipped steps so far.
    pub fn skipped(&self) -> u64 {
        self.skipped
    }

    /// Updates the scale after a step; `finite` is `true` if its gradients were finite and it was not skipped.
    pub fn update(&mut self, finite: bool) {
        if !finite {
            self.scale *= Self::BACKOFF_FACTOR;
            self.growth_tracker = 0;
            self.skipped += 1;
            return;
        }
        self.growth_tracker += 1;
        if self.growth_tracker == Self::GROWTH_INTERVAL {
            // As in PyTorch, a scale that f32 does not hold is not used.
            let grown = self.scale * Self::GROWTH_FACTOR;
            self.scale = if grown <= f64::from(f32::MAX) { grown } else { self.scale };
            self.growth_tracker = 0;
        }
    }

    /// Returns `true` if a smaller scale could help against gradients that are not finite: a scale below 1 would make
    /// small gradients vanish.
    pub(super) fn can_back_off(&self) -> bool {
        self.scale > 1.0
    }

    /// Checks numbers that come from a file.
    ///
    /// Errors: a scale that is not a positive number, or a count that no run reaches.
    pub(super) fn check(&self) -> Result<()> {
        ensure!(
            self.scale > 0.0 && self.scale <= f64::from(f32::MAX) && self.growth_tracker < Self::GROWTH_INTERVAL,
            Error::argument(
                "grad_scaler",
                format_args!("expected a positive scale and a growth tracker below 2000, got {self:?}")
            )
        );
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grad_scaler_grows_and_backs_off() {
        let mut scaler = GradScaler::default();
        (0..1999).for_each(|_| scaler.update(true));
        assert_eq!(scaler.scale(), 65536.0);
        scaler.update(true);
        assert_eq!((scaler.scale(), scaler.growth_tracker), (131072.0, 0));
        // A skipped step restarts the count.
        (0..1999).for_each(|_| scaler.update(true));
        scaler.update(false);
        (0..1999).for_each(|_| scaler.update(true));
        assert_eq!((scaler.scale(), scaler.skipped()), (65536.0, 1));
        scaler.update(true);
        assert_eq!(scaler.scale(), 131072.0);
        let mut largest = GradScaler { scale: 2f64.powi(127), ..GradScaler::default() };
        (0..4000).for_each(|_| largest.update(true));
        assert_eq!(largest.scale(), 2f64.powi(127));
    }

    #[test]
    fn grad_scaler_refuses_numbers_of_no_run() {
        assert!(GradScaler::default().check().is_ok());
        for scale in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            assert!(GradScaler { scale, ..GradScaler::default() }.check().is_err(), "{scale}");
        }
        assert!(GradScaler { growth_tracker: 2000, ..GradScaler::default() }.check().is_err());
    }
}
