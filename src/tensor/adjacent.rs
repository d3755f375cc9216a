//! Tensors that follow one another in the memory of a GPU, so that one product reads all of them as one matrix.

use std::sync::Arc;

use super::{Handle, Tensor};
use crate::{
    DType, Device, Error, Result,
    collect::CollectVec,
    device::{Buffer, Gpu, GpuBuffer},
    error::ensure,
    shape::{Layout, Shape},
    tensor::GradSlot,
};

/// Alignment of tensors that share an allocation, in bytes: kernels read packets of this size.
const ALIGNMENT: usize = 16;

impl Tensor {
    /// Allocates tensors of these shapes, of unspecified content, one after another in one allocation. Each has its own
    /// owner, like tensors with an allocation of their own. `None` if one is empty or would not be aligned.
    pub(crate) fn uninit_adjacent(shapes: &[Shape], dtype: DType, gpu: &'static dyn Gpu) -> Result<Option<Vec<Self>>> {
        if !shapes.iter().all(|shape| Self::is_aligned_size(*shape, dtype)) {
            return Ok(None);
        }
        let sizes: Vec<usize> = shapes.iter().map(|shape| shape.numel() * dtype.size()).collect_vec();
        let buffers = GpuBuffer::adjacent(&sizes, gpu)?;
        let tensor = |(buffer, shape): (GpuBuffer, &Shape)| {
            Self::of_buffer(Buffer::Gpu(buffer), *shape, dtype, &Device::Gpu(gpu))
        };
        Ok(Some(buffers.into_iter().zip(shapes).map(tensor).collect_vec()))
    }

    /// Returns `true` if tensors of this shape may be part of an allocation: those after them are aligned.
    pub(crate) fn is_aligned_size(shape: Shape, dtype: DType) -> bool {
        let bytes = shape.numel() * dtype.size();
        bytes > 0 && bytes.is_multiple_of(ALIGNMENT)
    }

    /// Returns tensors that follow one another in an allocation of [`Tensor::uninit_adjacent`] as a constant, joined
    /// along the first dimension, without copying; `None` for any others.
    ///
    /// The result does not count as an owner: keep the tensors themselves while it is in use, since an optimizer writes
    /// to a tensor with one owner.
    pub(crate) fn adjacent(tensors: &[&Self]) -> Option<Self> {
        let first = *tensors.first()?;
        let (dtype, rank) = (first.dtype(), first.rank());
        let (mut rows, mut buffers, mut sizes) = (0, Vec::new(), Vec::new());
        for tensor in tensors {
            let fits = tensor.dtype() == dtype
                && tensor.rank() == rank
                && rank > 0
                && tensor.shape()[1..] == first.shape()[1..]
                && tensor.is_contiguous()
                && tensor.layout().offset == 0;
            let (true, Buffer::Gpu(buffer)) = (fits, &*tensor.0.buffer) else { return None };
            rows += tensor.shape()[0];
            buffers.push(buffer);
            sizes.push(tensor.bytes_of_elements());
        }
        let (buffer, offset) = GpuBuffer::joined(&buffers, &sizes)?;
        let mut layout = Layout::contiguous(first.shape().with_dim(0, rows));
        layout.offset = offset / dtype.size();
        let (device, slot) = (first.device().clone(), GradSlot::Constant);
        Some(Self(Arc::new(Handle {
            buffer: Arc::new(Buffer::Gpu(buffer)),
            layout,
            dtype,
            device,
            slot,
            recipe: None,
        })))
    }

    /// Copies this packed tensor to another one of the same shape, dtype and GPU, which no other handle shares.
    pub(crate) fn copy_into(&self, to: &mut Self) -> Result<()> {
        let Device::Gpu(gpu) = *self.device() else {
            return Err(Error::device("copy", "expected tensors on one GPU"));
        };
        ensure!(
            (self.shape(), self.dtype(), self.device()) == (to.shape(), to.dtype(), to.device()),
            Error::shape("copy", format_args!("cannot copy {:?} to {:?}", self.shape(), to.shape()))
        );
        gpu.copy(to.address_mut()?, self.address()?, self.bytes_of_elements())
    }

    /// Returns `true` for clones of one handle: the same values, the same view and the same place on a tape.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}
