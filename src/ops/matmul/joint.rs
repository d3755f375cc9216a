//! Several layers of one input as one product.

use super::{check_linear, cost, grad::LinearBackward, product};
use crate::{
    Result, Tensor,
    autograd::{Backward, InputGrad, InputGrads, needs, record},
    collect::CollectVec,
    tensor::Saved,
};

impl Tensor {
    /// Computes `x·Wᵀ + b` for each of these weights `[out, in]`, and biases `[out]` if there are any, by one product: for
    /// `x [.., in]`, one `[.., out]` per weight, which are views of one tensor. The backward pass takes one product for
    /// the gradient of `x` and one for those of all weights.
    ///
    /// `None` unless the weights, and the biases, follow one another in memory ([`Tensor::uninit_adjacent`]). Errors:
    /// those of [`Tensor::linear`].
    pub(crate) fn linear_joint(&self, weights: &[Tensor], biases: Option<&[Tensor]>) -> Result<Option<Vec<Tensor>>> {
        let joined = |tensors: &[Tensor]| Tensor::adjacent(&tensors.iter().collect_vec());
        let (Some(weight), bias) = (joined(weights), biases.map(joined)) else { return Ok(None) };
        if matches!(bias, Some(None)) {
            return Ok(None);
        }
        let bias = bias.flatten();
        check_linear("linear", self, &weight, bias.as_ref())?;
        let y = product(&self.as_rows()?, &weight.transpose(0, 1)?, bias.as_ref())?;
        let y = y.reshape(self.shape().with_dim(self.rank() - 1, weight.shape()[0]))?;
        let inputs: Vec<&Tensor> = [self].into_iter().chain(weights).chain(biases.into_iter().flatten()).collect_vec();
        let [need_x] = needs("linear", [self])?;
        let mut need_weight = false;
        for weight in weights {
            let [need] = needs("linear", [weight])?;
            need_weight |= need;
        }
        cost(self, &y);
        let rows: Vec<usize> = weights.iter().map(|weight| weight.shape()[0]).collect_vec();
        let shapes = [*self.shape(), *weight.shape()];
        let y = record("linear", y, &inputs, |_| JointBackward {
            linear: LinearBackward {
                x: need_weight.then(|| Saved::of(self)),
                weight: need_x.then_some(weight),
                shapes,
                sum: None,
            },
            _weights: weights.iter().map(Tensor::detach).collect_vec(),
            rows: rows.clone(),
        })?;
        let mut start = 0;
        let mut part = |&rows: &usize| {
            start += rows;
            y.narrow(-1, start - rows, rows)
        };
        let mut parts = Vec::with_capacity(rows.len());
        for rows in &rows {
            parts.push(part(rows)?);
        }
        Ok(Some(parts))
    }
}

struct JointBackward {
    /// Rule of the layer that all of them make.
    linear: LinearBackward,
    /// Owners of its weight: an optimizer that finds them writes its results elsewhere.
    _weights: Vec<Tensor>,
    /// Number of outputs of each layer.
    rows: Vec<usize>,
}

impl Backward for JointBackward {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn accumulate_into(&mut self, sum: Tensor) -> Option<Tensor> {
        self.linear.accumulate_into(sum)
    }

    fn backward(self: Box<Self>, grad: Tensor, need: &[bool]) -> Result<InputGrads> {
        let Self { linear, _weights, rows } = *self;
        let (of_weights, of_biases) = need[1..].split_at(rows.len());
        let any = |needs: &[bool]| needs.contains(&true);
        let [dx, dw, db] = linear.gradients(grad, &[need[0], any(of_weights), any(of_biases)])?;
        let mut grads = vec![dx.map_or(InputGrad::None, InputGrad::Whole)];
        for (whole, needs) in [(dw, of_weights), (db, of_biases)] {
            let mut start = 0;
            for (&rows, &need) in rows.iter().zip(needs) {
                grads.push(match &whole {
                    Some(whole) if need => InputGrad::Whole(whole.narrow(0, start, rows)?),
                    _ => InputGrad::None,
                });
                start += rows;
            }
        }
        Ok(InputGrads::new(grads))
    }
}
