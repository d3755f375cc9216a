//! Failure of a command: one line that says what is wrong and what to do.

use std::{
    fmt,
    io::{self, Write},
    path::Path,
};

use x_transformers::{Error, ErrorKind};

pub type Result<T> = std::result::Result<T, Failure>;

/// Reason that a command ended early.
#[derive(Debug)]
pub enum Failure {
    /// Whoever read the output has gone; there is nobody to tell.
    ClosedPipe,
    /// One line for a person.
    Message(String),
}

impl Failure {
    /// A failure with this message.
    pub fn new(message: impl fmt::Display) -> Self {
        Self::Message(one_line(&message.to_string()))
    }

    /// A file that could not be read or written.
    pub fn io(path: &Path, error: &io::Error) -> Self {
        Self::new(format_args!("{}: {error}{}", path.display(), advice(error)))
    }

    /// Adds advice to the failure.
    pub fn advising(self, advice: impl fmt::Display) -> Self {
        match self {
            Self::ClosedPipe => self,
            Self::Message(message) => Self::new(format_args!("{message}; {advice}")),
        }
    }

    /// Prefixes the failure with the path that it concerns.
    pub fn within(self, path: &Path) -> Self {
        match self {
            Self::ClosedPipe => self,
            Self::Message(message) => Self::new(format_args!("{}: {message}", path.display())),
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let advice = match error.kind() {
            ErrorKind::Io { source, .. } => advice(source),
            ErrorKind::Weights { .. } => "; use the config that they were trained with",
            ErrorKind::UnknownOption { nearest: None, .. } => "; remove it",
            _ => "",
        };
        Self::new(format_args!("{error}{advice}"))
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ClosedPipe => f.write_str("the output was closed"),
            Self::Message(message) => f.write_str(message),
        }
    }
}

/// Says something on standard error that does not end the command.
pub fn warn(text: impl fmt::Display) {
    if !crate::ranks::is_first() {
        return;
    }
    // Where even standard error is closed there is nobody to tell.
    let _ = writeln!(io::stderr(), "xt: warning: {}", one_line(&text.to_string()));
}

/// Writes to standard output at once.
pub fn print(text: impl fmt::Display) -> Result<()> {
    let mut out = io::stdout().lock();
    write!(out, "{text}").and_then(|()| out.flush()).map_err(|error| match error.kind() {
        io::ErrorKind::BrokenPipe => Failure::ClosedPipe,
        _ => Failure::new(format_args!("standard output: {error}{}", advice(&error))),
    })
}

/// Returns advice on an error of the operating system.
fn advice(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::NotFound => "; check the path",
        io::ErrorKind::PermissionDenied => "; check its permissions",
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => "; free some space",
        io::ErrorKind::IsADirectory => "; give a file",
        io::ErrorKind::NotADirectory | io::ErrorKind::AlreadyExists => "; give a folder",
        // EIO, which has no kind.
        _ if error.raw_os_error() == Some(5) => "; check the disk",
        _ => "",
    }
}

/// Joins the lines of a long message and drops other control characters.
fn one_line(text: &str) -> String {
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    lines.join("; ").replace(":; ", ": ").chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::Failure;
    use x_transformers::{Error, ErrorKind};

    #[test]
    fn messages_are_one_line() {
        let weights = Error::new(ErrorKind::Weights {
            missing: vec!["a.weight".into(), "b.weight".into()],
            unused: vec![],
            mismatched: vec![("c".into(), vec![1], vec![2])],
        });
        let text = Failure::from(weights.context("out")).to_string();
        assert!(!text.contains('\n') && text.contains("missing         b.weight; shape mismatch  c"), "{text}");
        assert!(text.ends_with("trained with"), "{text}");
    }
}
