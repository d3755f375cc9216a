//! Learning-rate schedule.

/// Learning-rate schedule: linear warmup, then cosine decay to a fraction of the peak (Loshchilov and Hutter,
/// <https://arxiv.org/abs/1608.03983>, with one period).
///
/// `lr · (step + 1) / warmup` for `step < warmup`; from there on, with `p = (step − warmup) / (steps − warmup)`,
/// `lr · (final_ratio + (1 − final_ratio) · (1 + cos πp) / 2)`. Steps count from 0; after the last one the rate stays
/// at `lr · final_ratio`.
///
/// ```
/// let schedule = x_transformers::train::Schedule { lr: 1.0, warmup: 2, steps: 12, final_ratio: 0.1 };
/// assert_eq!([schedule.at(0), schedule.at(1), schedule.at(2)], [0.5, 1.0, 1.0]);
/// assert!((schedule.at(7) - 0.55).abs() < 1e-12);
/// assert!((schedule.at(12) - 0.1).abs() < 1e-12);
/// ```
#[derive(Clone, Copy, PartialEq, Debug)]
#[doc(alias = "CosineAnnealingLR")]
#[doc(alias = "lr_scheduler")]
pub struct Schedule {
    /// Peak learning rate.
    pub lr: f64,
    /// Number of warmup steps until the peak.
    pub warmup: u64,
    /// Total number of steps.
    pub steps: u64,
    /// Final learning rate as a fraction of the peak.
    pub final_ratio: f64,
}

impl Schedule {
    /// Returns the learning rate of a step, counted from 0.
    pub fn at(&self, step: u64) -> f64 {
        if step < self.warmup {
            return self.lr * (step + 1) as f64 / self.warmup as f64;
        }
        let progress = match self.steps.saturating_sub(self.warmup) {
            0 => 1.0,
            length => ((step - self.warmup) as f64 / length as f64).min(1.0),
        };
        let cosine = 0.5 * (1.0 + libm::cos(std::f64::consts::PI * progress));
        self.lr * (self.final_ratio + (1.0 - self.final_ratio) * cosine)
    }
}
