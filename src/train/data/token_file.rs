//! Files of tokens, read by position.

use std::{fmt, path::Path};

use crate::{
    Error, Result,
    collect::CollectVec,
    error::ensure,
    hash::{fnv1a, fnv1a_from},
    io::Source,
};

/// First bytes of the format of this library.
pub(super) const MAGIC: [u8; 8] = *b"XTTOKENS";
pub(super) const VERSION: u32 = 1;
/// Size of its header.
pub(super) const HEADER: usize = 64;

/// Size of llm.c's header.
const LLMC_HEADER: usize = 1024;
/// First number, version and bytes per token of llm.c's two formats.
const LLMC: [(i32, i32, usize); 2] = [(20240520, 1, 2), (20240801, 7, 4)];

/// Blocks of a file that its fingerprint sees.
const SAMPLES: u64 = 64;
const SAMPLE: u64 = 4096;
/// Files up to this size are hashed as a whole.
const SMALL: u64 = 4 << 20;

/// Format of a [`TokenFile`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum TokenFormat {
    /// That of [`TokenWriter`](super::TokenWriter), which knows its vocabulary.
    Tokens,
    /// llm.c: a header of 256 32-bit integers, then 16-bit tokens (GPT-2) or 32-bit tokens (Llama 3).
    LlmC,
    /// nanoGPT: 16-bit tokens without a header.
    NanoGpt,
}

impl fmt::Display for TokenFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tokens => "a .tokens file",
            Self::LlmC => "llm.c",
            Self::NanoGpt => "nanoGPT",
        })
    }
}

/// Open file of tokens, which is read by position and never as a whole: it may be larger than memory.
///
/// # Formats
///
/// They are told apart by content and length; all numbers are little-endian.
///
/// - `.tokens`, written by [`TokenWriter`](super::TokenWriter): a header of 64 bytes, then the tokens. The header is
///   `XTTOKENS`, the version 1 and the bytes per token, 2 or 4 (32 bits each); the number of tokens, the size of the
///   vocabulary, the token that begins a document (2^64 − 1: none), the bytes of text that the tokens stand for (0:
///   unknown), and the FNV-1a hash of the tokens (64 bits each).
/// - llm.c's `.bin`: 256 32-bit integers, the first of which are 20240520, 1 and the number of tokens (16 bits each), or
///   20240801, 7 and the number of tokens (32 bits each).
/// - nanoGPT's `.bin`: 16-bit tokens and nothing else.
pub struct TokenFile {
    source: Source,
    format: TokenFormat,
    /// Bytes per token.
    width: usize,
    /// Position of the first token.
    start: usize,
    count: u64,
    vocabulary: Option<u64>,
    end_of_text: Option<i64>,
    text_bytes: Option<u64>,
}

impl fmt::Debug for TokenFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokenFile")
            .field("source", &self.source)
            .field("format", &self.format)
            .field("tokens", &self.count)
            .finish_non_exhaustive()
    }
}

impl TokenFile {
    /// Opens a file; only its header is read.
    ///
    /// Errors: [`ErrorKind::Io`](crate::ErrorKind::Io); [`ErrorKind::File`](crate::ErrorKind::File) for a file of another
    /// format, and for one that is shorter or longer than its header says.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let broken = |why: fmt::Arguments| Error::file(path, why);
        let source = Source::open(path)?;
        let len = source.len();
        let mut head = [0; HEADER];
        let known = len.min(HEADER);
        source.read_at(0, &mut head[..known])?;
        let number = |at: usize| i32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let wide = |at: usize| (number(at) as u32 as u64) | (number(at + 4) as u32 as u64) << 32;
        let sized = |start: usize, width: usize, count: u64| {
            let expected = count.checked_mul(width as u64).and_then(|bytes| bytes.checked_add(start as u64));
            ensure!(
                expected == Some(len as u64),
                broken(format_args!(
                    "is {}: its header announces {count} tokens of {width} bytes, which with the header of {start} bytes \
                     are {}, but the file has {len} bytes",
                    if expected.is_some_and(|expected| expected < len as u64) { "too long" } else { "truncated" },
                    expected.map_or("more than a file can have".to_string(), |expected| format!("{expected} bytes")),
                ))
            );
            Ok(())
        };
        let tokens = path.extension().is_some_and(|extension| extension == "tokens");
        let file = Self {
            format: TokenFormat::NanoGpt,
            width: 2,
            start: 0,
            count: len as u64 / 2,
            vocabulary: None,
            end_of_text: None,
            text_bytes: None,
            source,
        };
        if head[..MAGIC.len()] == MAGIC || tokens {
            ensure!(
                head[..MAGIC.len()] == MAGIC,
                broken(format_args!("is not a .tokens file: it lacks the first bytes XTTOKENS"))
            );
            ensure!(known == HEADER, broken(format_args!("is truncated: {len} bytes are less than a header")));
            let (version, width, count) = (number(8), number(12) as usize, wide(16));
            ensure!(
                version == VERSION as i32,
                broken(format_args!("has version {version} of the format, expected {VERSION}"))
            );
            ensure!([2, 4].contains(&width), broken(format_args!("has tokens of {width} bytes, expected 2 or 4")));
            sized(HEADER, width, count)?;
            let (vocabulary, end, text) = (wide(24), wide(32), wide(40));
            ensure!(
                end == u64::MAX || end < vocabulary,
                broken(format_args!("has the end of text {end}, which is out of its vocabulary of {vocabulary}"))
            );
            return Ok(Self {
                format: TokenFormat::Tokens,
                width,
                start: HEADER,
                count,
                vocabulary: Some(vocabulary),
                end_of_text: (end != u64::MAX).then_some(end as i64),
                text_bytes: (text > 0).then_some(text),
                ..file
            });
        }
        if let Some((_, version, width)) = LLMC.into_iter().find(|kind| known >= 12 && number(0) == kind.0) {
            ensure!(
                number(4) == version,
                broken(format_args!("has version {} of llm.c's format {}, expected {version}", number(4), number(0)))
            );
            sized(LLMC_HEADER, width, number(8) as u32 as u64)?;
            let count = number(8) as u32 as u64;
            return Ok(Self { format: TokenFormat::LlmC, width, start: LLMC_HEADER, count, ..file });
        }
        ensure!(
            path.extension().is_some_and(|extension| extension == "bin"),
            broken(format_args!(
                "is not a file of tokens: expected a name that ends in .tokens or .bin, or the header of llm.c"
            ))
        );
        ensure!(
            len.is_multiple_of(2),
            broken(format_args!("has {len} bytes, which are not a number of 16-bit tokens as nanoGPT writes them"))
        );
        Ok(file)
    }

    /// Creates a file from tokens in memory.
    pub(super) fn memory(
        tokens: &[u32],
        num_tokens: usize,
        end_of_text: Option<i64>,
        text_bytes: Option<u64>,
    ) -> Result<Self> {
        if let Some(token) = tokens.iter().find(|&&token| token as usize >= num_tokens) {
            return Err(Error::option("tokens", format_args!("expected tokens below {num_tokens}, got {token}")));
        }
        let bytes = tokens.iter().flat_map(|token| token.to_le_bytes()).collect_vec();
        Ok(Self {
            source: Source::memory(bytes),
            format: TokenFormat::Tokens,
            width: 4,
            start: 0,
            count: tokens.len() as u64,
            vocabulary: Some(num_tokens as u64),
            end_of_text,
            text_bytes,
        })
    }

    /// Returns the path.
    pub fn path(&self) -> &Path {
        self.source.path()
    }

    /// Returns the format.
    pub fn format(&self) -> TokenFormat {
        self.format
    }

    /// Returns the number of tokens.
    pub fn len(&self) -> u64 {
        self.count
    }

    /// Returns `true` if the file has no tokens.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Returns the size of the vocabulary, if the file says it.
    pub fn num_tokens(&self) -> Option<u64> {
        self.vocabulary
    }

    /// Returns the token that begins each document, if the file says it.
    pub fn end_of_text(&self) -> Option<i64> {
        self.end_of_text
    }

    /// Returns the number of bytes of the text that the tokens stand for, if the file says it.
    pub fn text_bytes(&self) -> Option<u64> {
        self.text_bytes
    }

    /// Fills a row with the tokens from a position on.
    ///
    /// Errors: [`ErrorKind::File`](crate::ErrorKind::File) with the byte for a token of `num_tokens` and above, for a
    /// position past the end, and for a file that changed since it was opened; [`ErrorKind::Io`](crate::ErrorKind::Io).
    pub fn read(&self, start: u64, row: &mut [i64], num_tokens: usize) -> Result<()> {
        let past = || Error::file(self.path(), format_args!("has {} tokens, token {start} was requested", self.count));
        let end = start.checked_add(row.len() as u64).ok_or_else(past)?;
        ensure!(end <= self.count, past());
        let at = self.start + start as usize * self.width;
        let mut bytes = vec![0; row.len() * self.width];
        self.source.read_at(at, &mut bytes)?;
        match self.width {
            2 => bytes
                .as_chunks::<2>()
                .0
                .iter()
                .zip(&mut *row)
                .for_each(|(bytes, token)| *token = u16::from_le_bytes(*bytes).into()),
            _ => bytes
                .as_chunks::<4>()
                .0
                .iter()
                .zip(&mut *row)
                .for_each(|(bytes, token)| *token = u32::from_le_bytes(*bytes).into()),
        }
        let limit = self.vocabulary.map_or(num_tokens as u64, |own| own.min(num_tokens as u64));
        match row.iter().position(|&token| token as u64 >= limit) {
            None => Ok(()),
            Some(index) => Err(Error::file(
                self.path(),
                format_args!(
                    "has token {} at byte {}, but the {} has {limit} tokens; use the tokenizer that the file was made with",
                    row[index],
                    at + index * self.width,
                    if limit == num_tokens as u64 { "model's vocabulary" } else { "file's vocabulary" },
                ),
            )),
        }
    }

    /// Checks that nobody has written to the file since it was opened.
    ///
    /// Errors: [`ErrorKind::File`](crate::ErrorKind::File).
    pub(super) fn check_unchanged(&self) -> Result<()> {
        self.source.check_unchanged()
    }

    /// Returns the hash of the length and of 64 blocks evenly spaced over the file, the header among them: a file of 20 GB is
    /// known in a moment. The header of a `.tokens` file has the hash of all tokens. Small files, and tokens in memory, are
    /// hashed as a whole.
    pub(super) fn fingerprint(&self) -> Result<u64> {
        let len = self.source.len() as u64;
        let mut hash = fnv1a(&len.to_le_bytes());
        let whole = len <= SMALL || self.start == 0 && self.format == TokenFormat::Tokens;
        let (block, count) = if whole { (SMALL, len.div_ceil(SMALL)) } else { (SAMPLE, SAMPLES) };
        let mut bytes = vec![0; block.min(len) as usize];
        for index in 0..count {
            let at = if whole {
                index * block
            } else {
                ((len - block) as u128 * index as u128 / (SAMPLES as u128 - 1)) as u64
            };
            let bytes = &mut bytes[..block.min(len - at) as usize];
            self.source.read_at(at as usize, bytes)?;
            hash = fnv1a_from(hash, bytes);
        }
        Ok(hash)
    }
}
