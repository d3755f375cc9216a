//! Masked tokens, which a model predicts from those around them.

use std::fmt;

use super::{Batch, BatchRequest, BatchSource, DataPrint, TokenBatch};
use crate::{
    DType, Device, Error, Philox, Result, Tensor,
    collect::CollectVec,
    error::ensure,
    hash::fnv1a_from,
    train::random::{Purpose, stream},
};

/// Batch of rows of which some tokens are masked.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct MaskedBatch {
    /// Tokens, of which some are replaced, `[batch, n]` I64.
    pub tokens: Tensor,
    /// Positions of the targets in the rows one after the other, `[targets]` I64.
    pub positions: Tensor,
    /// Targets: the tokens at these positions before, `[targets]` I64.
    pub labels: Tensor,
}

impl MaskedBatch {
    /// Creates a batch.
    ///
    /// Errors: shapes or types other than those of the fields.
    pub fn new(tokens: Tensor, positions: Tensor, labels: Tensor) -> Result<Self> {
        ensure!(
            tokens.rank() == 2
                && positions.rank() == 1
                && positions.shape() == labels.shape()
                && [&tokens, &positions, &labels].iter().all(|tensor| tensor.dtype() == DType::I64),
            Error::shape(
                "batch",
                format_args!(
                    "expected I64 tokens [batch, n], positions [targets] and labels [targets], got {:?}, {:?} and {:?}",
                    tokens.shape(),
                    positions.shape(),
                    labels.shape()
                )
            )
        );
        Ok(Self { tokens, positions, labels })
    }
}

impl Batch for MaskedBatch {
    fn to_device(&self, device: &Device) -> Result<Self> {
        let [tokens, positions, labels] =
            [&self.tokens, &self.positions, &self.labels].map(|tensor| tensor.to_device(device));
        Ok(Self { tokens: tokens?, positions: positions?, labels: labels? })
    }

    fn weight(&self) -> f64 {
        // Each target counts alike, in whichever batch it is; a row of which all tokens are targets has the weight 1.
        self.labels.numel() as f64 / self.tokens.shape()[1].max(1) as f64
    }

    fn targets(&self) -> u64 {
        self.labels.numel() as u64
    }

    fn visit_tensors(&mut self, f: &mut dyn FnMut(&mut Tensor)) -> bool {
        [&mut self.tokens, &mut self.positions, &mut self.labels].into_iter().for_each(f);
        true
    }

    fn concat(parts: &[Self]) -> Result<Self> {
        let mut before = 0;
        let mut positions = Vec::new();
        for part in parts {
            positions.push(part.positions.add(&Tensor::full(
                (),
                before as f64,
                DType::I64,
                part.positions.device(),
            )?)?);
            before += part.tokens.numel();
        }
        let cat = |of: &dyn Fn(&Self) -> &Tensor| Tensor::cat(&parts.iter().map(of).collect_vec(), 0);
        Self::new(
            cat(&|part| &part.tokens)?,
            Tensor::cat(&positions.iter().collect_vec(), 0)?,
            cat(&|part| &part.labels)?,
        )
    }
}

/// Rows of another source with masked tokens, as `DataCollatorForLanguageModeling` of `transformers` masks them: each token
/// that is not special is a target with a probability of 15 %; of these 80 % are replaced by the mask token, 10 % by a random
/// token, and 10 % stay. A batch without a target gets one.
///
/// A row has `seq_len` tokens. Batches depend on seed, step and micro-batch; those of the validation do not.
///
/// ```
/// use x_transformers::{prelude::*, train::{BatchSource, Masked}};
/// # fn main() -> x_transformers::Result<()> {
/// let text = ByteText::from_bytes("to be or not to be, ".repeat(20))?;
/// let source = Masked::new(text, 256, vec![])?; // the mask token, and special ones
/// let options = TrainOptions { batch_size: 4, seq_len: 16, ..Default::default() };
/// let batch = source.batch(&options.request(0, 0, 257))?;
/// assert_eq!(batch.tokens.shape(), [4, 16]);
/// assert_eq!(batch.positions.shape(), batch.labels.shape());
/// # Ok(())
/// # }
/// ```
#[doc(alias = "DataCollatorForLanguageModeling")]
pub struct Masked<S> {
    source: S,
    mask_token: i64,
    special: Vec<i64>,
    /// Probability that a token is a target.
    probability: f64,
}

impl<S> fmt::Debug for Masked<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Masked")
            .field("mask_token", &self.mask_token)
            .field("probability", &self.probability)
            .finish_non_exhaustive()
    }
}

impl<S: BatchSource<Batch = TokenBatch>> Masked<S> {
    /// Masks the rows of a source; `special` tokens are never targets.
    ///
    /// Errors: a mask token below 0.
    pub fn new(source: S, mask_token: i64, special: Vec<i64>) -> Result<Self> {
        ensure!(mask_token >= 0, Error::option("mask_token", format_args!("expected at least 0, got {mask_token}")));
        Ok(Self { source, mask_token, special, probability: 0.15 })
    }

    /// Sets the probability that a token is a target. Default 0.15.
    ///
    /// Errors: a probability that is not above 0 and below 1.
    pub fn with_probability(self, probability: f64) -> Result<Self> {
        ensure!(
            probability > 0.0 && probability < 1.0,
            Error::option("mask_probability", format_args!("expected above 0 and below 1, got {probability}"))
        );
        Ok(Self { probability, ..self })
    }

    /// Returns the request to the source, whose rows have a token more than they predict.
    fn inner(request: &BatchRequest) -> Result<BatchRequest> {
        ensure!(
            request.seq_len >= 2,
            Error::option("seq_len", format_args!("expected at least 2 for masked tokens, got {}", request.seq_len))
        );
        Ok(BatchRequest { seq_len: request.seq_len - 1, ..*request })
    }

    fn masked(&self, batch: &TokenBatch, random: Philox, num_tokens: usize) -> Result<MaskedBatch> {
        ensure!(
            batch.loss_mask.is_none(),
            Error::argument("masked", "expected rows of tokens that all count, got chats or padded rows")
        );
        let mut tokens = batch.tokens.to_vec::<i64>()?;
        let may = |token: i64| token != self.mask_token && !self.special.contains(&token);
        let (mut positions, mut labels) = (Vec::new(), Vec::new());
        let mut targets = Vec::new();
        for (at, &token) in tokens.iter().enumerate() {
            // Three numbers for each token: is it a target, what happens to it, and the token in its place.
            if random.uniform(3 * at as u64) < self.probability && may(token) {
                targets.push(at);
            }
        }
        if targets.is_empty() {
            let possible = (0..tokens.len()).filter(|&at| may(tokens[at])).collect_vec();
            if !possible.is_empty() {
                targets.push(possible[random.below(3 * tokens.len() as u64, possible.len() as u64) as usize]);
            }
        }
        for at in targets {
            positions.push(at as i64);
            labels.push(tokens[at]);
            let kind = random.uniform(3 * at as u64 + 1);
            if kind < 0.8 {
                tokens[at] = self.mask_token;
            } else if kind < 0.9 {
                tokens[at] = random.below(3 * at as u64 + 2, num_tokens as u64) as i64;
            }
        }
        let count = [labels.len()];
        let tensor = |values: Vec<i64>| Tensor::from_vec(values, count, &Device::Cpu);
        let tokens = Tensor::from_vec(tokens, *batch.tokens.shape(), &Device::Cpu)?;
        MaskedBatch::new(tokens, tensor(positions)?, tensor(labels)?)
    }
}

impl<S: BatchSource<Batch = TokenBatch>> BatchSource for Masked<S> {
    type Batch = MaskedBatch;

    fn batch(&self, request: &BatchRequest) -> Result<MaskedBatch> {
        let random = Philox::new(request.seed, stream(Purpose::Mask, request.step, request.micro));
        self.masked(&self.source.batch(&Self::inner(request)?)?, random, request.num_tokens)
    }

    fn validation_batches(&self, request: &BatchRequest) -> Result<Vec<MaskedBatch>> {
        let batches = self.source.validation_batches(&Self::inner(request)?)?;
        let random = |index: u64| Philox::new(0, stream(Purpose::ValidationMask, index, 0));
        batches
            .iter()
            .zip(0..)
            .map(|(batch, index)| self.masked(batch, random(index), request.num_tokens))
            .try_collect_vec()
    }

    fn check(&self, request: &BatchRequest) -> Result<()> {
        ensure!(
            self.mask_token < request.num_tokens as i64,
            Error::option(
                "mask_token",
                format_args!(
                    "expected a token of the model's vocabulary of {}, got {}",
                    request.num_tokens, self.mask_token
                )
            )
        );
        self.source.check(&Self::inner(request)?)
    }

    fn print(&self) -> Result<DataPrint> {
        let DataPrint { kind, size, fingerprint } = self.source.print()?;
        let mut hash = fnv1a_from(crate::hash::FNV1A_START, fingerprint.as_bytes());
        for word in [self.mask_token as u64, self.probability.to_bits()]
            .into_iter()
            .chain(self.special.iter().map(|&token| token as u64))
        {
            hash = fnv1a_from(hash, &word.to_le_bytes());
        }
        Ok(DataPrint::new(kind, size, hash))
    }

    fn in_order(&self) -> bool {
        self.source.in_order()
    }
}
