//! Plans of several passes through the layers.

/// Passes through the layers of a wrapper.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[non_exhaustive]
pub enum Recurrence {
    /// One.
    #[default]
    Once,
    /// Several, each from the embeddings and a projection of the output before; training draws up to this many.
    Recycled(usize),
    /// This many, each from the output before; a gate says when to stop.
    Looped(usize),
}

/// Loss of the gate that stops a looped model (Zhu et al., <https://arxiv.org/abs/2510.25741>).
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct LoopedLoss {
    /// Gain of another pass, in nats, at which it is as good to stop as to go on. Default 0.05.
    pub threshold: f64,
    /// Slope of the sigmoid that turns gains into targets of the gate. Default 50.
    pub slope: f64,
    /// Weight of the gate's loss. Default 1.
    pub weight: f64,
}

impl Default for LoopedLoss {
    fn default() -> Self {
        Self { threshold: 0.05, slope: 50.0, weight: 1.0 }
    }
}
