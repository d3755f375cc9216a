//! NCCL: collective operations of processes that have a GPU each.
//!
//! The library is opened at run time, like those of CUDA. Communicators do not block: a call that NCCL has not begun
//! yet returns, and its state is asked for, so that a wait for other ranks can be given up at any time.

use std::{
    ffi::{CStr, c_char, c_void},
    ptr::null_mut,
    sync::{
        Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc::channel,
    },
    thread,
    time::Duration,
};

use cudarc::driver::sys::{CUevent_flags, CUstream};
use libloading::Library;

use super::{CudaDevice, error, libraries, timer::Event};
use crate::{Error, Result, device::gpu::Address};

/// Name of a group of ranks, which rank 0 makes and the others are told.
pub(crate) type Id = [u8; 128];

/// The oldest version with communicators that do not block.
const OLDEST: i32 = 21400;
/// Time that an aborted communicator, or one that ends, is waited for.
const LAST: Duration = Duration::from_secs(10);

// Codes of `ncclResult_t`, and types and operations of elements.
const SUCCESS: i32 = 0;
const IN_PROGRESS: i32 = 7;
const BYTE: i32 = 1;
const FLOAT: i32 = 7;
const DOUBLE: i32 = 8;
const SUM: i32 = 0;

type Handle = *mut c_void;

/// `ncclUniqueId`, which is passed by value.
#[repr(C)]
#[derive(Clone, Copy)]
struct UniqueId(Id);

/// `ncclConfig_t` of version 2.14. Later versions read no more of it than its size and take their defaults for the rest.
#[repr(C)]
struct Config {
    size: usize,
    magic: u32,
    version: u32,
    blocking: i32,
    /// Of later versions, which ignore it as the version says: undefined.
    rest: i32,
}

type Reduce = unsafe extern "C" fn(*const c_void, *mut c_void, usize, i32, i32, Handle, CUstream) -> i32;
type Of = unsafe extern "C" fn(Handle) -> i32;

/// Functions of the library.
struct Functions {
    id: unsafe extern "C" fn(*mut UniqueId) -> i32,
    error: unsafe extern "C" fn(i32) -> *const c_char,
    last_error: unsafe extern "C" fn(Handle) -> *const c_char,
    join: unsafe extern "C" fn(*mut Handle, i32, UniqueId, i32, *mut Config) -> i32,
    state: unsafe extern "C" fn(Handle, *mut i32) -> i32,
    finalize: Of,
    destroy: Of,
    abort: Of,
    all_reduce: Reduce,
    reduce_scatter: Reduce,
    all_gather: unsafe extern "C" fn(*const c_void, *mut c_void, usize, i32, Handle, CUstream) -> i32,
    broadcast: Reduce,
    send: unsafe extern "C" fn(*const c_void, usize, i32, i32, Handle, CUstream) -> i32,
    receive: unsafe extern "C" fn(*mut c_void, usize, i32, i32, Handle, CUstream) -> i32,
    begin: unsafe extern "C" fn() -> i32,
    end: unsafe extern "C" fn() -> i32,
    version: i32,
}

impl Functions {
    /// Returns the functions, or the reason why there are none.
    fn find() -> Result<&'static Self> {
        static FOUND: OnceLock<std::result::Result<Functions, String>> = OnceLock::new();
        FOUND.get_or_init(Self::load).as_ref().map_err(|why| error(why.clone()))
    }

    fn load() -> std::result::Result<Self, String> {
        let place = libraries::nccl().state.clone()?;
        let library = libraries::nccl_library().ok_or_else(|| format!("libnccl in {place} cannot be loaded"))?;
        // SAFETY: the type is that of the header.
        let version = unsafe { symbol::<unsafe extern "C" fn(*mut i32) -> i32>(library, "ncclGetVersion") }?;
        let mut number = 0;
        // SAFETY: valid for the write.
        let code = unsafe { version(&mut number) };
        if code != SUCCESS {
            return Err(format!("libnccl in {place}: ncclGetVersion returned {code}"));
        }
        if !(OLDEST..30_000).contains(&number) {
            return Err(format!(
                "libnccl in {place} is version {}, expected 2.14 or a later 2: install another NCCL, or set XT_CUDA_LIBS to \
                 its folder",
                text(number)
            ));
        }
        // SAFETY: the types are those of the header of each version since 2.14.
        unsafe {
            Ok(Self {
                id: symbol(library, "ncclGetUniqueId")?,
                error: symbol(library, "ncclGetErrorString")?,
                last_error: symbol(library, "ncclGetLastError")?,
                join: symbol(library, "ncclCommInitRankConfig")?,
                state: symbol(library, "ncclCommGetAsyncError")?,
                finalize: symbol(library, "ncclCommFinalize")?,
                destroy: symbol(library, "ncclCommDestroy")?,
                abort: symbol(library, "ncclCommAbort")?,
                all_reduce: symbol(library, "ncclAllReduce")?,
                reduce_scatter: symbol(library, "ncclReduceScatter")?,
                all_gather: symbol(library, "ncclAllGather")?,
                broadcast: symbol(library, "ncclBroadcast")?,
                send: symbol(library, "ncclSend")?,
                receive: symbol(library, "ncclRecv")?,
                begin: symbol(library, "ncclGroupStart")?,
                end: symbol(library, "ncclGroupEnd")?,
                version: number,
            })
        }
    }

    /// Returns the error of a call that returned a code.
    fn failed(&self, call: &str, code: i32, handle: Handle) -> Error {
        let read = |text: *const c_char| match text.is_null() {
            true => String::new(),
            // SAFETY: the library's own text, which ends with a zero and is read before the next call.
            false => unsafe { CStr::from_ptr(text) }.to_string_lossy().trim().to_string(),
        };
        // SAFETY: any code is allowed; the communicator is alive or null, which stands for the last one.
        let (name, more) = unsafe { (read((self.error)(code)), read((self.last_error)(handle))) };
        let more = if more.is_empty() { more } else { format!(" ({more})") };
        error(format!("{call}: {name}{more}; NCCL_DEBUG=WARN shows more"))
    }
}

/// # Safety
///
/// `F` must be the type of the function.
unsafe fn symbol<F: Copy>(library: &'static Library, name: &str) -> std::result::Result<F, String> {
    // SAFETY: the caller's part.
    let found = unsafe { library.get::<F>(name.as_bytes()) };
    found.map(|symbol| *symbol).map_err(|why| format!("libnccl lacks `{name}`: {why}"))
}

/// Writes a version as the library numbers it: 22103 is 2.21.3.
fn text(version: i32) -> String {
    let of = |thousands: i32| format!("{}.{}.{}", version / thousands, version % thousands / 100, version % 100);
    of(if version < 10_000 { 1000 } else { 10_000 })
}

/// An operation of all ranks; counts are numbers of elements.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Collective {
    /// `count` elements to `count`.
    AllReduce,
    /// `size · count` elements to `count`.
    ReduceScatter,
    /// `count` elements to `size · count`.
    AllGather,
    /// `size · count` elements to `size · count`.
    AllToAll,
    /// `count` elements of a rank to `count`.
    Broadcast(usize),
}

impl Collective {
    const fn name(self) -> &'static str {
        match self {
            Self::AllReduce => "ncclAllReduce",
            Self::ReduceScatter => "ncclReduceScatter",
            Self::AllGather => "ncclAllGather",
            Self::AllToAll => "ncclSend and ncclRecv",
            Self::Broadcast(_) => "ncclBroadcast",
        }
    }
}

/// Elements of an operation.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Element {
    Byte,
    F32,
    F64,
}

impl Element {
    const fn code_and_size(self) -> (i32, usize) {
        match self {
            Self::Byte => (BYTE, 1),
            Self::F32 => (FLOAT, 4),
            Self::F64 => (DOUBLE, 8),
        }
    }
}

/// Communicator of a device.
pub(crate) struct Comm {
    device: &'static CudaDevice,
    functions: &'static Functions,
    size: usize,
    /// `None` once it has been aborted. Threads take turns.
    handle: Mutex<Option<Owned>>,
    /// If `true`, an abort did not return: work may still be enqueued.
    stuck: AtomicBool,
}

/// Communicator of the library, which any thread may use, one at a time.
struct Owned(Handle);

// SAFETY: NCCL allows calls from any thread; those of one communicator take turns by the mutex around it.
unsafe impl Send for Owned {}

impl Comm {
    /// Returns the version of the library, and where it was found.
    pub fn version() -> Result<(i32, String)> {
        let version = Functions::find()?.version;
        let place = libraries::nccl().state.clone().unwrap_or_default();
        Ok((version, format!("NCCL {} in {place}", text(version))))
    }

    /// Writes a version as people do.
    pub fn text(version: i32) -> String {
        text(version)
    }

    /// Returns a name for a new group of ranks.
    pub fn id(device: &CudaDevice) -> Result<Id> {
        let functions = Functions::find()?;
        device.bind()?;
        let mut id = UniqueId([0; 128]);
        // SAFETY: valid for the write.
        match unsafe { (functions.id)(&mut id) } {
            SUCCESS => Ok(id.0),
            code => Err(functions.failed("ncclGetUniqueId", code, null_mut())),
        }
    }

    /// Joins the ranks of this name. `patient` is asked while others are waited for; its error ends the wait.
    pub fn join(
        device: &'static CudaDevice,
        id: Id,
        [rank, size]: [usize; 2],
        patient: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Self> {
        const CALL: &str = "ncclCommInitRankConfig";
        let functions = Functions::find()?;
        let number = |number: usize| i32::try_from(number).map_err(|_| error(format!("{CALL}: {number} ranks")));
        let _pass = device.enter_outside("joining other ranks")?;
        device.bind()?;
        let (size_of_config, version) = (size_of::<Config>(), OLDEST as u32);
        let mut config = Config { size: size_of_config, magic: 0xCAFE_BEEF, version, blocking: 0, rest: i32::MIN };
        let mut handle = null_mut();
        // SAFETY: both pointers are valid; the configuration is one of version 2.14, and the device's context is current.
        let code = unsafe { (functions.join)(&mut handle, number(size)?, UniqueId(id), number(rank)?, &mut config) };
        if handle.is_null() {
            return Err(functions.failed(CALL, code, handle));
        }
        let comm =
            Self { device, functions, size, handle: Mutex::new(Some(Owned(handle))), stuck: AtomicBool::new(false) };
        comm.settle(handle, CALL, code, patient).inspect_err(|_| comm.abort())?;
        Ok(comm)
    }

    /// Returns `true` if an abort did not return: memory of the last operation must be kept.
    pub fn is_stuck(&self) -> bool {
        self.stuck.load(Ordering::Relaxed)
    }

    /// Runs an operation after all work enqueued so far, and waits for its end. The memory must have room for the
    /// elements of all ranks, see [`Collective`].
    ///
    /// Errors: an error of NCCL or of `patient`, after which the communicator is unusable; a graph that is recorded.
    pub fn run(
        &self,
        what: Collective,
        [from, to]: [Address; 2],
        (count, element): (usize, Element),
        patient: &mut dyn FnMut() -> Result<()>,
    ) -> Result<()> {
        let handle = self.handle.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(Owned(comm)) = *handle else {
            return Err(error(format!(
                "{}: an earlier operation failed, after which ranks must start anew",
                what.name()
            )));
        };
        // A refusal, for instance while a graph is recorded, harms no other rank.
        let pass = self.device.enter_outside("an operation of several ranks")?;
        self.device.bind()?;
        let mut enqueue = || {
            let code = self.enqueue(what, comm, [from, to], count, element);
            self.settle(comm, what.name(), code, patient)?;
            let end = Event::new(self.device, CUevent_flags::CU_EVENT_DISABLE_TIMING)?;
            end.record(self.device)?;
            self.wait(|| Ok(self.state(comm, what.name())? && end.is_reached(self.device)?), patient)
        };
        let result = enqueue();
        drop((pass, handle));
        result.inspect_err(|_| self.abort())
    }

    fn enqueue(&self, what: Collective, comm: Handle, [from, to]: [Address; 2], count: usize, element: Element) -> i32 {
        let (code, size) = element.code_and_size();
        let (from, to) = (from.get() as *const c_void, to.get() as *mut c_void);
        let (f, stream) = (self.functions, self.device.stream.0);
        // SAFETY: the communicator and the stream are alive. The memory belongs to the device and has as many elements,
        // by the caller, who keeps it until the operation has ended or was aborted; then it is freed on this stream.
        unsafe {
            match what {
                Collective::AllReduce => (f.all_reduce)(from, to, count, code, SUM, comm, stream),
                Collective::ReduceScatter => (f.reduce_scatter)(from, to, count, code, SUM, comm, stream),
                Collective::AllGather => (f.all_gather)(from, to, count, code, comm, stream),
                Collective::Broadcast(root) => (f.broadcast)(from, to, count, code, root as i32, comm, stream),
                Collective::AllToAll => {
                    let mut first = (f.begin)();
                    for rank in 0..self.size {
                        let at = rank * count * size;
                        let sent = (f.send)(from.byte_add(at), count, code, rank as i32, comm, stream);
                        let received = (f.receive)(to.byte_add(at), count, code, rank as i32, comm, stream);
                        // Within a group, calls that were only noted say that they succeeded or are in progress.
                        let failed = [sent, received].into_iter().find(|code| ![SUCCESS, IN_PROGRESS].contains(code));
                        first = if first == SUCCESS { failed.unwrap_or(SUCCESS) } else { first };
                    }
                    let ended = (f.end)();
                    if first == SUCCESS { ended } else { first }
                }
            }
        }
    }

    /// Waits until NCCL has begun what a call asked for.
    fn settle(&self, comm: Handle, call: &str, code: i32, patient: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        match code {
            SUCCESS | IN_PROGRESS => self.wait(|| self.state(comm, call), patient),
            code => Err(self.functions.failed(call, code, comm)),
        }
    }

    /// Returns `false` while NCCL is still busy with a call.
    fn state(&self, comm: Handle, call: &str) -> Result<bool> {
        let mut state = SUCCESS;
        // SAFETY: the communicator is alive; valid for the write.
        let code = unsafe { (self.functions.state)(comm, &mut state) };
        match if code == SUCCESS { state } else { code } {
            SUCCESS => Ok(true),
            IN_PROGRESS => Ok(false),
            code => Err(self.functions.failed(call, code, comm)),
        }
    }

    /// Asks at first all the time, for operations of a few microseconds, and later about a thousand times a second.
    fn wait(&self, mut ready: impl FnMut() -> Result<bool>, patient: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        let mut looks = 0u64;
        while !ready()? {
            patient()?;
            match looks {
                0..100 => std::hint::spin_loop(),
                _ => thread::sleep(Duration::from_micros((looks - 99).min(1000))),
            }
            looks += 1;
        }
        Ok(())
    }

    /// Ends the communicator with all of its work.
    fn abort(&self) {
        let Some(owned) = self.handle.lock().unwrap_or_else(PoisonError::into_inner).take() else { return };
        let (abort, device) = (self.functions.abort, self.device);
        let (done, ended) = channel();
        let work = move || {
            let Owned(comm) = { owned };
            // An error leaves nothing to do.
            let _ = device.bind();
            // SAFETY: alive until now, and not used again.
            unsafe { abort(comm) };
            let _ = done.send(());
        };
        let ended =
            thread::Builder::new().name("xt-abort".to_string()).spawn(work).is_ok() && ended.recv_timeout(LAST).is_ok();
        self.stuck.store(!ended, Ordering::Relaxed);
    }
}

impl Drop for Comm {
    /// Leaves the other ranks. They may be gone: what does not end soon is aborted.
    fn drop(&mut self) {
        let mut handle = self.handle.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(Owned(comm)) = *handle else { return };
        let begin = std::time::Instant::now();
        let mut patient = || match begin.elapsed() < LAST {
            true => Ok(()),
            false => Err(error("other ranks do not end".to_string())),
        };
        let _ = self.device.bind();
        // SAFETY: alive; no operation is in progress, as each is waited for.
        let code = unsafe { (self.functions.finalize)(comm) };
        if self.settle(comm, "ncclCommFinalize", code, &mut patient).is_ok() {
            *handle = None;
            // SAFETY: finalized, and not used again.
            unsafe { (self.functions.destroy)(comm) };
        } else {
            drop(handle);
            self.abort();
        }
    }
}
