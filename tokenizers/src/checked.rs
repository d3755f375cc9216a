//! The boundary to the crate `tokenizers`: what goes in is checked, and a panic inside becomes an error.
//!
//! That crate takes its files on trust. Damaged ones make it index out of bounds or unwrap what is missing, which is not
//! this crate's to mend; here such a panic is caught, its message is not printed, and the error names the file.

use std::{
    cell::Cell,
    fmt::Display,
    panic::{self, AssertUnwindSafe},
    path::{Path, PathBuf},
    sync::Once,
};

use x_transformers::Result;

use tokenizers::{PostProcessor, TruncationDirection};

use super::{described::Described, file_error, refused};

/// A tokenizer of the crate `tokenizers` whose panics are errors.
pub struct Checked {
    inner: tokenizers::Tokenizer,
    /// The file that it comes from.
    path: PathBuf,
    /// The number of tokens that a text is cut to, if the files have a bound.
    max_length: Option<usize>,
    /// If `true`, what is cut off a text is its beginning.
    cut_left: bool,
}

/// Tokens of a text that may have been cut.
pub struct CutText {
    pub ids: Vec<u32>,
    /// The number of tokens of the whole text.
    pub whole: usize,
}

impl Checked {
    /// Parses what `tokenizer.json` holds, with what other files say; `path` is the file that errors name.
    ///
    /// Errors: a description that is damaged or that the crate `tokenizers` does not take; a token whose id in the files
    /// is not its id in the vocabulary.
    pub fn parse(path: &Path, described: &Described) -> Result<Self> {
        let broken = |why: String| file_error(path, format_args!("tokenizer: {why}"));
        let inner = guarded(|| {
            let mut inner: tokenizers::Tokenizer = described.json.parse()?;
            described.extend(&mut inner)?;
            // Files may ask for a fixed length: what is padding is for the caller to say, and nothing is cut in silence.
            inner.with_padding(None);
            inner.with_truncation(None)?;
            Ok(inner)
        });
        let inner = inner.map_err(|why| broken(why.to_string()))?;
        let Described { max_length, cut_left, .. } = *described;
        Ok(Self { inner, path: path.to_path_buf(), max_length, cut_left })
    }

    /// The tokenizer itself, for questions that cannot fail.
    pub fn raw(&self) -> &tokenizers::Tokenizer {
        &self.inner
    }

    /// The number of tokens that a text is cut to, if the files have a bound.
    pub fn max_length(&self) -> Option<usize> {
        self.max_length
    }

    /// Tokens of a text with those around it, together at most `most`: what is too long is cut, the tokens around it stay.
    ///
    /// Errors: a text that the tokenizer does not take, or a bound below the number of tokens around it.
    pub fn encode_within(&self, text: &str, most: usize) -> Result<CutText> {
        self.answer(|| {
            let mut encoding = self.inner.encode_fast(text, false)?;
            let around = self.inner.get_post_processor().map_or(0, |processor| processor.added_tokens(false));
            let whole = encoding.len() + around;
            if whole > most {
                let Some(room) = most.checked_sub(around) else {
                    let why = format!("texts are cut to {most} tokens, and the model expects {around} around them");
                    return Err(why.into());
                };
                let side = if self.cut_left { TruncationDirection::Left } else { TruncationDirection::Right };
                encoding.truncate(room, 0, side);
            }
            Ok(CutText { ids: self.inner.post_process(encoding, None, true)?.get_ids().to_vec(), whole })
        })
    }

    /// If `true`, a token is one that is not text.
    pub fn is_special(&self, id: u32) -> bool {
        self.inner.id_to_token(id).is_some_and(|token| self.inner.get_added_vocabulary().is_special_token(&token))
    }

    /// Tokens of a text; `around` adds those that the model expects around it.
    pub fn encode(&self, text: &str, around: bool) -> Result<Vec<u32>> {
        // Offsets into the text are not asked for.
        self.answer(|| Ok(self.inner.encode_fast(text, around)?.get_ids().to_vec()))
    }

    /// The id of a token.
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

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// An answer that is none.
enum Broken {
    Refused(Failure),
    Panic(String),
}

impl Display for Broken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Refused(why) => why.fmt(f),
            Self::Panic(why) => write!(f, "the crate `tokenizers` cannot work with it ({why})"),
        }
    }
}

thread_local! {
    /// `true` while this thread is in the other crate.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

/// Calls the other crate; its panics are caught and print nothing.
///
/// The panic hook is the process's, so that it is changed once, to one that asks where the panic comes from and passes all
/// others on. A program that sets a hook of its own later sees the message; the error is the same.
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
    // What a panic leaves behind is dropped, or only read again: caches that are poisoned are not used.
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
