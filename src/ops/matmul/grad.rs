//! Gradients of `matmul` and `linear`: products of the gradient with the other operand.

use super::{product, product_sums, strides::split_last_two};
use crate::{
    Result, Tensor,
    autograd::{Backward, InputGrads},
    collect::CollectVec,
    shape::Shape,
    tensor::Saved,
};

pub(super) struct MatmulBackward {
    pub a: Option<Tensor>,
    pub b: Option<Tensor>,
    pub shapes: [Shape; 2],
}

impl Backward for MatmulBackward {
    fn name(&self) -> &'static str {
        "matmul"
    }

    /// Computes `dA = G·Bᵀ`, `dB = Aᵀ·G`, summed over the dimensions that were broadcast.
    fn backward(self: Box<Self>, grad: Tensor, need: &[bool]) -> Result<InputGrads> {
        let [a_shape, b_shape] = self.shapes;
        let da = match self.b.filter(|_| need[0]) {
            Some(b) => Some(product(&grad, &b.transpose(-1, -2)?, None)?.sum_to(a_shape)?),
            None => None,
        };
        let db = match self.a.filter(|_| need[1]) {
            Some(a) => Some(right_gradient(&a, &grad, b_shape)?),
            None => None,
        };
        Ok(InputGrads::whole([da, db]))
    }
}

/// Computes `Aᵀ·G`, summed to the shape of B.
fn right_gradient(a: &Tensor, grad: &Tensor, b_shape: Shape) -> Result<Tensor> {
    if a.numel() == 0 || grad.numel() == 0 {
        return Tensor::zeros(b_shape, grad.dtype(), grad.device());
    }
    let (batch, [m, n]) = split_last_two(grad.shape());
    let k = a.shape()[a.rank() - 1];
    let (b_batch, _) = split_last_two(&b_shape);
    // The last dimensions along which B repeats join the rows that are summed over: one product instead of many.
    let repeats = (1..=batch.rank())
        .take_while(|&back| b_batch.rank().checked_sub(back).is_none_or(|dim| b_batch[dim] == 1))
        .count();
    let (kept, joined) = batch.split_at(batch.rank() - repeats);
    let rows = joined.iter().product::<usize>() * m;
    let shape = |last: [usize; 2]| Shape::new(&[kept, &last].concat());
    let a = a.expand(Shape::new(&[&*batch, &[m, k]].concat())?)?.reshape(shape([rows, k])?)?;
    let grad = grad.reshape(shape([rows, n])?)?;
    let sum = product(&a.transpose(-1, -2)?, &grad, None)?;
    // The dimensions left before B's shape have size 1 now.
    let b_kept = b_batch.rank().saturating_sub(repeats);
    sum.sum_to(Shape::new(&[&b_batch[..b_kept], &[k, n]].concat())?)?.reshape(b_shape)
}

pub(super) struct LinearBackward {
    pub x: Option<Saved>,
    pub weight: Option<Tensor>,
    pub shapes: [Shape; 2],
    /// Gradient of `x` accumulated from later ops.
    pub sum: Option<Tensor>,
}

impl LinearBackward {
    /// Computes `sum + g·W`, overwriting the sum.
    fn add_product(sum: Tensor, grad: &Tensor, weight: &Tensor, shape: Shape) -> Result<Tensor> {
        let [outputs, inputs] = [weight.dim(0)?, weight.dim(1)?];
        let rows = shape.without(shape.rank() - 1).numel();
        let mut flat = sum.reshape([rows, inputs])?;
        // Otherwise this handle would count as a second one.
        drop(sum);
        product_sums(&grad.reshape([rows, outputs])?, weight, true, &mut flat)?;
        flat.reshape(shape)
    }
}

impl Backward for LinearBackward {
    fn name(&self) -> &'static str {
        "linear"
    }

    /// Only if the accumulation type is that of the gradient: half types would round once more.
    fn accumulate_into(&mut self, mut sum: Tensor) -> Option<Tensor> {
        let adds = self.weight.is_some() && sum.dtype() == sum.dtype().accumulator() && sum.is_unique();
        self.sum = adds.then(|| sum.detach());
        (!adds).then_some(sum)
    }

    /// Computes `dx = g·W`, `dW = gᵀ·x`, `db = Σ_rows g`.
    fn backward(self: Box<Self>, grad: Tensor, need: &[bool]) -> Result<InputGrads> {
        let [x_shape, weight_shape] = self.shapes;
        let grad = grad.as_rows()?;
        // First the gradient that needs the input, which is freed before a gradient of its size is allocated.
        let dw = match self.x.filter(|_| need[1]) {
            Some(x) => Some(right_gradient(&grad, &x.value()?.as_rows()?, weight_shape)?),
            None => None,
        };
        let dx = match (self.weight.filter(|_| need[0]), self.sum) {
            (Some(weight), Some(sum)) => Some(Self::add_product(sum, &grad, &weight, x_shape)?),
            (Some(weight), None) => Some(product(&grad, &weight, None)?.reshape(x_shape)?),
            (None, _) => None,
        };
        let mut grads = vec![dx, dw];
        if let Some(&need_bias) = need.get(2) {
            let rows: Vec<isize> = (0..grad.rank() as isize - 1).collect_vec();
            grads.push(if need_bias { Some(grad.sum(&rows)?) } else { None });
        }
        Ok(InputGrads::whole(grads))
    }
}
