//! The bytes of a file, mapped into memory, and reading along them without ever leaving them.

use std::{
    fs::{self, File},
    ops::Deref,
    path::Path,
};

use memmap2::Mmap;

use crate::{Error, Result, error::ensure};

/// What a reader says about bytes that are not what they should be; the caller knows the file.
pub(super) type Parsed<T> = std::result::Result<T, String>;

/// All bytes of a file.
#[derive(Debug)]
pub(super) enum Bytes {
    Mapped(Mmap),
    Owned(Vec<u8>),
}

impl Bytes {
    /// Maps a file: pages are read when they are looked at.
    ///
    /// Errors: [`Error::Io`]; [`Error::File`] for what is no regular file.
    pub fn map(path: &Path) -> Result<Self> {
        let broken = |source| Error::io(path, source);
        // Asked before opening: opening a pipe would wait for a writer.
        let found = fs::metadata(path).map_err(broken)?;
        ensure!(found.is_file(), Error::file(path, "is not a regular file"));
        let file = File::open(path).map_err(broken)?;
        if file.metadata().map_err(broken)?.len() == 0 {
            return Ok(Self::Owned(Vec::new()));
        }
        map(&file).map(Self::Mapped).map_err(broken)
    }
}

/// The one place of this folder that the compiler cannot check.
fn map(file: &File) -> std::io::Result<Mmap> {
    // SAFETY: the mapping is private to this process and read-only. Another process that changes the file under way
    // changes values, which are copied out as plain numbers or checked text; one that shortens it ends this process, as
    // it does for every program that maps files. Files of weights are replaced, not rewritten (`write_atomically`).
    unsafe { Mmap::map(file) }
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Owned(bytes) => bytes,
        }
    }
}

/// A place in some bytes, which moves on as values are taken.
#[derive(Clone)]
pub(super) struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    pub fn new(bytes: &'a [u8], at: usize) -> Self {
        Self { bytes, at: at.min(bytes.len()) }
    }

    pub fn at(&self) -> usize {
        self.at
    }

    pub fn left(&self) -> usize {
        self.bytes.len() - self.at
    }

    /// The next `count` bytes.
    pub fn take(&mut self, count: usize) -> Parsed<&'a [u8]> {
        if count > self.left() {
            return Err(format!(
                "is truncated: {count} bytes are expected at byte {}, there are {}",
                self.at,
                self.left()
            ));
        }
        let taken = &self.bytes[self.at..self.at + count];
        self.at += count;
        Ok(taken)
    }

    pub fn array<const N: usize>(&mut self) -> Parsed<[u8; N]> {
        self.take(N).map(|bytes| std::array::from_fn(|index| bytes[index]))
    }

    pub fn u8(&mut self) -> Parsed<u8> {
        self.array().map(|[byte]: [u8; 1]| byte)
    }

    pub fn u16(&mut self) -> Parsed<u16> {
        self.array().map(u16::from_le_bytes)
    }

    pub fn u32(&mut self) -> Parsed<u32> {
        self.array().map(u32::from_le_bytes)
    }

    pub fn u64(&mut self) -> Parsed<u64> {
        self.array().map(u64::from_le_bytes)
    }

    /// A length or count, which what follows must be able to hold at `least` bytes each.
    pub fn count(&mut self, least: usize, what: &str) -> Parsed<usize> {
        let (at, count) = (self.at, self.u64()?);
        let fits = usize::try_from(count)
            .ok()
            .filter(|&count| count.checked_mul(least).is_some_and(|bytes| bytes <= self.left()));
        fits.ok_or_else(|| {
            format!(
                "says at byte {at} that {count} {what} follow; the {} bytes behind it cannot hold them",
                self.left()
            )
        })
    }
}
