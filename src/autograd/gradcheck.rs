//! Numeric check of gradients, for the tests of this crate and for users who add ops.

use std::fmt;

use super::Tape;
use crate::{Error, Result, collect::CollectVec, dtype::DType, error::ensure, philox::Philox, tensor::Tensor};

/// Options of [`gradcheck`].
///
/// ```
/// use x_transformers::{Device, Gradcheck, Tensor, gradcheck};
/// let x = Tensor::from_slice(&[0.5f64, -1.0], [2], &Device::Cpu)?;
/// let report = gradcheck(|x| x[0].gelu(), &[x], Gradcheck { tolerance: 1e-7, ..Default::default() })?;
/// assert!(report.passed(), "{report}");
/// # Ok::<(), x_transformers::Error>(())
/// ```
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Gradcheck {
    /// Step of the differences, relative to `max(1, |x|)`.
    pub step: f64,
    /// Allowed error, relative to the largest gradient of the input (at least 1).
    pub tolerance: f64,
    /// Maximum number of elements perturbed per input, one drawn from each of the same number of equal ranges.
    pub max_elements: usize,
}

impl Default for Gradcheck {
    /// Returns step 1e-3, tolerance 1e-7 and at most 200 elements per input.
    fn default() -> Self {
        Self { step: 1e-3, tolerance: 1e-7, max_elements: 200 }
    }
}

/// Result of [`gradcheck`].
#[derive(Clone, Debug)]
#[non_exhaustive]
#[must_use = "a gradient that is wrong is in the report, not an error"]
pub struct GradcheckReport {
    /// One entry per float input.
    pub inputs: Vec<InputReport>,
    /// The requested tolerance.
    pub tolerance: f64,
}

/// Worst element of one input.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct InputReport {
    /// Position among the inputs.
    pub input: usize,
    /// Number of elements compared.
    pub checked: usize,
    /// Largest error, relative to the largest gradient of the input (at least 1).
    pub error: f64,
    /// Row-major index of the worst element.
    pub worst: usize,
    /// Its gradient from the backward rule.
    pub analytic: f64,
    /// Its gradient from finite differences.
    pub numeric: f64,
}

impl GradcheckReport {
    /// Returns `true` if every input is within the tolerance.
    pub fn passed(&self) -> bool {
        // Not `error > tolerance`: a NaN must fail.
        self.inputs.iter().all(|input| input.error <= self.tolerance)
    }
}

impl fmt::Display for GradcheckReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for input in &self.inputs {
            let verdict = if input.error <= self.tolerance { "ok  " } else { "FAIL" };
            writeln!(
                f,
                "{verdict} input {}: error {:.2e} over {} elements; worst at {}: backward {:.10e}, differences {:.10e}",
                input.input, input.error, input.checked, input.worst, input.analytic, input.numeric
            )?;
        }
        Ok(())
    }
}

/// Compares the backward pass of `f` with four-point central differences in f64, for every float input.
///
/// The output is contracted with a random cotangent: a plain sum would hide errors of ops whose outputs sum to a
/// constant. `f` must be deterministic and smooth around the inputs.
///
/// ```
/// use x_transformers::{Device, Gradcheck, Tensor, gradcheck};
/// # fn main() -> x_transformers::Result<()> {
/// let x = Tensor::from_slice(&[0.3f64, -1.2, 2.0], [3], &Device::Cpu)?;
/// let report = gradcheck(|inputs| inputs[0].softmax(), &[x], Gradcheck::default())?;
/// assert!(report.passed(), "{report}");
/// # Ok(())
/// # }
/// ```
///
/// Errors: an input is float but not f64, `f` fails, or its output is not f64.
pub fn gradcheck(
    f: impl Fn(&[Tensor]) -> Result<Tensor>,
    inputs: &[Tensor],
    options: Gradcheck,
) -> Result<GradcheckReport> {
    for input in inputs {
        ensure!(
            input.dtype() == DType::F64 || !input.dtype().is_float(),
            Error::dtype("gradcheck", format_args!("float inputs must be f64, got {}", input.dtype()))
        );
    }
    let leaves: Vec<Tensor> = inputs
        .iter()
        .map(|input| if input.dtype().is_float() { input.requires_grad() } else { Ok(input.detach()) })
        .collect::<Result<_>>()?;
    let mut tape = Tape::grad();
    let output = f(&leaves)?;
    ensure!(
        output.dtype() == DType::F64,
        Error::dtype("gradcheck", format_args!("the output must be f64, got {}", output.dtype()))
    );
    let random = Philox::new(0x6772_6164, 0);
    let cotangent = Tensor::generate(*output.shape(), DType::F64, output.device(), |i| random.normal(i as u64))?;
    let grads = tape.backward_with(&output, &cotangent)?;
    drop(tape);
    let weights = cotangent.to_vec::<f64>()?;
    let objective = |inputs: &[Tensor]| -> Result<f64> {
        Ok(f(inputs)?.to_vec::<f64>()?.iter().zip(&weights).map(|(y, w)| y * w).sum())
    };

    let mut report = GradcheckReport { inputs: Vec::new(), tolerance: options.tolerance };
    let mut varied: Vec<Tensor> = inputs.iter().map(Tensor::detach).collect_vec();
    for (position, leaf) in leaves.iter().enumerate().filter(|(_, leaf)| leaf.dtype().is_float()) {
        let values = leaf.to_vec::<f64>()?;
        let analytic = match grads.get(leaf) {
            Some(grad) => grad.to_vec::<f64>()?,
            None => vec![0.0; values.len()],
        };
        let scale = analytic.iter().fold(1.0f64, |largest, g| largest.max(g.abs()));
        let count = values.len().min(options.max_elements.max(1));
        let mut entry = InputReport { input: position, checked: 0, error: 0.0, worst: 0, analytic: 0.0, numeric: 0.0 };
        for run in 0..count {
            // Drawn at random, because even steps would visit the same few columns of every row.
            let (start, end) = (run * values.len() / count, (run + 1) * values.len() / count);
            let element = start + random.below(run as u64, (end - start) as u64) as usize;
            let step = options.step * values[element].abs().max(1.0);
            let mut at = |offset: f64| -> Result<f64> {
                let mut moved = values.clone();
                moved[element] += offset * step;
                varied[position] = Tensor::from_slice(&moved, *leaf.shape(), leaf.device())?;
                objective(&varied)
            };
            let numeric = (8.0 * (at(1.0)? - at(-1.0)?) - (at(2.0)? - at(-2.0)?)) / (12.0 * step);
            let error = (numeric - analytic[element]).abs() / scale;
            entry.checked += 1;
            if error > entry.error || error.is_nan() || entry.checked == 1 {
                entry = InputReport { error, worst: element, analytic: analytic[element], numeric, ..entry };
            }
            if error.is_nan() {
                break;
            }
        }
        varied[position] = inputs[position].detach();
        report.inputs.push(entry);
    }
    Ok(report)
}
