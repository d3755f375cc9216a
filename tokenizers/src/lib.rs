//! Tokenizers of pretrained models: from text to tokens and back.
//!
//! - [`Tokenizer`]: text to tokens and back, like `transformers` and llama.cpp with the same files.
//! - [`TextStream`]: text of tokens as they are generated.
//! - [`Tokenizer::stop_strings`]: ends of generated rows at stop strings.
//! - [`Tokenizer::chat`]: turns of a chat, formatted with the model's own chat template.

use std::{fmt, fmt::Display, path::Path, sync::Arc};

use x_transformers::{
    Error, ErrorKind, Result,
    pretrained::{Family, Pretrained, SentenceOptions},
};

mod byte_level;
mod chat;
mod checked;
mod decoder;
mod described;
mod ends;
mod folder;
mod gguf;
mod gguf_metadata;
mod jinja;
mod known;
mod pretokenizer;
mod sentence;
mod sentencepiece;
mod settings;
mod stop;
mod stream;
mod template;
mod train;
mod turns;
mod wordpiece;

pub use chat::{ChatOptions, Message, Variable};
pub use sentence::{Cut, Embedded, Prompt, SentencePipeline};
pub use stop::StopStrings;
pub use stream::TextStream;
pub use train::learn_byte_level_bpe;
pub use turns::ChatTurns;

use self::{decoder::Decoder, described::Described, template::Templates};

/// The README's program, compiled with the other examples of the documentation.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

/// Tokenizer of a pretrained model.
///
/// Clones share the vocabulary.
#[derive(Clone)]
pub struct Tokenizer {
    shared: Arc<Shared>,
    templates: Arc<Templates>,
}

struct Shared {
    inner: checked::Checked,
    /// At the beginning of a text.
    decoder: Decoder,
}

impl Tokenizer {
    /// Reads the tokenizer of a model's files (`tokenizer.json`, `vocab.txt`, a SentencePiece model or the vocabulary
    /// in a GGUF file), or the one in the file or folder `given`.
    pub fn of(pretrained: &Pretrained, given: Option<&Path>) -> Result<Self> {
        Self::with_settings(pretrained, given, "", false)
    }

    /// Like [`Tokenizer::of`], but with settings, a JSON object or nothing, that take precedence over
    /// `tokenizer_config.json`; `lowercase` lower-cases texts first.
    fn with_settings(pretrained: &Pretrained, given: Option<&Path>, settings: &str, lowercase: bool) -> Result<Self> {
        let mut described = Self::described(pretrained, given, settings)?;
        described.lowercase = lowercase;
        let (inner, decoder) = parsed(given.unwrap_or(pretrained.file().path()), &described)?;
        let templates = Templates::of(&inner, pretrained, given)?;
        Ok(Self { shared: Arc::new(Shared { inner, decoder }), templates: Arc::new(templates) })
    }

    /// Describes the tokenizer of a model's files, or the one in the file or folder `given`.
    fn described(pretrained: &Pretrained, given: Option<&Path>, settings: &str) -> Result<Described> {
        match given.or(pretrained.folder()) {
            Some(folder) if given.is_none() || folder.is_dir() => {
                known::of_folder(folder, pretrained.family(), settings)
            }
            Some(file) => known::of_file(file, pretrained.family(), settings),
            None => {
                let json = gguf::of_gguf(pretrained.file().metadata());
                json.map(Described::new).map_err(|why| file_error(pretrained.file().path(), why))
            }
        }
    }

    /// Creates a tokenizer from the text of a `tokenizer.json`, without a chat template.
    ///
    /// ```
    /// use x_transformers_tokenizers::Tokenizer;
    /// # fn main() -> x_transformers::Result<()> {
    /// let tokenizer = Tokenizer::from_json(
    ///     r###"{"version": "1.0", "added_tokens": [], "normalizer": null, "pre_tokenizer": {"type": "Whitespace"},
    ///         "post_processor": null, "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": false},
    ///         "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
    ///             "max_input_chars_per_word": 100, "vocab": {"[UNK]": 0, "token": 1, "##s": 2, "and": 3}}}"###,
    /// )?;
    /// let tokens = tokenizer.encode("tokens and tokens")?;
    /// assert_eq!(tokens, [1, 2, 3, 1, 2]);
    /// assert_eq!(tokenizer.decode(&tokens)?, "tokens and tokens");
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// Errors: text that is not a `tokenizer.json`.
    pub fn from_json(json: &str) -> Result<Self> {
        Self::parse("tokenizer.json", json)
    }

    /// Reads the tokenizer in a file or a folder, for models of a family, with the chat templates in that folder.
    ///
    /// Errors: a file that cannot be read, is damaged, or requires an unsupported feature.
    pub fn open(path: impl AsRef<Path>, family: Family) -> Result<Self> {
        Self::opened(path.as_ref(), family, "", false)
    }

    /// Reads the tokenizer like [`Tokenizer::open`], with the text settings of a sentence embedding model.
    ///
    /// Errors: those of [`Tokenizer::open`].
    pub fn for_sentences(path: impl AsRef<Path>, family: Family, options: &SentenceOptions) -> Result<Self> {
        Self::opened(path.as_ref(), family, &options.tokenizer, options.do_lower_case)
    }

    fn opened(path: &Path, family: Family, settings: &str, lowercase: bool) -> Result<Self> {
        let (mut described, folder) = match path.is_dir() {
            true => (known::of_folder(path, family, settings)?, path),
            false => (known::of_file(path, family, settings)?, path.parent().unwrap_or(Path::new(""))),
        };
        described.lowercase = lowercase;
        let (inner, decoder) = parsed(path, &described)?;
        let templates = Templates::of_folder(&inner, folder, family)?;
        Ok(Self { shared: Arc::new(Shared { inner, decoder }), templates: Arc::new(templates) })
    }

    /// Like [`Tokenizer::from_json`], but for the text of a file, which errors name.
    ///
    /// Errors: a description that is damaged, or requires an unsupported feature.
    pub fn parse(path: impl AsRef<Path>, json: &str) -> Result<Self> {
        Self::without_templates(path.as_ref(), &Described::new(json.to_string()))
    }

    fn without_templates(path: &Path, described: &Described) -> Result<Self> {
        let (inner, decoder) = parsed(path, described)?;
        Ok(Self { shared: Arc::new(Shared { inner, decoder }), templates: Arc::default() })
    }

    /// Returns the tokens of a text, with the special tokens that the model expects around it.
    pub fn encode(&self, text: &str) -> Result<Vec<i64>> {
        self.encoded(text, true)
    }

    /// Returns the tokens of a text by itself, without the special tokens that the model expects around it.
    #[doc(alias = "add_special_tokens")]
    pub fn encode_plain(&self, text: &str) -> Result<Vec<i64>> {
        self.encoded(text, false)
    }

    fn encoded(&self, text: &str, around: bool) -> Result<Vec<i64>> {
        Ok(self.shared.inner.encode(text, around)?.into_iter().map(i64::from).collect())
    }

    /// Returns the text of tokens, without special ones.
    pub fn decode(&self, tokens: &[i64]) -> Result<String> {
        let mut stream = self.stream(&[]);
        let mut text = tokens.iter().map(|&token| stream.push(token)).collect::<Result<String>>()?;
        text += &stream.finish()?;
        Ok(text)
    }

    /// Returns the id of the token with this spelling in the vocabulary, for instance a special one such as `</s>`.
    pub fn token(&self, spelling: &str) -> Option<i64> {
        self.shared.inner.id(spelling).map(i64::from)
    }

    /// Returns the ids of the special tokens, which are not text, in ascending order.
    #[doc(alias = "all_special_ids")]
    pub fn special_tokens(&self) -> Vec<i64> {
        let special = |&id: &u32| self.shared.inner.is_special(id);
        (0..self.num_tokens() as u32).filter(special).map(i64::from).collect()
    }

    /// Returns the size of the vocabulary: the highest id of a token, plus 1.
    #[doc(alias = "vocab_size")]
    pub fn num_tokens(&self) -> usize {
        self.shared.inner.raw().get_vocab(true).into_values().max().map_or(0, |id| id as usize + 1)
    }

    /// Creates a stream of the text of tokens that come one at a time after a prompt.
    pub fn stream(&self, prompt: &[i64]) -> TextStream<'_> {
        TextStream::new(self, prompt)
    }

    /// Returns the decoder at the beginning of a text.
    fn decoder(&self) -> Decoder {
        self.shared.decoder.clone()
    }

    /// Returns the spelling of a token that has text, and `true` if it is an added one.
    fn piece(&self, token: i64) -> Option<(String, bool)> {
        let id = u32::try_from(token).ok()?;
        let inner = self.shared.inner.raw();
        let added = inner.get_added_vocabulary();
        let piece = inner.id_to_token(id)?;
        if added.is_special_token(&piece) {
            return None;
        }
        Some((piece, added.get_added_tokens_decoder().contains_key(&id)))
    }
}

/// Tokenizer, and its decoder at the beginning of a text.
fn parsed(path: &Path, described: &Described) -> Result<(checked::Checked, Decoder)> {
    let inner = checked::Checked::parse(path, described)?;
    let decoder = Decoder::new(&decoder::description(inner.raw().get_decoder(), &described.json)?)?;
    Ok((inner, decoder))
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokenizer")
            .field("tokens", &self.shared.inner.raw().get_vocab_size(true))
            .finish_non_exhaustive()
    }
}

/// Returns an error about a file.
fn file_error(path: &Path, why: impl Display) -> Error {
    Error::new(ErrorKind::File { path: path.to_path_buf(), why: why.to_string() })
}

/// Returns an error about a text or tokens that the tokenizer rejects.
fn refused(why: impl Display) -> Error {
    Error::new(ErrorKind::Argument { op: "tokenizer", message: why.to_string() })
}

/// In the form of `tokenizer.json`: a token that is looked for in the text as it is, and left out of decoded text.
fn added_token(token: &str, id: u64) -> Option<serde_json::Value> {
    Some(serde_json::json!({
        "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
        "special": true,
    }))
}
