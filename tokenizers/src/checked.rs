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

use super::{file_error, refused};

/// A tokenizer of the crate `tokenizers` whose panics are errors.
pub struct Checked {
    inner: tokenizers::Tokenizer,
    /// The file that it comes from.
    path: PathBuf,
}

impl Checked {
    /// Parses what `tokenizer.json` holds; `path` is the file that errors name.
    ///
    /// Errors: a description that is damaged or that the crate `tokenizers` does not take.
    pub fn parse(path: &Path, json: &str) -> Result<Self> {
        let broken = |why: String| file_error(path, format_args!("tokenizer: {why}"));
        let inner = guarded(|| {
            let mut inner: tokenizers::Tokenizer = json.parse()?;
            // Files may ask for a fixed length: what is padding is for the caller to say, and nothing is cut in silence.
            inner.with_padding(None);
            inner.with_truncation(None)?;
            Ok(inner)
        });
        Ok(Self { inner: inner.map_err(|why| broken(why.to_string()))?, path: path.to_path_buf() })
    }

    /// Tokens of a text; `around` adds those that the model expects around it.
    pub fn encode(&self, text: &str, around: bool) -> Result<Vec<u32>> {
        // Offsets into the text are not asked for.
        self.answer(|| Ok(self.inner.encode_fast(text, around)?.get_ids().to_vec()))
    }

    /// The text of tokens, without special ones.
    pub fn decode(&self, tokens: &[u32]) -> Result<String> {
        if tokens.is_empty() {
            return Ok(String::new());
        }
        self.answer(|| self.inner.decode(tokens, true))
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
