//! Gradients of `matmul` and `linear`: products of the gradient with the other operand.

use super::{
    cuda, product, product_and_row_sums, product_sums,
    strides::{Sizes, split_last_two},
};
use crate::{
    Device, Result, Tensor,
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

/// Computes `gᵀ·x` and `Σ_rows g` in one product; `None` where there is no GPU that does.
fn both_gradients(grad: &Tensor, x: &Tensor) -> Result<Option<[Tensor; 2]>> {
    if *grad.device() == Device::Cpu || grad.numel() == 0 || x.numel() == 0 {
        return Ok(None);
    }
    let flat = |x: &Tensor| {
        let width = x.dim(-1)?;
        x.reshape([x.numel() / width, width])
    };
    product_and_row_sums(&flat(grad)?.transpose(0, 1)?, &flat(x)?, grad.dtype())
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
        let grad = grad.reshape([rows, outputs])?;
        match *flat.device() {
            Device::Gpu(gpu) if flat.numel() > 0 => {
                let sizes = Sizes::of(grad.shape(), weight.shape())?;
                cuda::product_sums(gpu, &sizes, [&grad, weight], true, &mut flat)?;
            }
            _ => product_sums(&grad, weight, true, &mut flat)?,
        }
        flat.reshape(shape)
    }
}

impl Backward for LinearBackward {
    fn name(&self) -> &'static str {
        "linear"
    }

    /// On the CPU only if the accumulation type is that of the gradient. A GPU adds half types before it rounds.
    fn accumulate_into(&mut self, mut sum: Tensor) -> Option<Tensor> {
        let fits = sum.dtype() == sum.dtype().accumulator() || *sum.device() != Device::Cpu;
        let adds = self.weight.is_some() && fits && sum.is_unique();
        self.sum = adds.then(|| sum.detach());
        (!adds).then_some(sum)
    }

    fn backward(self: Box<Self>, grad: Tensor, need: &[bool]) -> Result<InputGrads> {
        let [dx, dw, db] = self.gradients(grad, need)?;
        Ok(InputGrads::whole([dx, dw, db].into_iter().take(need.len())))
    }
}

impl LinearBackward {
    /// Computes `dx = g·W`, `dW = gᵀ·x`, `db = Σ_rows g`, each if it is needed.
    pub(super) fn gradients(self, grad: Tensor, need: &[bool]) -> Result<[Option<Tensor>; 3]> {
        let [x_shape, weight_shape] = self.shapes;
        let grad = grad.as_rows()?;
        // First the gradient that needs the input, which is freed before a gradient of its size is allocated.
        let need_bias = need.get(2).is_some_and(|&need| need);
        let (mut dw, mut db) = (None, None);
        if let Some(x) = self.x.filter(|_| need[1]) {
            let x = x.value()?.as_rows()?;
            if let Some([of_weight, of_bias]) = need_bias.then(|| both_gradients(&grad, &x)).transpose()?.flatten() {
                (dw, db) = (Some(of_weight), Some(of_bias));
            } else {
                dw = Some(right_gradient(&grad, &x, weight_shape)?);
            }
        }
        let dx = match (self.weight.filter(|_| need[0]), self.sum) {
            (Some(weight), Some(sum)) => Some(Self::add_product(sum, &grad, &weight, x_shape)?),
            (Some(weight), None) => Some(product(&grad, &weight, None)?.reshape(x_shape)?),
            (None, _) => None,
        };
        if need_bias && db.is_none() {
            let rows: Vec<isize> = (0..grad.rank() as isize - 1).collect_vec();
            db = Some(grad.sum(&rows)?);
        }
        Ok([dx, dw, db])
    }
}
