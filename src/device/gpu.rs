//! The seam between the library and a GPU: one trait that a backend implements, and the handles that pass through it.
//!
//! A backend is a folder of `device/` with its kernels. Tensors, ops and graphs reach it only through [`Gpu`];
//! properties of the card that one vendor's kernels need are in [`Limits`]. `tests/mock_device.rs` implements the
//! trait in host memory.

use std::{any::Any, fmt, sync::Arc};

use super::{
    MemoryStats, Transfers,
    launch::{Arg, Gemm, Grid},
    source::Source,
};
use crate::{Error, Result};

/// Address in the memory of a GPU.
///
/// Only the library creates addresses, from tensors: safe code cannot name memory that it does not own.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Address(u64);

impl Address {
    /// Address of an absent or empty tensor.
    pub const NULL: Self = Self(0);

    pub(crate) const fn new(address: u64) -> Self {
        Self(address)
    }

    /// Returns the number to pass to a kernel or a driver.
    pub fn get(self) -> u64 {
        self.0
    }

    /// Returns `true` for [`Address::NULL`].
    pub fn is_null(self) -> bool {
        self == Self::NULL
    }

    /// Returns the address offset by this many bytes.
    pub(crate) fn plus(self, bytes: usize) -> Self {
        Self(self.0 + bytes as u64)
    }
}

/// Memory of a GPU, freed when the last handle is dropped.
pub trait Memory: Send + Sync {
    /// Returns the address of the first byte; not 0.
    fn address(&self) -> u64;

    /// Is called before this thread enqueues work that writes to the memory. Default: does nothing.
    fn begin_write(&self) {}
}

/// Compiled kernel of a GPU.
pub trait Kernel: Send + Sync {
    /// Enqueues the kernel; a grid without blocks does nothing.
    ///
    /// Errors: arguments that do not match the kernel's parameters in number and kind, or an error of the driver.
    fn launch(&self, grid: Grid, args: &[Arg]) -> Result<()>;
}

/// Bytes on their way from a GPU.
pub trait ReadBack: Send {
    /// Waits until they have arrived and returns them, and apart from them an error that kernels have reported, if there
    /// is one ([`Gpu::read_back`]).
    ///
    /// Errors: those of the driver.
    fn wait(self: Box<Self>) -> Result<(Vec<u8>, Result<()>)>;
}

/// Recorded graph of a GPU, which owns the memory that its kernels use.
pub trait Replay: Send {
    /// Enqueues the recorded work.
    ///
    /// Errors: a graph that is being recorded, or an error of the driver.
    fn replay(&self) -> Result<()>;
}

/// Properties of a card by which ops choose among kernels of one vendor.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[non_exhaustive]
pub struct Limits {
    /// CUDA compute capability, 80 for `sm_80`; `None` on cards of other vendors.
    pub compute_capability: Option<u32>,
    /// If `true`, kernels may multiply by warpgroups (`sm_90a`).
    pub has_warpgroups: bool,
    /// If `true`, products of half types usually add biases ([`Gpu::fuses`]).
    pub adds_biases: bool,
}

/// A GPU: memory, kernels by name, and matrix products, in the order in which they are enqueued.
///
/// Work is enqueued on one stream: a block of memory may be reused as soon as its last use is enqueued, and nothing
/// waits but [`Gpu::read_back`] and [`Gpu::synchronize`]. Copies and fills of 0 bytes do nothing, whatever their
/// addresses. A device lives as long as the process ([`Device::Gpu`]).
///
/// The methods from [`Gpu::limits`] on have defaults for a backend without pool, compiler and graphs.
///
/// # Safety
///
/// The library hands an implementation addresses of that device's memory. An implementation passes none of them to
/// another device, and its kernels stay within the tensors that they are given.
///
/// [`Device::Gpu`]: crate::Device::Gpu
pub unsafe trait Gpu: Any + fmt::Debug + Send + Sync {
    /// Returns the name of the backend, `cuda` in `cuda:0`.
    fn backend(&self) -> &'static str;

    /// Returns the index of the device within its backend.
    fn ordinal(&self) -> usize;

    /// Allocates `bytes` bytes, more than 0, of unspecified content.
    ///
    /// Errors: [`ErrorKind::OutOfMemory`](crate::ErrorKind::OutOfMemory), or an error of the driver.
    fn allocate(&'static self, bytes: usize) -> Result<Arc<dyn Memory>>;

    /// Enqueues a copy to the device. The source may be changed or freed as soon as this returns.
    fn upload(&self, to: Address, from: &[u8]) -> Result<()>;

    /// Waits for all enqueued work, and copies from the device.
    ///
    /// Errors: also those that kernels reported since the last read-back, for instance
    /// [`ErrorKind::Index`](crate::ErrorKind::Index). On CUDA, those of kernels that this thread has launched, or a
    /// thread whose tensors it has used; after the first 64 threads, some share errors.
    fn read_back(&self, from: Address, to: &mut [u8]) -> Result<()>;

    /// Enqueues a copy from the device, without waiting. Default: waits for it.
    ///
    /// Errors: those of [`Gpu::read_back`].
    fn read_back_later(&'static self, from: Address, bytes: usize) -> Result<Box<dyn ReadBack>> {
        let mut read = vec![0; bytes];
        self.read_back(from, &mut read)?;
        Ok(Box::new(Arrived(read)))
    }

    /// Enqueues a copy within the device.
    fn copy(&self, to: Address, from: Address, bytes: usize) -> Result<()>;

    /// Enqueues a fill with zeros.
    fn fill_zero(&self, to: Address, bytes: usize) -> Result<()>;

    /// Returns a kernel of the library, compiled with these options: the names and parameters are those of `kernels/`.
    ///
    /// Errors: the backend has no kernel of this name or with these options
    /// ([`ErrorKind::Device`](crate::ErrorKind::Device), which names it).
    fn kernel(&self, name: &'static str, options: &[(&str, &str)]) -> Result<Box<dyn Kernel + '_>>;

    /// Enqueues a batch of matrix products.
    fn gemm(&self, gemm: &Gemm) -> Result<()>;

    /// Returns `true` if [`Gpu::gemm`] computes the bias and the row sums of this product; otherwise (the default) they
    /// must be computed apart.
    fn fuses(&self, _gemm: &Gemm) -> bool {
        false
    }

    /// Waits until all enqueued work is done.
    ///
    /// Errors: those of [`Gpu::read_back`].
    fn synchronize(&self) -> Result<()>;

    /// Returns the memory in use and kept for reuse.
    fn memory(&self) -> MemoryStats;

    /// Returns the bytes that new tensors can take: those that are free on the card, with those kept for reuse. Default
    /// `None`: not known.
    fn available_memory(&self) -> Option<u64> {
        None
    }

    /// Returns the properties by which ops choose kernels.
    fn limits(&self) -> Limits {
        Limits::default()
    }

    /// Resets [`MemoryStats::peak`].
    fn reset_peak_memory(&self) {}

    /// Returns all memory kept for reuse to the driver.
    fn trim(&self) {}

    /// Limits the memory kept for reuse to this many bytes.
    fn set_cache_limit(&self, _bytes: usize) {}

    /// Returns the counts of launches, uploads and read-backs.
    fn transfers(&self) -> Transfers {
        Transfers::default()
    }

    /// Returns the three i64 in which kernels that this thread launches report the first fault: its code, the index and
    /// the limit.
    fn faults(&self) -> Address {
        Address::NULL
    }

    /// Returns numbers on the device that depend only on their name. A backend may cache them; the default uploads them
    /// each time.
    fn constant(&'static self, _name: &str, values: &mut dyn FnMut() -> Result<Vec<i64>>) -> Result<Arc<dyn Memory>> {
        uploaded(self, &values()?)
    }

    /// Returns numbers on the device that rarely differ from those of the last call with this name. A backend may cache
    /// them; the default uploads them each time. A recorded graph gets the values of its recording.
    fn table(&'static self, _name: &str, values: Vec<i64>) -> Result<Arc<dyn Memory>> {
        uploaded(self, &values)
    }

    /// Compiles a kernel that does not belong to the library.
    ///
    /// Errors: the compiler's log, or a backend that compiles no sources (the default).
    fn compile(&self, source: &Source) -> Result<Box<dyn Kernel + '_>> {
        Err(self.lacks(&format!("kernel `{}`: this backend cannot compile kernel sources", source.kernel())))
    }

    /// Returns `true` if work enqueued by this thread is recorded instead of executed.
    fn is_capturing(&self) -> bool {
        false
    }

    /// Returns an error if a graph is being recorded, of which `what` cannot be part.
    fn refuse_while_capturing(&self, _what: &str) -> Result<()> {
        Ok(())
    }

    /// Records a graph. `f` is called twice: with `false` it executes, which compiles kernels and allocates memory;
    /// with `true` its work is recorded instead of executed.
    ///
    /// Errors: those of `f`, work that a graph cannot hold, another recording in progress, or a backend without graphs
    /// (the default).
    fn record(&'static self, _f: &mut dyn FnMut(bool) -> Result<()>) -> Result<Box<dyn Replay>> {
        Err(self.lacks("this backend does not support graphs"))
    }

    /// Records a graph like [`Gpu::record`], but waits for the recordings of other threads, whose calls wait for this one
    /// instead of being refused. Default: [`Gpu::record`].
    fn record_patiently(&'static self, f: &mut dyn FnMut(bool) -> Result<()>) -> Result<Box<dyn Replay>> {
        self.record(f)
    }

    /// Returns the error for a feature that this device does not have.
    fn lacks(&self, what: &str) -> Error {
        Error::device(self.backend(), format_args!("{}:{}: {what}", self.backend(), self.ordinal()))
    }
}

/// Bytes that were waited for.
struct Arrived(Vec<u8>);

impl ReadBack for Arrived {
    fn wait(self: Box<Self>) -> Result<(Vec<u8>, Result<()>)> {
        Ok((self.0, Ok(())))
    }
}

fn uploaded<G: Gpu + ?Sized>(gpu: &'static G, values: &[i64]) -> Result<Arc<dyn Memory>> {
    let memory = gpu.allocate(size_of_val(values).max(1))?;
    gpu.upload(Address::new(memory.address()), bytemuck::cast_slice(values))?;
    Ok(memory)
}

/// Memory of a tensor on a GPU.
pub(crate) struct GpuBuffer {
    memory: Option<Arc<dyn Memory>>,
    /// Allocation that the memory is a part of, if it has other parts.
    whole: Option<Arc<dyn Memory>>,
}

impl GpuBuffer {
    /// Allocates memory with unspecified content.
    pub fn new(bytes: usize, gpu: &'static dyn Gpu) -> Result<Self> {
        let memory = if bytes == 0 { None } else { Some(gpu.allocate(bytes)?) };
        Ok(Self { memory, whole: None })
    }

    /// Wraps memory that the device may have other handles of.
    pub fn shared(memory: Arc<dyn Memory>) -> Self {
        Self { memory: Some(memory), whole: None }
    }

    /// Allocates buffers of these sizes, none of them 0, one after another without gaps. Each has its own owners; the
    /// memory is freed with the last of them.
    pub fn adjacent(sizes: &[usize], gpu: &'static dyn Gpu) -> Result<Vec<Self>> {
        let whole = gpu.allocate(sizes.iter().sum())?;
        let mut end = 0;
        let part = |bytes: &usize| {
            let offset = end;
            end += *bytes as u64;
            let memory: Arc<dyn Memory> = Arc::new(Part { whole: whole.clone(), offset });
            Self { memory: Some(memory), whole: Some(whole.clone()) }
        };
        Ok(sizes.iter().map(part).collect())
    }

    /// Returns the allocation of buffers from one call of [`GpuBuffer::adjacent`] that follow one another, as a buffer
    /// that is never unique, and the byte at which they begin; `None` for any others. `sizes`: their bytes.
    pub fn joined(buffers: &[&Self], sizes: &[usize]) -> Option<(Self, usize)> {
        let whole = buffers.first()?.whole.as_ref()?;
        let start = buffers[0].address().get();
        let mut next = start;
        for (buffer, bytes) in buffers.iter().zip(sizes) {
            // Both are alive, so that one address is one allocation.
            if buffer.whole.as_ref()?.address() != whole.address() || buffer.address().get() != next {
                return None;
            }
            next += *bytes as u64;
        }
        Some((Self::shared(whole.clone()), (start - whole.address()) as usize))
    }

    /// Returns the address of the first byte; null if it is empty.
    pub fn address(&self) -> Address {
        self.memory.as_ref().map_or(Address::NULL, |memory| Address::new(memory.address()))
    }

    /// Tells the memory that this thread writes to it.
    pub fn begin_write(&self) {
        if let Some(memory) = &self.memory {
            memory.begin_write();
        }
    }

    /// Returns `true` if no other handle of the memory exists.
    pub fn is_unique(&mut self) -> bool {
        self.memory.as_mut().is_none_or(|memory| Arc::get_mut(memory).is_some())
    }
}

/// Part of an allocation, which it keeps alive.
struct Part {
    whole: Arc<dyn Memory>,
    offset: u64,
}

impl Memory for Part {
    fn address(&self) -> u64 {
        self.whole.address() + self.offset
    }

    fn begin_write(&self) {
        self.whole.begin_write();
    }
}
