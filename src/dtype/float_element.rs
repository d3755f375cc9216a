//! Float types that tensors store, for generic code.

use super::{Float, Readable, Real};

/// Float type of tensors: `f32`, `f64`, [`bf16`](half::bf16) or [`f16`](half::f16).
pub trait FloatElement: Readable<Stored = Self> + PartialOrd {
    /// Converts to f64, which is exact for every float type.
    fn to_f64(self) -> f64;

    /// Rounds to this type, once, to nearest even; numbers that are too large become infinite.
    fn from_f64(x: f64) -> Self;
}

macro_rules! float_element {
    ($($t:ty),+) => {$(
        impl FloatElement for $t {
            #[inline(always)]
            fn to_f64(self) -> f64 {
                Real::to_f64(Float::to_acc(self))
            }
            #[inline(always)]
            fn from_f64(x: f64) -> Self {
                <Self as Float>::from_f64(x)
            }
        }
    )+};
}

float_element!(f32, f64, half::bf16, half::f16);
