//! Devices: memory, threads and processor features. Knows no op.

use std::{fmt, sync::OnceLock};

use crate::{Error, Result};

pub(crate) mod cpu;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;
#[cfg(feature = "cuda")]
pub mod kernels;
mod pool;
pub(crate) mod simd;

pub use pool::MemoryStats;
pub use simd::Level;

use cpu::CpuBuffer;
use pool::Pool;

/// Where a tensor lives.
#[derive(Clone)]
#[non_exhaustive]
pub enum Device {
    /// The processor and its memory; ops run on the `rayon` thread pool of the calling thread.
    Cpu,
    /// An NVIDIA GPU.
    #[cfg(feature = "cuda")]
    Cuda(std::sync::Arc<cuda::CudaDevice>),
}

impl Device {
    /// The CUDA device with this number.
    ///
    /// Errors: the driver, NVRTC or cuBLAS is missing, with what was looked for and how to get it.
    pub fn cuda(ordinal: usize) -> Result<Self> {
        #[cfg(feature = "cuda")]
        return cuda::CudaDevice::open(ordinal).map(|device| Self::Cuda(std::sync::Arc::new(device)));
        #[cfg(not(feature = "cuda"))]
        Err(Error::Device {
            op: "device",
            message: format!("cuda:{ordinal} was asked for, but this build has no CUDA; enable the feature `cuda`"),
        })
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

    /// Memory in use by tensors on this device, kept for reuse, and the largest amount in use so far.
    pub fn memory(&self) -> MemoryStats {
        self.pool().stats()
    }

    /// Starts a new measurement of [`MemoryStats::peak`] from what is in use now.
    pub fn reset_peak_memory(&self) {
        self.pool().reset_peak();
    }

    /// Gives all memory kept for reuse back to the system.
    pub fn trim(&self) {
        self.pool().trim();
    }

    /// Limits the memory kept for reuse to this many bytes (for the CPU 2 GiB unless `XT_POOL_BYTES` says otherwise).
    ///
    /// Whatever the limit, it goes before memory in use and memory kept outgrow the largest use so far by 64 MiB.
    pub fn set_cache_limit(&self, bytes: usize) {
        self.pool().set_limit(bytes);
    }

    fn pool(&self) -> &'static Pool {
        match self {
            Self::Cpu => cpu_pool(),
            #[cfg(feature = "cuda")]
            Self::Cuda(device) => match **device {},
        }
    }
}

/// One line per way to compute: what was found, and what is missing and why.
pub fn describe() -> Vec<String> {
    let mut lines =
        vec![format!("cpu: {} threads, {} vector code", rayon::current_num_threads(), simd::level().name())];
    #[cfg(feature = "cuda")]
    lines.extend(cuda::describe());
    #[cfg(not(feature = "cuda"))]
    lines.push("cuda: this build has no CUDA, the feature `cuda` is off".into());
    lines
}

impl PartialEq for Device {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Cpu, Self::Cpu) => true,
            #[cfg(feature = "cuda")]
            (Self::Cuda(a), Self::Cuda(b)) => std::sync::Arc::ptr_eq(a, b),
            #[cfg(feature = "cuda")]
            _ => false,
        }
    }
}

impl Eq for Device {}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            #[cfg(feature = "cuda")]
            Self::Cuda(device) => match **device {},
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
}

impl Buffer {
    /// `bytes` bytes whose content is unspecified (but initialised).
    pub fn new(bytes: usize, device: &Device) -> Result<Self> {
        match device {
            Device::Cpu => CpuBuffer::new(bytes).map(Self::Cpu),
            #[cfg(feature = "cuda")]
            Device::Cuda(device) => match **device {},
        }
    }
}

fn cpu_pool() -> &'static Pool {
    static POOL: OnceLock<Pool> = OnceLock::new();
    POOL.get_or_init(|| {
        let limit = std::env::var("XT_POOL_BYTES").ok().and_then(|bytes| bytes.parse().ok());
        Pool::new(limit.unwrap_or(2 << 30))
    })
}
