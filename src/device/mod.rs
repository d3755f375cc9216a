//! Devices: memory, threads and processor features. Knows no tensor and no op.
//!
//! The CPU is called statically; every GPU implements [`Gpu`], as [`cuda`] does.

use std::{fmt, sync::OnceLock};

use crate::{Error, Result};

#[cfg(all(target_arch = "x86_64", not(miri)))]
mod amx;
pub(crate) mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
pub(crate) mod f16_rows;
#[cfg(feature = "cuda")]
mod faults;
pub(crate) mod floats;
mod gpu;
mod heap;
#[cfg(feature = "cuda")]
pub mod kernels;
pub(crate) mod launch;
mod map;
mod precision;
mod ranges;
pub(crate) mod rows;
pub(crate) mod scratch;
mod signature;
pub(crate) mod simd;
mod source;
mod tasks;

pub use cpu::for_rows;
#[cfg(feature = "cuda")]
pub use cuda::CudaDevice;
pub use gpu::{Address, Gpu, Kernel, Limits, Memory, ReadBack, Replay};
pub use heap::MemoryStats;
pub use launch::{Arg, Gemm, Grid, KernelLayout, Operand};
pub use precision::{Precision, float32_matmul_precision, set_float32_matmul_precision};
pub use signature::Kind;
pub use simd::Level;
pub use source::{ParameterType, Source, SourceParameter};

pub(crate) use gpu::GpuBuffer;
pub(crate) use launch::{args, size32};

use cpu::CpuBuffer;
use heap::Heap;

/// Device of a tensor.
///
/// ```
/// use x_transformers::{DType, Device, Tensor};
/// let device = Device::best(); // a GPU if there is one, else the CPU
/// assert_eq!(Device::parse("cpu")?, Device::Cpu);
/// let x = Tensor::zeros([2, 3], DType::F32, &device)?;
/// assert_eq!(x.device(), &device);
/// # Ok::<(), x_transformers::Error>(())
/// ```
#[derive(Clone)]
#[non_exhaustive]
pub enum Device {
    /// The processor and its memory; ops run on the `rayon` thread pool of the calling thread.
    Cpu,
    /// A GPU.
    Gpu(&'static dyn Gpu),
}

impl Device {
    /// Returns the CUDA device with this index.
    ///
    /// Errors: the driver, NVRTC or cuBLAS is missing, with the paths that were searched and how to install it; or no
    /// such card exists.
    #[doc(alias = "new_cuda")]
    pub fn cuda(ordinal: usize) -> Result<Self> {
        #[cfg(feature = "cuda")]
        return CudaDevice::open(ordinal).map(|device| Self::Gpu(device));
        #[cfg(not(feature = "cuda"))]
        Err(Error::device(
            "cuda",
            format_args!("cuda:{ordinal} is not available: this build has no CUDA; enable the feature `cuda`"),
        ))
    }

    /// Returns a GPU if one is usable, else the CPU.
    #[doc(alias = "cuda_if_available")]
    #[doc(alias = "is_available")]
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
            _ => Err(Error::device(
                "device",
                format_args!("unknown device `{name}`, expected auto, cpu, cuda or cuda:N"),
            )),
        }
    }

    /// Returns the memory in use by tensors and graphs on this device, the memory kept for reuse, and the peak so far.
    pub fn memory(&self) -> MemoryStats {
        match self {
            Self::Cpu => cpu_heap().stats(),
            Self::Gpu(gpu) => gpu.memory(),
        }
    }

    /// Returns the number of bytes available for new tensors: free memory of the GPU, or on the CPU available memory plus
    /// free swap (on Linux only), with the memory that is kept for reuse. `None` if it is not known.
    #[doc(alias = "mem_get_info")]
    pub fn available_memory(&self) -> Option<u64> {
        match self {
            Self::Cpu => Some(cpu::available_memory()? + cpu_heap().stats().cached as u64),
            Self::Gpu(gpu) => gpu.available_memory(),
        }
    }

    /// Resets [`MemoryStats::peak`] to the memory in use now.
    pub fn reset_peak_memory(&self) {
        match self {
            Self::Cpu => cpu_heap().reset_peak(),
            Self::Gpu(gpu) => gpu.reset_peak_memory(),
        }
    }

    /// Returns all memory kept for reuse to the system: that of tensors, and the working memory of threads
    /// ([`MemoryStats::scratch`]); a thread that is inside an op returns its part when the op ends.
    pub fn trim(&self) {
        match self {
            Self::Cpu => cpu_heap().trim(),
            Self::Gpu(gpu) => gpu.trim(),
        }
    }

    /// Limits the memory kept for reuse ([`MemoryStats::cached`] plus [`MemoryStats::scratch`]) to this many bytes.
    /// Default `XT_POOL_BYTES`, else 2 GiB on the CPU and no limit on a GPU. In addition, up to 64 KiB of a page that a
    /// tensor partly uses may stay with the process.
    pub fn set_cache_limit(&self, bytes: usize) {
        match self {
            Self::Cpu => cpu_heap().set_limit(bytes),
            Self::Gpu(gpu) => gpu.set_cache_limit(bytes),
        }
    }

    /// Waits until all work enqueued on a GPU is done; on the CPU returns at once.
    ///
    /// Errors: an index out of range that a kernel met since the last read-back, or an error of the driver.
    pub fn synchronize(&self) -> Result<()> {
        match self {
            Self::Cpu => Ok(()),
            Self::Gpu(gpu) => gpu.synchronize(),
        }
    }

    /// Like [`Device::synchronize`], but does nothing while a graph is being recorded, which a wait would end.
    pub(crate) fn settle(&self) -> Result<()> {
        match self {
            Self::Gpu(gpu) if gpu.is_capturing() => Ok(()),
            _ => self.synchronize(),
        }
    }

    /// Returns counts of kernel launches and of copies to and from a GPU so far; all zero for the CPU.
    pub fn transfers(&self) -> Transfers {
        match self {
            Self::Cpu => Transfers::default(),
            Self::Gpu(gpu) => gpu.transfers(),
        }
    }
}

/// Counts of kernel launches and of copies to and from a GPU.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[non_exhaustive]
pub struct Transfers {
    /// Number of enqueued kernels and replayed graphs.
    pub launches: u64,
    /// Number of copies to the device.
    pub uploads: u64,
    /// Number of copies from the device, each of which waits for it.
    pub read_backs: u64,
}

/// Returns one line per backend: what was found, and what is missing and why.
pub fn describe() -> Vec<String> {
    let mut lines =
        vec![format!("cpu: {} threads, {} vector code", rayon::current_num_threads(), simd::level().name())];
    #[cfg(feature = "cuda")]
    lines.extend(cuda::describe());
    #[cfg(not(feature = "cuda"))]
    lines.push("cuda: not built in (the feature `cuda` is off)".into());
    lines
}

impl PartialEq for Device {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Cpu, Self::Cpu) => true,
            (Self::Gpu(a), Self::Gpu(b)) => std::ptr::addr_eq(*a, *b) && a.ordinal() == b.ordinal(),
            _ => false,
        }
    }
}

impl Eq for Device {}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Gpu(gpu) => write!(f, "{}:{}", gpu.backend(), gpu.ordinal()),
        }
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Untyped bytes on a device, returned to its pool on drop.
pub(crate) enum Buffer {
    Cpu(CpuBuffer),
    Gpu(GpuBuffer),
    /// Elements that other ranks have.
    Absent,
}

impl Buffer {
    /// Allocates `bytes` bytes of unspecified content (initialised on the CPU).
    pub fn new(bytes: usize, device: &Device) -> Result<Self> {
        match device {
            Device::Cpu => CpuBuffer::new(bytes).map(Self::Cpu),
            Device::Gpu(gpu) => GpuBuffer::new(bytes, *gpu).map(Self::Gpu),
        }
    }

    /// Returns `true` if no other handle of its memory exists.
    pub fn is_unique(&mut self) -> bool {
        match self {
            Self::Cpu(_) | Self::Absent => true,
            Self::Gpu(buffer) => buffer.is_unique(),
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
