//! Copies with gradients: packing strided tensors, converting dtypes, moving to another device, joining.

use crate::{
    DType, Device, Error, Result, Tensor,
    autograd::{Backward, InputGrad, InputGrads, discrete, record},
    collect::CollectVec,
    device::cpu,
    error::ensure,
    shape::{Layout, Shape},
    tensor::{launch_strided, same_kind},
};

impl Tensor {
    /// Returns the same values packed in row-major order; the tensor itself if it is packed already.
    ///
    /// ```
    /// use x_transformers::{Device, Tensor};
    /// let x = Tensor::from_slice(&[1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0], [2, 3], &Device::Cpu)?;
    /// let turned = x.transpose(0, 1)?;
    /// assert!(!turned.is_contiguous() && turned.contiguous()?.is_contiguous());
    /// # Ok::<(), x_transformers::Error>(())
    /// ```
    pub fn contiguous(&self) -> Result<Tensor> {
        if self.is_contiguous() {
            return Ok(self.clone());
        }
        let out = self.packed()?;
        record("contiguous", out, &[self], |_| CopyBackward { dtype: self.dtype() })
    }

    /// Converts the values to another dtype. Floats round to nearest even, once (PyTorch rounds f64 to f32 before a
    /// half type); float to i64 truncates; to bool tests for "not zero", which is true of NaN. Floats outside the range
    /// of i64 saturate and NaN becomes 0; PyTorch leaves both undefined.
    ///
    /// Errors: converting a tensor that requires a gradient to a dtype that has none.
    ///
    /// ```
    /// use x_transformers::{DType, Device, Tensor};
    /// let x = Tensor::from_slice(&[1.7f32, -1.7], [2], &Device::Cpu)?;
    /// assert_eq!(x.to_dtype(DType::I64)?.to_vec::<i64>()?, [1, -1]);
    /// assert_eq!(x.to_dtype(DType::BF16)?.dtype(), DType::BF16);
    /// # Ok::<(), x_transformers::Error>(())
    /// ```
    #[doc(alias = "cast")]
    #[doc(alias = "half")]
    #[doc(alias = "float")]
    #[doc(alias = "bfloat16")]
    pub fn to_dtype(&self, dtype: DType) -> Result<Tensor> {
        if dtype == self.dtype() {
            return Ok(self.clone());
        }
        if !dtype.is_float() {
            discrete("to_dtype", &[self])?;
        }
        let x = self.contiguous()?;
        let out = x.converted(dtype)?;
        // Recorded against the packed tensor: if that was a copy, its own node follows.
        record("to_dtype", out, &[&x], |_| CopyBackward { dtype: self.dtype() })
    }

    /// Copies the values to another device; returns the tensor itself if it is there already. The gradient is copied
    /// back.
    ///
    /// Errors: out of memory, or a driver error.
    ///
    /// ```
    /// use x_transformers::{Device, Tensor};
    /// let x = Tensor::from_slice(&[1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0], [2, 3], &Device::Cpu)?;
    /// let x = x.to_device(&Device::best())?; // a GPU if there is one
    /// assert_eq!(x.to_vec::<f32>()?[5], 6.0);
    /// # Ok::<(), x_transformers::Error>(())
    /// ```
    #[doc(alias = "to")]
    pub fn to_device(&self, device: &Device) -> Result<Tensor> {
        if self.device() == device {
            return Ok(self.clone());
        }
        let x = self.contiguous()?;
        let y = x.moved(device)?;
        record("to_device", y, &[&x], |_| ToDeviceBackward { device: self.device().clone() })
    }

    /// Concatenates tensors along a dimension; negative ones count from the end. As in PyTorch, a tensor of shape `[0]`
    /// may be joined with tensors of any rank and adds nothing.
    ///
    /// Errors: no tensors, scalars, or shapes, dtypes or devices that differ elsewhere.
    ///
    /// ```
    /// use x_transformers::{Device, Tensor};
    /// let a = Tensor::from_slice(&[1.0f32, 2.0], [1, 2], &Device::Cpu)?;
    /// let b = Tensor::from_slice(&[3.0f32, 4.0], [1, 2], &Device::Cpu)?;
    /// assert_eq!(Tensor::cat(&[&a, &b], 0)?.shape()[..], [2, 2]);
    /// assert_eq!(Tensor::cat(&[&a, &b], 1)?.to_vec::<f32>()?, [1.0, 2.0, 3.0, 4.0]);
    /// # Ok::<(), x_transformers::Error>(())
    /// ```
    #[doc(alias = "concat")]
    #[doc(alias = "concatenate")]
    pub fn cat(tensors: &[&Tensor], dim: isize) -> Result<Tensor> {
        let (out, sizes, dim) = Self::joined(tensors, dim)?;
        let shapes = || tensors.iter().map(|tensor| *tensor.shape()).collect_vec();
        record("cat", out, tensors, |_| CatBackward { sizes, shapes: shapes(), dim })
    }

    /// Like [`Tensor::cat`], but as a part of another op: returns a constant, the sizes along the dimension, and its
    /// index.
    pub(crate) fn joined(tensors: &[&Tensor], dim: isize) -> Result<(Tensor, Vec<usize>, usize)> {
        let adds_nothing = |tensor: &Tensor| *tensor.shape() == [0];
        let adds_something = tensors.iter().find(|tensor| !adds_nothing(tensor));
        let Some(&first) = adds_something.or(tensors.first()) else {
            return Err(Error::argument("cat", "expected at least one tensor"));
        };
        let dim = first.shape().dim(dim, "cat")?;
        let mut total = 0usize;
        for tensor in tensors {
            same_kind("cat", first, tensor)?;
            if adds_nothing(tensor) {
                continue;
            }
            let fits = tensor.rank() == first.rank() && tensor.shape().without(dim) == first.shape().without(dim);
            ensure!(
                fits,
                Error::shape(
                    "cat",
                    format_args!("shapes {:?} and {:?} differ outside dimension {dim}", first.shape(), tensor.shape())
                )
            );
            total = total.saturating_add(tensor.shape()[dim]);
        }
        let mut dims = first.shape().to_vec();
        dims[dim] = total;
        let mut out = Tensor::uninit(Shape::new(&dims)?, first.dtype(), first.device())?;
        let size = |tensor: &&Tensor| if adds_nothing(tensor) { 0 } else { tensor.shape()[dim] };
        let sizes: Vec<usize> = tensors.iter().map(size).collect_vec();
        match first.device() {
            Device::Cpu => join(tensors, dim, &mut out)?,
            Device::Gpu(gpu) => {
                let (whole, mut start) = (Layout::contiguous(*out.shape()), 0);
                for (tensor, &size) in tensors.iter().zip(&sizes).filter(|(_, size)| **size > 0) {
                    launch_strided(*gpu, &mut out, &whole.narrow(dim, start, size), tensor, false)?;
                    start += size;
                }
            }
        }
        Ok((out, sizes, dim))
    }
}

/// Joins bytes, whatever the dtype.
fn join(tensors: &[&Tensor], dim: usize, out: &mut Tensor) -> Result<()> {
    let shape = *out.shape();
    let of_this_rank = |tensor: &&&Tensor| tensor.rank() == shape.rank();
    let packed = |tensor: &&Tensor| tensor.detach().contiguous();
    let tensors = tensors.iter().filter(of_this_rank).map(packed).try_collect_vec()?;
    let inner: usize = shape[dim + 1..].iter().product::<usize>() * out.dtype().size();
    let width = shape[dim] * inner;
    let parts = tensors.iter().map(|tensor| Ok((tensor.bytes()?, tensor.shape()[dim] * inner))).try_collect_vec()?;
    let elements = width / out.dtype().size();
    cpu::for_rows(out.bytes_mut()?, width, elements, |row, rows| {
        for (index, mut to) in rows.chunks_exact_mut(width).enumerate() {
            for &(from, len) in &parts {
                let (part, rest) = to.split_at_mut(len);
                part.copy_from_slice(&from[(row + index) * len..][..len]);
                to = rest;
            }
        }
    });
    Ok(())
}

struct CopyBackward {
    dtype: DType,
}

impl Backward for CopyBackward {
    fn name(&self) -> &'static str {
        "copy"
    }

    fn backward(self: Box<Self>, grad: Tensor, _need: &[bool]) -> Result<InputGrads> {
        grad.to_dtype(self.dtype).map(InputGrads::one)
    }
}

struct ToDeviceBackward {
    device: Device,
}

impl Backward for ToDeviceBackward {
    fn name(&self) -> &'static str {
        "to_device"
    }

    fn backward(self: Box<Self>, grad: Tensor, _need: &[bool]) -> Result<InputGrads> {
        grad.to_device(&self.device).map(InputGrads::one)
    }
}

struct CatBackward {
    sizes: Vec<usize>,
    shapes: Vec<Shape>,
    dim: usize,
}

impl Backward for CatBackward {
    fn name(&self) -> &'static str {
        "cat"
    }

    fn backward(self: Box<Self>, grad: Tensor, _need: &[bool]) -> Result<InputGrads> {
        let parts = grad.split(&self.sizes, self.dim as isize)?;
        // The shape differs where nothing was added.
        let whole = |(part, shape): (Tensor, &Shape)| {
            Ok(InputGrad::Whole(if part.shape() == shape { part } else { part.reshape(*shape)? }))
        };
        Ok(InputGrads::new(parts.into_iter().zip(&self.shapes).map(whole).try_collect_vec()?))
    }
}
