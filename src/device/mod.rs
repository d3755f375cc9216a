//! Devices: memory, threads and processor features. Knows no op.

use std::{fmt, sync::OnceLock};

use crate::{Error, Result};

#[cfg(all(target_arch = "x86_64", not(miri)))]
mod amx;
pub(crate) mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
#[cfg(not(feature = "cuda"))]
#[path = "no_cuda.rs"]
pub mod cuda;
mod heap;
#[cfg(feature = "cuda")]
pub mod kernels;
// Without CUDA, what ops say of their launches is never read.
#[cfg_attr(not(feature = "cuda"), allow(dead_code))]
pub(crate) mod launch;
mod map;
mod precision;
mod ranges;
pub(crate) mod rows;
pub(crate) mod scratch;
pub(crate) mod simd;
mod tasks;

pub use cuda::CudaDevice;
pub use heap::MemoryStats;
pub use precision::{Precision, float32_matmul_precision, set_float32_matmul_precision};
pub use simd::Level;

pub(crate) use launch::{Arg, Gemm, Grid, Operand, Storage, args, size32};

use cpu::CpuBuffer;
use cuda::CudaBuffer;
use heap::Heap;

/// Runs an expression with what keeps the memory of a device.
macro_rules! on_pool {
    ($device:expr, $pool:ident, $body:expr) => {
        match $device {
            Device::Cpu => {
                let $pool = cpu_heap();
                $body
            }
            Device::Cuda(device) => {
                let $pool = device.pool();
                $body
            }
        }
    };
}

/// Where a tensor lives.
#[derive(Clone)]
#[non_exhaustive]
pub enum Device {
    /// The processor and its memory; ops run on the `rayon` thread pool of the calling thread.
    Cpu,
    /// An NVIDIA GPU.
    Cuda(&'static CudaDevice),
}

impl Device {
    /// The CUDA device with this number.
    ///
    /// Errors: the driver, NVRTC or cuBLAS is missing, with where it was looked for and how to get it; or there is no
    /// such card.
    pub fn cuda(ordinal: usize) -> Result<Self> {
        CudaDevice::open(ordinal).map(Self::Cuda)
    }

    /// A GPU if one is usable, else the CPU.
    pub fn best() -> Self {
        Self::cuda(0).unwrap_or(Self::Cpu)
    }

    /// Parses `cpu`, `cuda`, `cuda:N` or `auto` (the best one).
    ///
    /// Errors: another word, or a GPU that is not usable.
    pub fn parse(name: &str) -> Result<Self> {
        match name.split_once(':').unwrap_or((name, "0")) {
            ("cpu", _) if name == "cpu" => Ok(Self::Cpu),
            ("auto", _) if name == "auto" => Ok(Self::best()),
            ("cuda", ordinal) if ordinal.parse::<usize>().is_ok() => Self::cuda(ordinal.parse().unwrap_or(0)),
            _ => Err(Error::Device {
                op: "device",
                message: format!("unknown device `{name}`, expected auto, cpu, cuda or cuda:N"),
            }),
        }
    }

    /// Memory in use by tensors and graphs on this device, kept for reuse, and the largest amount in use so far.
    pub fn memory(&self) -> MemoryStats {
        on_pool!(self, pool, pool.stats())
    }

    /// Starts a new measurement of [`MemoryStats::peak`] from what is in use now.
    pub fn reset_peak_memory(&self) {
        on_pool!(self, pool, pool.reset_peak());
    }

    /// Gives all memory kept for reuse back to the system: that of tensors, and the working memory of threads
    /// ([`MemoryStats::scratch`]), of which a thread inside of an op gives its part back when that ends.
    pub fn trim(&self) {
        on_pool!(self, pool, pool.trim());
    }

    /// Limits the memory kept for reuse ([`MemoryStats::cached`] and [`MemoryStats::scratch`] together) to this many bytes.
    /// Default: what `XT_POOL_BYTES` says, else 2 GiB on the CPU and no limit on a GPU. Beside it, up to 64 KiB of a page
    /// that a tensor has a part of may stay with the process.
    pub fn set_cache_limit(&self, bytes: usize) {
        on_pool!(self, pool, pool.set_limit(bytes));
    }

    /// Waits until all that was enqueued on a GPU is done; the CPU is never behind.
    ///
    /// Errors: an index out of range that a kernel met since the last read-back, or an error of the driver.
    pub fn synchronize(&self) -> Result<()> {
        match self {
            Self::Cpu => Ok(()),
            Self::Cuda(device) => device.synchronize(),
        }
    }

    /// As [`Device::synchronize`], but nothing while a graph is recorded, which a wait would end.
    pub(crate) fn settle(&self) -> Result<()> {
        match self {
            Self::Cuda(device) if device.is_capturing() => Ok(()),
            _ => self.synchronize(),
        }
    }

    /// What has gone to a GPU and come back so far; all zero for the CPU.
    pub fn transfers(&self) -> Transfers {
        match self {
            Self::Cpu => Transfers::default(),
            Self::Cuda(device) => device.transfers(),
        }
    }
}

/// Counts what has gone to a GPU and come back.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Transfers {
    /// Kernels that were enqueued, and graphs that were replayed.
    pub launches: u64,
    /// Copies to the device.
    pub uploads: u64,
    /// Copies from the device, each of which waits for it.
    pub read_backs: u64,
}

/// One line per way to compute: what was found, and what is missing and why.
pub fn describe() -> Vec<String> {
    let mut lines =
        vec![format!("cpu: {} threads, {} vector code", rayon::current_num_threads(), simd::level().name())];
    lines.extend(cuda::describe());
    lines
}

impl PartialEq for Device {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Cpu, Self::Cpu) => true,
            (Self::Cuda(a), Self::Cuda(b)) => std::ptr::eq(*a, *b),
            _ => false,
        }
    }
}

impl Eq for Device {}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(device) => write!(f, "cuda:{}", device.ordinal()),
        }
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Untyped bytes on a device, given back to its pool when dropped.
pub(crate) enum Buffer {
    Cpu(CpuBuffer),
    Cuda(CudaBuffer),
}

impl Buffer {
    /// `bytes` bytes whose content is unspecified (on the CPU: but initialised).
    pub fn new(bytes: usize, device: &Device) -> Result<Self> {
        match device {
            Device::Cpu => CpuBuffer::new(bytes).map(Self::Cpu),
            Device::Cuda(device) => CudaBuffer::new(bytes, device).map(Self::Cuda),
        }
    }
}

fn cpu_heap() -> &'static Heap {
    static HEAP: OnceLock<Heap> = OnceLock::new();
    HEAP.get_or_init(|| {
        let limit = std::env::var("XT_POOL_BYTES").ok().and_then(|bytes| bytes.parse().ok());
        Heap::new(limit.unwrap_or(2 << 30), Some(scratch::scratch()))
    })
}
