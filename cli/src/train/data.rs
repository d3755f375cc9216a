//! Data of `xt train`: bytes of a text, tokens of texts, or files of tokens.

use std::path::{Path, PathBuf};

use clap::Args;
use indicatif::HumanCount;
use x_transformers::{
    pretrained::Pretrained,
    train::{BatchSource, ByteText, Checkpoint, LabelledBatch, TokenBatch, TokenData},
};

use super::{
    chats::{self, Chats},
    images::ImageArgs,
    labels::{self, Labelled},
    seq2seq::PairArgs,
    warn_of_skipped,
};
use crate::{
    corpus,
    documents::{Documents, RecordArgs, Split, encode},
    failure::{Failure, Result},
    language::Language,
    markov::Markov,
    metrics::{Target, Unit},
    progress::bytes,
    source,
    stored::StoredTokenizer,
    tokenize::{self, TRAIN, VALIDATION},
    tokenizer::Tokenizer,
};

#[derive(Args)]
pub struct DataArgs {
    /// Paths of text files or folders; without --tokenizer the model reads bytes, the first 90% of which are for training,
    /// the rest for validation [default: eight plays of Shakespeare, built into this program]
    #[arg(long, value_name = "FILE|DIR", num_args = 1.., conflicts_with_all = ["tokens", "jsonl", "parquet"])]
    pub text: Vec<PathBuf>,

    /// Paths of token files: those of `xt tokenize` (or its folder), llm.c's or nanoGPT's .bin; without --validation the
    /// last 10% of the tokens are for validation
    #[arg(long, value_name = "FILE|DIR", num_args = 1.., conflicts_with_all = ["jsonl", "parquet"])]
    tokens: Vec<PathBuf>,

    /// Paths of token files to validate on
    #[arg(long, value_name = "FILE", num_args = 1.., requires = "tokens")]
    validation: Vec<PathBuf>,

    #[command(flatten)]
    records: RecordArgs,

    #[command(flatten)]
    pub images: ImageArgs,

    #[command(flatten)]
    pub pairs: PairArgs,

    /// Path of the tokenizer: its folder, or a .json, .model or .txt file in it; the checkpoint keeps it [default: for
    /// --tokens, the one beside the first file]
    #[arg(long, value_name = "PATH", conflicts_with = "resume")]
    tokenizer: Option<PathBuf>,
}

/// Data of a run.
pub struct Data<B = TokenBatch> {
    pub source: Box<dyn BatchSource<Batch = B>>,
    pub about: About,
}

/// Tokenizer, sizes and units of the data of a run.
pub struct About {
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
    /// Target of the model.
    pub target: Target,
    /// Tokens with which samples begin.
    pub prompt: Vec<i64>,
    /// If `true`, the records are chats.
    pub chats: bool,
    /// Tokens of each chat.
    pub lengths: Vec<usize>,
    /// One line.
    pub line: String,
}

impl About {
    /// Data without tokens.
    pub fn of_nothing() -> Self {
        Self {
            language: None,
            num_tokens: None,
            tokenizer: None,
            baseline: None,
            bytes_per_token: None,
            target: Target::Token,
            prompt: Vec::new(),
            chats: false,
            lengths: Vec::new(),
            line: String::new(),
        }
    }

    pub fn unit(&self) -> Unit {
        Unit { bytes_per_token: self.bytes_per_token, target: self.target }
    }
}

/// Tokenizer of the model that a run goes on with.
pub struct Own {
    language: Language,
    stored: StoredTokenizer,
    /// Where it is, for messages.
    path: PathBuf,
}

impl Own {
    /// The tokenizer in a folder or a file.
    pub fn open(path: &Path) -> Result<Self> {
        Ok(Self { language: Language::open(path)?, stored: StoredTokenizer::read(path)?, path: path.to_path_buf() })
    }

    /// The tokenizer of a pretrained model, or the one in the file or folder `given`.
    pub fn of_pretrained(pretrained: &Pretrained, given: Option<&Path>) -> Result<Self> {
        let language = Language::pretrained(Tokenizer::of(pretrained, given)?, pretrained.end_tokens());
        let path = given.or(pretrained.folder()).unwrap_or(pretrained.file().path()).to_path_buf();
        Ok(Self { language, stored: StoredTokenizer::of_pretrained(pretrained, given)?, path })
    }

    /// Opens the tokenizer that `--tokenizer` names, or else the one that the checkpoint of a run keeps; `None` for bytes, and
    /// for token files, which need none.
    pub fn of_run(checkpoint: &Path, data: &DataArgs) -> Result<Option<Self>> {
        if let Some(given) = data.tokenizer() {
            return Self::open(given).map(Some);
        }
        // A folder with only a config and weights is a model of bytes.
        let Ok(training) = Checkpoint::load_training(checkpoint) else { return Ok(None) };
        match &training.tokenizer {
            Some(name) => Self::open(&checkpoint.join(name)).map(Some),
            None if data.are_tokens() => Ok(None),
            None => source::check_bytes(checkpoint, &training).map(|()| None),
        }
    }

    /// Takes the parts that a run keeps.
    pub fn into_parts(self) -> (Language, StoredTokenizer) {
        (self.language, self.stored)
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> Result<&Tokenizer> {
        self.language.tokenizer().ok_or_else(|| Failure::new("expected a tokenizer").within(&self.path))
    }

    /// The token that begins each document.
    pub fn begin(&self) -> Result<i64> {
        tokenize::begin(self.tokenizer()?).map_err(|failure| failure.within(&self.path))
    }
}

impl DataArgs {
    /// Opens the data of a new run, or those of one that goes on with a model whose tokenizer is `own`.
    pub fn open(&self, own: Option<Own>) -> Result<Data> {
        self.images.refuse()?;
        self.pairs.refuse()?;
        let own = match own {
            Some(own) => Some(own),
            None => self.tokenizer.as_deref().map(Own::open).transpose()?,
        };
        if !self.tokens.is_empty() {
            return self.tokens(own);
        }
        let Some(documents) = self.records.documents()? else {
            let text = match &self.text[..] {
                [] => ByteText::from_bytes(corpus::PLAYS)?,
                paths => ByteText::from_paths(paths)?,
            };
            warn_of_skipped(&text);
            return match own {
                Some(own) => encoded(Documents::Text { text, separator: self.records.separator.clone() }, own),
                None if self.records.separator.is_some() => Err(Failure::new("`--separator` requires `--tokenizer`")),
                None => Ok(self.bytes(text)),
            };
        };
        let Some(own) = own else {
            let name = if self.records.jsonl.is_empty() { "parquet" } else { "jsonl" };
            return Err(Failure::new(format_args!(
                "`--{name}` requires `--tokenizer`, such as one that `xt tokenize --train-bpe` learned, or `--from` a model \
                 that has one",
            )));
        };
        let RecordArgs { jsonl, field, .. } = &self.records;
        if let Some(first) = jsonl.first()
            && chats::is_first(first, field)?
        {
            return chats(jsonl, own);
        }
        encoded(documents, own)
    }

    /// Opens texts with labels: of classes with these names, or those that occur if there are none; or, without classes, with
    /// numbers. Returns the names of the classes too.
    pub fn labelled(&self, own: Own, classes: Option<&[String]>) -> Result<(Data<LabelledBatch>, Vec<String>)> {
        self.images.refuse()?;
        self.pairs.refuse()?;
        let RecordArgs { jsonl, field, .. } = &self.records;
        if jsonl.is_empty() {
            return Err(Failure::new("texts with labels come from `--jsonl`, with the fields `text` and `label`"));
        }
        let tokenizer = own.tokenizer()?;
        let Labelled { texts, labels } = match classes {
            Some(labels) => labels::classes(jsonl, field, labels, tokenizer)?,
            None => labels::values(jsonl, field, tokenizer)?,
        };
        let [train, validation] = texts.parts().map(|part| HumanCount(part.len() as u64));
        let what = if classes.is_some() { format!(", classes {}", labels.join(", ")) } else { String::new() };
        let about = About {
            line: format!("{train} texts to train on, {validation} to validate{what}"),
            baseline: None,
            num_tokens: Some(tokenizer.num_tokens()),
            bytes_per_token: None,
            target: if classes.is_some() { Target::Class } else { Target::Value },
            prompt: Vec::new(),
            chats: false,
            lengths: Vec::new(),
            tokenizer: Some(own.stored),
            language: Some(own.language),
        };
        Ok((Data { about, source: Box::new(texts) }, labels))
    }

    /// Paths of the JSONL files.
    pub fn jsonl(&self) -> &[PathBuf] {
        &self.records.jsonl
    }

    /// Returns `true` for token files.
    pub fn are_tokens(&self) -> bool {
        !self.tokens.is_empty()
    }

    /// Returns `true` if `--field` names another field than the default.
    pub fn names_field(&self) -> bool {
        self.records.field != "text"
    }

    /// Path of the tokenizer that takes the place of the model's own.
    pub fn tokenizer(&self) -> Option<&Path> {
        self.tokenizer.as_deref()
    }

    fn bytes(&self, text: ByteText) -> Data {
        let size = |bytes_: &[u8]| bytes(bytes_.len() as u64);
        let source = if self.text.is_empty() { "eight plays of Shakespeare".into() } else { size(text.bytes()) };
        let about = About {
            line: format!("{source}: {} to train on, {} to validate", size(text.train()), size(text.validation())),
            // Takes a moment even for large texts.
            baseline: Some(Markov::new(text.train()).bits_per_byte(text.validation())),
            language: Some(Language::Bytes),
            num_tokens: Some(256),
            tokenizer: None,
            bytes_per_token: Some(1.0),
            target: Target::Token,
            prompt: vec![i64::from(b'\n')],
            chats: false,
            lengths: Vec::new(),
        };
        Data { about, source: Box::new(text) }
    }

    fn tokens(&self, own: Option<Own>) -> Result<Data> {
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
        let own = match own {
            Some(own) => Some(own),
            None => beside().as_deref().map(Own::open).transpose()?,
        };
        let stated = source.num_tokens().map(|count| count as usize);
        if let Some(own) = &own {
            let count = own.tokenizer()?.num_tokens();
            if let Some(stated) = stated.filter(|&stated| stated != count) {
                let why = format!(
                    "has a vocabulary of {count} tokens, but the token files have {stated}; use the tokenizer that they \
                     were made with"
                );
                return Err(Failure::new(why).within(&own.path));
            }
            if source.end_of_text().is_none()
                && let Ok(begin) = own.begin()
            {
                source = source.with_end_of_text(begin);
            }
        }
        let count = own.as_ref().map(|own| Ok::<_, Failure>(own.tokenizer()?.num_tokens())).transpose()?;
        let (language, tokenizer) = own.map(|own| (own.language, own.stored)).unzip();
        let about = About {
            line: format!(
                "{} tokens to train on, {} to validate",
                HumanCount(source.train_len()),
                HumanCount(source.validation_len())
            ),
            baseline: None,
            num_tokens: stated.or(count),
            tokenizer,
            language,
            bytes_per_token: source.bytes_per_token(),
            target: Target::Token,
            prompt: source.end_of_text().into_iter().collect(),
            chats: false,
            lengths: Vec::new(),
        };
        Ok(Data { about, source: Box::new(source) })
    }
}

/// Texts through a tokenizer, as tokens in memory.
fn encoded(documents: Documents, own: Own) -> Result<Data> {
    let (tokenizer, begin) = (own.tokenizer()?, own.begin()?);
    let num_tokens = tokenizer.num_tokens();
    let split = Split::of(&documents)?;
    let (mut parts, mut lengths) = ([Vec::new(), Vec::new()], [0; 2]);
    let plain = own.language.begin().is_some();
    encode(&documents, &split, tokenizer, (begin, plain), |validation, tokens, length| {
        let part = usize::from(validation);
        lengths[part] += length as u64;
        // Tokens of a tokenizer have 32 bits.
        parts[part].extend(tokens.iter().map(|&token| token as u32));
        Ok(())
    })?;
    let source = TokenData::from_tokens(&parts[0], &parts[1], num_tokens, Some(begin), Some(lengths[1]))?;
    let about = About {
        line: format!(
            "{} documents, {}: {} tokens to train on, {} to validate",
            HumanCount(split.documents() as u64),
            bytes(lengths[0] + lengths[1]),
            HumanCount(source.train_len()),
            HumanCount(source.validation_len())
        ),
        baseline: None,
        num_tokens: Some(num_tokens),
        bytes_per_token: source.bytes_per_token(),
        target: Target::Token,
        prompt: vec![begin],
        chats: false,
        lengths: Vec::new(),
        tokenizer: Some(own.stored),
        language: Some(own.language),
    };
    Ok(Data { about, source: Box::new(source) })
}

/// Chats through a tokenizer.
fn chats(paths: &[PathBuf], own: Own) -> Result<Data> {
    let tokenizer = own.tokenizer()?;
    let Chats { examples, prompt, tokens: [tokens, answers] } = chats::read(paths, tokenizer)?;
    let [train, validation] = examples.parts().map(|part| HumanCount(part.len() as u64));
    let about = About {
        line: format!(
            "{train} chats to train on, {validation} to validate: {} tokens, {} of them answers",
            HumanCount(tokens as u64),
            HumanCount(answers as u64)
        ),
        baseline: None,
        num_tokens: Some(tokenizer.num_tokens()),
        bytes_per_token: None,
        target: Target::Token,
        prompt,
        chats: true,
        lengths: examples.parts().into_iter().flatten().map(|chat| chat.tokens.len()).collect(),
        tokenizer: Some(own.stored),
        language: Some(own.language),
    };
    Ok(Data { about, source: Box::new(examples) })
}
