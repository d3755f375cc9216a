//! Compiles kernels with NVRTC and caches their machine code on disk.
//!
//! Code from the cache runs on the GPU, with access to everything that this process has there. A file's hash (FNV-1a)
//! detects damage and other versions, but not who wrote the file. The cache is trusted because its folder and files
//! belong to this user or to root and nobody else may write to them. Otherwise it is neither read nor written.

use std::{
    env,
    ffi::{CString, c_char},
    fs,
    io::{self, Read},
    path::{Path, PathBuf},
};

use cudarc::nvrtc::{result, sys};

use permissions::{is_open, owner_of, writers_of};

use super::{
    libraries,
    target::{Architecture, Target},
};
use crate::{Error, Result, atomic_file::write_atomically, device::kernels::KernelSource, hash::fnv1a, sort::sort};

/// Output of NVRTC for one variant.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Compiled {
    /// Machine code (CUBIN) or null-terminated PTX, depending on the target.
    pub code: Vec<u8>,
    /// Compiler log: warnings, and with `verbose` of [`compile`] the registers and memory of each kernel.
    pub log: String,
}

/// Compiles one variant. Needs NVRTC but no GPU.
///
/// If `verbose`, the log includes the registers and memory that each kernel uses.
///
/// Errors: [`ErrorKind::Device`](crate::ErrorKind::Device) without NVRTC, or with the compiler's log.
pub fn compile(source: &KernelSource, options: &[(&str, &str)], target: Target, verbose: bool) -> Result<Compiled> {
    libraries::nvrtc().state.as_ref().map_err(|why| error(format!("NVRTC: {why}")))?;
    let definitions = options.iter().map(|(name, value)| format!("-D{name}={value}"));
    // Older versions treat generic lambdas as host functions by default.
    let mut arguments = vec![format!("--gpu-architecture={target}"), "--std=c++17".into(), "-default-device".into()];
    arguments.extend(definitions);
    if verbose {
        arguments.push("--ptxas-options=-v".into());
    }
    let name = CString::new(format!("{}.cu", source.name)).map_err(|why| error(why.to_string()))?;
    let text = CString::new(source.source).map_err(|why| error(why.to_string()))?;
    if let Some(bad) = arguments.iter().find(|argument| argument.contains('\0')) {
        return Err(error(format!("option {bad:?} contains a NUL byte")));
    }
    let program = Program(result::create_program(&text, Some(&name)).map_err(|why| error(format!("NVRTC: {why:?}")))?);
    // SAFETY: the program lives until the end of this function, and so do its text and name.
    let outcome = unsafe { result::compile_program(program.0, &arguments) };
    // SAFETY: as above.
    let log = unsafe { result::get_program_log(program.0) }.unwrap_or_default();
    let log: Vec<u8> = log.into_iter().map(|c| c as u8).take_while(|&c| c != 0).collect();
    let log = String::from_utf8_lossy(&log).trim().to_string();
    outcome.map_err(|why| error(format!("{}.cu {arguments:?}: {why:?}\n{log}", source.name)))?;
    let (size_of, copy): (SizeOf, Copy) = match target.is_ptx() {
        false => (sys::nvrtcGetCUBINSize, sys::nvrtcGetCUBIN),
        true => (sys::nvrtcGetPTXSize, sys::nvrtcGetPTX),
    };
    let mut size = 0;
    // SAFETY: `size` is valid for the write.
    unsafe { size_of(program.0, &mut size) }.result().map_err(|why| error(format!("NVRTC: {why:?}")))?;
    let mut code = vec![0u8; size];
    // SAFETY: `code` has the size that NVRTC asked for.
    let got = unsafe { copy(program.0, code.as_mut_ptr().cast()) };
    got.result().map_err(|why| error(format!("NVRTC: {why:?}")))?;
    Ok(Compiled { code, log })
}

type SizeOf = unsafe fn(sys::nvrtcProgram, *mut usize) -> sys::nvrtcResult;
type Copy = unsafe fn(sys::nvrtcProgram, *mut c_char) -> sys::nvrtcResult;

struct Program(sys::nvrtcProgram);

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: created by NVRTC, and not used again. An error here leaves nothing to do.
        let _ = unsafe { result::destroy_program(self.0) };
    }
}

/// Returns the major and minor version of NVRTC.
pub fn nvrtc_version() -> Result<(i32, i32)> {
    libraries::nvrtc().state.as_ref().map_err(|why| error(format!("NVRTC: {why}")))?;
    let (mut major, mut minor) = (0, 0);
    // SAFETY: both are valid for the write, and the symbol was found.
    unsafe { sys::nvrtcVersion(&mut major, &mut minor) }.result().map_err(|why| error(format!("NVRTC: {why:?}")))?;
    Ok((major, minor))
}

/// Compute capabilities that NVRTC compiles for, in ascending order.
pub(super) fn supported_architectures() -> Result<Vec<Architecture>> {
    libraries::nvrtc().state.as_ref().map_err(|why| error(format!("NVRTC: {why}")))?;
    let fail = |why| error(format!("NVRTC: {why:?}"));
    let mut count = 0;
    // SAFETY: valid for the write, and the symbol was found.
    unsafe { sys::nvrtcGetNumSupportedArchs(&mut count) }.result().map_err(fail)?;
    let mut known = vec![0; count.max(0) as usize];
    // SAFETY: there is room for the number that NVRTC gave, and the symbol was found.
    unsafe { sys::nvrtcGetSupportedArchs(known.as_mut_ptr()) }.result().map_err(fail)?;
    let mut known: Vec<_> = known.into_iter().filter_map(|known| Architecture::try_from(known).ok()).collect();
    known.sort_unstable();
    Ok(known)
}

/// Returns the code of a variant: from the cache on disk, or compiled and stored there.
///
/// Errors: those of [`compile`]. Failing to write the cache is not an error.
pub fn cubin(source: &KernelSource, options: &[(&str, &str)], target: Target) -> Result<Vec<u8>> {
    match folder() {
        Some(folder) => cubin_in(&folder, source, options, target).map(|cached| cached.code),
        None => compile(source, options, target, false).map(|compiled| compiled.code),
    }
}

/// Code of a variant, from a cache folder or freshly compiled.
#[derive(Debug)]
#[non_exhaustive]
pub struct Cached {
    /// Machine code, or PTX.
    pub code: Vec<u8>,
    /// If `true`, the code was in the cache; otherwise it was compiled now.
    pub found: bool,
    /// Error of writing the code to the cache, if any.
    pub unwritten: Option<Error>,
}

/// Returns the code of a variant, from a cache in this folder, which is created if necessary. Damaged or untrusted
/// files are replaced.
///
/// Errors: those of [`compile`].
pub fn cubin_in(folder: &Path, source: &KernelSource, options: &[(&str, &str)], target: Target) -> Result<Cached> {
    let trusted = trusted(folder);
    let key = Key::new(source, options, target)?;
    let path = folder.join(&key.file);
    let kept = trusted.as_ref().ok().and_then(|()| read_own(folder, &path)).and_then(|bytes| key.code(&bytes));
    if let Some(code) = kept {
        return Ok(Cached { code, found: true, unwritten: None });
    }
    let code = compile(source, options, target, false)?.code;
    let written = trusted.and_then(|()| create(folder).map_err(|why| Error::io(folder, why))).and_then(|()| {
        write_atomically(&path, |file| {
            file.write_all(&key.header(&code))?;
            file.write_all(&code)
        })
    });
    Ok(Cached { code, found: false, unwritten: written.err() })
}

/// Creates a folder that only this user may enter, and its parents.
fn create(folder: &Path) -> io::Result<()> {
    let mut builder = fs::DirBuilder::new();
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.recursive(true).create(folder)
}

/// Checks that only this user and root may write to a cache, if it exists.
///
/// Errors: names who else may, and the remedy.
pub(super) fn trusted(folder: &Path) -> Result<()> {
    let why = fs::metadata(folder).ok().and_then(|found| owner_of(&found).or_else(|| writers_of(&found)));
    why.map_or(Ok(()), |why| {
        Err(error(format!(
            "the kernel cache {} {why}, so its code, which would run on the GPU with this process's data, is neither \
             read nor written; `chmod 700` it or set XT_KERNEL_CACHE to a folder of your own",
            folder.display()
        )))
    })
}

/// Returns the bytes of a file in a trusted folder, unless another user owns it or may write to it.
fn read_own(folder: &Path, path: &Path) -> Option<Vec<u8>> {
    let mut file = fs::File::open(path).ok()?;
    // Metadata of the opened file, even if its path now names another one.
    let found = file.metadata().ok()?;
    let reachable = fs::metadata(folder).is_ok_and(|folder| is_open(&folder));
    if owner_of(&found).is_some() || reachable && writers_of(&found).is_some() {
        return None;
    }
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).ok()?;
    Some(bytes)
}

/// Ownership and permissions on Unix.
#[cfg(unix)]
mod permissions {
    use std::{fs::Metadata, os::unix::fs::MetadataExt};

    /// Describes the owner, unless it is this user or root.
    pub fn owner_of(found: &Metadata) -> Option<String> {
        unsafe extern "C" {
            safe fn geteuid() -> u32;
        }
        let (owner, user) = (found.uid(), geteuid());
        (owner != 0 && owner != user).then(|| format!("belongs to user {owner}, not to user {user}"))
    }

    /// Describes the mode if users other than the owner may write.
    pub fn writers_of(found: &Metadata) -> Option<String> {
        (found.mode() & 0o022 != 0).then(|| format!("is writable by others (mode {:o})", found.mode() & 0o777))
    }

    /// Returns `true` if other users may open the files of a folder.
    pub fn is_open(folder: &Metadata) -> bool {
        folder.mode() & 0o011 != 0
    }
}

/// On other systems, a user's cache folder is private to the user.
#[cfg(not(unix))]
mod permissions {
    use std::fs::Metadata;

    pub fn owner_of(_: &Metadata) -> Option<String> {
        None
    }

    pub fn writers_of(_: &Metadata) -> Option<String> {
        None
    }

    pub fn is_open(_: &Metadata) -> bool {
        false
    }
}

/// Returns the folder of the cache: `XT_KERNEL_CACHE` (`off` for none), else `x-transformers/kernels` in the user's
/// cache folder. It is created with mode 700, and used only if no one but this user and root may write to it.
pub fn folder() -> Option<PathBuf> {
    match env::var_os("XT_KERNEL_CACHE") {
        Some(off) if off == "off" => None,
        Some(folder) if !folder.is_empty() => Some(PathBuf::from(folder)),
        _ => {
            let absolute = |name: &str| env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
            let cache = absolute("XDG_CACHE_HOME")
                .or_else(|| absolute("LOCALAPPDATA"))
                .or_else(|| absolute("HOME").map(|home| home.join(".cache")));
            cache.map(|cache| cache.join("x-transformers/kernels"))
        }
    }
}

/// Returns name and hash of a cache file, from everything that its code depends on.
struct Key {
    file: String,
    hash: u64,
}

/// Magic number of cache files, with the version of their format.
const MAGIC: &[u8; 8] = b"xtcubin1";
const HEADER: usize = 32;

impl Key {
    fn new(source: &KernelSource, options: &[(&str, &str)], target: Target) -> Result<Self> {
        let (major, minor) = nvrtc_version()?;
        let mut options: Vec<String> = options.iter().map(|(name, value)| format!("{name}={value}")).collect();
        sort(&mut options);
        let text = format!("{:016x} {options:?} {target} NVRTC {major}.{minor}", source.hash);
        let hash = fnv1a(text.as_bytes());
        let form = if target.is_ptx() { "ptx" } else { "cubin" };
        Ok(Self { file: format!("{}-{target}-{hash:016x}.{form}", source.name), hash })
    }

    /// Magic, key, length and hash of the code, 8 bytes each.
    fn header(&self, code: &[u8]) -> [u8; HEADER] {
        let mut header = [0; HEADER];
        header[..8].copy_from_slice(MAGIC);
        header[8..16].copy_from_slice(&self.hash.to_le_bytes());
        header[16..24].copy_from_slice(&(code.len() as u64).to_le_bytes());
        header[24..].copy_from_slice(&fnv1a(code).to_le_bytes());
        header
    }

    /// Returns the code in a file, if the file is intact and has this key.
    fn code(&self, bytes: &[u8]) -> Option<Vec<u8>> {
        let (header, code) = bytes.split_at_checked(HEADER)?;
        (*header == self.header(code)).then(|| code.to_vec())
    }
}

fn error(message: String) -> Error {
    Error::device("kernels", message)
}
