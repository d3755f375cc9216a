//! Loops of unary functions, which are dispatched outside of the loops.

use super::{Activation, Function, Keep, Loops, Unary};
use crate::{device::simd::vectorized, dtype::Real};

vectorized! {
    /// Computes `y = f(x)`.
    pub(super) fn map<R: Real>(f: Function, x: &[R], y: &mut [R]) {
        f.with(Map::<R, FUSED> { x, y });
    }
}

struct Map<'a, R, const FUSED: bool> {
    x: &'a [R],
    y: &'a mut [R],
}

impl<R: Real, const FUSED: bool> Loops for Map<'_, R, FUSED> {
    #[inline(always)]
    fn of<F: Unary>(self) {
        for (x, y) in self.x.iter().zip(self.y) {
            *y = F::value::<R, FUSED>(*x);
        }
    }
}

vectorized! {
    /// Overwrites the gradient of the output with that of the input.
    pub(super) fn map_backward<R: Real>(f: Function, kept: &[R], dx: &mut [R]) {
        f.with(MapBackward::<R, FUSED> { kept, dx });
    }
}

struct MapBackward<'a, R, const FUSED: bool> {
    kept: &'a [R],
    dx: &'a mut [R],
}

impl<R: Real, const FUSED: bool> Loops for MapBackward<'_, R, FUSED> {
    #[inline(always)]
    fn of<F: Unary>(self) {
        for (dx, kept) in self.dx.iter_mut().zip(self.kept) {
            *dx = F::gradient::<R, FUSED>(*dx, *kept);
        }
    }
}

vectorized! {
    /// Computes `y = x · a + b`.
    pub(super) fn affine<R: Real>(x: &[R], y: &mut [R], a: R, b: R) {
        for (x, y) in x.iter().zip(y) {
            *y = *x * a + b;
        }
    }
}

vectorized! {
    /// Computes `y = f(x + bias)`.
    pub(in crate::ops) fn sum_value<R: Real>(f: Activation, x: &[R], bias: &[R], y: &mut [R]) {
        f.with(SumValue::<R, FUSED> { x, bias, y });
    }
}

struct SumValue<'a, R, const FUSED: bool> {
    x: &'a [R],
    bias: &'a [R],
    y: &'a mut [R],
}

impl<R: Real, const FUSED: bool> Loops for SumValue<'_, R, FUSED> {
    #[inline(always)]
    fn of<F: Unary>(self) {
        for ((y, x), &bias) in self.y.iter_mut().zip(self.x).zip(self.bias) {
            *y = F::value::<R, FUSED>(*x + bias);
        }
    }
}

/// Returns the value that the gradient of `f` at `x` is a function of: the input or the output.
#[inline(always)]
fn kept<F: Unary, R: Real, const FUSED: bool>(x: R) -> R {
    match F::KEEP {
        Keep::Input => x,
        Keep::Output => F::value::<R, FUSED>(x),
    }
}

vectorized! {
    /// Overwrites the gradient of `f(x + bias)` with that of `x`.
    pub(in crate::ops) fn sum_gradient<R: Real>(f: Activation, x: &[R], bias: &[R], dx: &mut [R]) {
        f.with(SumGradient::<R, FUSED> { x, bias, dx });
    }
}

struct SumGradient<'a, R, const FUSED: bool> {
    x: &'a [R],
    bias: &'a [R],
    dx: &'a mut [R],
}

impl<R: Real, const FUSED: bool> Loops for SumGradient<'_, R, FUSED> {
    #[inline(always)]
    fn of<F: Unary>(self) {
        for ((dx, x), &bias) in self.dx.iter_mut().zip(self.x).zip(self.bias) {
            *dx = F::gradient::<R, FUSED>(*dx, kept::<F, R, FUSED>(*x + bias));
        }
    }
}

vectorized! {
    /// Computes `f(x + bias)` and `f'(x + bias)`.
    pub(in crate::ops) fn sum_value_and_slope<R: Real>(
        f: Activation,
        x: &[R],
        bias: &[R],
        values: &mut [R],
        slopes: &mut [R],
    ) {
        f.with(SumValueAndSlope::<R, FUSED> { x, bias, values, slopes });
    }
}

struct SumValueAndSlope<'a, R, const FUSED: bool> {
    x: &'a [R],
    bias: &'a [R],
    values: &'a mut [R],
    slopes: &'a mut [R],
}

impl<R: Real, const FUSED: bool> Loops for SumValueAndSlope<'_, R, FUSED> {
    #[inline(always)]
    fn of<F: Unary>(self) {
        let outputs = self.values.iter_mut().zip(self.slopes);
        for ((value, slope), (x, &bias)) in outputs.zip(self.x.iter().zip(self.bias)) {
            let x = *x + bias;
            *value = F::value::<R, FUSED>(x);
            *slope = F::derivative::<R, FUSED>(match F::KEEP {
                Keep::Input => x,
                Keep::Output => *value,
            });
        }
    }
}
