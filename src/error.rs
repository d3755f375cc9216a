//! The crate's error type. Every message names the expected and the actual value, and what to do.

use std::{fmt, io, path::PathBuf};

/// Result type of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Error with its [`ErrorKind`] and the place in a model or program where it occurred.
///
/// Match on [`Error::kind`] to handle it, print it for a person: the text contains the place, the op, and the shapes or
/// values involved.
///
/// It is one pointer, so that code that passes results on stays small.
///
/// ```
/// use x_transformers::{Device, ErrorKind, Tensor};
/// let (a, b) = (Tensor::arange(2, &Device::Cpu)?, Tensor::arange(3, &Device::Cpu)?);
/// let error = a.add(&b).unwrap_err();
/// assert!(matches!(error.kind(), ErrorKind::Shape { op: "add", .. }));
/// println!("{error}"); // names the op and both shapes
/// # Ok::<(), x_transformers::Error>(())
/// ```
pub struct Error(Box<Fields>);

struct Fields {
    kind: ErrorKind,
    /// Empty if none is known.
    place: String,
}

/// Kinds of errors, with the values that a program needs to handle them.
#[derive(Debug)]
#[non_exhaustive]
pub enum ErrorKind {
    /// Shapes that do not match the op's requirements, or a size that no tensor can have.
    Shape {
        /// The op that returned the error.
        op: &'static str,
        /// Expected and actual shapes.
        message: String,
    },
    /// A dtype that the op does not support.
    DType {
        /// The op that returned the error.
        op: &'static str,
        /// Expected and actual dtype.
        message: String,
    },
    /// Tensors on different devices, or a device that does not exist.
    Device {
        /// The op or call that returned the error.
        op: &'static str,
        /// The devices involved, and what to do.
        message: String,
    },
    /// An index (token, class, position) outside of its table.
    Index {
        /// The op that returned the error.
        op: &'static str,
        /// Kind of index, for instance `token`.
        what: &'static str,
        /// The offending value.
        index: i64,
        /// Valid indices are `0..limit`.
        limit: usize,
    },
    /// An argument outside of its domain.
    Argument {
        /// The op or function that returned the error.
        op: &'static str,
        /// The argument, its domain and its value.
        message: String,
    },
    /// A config value that is invalid, alone or in combination.
    Option {
        /// The option.
        key: String,
        /// Reason, with the expected and the actual value.
        why: String,
    },
    /// A config key that does not exist.
    UnknownOption {
        /// The key as written.
        key: String,
        /// The closest existing key, if one is similar.
        nearest: Option<String>,
        /// If `true`, it is an option of x-transformers 2, and the config follows 0.22.
        later: bool,
    },
    /// `backward` was called a second time: the saved activations are gone.
    BackwardTwice,
    /// `backward` of a tensor with more than one element needs a cotangent.
    NotScalar {
        /// The shape of the tensor.
        shape: Vec<usize>,
    },
    /// `backward` of a tensor that depends on no leaf, or was made outside of the tape.
    NotTracked,
    /// A tensor that belongs to another tape was used in an op.
    StaleTape {
        /// The op that received it.
        op: &'static str,
    },
    /// A tensor was used where its gradient would be lost, because a tape belongs to its thread: it was recorded by a
    /// tape of another thread, or computed from a leaf on another thread that had no tape.
    OtherThread {
        /// The op that received it.
        op: &'static str,
        /// The op that used the leaf without a tape, or `None` if a tape recorded it.
        by: Option<&'static str>,
    },
    /// An op without a gradient was given a tensor that requires one.
    NoGradient {
        /// The op that returned the error.
        op: &'static str,
    },
    /// Memory ran out.
    OutOfMemory {
        /// Number of bytes requested.
        requested: usize,
        /// Number of bytes in use by tensors.
        live: usize,
        /// Number of bytes that were kept for reuse and released before this error.
        cached: usize,
    },
    /// A file that could not be read or written.
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The operating system's reason.
        source: io::Error,
    },
    /// A file with invalid content.
    File {
        /// The file.
        path: PathBuf,
        /// Description of the problem.
        why: String,
    },
    /// Weights that do not match the model.
    Weights {
        /// Names that the model has and the file lacks.
        missing: Vec<String>,
        /// Names that the file has and the model lacks.
        unused: Vec<String>,
        /// Names with another shape: name, shape in the model, shape in the file.
        mismatched: Vec<(String, Vec<usize>, Vec<usize>)>,
    },
    /// Training produced NaN or an infinity.
    NonFinite {
        /// The step, counted from 0.
        step: u64,
        /// Name of the value that was not finite: `loss`, or the name of a parameter.
        what: String,
    },
}

impl Error {
    /// Creates an error of this kind, without a place.
    pub fn new(kind: ErrorKind) -> Self {
        Self(Box::new(Fields { kind, place: String::new() }))
    }

    /// Returns the kind of error.
    pub fn kind(&self) -> &ErrorKind {
        &self.0.kind
    }

    /// Like [`Error::kind`], but consumes the error.
    pub fn into_kind(self) -> ErrorKind {
        self.0.kind
    }

    /// Returns the place in a model or program where it occurred, or an empty string.
    pub fn place(&self) -> &str {
        &self.0.place
    }

    /// Returns the operating system's kind if it is an [`ErrorKind::Io`].
    pub fn io_kind(&self) -> Option<io::ErrorKind> {
        match self.kind() {
            ErrorKind::Io { source, .. } => Some(source.kind()),
            _ => None,
        }
    }

    pub(crate) fn shape(op: &'static str, message: impl fmt::Display) -> Self {
        Self::new(ErrorKind::Shape { op, message: message.to_string() })
    }

    pub(crate) fn dtype(op: &'static str, message: impl fmt::Display) -> Self {
        Self::new(ErrorKind::DType { op, message: message.to_string() })
    }

    pub(crate) fn argument(op: &'static str, message: impl fmt::Display) -> Self {
        Self::new(ErrorKind::Argument { op, message: message.to_string() })
    }

    pub(crate) fn device(op: &'static str, message: impl fmt::Display) -> Self {
        Self::new(ErrorKind::Device { op, message: message.to_string() })
    }

    pub(crate) fn index(op: &'static str, what: &'static str, index: i64, limit: usize) -> Self {
        Self::new(ErrorKind::Index { op, what, index, limit })
    }

    /// Returns the error of a mean loss over no targets.
    pub(crate) fn no_targets(targets: usize, ignore_index: i64) -> Self {
        let message = format!("all {targets} targets are `ignore_index` ({ignore_index}), so the mean has no terms");
        Self::argument("cross_entropy", message)
    }

    /// Returns the error of logits from which no token can be drawn.
    pub(crate) fn broken_logits() -> Self {
        Self::argument(
            "sample",
            "expected finite logits, got NaN or infinity: the weights are broken or overflow f16 (try bf16 or f32)",
        )
    }

    pub(crate) fn option(key: impl Into<String>, why: impl fmt::Display) -> Self {
        Self::new(ErrorKind::Option { key: key.into(), why: why.to_string() })
    }

    pub(crate) fn missing_option(key: &str) -> Self {
        Self::option(key, MISSING)
    }

    pub(crate) fn io(path: impl Into<PathBuf>, source: io::Error) -> Self {
        Self::new(ErrorKind::Io { path: path.into(), source })
    }

    pub(crate) fn file(path: impl Into<PathBuf>, why: impl fmt::Display) -> Self {
        Self::new(ErrorKind::File { path: path.into(), why: why.to_string() })
    }

    /// Prepends a place, for instance `attn_layers.layers.3.1`; nested places read from the outside in.
    pub fn context(mut self, place: impl fmt::Display) -> Self {
        let inner = &self.0.place;
        self.0.place = if inner.is_empty() { place.to_string() } else { format!("{place}.{inner}") };
        self
    }
}

/// Reason of an [`ErrorKind::Option`] for an option without a default.
const MISSING: &str = "missing required option";

/// Adds a place to the error of a result.
pub(crate) trait ErrorContext<T> {
    fn context(self, place: impl fmt::Display) -> Result<T>;
}

impl<T> ErrorContext<T> for Result<T> {
    fn context(self, place: impl fmt::Display) -> Result<T> {
        self.map_err(|error| error.context(place))
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Error").field("kind", self.kind()).field("place", &self.place()).finish()
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.place().is_empty() {
            write!(f, "{}: ", self.place())?;
        }
        self.kind().fmt(f)
    }
}

impl fmt::Display for ErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Shape { op, message }
            | Self::DType { op, message }
            | Self::Device { op, message }
            | Self::Argument { op, message } => write!(f, "{op}: {message}"),
            Self::Index { op, what, index, limit: 0 } => {
                write!(f, "{op}: {what} {index} is out of range: the valid range is empty")
            }
            Self::Index { op, what, index, limit } => {
                write!(f, "{op}: {what} {index} is out of range, expected 0 to {}", *limit as i64 - 1)
            }
            Self::Option { key, why } if why == MISSING => write!(f, "{MISSING} `{key}`"),
            Self::Option { key, why } => write!(f, "option `{key}`: {why}"),
            Self::UnknownOption { key, nearest: Some(nearest), .. } => {
                write!(f, "unknown option `{key}`, did you mean `{nearest}`?")
            }
            Self::UnknownOption { key, nearest: None, later: true } => write!(
                f,
                "option `{key}` is of x-transformers 2, this config follows 0.22, which lacks it: \
                 put \"version\": \"2\" at the top"
            ),
            Self::UnknownOption { key, nearest: None, later: false } => write!(f, "unknown option `{key}`"),
            Self::BackwardTwice => write!(
                f,
                "backward: called twice on one tape; its saved activations are freed, so record the forward pass again"
            ),
            Self::NotScalar { shape } => write!(
                f,
                "backward: expected a tensor with one element, got shape {shape:?}; reduce it to a scalar, or pass a \
                 cotangent of that shape to `backward_with`"
            ),
            Self::NotTracked => {
                write!(f, "backward: the tensor does not depend on a parameter or `requires_grad` leaf of this tape")
            }
            Self::StaleTape { op } => write!(
                f,
                "{op}: an input was recorded on another tape; `.detach()` it to use only its value (inside \
                 `checkpoint`, pass it as an input)"
            ),
            Self::OtherThread { op, by: None } => write!(
                f,
                "{op}: an input was recorded by a tape of another thread, and a tape works only on its own thread; \
                 compute this on that thread, or `.detach()` the input to use only its value"
            ),
            Self::OtherThread { op, by: Some(by) } => write!(
                f,
                "{op}: an input depends on a parameter or `requires_grad` leaf that `{by}` used on another thread, \
                 which this tape does not record; compute the input on the tape's thread, or `.detach()` it to use \
                 only its value"
            ),
            Self::NoGradient { op } => {
                write!(
                    f,
                    "{op}: this op has no gradient but an input requires one; `.detach()` the input if that is intended"
                )
            }
            Self::OutOfMemory { requested, live, cached } => write!(
                f,
                "out of memory: {requested} bytes requested with {live} bytes live (after releasing {cached} cached \
                 bytes); use a smaller batch or sequence, or activation checkpointing"
            ),
            Self::Io { path, source } => write!(f, "{}: {source}", path.display()),
            Self::File { path, why } => write!(f, "{}: {why}", path.display()),
            Self::Weights { missing, unused, mismatched } => {
                write!(f, "the weights do not match the model:")?;
                for name in missing {
                    write!(f, "\n  missing         {name}")?;
                }
                for name in unused {
                    write!(f, "\n  unused          {name}")?;
                }
                for (name, model, file) in mismatched {
                    write!(f, "\n  shape mismatch  {name}: {model:?} in the model, {file:?} in the file")?;
                }
                match other_version(missing, unused) {
                    Some((name, version, change)) => write!(
                        f,
                        "\n`{name}` is a name of x-transformers {version}: {change} the config, if these are its weights"
                    ),
                    None => Ok(()),
                }
            }
            Self::NonFinite { step, what } => write!(
                f,
                "step {step}: {what} is not finite, training stopped; lower the learning rate or resume from the last checkpoint"
            ),
        }
    }
}

/// Finds the first unused name that the other version of x-transformers gives, where the model lacks names of its own;
/// returns it, that version, and what to change.
fn other_version<'n>(missing: &[String], unused: &'n [String]) -> Option<(&'n str, &'static str, &'static str)> {
    /// Whole parts of names, between dots, that only one of the versions has.
    const SECOND: [&str; 4] = ["token_emb.emb.weight", "ff.0", "gamma", "final_norm"];
    const FIRST: [&str; 5] = ["token_emb.weight", "net.0", "net.3", "norm.weight", "norm.bias"];
    let has = |name: &str, parts: &[&str]| parts.iter().any(|part| format!(".{name}.").contains(&format!(".{part}.")));
    let find = |parts: &[&str], others: &[&str]| {
        let lacks = missing.iter().any(|name| has(name, others));
        unused.iter().find(|name| lacks && has(name, parts)).map(String::as_str)
    };
    if let Some(name) = find(&SECOND, &FIRST) {
        return Some((name, "2", "put \"version\": \"2\" at the top of"));
    }
    find(&FIRST, &SECOND).map(|name| (name, "0.22", "remove \"version\" from"))
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self.kind() {
            ErrorKind::Io { source, .. } => Some(source),
            _ => None,
        }
    }
}

/// Returns the error unless the condition holds.
macro_rules! ensure {
    ($condition:expr, $error:expr) => {
        if !$condition {
            return Err($error);
        }
    };
}
pub(crate) use ensure;
