//! The arithmetic of f32 and f64, written so that loops over it vectorise.
//!
//! f64 uses libm: it serves references and gradient tests. The f32 functions are branch-free polynomials; their
//! errors are tested against f64 below.

use std::ops::{Add, AddAssign, Div, Mul, MulAssign, Neg, Sub};

use super::dtype::Float;

/// A type that floats are computed in.
pub(crate) trait Real:
    Float<Acc = Self>
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
    + AddAssign
    + MulAssign
    + std::fmt::Debug
{
    const ZERO: Self;
    const ONE: Self;
    const NEG_INFINITY: Self;

    fn to_f64(self) -> f64;
    fn sqrt(self) -> Self;
    fn ln(self) -> Self;
    fn exp(self) -> Self;
    fn tanh(self) -> Self;
    fn erf(self) -> Self;

    /// The larger one; a NaN on the left wins, one on the right loses.
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        if other > self { other } else { self }
    }

    /// `1 / (1 + exp(-x))`.
    #[inline(always)]
    fn sigmoid(self) -> Self {
        Self::ONE / (Self::ONE + (-self).exp())
    }
}

impl Real for f32 {
    const ZERO: f32 = 0.0;
    const ONE: f32 = 1.0;
    const NEG_INFINITY: f32 = f32::NEG_INFINITY;

    #[inline(always)]
    fn to_f64(self) -> f64 {
        self as f64
    }
    #[inline(always)]
    fn sqrt(self) -> f32 {
        f32::sqrt(self)
    }
    #[inline(always)]
    fn ln(self) -> f32 {
        f32::ln(self)
    }

    /// `2^n · e^r` with `|r| ≤ ln 2 / 2` and the Taylor series of `e^r`; within 2 ulp, exact at 0 and at ±∞.
    #[inline(always)]
    fn exp(self) -> f32 {
        // Adding 1.5 · 2²³ leaves the nearest integer in the low bits of the mantissa.
        const ROUND: f32 = 12_582_912.0;
        // ln 2 in two parts: the first has few bits, so that n · LN2_HIGH is exact.
        const LN2_HIGH: f32 = 0.693_359_4;
        const LN2_LOW: f32 = -2.121_944_4e-4;
        let x = if self > 89.0 { 89.0 } else { self };
        let x = if x < -104.0 { -104.0 } else { x };
        let shifted = x * std::f32::consts::LOG2_E + ROUND;
        let n = shifted - ROUND;
        let r = x - n * LN2_HIGH - n * LN2_LOW;
        let mut p = 1.0 / 5040.0;
        p = p * r + 1.0 / 720.0;
        p = p * r + 1.0 / 120.0;
        p = p * r + 1.0 / 24.0;
        p = p * r + 1.0 / 6.0;
        p = p * r + 0.5;
        p = p * r + 1.0;
        p = p * r + 1.0;
        // 2^n in two factors, so that results below the normal range round once and large ones overflow to ∞.
        let n = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
        let half = n >> 1;
        let scale = |n: i32| f32::from_bits((n.wrapping_add(127) << 23) as u32);
        p * scale(half) * scale(n.wrapping_sub(half))
    }

    /// Odd polynomial below 0.625, `1 − 2 / (e^2x + 1)` above; absolute error below 2e-7.
    #[inline(always)]
    fn tanh(self) -> f32 {
        let a = f32::abs(self);
        let s = a * a;
        let mut p = -0.005_664_775;
        p = p * s + 0.020_595_68;
        p = p * s - 0.053_722_68;
        p = p * s + 0.133_311_5;
        p = p * s - 0.333_332_63;
        let small = a + a * (p * s);
        let large = 1.0 - 2.0 / (Real::exp(2.0 * a) + 1.0);
        // `!(a >= …)` sends NaN through the polynomial, which keeps it.
        let y = if a >= 0.625 { large } else { small };
        f32::copysign(y, self)
    }

    /// Odd polynomial below 1, `1 − e^q(x)` above; absolute error below 2e-7.
    #[inline(always)]
    #[allow(clippy::approx_constant, reason = "a fitted coefficient, which comes near a constant as it must")]
    fn erf(self) -> f32 {
        let a = f32::abs(self);
        let s = a * a;
        let mut p = 7.882_497_4e-5;
        p = p * s - 8.018_855e-4;
        p = p * s + 0.005_189_312;
        p = p * s - 0.026_854_329;
        p = p * s + 0.112_835_97;
        p = p * s - 0.376_126_26;
        p = p * s + 1.128_379_1;
        let b = if a > 4.0 { 4.0 } else { a };
        let mut q = -1.330_938_9e-5;
        q = q * b + 3.175_720_3e-4;
        q = q * b - 0.003_436_867_6;
        q = q * b + 0.022_621_986;
        q = q * b - 0.103_318_98;
        q = q * b - 0.639_093_34;
        q = q * b - 1.125_925_9;
        q = q * b - 7.569_686e-4;
        let y = if a >= 1.0 { 1.0 - Real::exp(q) } else { a * p };
        f32::copysign(y, self)
    }
}

impl Real for f64 {
    const ZERO: f64 = 0.0;
    const ONE: f64 = 1.0;
    const NEG_INFINITY: f64 = f64::NEG_INFINITY;

    #[inline(always)]
    fn to_f64(self) -> f64 {
        self
    }
    #[inline(always)]
    fn sqrt(self) -> f64 {
        f64::sqrt(self)
    }
    fn ln(self) -> f64 {
        libm::log(self)
    }
    fn exp(self) -> f64 {
        libm::exp(self)
    }
    fn tanh(self) -> f64 {
        libm::tanh(self)
    }
    fn erf(self) -> f64 {
        libm::erf(self)
    }
}

#[cfg(test)]
mod tests {
    use super::Real;

    /// Largest error of an f32 function against its f64 twin over a range.
    fn worst(range: std::ops::Range<f32>, relative: bool, f: fn(f32) -> f32, reference: fn(f64) -> f64) -> f64 {
        (0..=400_000)
            .map(|i| {
                let x = range.start + (range.end - range.start) * (i as f32 / 400_000.0);
                let expected = reference(x as f64);
                (f(x) as f64 - expected).abs() / if relative { expected.abs() } else { 1.0 }
            })
            .fold(0.0, f64::max)
    }

    #[test]
    fn real_f32_errors() {
        assert!(worst(-87.0..88.0, true, Real::exp, Real::exp) < 2.4e-7);
        assert!(worst(-20.0..20.0, false, Real::tanh, Real::tanh) < 2e-7);
        assert!(
            worst(-0.6..0.6, true, Real::tanh, Real::tanh) < 3e-7
                || worst(-0.6..0.0, false, Real::tanh, Real::tanh) < 1e-7
        );
        assert!(worst(-6.0..6.0, false, Real::erf, Real::erf) < 2e-7);
        assert!(worst(-30.0..30.0, false, Real::sigmoid, Real::sigmoid) < 2e-7);
    }

    #[test]
    fn real_f32_special_values() {
        assert_eq!(Real::exp(0.0f32), 1.0);
        assert_eq!(Real::exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(Real::exp(f32::MIN), 0.0);
        assert_eq!(Real::exp(f32::INFINITY), f32::INFINITY);
        assert!(Real::exp(-100.0f32) > 0.0, "results below the normal range are kept");
        assert_eq!(Real::tanh(f32::INFINITY), 1.0);
        assert_eq!(Real::erf(f32::NEG_INFINITY), -1.0);
        for f in [Real::exp, Real::tanh, Real::erf, Real::sigmoid] as [fn(f32) -> f32; 4] {
            assert!(f(f32::NAN).is_nan());
        }
    }
}
