//! Kernels of `kernels/lab`: the rungs below the shipped ones, which `benches/ladder.rs` checks and times.

use super::{CudaDevice, Function, Kernel, error};
use crate::{
    Device, Result, Tensor,
    device::{
        Grid,
        kernels::{LAB_SIGNATURES, LAB_SOURCES},
        launch::{Arg, IntoArg},
    },
};

/// A kernel of `kernels/lab`, ready to launch.
pub struct Rung {
    device: &'static CudaDevice,
    function: Function,
}

impl std::fmt::Debug for Rung {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Rung").field(&self.function.signature.kernel).finish()
    }
}

/// A number that a rung takes by value.
#[derive(Clone, Copy, Debug)]
pub enum Scalar {
    /// `u32`
    U32(u32),
    /// `i64`
    I64(i64),
    /// `f64`
    F64(f64),
}

impl Rung {
    /// The kernel of this name, compiled with these options.
    ///
    /// Errors: there is none, no such variant, or an error of the compiler or the driver.
    pub fn new(device: &'static CudaDevice, kernel: &str, options: &[(&str, &str)]) -> Result<Self> {
        let signature = LAB_SIGNATURES.iter().find(|signature| signature.kernel == kernel);
        let signature = signature.ok_or_else(|| error(format!("there is no kernel `{kernel}` in kernels/lab")))?;
        let source = || LAB_SOURCES.iter().find(|source| source.name == signature.file);
        let function = device.function(&format!("lab/{kernel}"), options, signature, source)?;
        Ok(Self { device, function })
    }

    /// Enqueues it, with these blocks and threads and this many bytes of dynamic shared memory.
    ///
    /// Errors: tensors that are on another device, shared or not packed, arguments that are not what the source
    /// declares, or an error of the driver.
    ///
    /// # Safety
    ///
    /// Blocks, threads, scalars, and the sizes and dtypes of all tensors are those that the kernel's source asks for: it
    /// reads and writes what they make of its pointers, and nothing here checks that.
    pub unsafe fn launch(
        &self,
        [blocks, threads]: [[u32; 3]; 2],
        shared: usize,
        output: &mut Tensor,
        inputs: &[&Tensor],
        scalars: &[Scalar],
    ) -> Result<()> {
        let here = Device::Cuda(self.device);
        if let Some(other) =
            [&*output].into_iter().chain(inputs.iter().copied()).find(|tensor| *tensor.device() != here)
        {
            return Err(error(format!("a rung of {here} was given a tensor on {}", other.device())));
        }
        let mut args = vec![output.into_arg()?];
        for input in inputs {
            args.push((*input).into_arg()?);
        }
        args.extend(scalars.iter().map(|scalar| match *scalar {
            Scalar::U32(x) => Arg::U32(x),
            Scalar::I64(x) => Arg::I64(x),
            Scalar::F64(x) => Arg::F64(x),
        }));
        Kernel { device: self.device, function: self.function }.launch(Grid::new(blocks, threads).shared(shared), &args)
    }
}
