//! Initial values of parameters, drawn on the host so that every device starts from the same bits.

use super::{philox::Philox, shape::Shape, tensor::Tensor};
use crate::{DType, Device, Result};

/// How a parameter starts.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Init {
    /// Every element the same.
    Constant(f64),
    /// Normal with mean 0 and this standard deviation.
    Normal(f64),
    /// Uniform in `±bound`.
    Uniform(f64),
}

impl Init {
    /// PyTorch's default for the weight and bias of a linear layer: uniform in `±1/√fan_in`.
    pub fn linear(fan_in: usize) -> Self {
        Self::Uniform(1.0 / (fan_in.max(1) as f64).sqrt())
    }

    /// `kaiming_normal_` of an embedding table: normal with deviation `√(2 / dim)`.
    pub fn kaiming_normal(dim: usize) -> Self {
        Self::Normal((2.0 / dim.max(1) as f64).sqrt())
    }

    /// Draws the values.
    pub(crate) fn tensor(self, shape: Shape, dtype: DType, device: &Device, random: Philox) -> Result<Tensor> {
        match self {
            Self::Constant(value) => Tensor::full(shape, round(value), dtype, device),
            Self::Normal(deviation) => {
                Tensor::generate(shape, dtype, device, |i| round(deviation * random.normal(i as u64)))
            }
            Self::Uniform(bound) => {
                Tensor::generate(shape, dtype, device, |i| round(bound * (2.0 * random.uniform(i as u64) - 1.0)))
            }
        }
    }
}

/// To f32, so that an f64 model starts from the values of its f32 twin.
fn round(x: f64) -> f64 {
    x as f32 as f64
}
