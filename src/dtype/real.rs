//! The arithmetic of f32 and f64, written so that loops over it vectorise.
//!
//! f64 uses libm: it serves references and gradient tests. The f32 functions are branch-free polynomials; their
//! errors are tested against f64 below.

use std::ops::{Add, AddAssign, Div, Mul, MulAssign, Neg, Sub};

use super::Float;

/// Compute type of floats.
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
    fn to_f32(self) -> f32;
    fn from_f32(x: f32) -> Self;
    fn sqrt(self) -> Self;
    fn ln(self) -> Self;
    /// Computes `self · a + b`; rounded once if `FUSED`, where that is an instruction and not a function call.
    fn fma<const FUSED: bool>(self, a: Self, b: Self) -> Self;
    fn fused_exp<const FUSED: bool>(self) -> Self;
    /// Computes `e^x` for results of at most 1, as in a softmax: cheaper than [`Real::fused_exp`]. An `x` above 0
    /// counts as 0, and results below the normal range become 0.
    fn probability<const FUSED: bool>(self) -> Self;
    fn fused_tanh<const FUSED: bool>(self) -> Self;
    /// Computes the standard normal distribution: cumulative probability and density.
    fn normal<const FUSED: bool>(self) -> (Self, Self);
    /// Computes `x Φ(x)`, with the `Φ` of [`Real::normal`].
    fn gelu<const FUSED: bool>(self) -> Self;
    /// Computes `−self · a / b²` without intermediate overflow or underflow.
    fn by_divisor(self, a: Self, b: Self) -> Self;

    #[inline(always)]
    fn exp(self) -> Self {
        self.fused_exp::<false>()
    }

    /// Returns the larger number; a NaN on the left is returned, one on the right ignored.
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        if other > self { other } else { self }
    }

    /// Computes `1 / (1 + exp(-x))`.
    #[inline(always)]
    fn sigmoid<const FUSED: bool>(self) -> Self {
        Self::ONE / (Self::ONE + (-self).fused_exp::<FUSED>())
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
    fn to_f32(self) -> f32 {
        self
    }
    #[inline(always)]
    fn from_f32(x: f32) -> f32 {
        x
    }
    #[inline(always)]
    fn sqrt(self) -> f32 {
        f32::sqrt(self)
    }
    #[inline(always)]
    fn ln(self) -> f32 {
        f32::ln(self)
    }

    #[inline(always)]
    fn fma<const FUSED: bool>(self, a: f32, b: f32) -> f32 {
        if FUSED { f32::mul_add(self, a, b) } else { self * a + b }
    }

    /// Computes `2^n · e^r` with `|r| ≤ ln 2 / 2` and the Taylor series of `e^r`; within 2 ulp, exact at 0 and at ±∞.
    #[inline(always)]
    fn fused_exp<const FUSED: bool>(self) -> f32 {
        let x = if self > 89.0 { 89.0 } else { self };
        let x = if x < -104.0 { -104.0 } else { x };
        let (p, n) = exp_parts::<FUSED>(x);
        // 2^n in two factors, so that results below the normal range round once and large ones overflow to ∞.
        let half = n >> 1;
        let scale = |n: i32| f32::from_bits((n.wrapping_add(127) << 23) as u32);
        p * scale(half) * scale(n.wrapping_sub(half))
    }

    #[inline(always)]
    fn probability<const FUSED: bool>(self) -> f32 {
        let x = if self > 0.0 { 0.0 } else { self };
        let x = if x < LOWEST { LOWEST } else { x };
        let power = small_power::<FUSED>(x);
        if self < LOWEST { 0.0 } else { power }
    }

    /// Odd polynomial below 0.625, `1 − 2 / (e^2x + 1)` above; absolute error below 2e-7.
    #[inline(always)]
    fn fused_tanh<const FUSED: bool>(self) -> f32 {
        let a = f32::abs(self);
        let s = a * a;
        let p = horner::<FUSED, 5>(s, [-0.005_664_775, 0.020_595_68, -0.053_722_68, 0.133_311_5, -0.333_332_63]);
        let small = (p * s).fma::<FUSED>(a, a);
        let large = 1.0 - 2.0 / (Real::fused_exp::<FUSED>(2.0 * a) + 1.0);
        // `!(a >= …)` sends NaN through the polynomial, which keeps it.
        let y = if a >= 0.625 { large } else { small };
        f32::copysign(y, self)
    }

    /// The probability from [`upper_tail`], the density from `exp` within 2 ulp.
    #[inline(always)]
    fn normal<const FUSED: bool>(self) -> (f32, f32) {
        // Beyond 13 the density is set to 0: it is below the normal range, and so are products with it.
        let exponent = -0.5 * self * self;
        let bounded = if exponent < LOWEST { LOWEST } else { exponent };
        let power = small_power::<FUSED>(bounded);
        let density = if exponent < LOWEST { 0.0 } else { 0.398_942_3 * power };
        let (_, tail) = size_and_tail::<FUSED>(self);
        (if self < 0.0 { tail } else { 1.0 - tail }, density)
    }

    /// Computes `max(x, 0) − |x| Φ(−|x|)`, which needs no sign test and loses no digit of a small result.
    #[inline(always)]
    fn gelu<const FUSED: bool>(self) -> f32 {
        let (a, tail) = size_and_tail::<FUSED>(self);
        let positive = if self < 0.0 { 0.0 } else { self };
        (-a).fma::<FUSED>(tail, positive)
    }

    /// In f64, whose exponent range suffices.
    #[inline(always)]
    fn by_divisor(self, a: f32, b: f32) -> f32 {
        let (g, a, b) = (self as f64, a as f64, b as f64);
        (-(g * a) / (b * b)) as f32
    }
}

/// Computes `Φ(−a)` for `a` in 0 to 8, as `2^q(a)` with polynomials for `q` and the power: no division, which takes as
/// long as ten products. Absolute error below 1.7e-7 (3 ulp of the largest result), relative below 6e-5 up to 6; exact
/// at 0.
#[inline(always)]
fn upper_tail<const FUSED: bool>(a: f32) -> f32 {
    const Q: [f32; 10] = [
        8.950_885e-8,
        -2.512_711_7e-6,
        2.697_502_2e-5,
        -1.126_943_75e-4,
        -3.302_034_2e-4,
        7.321_748e-3,
        -5.267_148e-2,
        -4.591_531_5e-1,
        -1.151_111_5,
        -1.0,
    ];
    const POWER: [f32; 6] = [1.327_65e-3, 9.675_54e-3, 5.550_713e-2, 0.240_221_2, 0.693_146_97, 1.0];
    let q = horner::<FUSED, 10>(a, Q);
    let shifted = q + ROUND;
    times_power_of_two(horner::<FUSED, 6>(q - (shifted - ROUND), POWER), shifted.to_bits() as i32)
}

/// Computes `|x|` and `Φ(−|x|)`. Below −8 the probability is 0, so the product is 0 for every `x`; above 8 both values
/// are those of 8, since `x − 8 Φ(−8)` is `x`, also for ∞.
#[inline(always)]
fn size_and_tail<const FUSED: bool>(x: f32) -> (f32, f32) {
    let a = f32::abs(x);
    let bounded = if a > 8.0 { 8.0 } else { a };
    let tail = upper_tail::<FUSED>(bounded);
    if x < -8.0 { (a, 0.0) } else { (bounded, tail) }
}

/// Adding 1.5 · 2²³ leaves the nearest integer in the low bits of the mantissa.
const ROUND: f32 = 12_582_912.0;

/// Computes `e^x = p · 2^n` for an `x` in the range of the normal numbers.
#[inline(always)]
fn exp_parts<const FUSED: bool>(x: f32) -> (f32, i32) {
    // ln 2 in two parts: the first has few bits, so that n · LN2_HIGH is exact.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let shifted = x.fma::<FUSED>(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.fma::<FUSED>(-LN2_LOW, n.fma::<FUSED>(-LN2_HIGH, x));
    // (e^r − 1 − r) / r² at the Chebyshev nodes of ±ln 2 / 2; within 1.1e-8.
    let p = horner::<FUSED, 7>(r, [1.392_621_4e-3, 8.363_203e-3, 0.041_666_556, 0.166_665_76, 0.5, 1.0, 1.0]);
    (p, (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32))
}

/// Lowest `x` for which `e^x` is in the normal range.
const LOWEST: f32 = -87.0;

/// Computes `e^x` for an `x` from [`LOWEST`] to 88.
#[inline(always)]
fn small_power<const FUSED: bool>(x: f32) -> f32 {
    let (p, n) = exp_parts::<FUSED>(x);
    times_power_of_two(p, n)
}

/// Computes `p · 2^n` for an `n` from −126 to 127; only its lowest nine bits are used.
#[inline(always)]
fn times_power_of_two(p: f32, n: i32) -> f32 {
    // A product instead of an addition to the exponent, which could turn a NaN into a number.
    p * f32::from_bits((n.wrapping_add(127) << 23) as u32)
}

/// Evaluates a polynomial, highest power first.
#[inline(always)]
fn horner<const FUSED: bool, const N: usize>(x: f32, terms: [f32; N]) -> f32 {
    terms[1..].iter().fold(terms[0], |sum, &term| sum.fma::<FUSED>(x, term))
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
    fn to_f32(self) -> f32 {
        self as f32
    }
    #[inline(always)]
    fn from_f32(x: f32) -> f64 {
        x as f64
    }
    #[inline(always)]
    fn sqrt(self) -> f64 {
        f64::sqrt(self)
    }
    fn ln(self) -> f64 {
        libm::log(self)
    }
    #[inline(always)]
    fn fma<const FUSED: bool>(self, a: f64, b: f64) -> f64 {
        if FUSED { f64::mul_add(self, a, b) } else { self * a + b }
    }
    fn fused_exp<const FUSED: bool>(self) -> f64 {
        libm::exp(self)
    }
    fn probability<const FUSED: bool>(self) -> f64 {
        libm::exp(if self > 0.0 { 0.0 } else { self })
    }
    fn fused_tanh<const FUSED: bool>(self) -> f64 {
        libm::tanh(self)
    }
    fn normal<const FUSED: bool>(self) -> (f64, f64) {
        // Not 1 + erf, which cancels below 0.
        let below = 0.5 * libm::erfc(-self * std::f64::consts::FRAC_1_SQRT_2);
        (below, 0.398_942_280_401_432_7 * libm::exp(-0.5 * self * self))
    }
    fn gelu<const FUSED: bool>(self) -> f64 {
        self * self.normal::<FUSED>().0
    }
    /// Uses numbers between 1/2 and 1, whose exponents are added separately.
    fn by_divisor(self, a: f64, b: f64) -> f64 {
        let numbers = [self, a, b];
        if numbers.iter().any(|x| !x.is_finite() || *x == 0.0) {
            return -self * (a / b / b);
        }
        let [(g, g_power), (a, a_power), (b, b_power)] = numbers.map(libm::frexp);
        libm::scalbn(-(g * a) / (b * b), g_power + a_power - 2 * b_power)
    }
}

#[cfg(test)]
mod tests {
    use super::Real;

    /// Returns the largest error of an f32 function against its f64 counterpart over a range.
    fn worst(range: std::ops::Range<f32>, relative: bool, f: fn(f32) -> f32, reference: fn(f64) -> f64) -> f64 {
        (0..=400_000)
            .map(|i| {
                let x = range.start + (range.end - range.start) * (i as f32 / 400_000.0);
                let expected = reference(x as f64);
                (f(x) as f64 - expected).abs() / if relative { expected.abs() } else { 1.0 }
            })
            .fold(0.0, f64::max)
    }

    /// Returns the largest error, with and without fused instructions.
    fn both(range: std::ops::Range<f32>, relative: bool, f: [fn(f32) -> f32; 2], reference: fn(f64) -> f64) -> f64 {
        f.map(|f| worst(range.clone(), relative, f, reference)).into_iter().fold(0.0, f64::max)
    }

    #[test]
    fn real_f32_errors() {
        let exp = [Real::fused_exp::<false>, Real::fused_exp::<true>];
        let probability = [Real::probability::<false>, Real::probability::<true>];
        assert!(both(-87.0..0.0, true, probability, Real::exp) < 2.4e-7);
        let tanh = [Real::fused_tanh::<false>, Real::fused_tanh::<true>];
        let sigmoid = [Real::sigmoid::<false>, Real::sigmoid::<true>];
        assert!(both(-87.0..88.0, true, exp, Real::exp) < 2.4e-7);
        assert!(both(-20.0..20.0, false, tanh, Real::fused_tanh::<false>) < 2e-7);
        assert!(both(-0.6..0.6, true, tanh, Real::fused_tanh::<false>) < 3e-7);
        assert!(both(-30.0..30.0, false, sigmoid, Real::sigmoid::<false>) < 2e-7);
        let below = [|x: f32| x.normal::<false>().0, |x: f32| x.normal::<true>().0];
        let density = [|x: f32| x.normal::<false>().1, |x: f32| x.normal::<true>().1];
        assert!(both(-9.0..9.0, false, below, |x: f64| x.normal::<false>().0) < 1.7e-7);
        assert!(both(-9.0..9.0, false, density, |x: f64| x.normal::<false>().1) < 1.2e-7);
        // The factor of x in GELU keeps its digits where it is small.
        let tail = |x: f64| 0.5 * libm::erfc(-x * std::f64::consts::FRAC_1_SQRT_2);
        assert!(both(-6.0..0.0, true, below, tail) < 6e-5);
        let gelu = [Real::gelu::<false>, Real::gelu::<true>];
        assert!(
            both(-6.0..0.0, true, gelu, |x: f64| x * 0.5 * libm::erfc(-x * std::f64::consts::FRAC_1_SQRT_2)) < 6e-5
        );
        assert!(both(0.0..9.0, true, gelu, Real::gelu::<false>) < 3.5e-7);
    }

    #[test]
    fn real_f32_special_values() {
        assert_eq!(Real::exp(0.0f32), 1.0);
        assert_eq!(Real::exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(Real::exp(f32::MIN), 0.0);
        assert_eq!(Real::exp(f32::INFINITY), f32::INFINITY);
        assert!(Real::exp(-100.0f32) > 0.0, "results below the normal range are kept");
        for (x, y) in [(f32::NEG_INFINITY, 0.0), (f32::MIN, 0.0), (-87.1, 0.0), (1e-3, 1.0), (f32::INFINITY, 1.0)] {
            assert_eq!(x.probability::<true>(), y, "{x}");
        }
        assert_eq!(Real::fused_tanh::<true>(f32::INFINITY), 1.0);
        for x in [-8.1, -13.0, -1e30, f32::MIN] {
            assert_eq!(Real::gelu::<true>(x), 0.0, "{x}");
            assert_eq!(Real::gelu::<false>(x), 0.0, "{x}");
            assert_eq!(x.normal::<true>().0, 0.0, "{x}");
        }
        assert_eq!([8.1, 1e30, f32::MAX, f32::INFINITY].map(Real::gelu::<true>), [8.1, 1e30, f32::MAX, f32::INFINITY]);
        assert!(Real::gelu::<true>(f32::NEG_INFINITY).is_nan() && Real::gelu::<true>(f32::NAN).is_nan());
        for (x, below) in [(f32::NEG_INFINITY, 0.0), (f32::MIN, 0.0), (f32::MAX, 1.0), (f32::INFINITY, 1.0), (0.0, 0.5)]
        {
            let (probability, density) = x.normal::<true>();
            assert!((probability - below).abs() < 1e-7 && density >= 0.0, "{x}: {probability} {density}");
        }
        let below: fn(f32) -> f32 = |x| x.normal::<true>().0;
        let probability = Real::probability::<true>;
        for f in [Real::exp, probability, Real::fused_tanh::<true>, below, Real::sigmoid::<true>] as [fn(f32) -> f32; 5]
        {
            // Also one with bits that end in an exponent when they are shifted.
            assert!([f32::NAN, -f32::NAN, f32::from_bits(0x7fc0_0001)].map(f).iter().all(|y| y.is_nan()));
        }
    }
}
