//! The float types that tensors store, for code that is generic over them.

use super::{Float, Readable, Real};

/// A float type of tensors: `f32`, `f64`, [`bf16`](half::bf16) or [`f16`](half::f16).
pub trait FloatElement: Readable<Stored = Self> + PartialOrd {
    /// The same number; every float type fits.
    fn to_f64(self) -> f64;

    /// The nearest number of this type, rounded once to nearest even; too large ones become infinite.
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
