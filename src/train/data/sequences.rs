//! Sequences of tokens from any iterator, packed into rows.

use std::{
    collections::VecDeque,
    fmt,
    sync::{Mutex, PoisonError},
};

use super::{BatchRequest, BatchSource, DataPrint, TokenBatch};
use crate::{Device, Error, Result, Shape, Tensor, collect::CollectVec, error::ensure, hash::fnv1a};

/// Document of tokens, and which of them count in the loss.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Sequence {
    /// Tokens.
    pub tokens: Vec<i64>,
    /// `true` for each token that counts in the loss; empty if all count.
    pub loss_mask: Vec<bool>,
}

impl From<Vec<i64>> for Sequence {
    /// Creates a sequence whose tokens all count.
    fn from(tokens: Vec<i64>) -> Self {
        Self { tokens, loss_mask: Vec::new() }
    }
}

type Epoch = Box<dyn Iterator<Item = Result<Sequence>> + Send>;

/// Sequences of an iterator, one after the other, packed into rows of `seq_len + 1` tokens; a row begins with the last token
/// of the one before it. When the iterator ends, the next epoch begins.
///
/// The order is that of the iterator, which may depend on the number of the epoch. A resumed run takes a new iterator and
/// skips what was taken before, so the iterator must give the same sequences again.
///
/// ```
/// use x_transformers::train::{BatchSource, Sequences, TrainOptions};
/// # fn main() -> x_transformers::Result<()> {
/// let lines = ["it was the best of times", "it was the worst of times"];
/// let tokens = |line: &str| line.bytes().map(i64::from).collect::<Vec<_>>();
/// let source = Sequences::new(
///     "dickens 1", // identifies the data for a resumed run
///     move |_epoch| lines.into_iter().map(move |line| Ok(tokens(line).into())),
///     vec![tokens("it was the age of wisdom").into()], // validation
/// );
/// let options = TrainOptions { batch_size: 2, seq_len: 10, ..Default::default() };
/// let batch = source.batch(&options.request(0, 0, 256))?;
/// assert_eq!(batch.tokens.to_vec::<i64>()?[..11], tokens("it was the best")[..11]);
/// # Ok(())
/// # }
/// ```
pub struct Sequences {
    name: String,
    make: Box<dyn Fn(u64) -> Epoch + Send + Sync>,
    validation: Vec<Sequence>,
    stream: Mutex<Stream>,
}

/// Tokens of an epoch's iterator, as far as they were taken.
#[derive(Default)]
struct Stream {
    iterator: Option<Epoch>,
    /// Number of epochs that were begun.
    epochs: u64,
    /// Number of sequences of this epoch.
    sequences: u64,
    tokens: VecDeque<Token>,
    /// Number of tokens that were removed from the front.
    before: u64,
    documents: i64,
}

#[derive(Clone, Copy)]
struct Token {
    id: i64,
    counts: bool,
    document: i64,
}

impl fmt::Debug for Sequences {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sequences").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Sequences {
    /// Creates a source from a function that returns the iterator of an epoch, and the sequences to validate on. `name`
    /// identifies the data: change it when they change.
    pub fn new<I>(
        name: impl Into<String>,
        make: impl Fn(u64) -> I + Send + Sync + 'static,
        validation: Vec<Sequence>,
    ) -> Self
    where
        I: IntoIterator<Item = Result<Sequence>>,
        I::IntoIter: Send + 'static,
    {
        let make = Box::new(move |epoch| Box::new(make(epoch).into_iter()) as Epoch);
        Self { name: name.into(), make, validation, stream: Mutex::default() }
    }
}

impl Stream {
    /// Makes tokens up to `end`, counted from the first of all, available.
    fn fill(&mut self, end: u64, make: &dyn Fn(u64) -> Epoch) -> Result<()> {
        while self.before + (self.tokens.len() as u64) < end {
            let (epochs, sequences) = (&mut self.epochs, &mut self.sequences);
            let next = self.iterator.get_or_insert_with(|| {
                *epochs += 1;
                *sequences = 0;
                make(*epochs - 1)
            });
            let Some(sequence) = next.next() else {
                ensure!(
                    self.sequences > 0,
                    Error::option("sequences", format_args!("epoch {} has no sequences", self.epochs))
                );
                self.iterator = None;
                continue;
            };
            self.sequences += 1;
            let place = format_args!("sequence {} of epoch {}", self.sequences, self.epochs).to_string();
            self.push(&sequence.map_err(|error| error.context(&place))?).map_err(|error| error.context(place))?;
        }
        Ok(())
    }

    fn push(&mut self, sequence: &Sequence) -> Result<()> {
        let Sequence { tokens, loss_mask } = sequence;
        ensure!(
            loss_mask.is_empty() || loss_mask.len() == tokens.len(),
            Error::option(
                "loss_mask",
                format_args!("expected {} values, one per token, got {}", tokens.len(), loss_mask.len())
            )
        );
        ensure!(!tokens.is_empty(), Error::option("sequences", "expected at least one token, got none"));
        self.documents += 1;
        let document = self.documents;
        let token = |(index, &id)| Token { id, counts: loss_mask.get(index).copied().unwrap_or(true), document };
        self.tokens.extend(tokens.iter().enumerate().map(token));
        Ok(())
    }

    /// Drops tokens before `start`, counted from the first of all.
    fn skip(&mut self, start: u64, make: &dyn Fn(u64) -> Epoch) -> Result<()> {
        loop {
            let count = (start - self.before).min(self.tokens.len() as u64);
            self.tokens.drain(..count as usize);
            self.before += count;
            if self.before == start {
                return Ok(());
            }
            self.fill(self.before + 1, make)?;
        }
    }
}

/// Returns rows of `seq_len + 1` tokens that overlap by one.
fn rows(tokens: &mut dyn FnMut(usize) -> Token, count: usize, request: &BatchRequest) -> Result<TokenBatch> {
    let (seq_len, width) = (request.seq_len, request.seq_len + 1);
    let shape = Shape::new(&[count, width])?;
    let all = (0..count * width).map(|at| tokens(at / width * seq_len + at % width)).collect_vec();
    let limit = request.num_tokens as i64;
    if let Some(token) = all.iter().find(|token| !(0..limit).contains(&token.id)) {
        let why = format!("expected tokens in 0..{limit} (the model's vocabulary), got {}", token.id);
        return Err(Error::option("sequences", why));
    }
    let tensor = |values: Vec<i64>| Tensor::from_vec(values, shape, &Device::Cpu);
    let mut batch = TokenBatch::new(tensor(all.iter().map(|token| token.id).collect_vec())?)?;
    // With borders, the first token of a document follows nothing.
    let first = |at: usize| request.documents && !at.is_multiple_of(width) && all[at].document != all[at - 1].document;
    if all.iter().any(|token| !token.counts) || (0..all.len()).any(first) {
        let mask = (0..all.len()).map(|at| all[at].counts && !first(at)).collect_vec();
        batch = batch.with_loss_mask(Tensor::from_vec(mask, shape, &Device::Cpu)?)?;
    }
    if request.documents {
        batch = batch.with_documents(tensor(all.iter().map(|token| token.document).collect_vec())?)?;
    }
    Ok(batch)
}

impl BatchSource for Sequences {
    type Batch = TokenBatch;

    fn batch(&self, request: &BatchRequest) -> Result<TokenBatch> {
        self.check(request)?;
        let start = request.first * request.seq_len as u64;
        let count = request.rows as u64 * request.seq_len as u64 + 1;
        let mut stream = self.stream.lock().unwrap_or_else(PoisonError::into_inner);
        if start < stream.before {
            *stream = Stream::default();
        }
        let filled = stream.skip(start, &*self.make).and_then(|()| stream.fill(start + count, &*self.make));
        if let Err(error) = filled {
            // What comes after an error of an iterator is not known.
            *stream = Stream::default();
            return Err(error);
        }
        rows(&mut |at| stream.tokens[at], request.rows, request)
    }

    fn validation_batches(&self, request: &BatchRequest) -> Result<Vec<TokenBatch>> {
        self.check(request)?;
        let mut stream = Stream::default();
        for (index, sequence) in self.validation.iter().enumerate() {
            stream.push(sequence).map_err(|error| error.context(format_args!("validation sequence {}", index + 1)))?;
        }
        let count = (stream.tokens.len() - 1) / request.seq_len;
        let part = |first: usize| {
            let mut token = |at: usize| stream.tokens[first * request.seq_len + at];
            rows(&mut token, request.rows.min(count - first), request)
        };
        (0..count).step_by(request.rows.max(1)).map(part).try_collect_vec()
    }

    fn check(&self, request: &BatchRequest) -> Result<()> {
        ensure!(
            !request.shuffle,
            Error::option("shuffle", "cannot be used with sequences of an iterator, which have an order of their own")
        );
        let tokens: usize = self.validation.iter().map(|sequence| sequence.tokens.len()).sum();
        ensure!(
            tokens > request.seq_len,
            Error::option(
                "sequences",
                format_args!(
                    "{tokens} tokens to validate on are too few for rows of {} tokens; use more or a smaller `seq_len`",
                    request.seq_len.saturating_add(1)
                )
            )
        );
        Ok(())
    }

    fn print(&self) -> Result<DataPrint> {
        Ok(DataPrint::new("sequences", 0, fnv1a(self.name.as_bytes())))
    }

    fn in_order(&self) -> bool {
        true
    }
}
