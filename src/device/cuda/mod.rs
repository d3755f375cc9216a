//! CUDA devices: one context and one stream each, memory from a pool, kernels compiled on first use.
//!
//! Everything is enqueued on the one stream, so that a block of memory can be reused as soon as its last use has been
//! enqueued, and nothing waits for the device but read-backs.

mod blas;
mod compile;
mod graph;
mod lab;
mod libraries;
mod memory;
mod pool;
mod timer;

use std::{
    collections::{BTreeMap, HashMap},
    ffi::{CString, c_void},
    fmt,
    sync::{
        Mutex, MutexGuard, OnceLock, PoisonError, RwLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use cudarc::driver::{
    DriverError,
    result::{self, stream::StreamKind},
    sys::{self, CUdevice_attribute_enum as Attribute},
};

use super::{
    Transfers,
    kernels::{KernelSource, Kind, SIGNATURES, Signature},
    launch::{Arg, Grid},
};
use crate::{DType, Element, Error, Result, Tensor, core::Shape};

pub use compile::{Architecture, Cached, Compiled, compile, cubin, cubin_in, folder, nvrtc_version};
pub use graph::Graph;
pub use lab::{Rung, Scalar};
use memory::Block;
pub(crate) use memory::CudaBuffer;
use pool::{FreeBlocks, Pool};

/// A CUDA device. There is one value per card and process, which lives as long as the process.
pub struct CudaDevice {
    ordinal: usize,
    name: String,
    architecture: Architecture,
    context: sys::CUcontext,
    stream: sys::CUstream,
    pool: Pool<Block>,
    /// Loaded kernels by name and options.
    functions: RwLock<HashMap<String, Function>>,
    /// Values that kernels need and that do not change, by name.
    constants: Mutex<BTreeMap<String, Tensor>>,
    /// The tables of [`CudaDevice::table`], with what they were made from.
    tables: Mutex<BTreeMap<String, (Vec<i64>, Tensor)>>,
    /// What kernels report: kind, index and limit of the first fault.
    faults: u64,
    blas: Mutex<blas::Handle>,
    /// Whether the stream is being recorded into a graph.
    capturing: AtomicBool,
    /// The tables of a graph that is being made, from its first run on.
    graph_tables: Mutex<Option<GraphTables>>,
    launches: AtomicU64,
    uploads: AtomicU64,
    read_backs: AtomicU64,
}

// SAFETY: the handles of the driver may be used from any thread whose current context is theirs, which `bind` sees to.
unsafe impl Send for CudaDevice {}
// SAFETY: as above; the driver locks what its calls share.
unsafe impl Sync for CudaDevice {}

impl fmt::Debug for CudaDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cuda:{} ({}, sm_{})", self.ordinal, self.name, self.architecture)
    }
}

/// The tables of a graph, with their values, and how many the recording has come to.
#[derive(Default)]
struct GraphTables {
    made: Vec<(Tensor, Vec<i64>)>,
    used: usize,
}

/// Words that a kernel writes about a fault.
const FAULT_WORDS: usize = 3;

impl CudaDevice {
    /// The device with this number.
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

    fn start(ordinal: usize) -> Result<Self> {
        let place = |call: &str, why: DriverError| error(format!("cuda:{ordinal}: {call}: {}", text(why)));
        result::init().map_err(|why| place("cuInit", why))?;
        let count = result::device::get_count().map_err(|why| place("cuDeviceGetCount", why))?;
        if ordinal >= count.max(0) as usize {
            return Err(error(format!("cuda:{ordinal} does not exist, the driver found {count} cards")));
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
        if architecture < 75 {
            return Err(error(format!("cuda:{ordinal} is an sm_{architecture}, expected sm_75 (Turing) or later")));
        }
        let name = result::device::get_name(device).map_err(|why| place("cuDeviceGetName", why))?;
        // SAFETY: the device comes from `cuDeviceGet`. The context is kept for as long as the process lives.
        let context =
            unsafe { result::primary_ctx::retain(device) }.map_err(|why| place("cuDevicePrimaryCtxRetain", why))?;
        // SAFETY: retained above.
        unsafe { result::ctx::set_current(context) }.map_err(|why| place("cuCtxSetCurrent", why))?;
        let stream = result::stream::create(StreamKind::NonBlocking).map_err(|why| place("cuStreamCreate", why))?;
        // SAFETY: the context is current. Freed never: the device lives as long as the process.
        let faults = unsafe { result::malloc_sync(FAULT_WORDS * 8) }.map_err(|why| place("cuMemAlloc", why))?;
        // SAFETY: the memory has this size.
        unsafe { result::memset_d8_async(faults, 0, FAULT_WORDS * 8, stream) }
            .map_err(|why| place("cuMemsetD8Async", why))?;
        let limit = std::env::var("XT_POOL_BYTES").ok().and_then(|bytes| bytes.parse().ok());
        Ok(Self {
            ordinal,
            name,
            architecture,
            context,
            stream,
            pool: Pool::new(limit.unwrap_or(usize::MAX)),
            functions: RwLock::default(),
            constants: Mutex::default(),
            tables: Mutex::default(),
            faults,
            blas: Mutex::new(blas::Handle::new(stream, architecture)?),
            capturing: AtomicBool::new(false),
            graph_tables: Mutex::default(),
            launches: AtomicU64::new(0),
            uploads: AtomicU64::new(0),
            read_backs: AtomicU64::new(0),
        })
    }

    /// Its number: 0 for `cuda:0`.
    pub fn ordinal(&self) -> usize {
        self.ordinal
    }

    /// The card's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The card's compute capability: 80 for `sm_80`.
    pub fn architecture(&self) -> Architecture {
        self.architecture
    }

    /// Waits until all that was enqueued is done.
    ///
    /// Errors: what a kernel reported since the last read-back, or an error of the driver.
    pub fn synchronize(&self) -> Result<()> {
        self.read_back_at(0, &mut [])
    }

    pub(super) fn pool(&self) -> &Pool<Block> {
        &self.pool
    }

    pub(super) fn transfers(&self) -> Transfers {
        Transfers {
            launches: self.launches.load(Ordering::Relaxed),
            uploads: self.uploads.load(Ordering::Relaxed),
            read_backs: self.read_backs.load(Ordering::Relaxed),
        }
    }

    /// Makes the context current on this thread.
    fn bind(&self) -> Result<()> {
        if self.check("cuCtxGetCurrent", result::ctx::get_current())? != Some(self.context) {
            // SAFETY: the primary context is retained for as long as the process lives.
            self.check("cuCtxSetCurrent", unsafe { result::ctx::set_current(self.context) })?;
        }
        Ok(())
    }

    fn check<R>(&self, call: &str, outcome: std::result::Result<R, DriverError>) -> Result<R> {
        outcome.map_err(|why| error(format!("cuda:{}: {call}: {}", self.ordinal, text(why))))
    }

    /// Values that do not depend on the data, on the device: made and uploaded on the first call with this name.
    pub(crate) fn constant<E: Element>(
        &'static self,
        name: &str,
        values: impl FnOnce() -> Result<Vec<E>>,
    ) -> Result<Tensor> {
        let mut constants = self.constants.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(constant) = constants.get(name) {
            return Ok(constant.clone());
        }
        let values = values()?;
        let constant = Tensor::from_slice(&values, [values.len()], &super::Device::Cuda(self))?;
        constants.insert(name.into(), constant.clone());
        Ok(constant)
    }

    /// Numbers that are seldom others than at the last call with this name, on the device; uploaded if they are. A graph
    /// that is being made gets tables of its own, which the recording fills when it is done.
    pub(crate) fn table(&'static self, name: &str, values: Vec<i64>) -> Result<Tensor> {
        if let Some(tables) = self.graph_tables().as_mut() {
            return self.table_of_graph(tables, values);
        }
        let mut tables = self.tables.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((known, table)) = tables.get_mut(name) {
            if *known == values {
                return Ok(table.clone());
            }
            // Over the old one, which earlier launches have read when the copy begins: a table in a new place would move
            // what comes after it. One that another thread has still to launch with stays as it is.
            if known.len() == values.len() && table.is_unique() {
                self.upload(table.address_mut()?, bytemuck::cast_slice(&values))?;
                *known = values;
                return Ok(table.clone());
            }
        }
        let table = Tensor::from_slice(&values, [values.len()], &super::Device::Cuda(self))?;
        tables.insert(name.into(), (values, table.clone()));
        Ok(table)
    }

    /// The next table of a graph: the first run makes them, the recording goes through them again.
    fn table_of_graph(&'static self, tables: &mut GraphTables, values: Vec<i64>) -> Result<Tensor> {
        if self.is_capturing() {
            let known = tables.made.get_mut(tables.used).filter(|(table, _)| table.elements() == values.len());
            let (table, known) =
                known.ok_or_else(|| error("a graph's recording is unlike the run before it".into()))?;
            *known = values;
            tables.used += 1;
            return Ok(table.clone());
        }
        // Memory that no other tensor of the graph has, neither before nor after: not from the blocks that are free.
        let mut free = FreeBlocks::default();
        self.pool.exchange(&mut free, true);
        let table = Tensor::uninit(Shape::new(&[values.len()])?, DType::I64, &super::Device::Cuda(self));
        self.pool.exchange(&mut free, true);
        let mut table = table?;
        self.upload(table.address_mut()?, bytemuck::cast_slice(&values))?;
        tables.made.push((table.clone(), values));
        Ok(table)
    }

    fn graph_tables(&self) -> MutexGuard<'_, Option<GraphTables>> {
        self.graph_tables.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where kernels report indices that are out of range; the error comes at the next read-back.
    pub(crate) fn faults(&self) -> Arg {
        Arg::Output(self.faults)
    }

    /// A kernel, compiled and loaded on first use.
    ///
    /// Errors: no kernel of this name or no variant with these options, or an error of the compiler or the driver.
    pub(crate) fn kernel(&self, name: &'static str, options: &[(&str, &str)]) -> Result<Kernel<'_>> {
        let mut key = name.to_string();
        options.iter().for_each(|(option, value)| key.extend([" ", option, "=", value]));
        let loaded = self.functions.read().unwrap_or_else(PoisonError::into_inner).get(&key).copied();
        let function = match loaded {
            Some(function) => function,
            None => {
                let function = self.load(name, options)?;
                self.functions.write().unwrap_or_else(PoisonError::into_inner).insert(key, function);
                function
            }
        };
        Ok(Kernel { device: self, function })
    }

    fn load(&self, name: &'static str, options: &[(&str, &str)]) -> Result<Function> {
        let signature = SIGNATURES.iter().find(|signature| signature.kernel == name);
        let signature = signature.ok_or_else(|| error(format!("there is no kernel `{name}`")))?;
        self.load_from(KernelSource::named(signature.file), signature, options)
    }

    fn load_from(
        &self,
        source: Option<&KernelSource>,
        signature: &'static Signature,
        options: &[(&str, &str)],
    ) -> Result<Function> {
        let source = source.filter(|source| source.has(options)).ok_or_else(|| {
            error(format!("{}.cu has no variant {options:?}; its `// Variants:` say what", signature.file))
        })?;
        let cubin = compile::cubin(source, options, self.architecture)?;
        let kernel = CString::new(signature.kernel).map_err(|why| error(why.to_string()))?;
        self.bind()?;
        // SAFETY: the code is whole: NVRTC made it, or the cache checked its hash. The module is never unloaded.
        let module = self.check("cuModuleLoadData", unsafe { result::module::load_data(cubin.as_ptr().cast()) })?;
        // SAFETY: the module was loaded above.
        let handle = self.check("cuModuleGetFunction", unsafe { result::module::get_function(module, kernel) })?;
        Ok(Function { handle, signature })
    }
}

/// A loaded kernel and what it expects.
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
pub(crate) struct Kernel<'a> {
    device: &'a CudaDevice,
    function: Function,
}

/// Shared memory of a launch, in bytes, that needs no leave of the driver: 48 KiB less what kernels declare themselves
/// beside it.
const PLAIN_SHARED: u32 = 40 << 10;

impl Kernel<'_> {
    /// Enqueues the kernel; a grid without blocks does nothing.
    ///
    /// Errors: arguments that are not what the source declares, or an error of the driver.
    pub fn launch(&self, grid: Grid, args: &[Arg]) -> Result<()> {
        let Self { device, function: Function { handle, signature } } = self;
        check_arguments(signature, args)?;
        if grid.is_empty() {
            return Ok(());
        }
        device.bind()?;
        if grid.shared > PLAIN_SHARED {
            let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function belongs to a module that is never unloaded.
            let outcome = unsafe { result::function::set_function_attribute(*handle, attribute, grid.shared as i32) };
            device.check(signature.kernel, outcome)?;
        }
        let mut pointers: Vec<*mut c_void> = args.iter().map(Arg::pointer).collect();
        let [blocks, threads] = [grid.blocks, grid.threads].map(|[x, y, z]| (x, y, z));
        // SAFETY: number, order and sizes of the arguments are those of the kernel, as checked above; its pointers are
        // tensors that live until they are freed on the same stream, after this launch.
        let outcome =
            unsafe { result::launch_kernel(*handle, blocks, threads, grid.shared, device.stream, &mut pointers) };
        device.check(signature.kernel, outcome)?;
        device.launches.fetch_add(1, Ordering::Relaxed);
        if synchronous() && !device.capturing.load(Ordering::Relaxed) {
            // SAFETY: the stream lives as long as the process.
            device.check(signature.kernel, unsafe { result::stream::synchronize(device.stream) })?;
        }
        Ok(())
    }
}

/// Whether `XT_SYNC=1` asks to wait after each launch, so that an error names its kernel.
fn synchronous() -> bool {
    static SYNC: OnceLock<bool> = OnceLock::new();
    *SYNC.get_or_init(|| std::env::var("XT_SYNC").is_ok_and(|value| value == "1"))
}

impl Arg {
    /// The address of the value, for the driver.
    fn pointer(&self) -> *mut c_void {
        let pointer = match self {
            Self::Output(x) | Self::Input(x) | Self::U64(x) => std::ptr::from_ref(x).cast::<c_void>(),
            Self::I32(x) => std::ptr::from_ref(x).cast(),
            Self::U32(x) => std::ptr::from_ref(x).cast(),
            Self::I64(x) => std::ptr::from_ref(x).cast(),
            Self::F32(x) => std::ptr::from_ref(x).cast(),
            Self::F64(x) => std::ptr::from_ref(x).cast(),
            Self::Layout(x) => std::ptr::from_ref(x).cast(),
        };
        pointer.cast_mut()
    }

    fn kind(&self) -> Kind {
        match self {
            Self::Output(_) => Kind::Output,
            Self::Input(_) => Kind::Input,
            Self::I32(_) | Self::U32(_) | Self::F32(_) => Kind::Scalar { bytes: 4 },
            Self::I64(_) | Self::U64(_) | Self::F64(_) => Kind::Scalar { bytes: 8 },
            Self::Layout(layout) => Kind::Scalar { bytes: size_of_val(layout) },
        }
    }
}

/// The driver is given no number and no types of arguments: what does not fit would be read as something else.
fn check_arguments(signature: &Signature, args: &[Arg]) -> Result<()> {
    let (expected, given) = (signature.parameters.len(), args.len());
    if expected != given {
        return Err(error(format!("{}: {given} arguments, expected {expected}", signature.kernel)));
    }
    for (parameter, arg) in signature.parameters.iter().zip(args) {
        if parameter.kind != arg.kind() {
            return Err(error(format!(
                "{}: the argument `{}` is {:?}, expected {:?}",
                signature.kernel,
                parameter.name,
                arg.kind(),
                parameter.kind
            )));
        }
    }
    Ok(())
}

/// One line per library, and one per card.
pub fn describe() -> Vec<String> {
    let line = |found: &libraries::Found| match &found.state {
        Ok(place) => format!("cuda: {} found in {place}", found.what),
        Err(why) => format!("cuda: {} missing: {why}", found.what),
    };
    let mut lines: Vec<_> = libraries::find().iter().map(line).collect();
    if libraries::find().iter().all(|found| found.state.is_ok()) {
        match CudaDevice::open(0) {
            Err(why) => lines.push(why.to_string()),
            Ok(_) => {
                let devices = (0..).map_while(|ordinal| CudaDevice::open(ordinal).ok());
                lines.extend(devices.map(|device| format!("{device:?}")));
            }
        }
    }
    lines
}

fn text(why: DriverError) -> String {
    let string = |text: std::result::Result<&std::ffi::CStr, DriverError>| {
        text.map_or_else(|_| "unknown".to_string(), |text| text.to_string_lossy().into_owned())
    };
    format!("{} ({})", string(why.error_name()), string(why.error_string()))
}

fn error(message: String) -> Error {
    Error::Device { op: "cuda", message }
}
