//! Elements of tensors as slices, for user-defined ops.

use super::{GradSlot, Tensor};
use crate::{DType, Device, Element, Error, Result, error::ensure, shape::IntoShape};

impl Tensor {
    /// Creates a tensor of unspecified content, for an op that writes every element.
    ///
    /// Errors: an invalid shape, or out of memory.
    pub fn empty(shape: impl IntoShape, dtype: DType, device: &Device) -> Result<Self> {
        Self::uninit(shape.into_shape()?, dtype, device)
    }

    /// Returns the elements in row-major order, as they are stored; see [`Tensor::contiguous`].
    ///
    /// Errors: a dtype other than `E`'s, a tensor that is not contiguous, or one on a GPU.
    ///
    /// ```
    /// use x_transformers::{Device, Tensor};
    /// # fn main() -> x_transformers::Result<()> {
    /// let x = Tensor::from_slice(&[1.0f32, 2.0, 3.0, 4.0], [2, 2], &Device::Cpu)?;
    /// assert_eq!(x.as_slice::<f32>()?[2], 3.0);
    /// assert_eq!(x.transpose(0, 1)?.contiguous()?.as_slice::<f32>()?[2], 2.0);
    /// assert!(x.transpose(0, 1)?.as_slice::<f32>().is_err() && x.as_slice::<f64>().is_err());
    /// # Ok(())
    /// # }
    /// ```
    pub fn as_slice<E: Element>(&self) -> Result<&[E::Stored]> {
        self.check_packed("as_slice")?;
        self.values::<E>()
    }

    /// Returns the elements of a new tensor for writing; see [`Tensor::empty`].
    ///
    /// Errors: those of [`Tensor::as_slice`], a tensor whose storage another handle shares, or one that belongs to a
    /// tape.
    pub fn as_mut_slice<E: Element>(&mut self) -> Result<&mut [E::Stored]> {
        self.check_packed("as_mut_slice")?;
        ensure!(
            matches!(self.slot(), GradSlot::Constant),
            Error::argument(
                "as_mut_slice",
                "the tensor belongs to a tape, which would not see the change; `.detach()` it"
            )
        );
        self.values_mut::<E>()
    }

    fn check_packed(&self, op: &'static str) -> Result<()> {
        let strided = || format!("expected a contiguous tensor, got strides {:?}; see `contiguous`", self.strides());
        ensure!(self.is_contiguous(), Error::argument(op, strided()));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use crate::{DType, Device, Error, ErrorKind, Result, Tape, Tensor};

    #[test]
    fn only_new_tensors_are_written() -> Result<()> {
        let mut x = Tensor::empty([2, 3], DType::F32, &Device::Cpu)?;
        x.as_mut_slice::<f32>()?.copy_from_slice(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        assert_eq!(x.narrow(0, 1, 1)?.as_slice::<f32>()?, [4.0, 5.0, 6.0]);
        let refused = |result: Result<&mut [f32]>, part: &str| {
            let error = result.map(|_| ()).expect_err(part);
            assert!(matches!(error.kind(), ErrorKind::Argument { message, .. } if message.contains(part)), "{error}");
        };
        let other = x.clone();
        refused(x.as_mut_slice::<f32>(), "shared");
        refused(x.transpose(0, 1)?.as_mut_slice::<f32>(), "strides [1, 3]");
        drop(other);
        assert!(matches!(x.as_mut_slice::<f64>().map_err(Error::into_kind), Err(ErrorKind::DType { .. })));
        let leaf = x.requires_grad()?;
        drop(x);
        let _tape = Tape::grad();
        refused(leaf.exp()?.as_mut_slice::<f32>(), "belongs to a tape");
        Ok(())
    }
}
