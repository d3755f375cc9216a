//! Files that are read where their bytes are needed, and never mapped into memory: a file that is shortened, rewritten or
//! lies on a disk that fails is an error, not a signal that ends the process, and what was checked once stays as it is.

use std::{
    fmt,
    fs::{self, File},
    io,
    ops::Range,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use super::bytes::Reading;
use crate::{Error, Result, error::ensure};

/// Limit of what is read of a file besides its tensors (headers, directories, pickles), in bytes. Safetensors sets it
/// for its own header.
pub(super) const MAX_HEADER: usize = 100_000_000;

/// Longest time between two ticks of the clock that times of change are taken from, with a margin.
const TICK: Duration = Duration::from_millis(12);

/// A file or bytes in memory, read at any position by any number of threads.
pub(crate) struct Source {
    path: PathBuf,
    content: Content,
}

enum Content {
    File { file: File, stamp: Stamp },
    Memory(Vec<u8>),
}

/// State of a file that changes with its content.
#[derive(PartialEq)]
struct Stamp {
    len: u64,
    modified: Option<SystemTime>,
}

impl Stamp {
    fn of(file: &File) -> io::Result<Self> {
        let found = file.metadata()?;
        Ok(Self { len: found.len(), modified: found.modified().ok() })
    }

    /// If `true`, a change within the same tick of the clock would go unnoticed.
    fn is_fresh(&self) -> bool {
        // A time in the future comes from another machine's clock; nothing is known about its distance then.
        self.modified.is_some_and(|modified| modified.elapsed().map_or(true, |age| age < TICK))
    }
}

impl Source {
    /// Opens a regular file.
    ///
    /// Errors: [`ErrorKind::Io`](crate::ErrorKind::Io); [`ErrorKind::File`](crate::ErrorKind::File) for folders, pipes
    /// and devices, and for a file that is being written to.
    pub fn open(path: &Path) -> Result<Self> {
        let broken = |source| Error::io(path, source);
        // Asked before opening: opening a pipe would wait for a writer. Asked again after it: the file may be another one.
        let found = fs::metadata(path).map_err(broken)?;
        ensure!(found.is_file(), Error::file(path, "is not a regular file"));
        let file = File::open(path).map_err(broken)?;
        ensure!(file.metadata().map_err(broken)?.is_file(), Error::file(path, "is not a regular file"));
        let stamp = Stamp::of(&file).map_err(broken)?;
        if stamp.is_fresh() {
            // Later changes must differ from it, and there must be no writer who goes on.
            std::thread::sleep(TICK);
            let unchanged = Stamp::of(&file).map_err(broken)? == stamp;
            ensure!(unchanged, Error::file(path, format_args!("is being written to; {CURE}")));
        }
        ensure!(usize::try_from(stamp.len).is_ok(), Error::file(path, "is larger than this processor can address"));
        Ok(Self { path: path.to_path_buf(), content: Content::File { file, stamp } })
    }

    /// Reads from memory; errors name it `memory`.
    pub fn memory(bytes: Vec<u8>) -> Self {
        Self { path: PathBuf::from("memory"), content: Content::Memory(bytes) }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the number of bytes.
    pub fn len(&self) -> usize {
        match &self.content {
            Content::File { stamp, .. } => stamp.len as usize,
            Content::Memory(bytes) => bytes.len(),
        }
    }

    /// Fills `to` with the bytes from `at` on.
    ///
    /// Errors: [`ErrorKind::File`](crate::ErrorKind::File) if there are fewer, [`ErrorKind::Io`](crate::ErrorKind::Io).
    pub fn read_at(&self, at: usize, to: &mut [u8]) -> Result<()> {
        match &self.content {
            Content::File { file, .. } => read_exact_at(file, to, at as u64).map_err(|source| match source.kind() {
                io::ErrorKind::UnexpectedEof => self.shortened(),
                _ => Error::io(&self.path, source),
            }),
            Content::Memory(bytes) => {
                let from = at.checked_add(to.len()).and_then(|end| bytes.get(at..end));
                to.copy_from_slice(from.ok_or_else(|| self.shortened())?);
                Ok(())
            }
        }
    }

    /// Returns a copy of a few bytes.
    ///
    /// Errors: as [`Source::read_at`].
    pub fn array<const N: usize>(&self, at: usize) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.read_at(at, &mut bytes)?;
        Ok(bytes)
    }

    /// Returns a copy of a part that describes tensors, `what`.
    ///
    /// Errors: a part of more than [`MAX_HEADER`] bytes; as [`Source::read_at`].
    pub(super) fn part(&self, range: Range<usize>, what: &str) -> Reading<Vec<u8>> {
        let len = range.len();
        if len > MAX_HEADER {
            return Err(format!("has {what} of {len} bytes, expected at most {MAX_HEADER}").into());
        }
        let mut bytes = vec![0; len];
        self.read_at(range.start, &mut bytes)?;
        Ok(bytes)
    }

    /// Checks that nobody has written to the file since it was opened. One that replaces it by a rename leaves this one
    /// as it is.
    ///
    /// Errors: [`ErrorKind::File`](crate::ErrorKind::File); [`ErrorKind::Io`](crate::ErrorKind::Io).
    pub fn check_unchanged(&self) -> Result<()> {
        let Content::File { file, stamp } = &self.content else { return Ok(()) };
        let now = Stamp::of(file).map_err(|source| Error::io(&self.path, source))?;
        ensure!(now.len >= stamp.len, self.shortened());
        ensure!(now == *stamp, Error::file(&self.path, format_args!("changed while it was open; {CURE}")));
        Ok(())
    }

    fn shortened(&self) -> Error {
        Error::file(
            &self.path,
            format_args!("is truncated: it was {} bytes long when opened and is shorter now; {CURE}", self.len()),
        )
    }
}

/// Advice for those whose file changed.
const CURE: &str = "write to another file and rename it over this one, or wait until writing ends, then open it again";

impl fmt::Debug for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({} bytes)", self.path.display(), self.len())
    }
}

#[cfg(unix)]
fn read_exact_at(file: &File, to: &mut [u8], at: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, to, at)
}

#[cfg(windows)]
fn read_exact_at(file: &File, mut to: &mut [u8], mut at: u64) -> io::Result<()> {
    while !to.is_empty() {
        match std::os::windows::fs::FileExt::seek_read(file, to, at) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => (to, at) = (&mut to[count..], at + count as u64),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Other systems have one position per file: one thread at a time moves and uses it.
#[cfg(not(any(unix, windows)))]
fn read_exact_at(mut file: &File, to: &mut [u8], at: u64) -> io::Result<()> {
    use std::{
        io::{Read, Seek, SeekFrom},
        sync::{Mutex, PoisonError},
    };
    static ONE: Mutex<()> = Mutex::new(());
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    file.seek(SeekFrom::Start(at))?;
    file.read_exact(to)
}
