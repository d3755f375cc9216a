//! Queries, keys and values by one product on a GPU: their weights stay parameters of their own, and lie side by side.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use crate::{Device, Param, Result, Tensor, collect::CollectVec, nn::Linear, shape::Shape};

/// Number of calls that may move the weights of a layer side by side: where something replaces them in each step, as ZeRO 3
/// does, separate products cost less. None may later, since a graph that was recorded meanwhile would be lost.
const MOVES: usize = 16;

/// Layers that one product may serve. Clones share it.
#[derive(Clone, Debug, Default)]
pub(super) struct Joint {
    /// Number of calls that found the weights apart.
    apart: Arc<AtomicUsize>,
}

impl Joint {
    /// Applies layers to one input by one product, `[.., in]` to one `[.., out]` per layer; `None` on the CPU, and if the
    /// layers are packed, have low-rank updates, do not take the input or only partly have biases.
    ///
    /// Moves the parameters side by side if they are not, unless that has happened too often.
    pub fn forward(&self, layers: &[&Linear], x: &Tensor) -> Result<Option<Vec<Tensor>>> {
        if *x.device() == Device::Cpu || x.rank() == 0 || x.numel() == 0 {
            return Ok(None);
        }
        let (mut weights, mut biases) = (Vec::new(), Vec::new());
        for layer in layers {
            let Some((weight, bias)) = layer.params() else { return Ok(None) };
            weights.push(weight);
            biases.extend(bias);
        }
        let takes = |weight: &&Param| {
            let weight = weight.tensor();
            weight.shape()[1..] == x.shape()[x.rank() - 1..]
                && weight.dtype() == x.dtype()
                && weight.device() == x.device()
        };
        // Errors name the layer.
        if !weights.iter().all(takes) || (!biases.is_empty() && biases.len() != weights.len()) {
            return Ok(None);
        }
        for params in [&weights, &biases] {
            if !params.is_empty() && !self.are_adjacent(params, x)? {
                return Ok(None);
            }
        }
        // Another thread may have replaced one of them; the product checks that again.
        let [weights, biases] = [weights, biases].map(|params| values(&params));
        x.linear_joint(&weights, (!biases.is_empty()).then_some(&biases))
    }

    /// Returns `true` if the parameters lie side by side, and moves them there if possible.
    fn are_adjacent(&self, params: &[&Param], x: &Tensor) -> Result<bool> {
        let values = values(params);
        if Tensor::adjacent(&values.iter().collect_vec()).is_some() {
            return Ok(true);
        }
        let Device::Gpu(gpu) = *x.device() else { return Ok(false) };
        let fits = |value: &Tensor| {
            let (shape, first) = (value.shape(), values[0].shape());
            value.device() == x.device()
                && value.dtype() == x.dtype()
                && !value.is_absent()
                && value.is_contiguous()
                && shape.rank() == first.rank()
                && shape[1..] == first[1..]
        };
        if !values.iter().all(fits) || gpu.is_capturing() {
            return Ok(false);
        }
        if self.apart.fetch_add(1, Ordering::Relaxed) >= MOVES {
            return Ok(false);
        }
        let shapes: Vec<Shape> = values.iter().map(|value| *value.shape()).collect_vec();
        drop(values);
        // Allocated before the locks are taken.
        let Some(moved) = Tensor::uninit_adjacent(&shapes, x.dtype(), gpu)? else { return Ok(false) };
        Param::move_to(params, moved)
    }
}

fn values(params: &[&Param]) -> Vec<Tensor> {
    params.iter().map(|param| param.tensor()).collect_vec()
}
