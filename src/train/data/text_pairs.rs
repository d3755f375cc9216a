//! Pairs of sequences: a source, and the target that a model with an encoder makes of it.

use std::fmt;

use super::{Batch, BatchRequest, BatchSource, DataPrint, TokenBatch, batch::cat_padded, labelled_images::places};
use crate::{
    Device, Error, Result, Shape, Tensor,
    collect::CollectVec,
    error::ensure,
    hash::{FNV1A_START, fnv1a_from},
};

/// Source and target as tokens.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Pair {
    /// Tokens that the encoder reads.
    pub source: Vec<i64>,
    /// Tokens that the decoder predicts.
    pub target: Vec<i64>,
}

/// Pairs as a batch, padded on the right.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct PairBatch {
    /// Tokens of the sources, `[b, n]` I64.
    pub source: Tensor,
    /// Padding mask of the sources, `[b, n]` Bool; `true` marks a real token.
    pub source_mask: Tensor,
    /// The targets, which begin and end with the border, and the mask of those that count.
    pub target: TokenBatch,
}

impl Batch for PairBatch {
    fn to_device(&self, device: &Device) -> Result<Self> {
        let [source, source_mask] = [&self.source, &self.source_mask].map(|tensor| tensor.to_device(device));
        Ok(Self { source: source?, source_mask: source_mask?, target: self.target.to_device(device)? })
    }

    fn weight(&self) -> f64 {
        self.target.weight()
    }

    fn targets(&self) -> u64 {
        self.target.targets()
    }

    fn visit_tensors(&mut self, f: &mut dyn FnMut(&mut Tensor)) -> bool {
        f(&mut self.source);
        f(&mut self.source_mask);
        self.target.visit_tensors(f)
    }

    fn concat(parts: &[Self]) -> Result<Self> {
        let joined = |of: &dyn Fn(&Self) -> &Tensor| cat_padded(&parts.iter().map(of).collect_vec());
        let targets = parts.iter().map(|part| part.target.clone()).collect_vec();
        Ok(Self {
            source: joined(&|part| &part.source)?,
            source_mask: joined(&|part| &part.source_mask)?,
            target: TokenBatch::concat(&targets)?,
        })
    }
}

/// Returns rows of tokens padded with 0 on the right, each cut to `longest`, and the mask of what is not padding.
fn padded(rows: &[&[i64]], longest: usize) -> Result<[Tensor; 2]> {
    let width = rows.iter().map(|row| row.len().min(longest)).max().unwrap_or(0).max(1);
    let shape = Shape::new(&[rows.len(), width])?;
    let (mut tokens, mut mask) = (vec![0; shape.numel()], vec![false; shape.numel()]);
    for (at, row) in rows.iter().enumerate() {
        let count = row.len().min(width);
        tokens[at * width..][..count].copy_from_slice(&row[..count]);
        mask[at * width..][..count].fill(true);
    }
    Ok([Tensor::from_vec(tokens, shape, &Device::Cpu)?, Tensor::from_vec(mask, shape, &Device::Cpu)?])
}

/// Returns targets between borders, of which `seq_len` tokens are predicted at most.
pub(super) fn targets(rows: &[&[i64]], border: i64, seq_len: usize) -> Result<TokenBatch> {
    let bordered = rows.iter().map(|row| [&[border][..], row, &[border]].concat()).collect_vec();
    let rows = bordered.iter().map(Vec::as_slice).collect_vec();
    let [tokens, mask] = padded(&rows, seq_len.saturating_add(1))?;
    Ok(TokenBatch::new(tokens)?.with_loss_mask(mask)?.counting_rows_as(seq_len))
}

/// Pairs of sequences, each a row: padded to the longest of its batch and cut to `seq_len` tokens, in an order of its own in each
/// epoch. Each target counts alike, in whichever row it is.
///
/// ```
/// use x_transformers::train::{BatchSource, Pair, Pairs, TrainOptions};
/// # fn main() -> x_transformers::Result<()> {
/// let pair = |source: &[i64], target: &[i64]| Pair { source: source.to_vec(), target: target.to_vec() };
/// let pairs = vec![pair(&[4, 5, 6], &[6, 5, 4]), pair(&[7], &[7])];
/// let source = Pairs::new(pairs.clone(), pairs, 0)?; // to train, to validate, token before and after a target
/// let options = TrainOptions { batch_size: 2, seq_len: 16, ..Default::default() };
/// let batch = source.batch(&options.request(0, 0, 40))?;
/// assert_eq!((batch.source.shape()[1], batch.target.tokens.shape()[1]), (3, 5));
/// # Ok(())
/// # }
/// ```
pub struct Pairs {
    parts: [Vec<Pair>; 2],
    border: i64,
}

impl fmt::Debug for Pairs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [train, validation] = self.parts.each_ref().map(Vec::len);
        f.debug_struct("Pairs").field("train", &train).field("validation", &validation).finish()
    }
}

impl Pairs {
    /// Creates a source of pairs to train and to validate on. The token `border` is put before each target, where the decoder
    /// begins, and after it, where it ends.
    ///
    /// Errors: no pairs; a pair without a source or a target, with its number, from 1.
    pub fn new(train: Vec<Pair>, validation: Vec<Pair>, border: i64) -> Result<Self> {
        let parts = [train, validation];
        for (part, name) in parts.iter().zip(["pair", "validation pair"]) {
            ensure!(!part.is_empty(), Error::option("pairs", format_args!("expected at least one {name}, got none")));
            if let Some(at) = part.iter().position(|pair| pair.source.is_empty() || pair.target.is_empty()) {
                return Err(Error::option("pairs", format_args!("{name} {} has an empty source or target", at + 1)));
            }
        }
        Ok(Self { parts, border })
    }

    /// Returns the pairs to train on, and those to validate on.
    pub fn parts(&self) -> [&[Pair]; 2] {
        self.parts.each_ref().map(Vec::as_slice)
    }

    /// Returns the token before and after each target.
    pub fn border(&self) -> i64 {
        self.border
    }

    /// Returns the number of pairs of which rows of `seq_len` tokens cut something.
    pub fn cut(&self, seq_len: usize) -> usize {
        let longer = |pair: &&Pair| pair.source.len() > seq_len || pair.target.len() >= seq_len;
        self.parts.iter().flatten().filter(longer).count()
    }

    fn of(&self, pairs: &[&Pair], request: &BatchRequest) -> Result<PairBatch> {
        let side = |of: fn(&Pair) -> &[i64]| pairs.iter().map(|pair| of(pair)).collect_vec();
        let [source, source_mask] = padded(&side(|pair| &pair.source), request.seq_len)?;
        let target = targets(&side(|pair| &pair.target), self.border, request.seq_len)?;
        Ok(PairBatch { source, source_mask, target })
    }
}

/// Checks that the model has all tokens of the rows of a part.
pub(super) fn check_tokens<'r>(
    rows: impl Iterator<Item = &'r [i64]>,
    request: &BatchRequest,
    what: &str,
) -> Result<()> {
    let limit = request.num_tokens as i64;
    for (row, number) in rows.zip(1..) {
        if let Some(token) = row.iter().find(|token| !(0..limit).contains(*token)) {
            let why = format_args!(
                "{what} {number} has the token {token}, expected tokens in 0..{limit} (the model's vocabulary)"
            );
            return Err(Error::option("tokens", why));
        }
    }
    Ok(())
}

impl BatchSource for Pairs {
    type Batch = PairBatch;

    fn batch(&self, request: &BatchRequest) -> Result<PairBatch> {
        let train = &self.parts[0];
        let pairs = places(request, train.len()).into_iter().map(|place| &train[place]).collect_vec();
        self.of(&pairs, request)
    }

    fn validation_batches(&self, request: &BatchRequest) -> Result<Vec<PairBatch>> {
        let part = |pairs: &[Pair]| self.of(&pairs.iter().collect_vec(), request);
        self.parts[1].chunks(request.rows.max(1)).map(part).try_collect_vec()
    }

    fn check(&self, request: &BatchRequest) -> Result<()> {
        check_tokens([&[self.border][..]].into_iter(), request, "border")?;
        for (part, name) in self.parts.iter().zip(["pair", "validation pair"]) {
            check_tokens(part.iter().map(|pair| &pair.source[..]), request, &format!("the source of {name}"))?;
            check_tokens(part.iter().map(|pair| &pair.target[..]), request, &format!("the target of {name}"))?;
        }
        Ok(())
    }

    fn print(&self) -> Result<DataPrint> {
        let mut hash = fnv1a_from(FNV1A_START, &self.border.to_le_bytes());
        for (part, pairs) in self.parts.iter().enumerate() {
            for Pair { source, target } in pairs {
                for word in [part, source.len(), target.len()] {
                    hash = fnv1a_from(hash, &(word as u64).to_le_bytes());
                }
                for token in source.iter().chain(target) {
                    hash = fnv1a_from(hash, &token.to_le_bytes());
                }
            }
        }
        Ok(DataPrint::new("pairs", self.parts.iter().map(Vec::len).sum::<usize>() as u64, hash))
    }
}
