//! Writing of token files.

use std::{
    fs::File,
    io::{BufWriter, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

use super::token_file::{HEADER, MAGIC, VERSION};
use crate::{
    Error, Result,
    error::ensure,
    hash::{FNV1A_START, fnv1a_from},
};

/// Writer of a `.tokens` file, which [`TokenFile`](super::TokenFile) describes. The file has its name once it is whole: until
/// then it is `NAME.partial`, which is removed if the writer is dropped.
///
/// ```
/// use x_transformers::train::{TokenFile, TokenWriter};
/// # fn main() -> x_transformers::Result<()> {
/// # let folder = std::env::temp_dir().join(format!("xt-doc-tokens-{}", std::process::id()));
/// # std::fs::create_dir_all(&folder).unwrap();
/// let path = folder.join("numbers.tokens");
/// let mut writer = TokenWriter::create(&path, 1000, Some(0))?; // vocabulary, token that begins a document
/// writer.write(&[0, 7, 8, 9])?;
/// writer.finish(None)?;
///
/// let mut row = [0; 2];
/// TokenFile::open(&path)?.read(1, &mut row, 1000)?;
/// assert_eq!(row, [7, 8]);
/// # std::fs::remove_dir_all(&folder).unwrap();
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct TokenWriter {
    path: PathBuf,
    partial: PathBuf,
    /// `None` once the file is finished.
    file: Option<BufWriter<File>>,
    num_tokens: usize,
    end_of_text: Option<i64>,
    width: usize,
    count: u64,
    hash: u64,
}

impl TokenWriter {
    /// Creates a file for tokens below `num_tokens`; those of a vocabulary of up to 65536 take two bytes each, others four.
    /// `end_of_text` begins each document.
    ///
    /// Errors: a vocabulary of more than 2^32 tokens, or an end of text out of it; [`ErrorKind::Io`](crate::ErrorKind::Io).
    pub fn create(path: impl AsRef<Path>, num_tokens: usize, end_of_text: Option<i64>) -> Result<Self> {
        let path = path.as_ref();
        ensure!(
            num_tokens as u64 <= 1 << 32,
            Error::option("num_tokens", format_args!("expected at most 2^32, got {num_tokens}"))
        );
        ensure!(
            end_of_text.is_none_or(|end| (0..num_tokens as i64).contains(&end)),
            Error::option("end_of_text", format_args!("expected a token below {num_tokens}, got {end_of_text:?}"))
        );
        let mut partial = path.as_os_str().to_os_string();
        partial.push(".partial");
        let partial = PathBuf::from(partial);
        let mut file =
            BufWriter::with_capacity(1 << 20, File::create(&partial).map_err(|why| Error::io(&partial, why))?);
        file.write_all(&[0; HEADER]).map_err(|why| Error::io(&partial, why))?;
        let width = if num_tokens <= 1 << 16 { 2 } else { 4 };
        let path = path.to_path_buf();
        Ok(Self { path, partial, file: Some(file), num_tokens, end_of_text, width, count: 0, hash: FNV1A_START })
    }

    /// Appends tokens.
    ///
    /// Errors: a token out of the vocabulary, with nothing written; [`ErrorKind::Io`](crate::ErrorKind::Io).
    pub fn write(&mut self, tokens: &[i64]) -> Result<()> {
        let limit = self.num_tokens as i64;
        if let Some(token) = tokens.iter().find(|token| !(0..limit).contains(token)) {
            let why = format!("token {token} is out of the vocabulary of {limit} tokens");
            return Err(Error::file(&self.path, why));
        }
        let mut bytes = Vec::with_capacity(tokens.len() * self.width);
        tokens.iter().for_each(|token| bytes.extend_from_slice(&token.to_le_bytes()[..self.width]));
        self.hash = fnv1a_from(self.hash, &bytes);
        self.count += tokens.len() as u64;
        let Some(file) = &mut self.file else { return Ok(()) };
        file.write_all(&bytes).map_err(|why| Error::io(&self.partial, why))
    }

    /// Returns the number of tokens so far.
    pub fn len(&self) -> u64 {
        self.count
    }

    /// Returns `true` if there are no tokens so far.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Writes the header, brings the file to the disk and gives it its name. `text_bytes` is the number of bytes of text
    /// that the tokens stand for, if known.
    ///
    /// Errors: [`ErrorKind::Io`](crate::ErrorKind::Io); a file of this name stays as it was.
    pub fn finish(mut self, text_bytes: Option<u64>) -> Result<()> {
        let mut header = Vec::with_capacity(HEADER);
        header.extend_from_slice(&MAGIC);
        header.extend([VERSION, self.width as u32].iter().flat_map(|number| number.to_le_bytes()));
        let end = self.end_of_text.map_or(u64::MAX, |end| end as u64);
        let numbers = [self.count, self.num_tokens as u64, end, text_bytes.unwrap_or(0), self.hash];
        header.extend(numbers.iter().flat_map(|number| number.to_le_bytes()));
        header.resize(HEADER, 0);
        let Some(mut file) = self.file.take() else { return Ok(()) };
        let mut write = || {
            file.seek(SeekFrom::Start(0))?;
            file.write_all(&header)?;
            file.flush()?;
            file.get_ref().sync_all()?;
            std::fs::rename(&self.partial, &self.path)
        };
        write().map_err(|why| {
            let error = Error::io(&self.path, why);
            // The first error counts.
            let _ = std::fs::remove_file(&self.partial);
            error
        })
    }
}

impl Drop for TokenWriter {
    fn drop(&mut self) {
        if self.file.take().is_some() {
            let _ = std::fs::remove_file(&self.partial);
        }
    }
}
