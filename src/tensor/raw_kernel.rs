//! User-defined kernels, launched on tensors.

use std::fmt;

use super::{GradSlot, Tensor};
use crate::{
    Device, Error, Result,
    collect::CollectVec,
    device::{Arg, Grid, Kernel, Kind, ParameterType, Source, SourceParameter, launch::IntoArg},
    error::ensure,
};

const OP: &str = "raw_kernel";

/// Kernel from source text, compiled for a GPU at run time.
///
/// The text is compiled and cached like the library's own kernels. The parameters are parsed from it: pointers to
/// `float`, `double`, `bf16`, `f16`, `long long` or `bool` take tensors of that dtype, written unless the pointer is to
/// `const`; numbers are passed by value. Typedefs and macros of `options` may name a type. The text cannot include
/// files; if it computes with half types, it must define the 16-bit structs `bf16` and `f16` itself.
///
/// A launch records no gradient: [`record`](crate::record) puts an op that launches kernels on the tape.
///
/// ```no_run
/// use x_transformers::{DType, Device, RawKernel, Tensor, device::Grid};
/// # fn main() -> x_transformers::Result<()> {
/// let text = r#"
///     typedef ELEMENT T;
///     extern "C" __global__ void scale(T* y, const T* x, long long n, T factor) {
///         long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
///         if (i < n) y[i] = factor * x[i];
///     }"#;
/// let gpu = Device::cuda(0)?;
/// let kernel = RawKernel::new(&gpu, text, "scale", &[("ELEMENT", "float")])?;
/// let x = Tensor::ones([1000], DType::F32, &gpu)?;
/// let mut y = Tensor::empty([1000], DType::F32, &gpu)?;
/// let grid = Grid::new([1000u32.div_ceil(256), 1, 1], [256, 1, 1]);
/// // SAFETY: both tensors have `n` elements, and the kernel goes no further.
/// unsafe { kernel.launch(grid, [(&mut y).into(), (&x).into(), 1000i64.into(), 2f32.into()]) }?;
/// assert_eq!(y.to_vec::<f32>()?, [2.0; 1000]);
/// # Ok(())
/// # }
/// ```
pub struct RawKernel {
    device: Device,
    source: Source,
    kernel: Box<dyn Kernel>,
}

impl fmt::Debug for RawKernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RawKernel").field("kernel", &self.source.kernel()).field("device", &self.device).finish()
    }
}

/// Argument of [`RawKernel::launch`].
#[derive(Debug)]
#[non_exhaustive]
pub enum KernelArg<'a> {
    /// A packed tensor that no other handle shares, for a pointer.
    Output(&'a mut Tensor),
    /// A packed tensor, for a pointer to `const`.
    Input(&'a Tensor),
    /// `int`
    I32(i32),
    /// `unsigned int`
    U32(u32),
    /// `long long`
    I64(i64),
    /// `unsigned long long`
    U64(u64),
    /// `float`
    F32(f32),
    /// `double`
    F64(f64),
}

macro_rules! from {
    ($($t:ty => $variant:ident),+) => {$(
        impl<'a> From<$t> for KernelArg<'a> {
            fn from(value: $t) -> Self {
                Self::$variant(value)
            }
        }
    )+};
}

from!(&'a mut Tensor => Output, &'a Tensor => Input, i32 => I32, u32 => U32, i64 => I64, u64 => U64, f32 => F32,
    f64 => F64);

impl RawKernel {
    /// Compiles the kernel of this name, or finds it in the cache.
    ///
    /// `options`: macros, passed to the compiler as `-Dname=value`; not one-letter names such as `T`, which the
    /// compiler's own headers use.
    ///
    /// Errors: [`ErrorKind::Argument`](crate::ErrorKind::Argument) if the text has no such kernel, or a parameter of a
    /// type not listed above; [`ErrorKind::Device`](crate::ErrorKind::Device) on the CPU, on a GPU whose backend cannot
    /// compile sources, or with the compiler's log.
    pub fn new(device: &Device, text: &str, name: &str, options: &[(&str, &str)]) -> Result<Self> {
        let source = Source::new(text, name, options)?;
        let Device::Gpu(gpu) = *device else {
            let message = format!("kernel `{name}` requires a GPU, got the CPU");
            return Err(Error::device(OP, message));
        };
        Ok(Self { device: device.clone(), kernel: gpu.compile(&source)?, source })
    }

    /// Returns the kernel's parameters, in order.
    pub fn parameters(&self) -> &[SourceParameter] {
        self.source.parameters()
    }

    /// Enqueues the kernel; a grid without blocks does nothing.
    ///
    /// Errors: [`ErrorKind::Argument`](crate::ErrorKind::Argument) if the number or kinds of the arguments do not match
    /// the parameters, for a tensor that is not packed, and for an output whose storage is shared or that belongs to a
    /// tape; [`ErrorKind::DType`](crate::ErrorKind::DType) for a tensor of another dtype;
    /// [`ErrorKind::Device`](crate::ErrorKind::Device) for one on another device, and for driver errors.
    ///
    /// # Safety
    ///
    /// The kernel reads and writes what its text makes of the grid and the arguments: with these, it must stay within
    /// the tensors, and no thread may write what another one reads or writes at the same time.
    pub unsafe fn launch<'a>(&self, grid: Grid, args: impl IntoIterator<Item = KernelArg<'a>>) -> Result<()> {
        let (name, parameters) = (self.source.kernel(), self.parameters());
        let given: Vec<KernelArg<'a>> = args.into_iter().collect_vec();
        ensure!(
            given.len() == parameters.len(),
            Error::argument(OP, format_args!("`{name}` takes {} arguments, got {}", parameters.len(), given.len()))
        );
        let args = parameters.iter().zip(given).map(|(parameter, given)| self.argument(parameter, given));
        self.kernel.launch(grid, &args.try_collect_vec()?)
    }

    /// Checks one argument.
    fn argument(&self, parameter: &SourceParameter, given: KernelArg<'_>) -> Result<Arg> {
        let place = || format!("`{}` of `{}`", parameter.name, self.source.kernel());
        let tensor = |tensor: &Tensor| {
            ensure!(
                *tensor.device() == self.device,
                Error::device(
                    OP,
                    format_args!("{} is on {} but the kernel is on {}", place(), tensor.device(), self.device)
                )
            );
            ensure!(
                parameter.of == ParameterType::Elements(tensor.dtype()),
                Error::dtype(
                    OP,
                    format_args!("{} takes {}, got a tensor of {}", place(), parameter.of, tensor.dtype())
                )
            );
            Ok(())
        };
        let (arg, of) = match given {
            KernelArg::Output(y) if parameter.kind == Kind::Output => {
                tensor(y)?;
                ensure!(
                    matches!(y.slot(), GradSlot::Constant),
                    Error::argument(
                        OP,
                        format_args!("{} belongs to a tape, which would not see the change; `.detach()` it", place())
                    )
                );
                return y.into_arg();
            }
            KernelArg::Input(x) if parameter.kind == Kind::Input => {
                tensor(x)?;
                return x.into_arg();
            }
            KernelArg::I32(x) => (Arg::I32(x), ParameterType::I32),
            KernelArg::U32(x) => (Arg::U32(x), ParameterType::U32),
            KernelArg::I64(x) => (Arg::I64(x), ParameterType::I64),
            KernelArg::U64(x) => (Arg::U64(x), ParameterType::U64),
            KernelArg::F32(x) => (Arg::F32(x), ParameterType::F32),
            KernelArg::F64(x) => (Arg::F64(x), ParameterType::F64),
            KernelArg::Output(_) | KernelArg::Input(_) => {
                let wanted = match parameter.kind {
                    Kind::Output => "an output (`&mut`)",
                    Kind::Input => "an input (`&`)",
                    Kind::Scalar { .. } => "a number",
                };
                return Err(Error::argument(OP, format_args!("{} is {wanted}, got {given:?}", place())));
            }
        };
        ensure!(parameter.of == of, Error::argument(OP, format_args!("{} is {}, got {of}", place(), parameter.of)));
        Ok(arg)
    }
}
