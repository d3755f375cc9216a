//! Reading along some bytes without ever leaving them.

use std::cell::Cell;

use super::source::{MAX_HEADER, Source};

/// Result of parsing; the error describes the malformed bytes, and the caller adds the file.
pub(super) type Parsed<T> = std::result::Result<T, String>;

/// Error of a read.
#[derive(Debug)]
pub(super) enum Unreadable {
    /// The content is wrong; the caller knows the file.
    Content(String),
    /// Reading failed, or memory ran out.
    Failed(crate::Error),
}

/// Like [`Parsed`], but for parsers that also read the file.
pub(super) type Reading<T> = std::result::Result<T, Unreadable>;

impl From<String> for Unreadable {
    fn from(why: String) -> Self {
        Self::Content(why)
    }
}

impl From<&str> for Unreadable {
    fn from(why: &str) -> Self {
        Self::Content(why.into())
    }
}

impl From<crate::Error> for Unreadable {
    fn from(error: crate::Error) -> Self {
        Self::Failed(error)
    }
}

impl Unreadable {
    /// Returns the error about a file.
    pub fn within(self, source: &Source) -> crate::Error {
        match self {
            Self::Content(why) => crate::Error::file(source.path(), why),
            Self::Failed(error) => error,
        }
    }
}

/// Parses the beginning of a file, a header whose length only its content tells: of a copy that grows until the parser
/// has what it asks for.
pub(super) fn parse_beginning<R>(source: &Source, parse: impl Fn(Cursor) -> Reading<R>) -> Reading<R> {
    /// Bytes of the first copy.
    const FIRST: usize = 1 << 20;
    let wanted = Cell::new(0);
    let mut length = FIRST.min(source.len());
    loop {
        let bytes = source.part(0..length, "a header")?;
        wanted.set(0);
        let result = parse(Cursor { bytes: &bytes, at: 0, total: source.len(), wanted: Some(&wanted) });
        let wanted = wanted.get();
        if wanted <= length {
            return result;
        }
        if wanted > MAX_HEADER {
            return Err(format!("has a header of more than {MAX_HEADER} bytes, the limit").into());
        }
        length = wanted.max(4 * length).min(MAX_HEADER).min(source.len());
    }
}

/// A place in some bytes, which moves on as values are taken.
#[derive(Clone)]
pub(super) struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
    /// Number of bytes, of which `bytes` may be the first ones only.
    total: usize,
    /// The end of what was asked for beyond `bytes`.
    wanted: Option<&'a Cell<usize>>,
}

impl<'a> Cursor<'a> {
    pub fn new(bytes: &'a [u8], at: usize) -> Self {
        Self { bytes, at: at.min(bytes.len()), total: bytes.len(), wanted: None }
    }

    pub fn at(&self) -> usize {
        self.at
    }

    pub fn left(&self) -> usize {
        self.total - self.at
    }

    /// Returns the next `count` bytes.
    pub fn take(&mut self, count: usize) -> Parsed<&'a [u8]> {
        if count > self.left() {
            return Err(format!("is truncated: expected {count} bytes at byte {}, got {}", self.at, self.left()));
        }
        let end = self.at + count;
        let Some(taken) = self.bytes.get(self.at..end) else {
            if let Some(wanted) = self.wanted {
                wanted.set(wanted.get().max(end));
            }
            return Err(format!("has a header that continues past byte {}", self.bytes.len()));
        };
        self.at = end;
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

    /// Reads a length or count, for which the remaining bytes must suffice at `least` bytes each.
    pub fn count(&mut self, least: usize, what: &str) -> Parsed<usize> {
        let (at, count) = (self.at, self.u64()?);
        let fits = usize::try_from(count)
            .ok()
            .filter(|&count| count.checked_mul(least).is_some_and(|bytes| bytes <= self.left()));
        fits.ok_or_else(|| {
            format!(
                "is truncated or damaged: byte {at} announces {count} {what}, but only {} bytes follow",
                self.left()
            )
        })
    }
}
