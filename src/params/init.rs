//! Initial values of parameters, drawn on their device, with the same bits on every device.

use crate::{
    Device, Result,
    device::{Grid, args, cpu},
    dtype::{DType, Float, dispatch_float},
    philox::Philox,
    shape::Shape,
    tensor::Tensor,
};

/// Initialization of a parameter.
#[derive(Clone, Copy, PartialEq, Debug)]
#[non_exhaustive]
pub enum Init {
    /// Sets every element to this value.
    Constant(f64),
    /// Normal distribution with mean 0 and this standard deviation.
    Normal(f64),
    /// Uniform distribution in `±bound`.
    Uniform(f64),
}

impl Init {
    /// Returns PyTorch's default for the weight and bias of a linear layer: uniform in `±1/√fan_in`.
    pub fn linear(fan_in: usize) -> Self {
        Self::Uniform(1.0 / (fan_in.max(1) as f64).sqrt())
    }

    /// Returns `kaiming_normal_` of an embedding table: normal with standard deviation `√(2 / dim)`.
    pub fn kaiming_normal(dim: usize) -> Self {
        Self::Normal((2.0 / dim.max(1) as f64).sqrt())
    }

    /// Draws the values on the parameter's device.
    pub(crate) fn tensor(self, shape: Shape, dtype: DType, device: &Device, random: Philox) -> Result<Tensor> {
        match self {
            // Memory that is zero already is not written.
            Self::Constant(value) if value.to_bits() == 0 => Tensor::zeros(shape, dtype, device),
            Self::Constant(value) => Tensor::full(shape, round(value), dtype, device),
            Self::Normal(deviation) => {
                draw("random_normal", (shape, dtype, device), random, deviation, |i| random.normal(i))
            }
            Self::Uniform(bound) => {
                draw("random_uniform", (shape, dtype, device), random, bound, |i| 2.0 * random.uniform(i) - 1.0)
            }
        }
    }
}

/// Sets element `i` to `scale · f(i)`: on the CPU by the function, on a GPU by the kernel, with the same bits.
fn draw(
    kernel: &'static str,
    (shape, dtype, device): (Shape, DType, &Device),
    random: Philox,
    scale: f64,
    f: impl Fn(u64) -> f64 + Sync,
) -> Result<Tensor> {
    let mut tensor = Tensor::uninit(shape, dtype, device)?;
    match device {
        Device::Cpu => dispatch_float!("parameter", dtype, T, {
            // An element takes as long as about a hundred additions.
            cpu::for_rows(tensor.values_mut::<T>()?, 1, 100, |first, part| {
                for (index, value) in part.iter_mut().enumerate() {
                    *value = <T as Float>::from_f64(round(scale * f((first + index) as u64)));
                }
            });
            Ok(())
        })?,
        Device::Gpu(gpu) => {
            dtype.expect_float("parameter")?;
            let n = shape.numel();
            gpu.kernel(kernel, &[("DTYPE", dtype.name())])?.launch(
                Grid::elements(n.div_ceil(2)),
                args![&mut tensor, n as i64, random.seed(), random.stream(), scale],
            )?;
        }
    }
    Ok(tensor)
}

/// Rounds to f32, so that an f64 model starts from the values of its f32 counterpart.
fn round(x: f64) -> f64 {
    x as f32 as f64
}
