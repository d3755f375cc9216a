//! Loops of unary functions, which are dispatched outside of the loops.

use super::{Activation, Function, Keep, Loops, Unary};
use crate::{
    device::{
        f16_rows::{in_f32, is_f16},
        simd::vectorized,
    },
    dtype::{DType, Float, Real},
};

vectorized! {
    /// Computes `y = f(x)`.
    pub(super) fn map<R: Real>(f: Function, x: &[R], y: &mut [R]) {
        f.with::<false>(Map::<R, FUSED> { x, y });
    }
}

/// Like [`map`], for functions that [`Function::with_light`] takes.
pub(super) fn map_light<T: Float>(f: Function, x: &[T], y: &mut [T]) {
    if const { is_f16::<T>() } {
        in_f32(y, false, [x], |y, [x]| map_where_it_lies(f, x, y));
    } else {
        map_where_it_lies(f, x, y);
    }
}

vectorized! {
    fn map_where_it_lies<T: Float>(f: Function, x: &[T], y: &mut [T]) {
        f.with_light(Map::<T, FUSED> { x, y });
    }
}

/// Returns `true` for f64.
const fn is_f64<T: Float>() -> bool {
    matches!(T::DTYPE, DType::F64)
}

/// Replaces `y` with `f(y, a, b)`, with `y` in place of a `b` that is empty: one loop for all functions of f64, which serves
/// references and gradient tests.
#[inline(never)]
fn each<T: Float>(y: &mut [T], a: &[T], b: &[T], f: fn(T, T, T) -> T) {
    for (index, (y, a)) in y.iter_mut().zip(a).enumerate() {
        *y = f(*y, *a, *b.get(index).unwrap_or(y));
    }
}

struct Map<'a, T, const FUSED: bool> {
    x: &'a [T],
    y: &'a mut [T],
}

impl<T: Float, const FUSED: bool> Loops for Map<'_, T, FUSED> {
    #[inline(always)]
    fn of<F: Unary>(self) {
        if const { is_f64::<T>() } {
            return each(self.y, self.x, self.x, |_, x, _| T::from_acc(F::value::<T::Acc, FUSED>(x.to_acc())));
        }
        for (x, y) in self.x.iter().zip(self.y) {
            *y = T::from_acc(F::value::<T::Acc, FUSED>(x.to_acc()));
        }
    }
}

vectorized! {
    /// Computes the gradient of the input from `g`, the gradient of the output, or from what `dx` holds if `g` is empty.
    pub(super) fn map_backward<R: Real>(f: Function, kept: &[R], g: &[R], dx: &mut [R]) {
        f.with::<true>(MapBackward::<R, FUSED> { kept, g, dx });
    }
}

/// Like [`map_backward`], for functions that [`Function::with_light_gradient`] takes.
pub(super) fn map_light_backward<T: Float>(f: Function, kept: &[T], g: &[T], dx: &mut [T]) {
    if const { is_f16::<T>() } {
        in_f32(dx, g.is_empty(), [kept, g], |dx, [kept, g]| backward_where_they_lie(f, kept, g, dx));
    } else {
        backward_where_they_lie(f, kept, g, dx);
    }
}

vectorized! {
    fn backward_where_they_lie<T: Float>(f: Function, kept: &[T], g: &[T], dx: &mut [T]) {
        f.with_light_gradient(MapBackward::<T, FUSED> { kept, g, dx });
    }
}

struct MapBackward<'a, T, const FUSED: bool> {
    kept: &'a [T],
    g: &'a [T],
    dx: &'a mut [T],
}

impl<T: Float, const FUSED: bool> Loops for MapBackward<'_, T, FUSED> {
    #[inline(always)]
    fn of<F: Unary>(self) {
        let gradient = |g: T, kept: T| T::from_acc(F::gradient::<T::Acc, FUSED>(g.to_acc(), kept.to_acc()));
        if const { is_f64::<T>() } {
            return each(self.dx, self.kept, self.g, |_, kept, g| {
                T::from_acc(F::gradient::<T::Acc, FUSED>(g.to_acc(), kept.to_acc()))
            });
        }
        let pairs = self.dx.iter_mut().zip(self.kept);
        if self.g.is_empty() {
            return pairs.for_each(|(dx, kept)| *dx = gradient(*dx, *kept));
        }
        pairs.zip(self.g).for_each(|((dx, kept), g)| *dx = gradient(*g, *kept));
    }
}

/// Computes `y = x · a + b`.
pub(super) fn affine<T: Float>(x: &[T], y: &mut [T], a: T::Acc, b: T::Acc) {
    if const { is_f16::<T>() } {
        let (a, b) = (a.to_f32(), b.to_f32());
        in_f32(y, false, [x], |y, [x]| affine_where_it_lies(x, y, a, b));
    } else {
        affine_where_it_lies(x, y, a, b);
    }
}

vectorized! {
    fn affine_where_it_lies<T: Float>(x: &[T], y: &mut [T], a: T::Acc, b: T::Acc) {
        for (x, y) in x.iter().zip(y) {
            *y = T::from_acc(x.to_acc() * a + b);
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
        if const { is_f64::<R>() } {
            return each(self.y, self.x, self.bias, |_, x, bias| F::value::<R, FUSED>(x + bias));
        }
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
        if const { is_f64::<R>() } {
            return each(self.dx, self.x, self.bias, |dx, x, bias| {
                F::gradient::<R, FUSED>(dx, kept::<F, R, FUSED>(x + bias))
            });
        }
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
        if const { is_f64::<R>() } {
            each(self.values, self.x, self.bias, |_, x, bias| F::value::<R, FUSED>(x + bias));
            return each(self.slopes, self.x, self.bias, |_, x, bias| {
                F::derivative::<R, FUSED>(kept::<F, R, FUSED>(x + bias))
            });
        }
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
