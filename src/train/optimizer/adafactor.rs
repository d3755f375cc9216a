//! Directions of Adafactor.

use super::AdafactorOptions;
use crate::{DType, Result, Tensor};

/// Returns what a weight is moved against at rate 1, and the new second moments: of rows and columns for at least two
/// dimensions, else one tensor.
///
/// `grad`, `value` and `moments` are of the state's type; `step` counts the updates of this parameter from 1.
pub(super) fn direction(
    grad: &Tensor,
    value: &Tensor,
    moments: &[Tensor],
    options: AdafactorOptions,
    step: u64,
    lr: f64,
) -> Result<(Tensor, Vec<Tensor>)> {
    if grad.numel() == 0 {
        return Ok((grad.clone(), moments.to_vec()));
    }
    let weight = libm::pow(step as f64, options.beta2_decay);
    let rate = lr.min(1.0 / (step as f64).sqrt());
    let epsilon = if grad.dtype() == DType::F64 { f64::EPSILON } else { f32::EPSILON.into() };
    let eps1 = options.eps1.unwrap_or(epsilon);
    let squares = grad.square()?;
    let mix = |mean: &Tensor, new: Tensor| mean.add(&new.sub(mean)?.affine(weight, 0.0)?);
    let (moments, variance) = match moments {
        [rows, cols] => {
            let rows = mix(rows, squares.mean(&[-1])?.unsqueeze(-1)?)?;
            let cols = mix(cols, squares.mean(&[-2])?.unsqueeze(-2)?)?;
            let mean = at_least(&rows.mean(&[-2])?.unsqueeze(-2)?, eps1)?;
            let variance = rows.mul(&cols)?.div(&mean)?;
            (vec![rows, cols], variance)
        }
        _ => {
            let variance = mix(&moments[0], squares)?;
            (vec![variance.clone()], variance)
        }
    };
    let update = grad.div(&at_least(&variance, eps1 * eps1)?.sqrt()?)?;
    // Scalars on the device: a GPU does not wait for the processor.
    let size = at_least(&root_mean_square(value)?, options.eps2)?.affine(rate, 0.0)?;
    let shrink = at_least(&root_mean_square(&update)?.affine(1.0 / options.d, 0.0)?, 1.0)?;
    Ok((update.mul(&size.div(&shrink)?)?, moments))
}

fn root_mean_square(x: &Tensor) -> Result<Tensor> {
    x.square()?.mean(&[])?.sqrt()
}

/// Returns the larger of each element and a number.
pub(super) fn at_least(x: &Tensor, least: f64) -> Result<Tensor> {
    let least = Tensor::full((), least, x.dtype(), x.device())?;
    x.lt(&least)?.where_cond(&least, x)
}
