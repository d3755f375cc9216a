//! One case: an op, inputs, and a reference written from the formula; and the tensors to run it on.

use x_transformers::{DType, Gradcheck, Philox, Result, Tape, Tensor};

use crate::common::device;

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

    /// Returns the element at a broadcast index: aligned at the last dimension, size-1 dimensions repeat.
    pub fn at(&self, index: &[usize]) -> f64 {
        let skip = index.len() - self.shape.len();
        let mut position = 0;
        for (dim, &size) in self.shape.iter().enumerate() {
            position = position * size + if size == 1 { 0 } else { index[skip + dim] };
        }
        self.data[position]
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

/// The code under test.
type Run = Box<dyn Fn(&[Tensor]) -> Result<Tensor>>;
/// Its naive definition.
type Reference = Box<dyn Fn(&[Array]) -> Array>;

/// An op on some inputs, with its definition.
pub struct Case {
    /// In `ops::NAMES`.
    pub op: &'static str,
    /// For messages and `XT_CASE`.
    pub name: String,
    pub inputs: Vec<Input>,
    pub run: Run,
    pub reference: Reference,
    /// Factor on the default tolerance; anything but 1 needs a comment with the reason.
    pub tolerance: f64,
    /// Relative step of the differences that gradients are checked by.
    pub step: f64,
    /// If `true`, inputs whose rows or columns are all equal have a defined result.
    pub repeats: bool,
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
            step: Gradcheck::default().step,
            repeats: true,
        }
    }

    pub fn step(mut self, step: f64) -> Self {
        self.step = step;
        self
    }

    pub fn tolerance(mut self, factor: f64) -> Self {
        self.tolerance = factor;
        self
    }

    /// Skips inputs that repeat one row or column, where ties make the result ambiguous.
    pub fn distinct(mut self) -> Self {
        self.repeats = false;
        self
    }

    /// The values of all inputs.
    pub fn draw(&self) -> Vec<Array> {
        self.inputs.iter().enumerate().map(|(i, input)| input.draw(i as u64)).collect()
    }

    /// The inputs as tensors, floats in `float`.
    pub fn tensors(&self, arrays: &[Array], float: DType, lay: Lay) -> Result<Vec<Tensor>> {
        self.inputs.iter().zip(arrays).map(|(input, array)| tensor(array, input, float, lay)).collect()
    }

    /// The inputs as leaves where they are differentiated.
    pub fn leaves(&self, tensors: &[Tensor]) -> Result<Vec<Tensor>> {
        let leaf =
            |(x, input): (&Tensor, &Input)| if input.differentiated() { x.requires_grad() } else { Ok(x.clone()) };
        tensors.iter().zip(&self.inputs).map(leaf).collect()
    }

    /// The output, and the gradient of each differentiated input under a random cotangent.
    pub fn run_with_gradients(&self, tensors: &[Tensor]) -> Result<(Tensor, Vec<Gradient>)> {
        let leaves = self.leaves(tensors)?;
        let mut tape = Tape::grad();
        let output = (self.run)(&leaves)?;
        let grads = tape.backward_with(&output, &cotangent(&output)?)?;
        let differentiated =
            leaves.iter().zip(&self.inputs).enumerate().filter(|(_, (_, input))| input.differentiated());
        let gradients = differentiated.map(|(input, (leaf, _))| {
            let Some(grad) = grads.get(leaf) else {
                return Ok(Gradient { input, fits: true, values: vec![0.0; leaf.numel()] });
            };
            let fits = grad.shape() == leaf.shape() && grad.dtype() == leaf.dtype();
            Ok(Gradient { input, fits, values: grad.to_f64_vec()? })
        });
        Ok((output.detach(), gradients.collect::<Result<_>>()?))
    }

    pub fn differentiable(&self) -> bool {
        self.inputs.iter().any(Input::differentiated)
    }

    /// Returns `true` if input `i`, counted among all inputs, is differentiated.
    pub fn differentiates(&self, i: usize) -> bool {
        self.inputs[i].differentiated()
    }
}

/// The gradient of one input.
pub struct Gradient {
    pub input: usize,
    /// If `true`, it has the shape and the dtype of the input.
    pub fits: bool,
    pub values: Vec<f64>,
}

/// The same random numbers for every dtype.
pub fn cotangent(output: &Tensor) -> Result<Tensor> {
    let random = Philox::new(11, 0);
    let value = |i: usize| half::bf16::from_f64(random.normal(i as u64)).to_f64();
    Tensor::generate(*output.shape(), output.dtype(), output.device(), value)
}

/// Memory layout of an input.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Lay {
    Packed,
    /// Every input transposed in memory.
    Transposed,
    /// A slice out of a larger tensor, with an offset and gaps.
    Sliced,
    /// Packed, but not from the start of its storage.
    Offset,
    /// The first dimension has stride 0: one row for all.
    RepeatedRows,
    /// The last dimension has stride 0.
    RepeatedColumns,
}

impl Lay {
    /// The values that an input with this layout can hold, given those of the packed one.
    pub fn possible(self, array: &Array) -> Array {
        let last = array.shape.len().saturating_sub(1);
        let repeated = match self {
            Self::RepeatedRows => 0,
            Self::RepeatedColumns => last,
            _ => return array.clone(),
        };
        Array::from_fn(&array.shape, |index| {
            let mut index = index.to_vec();
            index.iter_mut().skip(repeated).take(1).for_each(|i| *i = 0);
            array.at(&index)
        })
    }
}

fn tensor(array: &Array, input: &Input, float: DType, lay: Lay) -> Result<Tensor> {
    let dtype = input.dtype(float);
    let build = |array: &Array| Tensor::from_slice(&array.data, &array.shape, device())?.to_dtype(dtype);
    let (rank, last) = (array.shape.len(), array.shape.len().saturating_sub(1));
    // Fixed values may only make sense unchanged.
    let fixed = matches!(input, Input::Values { .. });
    match lay {
        _ if rank == 0 => build(array),
        Lay::Packed => build(array),
        Lay::RepeatedRows | Lay::RepeatedColumns if fixed => build(array),
        Lay::RepeatedRows => repeated(array, 0, build),
        Lay::RepeatedColumns => repeated(array, last, build),
        Lay::Transposed if rank >= 2 => {
            let mut shape = array.shape.clone();
            shape.swap(0, last);
            let swapped = Array::from_fn(&shape, |index| {
                let mut index = index.to_vec();
                index.swap(0, last);
                array.at(&index)
            });
            build(&swapped)?.transpose(0, -1)
        }
        Lay::Offset => padded(array, 1, dtype, build),
        Lay::Transposed | Lay::Sliced => padded(array, rank, dtype, build),
    }
}

/// A view with stride 0 along a dimension in which the values repeat.
fn repeated(array: &Array, dim: usize, build: impl Fn(&Array) -> Result<Tensor>) -> Result<Tensor> {
    if array.shape[dim] < 2 {
        return build(array);
    }
    let mut shape = array.shape.clone();
    shape[dim] = 1;
    build(&Array::from_fn(&shape, |index| array.at(index)))?.expand(&array.shape)
}

/// A view into a tensor that is larger in the first `dims` dimensions.
fn padded(array: &Array, dims: usize, dtype: DType, build: impl Fn(&Array) -> Result<Tensor>) -> Result<Tensor> {
    let mut shape = array.shape.clone();
    shape[..dims].iter_mut().for_each(|size| *size += 3);
    let larger = Array::from_fn(&shape, |index| {
        let index: Vec<usize> =
            (0..index.len()).map(|d| if d < dims { index[d].wrapping_sub(1) } else { index[d] }).collect();
        let inside = index.iter().zip(&array.shape).all(|(i, size)| i < size);
        match inside {
            true => array.at(&index),
            // Unusual, so that reading it shows.
            false if dtype.is_float() => 1e3,
            false => 1.0,
        }
    });
    let mut result = build(&larger)?;
    for (dim, &size) in array.shape.iter().enumerate().take(dims) {
        result = result.narrow(dim as isize, 1, size)?;
    }
    Ok(result)
}
