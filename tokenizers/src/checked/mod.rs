//! Wrapper around the crate `tokenizers`: checks its inputs, and turns its panics into errors.
//!
//! The crate `tokenizers` trusts its files: damaged ones make it index out of bounds, unwrap missing values or overflow
//! the stack, which this crate cannot fix. Here the parts of a file are checked first, and models, splitting and
//! replacement are implemented in this crate, with the same tokens in time linear in the text. The remaining parts of
//! the other crate (Unicode normal forms, templates, decoders) are called with panics caught; their messages are not
//! printed, and the error names the file.

use std::{
    borrow::Cow,
    cell::Cell,
    fmt::Display,
    panic::{self, AssertUnwindSafe},
    path::{Path, PathBuf},
    sync::Once,
};

use serde_json::{Value, json};
use tokenizers::{
    AddedToken, DecoderWrapper, Encoding, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper, Token,
    TokenizerBuilder, TokenizerImpl, normalizers::Lowercase,
};
use x_transformers::Result;

pub use self::file::Part;
use self::{
    added::{Added, Piece},
    model::{Model, Scratch},
    normalize::Normalizer,
    split::Splitter,
};
use super::{described::Described, file_error, refused};

mod added;
mod bpe;
mod charsmap;
mod file;
mod model;
mod normalize;
mod split;
mod unigram;
mod vocabulary;

/// A tokenizer of the crate `tokenizers`, with models of this crate.
pub type Inner = TokenizerImpl<Model, NormalizerWrapper, PreTokenizerWrapper, PostProcessorWrapper, DecoderWrapper>;

/// A tokenizer from a checked file.
pub struct Checked {
    /// Vocabulary, added tokens and decoder.
    inner: Inner,
    added: Added,
    normalizer: Option<Normalizer>,
    splitters: Vec<Splitter>,
    /// Added tokens with their ids.
    tokens: Vec<(u32, AddedToken)>,
    /// If `true`, names of special tokens in texts are ordinary text.
    split_special: bool,
    /// Template tokens around a text; [`HOLE`] stands for the text.
    around: Vec<u32>,
    /// Path of its file.
    path: PathBuf,
    /// Number of tokens to which texts are truncated, if the files have a limit.
    max_length: Option<usize>,
    /// If `true`, texts are truncated at the beginning.
    cut_left: bool,
}

/// Tokens of a text, possibly truncated.
pub struct CutText {
    pub ids: Vec<u32>,
    /// Number of tokens of the whole text.
    pub whole: usize,
}

/// Id of no token.
const HOLE: u32 = u32::MAX;

/// Maximum number of bytes of a text; positions have 32 bits.
const MAX_TEXT: usize = u32::MAX as usize / 4;

impl Checked {
    /// Parses the content of `tokenizer.json`, with settings from other files; `path` is the file named in errors.
    ///
    /// Errors: a description that is damaged, or that Hugging Face's own tokenizers reject; a token whose id in the
    /// files is not its id in the vocabulary.
    pub fn parse(path: &Path, described: &Described) -> Result<Self> {
        let made = guarded(|| Self::of_json(path, serde_json::from_str(&described.json)?, described));
        made.map_err(|why| file_error(path, format_args!("tokenizer: {why}")))
    }

    fn of_json(path: &Path, mut tokenizer: Value, described: &Described) -> std::result::Result<Self, Failure> {
        if let Some(version) = tokenizer.get("version").filter(|version| version.as_str() != Some("1.0")) {
            return Err(format!("`version` is {version}, expected 1.0").into());
        }
        // Files may request a fixed length (`truncation`, `padding`): padding is up to the caller, and no text is
        // truncated silently.
        let model = tokenizer.get_mut("model").map(Value::take).ok_or("`model` is missing")?;
        let model = Model::of_json(model)?;
        let tokens = added::of_json(&tokenizer)?;
        let part = |name| Part::of(&tokenizer, name);
        let normalizer = part("normalizer").map(|part| Normalizer::of_json(&part)).transpose()?;
        // Settings of other files may change a checked one.
        let normalizer = match described.instead_of(part("normalizer"))? {
            Some(changed) => {
                Some(Normalizer::of_json(&Part::of(&json!({"normalizer": changed}), "normalizer").ok_or("")?)?)
            }
            None => normalizer,
        };
        let splitters = part("pre_tokenizer").map(|part| Splitter::of_json(&part)).transpose()?.unwrap_or_default();
        let decoder = part("decoder").map(|part| part.decoder()).transpose()?;
        let processor = part("post_processor").map(|part| part.processor()).transpose()?;
        let inner = TokenizerBuilder::new().with_model(model).with_decoder(decoder).with_post_processor(processor);
        // Their ids are those of the model, or follow them, regardless of the file.
        let mut inner: Inner = inner.build()?;
        inner.add_tokens(&tokens);
        let more = described.extend(&mut inner)?;
        let id = |token: AddedToken| Some((inner.token_to_id(&token.content)?, token));
        let tokens: Vec<_> = tokens.into_iter().chain(more).filter_map(id).collect();
        let split_special = described.split_special;
        let added = Added::new(&tokens, normalizer.as_ref(), split_special)?;
        let hole = Encoding::from_tokens(vec![Token::new(HOLE, String::new(), (0, 0))], 0);
        let around = inner.post_process(hole, None, true)?.get_ids().to_vec();
        let path = path.to_path_buf();
        let Described { max_length, cut_left, .. } = *described;
        let mut checked =
            Self { inner, added, normalizer, splitters, tokens, split_special, around, path, max_length, cut_left };
        if described.lowercase {
            checked.lowercase();
        }
        Ok(checked)
    }

    /// Returns the number of tokens that a text is truncated to, if the files have a limit.
    pub fn max_length(&self) -> Option<usize> {
        self.max_length
    }

    /// Lower-cases texts first, even before normalized added tokens are matched.
    fn lowercase(&mut self) {
        let lower = Normalizer::Local(NormalizerWrapper::Lowercase(Lowercase));
        let parts = [lower].into_iter().chain(self.normalizer.take()).collect();
        self.normalizer = Some(Normalizer::Sequence(parts));
        // Normalized added tokens are matched in the new form.
        if let Ok(added) = Added::new(&self.tokens, self.normalizer.as_ref(), self.split_special) {
            self.added = added;
        }
    }

    /// Returns the tokens of a text with the template tokens around it, at most `most` together: the text is truncated,
    /// the template tokens stay.
    ///
    /// Errors: a text that the tokenizer does not accept, or a limit below the number of template tokens.
    pub fn encode_within(&self, text: &str, most: usize) -> Result<CutText> {
        let mut inside = self.encode(text, false)?;
        let around = self.around.iter().filter(|&&token| token != HOLE).count();
        let whole = inside.len() + around;
        if whole > most {
            let Some(room) = most.checked_sub(around) else {
                let why = format!("texts are truncated to {most} tokens, but the model adds {around} special tokens");
                return Err(refused(why));
            };
            if self.cut_left {
                inside.drain(..inside.len() - room);
            } else {
                inside.truncate(room);
            }
        }
        let mut ids = Vec::with_capacity(inside.len() + around);
        for &token in &self.around {
            if token == HOLE {
                ids.extend(&inside);
            } else {
                ids.push(token);
            }
        }
        Ok(CutText { ids, whole })
    }

    /// Returns `true` if a token is special, not text.
    pub fn is_special(&self, id: u32) -> bool {
        self.inner.id_to_token(id).is_some_and(|token| self.inner.get_added_vocabulary().is_special_token(&token))
    }

    /// Returns the tokens of a text; if `around`, with the template tokens that the model expects around it.
    pub fn encode(&self, text: &str, around: bool) -> Result<Vec<u32>> {
        self.answer(|| {
            if text.len() > MAX_TEXT {
                return Err(format!("the text has {} bytes, expected at most {MAX_TEXT}", text.len()).into());
            }
            let mut tokens = Vec::new();
            for &token in if around { self.around.as_slice() } else { &[HOLE] } {
                if token == HOLE {
                    self.encode_into(text, &mut tokens)?;
                } else {
                    tokens.push(token);
                }
            }
            Ok(tokens)
        })
    }

    fn encode_into(&self, text: &str, tokens: &mut Vec<u32>) -> std::result::Result<(), Failure> {
        let model = self.inner.get_model();
        let mut scratch = Scratch::default();
        // Some models prepend a prefix to the first word of a text.
        let mut first = true;
        self.added.in_text(text, &mut |piece| {
            let text = match piece {
                Piece::Token(id) => {
                    first = false;
                    tokens.push(id);
                    return Ok(());
                }
                Piece::Text(text) => text,
            };
            let normal = match &self.normalizer {
                Some(normalizer) => normalizer.normalize(Cow::Borrowed(text), &mut first)?,
                None => Cow::Borrowed(text),
            };
            self.added.in_normalized(&normal, &mut |piece| {
                let first = std::mem::take(&mut first);
                match piece {
                    Piece::Token(id) => tokens.push(id),
                    Piece::Text(text) => Splitter::split_all(&self.splitters, text, first, &mut |word, _| {
                        model.split(word, &mut scratch, tokens)
                    })?,
                }
                Ok(())
            })
        })
    }

    /// Returns the tokens of a text, without matching added tokens.
    ///
    /// Errors: a text that the tokenizer does not take.
    pub fn encode_plain(&self, text: &str) -> Result<Vec<u32>> {
        self.answer(|| {
            let (mut tokens, mut scratch, mut first) = (Vec::new(), Scratch::default(), true);
            let normal = match &self.normalizer {
                Some(normalizer) => normalizer.normalize(Cow::Borrowed(text), &mut first)?,
                None => Cow::Borrowed(text),
            };
            let model = self.inner.get_model();
            Splitter::split_all(&self.splitters, &normal, first, &mut |word, _| {
                model.split(word, &mut scratch, &mut tokens)
            })?;
            Ok(tokens)
        })
    }

    /// Returns vocabulary, added tokens and decoder, for queries that cannot fail.
    pub fn raw(&self) -> &Inner {
        &self.inner
    }

    /// Returns `true` if texts are normalized before they are split.
    pub fn normalizes(&self) -> bool {
        self.normalizer.is_some()
    }

    /// Returns the id of a token.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    fn answer<T>(&self, ask: impl FnOnce() -> std::result::Result<T, Failure>) -> Result<T> {
        guarded(ask).map_err(|why| match why {
            Broken::Panic(_) => file_error(&self.path, format_args!("tokenizer: {why}")),
            Broken::Refused(why) => refused(why),
        })
    }
}

pub type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Failure of a call of the other crate: an error or a panic.
enum Broken {
    Refused(Failure),
    Panic(String),
}

impl Display for Broken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Refused(why) => why.fmt(f),
            Self::Panic(why) => write!(f, "the crate `tokenizers` failed ({why})"),
        }
    }
}

thread_local! {
    /// `true` while this thread runs the other crate.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

/// Calls the other crate; catches its panics without printing them.
///
/// The panic hook is global, so it is replaced once, by one that ignores panics of the other crate and passes all
/// others to the previous hook. A program that sets its own hook later sees the message; the error is the same.
fn guarded<T>(call: impl FnOnce() -> std::result::Result<T, Failure>) -> std::result::Result<T, Broken> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let others = panic::take_hook();
        panic::set_hook(Box::new(move |panic| {
            if !INSIDE.try_with(Cell::get).unwrap_or(false) {
                others(panic);
            }
        }));
    });
    let before = INSIDE.replace(true);
    // State after a panic is dropped, or only read: poisoned caches are not used.
    let answer = panic::catch_unwind(AssertUnwindSafe(call));
    INSIDE.set(before);
    match answer {
        Ok(answer) => answer.map_err(Broken::Refused),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("it panics");
            Err(Broken::Panic(text.lines().next().unwrap_or_default().chars().take(200).collect()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Broken, guarded};

    #[test]
    fn panics_inside_are_errors() {
        for _ in 0..2 {
            let broken = guarded::<()>(|| panic!("index {} out of bounds", 7)).expect_err("a panic");
            let Broken::Panic(why) = &broken else { panic!("{broken}") };
            assert_eq!(why, "index 7 out of bounds");
            assert!(broken.to_string().contains("failed (index 7"), "{broken}");
        }
        assert!(matches!(guarded::<()>(|| Err("no".into())), Err(Broken::Refused(_))));
        assert_eq!(guarded(|| Ok(3)).ok(), Some(3));
    }
}
