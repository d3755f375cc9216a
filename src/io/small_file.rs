//! Files that are read at once: configurations, indices, tokenizers.

use std::{
    fs::{self, File},
    io::{self, Read},
    path::Path,
};

use crate::{Error, Result, error::ensure};

/// Reads a regular file of at most `limit` bytes.
///
/// Errors: [`ErrorKind::Io`](crate::ErrorKind::Io) if it cannot be read or memory runs out;
/// [`ErrorKind::File`](crate::ErrorKind::File) for a folder, a pipe or a device, which might have no end, and for a
/// file with more than `limit` bytes.
///
/// ```
/// use x_transformers::io::read_limited;
/// # fn main() -> x_transformers::Result<()> {
/// # let path = std::env::temp_dir().join(format!("read_limited-{}.json", std::process::id()));
/// # std::fs::write(&path, "{}").unwrap();
/// assert_eq!(read_limited(&path, 2)?, b"{}");
/// assert!(read_limited(&path, 1).is_err());
/// # std::fs::remove_file(&path).unwrap();
/// # Ok(())
/// # }
/// ```
pub fn read_limited(path: impl AsRef<Path>, limit: u64) -> Result<Vec<u8>> {
    let path = path.as_ref();
    let broken = |source| Error::io(path, source);
    let too_long = |bytes| Error::file(path, format_args!("has {bytes} bytes, expected at most {limit}"));
    // Asked before opening: opening a pipe would wait for a writer.
    let found = fs::metadata(path).map_err(broken)?;
    ensure!(!found.is_dir(), broken(io::ErrorKind::IsADirectory.into()));
    ensure!(found.is_file(), Error::file(path, "is not a regular file"));
    ensure!(found.len() <= limit, too_long(found.len().to_string()));
    let mut bytes = Vec::new();
    let length = usize::try_from(found.len()).unwrap_or(usize::MAX);
    bytes.try_reserve_exact(length).map_err(|_| broken(io::ErrorKind::OutOfMemory.into()))?;
    // The file may have grown since it was asked.
    let mut file = File::open(path).map_err(broken)?.take(limit.saturating_add(1));
    file.read_to_end(&mut bytes).map_err(broken)?;
    ensure!(bytes.len() as u64 <= limit, too_long(format!("more than {limit}")));
    Ok(bytes)
}

/// Reads a regular file of UTF-8 text with at most `limit` bytes.
///
/// Errors: those of [`read_limited`], and [`ErrorKind::File`](crate::ErrorKind::File) for bytes that are not UTF-8.
pub fn read_text(path: impl AsRef<Path>, limit: u64) -> Result<String> {
    let path = path.as_ref();
    String::from_utf8(read_limited(path, limit)?)
        .map_err(|why| Error::file(path, format_args!("is not UTF-8 text: {}", why.utf8_error())))
}
