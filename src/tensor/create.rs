//! Constructors of tensors from values.

use super::Tensor;
use crate::{
    Device, Error, Result,
    device::{Grid, args},
    dtype::{DType, Element, Float, dispatch_float},
    error::ensure,
    shape::{IntoShape, Shape},
};

impl Tensor {
    /// Creates a tensor from values in row-major order; `u8` and `u32` become [`DType::I64`].
    ///
    /// Errors: the number of values does not match the shape, or the shape is invalid.
    ///
    /// ```
    /// use x_transformers::{Device, Tensor};
    /// let x = Tensor::from_slice(&[1.0f32, 2.0, 3.0, 4.0], [2, 2], &Device::Cpu)?;
    /// assert_eq!(x.shape()[..], [2, 2]);
    /// # Ok::<(), x_transformers::Error>(())
    /// ```
    pub fn from_slice<E: Element>(values: &[E], shape: impl IntoShape, device: &Device) -> Result<Self> {
        Self::from_values(values, shape.into_shape(), device)
    }

    // The functions below take a result, so that the generic ones around them are a single call.
    fn from_values<E: Element>(values: &[E], shape: Result<Shape>, device: &Device) -> Result<Self> {
        let shape = shape?;
        ensure!(
            shape.numel() == values.len(),
            Error::shape("from_slice", format_args!("cannot fill shape {shape:?} with {} values", values.len()))
        );
        let mut tensor = Self::uninit(shape, E::DTYPE, &Device::Cpu)?;
        for (to, &from) in tensor.values_mut::<E>()?.iter_mut().zip(values) {
            *to = from.to_stored();
        }
        tensor.on(device)
    }

    /// Like [`Tensor::from_slice`], but takes a vector.
    ///
    /// ```
    /// use x_transformers::{Device, Tensor};
    /// let x = Tensor::from_vec(vec![1i64, 2, 3], [3], &Device::Cpu)?;
    /// assert_eq!(x.to_vec::<i64>()?, [1, 2, 3]);
    /// # Ok::<(), x_transformers::Error>(())
    /// ```
    pub fn from_vec<E: Element>(values: Vec<E>, shape: impl IntoShape, device: &Device) -> Result<Self> {
        Self::from_slice(&values, shape, device)
    }

    /// Creates a tensor of rank 0.
    ///
    /// ```
    /// use x_transformers::{Device, Tensor};
    /// let x = Tensor::scalar(0.5f32, &Device::Cpu)?;
    /// assert_eq!((x.rank(), x.item()?), (0, 0.5));
    /// # Ok::<(), x_transformers::Error>(())
    /// ```
    pub fn scalar<E: Element>(value: E, device: &Device) -> Result<Self> {
        Self::from_slice(&[value], (), device)
    }

    /// Creates a tensor of zeros (`false` for bool).
    ///
    /// ```
    /// use x_transformers::{DType, Device, Tensor};
    /// let x = Tensor::zeros([2, 3], DType::BF16, &Device::Cpu)?;
    /// assert_eq!(x.to_f64_vec()?, [0.0; 6]);
    /// # Ok::<(), x_transformers::Error>(())
    /// ```
    pub fn zeros(shape: impl IntoShape, dtype: DType, device: &Device) -> Result<Self> {
        Self::zeroed(shape.into_shape(), dtype, device)
    }

    fn zeroed(shape: Result<Shape>, dtype: DType, device: &Device) -> Result<Self> {
        let mut tensor = Self::uninit(shape?, dtype, device)?;
        match device {
            Device::Cpu => tensor.bytes_mut()?.fill(0),
            Device::Gpu(gpu) => gpu.fill_zero(tensor.address_mut()?, tensor.numel() * dtype.size())?,
        }
        Ok(tensor)
    }

    /// Creates a tensor of ones (`true` for bool).
    ///
    /// ```
    /// use x_transformers::{DType, Device, Tensor};
    /// let mask = Tensor::ones([1, 4], DType::Bool, &Device::Cpu)?;
    /// assert_eq!(mask.to_vec::<bool>()?, [true; 4]);
    /// # Ok::<(), x_transformers::Error>(())
    /// ```
    pub fn ones(shape: impl IntoShape, dtype: DType, device: &Device) -> Result<Self> {
        Self::full(shape, 1.0, dtype, device)
    }

    /// Creates a tensor filled with `value`, rounded to the dtype; for bool, `true` if it is not zero.
    ///
    /// ```
    /// use x_transformers::{DType, Device, Tensor};
    /// let x = Tensor::full([2], 0.5, DType::F32, &Device::Cpu)?;
    /// assert_eq!(x.to_vec::<f32>()?, [0.5, 0.5]);
    /// # Ok::<(), x_transformers::Error>(())
    /// ```
    #[doc(alias = "fill")]
    pub fn full(shape: impl IntoShape, value: f64, dtype: DType, device: &Device) -> Result<Self> {
        Self::filled(shape.into_shape(), value, dtype, device)
    }

    fn filled(shape: Result<Shape>, value: f64, dtype: DType, device: &Device) -> Result<Self> {
        match device {
            Device::Cpu => Self::generated(shape, dtype, device, &mut |_| value),
            Device::Gpu(gpu) => {
                let mut tensor = Self::uninit(shape?, dtype, device)?;
                // Rounded to the dtype here, so that the kernel's conversions are exact.
                let value = Self::scalar(value, &Device::Cpu)?.converted(dtype)?.item()?;
                let n = tensor.numel();
                gpu.kernel("fill_value", &[("DTYPE", dtype.name())])?
                    .launch(Grid::elements(n), args![&mut tensor, n as i64, value])?;
                Ok(tensor)
            }
        }
    }

    /// Creates `0, 1, …, n − 1` as [`DType::I64`], shape `[n]`.
    ///
    /// ```
    /// use x_transformers::{Device, Tensor};
    /// let positions = Tensor::arange(4, &Device::Cpu)?;
    /// assert_eq!(positions.to_vec::<i64>()?, [0, 1, 2, 3]);
    /// # Ok::<(), x_transformers::Error>(())
    /// ```
    pub fn arange(n: usize, device: &Device) -> Result<Self> {
        let mut tensor = Self::uninit([n].into_shape()?, DType::I64, device)?;
        match device {
            Device::Cpu => fill(tensor.values_mut::<i64>()?, |index| index as i64),
            Device::Gpu(gpu) => gpu
                .kernel("fill_arange", &[("DTYPE", DType::I64.name())])?
                .launch(Grid::elements(n), args![&mut tensor, n as i64])?,
        }
        Ok(tensor)
    }

    /// Creates a tensor whose element `i` in row-major order is `f(i)`, rounded to the dtype. `f` is called in order.
    ///
    /// ```
    /// use x_transformers::{DType, Device, Philox, Tensor};
    /// let random = Philox::new(42, 0);
    /// let x = Tensor::generate([2, 3], DType::F32, &Device::Cpu, |i| random.normal(i as u64))?;
    /// assert_eq!(x.numel(), 6);
    /// # Ok::<(), x_transformers::Error>(())
    /// ```
    #[doc(alias = "randn")]
    #[doc(alias = "rand")]
    #[doc(alias = "from_fn")]
    pub fn generate(
        shape: impl IntoShape,
        dtype: DType,
        device: &Device,
        mut f: impl FnMut(usize) -> f64,
    ) -> Result<Self> {
        Self::generated(shape.into_shape(), dtype, device, &mut f)
    }

    fn generated(shape: Result<Shape>, dtype: DType, device: &Device, f: &mut dyn FnMut(usize) -> f64) -> Result<Self> {
        let mut tensor = Self::uninit(shape?, dtype, &Device::Cpu)?;
        match dtype {
            DType::I64 => fill(tensor.values_mut::<i64>()?, |i| f(i) as i64),
            DType::Bool => fill(tensor.values_mut::<bool>()?, |i| (f(i) != 0.0) as u8),
            float => dispatch_float!("generate", float, T, {
                fill(tensor.values_mut::<T>()?, |i| <T as Float>::from_f64(f(i)));
                Ok(())
            })?,
        }
        tensor.on(device)
    }
}

fn fill<T>(values: &mut [T], mut f: impl FnMut(usize) -> T) {
    for (index, value) in values.iter_mut().enumerate() {
        *value = f(index);
    }
}
