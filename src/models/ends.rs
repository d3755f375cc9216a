//! Ends of generated rows other than end tokens.

use std::fmt;

use crate::{Error, Result, collect::CollectVec, error::ensure};

/// Stopping criterion of a row: decides from its new tokens where it ends, for instance at a stop string.
///
/// [`GenerateOptions::row_ends`] takes one for each row; [`GenerateOptions::eos_tokens`] need none.
///
/// ```
/// use x_transformers::{Result, models::RowEnd};
///
/// /// Ends a row at the second token 10.
/// #[derive(Clone, Debug, Default)]
/// struct TwoLines(usize);
///
/// impl RowEnd for TwoLines {
///     fn push(&mut self, token: i64) -> Result<bool> {
///         self.0 += usize::from(token == 10);
///         Ok(self.0 == 2)
///     }
///
///     fn boxed_clone(&self) -> Box<dyn RowEnd> {
///         Box::new(self.clone())
///     }
/// }
/// ```
///
/// [`GenerateOptions::row_ends`]: super::GenerateOptions::row_ends
/// [`GenerateOptions::eos_tokens`]: super::GenerateOptions::eos_tokens
pub trait RowEnd: fmt::Debug + Send + Sync {
    /// Takes the next new token of the row; returns `true` if the row ends with it.
    ///
    /// Errors: those of the implementation; generation returns them.
    fn push(&mut self, token: i64) -> Result<bool>;

    /// Copies the state: beams with a common beginning continue separately.
    fn boxed_clone(&self) -> Box<dyn RowEnd>;
}

impl Clone for Box<dyn RowEnd> {
    fn clone(&self) -> Self {
        self.boxed_clone()
    }
}

/// Finds stop strings in text that comes in pieces.
///
/// A stop string may be split anywhere across pieces: text that could be the beginning of one is held back until the
/// next piece decides.
///
/// ```
/// use x_transformers::models::StopMatcher;
/// # fn main() -> x_transformers::Result<()> {
/// let mut stop = StopMatcher::new(&["###"])?;
/// assert_eq!(stop.push("done #"), "done ");
/// assert_eq!(stop.push("# "), "## ");
/// assert_eq!(stop.push("end##"), "end");
/// assert_eq!(stop.push("# more"), "");
/// assert!(stop.stopped());
/// assert_eq!(stop.finish(), "");
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, Default)]
pub struct StopMatcher {
    stops: Vec<String>,
    /// Beginning of a stop string that may follow.
    held: String,
    stopped: bool,
}

impl StopMatcher {
    /// Creates a matcher for these strings; without any it passes on all text.
    ///
    /// Errors: an empty stop string.
    pub fn new<S: AsRef<str>>(stops: &[S]) -> Result<Self> {
        let stops: Vec<String> = stops.iter().map(|stop| stop.as_ref().to_string()).collect_vec();
        ensure!(
            !stops.iter().any(String::is_empty),
            Error::option("stop", "expected non-empty stop strings, got an empty one")
        );
        Ok(Self { stops, held: String::new(), stopped: false })
    }

    /// Takes the next piece; returns the text that is certain to precede any stop string, often empty.
    pub fn push(&mut self, piece: &str) -> String {
        if self.stopped {
            return String::new();
        }
        let mut text = std::mem::take(&mut self.held);
        text.push_str(piece);
        // The first to be complete, which makes the result independent of how the text is split; of several the
        // longest.
        let found = self.stops.iter().filter_map(|stop| text.find(stop).map(|at| (at + stop.len(), at)));
        if let Some((_, at)) = found.min() {
            self.stopped = true;
            text.truncate(at);
            return text;
        }
        let longest = self.stops.iter().map(String::len).max().unwrap_or(0);
        let first = text.len().saturating_sub(longest.saturating_sub(1));
        let begins = |at: &usize| {
            text.is_char_boundary(*at)
                && self.stops.iter().any(|stop| stop.as_bytes().starts_with(&text.as_bytes()[*at..]))
        };
        let at = (first..text.len()).find(begins).unwrap_or(text.len());
        self.held = text.split_off(at);
        text
    }

    /// Returns `true` once a stop string has been found.
    pub fn stopped(&self) -> bool {
        self.stopped
    }

    /// Returns the text that was held back, when no more follows.
    pub fn finish(self) -> String {
        self.held
    }
}

#[cfg(test)]
mod tests {
    use super::StopMatcher;

    /// The result is the text before the first stop string to end, however the text is split into pieces.
    #[test]
    fn stop_strings_are_found_across_pieces() {
        let cases = [
            (&["ab"][..], "aab!", "a", true),
            (&["aab"], "aaab", "a", true),
            (&["é!", "xyz"], "xyé!z", "xy", true),
            (&["\n\nUser:"], "hi\n\nUse\n\nUser: no", "hi\n\nUse", true),
            (&["abcd", "c"], "abcd", "ab", true),
            (&["c", "bc"], "abc", "a", true),
            (&["abc"], "abab", "abab", false),
            (&[], "abc", "abc", false),
        ];
        for (stops, text, expected, stopped) in cases {
            let characters: Vec<char> = text.chars().collect();
            for size in 1..=characters.len() {
                let mut matcher = StopMatcher::new(stops).unwrap();
                let pieces = characters.chunks(size).map(|piece| matcher.push(&piece.iter().collect::<String>()));
                let mut shown: String = pieces.collect();
                assert_eq!(matcher.stopped(), stopped, "{text} by {size}");
                shown += &matcher.finish();
                assert_eq!(shown, expected, "{text} by {size}");
            }
        }
        assert!(StopMatcher::new(&["a", ""]).unwrap_err().to_string().contains("empty"));
    }
}
