//! Data of `xt train`: bytes of a text, tokens of texts, or files of tokens.

use std::path::{Path, PathBuf};

use clap::Args;
use indicatif::HumanCount;
use x_transformers::train::{BatchSource, ByteText, TokenBatch, TokenData};

use super::warn_of_skipped;
use crate::{
    corpus,
    documents::{Documents, RecordArgs, Split, encode},
    failure::{Failure, Result},
    language::Language,
    markov::Markov,
    progress::bytes,
    stored::StoredTokenizer,
    tokenize::{self, TRAIN, VALIDATION},
    tokenizer,
};

#[derive(Args)]
pub struct DataArgs {
    /// Paths of text files or folders; without --tokenizer the model reads bytes, the first 90% of which are for training,
    /// the rest for validation [default: eight plays of Shakespeare, built into this program]
    #[arg(long, value_name = "FILE|DIR", num_args = 1.., conflicts_with_all = ["tokens", "jsonl"])]
    pub text: Vec<PathBuf>,

    /// Paths of token files: those of `xt tokenize` (or its folder), llm.c's or nanoGPT's .bin; without --validation the
    /// last 10% of the tokens are for validation
    #[arg(long, value_name = "FILE|DIR", num_args = 1.., conflicts_with = "jsonl")]
    tokens: Vec<PathBuf>,

    /// Paths of token files to validate on
    #[arg(long, value_name = "FILE", num_args = 1.., requires = "tokens")]
    validation: Vec<PathBuf>,

    #[command(flatten)]
    records: RecordArgs,

    /// Path of the tokenizer: its folder, or a .json, .model or .txt file in it; the checkpoint keeps it [default: for
    /// --tokens, the one beside the first file]
    #[arg(long, value_name = "PATH", conflicts_with = "resume")]
    tokenizer: Option<PathBuf>,
}

/// Data of a run, and what is known about them.
pub struct Data {
    pub source: Box<dyn BatchSource<Batch = TokenBatch>>,
    /// Meaning of the tokens; `None` for files of tokens without a tokenizer.
    pub language: Option<Language>,
    /// Size of the vocabulary, if it is known.
    pub num_tokens: Option<usize>,
    /// Files of the tokenizer, which a new run keeps.
    pub tokenizer: Option<StoredTokenizer>,
    /// Bits per byte of the order-2 model, for bytes.
    pub baseline: Option<f64>,
    /// Bytes of text per token of the validation, if known.
    pub bytes_per_token: Option<f64>,
    /// One line.
    pub about: String,
}

impl DataArgs {
    /// Opens the data of a new run, or those of a resumed one, whose tokenizer is in a folder of its checkpoint.
    pub fn open(&self, own: Option<&Path>) -> Result<Data> {
        if !self.tokens.is_empty() {
            return self.tokens(own);
        }
        let tokenizer = own.or(self.tokenizer.as_deref());
        if self.records.jsonl.is_empty() {
            let text = match &self.text[..] {
                [] => ByteText::from_bytes(corpus::PLAYS)?,
                paths => ByteText::from_paths(paths)?,
            };
            warn_of_skipped(&text);
            return match tokenizer {
                Some(path) => self.encoded(Documents::Text { text, separator: self.records.separator.clone() }, path),
                None if self.records.separator.is_some() => Err(Failure::new("`--separator` requires `--tokenizer`")),
                None => Ok(self.bytes(text)),
            };
        }
        let Some(path) = tokenizer else {
            return Err(Failure::new(
                "`--jsonl` requires `--tokenizer`, such as one that `xt tokenize --train-bpe` learned",
            ));
        };
        self.encoded(Documents::Records { paths: self.records.jsonl.clone(), field: self.records.field.clone() }, path)
    }

    fn bytes(&self, text: ByteText) -> Data {
        let size = |bytes_: &[u8]| bytes(bytes_.len() as u64);
        let source = if self.text.is_empty() { "eight plays of Shakespeare".into() } else { size(text.bytes()) };
        Data {
            about: format!("{source}: {} to train on, {} to validate", size(text.train()), size(text.validation())),
            // Takes a moment even for large texts.
            baseline: Some(Markov::new(text.train()).bits_per_byte(text.validation())),
            language: Some(Language::Bytes),
            num_tokens: Some(256),
            tokenizer: None,
            bytes_per_token: Some(1.0),
            source: Box::new(text),
        }
    }

    /// Texts through a tokenizer, as tokens in memory.
    fn encoded(&self, documents: Documents, path: &Path) -> Result<Data> {
        let tokenizer = tokenizer::open(path)?;
        let begin = tokenize::begin(&tokenizer).map_err(|failure| failure.within(path))?;
        let num_tokens = tokenizer.num_tokens();
        let split = Split::of(&documents)?;
        let (mut parts, mut lengths) = ([Vec::new(), Vec::new()], [0; 2]);
        encode(&documents, &split, &tokenizer, begin, |validation, tokens, length| {
            let part = usize::from(validation);
            lengths[part] += length as u64;
            // Tokens of a tokenizer have 32 bits.
            parts[part].extend(tokens.iter().map(|&token| token as u32));
            Ok(())
        })?;
        let source = TokenData::from_tokens(&parts[0], &parts[1], num_tokens, Some(begin), Some(lengths[1]))?;
        Ok(Data {
            about: format!(
                "{} documents, {}: {} tokens to train on, {} to validate",
                HumanCount(split.documents() as u64),
                bytes(lengths[0] + lengths[1]),
                HumanCount(source.train_len()),
                HumanCount(source.validation_len())
            ),
            baseline: None,
            language: Some(Language::own(tokenizer)),
            num_tokens: Some(num_tokens),
            tokenizer: Some(StoredTokenizer::read(path)?),
            bytes_per_token: source.bytes_per_token(),
            source: Box::new(source),
        })
    }

    fn tokens(&self, own: Option<&Path>) -> Result<Data> {
        let folder = self.tokens[0].is_dir();
        if folder && self.tokens.len() > 1 {
            return Err(Failure::new("`--tokens`: expected one folder, or files"));
        }
        let found = |folder: &Path| {
            let pairs = [(TRAIN, VALIDATION), ("train.bin", "val.bin")];
            let pairs = pairs.map(|(train, validation)| (folder.join(train), folder.join(validation)));
            pairs.into_iter().find(|(train, _)| train.is_file())
        };
        let mut source = match (folder, &self.validation[..]) {
            (true, validation) => {
                let why = || Failure::new(format_args!("has no {TRAIN} or train.bin")).within(&self.tokens[0]);
                let (train, beside) = found(&self.tokens[0]).ok_or_else(why)?;
                match validation {
                    [] if beside.is_file() => TokenData::with_validation(&[train], &[beside])?,
                    [] => TokenData::open(&[train])?,
                    given => TokenData::with_validation(&[train], given)?,
                }
            }
            (false, []) => TokenData::open(&self.tokens)?,
            (false, validation) => TokenData::with_validation(&self.tokens, validation)?,
        };
        let beside = || {
            let folder = if folder { &*self.tokens[0] } else { self.tokens[0].parent().unwrap_or(Path::new("")) };
            Some(folder.join("tokenizer.json")).filter(|path| path.is_file())
        };
        let path = own.map(Path::to_path_buf).or_else(|| self.tokenizer.clone()).or_else(beside);
        let tokenizer = path.as_deref().map(tokenizer::open).transpose()?;
        let stated = source.num_tokens().map(|count| count as usize);
        if let (Some(tokenizer), Some(path)) = (&tokenizer, &path) {
            let count = tokenizer.num_tokens();
            if let Some(stated) = stated.filter(|&stated| stated != count) {
                let why = format!(
                    "has a vocabulary of {count} tokens, but the token files have {stated}; use the tokenizer that they \
                     were made with"
                );
                return Err(Failure::new(why).within(path));
            }
            if source.end_of_text().is_none()
                && let Ok(begin) = tokenize::begin(tokenizer)
            {
                source = source.with_end_of_text(begin);
            }
        }
        Ok(Data {
            about: format!(
                "{} tokens to train on, {} to validate",
                HumanCount(source.train_len()),
                HumanCount(source.validation_len())
            ),
            baseline: None,
            num_tokens: stated.or(tokenizer.as_ref().map(tokenizer::Tokenizer::num_tokens)),
            tokenizer: path.as_deref().map(StoredTokenizer::read).transpose()?,
            language: tokenizer.map(Language::own),
            bytes_per_token: source.bytes_per_token(),
            source: Box::new(source),
        })
    }
}
