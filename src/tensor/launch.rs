//! Tensors as kernel arguments.

use std::sync::Arc;

use super::Tensor;
use crate::{
    DType, Device, Error, Result,
    device::{Address, Arg, Buffer, Gpu, GpuBuffer, Memory, launch::IntoArg},
    error::ensure,
    shape::Shape,
};

/// The first element of a packed tensor that no other handle shares.
impl IntoArg for &mut Tensor {
    fn into_arg(self) -> Result<Arg> {
        self.address_mut().map(Arg::Output)
    }
}

/// The first element of a packed tensor.
impl IntoArg for &Tensor {
    fn into_arg(self) -> Result<Arg> {
        self.address().map(Arg::Input)
    }
}

/// The start of a tensor's storage, for kernels that are given its layout too.
pub(crate) struct Storage<'a>(pub &'a Tensor);

impl IntoArg for Storage<'_> {
    fn into_arg(self) -> Result<Arg> {
        self.0.storage_address().map(Arg::Input)
    }
}

impl IntoArg for Option<Storage<'_>> {
    fn into_arg(self) -> Result<Arg> {
        self.map_or(Ok(Arg::Input(Address::NULL)), IntoArg::into_arg)
    }
}

impl IntoArg for Option<&Tensor> {
    fn into_arg(self) -> Result<Arg> {
        self.map_or(Ok(Arg::Input(Address::NULL)), IntoArg::into_arg)
    }
}

impl IntoArg for Option<&mut Tensor> {
    fn into_arg(self) -> Result<Arg> {
        self.map_or(Ok(Arg::Output(Address::NULL)), IntoArg::into_arg)
    }
}

impl Tensor {
    /// Returns the address of the first element of a contiguous tensor on a GPU. Kernels get this address without
    /// strides.
    pub(crate) fn address(&self) -> Result<Address> {
        let strided =
            || format!("kernels require a contiguous tensor, got {:?} with strides {:?}", self.shape(), self.strides());
        ensure!(self.is_contiguous(), Error::argument("launch", strided()));
        Ok(self.storage_address()?.plus(self.range().start * self.0.dtype.size()))
    }

    /// Returns the address of the first element of a contiguous tensor on a GPU that no other handle shares.
    pub(crate) fn address_mut(&mut self) -> Result<Address> {
        ensure!(
            self.is_unique(),
            Error::argument("write", "the storage is shared; ops write only to contiguous tensors that they own")
        );
        if let Buffer::Gpu(buffer) = &*self.0.buffer {
            buffer.begin_write();
        }
        self.address()
    }

    /// Returns the start of the storage of a tensor on a GPU.
    pub(crate) fn storage_address(&self) -> Result<Address> {
        match &*self.0.buffer {
            Buffer::Gpu(buffer) => Ok(buffer.address()),
            Buffer::Absent => Err(Self::not_here()),
            Buffer::Cpu(_) => Err(Error::device(
                "launch",
                "expected a tensor on the GPU, got one on the CPU; move it with `to_device`",
            )),
        }
    }

    /// Returns numbers that depend only on their name, `[count]` I64, on a device that may cache them
    /// ([`Gpu::constant`]).
    pub(crate) fn constant_on(
        gpu: &'static dyn Gpu,
        name: &str,
        count: usize,
        values: impl FnOnce() -> Result<Vec<i64>>,
    ) -> Result<Self> {
        let mut values = Some(values);
        let mut once = || values.take().map_or_else(|| Ok(Vec::new()), |values| values());
        Self::of_memory(gpu, gpu.constant(name, &mut once)?, count)
    }

    /// Returns numbers that seldom change, `[values]` I64, on a device that may cache them ([`Gpu::table`]).
    pub(crate) fn table_on(gpu: &'static dyn Gpu, name: &str, values: Vec<i64>) -> Result<Self> {
        let count = values.len();
        Self::of_memory(gpu, gpu.table(name, values)?, count)
    }

    /// Returns ones of a shape of one element, for which a GPU computes nothing if it caches constants.
    pub(crate) fn one_of(shape: Shape, dtype: DType, device: &Device) -> Result<Self> {
        let bits = match dtype {
            DType::F32 => 1f32.to_bits().into(),
            DType::F64 => 1f64.to_bits(),
            DType::BF16 => half::bf16::ONE.to_bits().into(),
            DType::F16 => half::f16::ONE.to_bits().into(),
            DType::I64 | DType::Bool => 1,
        };
        let Device::Gpu(gpu) = *device else { return Self::ones(shape, dtype, device) };
        ensure!(shape.numel() == 1, Error::shape("ones", format_args!("expected one element, got {shape:?}")));
        // Little-endian, as GPUs are: the first bytes are the element.
        let memory = gpu.constant(&format!("one {dtype}"), &mut || Ok(vec![bits as i64]))?;
        Ok(Self::of_buffer(Buffer::Gpu(GpuBuffer::shared(memory)), shape, dtype, device))
    }

    /// Creates `[count]` I64 from memory to which the device may have other handles.
    fn of_memory(gpu: &'static dyn Gpu, memory: Arc<dyn Memory>, count: usize) -> Result<Self> {
        let buffer = Buffer::Gpu(GpuBuffer::shared(memory));
        Ok(Self::of_buffer(buffer, Shape::new(&[count])?, DType::I64, &Device::Gpu(gpu)))
    }
}

#[cfg(test)]
mod tests {
    use crate::{DType, Device, Result, Tensor, device::launch::IntoArg};

    /// The check comes first: testing it needs no GPU.
    #[test]
    fn launch_refuses_strided_elements() -> Result<()> {
        let x = Tensor::ones([2, 3], DType::F32, &Device::Cpu)?;
        let refusal = |x: &Tensor| x.into_arg().expect_err("there is no GPU").to_string();
        let strided = refusal(&x.transpose(0, 1)?);
        assert!(strided.contains("require a contiguous tensor, got [3, 2] with strides [1, 3]"), "{strided}");
        assert!(refusal(&x).contains("expected a tensor on the GPU, got one on the CPU"));
        Ok(())
    }
}
