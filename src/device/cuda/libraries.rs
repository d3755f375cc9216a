//! Search for the driver, NVRTC, cuBLAS and NCCL.
//!
//! cudarc panics in calls to missing libraries or symbols. So it is not called before all three libraries have been
//! opened and every symbol in use has been looked up.
//!
//! Loading a library runs its code, so none is ever loaded from the working folder, to which anyone may have written.
//! Empty and relative entries of the environment mean that folder. They are skipped in `CUDA_HOME`, `CUDA_PATH`,
//! `VIRTUAL_ENV`, `CONDA_PREFIX`, `HOME` and `PATH`, and are an error in `XT_CUDA_LIBS`, this library's own variable.
//! `LD_LIBRARY_PATH` belongs to the dynamic loader: if such an entry leads to a CUDA library, nothing is loaded at all.

use std::{
    env,
    ffi::{OsStr, OsString},
    fs,
    path::{Path, PathBuf},
    sync::OnceLock,
};

use cudarc::{cublas, cublaslt, driver, nvrtc};
use libloading::Library;

use crate::sort::sort;

/// One of the libraries.
struct Wanted {
    what: &'static str,
    /// Name without the prefix `lib` and the suffix.
    name: &'static str,
    /// Advice on installing it.
    hint: &'static str,
    symbols: &'static [&'static str],
    is_present: unsafe fn() -> bool,
    opened: unsafe fn() -> Option<&'static Library>,
}

/// Functions of the driver that this crate and cudarc call.
const DRIVER: &[&str] = &[
    "cuInit",
    "cuDriverGetVersion",
    "cuDeviceGet",
    "cuDeviceGetCount",
    "cuDeviceGetAttribute",
    "cuDeviceGetName",
    "cuDevicePrimaryCtxRetain",
    "cuDevicePrimaryCtxRelease_v2",
    "cuCtxGetCurrent",
    "cuCtxSetCurrent",
    "cuMemAlloc_v2",
    "cuMemFree_v2",
    "cuMemHostAlloc",
    "cuMemFreeHost",
    "cuMemGetInfo_v2",
    "cuMemcpyHtoDAsync_v2",
    "cuMemcpyDtoHAsync_v2",
    "cuMemcpyDtoDAsync_v2",
    "cuMemsetD8Async",
    "cuModuleLoadData",
    "cuModuleGetFunction",
    "cuModuleUnload",
    "cuFuncSetAttribute",
    "cuLaunchKernel",
    "cuStreamCreate",
    "cuStreamDestroy_v2",
    "cuStreamSynchronize",
    "cuStreamBeginCapture_v2",
    "cuStreamEndCapture",
    "cuGraphInstantiateWithFlags",
    "cuGraphLaunch",
    "cuGraphExecDestroy",
    "cuGraphDestroy",
    "cuEventCreate",
    "cuEventRecord",
    "cuEventSynchronize",
    "cuEventQuery",
    "cuEventDestroy_v2",
    "cuGetErrorName",
    "cuGetErrorString",
];
const NVRTC: &[&str] = &[
    "nvrtcVersion",
    "nvrtcGetNumSupportedArchs",
    "nvrtcGetSupportedArchs",
    "nvrtcCreateProgram",
    "nvrtcCompileProgram",
    "nvrtcGetCUBINSize",
    "nvrtcGetCUBIN",
    "nvrtcGetPTXSize",
    "nvrtcGetPTX",
    "nvrtcGetProgramLogSize",
    "nvrtcGetProgramLog",
    "nvrtcDestroyProgram",
];
const CUBLAS: &[&str] = &[
    "cublasCreate_v2",
    "cublasDestroy_v2",
    "cublasSetStream_v2",
    "cublasSetWorkspace_v2",
    "cublasSetMathMode",
    "cublasGemmStridedBatchedEx",
];

/// Part of every installation of cuBLAS, but optional: without it, products have no epilogues.
const CUBLASLT: Wanted = Wanted {
    what: "cuBLASLt",
    name: "cublasLt",
    hint: "it is part of cuBLAS",
    symbols: &[
        "cublasLtCreate",
        "cublasLtDestroy",
        "cublasLtMatrixLayoutCreate",
        "cublasLtMatrixLayoutDestroy",
        "cublasLtMatmulDescCreate",
        "cublasLtMatmulDescSetAttribute",
        "cublasLtMatmulDescDestroy",
        "cublasLtMatmulPreferenceCreate",
        "cublasLtMatmulPreferenceSetAttribute",
        "cublasLtMatmulPreferenceDestroy",
        "cublasLtMatmulAlgoGetHeuristic",
        "cublasLtMatmul",
    ],
    is_present: cublaslt::sys::is_culib_present,
    // SAFETY: called once the library is known to be present, so that it does not panic.
    opened: || Some(unsafe { cublaslt::sys::culib() }),
};

const WANTED: [Wanted; 3] = [
    Wanted {
        what: "driver",
        name: "cuda",
        hint: "install the NVIDIA driver, version 525 or later for CUDA 12, 580 or later for CUDA 13",
        symbols: DRIVER,
        is_present: driver::sys::is_culib_present,
        // SAFETY: called once the library is known to be present, so that it does not panic.
        opened: || Some(unsafe { driver::sys::culib() }),
    },
    Wanted {
        what: "NVRTC",
        name: "nvrtc",
        hint: "install the CUDA toolkit 12 or 13, or `pip install nvidia-cuda-nvrtc` (nvidia-cuda-nvrtc-cu12 for drivers \
               before 580)",
        symbols: NVRTC,
        is_present: nvrtc::sys::is_culib_present,
        // SAFETY: called once the library is known to be present, so that it does not panic.
        opened: || Some(unsafe { nvrtc::sys::culib() }),
    },
    Wanted {
        what: "cuBLAS",
        name: "cublas",
        hint: "install the CUDA toolkit 12 or 13, or `pip install nvidia-cublas` (nvidia-cublas-cu12 for drivers before \
               580)",
        symbols: CUBLAS,
        is_present: cublas::sys::is_culib_present,
        // SAFETY: called once the library is known to be present, so that it does not panic.
        opened: || Some(unsafe { cublas::sys::culib() }),
    },
];

/// Needed by several processes only.
const NCCL: Wanted = Wanted {
    what: "NCCL",
    name: "nccl",
    hint: "install NCCL 2.14 or later, for instance by `pip install nvidia-nccl-cu13` (nvidia-nccl-cu12 for CUDA 12)",
    symbols: &[
        "ncclGetVersion",
        "ncclGetUniqueId",
        "ncclGetErrorString",
        "ncclGetLastError",
        "ncclCommInitRankConfig",
        "ncclCommGetAsyncError",
        "ncclCommFinalize",
        "ncclCommDestroy",
        "ncclCommAbort",
        "ncclAllReduce",
        "ncclReduceScatter",
        "ncclAllGather",
        "ncclBroadcast",
        "ncclSend",
        "ncclRecv",
        "ncclGroupStart",
        "ncclGroupEnd",
    ],
    is_present: || nccl_library().is_some(),
    opened: || nccl_library(),
};

/// Result of the search for one library.
#[derive(Clone, Debug)]
pub struct Found {
    /// `driver`, `NVRTC`, `cuBLAS` or `NCCL`.
    pub what: &'static str,
    /// Its location, or the reason why it cannot be used and the remedy.
    pub state: Result<String, String>,
}

/// Searches for the three libraries, once per process: in `XT_CUDA_LIBS`, in `CUDA_HOME` and `CUDA_PATH`, in the
/// system's search path, and in the folders of Python's NVIDIA packages.
pub fn find() -> &'static [Found; 3] {
    static FOUND: OnceLock<[Found; 3]> = OnceLock::new();
    FOUND.get_or_init(|| WANTED.each_ref().map(|wanted| Found { what: wanted.what, state: wanted.find() }))
}

/// Returns the result for NVRTC, which suffices to compile kernels without a GPU.
pub fn nvrtc() -> &'static Found {
    &find()[1]
}

/// Returns `true` if cuBLASLt can be used.
pub fn has_cublaslt() -> bool {
    static FOUND: OnceLock<bool> = OnceLock::new();
    *FOUND.get_or_init(|| CUBLASLT.find().is_ok())
}

/// Searches for NCCL, once per process, in the folders of [`find`].
pub fn nccl() -> &'static Found {
    static FOUND: OnceLock<Found> = OnceLock::new();
    FOUND.get_or_init(|| Found { what: NCCL.what, state: NCCL.find() })
}

/// Returns NCCL if it is open already or the dynamic loader finds it. To be called after [`nccl`] has found it.
pub fn nccl_library() -> Option<&'static Library> {
    static OPENED: OnceLock<Library> = OnceLock::new();
    if OPENED.get().is_none() {
        // SAFETY: opens a library by the names that it is installed under; its initialisers are NVIDIA's.
        let opened = ["libnccl.so.2", "libnccl.so"].iter().find_map(|name| unsafe { Library::new(*name) }.ok())?;
        return Some(OPENED.get_or_init(|| opened));
    }
    OPENED.get()
}

/// Returns `cuEventElapsedTime` of the driver: the second version from CUDA 12.8 on (driver 570), else the first.
///
/// Errors: the driver has neither.
pub fn elapsed_time() -> Result<ElapsedTime, String> {
    find()[0].state.clone()?;
    // SAFETY: it is present, so that the call does not panic.
    let library = unsafe { driver::sys::culib() };
    let symbol = ["cuEventElapsedTime_v2", "cuEventElapsedTime"].iter().find_map(|name| {
        // SAFETY: both have this type.
        unsafe { library.get::<ElapsedTime>(name.as_bytes()) }.ok()
    });
    symbol.map(|symbol| *symbol).ok_or_else(|| "libcuda has no `cuEventElapsedTime`".into())
}

/// Type of `cuEventElapsedTime`.
pub type ElapsedTime =
    unsafe extern "C" fn(*mut f32, driver::sys::CUevent, driver::sys::CUevent) -> driver::sys::CUresult;

impl Wanted {
    fn find(&self) -> Result<String, String> {
        let (before, after) = folders()?;
        refuse_foreign(env::var_os("LD_LIBRARY_PATH").as_deref())?;
        let mut place = before.iter().find_map(|folder| self.open(folder));
        // SAFETY: opens a library by the names that it is installed under; its initialisers are NVIDIA's.
        if place.is_none() && unsafe { (self.is_present)() } {
            place = Some("the system's libraries".into());
        }
        let place = place.or_else(|| after.iter().find_map(|folder| self.open(folder)));
        let Some(place) = place else {
            let looked: Vec<_> = before.iter().chain(&after).map(|folder| folder.display().to_string()).collect();
            let folders = if looked.is_empty() { String::new() } else { format!(" and in {}", looked.join(", ")) };
            return Err(format!(
                "lib{} was not found among the system's libraries{folders}; {}, or set XT_CUDA_LIBS to its folder",
                self.name, self.hint
            ));
        };
        // SAFETY: as above.
        if !unsafe { (self.is_present)() } {
            return Err(format!("lib{} in {place} cannot be loaded; {}", self.name, self.hint));
        }
        // SAFETY: it is present, so that the call does not panic.
        let library = unsafe { (self.opened)() };
        let missing = self.symbols.iter().find(|symbol| {
            // SAFETY: the symbol is only looked up, never called through this type.
            library.is_none_or(|library| unsafe { library.get::<unsafe extern "C" fn()>(symbol.as_bytes()) }.is_err())
        });
        match missing {
            Some(symbol) => Err(format!("lib{} in {place} is too old: it lacks `{symbol}`; {}", self.name, self.hint)),
            None => Ok(place),
        }
    }

    /// Opens the library in this folder and never closes it, so that a later lookup by its bare name finds it.
    fn open(&self, folder: &Path) -> Option<String> {
        let opened = files_of(folder, self.name).iter().any(|path| open_for_good(path));
        if opened && self.name == "nvrtc" {
            // NVRTC opens this library by its bare name at the first compilation. Version 13.0 from PyPI lacks a run
            // path to its own folder, but a library that is already open is found.
            files_of(folder, "nvrtc-builtins").iter().any(|path| open_for_good(path));
        }
        opened.then(|| folder.display().to_string())
    }
}

/// Returns the files of a folder with the name of a library and any version, sorted.
fn files_of(folder: &Path, library: &str) -> Vec<PathBuf> {
    let prefix = format!("{}{library}{}", env::consts::DLL_PREFIX, env::consts::DLL_SUFFIX);
    let windows = format!("{library}64_");
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
    names.retain(|path| {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        name == prefix
            || name.strip_prefix(&prefix).is_some_and(|version| version.starts_with('.'))
            || cfg!(windows) && name.starts_with(&windows)
    });
    sort(&mut names);
    names
}

#[cfg(unix)]
fn open_for_good(path: &Path) -> bool {
    use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
    // SAFETY: the initialisers are those of a library of NVIDIA, or of what the user put in its place.
    let library = unsafe { Library::open(Some(path), RTLD_NOW | RTLD_GLOBAL) };
    library.map(std::mem::forget).is_ok()
}

#[cfg(not(unix))]
fn open_for_good(path: &Path) -> bool {
    // SAFETY: the initialisers are those of a library of NVIDIA, or of what the user put in its place.
    unsafe { Library::new(path) }.map(std::mem::forget).is_ok()
}

/// Returns the existing folders to search before the system's, and after them.
///
/// Errors: a relative path in `XT_CUDA_LIBS`.
fn folders() -> Result<(Vec<PathBuf>, Vec<PathBuf>), String> {
    let named = paths_of("XT_CUDA_LIBS");
    if let Some(relative) = named.iter().find(|folder| !folder.as_os_str().is_empty() && !folder.is_absolute()) {
        return Err(format!(
            "XT_CUDA_LIBS contains the relative path `{}`, which depends on the working folder; use an absolute path",
            relative.display()
        ));
    }
    let toolkits = absolute(["CUDA_HOME", "CUDA_PATH"]);
    let toolkits = toolkits.flat_map(|home| ["lib64", "lib", "bin"].map(|folder| home.join(folder)));
    let before = named.into_iter().filter(|folder| folder.is_absolute()).chain(toolkits);
    let after = [PathBuf::from("/usr/local/cuda/lib64")].into_iter().chain(python_folders());
    Ok((existing(before), existing(after)))
}

/// Returns the entries of a variable that lists folders.
fn paths_of(name: &str) -> Vec<PathBuf> {
    env::var_os(name).map(|folders| env::split_paths(&folders).collect()).unwrap_or_default()
}

/// Returns the folders in these variables, without those relative to the working folder.
fn absolute<const N: usize>(names: [&'static str; N]) -> impl Iterator<Item = PathBuf> {
    names.into_iter().filter_map(env::var_os).map(PathBuf::from).filter(|folder| folder.is_absolute())
}

/// Checks the search path of the dynamic loader.
///
/// Errors: the loader would take a CUDA library from the working folder, because `search` (`LD_LIBRARY_PATH`) has an
/// empty or relative entry.
fn refuse_foreign(search: Option<&OsStr>) -> Result<(), String> {
    // To the loader, an empty value is unset, but an empty entry is the working folder.
    let Some(search) = search.filter(|search| cfg!(unix) && !search.is_empty()) else { return Ok(()) };
    let relative: Vec<_> = split_search(search).into_iter().filter(|folder| !folder.is_absolute()).collect();
    for folder in relative {
        let folder = Path::new(".").join(folder);
        for folder in std::iter::once(folder.clone()).chain(subfolders(&folder.join("glibc-hwcaps"))) {
            let names = fs::read_dir(&folder).into_iter().flatten().flatten().map(|entry| entry.file_name());
            let cuda = |name: &OsString| {
                let name = name.to_string_lossy();
                let rest = name.strip_prefix(env::consts::DLL_PREFIX).unwrap_or_default();
                ["cuda", "nvcuda", "nvrtc", "cublas", "nccl"].iter().any(|library| rest.starts_with(library))
            };
            if let Some(name) = names.into_iter().find(cuda) {
                return Err(format!(
                    "{} is in the working folder and would be loaded from there, because LD_LIBRARY_PATH has an empty \
                     or relative entry; remove that entry (`export LD_LIBRARY_PATH=$LD_LIBRARY_PATH:…` adds an empty \
                     one if nothing was set)",
                    folder.join(name).display()
                ));
            }
        }
    }
    Ok(())
}

/// Returns the entries of a search path of the dynamic loader, which also accepts semicolons.
fn split_search(search: &OsStr) -> Vec<PathBuf> {
    search.as_encoded_bytes().split(|byte| matches!(byte, b':' | b';')).map(to_path).collect()
}

#[cfg(unix)]
fn to_path(bytes: &[u8]) -> PathBuf {
    PathBuf::from(<OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(bytes))
}

#[cfg(not(unix))]
fn to_path(bytes: &[u8]) -> PathBuf {
    PathBuf::from(String::from_utf8_lossy(bytes).into_owned())
}

fn existing(folders: impl Iterator<Item = PathBuf>) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = Vec::new();
    for folder in folders {
        if folder.is_dir() && !found.contains(&folder) {
            found.push(folder);
        }
    }
    found
}

/// Returns `site-packages/nvidia/*/lib` of the active virtual environment, of every Python on `PATH`, and of the user.
fn python_folders() -> Vec<PathBuf> {
    let environments = absolute(["VIRTUAL_ENV", "CONDA_PREFIX"]);
    let on_path = paths_of("PATH").into_iter().filter(|bin| bin.is_absolute());
    let prefixes = on_path.filter_map(|bin| bin.parent().map(Path::to_path_buf));
    let user = absolute(["HOME"]).map(|home| home.join(".local"));
    let mut folders = Vec::new();
    for prefix in environments.chain(prefixes).chain(user) {
        for python in subfolders(&prefix.join("lib")) {
            for packages in ["site-packages", "dist-packages"] {
                folders
                    .extend(subfolders(&python.join(packages).join("nvidia")).into_iter().map(|dir| dir.join("lib")));
            }
        }
    }
    folders
}

fn subfolders(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut folders: Vec<PathBuf> = entries.map(|entry| entry.path()).filter(|path| path.is_dir()).collect();
    sort(&mut folders);
    // Newest first: cu13 before the folders of older packages.
    folders.reverse();
    folders
}
