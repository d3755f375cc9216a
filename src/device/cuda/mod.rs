//! CUDA devices: one context and one stream each, memory from a pool, kernels compiled on first use.
//!
//! All work is enqueued on this stream, so that a block of memory can be reused as soon as its last use has been
//! enqueued, and only read-backs wait for the device.

mod blas;
mod compile;
mod epilogues;
mod faults;
mod gate;
mod graph;
mod landing;
mod libraries;
mod memory;
mod nccl;
mod pool;
mod resources;
mod staging;
mod tables;
mod target;
mod timer;

use std::{
    any::Any,
    collections::{BTreeMap, HashMap, hash_map::Entry},
    ffi::{CString, c_void},
    fmt,
    sync::{
        Arc, Mutex, OnceLock, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering},
    },
};

use cudarc::driver::{
    DriverError, result,
    sys::{self, CUdevice_attribute_enum as Attribute},
};

use super::{
    Device, MemoryStats, Transfers,
    gpu::{Address, Gpu, Kernel, Limits, Memory, ReadBack, Replay},
    kernels::{KernelSource, LAB_SOURCES, Parameter, SIGNATURES, Signature},
    launch::{Arg, Gemm, Grid},
    source::Source,
};
use crate::{Error, ErrorKind, Result};

pub use compile::{Cached, Compiled, compile, cubin, cubin_in, folder, nvrtc_version};
use memory::{Block, CudaMemory};
pub(crate) use nccl::{Collective, Comm, Element, Id};
use pool::Pool;
use resources::{Context, Module, Stream};
pub use target::{Architecture, Target};

/// CUDA device. There is one value per GPU, which lives as long as the process.
pub struct CudaDevice {
    ordinal: usize,
    name: String,
    architecture: Architecture,
    /// Target that its kernels are compiled for.
    target: Target,
    pool: Pool<Block>,
    /// Loaded kernels by name and options.
    functions: RwLock<HashMap<String, Function>>,
    /// Constants that kernels read, by name.
    constants: Mutex<tables::Constants>,
    /// Tables of [`CudaDevice::table`], with the values that they were made from.
    tables: Mutex<tables::Tables>,
    /// Tables of the graph that is being recorded, from its first run on.
    graph_tables: Mutex<tables::GraphTables>,
    gate: gate::Gate,
    staging: Mutex<staging::Staging>,
    /// Memory for copies from the device that nobody waits for yet.
    landings: Mutex<Vec<landing::Landing>>,
    launches: AtomicU64,
    uploads: AtomicU64,
    read_backs: AtomicU64,
    // Dropped in this order if the device cannot be opened.
    /// `None` without cuBLASLt. Before `blas`, whose workspace it shares.
    epilogues: Option<Mutex<epilogues::Handle>>,
    blas: Mutex<blas::Handle>,
    /// Words in which kernels report.
    faults: faults::Faults,
    stream: Stream,
    context: Context,
}

impl fmt::Debug for CudaDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cuda:{} ({}, sm_{})", self.ordinal, self.name, self.architecture)
    }
}

impl CudaDevice {
    /// Returns the device with this index.
    ///
    /// Errors: a library that is missing or too old, no driver for a card, or no such card.
    pub fn open(ordinal: usize) -> Result<&'static Self> {
        static OPEN: Mutex<BTreeMap<usize, &'static CudaDevice>> = Mutex::new(BTreeMap::new());
        let missing: Vec<_> = libraries::find().iter().filter_map(|found| found.state.as_ref().err()).collect();
        if !missing.is_empty() {
            let missing: Vec<_> = missing.into_iter().map(String::as_str).collect();
            return Err(error(format!("cuda:{ordinal} is not usable: {}", missing.join("; "))));
        }
        let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(device) = open.get(&ordinal) {
            return Ok(device);
        }
        let device: &'static Self = Box::leak(Box::new(Self::start(ordinal)?));
        open.insert(ordinal, device);
        Ok(device)
    }

    /// Returns the CUDA device of a [`Device`], if it is one.
    pub fn of(device: &Device) -> Option<&'static Self> {
        match *device {
            Device::Gpu(gpu) => (gpu as &'static dyn Any).downcast_ref(),
            Device::Cpu => None,
        }
    }

    fn start(ordinal: usize) -> Result<Self> {
        let place = |call: &str, why: DriverError| error(format!("cuda:{ordinal}: {call}: {}", text(why)));
        result::init().map_err(|why| place("cuInit", why))?;
        let count = result::device::get_count().map_err(|why| place("cuDeviceGetCount", why))?;
        if ordinal >= count.max(0) as usize {
            return Err(error(format!("cuda:{ordinal} does not exist: the driver found {count} GPUs")));
        }
        let device = result::device::get(ordinal as i32).map_err(|why| place("cuDeviceGet", why))?;
        let attribute = |attribute| {
            // SAFETY: the device comes from `cuDeviceGet`.
            unsafe { result::device::get_attribute(device, attribute) }
                .map_err(|why| place("cuDeviceGetAttribute", why))
        };
        let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        let architecture = (major * 10 + minor) as Architecture;
        let driver = driver_version().map_err(|why| place("cuDriverGetVersion", why))?;
        let target = target::target(architecture, driver)
            .map_err(|why| error(format!("cuda:{ordinal} is not usable: {why}")))?;
        let name = result::device::get_name(device).map_err(|why| place("cuDeviceGetName", why))?;
        // The following values release themselves if a later step fails.
        let context = Context::retain(device).map_err(|why| place("cuDevicePrimaryCtxRetain", why))?;
        let stream = Stream::new(&context).map_err(|why| place("cuStreamCreate", why))?;
        let faults = faults::Faults::new(&context).map_err(|why| place("cuMemAlloc", why))?;
        // SAFETY: the memory has this size.
        unsafe { result::memset_d8_async(faults.all(), 0, faults::BYTES, stream.0) }
            .map_err(|why| place("cuMemsetD8Async", why))?;
        let blas = blas::Handle::new(&stream, architecture, &context).map_err(|why| match why.into_kind() {
            ErrorKind::Device { op, message } => Error::device(op, format_args!("cuda:{ordinal}: {message}")),
            other => Error::new(other),
        })?;
        let limit = std::env::var("XT_POOL_BYTES").ok().and_then(|bytes| bytes.parse().ok());
        Ok(Self {
            ordinal,
            name,
            architecture,
            target,
            pool: Pool::new(limit.unwrap_or(usize::MAX)),
            functions: RwLock::default(),
            constants: Mutex::default(),
            tables: Mutex::default(),
            graph_tables: Mutex::default(),
            gate: gate::Gate::default(),
            staging: Mutex::default(),
            landings: Mutex::default(),
            launches: AtomicU64::new(0),
            uploads: AtomicU64::new(0),
            read_backs: AtomicU64::new(0),
            epilogues: epilogues::Handle::new(blas.workspace()).map(Mutex::new),
            blas: Mutex::new(blas),
            faults,
            stream,
            context,
        })
    }

    /// Returns the card's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the card's compute capability: 80 for `sm_80`.
    pub fn architecture(&self) -> Architecture {
        self.architecture
    }

    /// Returns the target that its kernels are compiled for: machine code, or PTX if the card is newer than NVRTC.
    pub fn target(&self) -> Target {
        self.target
    }

    /// Makes the context current on this thread.
    fn bind(&self) -> Result<()> {
        if self.check("cuCtxGetCurrent", result::ctx::get_current())? != Some(self.context.handle()) {
            self.check("cuCtxSetCurrent", self.context.make_current())?;
        }
        Ok(())
    }

    fn check<R>(&self, call: &str, outcome: std::result::Result<R, DriverError>) -> Result<R> {
        outcome.map_err(|why| error(format!("cuda:{}: {call}: {}", self.ordinal, text(why))))
    }

    /// Returns the loaded kernel with these options; `name` is its unique key.
    fn function(
        &self,
        name: &str,
        options: &[(&str, &str)],
        load: impl FnOnce() -> Result<(Module, Function)>,
    ) -> Result<Function> {
        let mut key = name.to_string();
        options.iter().for_each(|(option, value)| key.extend([" ", option, "=", value]));
        if let Some(function) = self.functions.read().unwrap_or_else(PoisonError::into_inner).get(&key) {
            return Ok(*function);
        }
        // Compiling takes seconds; meanwhile other threads may load kernels, even this one.
        let (module, function) = load()?;
        match self.functions.write().unwrap_or_else(PoisonError::into_inner).entry(key) {
            Entry::Vacant(entry) => {
                module.keep();
                Ok(*entry.insert(function))
            }
            Entry::Occupied(entry) => Ok(*entry.get()),
        }
    }

    /// Loads the kernel of this signature from compiled code.
    fn load(&self, cubin: &[u8], signature: &'static Signature) -> Result<(Module, Function)> {
        let kernel = CString::new(signature.kernel).map_err(|why| error(why.to_string()))?;
        // Loading may wait for the whole context. Recorded kernels were loaded by the previous run.
        let _pass = self.enter_outside("loading a kernel")?;
        self.bind()?;
        // SAFETY: the context is current, and NVRTC made the code, now or earlier: a cache that somebody else may write
        // to is not read, and a hash shows damage.
        let module = self.check("cuModuleLoadData", unsafe { Module::load(cubin) })?;
        let handle = self.check("cuModuleGetFunction", module.function(kernel))?;
        Ok((module, Function { handle, signature }))
    }
}

/// A loaded kernel and its signature.
#[derive(Clone, Copy)]
struct Function {
    handle: sys::CUfunction,
    signature: &'static Signature,
}

// SAFETY: a handle of the driver, which may be used from any thread.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

/// A kernel of a device, ready to launch.
struct Loaded<'a> {
    device: &'a CudaDevice,
    function: Function,
}

/// Maximum dynamic shared memory of a launch, in bytes, without raising the driver's limit: 48 KiB less the static
/// shared memory of kernels.
const PLAIN_SHARED: u32 = 40 << 10;

impl Kernel for Loaded<'_> {
    fn launch(&self, grid: Grid, args: &[Arg]) -> Result<()> {
        let Self { device, function: Function { handle, signature } } = self;
        check_arguments(signature, args)?;
        if grid.is_empty() {
            return Ok(());
        }
        let _pass = device.enter("a launch")?;
        device.hold(signature.kernel, args.iter().filter_map(Arg::address).map(Address::get))?;
        device.bind()?;
        if grid.shared > PLAIN_SHARED {
            let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            let bytes = i32::try_from(grid.shared).unwrap_or(i32::MAX);
            // SAFETY: the function belongs to a module that is kept loaded.
            let outcome = unsafe { result::function::set_function_attribute(*handle, attribute, bytes) };
            device.check(signature.kernel, outcome)?;
        }
        let mut pointers: Vec<*mut c_void> = args.iter().map(pointer).collect();
        let [blocks, threads] = [grid.blocks, grid.threads].map(|[x, y, z]| (x, y, z));
        // SAFETY: number, order and sizes of the arguments are those of the kernel, as checked above. Its pointers are
        // tensors that live while the caller has them and are freed on the same stream, after this launch; a graph that
        // it becomes part of holds their memory. That sizes and layouts are those of the tensors is the caller's part.
        let outcome =
            unsafe { result::launch_kernel(*handle, blocks, threads, grid.shared, device.stream.0, &mut pointers) };
        device.check(signature.kernel, outcome)?;
        device.launches.fetch_add(1, Ordering::Relaxed);
        if synchronous() && !device.is_capturing() {
            // SAFETY: the stream lives as long as the device.
            device.check(signature.kernel, unsafe { result::stream::synchronize(device.stream.0) })?;
        }
        Ok(())
    }
}

/// Returns `true` if `XT_SYNC=1` requests a wait after each launch, so that an error names its kernel.
fn synchronous() -> bool {
    static SYNC: OnceLock<bool> = OnceLock::new();
    *SYNC.get_or_init(|| std::env::var("XT_SYNC").is_ok_and(|value| value == "1"))
}

/// Returns the address of an argument's value, for the driver.
fn pointer(arg: &Arg) -> *mut c_void {
    let pointer = match arg {
        // A struct of one u64 and nothing else.
        Arg::Output(x) | Arg::Input(x) => std::ptr::from_ref(x).cast::<c_void>(),
        Arg::U64(x) => std::ptr::from_ref(x).cast(),
        Arg::I32(x) => std::ptr::from_ref(x).cast(),
        Arg::U32(x) => std::ptr::from_ref(x).cast(),
        Arg::I64(x) => std::ptr::from_ref(x).cast(),
        Arg::F32(x) => std::ptr::from_ref(x).cast(),
        Arg::F64(x) => std::ptr::from_ref(x).cast(),
        Arg::Layout(x) => std::ptr::from_ref(x).cast(),
    };
    pointer.cast_mut()
}

/// Checks the arguments of a launch against the kernel's signature: the driver receives neither their number nor their
/// types, and would misread arguments that do not match.
fn check_arguments(signature: &Signature, args: &[Arg]) -> Result<()> {
    let (expected, given) = (signature.parameters.len(), args.len());
    if expected != given {
        return Err(error(format!("{}: expected {expected} arguments, got {given}", signature.kernel)));
    }
    for (parameter, arg) in signature.parameters.iter().zip(args) {
        if parameter.kind != arg.kind() {
            return Err(error(format!(
                "{}: argument `{}` is {:?}, expected {:?}",
                signature.kernel,
                parameter.name,
                arg.kind(),
                parameter.kind
            )));
        }
    }
    Ok(())
}

// SAFETY: addresses go to this device's driver alone; that the kernels of `kernels/` stay within their tensors is what
// the contract suite checks on the emulated driver, access by access.
unsafe impl Gpu for CudaDevice {
    fn backend(&self) -> &'static str {
        "cuda"
    }

    fn ordinal(&self) -> usize {
        self.ordinal
    }

    fn limits(&self) -> Limits {
        Limits {
            compute_capability: Some(self.architecture),
            has_warpgroups: self.target.has_warpgroups(),
            adds_biases: self.epilogues.is_some(),
        }
    }

    fn allocate(&'static self, bytes: usize) -> Result<Arc<dyn Memory>> {
        Ok(Arc::new(CudaMemory::new(bytes, self)?))
    }

    fn upload(&self, to: Address, from: &[u8]) -> Result<()> {
        self.upload_at(to.get(), from)
    }

    fn read_back(&self, from: Address, to: &mut [u8]) -> Result<()> {
        self.read_back_at(from.get(), to)
    }

    fn read_back_later(&'static self, from: Address, bytes: usize) -> Result<Box<dyn ReadBack>> {
        self.read_back_later_at(from.get(), bytes)
    }

    fn copy(&self, to: Address, from: Address, bytes: usize) -> Result<()> {
        self.copy_at(to.get(), from.get(), bytes)
    }

    fn fill_zero(&self, to: Address, bytes: usize) -> Result<()> {
        self.fill_zero_at(to.get(), bytes)
    }

    fn kernel(&self, name: &'static str, options: &[(&str, &str)]) -> Result<Box<dyn Kernel + '_>> {
        let signature = SIGNATURES.iter().find(|signature| signature.kernel == name);
        let signature = signature.ok_or_else(|| error(format!("unknown kernel `{name}`")))?;
        let function = self.function(name, options, || {
            let source = KernelSource::named(signature.file).filter(|source| source.has(options)).ok_or_else(|| {
                error(format!("{}.cu has no variant {options:?}; see its `// Variants:` lines", signature.file))
            })?;
            self.load(&compile::cubin(source, options, self.target)?, signature)
        })?;
        Ok(Box::new(Loaded { device: self, function }))
    }

    fn compile(&self, source: &Source) -> Result<Box<dyn Kernel + '_>> {
        let (name, options) = (source.kernel(), source.options());
        // C identifiers contain no spaces.
        let function = self.function(&format!("{:016x} {name}", source.hash()), &options, || {
            // Sources of the library have names of their own in the cache.
            let known = LAB_SOURCES.iter().find(|known| known.hash == source.hash()).map_or(name, |known| known.name);
            let text = KernelSource { name: known, hash: source.hash(), source: source.text(), variants: &[] };
            let cubin = compile::cubin(&text, &options, self.target)?;
            // Kept as long as the loaded code, which is for the life of the process.
            let name: &'static str = name.to_string().leak();
            let parameters = source.parameters().iter();
            let parameters = parameters.map(|one| Parameter { name: one.name.clone().leak(), kind: one.kind });
            let parameters: &'static [Parameter] = parameters.collect::<Vec<_>>().leak();
            self.load(&cubin, Box::leak(Box::new(Signature { file: name, kernel: name, parameters })))
        })?;
        Ok(Box::new(Loaded { device: self, function }))
    }

    fn gemm(&self, gemm: &Gemm) -> Result<()> {
        if gemm.bias.is_some() || gemm.row_sums.is_some() { self.multiply_fused(gemm) } else { self.multiply(gemm) }
    }

    fn fuses(&self, gemm: &Gemm) -> bool {
        self.has_algorithm(gemm)
    }

    fn synchronize(&self) -> Result<()> {
        self.read_back_at(0, &mut [])
    }

    fn memory(&self) -> MemoryStats {
        self.pool.stats()
    }

    fn available_memory(&self) -> Option<u64> {
        self.bind().ok()?;
        let (free, _) = result::mem_get_info().ok()?;
        Some(free as u64 + self.pool.stats().cached as u64)
    }

    fn reset_peak_memory(&self) {
        self.pool.reset_peak();
    }

    fn trim(&self) {
        self.pool.trim();
    }

    fn set_cache_limit(&self, bytes: usize) {
        self.pool.set_limit(bytes);
    }

    fn transfers(&self) -> Transfers {
        Transfers {
            launches: self.launches.load(Ordering::Relaxed),
            uploads: self.uploads.load(Ordering::Relaxed),
            read_backs: self.read_backs.load(Ordering::Relaxed),
        }
    }

    fn faults(&self) -> Address {
        Address::new(self.faults.address())
    }

    fn constant(&'static self, name: &str, values: &mut dyn FnMut() -> Result<Vec<i64>>) -> Result<Arc<dyn Memory>> {
        self.kept_constant(name, values)
    }

    fn table(&'static self, name: &str, values: Vec<i64>) -> Result<Arc<dyn Memory>> {
        self.kept_table(name, values)
    }

    fn is_capturing(&self) -> bool {
        self.captures()
    }

    fn refuse_while_capturing(&self, what: &str) -> Result<()> {
        self.enter_outside(what).map(drop)
    }

    fn record(&'static self, f: &mut dyn FnMut(bool) -> Result<()>) -> Result<Box<dyn Replay>> {
        graph::record(self, false, f)
    }

    fn record_patiently(&'static self, f: &mut dyn FnMut(bool) -> Result<()>) -> Result<Box<dyn Replay>> {
        graph::record(self, true, f)
    }
}

/// Returns one line per library, and one per GPU.
pub fn describe() -> Vec<String> {
    let line = |found: &libraries::Found| match &found.state {
        Ok(place) => format!("cuda: {} found in {place}", found.what),
        Err(why) => format!("cuda: {} missing: {why}", found.what),
    };
    let mut lines: Vec<_> = libraries::find().iter().map(line).collect();
    if let Some(Err(why)) = folder().map(|folder| compile::trusted(&folder)) {
        lines.push(format!("cuda: {why}"));
    }
    if libraries::find().iter().all(|found| found.state.is_ok()) {
        if let (Ok((driver, of_driver)), Ok((nvrtc, of_nvrtc))) = (driver_version(), nvrtc_version()) {
            lines.push(format!("cuda: driver for CUDA {driver}.{of_driver}, NVRTC {nvrtc}.{of_nvrtc}"));
        }
        match CudaDevice::open(0) {
            Err(why) => lines.push(why.to_string()),
            Ok(_) => {
                let devices = (0..).map_while(|ordinal| CudaDevice::open(ordinal).ok());
                lines.extend(devices.map(|device| format!("{device:?}, kernels for {}", device.target)));
            }
        }
    }
    lines
}

/// Returns the CUDA version of the driver.
fn driver_version() -> std::result::Result<(i32, i32), DriverError> {
    let mut version = 0;
    // SAFETY: valid for the write; the symbol was found before the first call of the driver.
    unsafe { sys::cuDriverGetVersion(&mut version) }.result()?;
    Ok(target::driver_version(version))
}

fn text(why: DriverError) -> String {
    let string = |text: std::result::Result<&std::ffi::CStr, DriverError>| {
        text.map_or_else(|_| "unknown".to_string(), |text| text.to_string_lossy().into_owned())
    };
    format!("{} ({})", string(why.error_name()), string(why.error_string()))
}

fn error(message: String) -> Error {
    Error::device("cuda", message)
}
