//! Token files as a source of batches.

use std::{path::Path, sync::Arc};

use super::{
    BatchRequest, BatchSource, DataPrint, TokenBatch, TokenFile,
    windows::{self, Tokens},
};
use crate::{Error, Result, collect::CollectVec, error::ensure, hash::fnv1a};

/// Token files, one after the other, as a source of windows: larger than memory, read by position.
///
/// Windows are at random offsets or, with [`TrainOptions::shuffle`](super::super::TrainOptions::shuffle), each once an
/// epoch; the validation has 64 windows evenly spaced over its tokens.
#[derive(Clone, Debug)]
pub struct TokenData {
    train: Part,
    validation: Part,
}

/// Consecutive tokens of files.
#[derive(Clone, Debug)]
struct Part {
    pieces: Vec<Piece>,
    end_of_text: Option<i64>,
}

/// Consecutive tokens of a file.
#[derive(Clone, Debug)]
struct Piece {
    file: Arc<TokenFile>,
    /// Position of the first token in the file.
    start: u64,
    len: u64,
    /// Number of tokens of the pieces before this one.
    before: u64,
}

impl Part {
    fn new(files: &[Arc<TokenFile>], from: u64, to: u64) -> Self {
        let (mut pieces, mut at, mut before) = (Vec::new(), 0, 0);
        for file in files {
            let (start, end) = (from.max(at) - at, to.min(at + file.len()).saturating_sub(at));
            if start < end {
                let len = end - start;
                pieces.push(Piece { file: file.clone(), start, len, before });
                before += len;
            }
            at += file.len();
        }
        let mut ends = pieces.iter().map(|piece| piece.file.end_of_text());
        let first = ends.next().flatten();
        Self { end_of_text: first.filter(|_| ends.all(|end| end == first)), pieces }
    }

    fn whole(files: &[Arc<TokenFile>]) -> Self {
        Self::new(files, 0, u64::MAX)
    }
}

impl Tokens for Part {
    fn len(&self) -> u64 {
        self.pieces.last().map_or(0, |piece| piece.before + piece.len)
    }

    fn read(&self, start: u64, mut row: &mut [i64], num_tokens: usize) -> Result<()> {
        let mut at = start;
        let first = self.pieces.partition_point(|piece| piece.before + piece.len <= start);
        for piece in &self.pieces[first..] {
            if row.is_empty() {
                break;
            }
            let inside = at - piece.before;
            let count = (piece.len - inside).min(row.len() as u64);
            let (now, later) = row.split_at_mut(count as usize);
            piece.file.read(piece.start + inside, now, num_tokens)?;
            (row, at) = (later, at + count);
        }
        Ok(())
    }

    fn end_of_text(&self) -> Option<i64> {
        self.end_of_text
    }
}

impl TokenData {
    /// Opens files whose last tenth, of all tokens together, is for validation.
    ///
    /// Errors: those of [`TokenFile::open`]; an empty list; vocabularies that differ.
    pub fn open<P: AsRef<Path>>(paths: &[P]) -> Result<Self> {
        let files = files(paths)?;
        let all = Part::whole(&files).len();
        let cut = all / 10 * 9 + all % 10 * 9 / 10;
        Ok(Self { train: Part::new(&files, 0, cut), validation: Part::new(&files, cut, u64::MAX) })
    }

    /// Opens files to train on, and others to validate on.
    ///
    /// Errors: those of [`TokenData::open`].
    pub fn with_validation<P: AsRef<Path>>(train: &[P], validation: &[P]) -> Result<Self> {
        let (train, validation) = (files(train)?, files(validation)?);
        same_vocabulary(train.iter().chain(&validation))?;
        Ok(Self { train: Part::whole(&train), validation: Part::whole(&validation) })
    }

    /// Creates a source from tokens in memory: those to train on, and those to validate on. `text_bytes` is the number of
    /// bytes of text that the latter stand for, if known.
    ///
    /// Errors: a token that is not below `num_tokens`.
    pub fn from_tokens(
        train: &[u32],
        validation: &[u32],
        num_tokens: usize,
        end_of_text: Option<i64>,
        text_bytes: Option<u64>,
    ) -> Result<Self> {
        let part = |tokens, bytes| {
            let file = TokenFile::memory(tokens, num_tokens, end_of_text, bytes)?;
            Ok(Part::whole(&[Arc::new(file)]))
        };
        Ok(Self { train: part(train, None)?, validation: part(validation, text_bytes)? })
    }

    /// Sets the token that begins each document, for files that do not say it: 50256 in files of nanoGPT and llm.c with
    /// GPT-2's vocabulary.
    pub fn with_end_of_text(mut self, token: i64) -> Self {
        self.train.end_of_text = Some(token);
        self.validation.end_of_text = Some(token);
        self
    }

    /// Returns the number of tokens to train on.
    pub fn train_len(&self) -> u64 {
        self.train.len()
    }

    /// Returns the number of tokens to validate on.
    pub fn validation_len(&self) -> u64 {
        self.validation.len()
    }

    /// Returns the size of the vocabulary, if the files say it.
    pub fn num_tokens(&self) -> Option<u64> {
        self.train.pieces.iter().find_map(|piece| piece.file.num_tokens())
    }

    /// Returns the token that begins each document, if it is known.
    pub fn end_of_text(&self) -> Option<i64> {
        self.train.end_of_text
    }

    fn pieces(&self) -> impl Iterator<Item = &Piece> {
        self.train.pieces.iter().chain(&self.validation.pieces)
    }

    /// Checks that no file changed since it was opened.
    fn check_unchanged(part: &Part) -> Result<()> {
        part.pieces.iter().try_for_each(|piece| piece.file.check_unchanged())
    }
}

fn files<P: AsRef<Path>>(paths: &[P]) -> Result<Vec<Arc<TokenFile>>> {
    ensure!(!paths.is_empty(), Error::option("tokens", "expected at least one file"));
    let files = paths.iter().map(|path| TokenFile::open(path).map(Arc::new)).try_collect_vec()?;
    same_vocabulary(files.iter())?;
    Ok(files)
}

fn same_vocabulary<'f>(files: impl Iterator<Item = &'f Arc<TokenFile>>) -> Result<()> {
    let mut known = files.filter_map(|file| Some((file, file.num_tokens()?)));
    let Some((_, first)) = known.next() else { return Ok(()) };
    match known.find(|&(_, other)| other != first) {
        None => Ok(()),
        Some((file, other)) => Err(Error::file(
            file.path(),
            format_args!("has a vocabulary of {other} tokens, expected {first} as in the other files"),
        )),
    }
}

impl BatchSource for TokenData {
    type Batch = TokenBatch;

    fn batch(&self, request: &BatchRequest) -> Result<TokenBatch> {
        self.check(request)?;
        Self::check_unchanged(&self.train)?;
        windows::batch(&self.train, request)
    }

    fn validation_batches(&self, request: &BatchRequest) -> Result<Vec<TokenBatch>> {
        self.check(request)?;
        Self::check_unchanged(&self.validation)?;
        windows::validation(&self.validation, request)
    }

    fn check(&self, request: &BatchRequest) -> Result<()> {
        windows::check([&self.train, &self.validation], request, "tokens", "tokens")?;
        let largest = self.pieces().filter_map(|piece| Some((&piece.file, piece.file.num_tokens()?))).next();
        if let Some((file, vocabulary)) = largest.filter(|&(_, vocabulary)| vocabulary > request.num_tokens as u64) {
            let why = format!(
                "has a vocabulary of {vocabulary} tokens, but the model has `num_tokens` {}; use at least as many",
                request.num_tokens
            );
            return Err(Error::file(file.path(), why));
        }
        let bordered = [&self.train, &self.validation].iter().all(|part| part.end_of_text.is_some());
        ensure!(
            bordered || !request.documents,
            Error::option("document_mask", "requires the token that begins each document, which the files do not say")
        );
        Ok(())
    }

    fn print(&self) -> Result<DataPrint> {
        let mut bytes = Vec::new();
        for piece in self.pieces() {
            let numbers = [piece.file.fingerprint()?, piece.start, piece.len];
            bytes.extend(numbers.iter().flat_map(|number| number.to_le_bytes()));
        }
        bytes.extend(self.train.len().to_le_bytes());
        Ok(DataPrint::new("tokens", self.train.len() + self.validation.len(), fnv1a(&bytes)))
    }

    fn bytes_per_token(&self) -> Option<f64> {
        let mut sums = (0, 0);
        for piece in &self.validation.pieces {
            sums = (sums.0 + piece.file.text_bytes()?, sums.1 + piece.file.len());
        }
        (sums.1 > 0).then(|| sums.0 as f64 / sums.1 as f64)
    }
}
