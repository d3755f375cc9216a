//! Queries, keys and values by one product on a GPU: their weights stay parameters of their own, and lie side by side.

use crate::{Device, ErrorKind, Param, Result, Tensor, collect::CollectVec, device::Gpu, nn::Linear, shape::Shape};

/// Applies layers to one input by one product, `[.., in]` to one `[.., out]` per layer; `None` on the CPU, and if the layers
/// are packed, have low-rank updates, do not take the input or only partly have biases.
///
/// Moves the parameters side by side if they are not, in each step if something replaces them in each, as stages of ZeRO do:
/// what is computed, and so every bit, must not depend on who replaces weights.
pub(super) fn forward(layers: &[&Linear], x: &Tensor) -> Result<Option<Vec<Tensor>>> {
    let Device::Gpu(gpu) = *x.device() else { return Ok(None) };
    if x.rank() == 0 || x.numel() == 0 {
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
        weight.shape()[1..] == x.shape()[x.rank() - 1..] && weight.dtype() == x.dtype() && weight.device() == x.device()
    };
    // Errors name the layer.
    let fit = weights.iter().all(takes) && (biases.is_empty() || biases.len() == weights.len());
    if !fit || weights.iter().chain(&biases).any(|param| param.is_kept_apart()) {
        return Ok(None);
    }
    let groups = [&weights, &biases].into_iter().filter(|params| !params.is_empty()).collect_vec();
    if !groups.iter().all(|params| may_be_adjacent(params, x)) {
        return Ok(None);
    }
    for params in groups {
        if !is_adjacent(params) && !move_together(params, x, gpu)? {
            return Ok(None);
        }
    }
    // Another thread may have replaced one of them; the product checks that again.
    let [weights, biases] = [weights, biases].map(|params| values(&params));
    x.linear_joint(&weights, (!biases.is_empty()).then_some(&biases))
}

fn is_adjacent(params: &[&Param]) -> bool {
    Tensor::adjacent(&values(params).iter().collect_vec()).is_some()
}

/// Returns `true` for different parameters that one allocation can hold.
fn may_be_adjacent(params: &[&Param], x: &Tensor) -> bool {
    let values = values(params);
    let first = *values[0].shape();
    let fits = |value: &Tensor| {
        let shape = value.shape();
        value.device() == x.device()
            && value.dtype() == x.dtype()
            && !value.is_absent()
            && value.is_contiguous()
            && shape.rank() == first.rank()
            && shape[1..] == first[1..]
            && Tensor::is_aligned_size(*shape, value.dtype())
    };
    let twice = |at: usize| params[..at].iter().any(|other| other.leaf() == params[at].leaf());
    values.iter().all(fits) && !(0..params.len()).any(twice)
}

/// Moves parameters side by side; returns `false` if they are not, since a graph is being recorded, another thread has
/// replaced one meanwhile, or there is too little memory, after which they stay apart.
fn move_together(params: &[&Param], x: &Tensor, gpu: &'static dyn Gpu) -> Result<bool> {
    if gpu.is_capturing() {
        return Ok(false);
    }
    let shapes: Vec<Shape> = params.iter().map(|param| *param.tensor().shape()).collect_vec();
    match Tensor::uninit_adjacent(&shapes, x.dtype(), gpu) {
        Ok(Some(moved)) => Param::move_to(params, moved),
        Ok(None) => Ok(false),
        Err(error) if matches!(error.kind(), ErrorKind::OutOfMemory { .. }) => {
            params.iter().for_each(|param| param.keep_apart());
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

fn values(params: &[&Param]) -> Vec<Tensor> {
    params.iter().map(|param| param.tensor()).collect_vec()
}
