//! Rules with at most one running mean: SGD with momentum and Lion (`kernels/momentum.cu`).

use crate::{device::simd::vectorized, dtype::Real};

/// Numbers of a step of SGD: `g ← scale·g + couple·w`, `m ← momentum·m + gain·g`,
/// `w ← decay·w − rate·(own·g + mix·m)`. With these, a direction that was computed elsewhere is applied too.
#[derive(Clone, Copy, PartialEq)]
pub(crate) struct Sgd<A = f64> {
    pub scale: A,
    /// Weight decay that is part of the gradient.
    pub couple: A,
    pub momentum: A,
    pub gain: A,
    pub own: A,
    pub mix: A,
    pub decay: A,
    pub rate: A,
}

impl Sgd {
    /// Moves weights against a direction, after decay by a factor.
    pub fn direction(decay: f64, rate: f64) -> Self {
        Self { scale: 1.0, couple: 0.0, momentum: 0.0, gain: 0.0, own: 1.0, mix: 0.0, decay, rate }
    }

    pub fn cast<A: Real>(self) -> Sgd<A> {
        let Self { scale, couple, momentum, gain, own, mix, decay, rate } = self;
        let [scale, couple, momentum, gain] = [scale, couple, momentum, gain].map(A::from_f64);
        let [own, mix, decay, rate] = [own, mix, decay, rate].map(A::from_f64);
        Sgd { scale, couple, momentum, gain, own, mix, decay, rate }
    }
}

/// Numbers of a step of Lion: `g ← scale·g`, `w ← decay·w − rate·sign(beta1·m + mean1·g)`, `m ← beta2·m + mean2·g`.
#[derive(Clone, Copy, PartialEq)]
pub(crate) struct Lion<A = f64> {
    pub scale: A,
    pub beta1: A,
    pub mean1: A,
    pub beta2: A,
    pub mean2: A,
    pub decay: A,
    pub rate: A,
}

impl Lion {
    pub fn cast<A: Real>(self) -> Lion<A> {
        let Self { scale, beta1, mean1, beta2, mean2, decay, rate } = self;
        let [scale, beta1, mean1] = [scale, beta1, mean1].map(A::from_f64);
        let [beta2, mean2, decay, rate] = [beta2, mean2, decay, rate].map(A::from_f64);
        Lion { scale, beta1, mean1, beta2, mean2, decay, rate }
    }
}

vectorized! {
    /// Updates weights, and their running means if there are any.
    pub(super) fn sgd_chunk<R: Real>(weights: &mut [R], grads: &[R], means: &mut [R], factors: Sgd<R>) {
        let Sgd { scale, couple, momentum, gain, own, mix, decay, rate } = factors;
        if means.is_empty() {
            for (weight, grad) in weights.iter_mut().zip(grads) {
                let grad = *grad * scale + couple * *weight;
                *weight = *weight * decay - rate * (own * grad);
            }
            return;
        }
        for ((weight, grad), mean) in weights.iter_mut().zip(grads).zip(means) {
            let grad = *grad * scale + couple * *weight;
            *mean = momentum * *mean + gain * grad;
            *weight = *weight * decay - rate * (own * grad + mix * *mean);
        }
    }
}

vectorized! {
    pub(super) fn lion_chunk<R: Real>(weights: &mut [R], grads: &[R], means: &mut [R], factors: Lion<R>) {
        let Lion { scale, beta1, mean1, beta2, mean2, decay, rate } = factors;
        for ((weight, grad), mean) in weights.iter_mut().zip(grads).zip(means) {
            let grad = *grad * scale;
            let direction = beta1 * *mean + mean1 * grad;
            *mean = beta2 * *mean + mean2 * grad;
            let sign = if direction > R::ZERO {
                R::ONE
            } else if direction < R::ZERO {
                -R::ONE
            } else {
                R::ZERO
            };
            *weight = *weight * decay - rate * sign;
        }
    }
}
