//! Texts with labels: rows of tokens that a classifier or a regression predicts a value of.

use std::fmt;

use super::{Batch, BatchRequest, BatchSource, DataPrint, batch::cat_padded, shuffle::shuffled};
use crate::{
    DType, Device, Error, Result, Shape, Tensor,
    collect::CollectVec,
    error::ensure,
    hash::{FNV1A_START, fnv1a_from},
};

/// Value that a text has.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Label {
    /// Index of a class.
    Class(usize),
    /// Number, for a regression.
    Value(f64),
}

/// Text as tokens, and its label.
#[derive(Clone, PartialEq, Debug)]
pub struct LabelledText {
    /// Tokens, with those that the model expects around a text.
    pub tokens: Vec<i64>,
    /// Label.
    pub label: Label,
}

/// Texts with labels as a batch: padded on the right, with a mask.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct LabelledBatch {
    /// Tokens, `[batch, n]` I64.
    pub tokens: Tensor,
    /// Padding mask, `[batch, n]` Bool; `true` marks a real token.
    pub mask: Tensor,
    /// Classes, `[batch]` I64, or values, `[batch]` F32.
    pub labels: Tensor,
}

impl LabelledBatch {
    /// Creates a batch.
    ///
    /// Errors: shapes or types other than those of the fields.
    pub fn new(tokens: Tensor, mask: Tensor, labels: Tensor) -> Result<Self> {
        let types = [(&tokens, DType::I64), (&mask, DType::Bool)];
        ensure!(
            types.iter().all(|(tensor, dtype)| tensor.rank() == 2 && tensor.dtype() == *dtype)
                && tokens.shape() == mask.shape()
                && labels.rank() == 1
                && labels.shape()[0] == tokens.shape()[0]
                && matches!(labels.dtype(), DType::I64 | DType::F32),
            Error::shape(
                "batch",
                format_args!(
                    "expected I64 tokens and a Bool mask [batch, n] and I64 or F32 labels [batch], got {:?} {}, {:?} {} and \
                     {:?} {}",
                    tokens.shape(),
                    tokens.dtype(),
                    mask.shape(),
                    mask.dtype(),
                    labels.shape(),
                    labels.dtype()
                )
            )
        );
        Ok(Self { tokens, mask, labels })
    }

    /// Creates a batch of texts, each cut to `longest` tokens, of which the last is that of the text. A cut text has its
    /// beginning, and the token that ends it.
    ///
    /// Errors: no texts; an empty text; classes beside values.
    pub fn of_texts(texts: &[&LabelledText], longest: usize) -> Result<Self> {
        let most = longest.max(1);
        let width = texts.iter().map(|text| text.tokens.len().min(most)).max().unwrap_or(0);
        ensure!(
            width > 0 && texts.iter().all(|text| !text.tokens.is_empty()),
            Error::argument("labelled", "expected at least one text, each with at least one token")
        );
        let shape = Shape::new(&[texts.len(), width])?;
        let (mut tokens, mut mask) = (vec![0; shape.numel()], vec![false; shape.numel()]);
        for (text, row) in texts.iter().zip(0..) {
            let count = text.tokens.len().min(width);
            let own = &mut tokens[row * width..][..count];
            own.copy_from_slice(&text.tokens[..count]);
            if let (Some(last), Some(end)) = (own.last_mut(), text.tokens.last()) {
                *last = *end;
            }
            mask[row * width..][..count].fill(true);
        }
        let classes = texts.iter().map(|text| match text.label {
            Label::Class(class) => Some(class as i64),
            Label::Value(_) => None,
        });
        let values = texts.iter().map(|text| match text.label {
            Label::Value(value) => Some(value as f32),
            Label::Class(_) => None,
        });
        let count = [texts.len()];
        let labels = match (classes.collect::<Option<Vec<i64>>>(), values.collect::<Option<Vec<f32>>>()) {
            (Some(classes), _) => Tensor::from_vec(classes, count, &Device::Cpu)?,
            (None, Some(values)) => Tensor::from_vec(values, count, &Device::Cpu)?,
            (None, None) => return Err(Error::argument("labelled", "expected classes or values, got both")),
        };
        let tensor = |values| Tensor::from_vec(values, shape, &Device::Cpu);
        Self::new(tensor(tokens)?, Tensor::from_vec(mask, shape, &Device::Cpu)?, labels)
    }
}

impl Batch for LabelledBatch {
    fn to_device(&self, device: &Device) -> Result<Self> {
        let [tokens, mask, labels] = [&self.tokens, &self.mask, &self.labels].map(|tensor| tensor.to_device(device));
        Ok(Self { tokens: tokens?, mask: mask?, labels: labels? })
    }

    fn weight(&self) -> f64 {
        self.labels.numel() as f64
    }

    fn targets(&self) -> u64 {
        self.labels.numel() as u64
    }

    fn visit_tensors(&mut self, f: &mut dyn FnMut(&mut Tensor)) -> bool {
        [&mut self.tokens, &mut self.mask, &mut self.labels].into_iter().for_each(f);
        true
    }

    fn concat(parts: &[Self]) -> Result<Self> {
        let joined = |of: &dyn Fn(&Self) -> &Tensor| cat_padded(&parts.iter().map(of).collect_vec());
        let labels = Tensor::cat(&parts.iter().map(|part| &part.labels).collect_vec(), 0)?;
        Self::new(joined(&|part| &part.tokens)?, joined(&|part| &part.mask)?, labels)
    }
}

/// Texts with labels, each a row: padded to the longest of its batch and cut to `seq_len` tokens, in an order of its own in each
/// epoch.
///
/// ```
/// use x_transformers::train::{BatchSource, Label, LabelledText, LabelledTexts, TrainOptions};
/// # fn main() -> x_transformers::Result<()> {
/// let text = |tokens: &[i64], class| LabelledText { tokens: tokens.to_vec(), label: Label::Class(class) };
/// let texts = vec![text(&[2, 7, 3], 0), text(&[2, 8, 9, 3], 1)];
/// let source = LabelledTexts::new(texts.clone(), texts, 2)?; // to train, to validate, number of classes
/// let options = TrainOptions { batch_size: 2, seq_len: 16, ..Default::default() };
/// assert_eq!(source.batch(&options.request(0, 0, 40))?.tokens.shape(), [2, 4]);
/// # Ok(())
/// # }
/// ```
pub struct LabelledTexts {
    parts: [Vec<LabelledText>; 2],
}

impl fmt::Debug for LabelledTexts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [train, validation] = self.parts.each_ref().map(Vec::len);
        f.debug_struct("LabelledTexts").field("train", &train).field("validation", &validation).finish()
    }
}

impl LabelledTexts {
    /// Creates a source of texts to train and to validate on, of `classes` classes, or 0 for a regression.
    ///
    /// Errors: no texts; a text without tokens, a label out of range, or a value that is not finite, with the number of the text,
    /// from 1.
    pub fn new(train: Vec<LabelledText>, validation: Vec<LabelledText>, classes: usize) -> Result<Self> {
        let parts = [train, validation];
        for (part, name) in parts.iter().zip(["text", "validation text"]) {
            ensure!(!part.is_empty(), Error::option("texts", format_args!("expected at least one {name}, got none")));
            for (text, number) in part.iter().zip(1..) {
                let wrong = match text.label {
                    _ if text.tokens.is_empty() => "has no tokens".to_string(),
                    Label::Class(class) if classes == 0 => format!("has the class {class}, expected a value"),
                    Label::Class(class) if class >= classes => {
                        format!("has the class {class}, expected 0 to {}", classes - 1)
                    }
                    Label::Value(value) if classes > 0 => format!("has the value {value}, expected a class"),
                    Label::Value(value) if !(value as f32).is_finite() => format!("has the value {value}"),
                    _ => continue,
                };
                return Err(Error::option("texts", format_args!("{name} {number} {wrong}")));
            }
        }
        Ok(Self { parts })
    }

    /// Returns the texts to train on, and those to validate on.
    pub fn parts(&self) -> [&[LabelledText]; 2] {
        self.parts.each_ref().map(Vec::as_slice)
    }

    fn of(&self, texts: &[&LabelledText], request: &BatchRequest) -> Result<LabelledBatch> {
        let limit = request.num_tokens as i64;
        if let Some(token) = texts.iter().flat_map(|text| &text.tokens).find(|token| !(0..limit).contains(*token)) {
            let why = format_args!("expected tokens in 0..{limit} (the model's vocabulary), got {token}");
            return Err(Error::option("texts", why));
        }
        LabelledBatch::of_texts(texts, request.seq_len)
    }
}

impl BatchSource for LabelledTexts {
    type Batch = LabelledBatch;

    fn batch(&self, request: &BatchRequest) -> Result<LabelledBatch> {
        let train = &self.parts[0];
        let count = train.len() as u64;
        let text = |row: u64| &train[shuffled(request.seed, row / count, row % count, count) as usize];
        let texts = (0..request.rows as u64).map(|row| text(request.first.wrapping_add(row))).collect_vec();
        self.of(&texts, request)
    }

    fn validation_batches(&self, request: &BatchRequest) -> Result<Vec<LabelledBatch>> {
        let part = |texts: &[LabelledText]| self.of(&texts.iter().collect_vec(), request);
        self.parts[1].chunks(request.rows.max(1)).map(part).try_collect_vec()
    }

    fn check(&self, _request: &BatchRequest) -> Result<()> {
        Ok(())
    }

    fn print(&self) -> Result<DataPrint> {
        let mut hash = FNV1A_START;
        for (part, texts) in self.parts.iter().enumerate() {
            for LabelledText { tokens, label } in texts {
                let label = match label {
                    Label::Class(class) => *class as u64,
                    Label::Value(value) => value.to_bits(),
                };
                for word in [part as u64, label, tokens.len() as u64] {
                    hash = fnv1a_from(hash, &word.to_le_bytes());
                }
                for token in tokens {
                    hash = fnv1a_from(hash, &token.to_le_bytes());
                }
            }
        }
        let size = self.parts.iter().map(Vec::len).sum::<usize>() as u64;
        Ok(DataPrint::new("labelled texts", size, hash))
    }
}
