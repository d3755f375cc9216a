//! Batches, requests for them, and the trait of what they come from.

use std::{fmt, sync::Arc};

use serde::{Deserialize, Serialize};

use crate::{DType, Device, Error, Result, Tensor, collect::CollectVec, error::ensure};

/// Batch of a training step.
pub trait Batch: Send + Sized + 'static {
    /// Returns the batch on a device.
    ///
    /// Errors: out of memory.
    fn to_device(&self, device: &Device) -> Result<Self>;

    /// Returns the weight of the batch in a mean over batches: its number of rows, or less where targets are masked.
    fn weight(&self) -> f64;

    /// Returns the number of targets, for reports of speed: predicted tokens, or classified images.
    fn targets(&self) -> u64;

    /// Calls `f` with every tensor, in a fixed order, and returns `true` if losses depend on nothing else of the batch: then a
    /// recorded graph can take the tensors of another batch of the same shapes. Default: `false`, for steps that are not
    /// recorded.
    fn visit_tensors(&mut self, f: &mut dyn FnMut(&mut Tensor)) -> bool {
        let _ = f;
        false
    }

    /// Joins batches along their rows; rows of tokens are padded to the longest.
    ///
    /// Errors: an empty list; shapes that differ otherwise; out of memory.
    fn concat(parts: &[Self]) -> Result<Self>;
}

/// Request for a batch: a source returns the same batch for the same request, whatever was requested before. Therefore a
/// resumed run sees the data of an uninterrupted one.
///
/// ```
/// use x_transformers::{prelude::*, train::BatchSource};
/// # fn main() -> x_transformers::Result<()> {
/// let text = ByteText::from_bytes("to be or not to be, ".repeat(20))?;
/// let options = TrainOptions { batch_size: 4, seq_len: 16, ..Default::default() };
/// let batch = text.batch(&options.request(0, 0, 256))?; // step, micro-batch, vocabulary
/// assert_eq!(batch.tokens.shape(), [4, 17]);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BatchRequest {
    /// Seed of the run.
    pub seed: u64,
    /// Index of the step, from 0.
    pub step: u64,
    /// Index of the micro-batch in the step, from 0.
    pub micro: u64,
    /// Number of rows of all batches before this one.
    pub first: u64,
    /// Number of rows.
    pub rows: usize,
    /// Number of tokens that a row predicts, for sources of tokens.
    pub seq_len: usize,
    /// Size of the model's vocabulary, for sources of tokens.
    pub num_tokens: usize,
    /// If `true`, rows are taken in a random order, each once an epoch, instead of at random offsets.
    pub shuffle: bool,
    /// If `true`, batches say which document each token belongs to.
    pub documents: bool,
}

/// Source of the batches of a run.
///
/// Threads that prepare batches ahead of the step call it, so methods take `&self`.
pub trait BatchSource: Send + Sync {
    /// Type of the batches; a model trains on one type ([`TrainModel::Batch`](super::super::TrainModel::Batch)).
    type Batch: Batch;

    /// Returns the requested batch, on the CPU: a function of the request.
    ///
    /// Errors: data that cannot be read or do not fit the model, with the file and the position.
    fn batch(&self, request: &BatchRequest) -> Result<Self::Batch>;

    /// Returns the validation set as batches of at most `request.rows` rows; the step and the seed do not matter.
    ///
    /// Errors: those of [`BatchSource::batch`].
    fn validation_batches(&self, request: &BatchRequest) -> Result<Vec<Self::Batch>>;

    /// Calls `each` with every batch of [`BatchSource::validation_batches`], in their order. A source whose batches are large
    /// overrides it to hold one at a time; by default all are built first.
    ///
    /// Errors: those of [`BatchSource::batch`] and of `each`, which end it.
    fn each_validation_batch(
        &self,
        request: &BatchRequest,
        each: &mut dyn FnMut(Self::Batch) -> Result<()>,
    ) -> Result<()> {
        self.validation_batches(request)?.into_iter().try_for_each(each)
    }

    /// Checks, before a run starts or resumes, that all its requests can be met.
    ///
    /// Errors: [`ErrorKind::Option`](crate::ErrorKind::Option) for too few data or a vocabulary that is too small.
    fn check(&self, request: &BatchRequest) -> Result<()>;

    /// Returns what identifies the data: a run resumes only with the same.
    ///
    /// Errors: data that cannot be read.
    fn print(&self) -> Result<DataPrint>;

    /// Returns the number of bytes of text per token of the validation set, if it is known: losses are then shown in bits
    /// per byte too. Default `None`.
    fn bytes_per_token(&self) -> Option<f64> {
        None
    }

    /// Returns `true` if batches are fast only in the order of the steps; then one thread prepares them. Default `false`.
    fn in_order(&self) -> bool {
        false
    }
}

macro_rules! pointed {
    ($($pointer:ident)*) => {$(
        impl<S: BatchSource + ?Sized> BatchSource for $pointer<S> {
            type Batch = S::Batch;

            fn batch(&self, request: &BatchRequest) -> Result<S::Batch> {
                (**self).batch(request)
            }

            fn validation_batches(&self, request: &BatchRequest) -> Result<Vec<S::Batch>> {
                (**self).validation_batches(request)
            }

            fn each_validation_batch(&self, request: &BatchRequest, each: &mut dyn FnMut(S::Batch) -> Result<()>) -> Result<()> {
                (**self).each_validation_batch(request, each)
            }

            fn check(&self, request: &BatchRequest) -> Result<()> {
                (**self).check(request)
            }

            fn print(&self) -> Result<DataPrint> {
                (**self).print()
            }

            fn bytes_per_token(&self) -> Option<f64> {
                (**self).bytes_per_token()
            }

            fn in_order(&self) -> bool {
                (**self).in_order()
            }
        }
    )*};
}

pointed! { Arc Box }

/// Size and hash that identify the data of a run.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataPrint {
    /// Kind of the data, such as "text" or "tokens".
    #[serde(default = "text")]
    pub kind: String,
    /// Size: bytes of text, or number of tokens; 0 if unknown.
    #[serde(alias = "bytes")]
    pub size: u64,
    /// Hash in hexadecimal digits.
    pub fingerprint: String,
}

/// Returns the kind of checkpoints that do not name one.
fn text() -> String {
    "text".to_string()
}

impl DataPrint {
    /// Creates a print from a 64-bit hash.
    pub fn new(kind: impl Into<String>, size: u64, hash: u64) -> Self {
        Self { kind: kind.into(), size, fingerprint: format!("{hash:016x}") }
    }
}

impl fmt::Display for DataPrint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kind, size, fingerprint } = self;
        match (kind.as_str(), size) {
            ("text", _) => write!(f, "a text of {size} bytes (fingerprint {fingerprint})"),
            (_, 0) => write!(f, "{kind} (fingerprint {fingerprint})"),
            _ => write!(f, "{kind}, {size} (fingerprint {fingerprint})"),
        }
    }
}

/// Rows of tokens for a language model, which predicts each token from those before it.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct TokenBatch {
    /// Tokens, `[batch, n + 1]` I64.
    pub tokens: Tensor,
    /// Mask of the targets, `[batch, n + 1]` Bool: `true` marks a token that counts in the loss. The first column does not
    /// matter. Default: all count.
    pub loss_mask: Option<Tensor>,
    /// Documents of the tokens, `[batch, n + 1]` I64: attention stays within tokens of one number.
    pub documents: Option<Tensor>,
    /// Positions of the tokens in their documents, `[batch, n + 1]` I64, as far as the row has them.
    positions: Option<Tensor>,
    targets: u64,
    /// Number of targets of a row whose weight is 1.
    row_targets: usize,
}

/// Joins tensors `[rows, n]` along their rows, padded with 0 on the right to the widest.
pub(super) fn cat_padded(parts: &[&Tensor]) -> Result<Tensor> {
    let width = parts.iter().map(|part| part.shape()[1]).max().unwrap_or(0);
    let padded = parts.iter().map(|&part| {
        let [rows, own] = [part.dim(0)?, part.dim(1)?];
        if own == width {
            return Ok(part.clone());
        }
        let more = Tensor::full([rows, width - own], 0.0, part.dtype(), part.device())?;
        Tensor::cat(&[part, &more], 1)
    });
    let padded: Vec<Tensor> = padded.try_collect_vec()?;
    Tensor::cat(&padded.iter().collect_vec(), 0)
}

impl TokenBatch {
    /// Creates a batch of rows that all count.
    ///
    /// Errors: tokens that are not I64 `[batch, n + 1]` with an `n` of at least 1.
    pub fn new(tokens: Tensor) -> Result<Self> {
        ensure!(
            tokens.dtype() == DType::I64 && tokens.rank() == 2 && tokens.shape()[1] >= 2,
            Error::shape(
                "batch",
                format_args!(
                    "expected I64 tokens [batch, n] with n of at least 2, got {:?} {}",
                    tokens.shape(),
                    tokens.dtype()
                )
            )
        );
        let row_targets = tokens.shape()[1] - 1;
        let targets = (tokens.shape()[0] * row_targets) as u64;
        Ok(Self { tokens, loss_mask: None, documents: None, positions: None, targets, row_targets })
    }

    /// Sets the mask of the targets, `[batch, n + 1]` Bool on the CPU.
    ///
    /// Errors: a mask of another shape or type, or on a GPU.
    pub fn with_loss_mask(mut self, mask: Tensor) -> Result<Self> {
        self.same_shape("loss_mask", &mask)?;
        let width = mask.shape()[1];
        let counted = |row: &[bool]| row[1..].iter().filter(|&&counts| counts).count() as u64;
        self.targets = mask.to_vec::<bool>()?.chunks_exact(width).map(counted).sum();
        self.loss_mask = Some(mask);
        Ok(self)
    }

    /// Sets the documents of the tokens, `[batch, n + 1]` I64.
    ///
    /// Errors: another shape or type.
    pub fn with_documents(mut self, documents: Tensor) -> Result<Self> {
        self.same_shape("documents", &documents)?;
        ensure!(
            documents.dtype() == DType::I64,
            Error::dtype("documents", format_args!("expected i64, got {}", documents.dtype()))
        );
        let (shape, width) = (*documents.shape(), documents.shape()[1]);
        let mut positions = documents.to_vec::<i64>()?;
        for row in positions.chunks_exact_mut(width) {
            let (mut document, mut position) = (row[0], 0);
            for value in row {
                position = if *value == document { position } else { 0 };
                document = std::mem::replace(value, position);
                position += 1;
            }
        }
        self.positions = Some(Tensor::from_vec(positions, shape, documents.device())?);
        self.documents = Some(documents);
        Ok(self)
    }

    /// Returns the positions of the tokens in their documents, `[batch, n + 1]` I64.
    pub(in super::super) fn positions(&self) -> Option<&Tensor> {
        self.positions.as_ref()
    }

    /// Sets the number of targets of a row whose weight is 1: the same for batches of different widths makes each of their
    /// targets count alike.
    pub(super) fn counting_rows_as(self, row_targets: usize) -> Self {
        Self { row_targets: row_targets.max(1), ..self }
    }

    fn same_shape(&self, name: &'static str, other: &Tensor) -> Result<()> {
        ensure!(
            other.shape() == self.tokens.shape(),
            Error::shape(
                name,
                format_args!("expected {:?}, the shape of the tokens, got {:?}", self.tokens.shape(), other.shape())
            )
        );
        Ok(())
    }
}

impl Batch for TokenBatch {
    fn to_device(&self, device: &Device) -> Result<Self> {
        let moved = |tensor: &Option<Tensor>| tensor.as_ref().map(|tensor| tensor.to_device(device)).transpose();
        Ok(Self {
            tokens: self.tokens.to_device(device)?,
            loss_mask: moved(&self.loss_mask)?,
            documents: moved(&self.documents)?,
            positions: moved(&self.positions)?,
            targets: self.targets,
            row_targets: self.row_targets,
        })
    }

    fn weight(&self) -> f64 {
        // Exactly the number of rows if all targets count.
        self.targets as f64 / self.row_targets as f64
    }

    fn targets(&self) -> u64 {
        self.targets
    }

    fn visit_tensors(&mut self, f: &mut dyn FnMut(&mut Tensor)) -> bool {
        let Self { tokens, loss_mask, documents, positions, .. } = self;
        f(tokens);
        [loss_mask, documents, positions].into_iter().flatten().for_each(f);
        true
    }

    fn concat(parts: &[Self]) -> Result<Self> {
        if let [one] = parts {
            return Ok(one.clone());
        }
        let joined = |of: &dyn Fn(&Self) -> Result<Option<Tensor>>| {
            let tensors = parts.iter().map(of).try_collect_vec()?;
            let present: Vec<&Tensor> = tensors.iter().flatten().collect();
            if present.is_empty() { Ok(None) } else { cat_padded(&present).map(Some) }
        };
        // Parts without a mask count wholly, their padding does not; documents need only differ within a row.
        let any = |of: &dyn Fn(&Self) -> bool| parts.iter().any(of);
        let narrower = any(&|part| part.tokens.shape()[1] != parts[0].tokens.shape()[1]);
        let masked = narrower || any(&|part| part.loss_mask.is_some());
        let bordered = any(&|part| part.documents.is_some());
        let tokens = joined(&|part| Ok(Some(part.tokens.clone())))?;
        let or_else = |tensor: &Option<Tensor>, part: &Self, wanted: bool, value: f64, dtype: DType| {
            let device = part.tokens.device();
            match tensor {
                Some(tensor) => Ok(Some(tensor.clone())),
                None if wanted => Tensor::full(*part.tokens.shape(), value, dtype, device).map(Some),
                None => Ok(None),
            }
        };
        let loss_mask = joined(&|part| or_else(&part.loss_mask, part, masked, 1.0, DType::Bool))?;
        let documents = joined(&|part| or_else(&part.documents, part, bordered, 0.0, DType::I64))?;
        let tokens = tokens.ok_or_else(|| Error::argument("batch", "expected at least one part, got none"))?;
        let targets = parts.iter().map(|part| part.targets).sum();
        let row_targets = parts.iter().map(|part| part.row_targets).max().unwrap_or(1);
        let joined = Self { tokens, loss_mask, documents: None, positions: None, targets, row_targets };
        match documents {
            Some(documents) => joined.with_documents(documents),
            None => Ok(joined),
        }
    }
}
