//! Examples: sequences that are rows of their own.

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

use super::{BatchRequest, BatchSource, DataPrint, Sequence, TokenBatch, shuffle::shuffled};
use crate::{
    Device, Error, Result, Shape, Tensor,
    collect::CollectVec,
    error::ensure,
    hash::{FNV1A_START, fnv1a_from},
};

/// Examples of tokens, each a row of its own: chats, instructions, or other texts of which only a part is a target.
///
/// A row is padded to the longest one of its batch with tokens that do not count, and cut to `seq_len + 1` tokens. Examples
/// without a target in these are left out. Each epoch has an order of its own, whatever
/// [`shuffle`](crate::train::TrainOptions::shuffle) says, and each target counts alike, in whichever row it is.
///
/// ```
/// use x_transformers::train::{BatchSource, Examples, Sequence, TrainOptions};
/// # fn main() -> x_transformers::Result<()> {
/// let chat = |question: &[i64], answer: &[i64]| Sequence {
///     tokens: [question, answer].concat(),
///     loss_mask: [vec![false; question.len()], vec![true; answer.len()]].concat(),
/// };
/// let source = Examples::new(
///     vec![chat(&[1, 2, 3], &[4]), chat(&[1, 5], &[6, 7, 8])],
///     vec![chat(&[2, 3], &[4])], // validation
/// )?;
/// let options = TrainOptions { batch_size: 2, seq_len: 10, ..Default::default() };
/// let batch = source.batch(&options.request(0, 0, 256))?;
/// assert_eq!(batch.tokens.shape(), [2, 5]);
/// # Ok(())
/// # }
/// ```
pub struct Examples {
    parts: [Vec<Sequence>; 2],
    chosen: Mutex<Option<Arc<Chosen>>>,
}

/// Examples that have a target, by their numbers, in each part.
struct Chosen {
    seq_len: usize,
    parts: [Vec<usize>; 2],
}

impl fmt::Debug for Examples {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [train, validation] = self.parts.each_ref().map(Vec::len);
        f.debug_struct("Examples").field("train", &train).field("validation", &validation).finish()
    }
}

impl Examples {
    /// Creates a source of examples to train and to validate on.
    ///
    /// Errors: a mask whose length is not that of the tokens, with the number of the example, from 1.
    pub fn new(train: Vec<Sequence>, validation: Vec<Sequence>) -> Result<Self> {
        let parts = [train, validation];
        for (part, name) in parts.iter().zip(["example", "validation example"]) {
            for (index, Sequence { tokens, loss_mask }) in part.iter().enumerate() {
                ensure!(
                    loss_mask.is_empty() || loss_mask.len() == tokens.len(),
                    Error::option(
                        "loss_mask",
                        format_args!(
                            "{name} {} has {} values, expected {}, one per token",
                            index + 1,
                            loss_mask.len(),
                            tokens.len()
                        )
                    )
                );
            }
        }
        Ok(Self { parts, chosen: Mutex::default() })
    }

    /// Returns the examples to train on, and those to validate on.
    pub fn parts(&self) -> [&[Sequence]; 2] {
        self.parts.each_ref().map(Vec::as_slice)
    }

    /// Returns the number of examples of which rows of `seq_len + 1` tokens cut something, and the number of those without
    /// a target then.
    pub fn cut(&self, seq_len: usize) -> (usize, usize) {
        let all = || self.parts.iter().flatten();
        let longer = |sequence: &&Sequence| sequence.tokens.len() > seq_len.saturating_add(1);
        (all().filter(longer).count(), all().filter(|sequence| !has_target(sequence, seq_len)).count())
    }

    fn chosen(&self, seq_len: usize) -> Arc<Chosen> {
        let mut chosen = self.chosen.lock().unwrap_or_else(PoisonError::into_inner);
        match &*chosen {
            Some(chosen) if chosen.seq_len == seq_len => Arc::clone(chosen),
            _ => {
                let of = |part: &Vec<Sequence>| {
                    (0..part.len()).filter(|&index| has_target(&part[index], seq_len)).collect_vec()
                };
                let new = Arc::new(Chosen { seq_len, parts: self.parts.each_ref().map(of) });
                *chosen = Some(Arc::clone(&new));
                new
            }
        }
    }

    /// Returns the batch of a list of examples.
    fn rows(&self, part: usize, numbers: &[usize], request: &BatchRequest) -> Result<TokenBatch> {
        let sequences = numbers.iter().map(|&number| &self.parts[part][number]).collect_vec();
        let most = request.seq_len.saturating_add(1);
        let width = sequences.iter().map(|sequence| sequence.tokens.len().min(most)).max().unwrap_or(0).max(2);
        let shape = Shape::new(&[sequences.len(), width])?;
        let (mut tokens, mut mask) = (vec![0; shape.numel()], vec![false; shape.numel()]);
        let limit = request.num_tokens as i64;
        for (row, sequence) in sequences.iter().enumerate() {
            let count = sequence.tokens.len().min(width);
            let kept = &sequence.tokens[..count];
            if let Some(token) = kept.iter().find(|token| !(0..limit).contains(*token)) {
                let why = format_args!(
                    "example {} has the token {token}, expected tokens in 0..{limit} (the model's vocabulary)",
                    numbers[row] + 1
                );
                return Err(Error::option("examples", why));
            }
            tokens[row * width..][..count].copy_from_slice(kept);
            for (at, counts) in mask[row * width..][..count].iter_mut().enumerate() {
                *counts = sequence.loss_mask.get(at).copied().unwrap_or(true);
            }
        }
        let mask = Tensor::from_vec(mask, shape, &Device::Cpu)?;
        let batch = TokenBatch::new(Tensor::from_vec(tokens, shape, &Device::Cpu)?)?.with_loss_mask(mask)?;
        Ok(batch.counting_rows_as(request.seq_len))
    }
}

/// Returns `true` if a token that counts is among the first `seq_len + 1`, and not the very first.
fn has_target(Sequence { tokens, loss_mask }: &Sequence, seq_len: usize) -> bool {
    let end = tokens.len().min(seq_len.saturating_add(1));
    if loss_mask.is_empty() { end > 1 } else { loss_mask.iter().take(end).skip(1).any(|&counts| counts) }
}

impl BatchSource for Examples {
    type Batch = TokenBatch;

    fn batch(&self, request: &BatchRequest) -> Result<TokenBatch> {
        self.check(request)?;
        let chosen = self.chosen(request.seq_len);
        let train = &chosen.parts[0];
        let count = train.len() as u64;
        let number = |row: u64| train[shuffled(request.seed, row / count, row % count, count) as usize];
        let numbers = (0..request.rows as u64).map(|row| number(request.first.wrapping_add(row))).collect_vec();
        self.rows(0, &numbers, request)
    }

    fn validation_batches(&self, request: &BatchRequest) -> Result<Vec<TokenBatch>> {
        self.check(request)?;
        let chosen = self.chosen(request.seq_len);
        chosen.parts[1].chunks(request.rows.max(1)).map(|numbers| self.rows(1, numbers, request)).try_collect_vec()
    }

    fn check(&self, request: &BatchRequest) -> Result<()> {
        let chosen = self.chosen(request.seq_len);
        for (part, purpose) in chosen.parts.iter().zip(["train", "validate"]) {
            ensure!(
                !part.is_empty(),
                Error::option(
                    "examples",
                    format_args!(
                        "none to {purpose} on has a target in its first {} tokens; use more data or a larger `seq_len`",
                        request.seq_len.saturating_add(1)
                    )
                )
            );
        }
        Ok(())
    }

    fn print(&self) -> Result<DataPrint> {
        let mut hash = FNV1A_START;
        for (part, Sequence { tokens, loss_mask }) in
            self.parts.iter().enumerate().flat_map(|(part, list)| list.iter().map(move |sequence| (part, sequence)))
        {
            hash = fnv1a_from(hash, &[part as u8]);
            hash = fnv1a_from(hash, &(tokens.len() as u64).to_le_bytes());
            for (at, token) in tokens.iter().enumerate() {
                let counts = loss_mask.get(at).copied().unwrap_or(true);
                hash = fnv1a_from(hash, &(token << 1 | i64::from(counts)).to_le_bytes());
            }
        }
        let size = self.parts.iter().map(Vec::len).sum::<usize>() as u64;
        Ok(DataPrint::new("examples", size, hash))
    }
}
