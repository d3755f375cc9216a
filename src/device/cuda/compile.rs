//! Kernels from source to machine code by NVRTC, kept on disk.
//!
//! Code is made for the present card (CUBIN and not PTX), so that a driver never meets code newer than itself.

use std::{
    env,
    ffi::CString,
    fs,
    path::{Path, PathBuf},
};

use cudarc::nvrtc::{result, sys};

use super::libraries;
use crate::{Error, Result, core::fnv1a, device::kernels::KernelSource, io::write_atomically};

/// A card's architecture: 80 for `sm_80`.
pub type Architecture = u32;

/// What NVRTC made of a variant.
#[derive(Clone, Debug)]
pub struct Compiled {
    /// Machine code.
    pub cubin: Vec<u8>,
    /// What the compiler said: warnings, and with [`compile`]'s `verbose` the registers and memory of each kernel.
    pub log: String,
}

/// Compiles one variant. Needs NVRTC but no GPU.
///
/// `verbose` asks for the use of registers and memory in the log.
///
/// Errors: [`Error::Device`] without NVRTC, or with the compiler's log.
pub fn compile(
    source: &KernelSource,
    options: &[(&str, &str)],
    architecture: Architecture,
    verbose: bool,
) -> Result<Compiled> {
    libraries::nvrtc().state.as_ref().map_err(|why| error(format!("NVRTC: {why}")))?;
    let definitions = options.iter().map(|(name, value)| format!("-D{name}={value}"));
    // Older versions take generic lambdas for functions of the host unless told otherwise.
    let mut arguments =
        vec![format!("--gpu-architecture=sm_{architecture}"), "--std=c++17".into(), "-default-device".into()];
    arguments.extend(definitions);
    if verbose {
        arguments.push("--ptxas-options=-v".into());
    }
    let name = CString::new(format!("{}.cu", source.name)).map_err(|why| error(why.to_string()))?;
    let text = CString::new(source.source).map_err(|why| error(why.to_string()))?;
    if let Some(bad) = arguments.iter().find(|argument| argument.contains('\0')) {
        return Err(error(format!("the option {bad:?} contains a zero byte")));
    }
    let program = Program(result::create_program(&text, Some(&name)).map_err(|why| error(format!("NVRTC: {why:?}")))?);
    // SAFETY: the program lives until the end of this function, and so do its text and name.
    let outcome = unsafe { result::compile_program(program.0, &arguments) };
    // SAFETY: as above.
    let log = unsafe { result::get_program_log(program.0) }.unwrap_or_default();
    let log: Vec<u8> = log.into_iter().map(|c| c as u8).take_while(|&c| c != 0).collect();
    let log = String::from_utf8_lossy(&log).trim().to_string();
    outcome.map_err(|why| error(format!("{}.cu {arguments:?}: {why:?}\n{log}", source.name)))?;
    let mut size = 0;
    // SAFETY: `size` is valid for the write.
    unsafe { sys::nvrtcGetCUBINSize(program.0, &mut size) }.result().map_err(|why| error(format!("NVRTC: {why:?}")))?;
    let mut cubin = vec![0u8; size];
    // SAFETY: `cubin` has the size that NVRTC asked for.
    let got = unsafe { sys::nvrtcGetCUBIN(program.0, cubin.as_mut_ptr().cast()) };
    got.result().map_err(|why| error(format!("NVRTC: {why:?}")))?;
    Ok(Compiled { cubin, log })
}

struct Program(sys::nvrtcProgram);

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: created by NVRTC, and not used again. An error here leaves nothing to do.
        let _ = unsafe { result::destroy_program(self.0) };
    }
}

/// Major and minor version of NVRTC.
pub fn nvrtc_version() -> Result<(i32, i32)> {
    libraries::nvrtc().state.as_ref().map_err(|why| error(format!("NVRTC: {why}")))?;
    let (mut major, mut minor) = (0, 0);
    // SAFETY: both are valid for the write, and the symbol was found.
    unsafe { sys::nvrtcVersion(&mut major, &mut minor) }.result().map_err(|why| error(format!("NVRTC: {why:?}")))?;
    Ok((major, minor))
}

/// The machine code of a variant: from the cache on disk, or compiled and put there.
///
/// Errors: those of [`compile`]. A cache that cannot be written is no error, only slower the next time.
pub fn cubin(source: &KernelSource, options: &[(&str, &str)], architecture: Architecture) -> Result<Vec<u8>> {
    match folder() {
        Some(folder) => cubin_in(&folder, source, options, architecture).map(|cached| cached.cubin),
        None => compile(source, options, architecture, false).map(|compiled| compiled.cubin),
    }
}

/// Code from a cache folder.
#[derive(Debug)]
pub struct Cached {
    /// Machine code.
    pub cubin: Vec<u8>,
    /// Whether it was in the cache; else it was compiled now.
    pub found: bool,
    /// Why it could not be put into the cache, if so.
    pub unwritten: Option<Error>,
}

/// As [`cubin`], in a folder of one's own. A file that is damaged or foreign is replaced.
pub fn cubin_in(
    folder: &Path,
    source: &KernelSource,
    options: &[(&str, &str)],
    architecture: Architecture,
) -> Result<Cached> {
    let key = Key::new(source, options, architecture)?;
    let path = folder.join(&key.file);
    if let Some(cubin) = fs::read(&path).ok().and_then(|bytes| key.code(&bytes)) {
        return Ok(Cached { cubin, found: true, unwritten: None });
    }
    let cubin = compile(source, options, architecture, false)?.cubin;
    let created = fs::create_dir_all(folder).map_err(|why| Error::io(folder, why));
    let written = created.and_then(|()| {
        write_atomically(&path, |file| {
            file.write_all(&key.header(&cubin))?;
            file.write_all(&cubin)
        })
    });
    Ok(Cached { cubin, found: false, unwritten: written.err() })
}

/// The cache's folder: `XT_KERNEL_CACHE` (`off` for none), else `x-transformers/kernels` in the user's cache folder.
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

/// What code is filed under: everything that it depends on.
struct Key {
    file: String,
    hash: u64,
}

/// Marks the files of the cache, and the version of their form.
const MAGIC: &[u8; 8] = b"xtcubin1";
const HEADER: usize = 32;

impl Key {
    fn new(source: &KernelSource, options: &[(&str, &str)], architecture: Architecture) -> Result<Self> {
        let (major, minor) = nvrtc_version()?;
        let mut options: Vec<String> = options.iter().map(|(name, value)| format!("{name}={value}")).collect();
        options.sort();
        let text = format!("{:016x} {options:?} sm_{architecture} NVRTC {major}.{minor}", source.hash);
        let hash = fnv1a(text.as_bytes());
        Ok(Self { file: format!("{}-sm_{architecture}-{hash:016x}.cubin", source.name), hash })
    }

    /// Magic, key, length and hash of the code, 8 bytes each.
    fn header(&self, cubin: &[u8]) -> [u8; HEADER] {
        let mut header = [0; HEADER];
        header[..8].copy_from_slice(MAGIC);
        header[8..16].copy_from_slice(&self.hash.to_le_bytes());
        header[16..24].copy_from_slice(&(cubin.len() as u64).to_le_bytes());
        header[24..].copy_from_slice(&fnv1a(cubin).to_le_bytes());
        header
    }

    /// The code of a file, if it is whole and this key's.
    fn code(&self, bytes: &[u8]) -> Option<Vec<u8>> {
        let (header, cubin) = bytes.split_at_checked(HEADER)?;
        (*header == self.header(cubin)).then(|| cubin.to_vec())
    }
}

fn error(message: String) -> Error {
    Error::Device { op: "kernels", message }
}
