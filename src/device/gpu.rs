//! The seam between the library and a GPU: one trait that a backend implements, and the handles that pass through it.
//!
//! A backend is a folder of `device/` with its kernels. Tensors, ops and graphs reach it through [`Gpu`] alone; what one
//! vendor's kernels need to know of the card is in [`Limits`]. `tests/mock_device.rs` implements the trait in host memory.

use std::{any::Any, fmt, sync::Arc};

use super::{
    MemoryStats, Transfers,
    launch::{Arg, Gemm, Grid},
    source::Source,
};
use crate::{Error, Result};

/// A place in the memory of a GPU.
///
/// Only the library makes addresses, from tensors, so that safe code cannot name memory that it does not own.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Address(u64);

impl Address {
    /// The address that kernels take for an absent or empty tensor.
    pub const NULL: Self = Self(0);

    pub(crate) const fn new(address: u64) -> Self {
        Self(address)
    }

    /// The number that a kernel or a driver is given.
    pub fn get(self) -> u64 {
        self.0
    }

    /// Returns `true` for [`Address::NULL`].
    pub fn is_null(self) -> bool {
        self == Self::NULL
    }

    /// The address this many bytes further on.
    pub(crate) fn plus(self, bytes: usize) -> Self {
        Self(self.0 + bytes as u64)
    }
}

/// Memory of a GPU, freed when the last handle is dropped.
pub trait Memory: Send + Sync {
    /// Address of the first byte; not 0.
    fn address(&self) -> u64;
}

/// A compiled kernel of a GPU.
pub trait Kernel: Send + Sync {
    /// Enqueues the kernel; a grid without blocks does nothing.
    ///
    /// Errors: arguments that are not the kernel's parameters in number and kind, or an error of the driver.
    fn launch(&self, grid: Grid, args: &[Arg]) -> Result<()>;
}

/// A recorded graph of a GPU, which owns the memory that its kernels use.
pub trait Replay {
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
    /// Name of the backend, as in `cuda` of `cuda:0`.
    fn backend(&self) -> &'static str;

    /// Number of the device within its backend.
    fn ordinal(&self) -> usize;

    /// Allocates `bytes` bytes, more than 0, of unspecified content.
    ///
    /// Errors: [`ErrorKind::OutOfMemory`](crate::ErrorKind::OutOfMemory), or an error of the driver.
    fn allocate(&'static self, bytes: usize) -> Result<Arc<dyn Memory>>;

    /// Enqueues a copy to the device. The source may be changed or freed as soon as this returns.
    fn upload(&self, to: Address, from: &[u8]) -> Result<()>;

    /// Waits for all that was enqueued, and copies from the device.
    ///
    /// Errors: also those that kernels reported since the last read-back, for instance
    /// [`ErrorKind::Index`](crate::ErrorKind::Index).
    fn read_back(&self, from: Address, to: &mut [u8]) -> Result<()>;

    /// Enqueues a copy within the device.
    fn copy(&self, to: Address, from: Address, bytes: usize) -> Result<()>;

    /// Enqueues writing zeros.
    fn fill_zero(&self, to: Address, bytes: usize) -> Result<()>;

    /// Returns a kernel of the library, compiled with these options: the names and parameters are those of `kernels/`.
    ///
    /// Errors: the backend has no kernel of this name or with these options
    /// ([`ErrorKind::Device`](crate::ErrorKind::Device), which names it).
    fn kernel(&self, name: &'static str, options: &[(&str, &str)]) -> Result<Box<dyn Kernel + '_>>;

    /// Enqueues a batch of matrix products.
    fn gemm(&self, gemm: &Gemm) -> Result<()>;

    /// Waits until all that was enqueued is done.
    ///
    /// Errors: as [`Gpu::read_back`].
    fn synchronize(&self) -> Result<()>;

    /// Memory in use and kept for reuse.
    fn memory(&self) -> MemoryStats;

    /// Properties by which ops choose kernels.
    fn limits(&self) -> Limits {
        Limits::default()
    }

    /// Starts a new measurement of [`MemoryStats::peak`].
    fn reset_peak_memory(&self) {}

    /// Returns all memory kept for reuse to the driver.
    fn trim(&self) {}

    /// Limits the memory kept for reuse to this many bytes.
    fn set_cache_limit(&self, _bytes: usize) {}

    /// Counts of launches, uploads and read-backs.
    fn transfers(&self) -> Transfers {
        Transfers::default()
    }

    /// Three i64 in which kernels report the first fault they meet: its code, the index and the limit.
    fn faults(&self) -> Address {
        Address::NULL
    }

    /// Numbers that depend on their name alone, on the device. A backend may keep them; the default uploads them anew.
    fn constant(&'static self, _name: &str, values: &mut dyn FnMut() -> Result<Vec<i64>>) -> Result<Arc<dyn Memory>> {
        uploaded(self, &values()?)
    }

    /// Numbers that seldom differ from those of the last call with this name, on the device. A backend may keep them;
    /// the default uploads them anew. A recorded graph gets the values of its recording.
    fn table(&'static self, _name: &str, values: Vec<i64>) -> Result<Arc<dyn Memory>> {
        uploaded(self, &values)
    }

    /// Compiles a kernel that does not belong to the library.
    ///
    /// Errors: the compiler's log, or a backend that compiles no sources (the default).
    fn compile(&self, source: &Source) -> Result<Box<dyn Kernel + '_>> {
        Err(self.lacks(&format!("kernel `{}`: this backend compiles no sources", source.kernel())))
    }

    /// Returns `true` if the work that this thread enqueues is recorded and not done.
    fn is_capturing(&self) -> bool {
        false
    }

    /// Errors: `what` was called while a graph is recorded, of which it cannot be part.
    fn refuse_while_capturing(&self, _what: &str) -> Result<()> {
        Ok(())
    }

    /// Records a graph. `f` is called twice: with `false` it runs, by which kernels are compiled and memory is found;
    /// with `true` its work is recorded and not done.
    ///
    /// Errors: those of `f`, work that a graph cannot hold, another recording that has not ended, or a backend without
    /// graphs (the default).
    fn record(&'static self, _f: &mut dyn FnMut(bool) -> Result<()>) -> Result<Box<dyn Replay>> {
        Err(self.lacks("this backend records no graphs"))
    }

    /// The error for something that this device does not have.
    fn lacks(&self, what: &str) -> Error {
        Error::device(self.backend(), format_args!("{}:{}: {what}", self.backend(), self.ordinal()))
    }
}

fn uploaded<G: Gpu + ?Sized>(gpu: &'static G, values: &[i64]) -> Result<Arc<dyn Memory>> {
    let memory = gpu.allocate(size_of_val(values).max(1))?;
    gpu.upload(Address::new(memory.address()), bytemuck::cast_slice(values))?;
    Ok(memory)
}

/// Memory of a tensor on a GPU.
pub(crate) struct GpuBuffer(Option<Arc<dyn Memory>>);

impl GpuBuffer {
    /// Unspecified content.
    pub fn new(bytes: usize, gpu: &'static dyn Gpu) -> Result<Self> {
        if bytes == 0 { Ok(Self(None)) } else { gpu.allocate(bytes).map(Some).map(Self) }
    }

    /// Memory that the device may have other handles of.
    pub fn shared(memory: Arc<dyn Memory>) -> Self {
        Self(Some(memory))
    }

    /// Its first byte; null if it is empty.
    pub fn address(&self) -> Address {
        self.0.as_ref().map_or(Address::NULL, |memory| Address::new(memory.address()))
    }

    /// Returns `true` if nobody else has a handle of the memory.
    pub fn is_unique(&mut self) -> bool {
        self.0.as_mut().is_none_or(|memory| Arc::get_mut(memory).is_some())
    }
}
