//! Ops as a user would write them, for tests of the tape.

use x_transformers::{Backward, DType, InputGrads, Result, Tensor, record};

use super::common::device;

pub fn vector(values: &[f64]) -> Tensor {
    Tensor::from_slice(values, [values.len()], device()).unwrap()
}

pub fn leaf(values: &[f64]) -> Tensor {
    vector(values).requires_grad().unwrap()
}

pub fn values(tensor: &Tensor) -> Vec<f64> {
    tensor.to_f64_vec().unwrap()
}

pub fn grid(rows: usize, columns: usize) -> Tensor {
    Tensor::generate([rows, columns], DType::F64, device(), |i| (i as f64 * 0.7).sin()).unwrap()
}

/// `x²`, as a user would write it: saves `x`.
pub fn square(x: &Tensor) -> Result<Tensor> {
    let squares: Vec<f64> = x.to_f64_vec()?.iter().map(|x| x * x).collect();
    let saved = x.detach();
    record("square", Tensor::from_slice(&squares, *x.shape(), device())?, &[x], |_| SquareBackward { x: saved })
}

struct SquareBackward {
    x: Tensor,
}

impl Backward for SquareBackward {
    fn name(&self) -> &'static str {
        "square"
    }

    fn backward(self: Box<Self>, grad: Tensor, _need: &[bool]) -> Result<InputGrads> {
        let products: Vec<f64> =
            self.x.to_f64_vec()?.iter().zip(grad.to_f64_vec()?).map(|(x, g)| 2.0 * x * g).collect();
        Tensor::from_slice(&products, *self.x.shape(), device()).map(InputGrads::one)
    }
}

/// `a + b`, whose backward returns the same gradient tensor for both inputs.
pub fn sum_of(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let sums: Vec<f64> = a.to_f64_vec()?.iter().zip(b.to_f64_vec()?).map(|(a, b)| a + b).collect();
    let sums = Tensor::from_slice(&sums, *a.shape(), device())?.to_dtype(a.dtype())?;
    record("sum_of", sums, &[a, b], |_| SharedBackward)
}

struct SharedBackward;

impl Backward for SharedBackward {
    fn name(&self) -> &'static str {
        "sum_of"
    }

    fn backward(self: Box<Self>, grad: Tensor, _need: &[bool]) -> Result<InputGrads> {
        Ok(InputGrads::whole([Some(grad.clone()), Some(grad)]))
    }
}
