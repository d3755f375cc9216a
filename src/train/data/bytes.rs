//! Text as bytes: reading, splitting, and the windows of a batch.

use std::{
    fmt,
    fs::{self, File},
    io::Read,
    path::{Path, PathBuf},
};

use super::{
    BatchRequest, BatchSource, DataPrint, TokenBatch,
    windows::{self, Tokens},
};
use crate::{Error, ErrorKind, Result, collect::CollectVec, error::ensure, hash::fnv1a, sort::sort};

/// Number of bytes read at a time: a large binary file is recognised before all of it is read.
const BLOCK: usize = 64 * 1024;

/// Text for a byte-level model: the first 9/10 of its bytes are for training, the rest for validation.
///
/// ```
/// use x_transformers::train::ByteText;
/// # fn main() -> x_transformers::Result<()> {
/// let text = ByteText::from_bytes("to be or not to be, ".repeat(20))?;
/// assert_eq!((text.train().len(), text.validation().len()), (360, 40));
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct ByteText {
    bytes: Vec<u8>,
    largest: u8,
    /// Files, and where they end.
    ends: Vec<(PathBuf, usize)>,
    skipped: Vec<(PathBuf, String)>,
}

impl fmt::Debug for ByteText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ByteText").field("bytes", &self.bytes.len()).finish()
    }
}

impl ByteText {
    /// Reads the files, and all files below the folders, one after the other.
    ///
    /// Folders are walked in the order of names. Hidden names, binary files (with a zero byte), empty files, links to
    /// folders, pipes and devices are skipped; so are files and folders below a folder that cannot be read, which
    /// [`ByteText::skipped`] lists.
    ///
    /// Errors: [`ErrorKind::Io`] for a path in the list that cannot be read; [`ErrorKind::File`] for a path in the list
    /// that is a binary or empty file or neither file nor folder, and for a folder without text; an empty list.
    pub fn from_paths<P: AsRef<Path>>(paths: &[P]) -> Result<Self> {
        ensure!(!paths.is_empty(), Error::option("text", "expected at least one file or folder"));
        let (mut bytes, mut ends, mut skipped) = (Vec::new(), Vec::new(), Vec::new());
        for path in paths.iter().map(AsRef::as_ref) {
            let before = bytes.len();
            let found = fs::metadata(path).map_err(|source| Error::io(path, source))?;
            if found.is_dir() {
                read_folder(path, &mut bytes, &mut ends, &mut skipped)?;
                ensure!(bytes.len() > before, no_text(path, &skipped));
            } else if found.is_file() {
                ensure!(
                    read_file(path, &mut bytes)?,
                    Error::file(path, "is binary (it has a zero byte), expected text")
                );
                ensure!(bytes.len() > before, Error::file(path, "is empty, expected text"));
                ends.push((path.to_path_buf(), bytes.len()));
            } else {
                return Err(Error::file(path, "is neither a file nor a folder"));
            }
        }
        Ok(Self { largest: largest(&bytes), ends, bytes, skipped })
    }

    /// Creates a text from bytes in memory.
    ///
    /// Errors: an empty text.
    pub fn from_bytes(bytes: impl Into<Vec<u8>>) -> Result<Self> {
        let bytes = bytes.into();
        ensure!(!bytes.is_empty(), Error::option("text", "is empty"));
        Ok(Self {
            largest: largest(&bytes),
            ends: vec![(PathBuf::from("memory"), bytes.len())],
            bytes,
            skipped: Vec::new(),
        })
    }

    /// Returns files and folders below a folder that could not be read and are not part of the text, with the reasons.
    pub fn skipped(&self) -> &[(PathBuf, String)] {
        &self.skipped
    }

    /// Returns all bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Returns the files and their bytes; bytes in memory are a file called `memory`.
    pub fn files(&self) -> impl Iterator<Item = (&Path, &[u8])> {
        let starts = std::iter::once(0).chain(self.ends.iter().map(|(_, end)| *end));
        starts.zip(&self.ends).map(|(start, (path, end))| (&**path, &self.bytes[start..*end]))
    }

    /// Returns the bytes to train on: the first 9/10, rounded down.
    pub fn train(&self) -> &[u8] {
        &self.bytes[..self.cut()]
    }

    /// Returns the bytes to validate on.
    pub fn validation(&self) -> &[u8] {
        &self.bytes[self.cut()..]
    }

    fn cut(&self) -> usize {
        // Not `len * 9 / 10`, which could overflow.
        self.bytes.len() / 10 * 9 + self.bytes.len() % 10 * 9 / 10
    }

    /// Returns the FNV-1a hash of all bytes, which identifies a text.
    pub fn fingerprint(&self) -> u64 {
        fnv1a(&self.bytes)
    }
}

impl Tokens for &[u8] {
    fn len(&self) -> u64 {
        <[u8]>::len(self) as u64
    }

    fn read(&self, start: u64, row: &mut [i64], _: usize) -> Result<()> {
        for (token, &byte) in row.iter_mut().zip(&self[start as usize..]) {
            *token = byte as i64;
        }
        Ok(())
    }

    fn end_of_text(&self) -> Option<i64> {
        None
    }
}

/// Windows of the training part at random offsets; the validation has 64 windows evenly spaced over the validation part,
/// the first at its start and the last at its end.
impl BatchSource for ByteText {
    type Batch = TokenBatch;

    fn batch(&self, request: &BatchRequest) -> Result<TokenBatch> {
        self.check(request)?;
        windows::batch(&self.train(), request)
    }

    fn validation_batches(&self, request: &BatchRequest) -> Result<Vec<TokenBatch>> {
        self.check(request)?;
        windows::validation(&self.validation(), request)
    }

    fn check(&self, request: &BatchRequest) -> Result<()> {
        windows::check([&self.train(), &self.validation()], request, "text", "bytes")?;
        ensure!(
            usize::from(self.largest) < request.num_tokens,
            Error::option(
                "num_tokens",
                format_args!(
                    "expected more than {} (the largest byte of the text), got {}",
                    self.largest, request.num_tokens
                )
            )
        );
        ensure!(
            !request.documents,
            Error::option("document_mask", "requires data with document borders, which a text of bytes does not have")
        );
        Ok(())
    }

    fn print(&self) -> Result<DataPrint> {
        Ok(DataPrint::new("text", self.bytes.len() as u64, self.fingerprint()))
    }

    fn bytes_per_token(&self) -> Option<f64> {
        Some(1.0)
    }
}

fn largest(bytes: &[u8]) -> u8 {
    bytes.iter().copied().max().unwrap_or(0)
}

/// Returns the error of a folder without text, with the first file in it that could not be read.
fn no_text(folder: &Path, skipped: &[(PathBuf, String)]) -> Error {
    let unreadable = skipped.iter().find(|(path, _)| path.starts_with(folder));
    let reason = unreadable.map_or(String::new(), |(path, why)| format!("; {}: {why}", path.display()));
    Error::file(folder, format_args!("contains no readable text{reason}"))
}

/// Appends the text below a folder.
///
/// Errors: the folder itself cannot be listed.
fn read_folder(
    folder: &Path,
    bytes: &mut Vec<u8>,
    ends: &mut Vec<(PathBuf, usize)>,
    skipped: &mut Vec<(PathBuf, String)>,
) -> Result<()> {
    let broken = |source| Error::io(folder, source);
    let entries = fs::read_dir(folder).map_err(broken)?.collect::<std::io::Result<Vec<_>>>().map_err(broken)?;
    let mut names: Vec<_> = entries.into_iter().map(|entry| entry.file_name()).collect_vec();
    sort(&mut names);
    for name in names {
        if name.as_encoded_bytes().starts_with(b".") {
            continue;
        }
        let path = folder.join(name);
        if let Err(error) = read_entry(&path, bytes, ends, skipped) {
            skipped.push(match error.into_kind() {
                ErrorKind::Io { path, source } => (path, source.to_string()),
                other => (path, other.to_string()),
            });
        }
    }
    Ok(())
}

/// Appends a file, or the text below a folder, found in a folder.
fn read_entry(
    path: &Path,
    bytes: &mut Vec<u8>,
    ends: &mut Vec<(PathBuf, usize)>,
    skipped: &mut Vec<(PathBuf, String)>,
) -> Result<()> {
    let broken = |source| Error::io(path, source);
    let is_link = fs::symlink_metadata(path).map_err(broken)?.is_symlink();
    let found = fs::metadata(path).map_err(broken)?;
    if found.is_dir() && !is_link {
        read_folder(path, bytes, ends, skipped)
    } else if found.is_file() {
        let before = bytes.len();
        read_file(path, bytes)?;
        // Empty and binary files are not part of the text.
        ends.extend((bytes.len() > before).then(|| (path.to_path_buf(), bytes.len())));
        Ok(())
    } else {
        Ok(())
    }
}

/// Appends a file; returns `false` and appends nothing if it is binary. A file that cannot be read to its end adds
/// nothing.
fn read_file(path: &Path, bytes: &mut Vec<u8>) -> Result<bool> {
    let before = bytes.len();
    let broken = |source| Error::io(path, source);
    let mut file = File::open(path).map_err(broken)?;
    let mut block = vec![0; BLOCK];
    loop {
        let length = match file.read(&mut block) {
            Ok(0) => return Ok(true),
            Ok(length) => length,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(error) => {
                bytes.truncate(before);
                return Err(broken(error));
            }
        };
        if block[..length].contains(&0) {
            bytes.truncate(before);
            return Ok(false);
        }
        bytes.extend_from_slice(&block[..length]);
    }
}
