//! One case: an op, inputs, and a reference written from the formula. `check` runs it on every dtype and layout.

use x_transformers::{DType, Device, Gradcheck, Philox, Result, Tape, Tensor, gradcheck};

/// A plain f64 array for references: nested loops, no cleverness.
#[derive(Clone, Debug)]
pub struct Array {
    pub shape: Vec<usize>,
    pub data: Vec<f64>,
}

impl Array {
    /// Element at each multi-index, called in row-major order.
    pub fn from_fn(shape: &[usize], mut f: impl FnMut(&[usize]) -> f64) -> Self {
        let mut index = vec![0; shape.len()];
        let mut data = Vec::new();
        for _ in 0..shape.iter().product() {
            data.push(f(&index));
            for dim in (0..shape.len()).rev() {
                index[dim] += 1;
                if index[dim] < shape[dim] {
                    break;
                }
                index[dim] = 0;
            }
        }
        Self { shape: shape.to_vec(), data }
    }

    /// The element at an index that broadcasts: aligned at the last dimension, size-1 dimensions repeat.
    pub fn at(&self, index: &[usize]) -> f64 {
        let skip = index.len() - self.shape.len();
        let mut position = 0;
        for (dim, &size) in self.shape.iter().enumerate() {
            position = position * size + if size == 1 { 0 } else { index[skip + dim] };
        }
        self.data[position]
    }

    /// Rows along the last dimension.
    pub fn rows(&self) -> impl Iterator<Item = &[f64]> {
        self.data.chunks(self.shape.last().copied().unwrap_or(1).max(1))
    }
}

/// One input of an op.
#[derive(Clone, Debug)]
pub enum Input {
    /// Uniform floats in `low..high`; `grad`: differentiated.
    Float { shape: Vec<usize>, low: f64, high: f64, grad: bool },
    /// Uniform integers in `0..limit`.
    Int { shape: Vec<usize>, limit: u64 },
    /// Random booleans, true with probability `keep`.
    Bool { shape: Vec<usize>, keep: f64 },
    /// Fixed floats, not differentiated.
    Values { shape: Vec<usize>, values: Vec<f64> },
}

impl Input {
    /// Differentiated floats in `-2..2`.
    pub fn float(shape: &[usize]) -> Self {
        Self::between(shape, -2.0, 2.0)
    }

    /// Differentiated floats in a range.
    pub fn between(shape: &[usize], low: f64, high: f64) -> Self {
        Self::Float { shape: shape.to_vec(), low, high, grad: true }
    }

    /// Integers in `0..limit`.
    pub fn int(shape: &[usize], limit: u64) -> Self {
        Self::Int { shape: shape.to_vec(), limit }
    }

    /// Booleans, mostly true.
    pub fn mask(shape: &[usize]) -> Self {
        Self::Bool { shape: shape.to_vec(), keep: 0.7 }
    }

    /// The values, rounded to bf16's eight bits so that every dtype computes from the same numbers.
    fn draw(&self, stream: u64) -> Array {
        let random = Philox::new(0xC0FFEE, stream);
        let (shape, value): (_, Box<dyn Fn(u64) -> f64>) = match self {
            Self::Float { shape, low, high, .. } => {
                let (low, high) = (*low, *high);
                (shape, Box::new(move |i| half::bf16::from_f64(low + (high - low) * random.uniform(i)).to_f64()))
            }
            Self::Int { shape, limit } => {
                let limit = *limit;
                (shape, Box::new(move |i| random.below(i, limit) as f64))
            }
            Self::Bool { shape, keep } => {
                let keep = *keep;
                (shape, Box::new(move |i| (random.uniform(i) < keep) as u8 as f64))
            }
            Self::Values { shape, values } => {
                let values = values.clone();
                (shape, Box::new(move |i| values[i as usize]))
            }
        };
        let data = (0..shape.iter().product::<usize>()).map(|i| value(i as u64)).collect();
        Array { shape: shape.clone(), data }
    }

    fn dtype(&self, float: DType) -> DType {
        match self {
            Self::Float { .. } | Self::Values { .. } => float,
            Self::Int { .. } => DType::I64,
            Self::Bool { .. } => DType::Bool,
        }
    }

    fn differentiated(&self) -> bool {
        matches!(self, Self::Float { grad: true, .. })
    }
}

/// An op on some inputs, with its definition.
pub struct Case {
    /// In `ops::NAMES`.
    pub op: &'static str,
    /// For messages and `XT_CASE`.
    pub name: String,
    pub inputs: Vec<Input>,
    pub run: Box<dyn Fn(&[Tensor]) -> Result<Tensor>>,
    pub reference: Box<dyn Fn(&[Array]) -> Array>,
    /// Multiplies the default tolerance; anything but 1 needs its reason beside it.
    pub tolerance: f64,
}

impl Case {
    pub fn new(
        op: &'static str,
        name: impl Into<String>,
        inputs: Vec<Input>,
        run: impl Fn(&[Tensor]) -> Result<Tensor> + 'static,
        reference: impl Fn(&[Array]) -> Array + 'static,
    ) -> Self {
        Self {
            op,
            name: format!("{op}/{}", name.into()),
            inputs,
            run: Box::new(run),
            reference: Box::new(reference),
            tolerance: 1.0,
        }
    }

    pub fn tolerance(mut self, factor: f64) -> Self {
        self.tolerance = factor;
        self
    }
}

/// How an input lies in memory.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Lay {
    Packed,
    /// Every input transposed in memory.
    Transposed,
    /// A slice out of a larger tensor, with an offset and gaps.
    Sliced,
}

/// Relative error (in the Euclidean norm) allowed per dtype.
fn allowed(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => 1e-12,
        DType::F32 => 2e-6,
        DType::F16 => 4e-3,
        _ => 3e-2,
    }
}

fn tensor(array: &Array, dtype: DType, lay: Lay) -> Result<Tensor> {
    let device = Device::Cpu;
    let build = |data: &[f64], shape: &[usize]| Tensor::from_slice(data, shape, &device)?.to_dtype(dtype);
    let rank = array.shape.len();
    if rank == 0 || lay == Lay::Packed {
        return build(&array.data, &array.shape);
    }
    match lay {
        Lay::Transposed if rank >= 2 => {
            let mut shape = array.shape.clone();
            shape.swap(0, rank - 1);
            let swapped = Array::from_fn(&shape, |index| {
                let mut index = index.to_vec();
                index.swap(0, rank - 1);
                array.at(&index)
            });
            build(&swapped.data, &shape)?.transpose(0, -1)
        }
        _ => {
            let shape: Vec<usize> = array.shape.iter().map(|size| size + 3).collect();
            let padded = Array::from_fn(&shape, |index| {
                let inside = index.iter().zip(&array.shape).all(|(&i, &size)| (1..=size).contains(&i));
                if !inside {
                    return if dtype.is_float() { 1e3 } else { 1.0 };
                }
                array.at(&index.iter().map(|i| i - 1).collect::<Vec<_>>())
            });
            let mut result = build(&padded.data, &shape)?;
            for (dim, &size) in array.shape.iter().enumerate() {
                result = result.narrow(dim as isize, 1, size)?;
            }
            Ok(result)
        }
    }
}

fn relative(actual: &[f64], expected: &[f64]) -> f64 {
    let error: f64 = actual.iter().zip(expected).map(|(a, e)| if a == e { 0.0 } else { (a - e).powi(2) }).sum();
    let norm: f64 = expected.iter().filter(|e| e.is_finite()).map(|e| e * e).sum();
    error.sqrt() / norm.sqrt().max(1e-6)
}

/// Runs a case; returns what went wrong.
pub fn check(case: &Case) -> Vec<String> {
    let mut failures = Vec::new();
    if let Err(error) = check_all(case, &mut failures) {
        failures.push(format!("{}: {error}", case.name));
    }
    failures
}

fn check_all(case: &Case, failures: &mut Vec<String>) -> Result<()> {
    let arrays: Vec<Array> = case.inputs.iter().enumerate().map(|(i, input)| input.draw(i as u64)).collect();
    let expected = (case.reference)(&arrays);
    let inputs = |float: DType, lay: Lay| -> Result<Vec<Tensor>> {
        case.inputs.iter().zip(&arrays).map(|(input, array)| tensor(array, input.dtype(float), lay)).collect()
    };

    // Gradients in f64 by differences of the op itself.
    let exact = inputs(DType::F64, Lay::Packed)?;
    let differentiable = case.inputs.iter().any(Input::differentiated);
    if differentiable && expected.data.len() + arrays.iter().map(|a| a.data.len()).sum::<usize>() < 4000 {
        let report = gradcheck(
            |tensors| {
                let tensors: Vec<Tensor> = tensors
                    .iter()
                    .zip(&case.inputs)
                    .map(|(tensor, input)| if input.differentiated() { tensor.clone() } else { tensor.detach() })
                    .collect();
                (case.run)(&tensors)
            },
            &exact,
            Gradcheck::default(),
        )?;
        for input in report.inputs.iter().filter(|input| case.inputs[input.input].differentiated()) {
            if !(input.error <= report.tolerance) {
                failures.push(format!("{}: gradient\n{report}", case.name));
            }
        }
    }

    let mut reference_grads: Option<Vec<Vec<f64>>> = None;
    for dtype in [DType::F64, DType::F32, DType::F16, DType::BF16] {
        let mut packed_bits: Option<Vec<f64>> = None;
        for lay in [Lay::Packed, Lay::Transposed, Lay::Sliced] {
            let what = format!("{} {dtype} {lay:?}", case.name);
            let given = inputs(dtype, lay)?;
            let before: Vec<Vec<f64>> = given.iter().map(Tensor::to_f64_vec).collect::<Result<_>>()?;
            let output = (case.run)(&given)?;
            if **output.shape() != *expected.shape {
                failures.push(format!("{what}: shape {:?}, expected {:?}", output.shape(), expected.shape));
                continue;
            }
            let actual = output.to_f64_vec()?;
            let error = relative(&actual, &expected.data);
            let bound = allowed(dtype) * case.tolerance;
            if !(error <= bound) {
                failures.push(format!("{what}: relative error {error:.2e}, allowed {bound:.0e}"));
            }
            // Every layout gives the same bits.
            match &packed_bits {
                None => packed_bits = Some(actual),
                Some(bits) if *bits != actual && !actual.iter().any(|x| x.is_nan()) => {
                    failures.push(format!("{what}: other bits than the packed layout"));
                }
                _ => {}
            }
            for (tensor, before) in given.iter().zip(&before) {
                if tensor.to_f64_vec()? != *before {
                    failures.push(format!("{what}: an input was changed"));
                }
            }
            // Gradients of every dtype and layout against those of f64.
            if differentiable {
                let leaves: Vec<Tensor> = given
                    .iter()
                    .zip(&case.inputs)
                    .map(|(t, input)| if input.differentiated() { t.requires_grad() } else { Ok(t.clone()) })
                    .collect::<Result<_>>()?;
                let mut tape = Tape::grad();
                let output = (case.run)(&leaves)?;
                let random = Philox::new(11, 0);
                let cotangent = Tensor::generate(*output.shape(), DType::F64, &Device::Cpu, |i| {
                    half::bf16::from_f64(random.normal(i as u64)).to_f64()
                })?;
                let grads = tape.backward_with(&output, &cotangent.to_dtype(output.dtype())?)?;
                let mut values = Vec::new();
                for leaf in leaves.iter().zip(&case.inputs).filter(|(_, i)| i.differentiated()).map(|(l, _)| l) {
                    match grads.get(leaf) {
                        Some(grad) if grad.shape() != leaf.shape() || grad.dtype() != leaf.dtype() => {
                            failures.push(format!("{what}: gradient {grad:?} for input {leaf:?}"));
                            values.push(vec![]);
                        }
                        Some(grad) => values.push(grad.to_f64_vec()?),
                        None => values.push(vec![0.0; leaf.elements()]),
                    }
                }
                match &reference_grads {
                    None => reference_grads = Some(values),
                    Some(reference) => {
                        for (input, (actual, expected)) in values.iter().zip(reference).enumerate() {
                            let error = relative(actual, expected);
                            // Gradients pass through one more rounding of each operand.
                            if !(error <= 2.0 * bound) {
                                failures.push(format!("{what}: gradient {input} off by {error:.2e}"));
                            }
                        }
                    }
                }
            }
        }
    }
    Ok(())
}
