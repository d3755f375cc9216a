//! Checks of every case: values, gradients, layouts, unchanged inputs, and no leaked memory.

use x_transformers::{DType, Device, Gradcheck, Result, Tape, Tensor, gradcheck};

use crate::{
    case::{Array, Case, Gradient, Input, Lay, cotangent},
    common::device,
};

const FLOATS: [DType; 4] = [DType::F64, DType::F32, DType::F16, DType::BF16];

/// Relative error (in the Euclidean norm) allowed per dtype.
fn allowed(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => 1e-12,
        DType::F32 => 2e-6,
        DType::F16 => 4e-3,
        _ => 3e-2,
    }
}

/// Factor by which the error of one element may exceed that of the whole.
const WORST: f64 = 8.0;

/// Runs a case; returns what went wrong.
pub fn check(case: &Case) -> Vec<String> {
    let mut check = Check { case, failures: Vec::new() };
    if let Err(error) = check.all() {
        check.failures.push(format!("{}: {error}", case.name));
    }
    check.failures
}

struct Check<'a> {
    case: &'a Case,
    failures: Vec<String>,
}

/// Results of a case on packed inputs, which other layouts are compared with.
struct Packed {
    output: Vec<f64>,
    gradients: Vec<Vec<f64>>,
}

impl Check<'_> {
    fn all(&mut self) -> Result<()> {
        let arrays = self.case.draw();
        self.layouts(&arrays, &[Lay::Packed, Lay::Transposed, Lay::Sliced, Lay::Offset])?;
        self.gradients(&arrays)?;
        self.one_gradient_at_a_time(&arrays)?;
        for lay in [Lay::RepeatedRows, Lay::RepeatedColumns] {
            if self.case.repeats {
                let possible = |(array, input): (&Array, &Input)| match input {
                    Input::Values { .. } => array.clone(),
                    _ => lay.possible(array),
                };
                let arrays: Vec<Array> = arrays.iter().zip(&self.case.inputs).map(possible).collect();
                self.layouts(&arrays, &[Lay::Packed, lay])?;
            }
        }
        self.leaves_nothing_behind(&arrays)
    }

    fn fail(&mut self, what: &str, message: impl std::fmt::Display) {
        self.failures.push(format!("{what}: {message}"));
    }

    /// Gradients in f64: on the CPU against finite differences of the op itself, elsewhere against the CPU's.
    /// Differences take two runs per element, too slow on an emulated card.
    fn gradients(&mut self, arrays: &[Array]) -> Result<()> {
        let case = self.case;
        if !case.differentiable() {
            return Ok(());
        }
        let tensors = case.tensors(arrays, DType::F64, Lay::Packed)?;
        if *device() == Device::Cpu { self.differences(arrays, &tensors) } else { self.like_the_cpu(&tensors) }
    }

    fn differences(&mut self, arrays: &[Array], tensors: &[Tensor]) -> Result<()> {
        let case = self.case;
        // Each element takes four runs. Of the cases that take long, which have 100,000 elements, fewer are drawn.
        let elements: usize = arrays.iter().map(|array| array.data.len()).sum();
        let large = elements + (case.reference)(arrays).data.len() >= 50_000;
        // f64 has the same code at every vector level, but for products, which are also compared with their definition.
        let most = if std::env::var_os("XT_CPU").is_some() { 16 } else { 200 };
        let max_elements = if large { most.min(50) } else { most };
        let options = Gradcheck { step: case.step, max_elements, ..Gradcheck::default() };
        let run = |tensors: &[Tensor]| {
            let keep = |i: usize| if case.differentiates(i) { tensors[i].clone() } else { tensors[i].detach() };
            (case.run)(&(0..tensors.len()).map(keep).collect::<Vec<_>>())
        };
        let report = gradcheck(run, tensors, options)?;
        let wrong = |input: &x_transformers::InputReport| !(input.error <= report.tolerance);
        if report.inputs.iter().any(|input| case.differentiates(input.input) && wrong(input)) {
            self.fail(&case.name, format!("gradient\n{report}"));
        }
        Ok(())
    }

    /// An input has the same gradient if no other input requires one.
    fn one_gradient_at_a_time(&mut self, arrays: &[Array]) -> Result<()> {
        let (case, bound) = (self.case, 2.0 * allowed(DType::F32) * self.case.tolerance);
        let differentiated: Vec<usize> = (0..arrays.len()).filter(|&i| case.differentiates(i)).collect();
        if differentiated.len() < 2 {
            return Ok(());
        }
        let tensors = case.tensors(arrays, DType::F32, Lay::Packed)?;
        let (_, all) = case.run_with_gradients(&tensors)?;
        for (input, expected) in differentiated.into_iter().zip(&all) {
            let mut inputs = tensors.clone();
            inputs[input] = inputs[input].requires_grad()?;
            let mut tape = Tape::grad();
            let output = (case.run)(&inputs)?;
            let grads = tape.backward_with(&output, &cotangent(&output)?)?;
            let zeros = || Ok(vec![0.0; expected.values.len()]);
            let values = grads.get(&inputs[input]).map_or_else(zeros, Tensor::to_f64_vec)?;
            if let Some(message) = far(&values, &expected.values, bound) {
                self.fail(&case.name, format!("gradient of input {input} by itself: {message}"));
            }
        }
        Ok(())
    }

    fn like_the_cpu(&mut self, tensors: &[Tensor]) -> Result<()> {
        let there = tensors.iter().map(|x| x.to_device(&Device::Cpu)).collect::<Result<Vec<_>>>()?;
        let (_, expected) = self.case.run_with_gradients(&there)?;
        let (_, actual) = self.case.run_with_gradients(tensors)?;
        for (actual, expected) in actual.iter().zip(&expected) {
            // Gradients pass through one more rounding of each operand.
            let bound = 2.0 * allowed(DType::F64) * self.case.tolerance;
            if let Some(message) = far(&actual.values, &expected.values, bound) {
                let input = actual.input;
                self.fail(&self.case.name, format!("gradient of input {input} in f64 beside the CPU's: {message}"));
            }
        }
        Ok(())
    }

    /// Values and gradients in every dtype; the first layout is the packed one.
    fn layouts(&mut self, arrays: &[Array], layouts: &[Lay]) -> Result<()> {
        let expected = (self.case.reference)(arrays);
        let mut exact: Option<Vec<Vec<f64>>> = None;
        for dtype in FLOATS {
            let mut packed: Option<Packed> = None;
            for &lay in layouts {
                let what = format!("{} {dtype} {lay:?}", self.case.name);
                let given = self.case.tensors(arrays, dtype, lay)?;
                let without_tape = packed.is_none() || !self.has_one_order();
                let Some(this) = self.one(&what, dtype, &given, &expected, exact.as_deref(), without_tape)? else {
                    continue;
                };
                match &packed {
                    Some(_) if !self.has_one_order() => {}
                    Some(packed) => {
                        if !same_bits(&packed.output, &this.output) {
                            self.fail(&what, "other bits than packed inputs");
                        }
                        for (index, (packed, this)) in packed.gradients.iter().zip(&this.gradients).enumerate() {
                            if !same_bits(packed, this) {
                                self.fail(&what, format!("gradient {index} has other bits than for packed inputs"));
                            }
                        }
                    }
                    None => {
                        exact.get_or_insert_with(|| this.gradients.clone());
                        packed = Some(this);
                    }
                }
            }
        }
        Ok(())
    }

    /// Sums have the same order for every layout of the operands. cuBLAS chooses its kernel by transposition, alignment
    /// and leading dimension; the emulated one has a single kernel, so packing must not change a bit there.
    fn has_one_order(&self) -> bool {
        let is_card = *device() != Device::Cpu && std::env::var_os("XT_EMULATOR").is_none();
        let op = self.case.name.split('/').next().unwrap_or_default();
        let ordered = !is_card || !["matmul", "linear", "linear_cross_entropy"].contains(&op);
        if !ordered {
            println!(
                "{}: bits of other layouts are not compared, cuBLAS chooses the order by the layout",
                self.case.name
            );
        }
        ordered
    }

    /// One run against the reference, and against the gradients in f64 once they are known; without a tape too if
    /// `also_without_tape`. The other layouts give the bits of packed inputs, and the run on a tape shows it.
    fn one(
        &mut self,
        what: &str,
        dtype: DType,
        given: &[Tensor],
        expected: &Array,
        exact: Option<&[Vec<f64>]>,
        also_without_tape: bool,
    ) -> Result<Option<Packed>> {
        let before = given.iter().map(Tensor::to_f64_vec).collect::<Result<Vec<_>>>()?;
        let mut grads = Vec::new();
        let output = match also_without_tape || !self.case.differentiable() {
            true => (self.case.run)(given)?,
            false => {
                let recorded;
                (recorded, grads) = self.case.run_with_gradients(given)?;
                recorded
            }
        };
        if **output.shape() != *expected.shape {
            self.fail(what, format!("shape {:?}, expected {:?}", output.shape(), expected.shape));
            return Ok(None);
        }
        let values = output.to_f64_vec()?;
        let bound = allowed(dtype) * self.case.tolerance;
        if let Some(message) = far(&values, &expected.data, bound) {
            self.fail(what, message);
        }
        let mut gradients = Vec::new();
        if self.case.differentiable() {
            if also_without_tape {
                let recorded;
                (recorded, grads) = self.case.run_with_gradients(given)?;
                if !same_bits(&recorded.to_f64_vec()?, &values) {
                    self.fail(what, "other bits on a tape than without one");
                }
            }
            for Gradient { input, fits, values } in grads {
                if !fits {
                    self.fail(what, format!("the gradient of input {input} has another shape or dtype"));
                } else if let Some(message) = exact.and_then(|exact| {
                    // Gradients pass through one more rounding of each operand.
                    far(&values, &exact[gradients.len()], 2.0 * bound)
                }) {
                    self.fail(what, format!("gradient of input {input}: {message}"));
                }
                gradients.push(values);
            }
        }
        for (tensor, before) in given.iter().zip(&before) {
            if !same_bits(&tensor.to_f64_vec()?, before) {
                self.fail(what, "an input was changed");
            }
        }
        Ok(Some(Packed { output: values, gradients }))
    }

    /// Without a tape there are no nodes; everything that a tape saved is freed after its backward pass or on drop.
    fn leaves_nothing_behind(&mut self, arrays: &[Array]) -> Result<()> {
        let case = self.case;
        let inputs = case.tensors(arrays, DType::F32, Lay::Packed)?;
        let leaves = case.leaves(&inputs)?;
        let live = || device().memory().live as isize;
        let start = live();

        let output = (case.run)(&leaves)?;
        let tape = Tape::grad();
        let _ = output.unsqueeze(0).or_else(|_| output.flatten(0, 1))?;
        // An op that has nothing to do may return the leaf itself.
        if !tape.is_empty() && !leaves.iter().any(|leaf| leaf.shares_storage(&output)) {
            self.fail(&case.name, "the output is tracked though no tape was there");
        }
        drop((tape, output));
        let tape = Tape::grad();
        let _ = (case.run)(&inputs)?;
        if !tape.is_empty() {
            self.fail(&case.name, format!("{} nodes were recorded though no input requires a gradient", tape.len()));
        }
        drop(tape);
        if live() != start {
            self.fail(&case.name, format!("{} bytes are left from a run without gradients", live() - start));
        }
        if !case.differentiable() {
            return Ok(());
        }
        let tape = Tape::grad();
        drop((case.run)(&leaves)?);
        drop(tape);
        if live() != start {
            self.fail(&case.name, format!("{} bytes are left from a tape that was dropped", live() - start));
        }
        let mut tape = Tape::grad();
        let output = (case.run)(&leaves)?;
        let grads = tape.backward_with(&output, &cotangent(&output)?)?;
        drop((output, grads));
        if live() != start {
            self.fail(&case.name, format!("{} bytes are left from a backward pass", live() - start));
        }
        Ok(())
    }
}

/// Returns the output and gradients of a case in every float dtype, which must not depend on threads.
pub fn bits(case: &Case) -> Result<Vec<Vec<f64>>> {
    let arrays = case.draw();
    let mut all = Vec::new();
    for dtype in FLOATS {
        let tensors = case.tensors(&arrays, dtype, Lay::Packed)?;
        if case.differentiable() {
            let (output, gradients) = case.run_with_gradients(&tensors)?;
            all.push(output.to_f64_vec()?);
            all.extend(gradients.into_iter().map(|gradient| gradient.values));
        } else {
            all.push((case.run)(&tensors)?.to_f64_vec()?);
        }
    }
    Ok(all)
}

/// Returns `true` if two results are equal bit for bit; all NaNs compare equal.
pub fn same_bits(a: &[f64], b: &[f64]) -> bool {
    let same = |(a, b): (&f64, &f64)| a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan());
    a.len() == b.len() && a.iter().zip(b).all(same)
}

/// Returns an error with the difference from the expected result if it is too large, as a whole or in one element.
fn far(actual: &[f64], expected: &[f64], bound: f64) -> Option<String> {
    if actual.len() != expected.len() {
        return Some(format!("{} elements, expected {}", actual.len(), expected.len()));
    }
    let same = |a: f64, e: f64| a == e || (a.is_nan() && e.is_nan());
    let square = |(&a, &e): (&f64, &f64)| if same(a, e) { 0.0 } else { (a - e).powi(2) };
    let error = actual.iter().zip(expected).map(square).sum::<f64>().sqrt();
    let norm = expected.iter().filter(|e| e.is_finite()).map(|e| e * e).sum::<f64>().sqrt().max(1e-6);
    if !(error <= bound * norm) {
        return Some(format!("relative error {:.2e}, allowed {bound:.0e}", error / norm));
    }
    let typical = norm / (expected.len() as f64).sqrt();
    let near = |a: f64, e: f64| same(a, e) || (a - e).abs() <= WORST * bound * e.abs().max(typical);
    let at = actual.iter().zip(expected).position(|(&a, &e)| !near(a, e))?;
    Some(format!("element {at} is {:e}, expected {:e}", actual[at], expected[at]))
}
