//! Tensors: cheap handles to shared storage, with shape, strides and a place on the tape.

use std::sync::Arc;

mod adjacent;
mod copy;
mod create;
mod display;
mod history;
mod launch;
mod raw_kernel;
mod recompute;
mod slices;

use crate::{
    Device, Error, Result,
    device::{
        Buffer,
        floats::{Floats, FloatsMut},
    },
    dtype::{DType, Element, Float, Readable, Real, dispatch_float},
    error::ensure,
    profile,
    shape::{Layout, Shape},
};

pub use copy::GradSlice;
pub(crate) use copy::{launch_strided, same_device, same_kind};
pub use history::LeafId;
pub(crate) use history::{GradSlot, ThreadMark, next_id};
pub(crate) use launch::Storage;
pub use raw_kernel::{KernelArg, RawKernel};
pub(crate) use recompute::{Recompute, Saved};

/// n-dimensional array of up to six dimensions.
///
/// Cloning copies a handle; views (`reshape`, `transpose`, `narrow`, …) share the storage. Values are immutable: every
/// op returns a new tensor, or an [`Error`].
///
/// ```
/// use x_transformers::{Device, Tensor};
/// # fn main() -> x_transformers::Result<()> {
/// let x = Tensor::from_slice(&[1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0], [2, 3], &Device::Cpu)?;
/// let y = x.transpose(0, 1)?.matmul(&x)?;
/// assert_eq!(y.shape(), [3, 3]);
/// assert_eq!(y.to_vec::<f32>()?[0], 17.0);
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
#[must_use = "ops return a new tensor and leave their inputs as they are"]
pub struct Tensor(Arc<Handle>);

/// Fields of a tensor, on the heap: a tensor is one pointer, so that code that passes tensors on stays small.
#[derive(Clone)]
struct Handle {
    buffer: Arc<Buffer>,
    layout: Layout,
    dtype: DType,
    device: Device,
    slot: GradSlot,
    /// Recomputation of the values for ops that need them in the backward pass; views and constants have none.
    recipe: Option<Recompute>,
}

impl Tensor {
    /// Creates a tensor of unspecified content, for ops that write every element.
    pub(crate) fn uninit(shape: Shape, dtype: DType, device: &Device) -> Result<Self> {
        let buffer = Buffer::new(shape.numel() * dtype.size(), device)?;
        Ok(Self::of_buffer(buffer, shape, dtype, device))
    }

    fn of_buffer(buffer: Buffer, shape: Shape, dtype: DType, device: &Device) -> Self {
        Self(Arc::new(Handle {
            buffer: Arc::new(buffer),
            layout: Layout::contiguous(shape),
            dtype,
            device: device.clone(),
            slot: GradSlot::Constant,
            recipe: None,
        }))
    }

    /// Returns a tensor of this one's shape, dtype and device without elements: reading them is an error.
    pub(crate) fn absent(&self) -> Self {
        Self::without_elements(*self.shape(), self.0.dtype, &self.0.device)
    }

    /// Creates a tensor like [`Tensor::absent`].
    pub(crate) fn without_elements(shape: Shape, dtype: DType, device: &Device) -> Self {
        Self::of_buffer(Buffer::Absent, shape, dtype, device)
    }

    /// Returns `true` for a tensor from [`Tensor::absent`].
    pub(crate) fn is_absent(&self) -> bool {
        matches!(&*self.0.buffer, Buffer::Absent)
    }

    /// Creates a tensor of unspecified content with this tensor's shape, dtype and device.
    pub(crate) fn uninit_like(&self) -> Result<Self> {
        Self::uninit(*self.shape(), self.0.dtype, &self.0.device)
    }

    /// Returns the sizes of the dimensions.
    ///
    /// ```
    /// use x_transformers::{DType, Device, Tensor};
    /// let x = Tensor::zeros([2, 3], DType::F32, &Device::Cpu)?;
    /// assert_eq!(x.shape()[..], [2, 3]);
    /// # Ok::<(), x_transformers::Error>(())
    /// ```
    pub fn shape(&self) -> &Shape {
        &self.0.layout.shape
    }

    /// Returns the number of dimensions.
    ///
    /// ```
    /// use x_transformers::{DType, Device, Tensor};
    /// assert_eq!(Tensor::zeros([2, 3], DType::F32, &Device::Cpu)?.rank(), 2);
    /// # Ok::<(), x_transformers::Error>(())
    /// ```
    pub fn rank(&self) -> usize {
        self.0.layout.shape.rank()
    }

    /// Returns the number of elements.
    ///
    /// ```
    /// use x_transformers::{DType, Device, Tensor};
    /// assert_eq!(Tensor::zeros([2, 3], DType::F32, &Device::Cpu)?.numel(), 6);
    /// # Ok::<(), x_transformers::Error>(())
    /// ```
    #[doc(alias = "elem_count")]
    #[doc(alias = "nelement")]
    pub fn numel(&self) -> usize {
        self.0.layout.shape.numel()
    }

    /// Returns the size of the elements in bytes, counting repeated elements of a view each time.
    pub(crate) fn bytes_of_elements(&self) -> usize {
        self.numel() * self.0.dtype.size()
    }

    /// Returns the size of one dimension; negative ones count from the end.
    ///
    /// Errors: `dim` is out of range.
    ///
    /// ```
    /// use x_transformers::{DType, Device, Tensor};
    /// let x = Tensor::zeros([2, 3], DType::F32, &Device::Cpu)?;
    /// assert_eq!((x.dim(0)?, x.dim(-1)?), (2, 3));
    /// # Ok::<(), x_transformers::Error>(())
    /// ```
    #[doc(alias = "size")]
    pub fn dim(&self, dim: isize) -> Result<usize> {
        Ok(self.shape()[self.shape().dim(dim, "dim")?])
    }

    /// Returns the type of the elements.
    pub fn dtype(&self) -> DType {
        self.0.dtype
    }

    /// Returns the device of the elements.
    pub fn device(&self) -> &Device {
        &self.0.device
    }

    /// Returns the strides of the dimensions, in elements.
    ///
    /// ```
    /// use x_transformers::{Device, Tensor};
    /// let x = Tensor::from_slice(&[1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0], [2, 3], &Device::Cpu)?;
    /// assert_eq!((x.strides(), x.transpose(0, 1)?.strides()), (&[3, 1][..], &[1, 3][..]));
    /// # Ok::<(), x_transformers::Error>(())
    /// ```
    pub fn strides(&self) -> &[usize] {
        self.0.layout.strides()
    }

    /// Returns `true` if the elements are packed in row-major order.
    ///
    /// ```
    /// use x_transformers::{Device, Tensor};
    /// let x = Tensor::from_slice(&[1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0], [2, 3], &Device::Cpu)?;
    /// assert!(x.is_contiguous() && !x.transpose(0, 1)?.is_contiguous());
    /// # Ok::<(), x_transformers::Error>(())
    /// ```
    pub fn is_contiguous(&self) -> bool {
        self.0.layout.is_contiguous()
    }

    /// Returns `true` if two tensors share storage.
    ///
    /// ```
    /// use x_transformers::{Device, Tensor};
    /// let x = Tensor::from_slice(&[1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0], [2, 3], &Device::Cpu)?;
    /// assert!(x.shares_storage(&x.transpose(0, 1)?)); // a view copies nothing
    /// # Ok::<(), x_transformers::Error>(())
    /// ```
    pub fn shares_storage(&self, other: &Tensor) -> bool {
        Arc::ptr_eq(&self.0.buffer, &other.0.buffer)
    }

    /// Returns the same values as a new leaf, whose gradient the next [`Tape`](crate::Tape) computes.
    ///
    /// Errors: the dtype is not float.
    ///
    /// ```
    /// use x_transformers::{Device, Tape, Tensor};
    /// let x = Tensor::from_slice(&[1.0f32, 2.0], [2], &Device::Cpu)?.requires_grad()?;
    /// let mut tape = Tape::grad();
    /// let loss = x.square()?.sum(&[])?;
    /// let grads = tape.backward(&loss)?;
    /// assert_eq!(grads.get(&x).unwrap().to_vec::<f32>()?, [2.0, 4.0]);
    /// # Ok::<(), x_transformers::Error>(())
    /// ```
    #[doc(alias = "requires_grad_")]
    #[doc(alias = "Var")]
    #[doc(alias = "Variable")]
    pub fn requires_grad(&self) -> Result<Self> {
        ensure!(
            self.0.dtype.is_float(),
            Error::dtype("requires_grad", format_args!("expected a float tensor, got {}", self.0.dtype))
        );
        Ok(self.with_slot(GradSlot::Leaf(LeafId::new())))
    }

    /// Returns the same values as a constant: no gradient flows through it.
    ///
    /// ```
    /// use x_transformers::{Device, Tape, Tensor};
    /// let x = Tensor::from_slice(&[1.0f32, 2.0], [2], &Device::Cpu)?.requires_grad()?;
    /// let _tape = Tape::grad();
    /// assert!(x.argmax(0).is_err()); // has no gradient
    /// assert_eq!(x.detach().argmax(0)?.item()?, 1.0);
    /// # Ok::<(), x_transformers::Error>(())
    /// ```
    #[doc(alias = "no_grad")]
    #[doc(alias = "stop_gradient")]
    pub fn detach(&self) -> Self {
        self.clone().into_constant()
    }

    /// Like [`Tensor::detach`], but consumes the handle.
    pub(crate) fn into_constant(mut self) -> Self {
        if self.0.recipe.is_some() || !matches!(self.0.slot, GradSlot::Constant) {
            self.set_slot(GradSlot::Constant);
        }
        self
    }

    pub(crate) fn with_slot(&self, slot: GradSlot) -> Self {
        let mut tensor = self.clone();
        tensor.set_slot(slot);
        tensor
    }

    /// Returns the tensor's role in differentiation.
    pub(crate) fn slot(&self) -> GradSlot {
        self.0.slot
    }

    /// Sets this handle's role in differentiation, and clears its recipe.
    pub(crate) fn set_slot(&mut self, slot: GradSlot) {
        let handle = Arc::make_mut(&mut self.0);
        (handle.slot, handle.recipe) = (slot, None);
    }

    /// Returns how to recompute the values, if that is known.
    pub(crate) fn recipe(&self) -> Option<&Recompute> {
        self.0.recipe.as_ref()
    }

    pub(crate) fn set_recipe(&mut self, recipe: Option<Recompute>) {
        Arc::make_mut(&mut self.0).recipe = recipe;
    }

    /// Returns the values in row-major order.
    ///
    /// Errors: `E` is not the tensor's dtype; convert with [`Tensor::to_dtype`] first.
    ///
    /// ```
    /// use x_transformers::{DType, Device, Tensor};
    /// let x = Tensor::full([2], 1.5, DType::F32, &Device::Cpu)?;
    /// assert_eq!(x.to_vec::<f32>()?, [1.5, 1.5]);
    /// assert!(x.to_vec::<i64>().is_err()); // nothing is converted
    /// # Ok::<(), x_transformers::Error>(())
    /// ```
    #[doc(alias = "tolist")]
    #[doc(alias = "numpy")]
    #[doc(alias = "to_vec1")]
    pub fn to_vec<E: Readable>(&self) -> Result<Vec<E>> {
        let packed = self.packed()?.on(&Device::Cpu)?;
        let values = packed.values::<E>()?.iter().map(|&stored| E::from_stored(stored)).collect();
        profile::done("to_vec", profile::Phase::Read, &self.0.device, || packed.numel() * packed.dtype().size())?;
        Ok(values)
    }

    /// Returns the values in row-major order, widened to f64 from any dtype.
    ///
    /// ```
    /// use x_transformers::{DType, Device, Tensor};
    /// let x = Tensor::full([2], 1.5, DType::BF16, &Device::Cpu)?;
    /// assert_eq!(x.to_f64_vec()?, [1.5, 1.5]);
    /// # Ok::<(), x_transformers::Error>(())
    /// ```
    pub fn to_f64_vec(&self) -> Result<Vec<f64>> {
        let packed = self.packed()?.on(&Device::Cpu)?;
        let values = match self.0.dtype {
            DType::I64 => packed.values::<i64>()?.iter().map(|&x| x as f64).collect(),
            DType::Bool => packed.values::<bool>()?.iter().map(|&x| x as f64).collect(),
            float => dispatch_float!("to_f64_vec", float, T, {
                Ok(packed.values::<T>()?.iter().map(|&x| to_f64::<T>(x)).collect())
            })?,
        };
        profile::done("to_f64_vec", profile::Phase::Read, &self.0.device, || packed.numel() * packed.dtype().size())?;
        Ok(values)
    }

    /// Returns the value of a tensor with one element.
    ///
    /// Errors: the tensor does not have exactly one element.
    ///
    /// ```
    /// use x_transformers::{Device, Tensor};
    /// let x = Tensor::from_slice(&[1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0], [2, 3], &Device::Cpu)?;
    /// assert_eq!(x.sum(&[])?.item()?, 21.0);
    /// # Ok::<(), x_transformers::Error>(())
    /// ```
    #[doc(alias = "to_scalar")]
    pub fn item(&self) -> Result<f64> {
        ensure!(
            self.numel() == 1,
            Error::shape("item", format_args!("expected one element, got shape {:?}", self.shape()))
        );
        Ok(self.to_f64_vec()?[0])
    }

    /// Copies this packed constant to a device.
    pub(crate) fn on(self, device: &Device) -> Result<Self> {
        if self.0.device == *device { Ok(self) } else { self.moved(device) }
    }

    pub(crate) fn layout(&self) -> &Layout {
        &self.0.layout
    }

    /// Returns another view of the same storage, as a constant: the caller records it.
    pub(crate) fn with_layout(&self, layout: Layout) -> Self {
        Self(Arc::new(Handle { layout, slot: GradSlot::Constant, recipe: None, ..Handle::clone(&self.0) }))
    }

    /// Returns the whole storage, for ops that walk strides from `layout().offset`.
    pub(crate) fn storage<E: Element>(&self) -> Result<&[E::Stored]> {
        self.check_dtype::<E>()?;
        match &*self.0.buffer {
            Buffer::Cpu(buffer) => Ok(bytemuck::cast_slice(buffer.bytes())),
            Buffer::Gpu(_) => Err(Self::not_on_the_cpu(&self.0.device)),
            Buffer::Absent => Err(Self::not_here()),
        }
    }

    /// Returns the elements of a contiguous tensor.
    pub(crate) fn values<E: Element>(&self) -> Result<&[E::Stored]> {
        debug_assert!(self.is_contiguous(), "values of a strided tensor");
        Ok(&self.storage::<E>()?[self.range()])
    }

    /// Returns the elements of a contiguous tensor that no other handle shares.
    pub(crate) fn values_mut<E: Element>(&mut self) -> Result<&mut [E::Stored]> {
        self.check_dtype::<E>()?;
        debug_assert!(self.is_contiguous(), "values_mut of a strided tensor");
        let range = self.range();
        Ok(&mut bytemuck::cast_slice_mut(self.bytes_mut()?)[range])
    }

    /// Returns the elements of a contiguous tensor of floats.
    pub(crate) fn floats(&self, op: &'static str) -> Result<Floats<'_>> {
        debug_assert!(self.is_contiguous(), "values of a strided tensor");
        Ok(self.stored_floats(op)?.range(self.range()))
    }

    /// Returns the storage of a tensor of floats, to be indexed by its layout.
    pub(crate) fn stored_floats(&self, op: &'static str) -> Result<Floats<'_>> {
        Ok(match self.0.dtype {
            DType::F32 => Floats::F32(self.storage::<f32>()?),
            DType::F64 => Floats::F64(self.storage::<f64>()?),
            DType::BF16 => Floats::BF16(self.storage::<half::bf16>()?),
            DType::F16 => Floats::F16(self.storage::<half::f16>()?),
            other => return other.expect_float(op).and(Ok(Floats::F32(&[]))),
        })
    }

    /// Returns the elements of a contiguous tensor of floats that no other handle shares.
    pub(crate) fn floats_mut(&mut self, op: &'static str) -> Result<FloatsMut<'_>> {
        Ok(match self.0.dtype {
            DType::F32 => FloatsMut::F32(self.values_mut::<f32>()?),
            DType::F64 => FloatsMut::F64(self.values_mut::<f64>()?),
            DType::BF16 => FloatsMut::BF16(self.values_mut::<half::bf16>()?),
            DType::F16 => FloatsMut::F16(self.values_mut::<half::f16>()?),
            other => return other.expect_float(op).and(Ok(FloatsMut::F32(&mut []))),
        })
    }

    /// Returns the range of a contiguous tensor's elements in its storage.
    fn range(&self) -> std::ops::Range<usize> {
        let elements = self.numel();
        // The offset of an empty view may be past the end.
        let start = if elements == 0 { 0 } else { self.0.layout.offset };
        start..start + elements
    }

    /// Returns `true` if `values_mut` may write: the handle is the only one, and contiguous.
    pub(crate) fn is_unique(&mut self) -> bool {
        self.unshared().is_some_and(|buffer| buffer.is_unique()) && self.is_contiguous()
    }

    /// Returns the storage, if no other tensor shares it.
    fn unshared(&mut self) -> Option<&mut Buffer> {
        Arc::get_mut(&mut self.0).and_then(|handle| Arc::get_mut(&mut handle.buffer))
    }

    pub(crate) fn bytes_mut(&mut self) -> Result<&mut [u8]> {
        let device = self.0.device.clone();
        match self.unshared() {
            Some(Buffer::Cpu(buffer)) => Ok(buffer.bytes_mut()),
            Some(Buffer::Gpu(_)) => Err(Self::not_on_the_cpu(&device)),
            Some(Buffer::Absent) => Err(Self::not_here()),
            None => Err(Error::argument("write", "the storage is shared; ops write only to tensors that they own")),
        }
    }

    fn not_on_the_cpu(device: &Device) -> Error {
        Error::device("read", format_args!("the tensor is on {device}; move it to the CPU with `to_device`"))
    }

    pub(crate) fn not_here() -> Error {
        Error::argument(
            "weights",
            "are divided among ranks (ZeRO 3), and those of a block are here only while a step uses them; read them within \
             `Trainer::evaluate`, or from a checkpoint; those from `deferred_init` come with `ParamMap::materialize` or \
             `Trainer::with_ranks`",
        )
    }

    /// Returns the same values in packed storage that no other handle shares: this tensor, or a copy.
    pub(crate) fn into_owned(mut self) -> Result<Tensor> {
        if self.is_unique() { Ok(self) } else { self.to_owned_copy() }
    }

    /// Returns a packed copy with new storage.
    pub(crate) fn to_owned_copy(&self) -> Result<Tensor> {
        if self.is_contiguous() { self.moved(&self.0.device) } else { self.packed_copy() }
    }

    /// Returns the bytes of the elements of a contiguous tensor on the CPU.
    pub(crate) fn bytes(&self) -> Result<&[u8]> {
        let (range, size) = (self.range(), self.0.dtype.size());
        match &*self.0.buffer {
            Buffer::Cpu(buffer) => Ok(&buffer.bytes()[range.start * size..range.end * size]),
            Buffer::Gpu(_) => Err(Self::not_on_the_cpu(&self.0.device)),
            Buffer::Absent => Err(Self::not_here()),
        }
    }

    fn check_dtype<E: Element>(&self) -> Result<()> {
        ensure!(
            self.0.dtype == E::DTYPE,
            Error::dtype(
                "read",
                format_args!("the tensor is {}, expected {}; convert with `to_dtype`", self.0.dtype, E::DTYPE)
            )
        );
        Ok(())
    }
}

fn to_f64<T: Float>(x: T) -> f64 {
    Real::to_f64(x.to_acc())
}
