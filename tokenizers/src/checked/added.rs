//! Added tokens, which are matched in a text before anything else.

use std::borrow::Cow;

use ahash::AHashSet;
use aho_corasick::{AhoCorasick, MatchKind};
use serde_json::Value;
use tokenizers::AddedToken;

use super::{Failure, normalize::Normalizer, vocabulary::shown};

/// Matchers of added tokens.
pub struct Added {
    /// Matches unmodified texts.
    plain: Option<Finder>,
    /// Matches normalized texts.
    normalized: Option<Finder>,
}

struct Finder {
    automaton: AhoCorasick,
    tokens: Vec<(u32, AddedToken)>,
}

/// A part of a text.
pub enum Piece<'t> {
    Token(u32),
    Text(&'t str),
}

/// Maximum number of bytes of an added token.
const MAX_TOKEN: usize = 64 << 10;

/// The added tokens of `tokenizer.json`, in the order of the file.
pub fn of_json(tokenizer: &Value) -> Result<Vec<AddedToken>, String> {
    let list = match tokenizer.get("added_tokens") {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Array(list)) => list,
        Some(_) => return Err("added_tokens: expected a list".to_string()),
    };
    let token = |value: &Value| {
        let content = value.get("content").and_then(Value::as_str).ok_or("added_tokens: a token has no `content`")?;
        if content.len() > MAX_TOKEN {
            let (start, bytes) = (shown(content), content.len());
            return Err(format!("added_tokens: `{start}` has {bytes} bytes, expected at most {MAX_TOKEN}"));
        }
        let broken = |key: &str, why: &str| format!("added_tokens: {key} of `{}`: {why}", shown(content));
        value.get("id").and_then(super::vocabulary::id).ok_or_else(|| broken("id", "expected a number below 2^31"))?;
        let flag =
            |key: &str| value.get(key).and_then(Value::as_bool).ok_or_else(|| broken(key, "expected true or false"));
        Ok(AddedToken {
            content: content.to_string(),
            single_word: flag("single_word")?,
            lstrip: flag("lstrip")?,
            rstrip: flag("rstrip")?,
            normalized: flag("normalized")?,
            special: flag("special")?,
        })
    };
    list.iter().map(token).collect()
}

impl Added {
    /// Builds the matchers from tokens with their ids, as in the vocabulary of the crate; `split_special` omits special
    /// ones.
    pub fn new(
        tokens: &[(u32, AddedToken)],
        normalizer: Option<&Normalizer>,
        split_special: bool,
    ) -> Result<Self, Failure> {
        let (mut plain, mut normalized) = (Vec::new(), Vec::new());
        let mut known = AHashSet::new();
        // If two tokens normalize to the same text, the special one is matched.
        let (special, others): (Vec<_>, Vec<_>) = tokens.iter().partition(|(_, token)| token.special);
        for (id, token) in special.into_iter().chain(others) {
            if token.content.is_empty() || split_special && token.special || !known.insert(token.content.as_str()) {
                continue;
            }
            if token.normalized {
                let content = match normalizer {
                    Some(normalizer) => normalizer.normalize(Cow::Borrowed(&token.content), &mut false)?,
                    None => Cow::Borrowed(token.content.as_str()),
                };
                // A token that normalizes to an empty text never matches.
                if !content.is_empty() {
                    normalized.push((content, (*id, token.clone())));
                }
            } else {
                plain.push((Cow::Borrowed(token.content.as_str()), (*id, token.clone())));
            }
        }
        Ok(Self { plain: Finder::new(plain)?, normalized: Finder::new(normalized)? })
    }

    /// Splits an unmodified text into the tokens that match it and the text between them.
    pub fn in_text<'t>(
        &self,
        text: &'t str,
        sink: &mut dyn FnMut(Piece<'t>) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        Finder::split(self.plain.as_ref(), text, sink)
    }

    /// Splits a normalized text likewise, by the tokens that match normalized texts.
    pub fn in_normalized<'t>(
        &self,
        text: &'t str,
        sink: &mut dyn FnMut(Piece<'t>) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        Finder::split(self.normalized.as_ref(), text, sink)
    }
}

impl Finder {
    fn new(tokens: Vec<(Cow<'_, str>, (u32, AddedToken))>) -> Result<Option<Self>, Failure> {
        if tokens.is_empty() {
            return Ok(None);
        }
        let contents = tokens.iter().map(|(content, _)| content.as_bytes());
        let automaton = AhoCorasick::builder().match_kind(MatchKind::LeftmostLongest).build(contents)?;
        Ok(Some(Self { automaton, tokens: tokens.into_iter().map(|(_, token)| token).collect() }))
    }

    fn split<'t>(
        finder: Option<&Self>,
        text: &'t str,
        sink: &mut dyn FnMut(Piece<'t>) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let mut end = 0;
        if let Some(finder) = finder {
            for found in finder.automaton.find_iter(text) {
                let (mut start, mut stop) = (found.start(), found.end());
                let (id, token) = &finder.tokens[found.pattern().as_usize()];
                if token.single_word {
                    let before = text[..start].chars().next_back().is_some_and(is_word);
                    if before || text[stop..].chars().next().is_some_and(is_word) {
                        continue;
                    }
                }
                if token.lstrip {
                    // Excludes spaces that the previous token has consumed.
                    let from = end.min(start);
                    start = end.max(from + text[from..start].trim_end().len());
                }
                if token.rstrip {
                    // Only spaces separate the previous token from here.
                    stop = stop.max(end);
                    stop = text.len() - text[stop..].trim_start().len();
                }
                if end < start {
                    sink(Piece::Text(&text[end..start]))?;
                }
                // The previous token may have consumed all spaces of this one.
                if start < stop {
                    sink(Piece::Token(*id))?;
                }
                end = stop;
            }
        }
        if end < text.len() { sink(Piece::Text(&text[end..])) } else { Ok(()) }
    }
}

/// Returns `true` for characters in the regex class `\w`.
fn is_word(character: char) -> bool {
    regex_syntax::try_is_word_character(character).unwrap_or_else(|_| character.is_alphanumeric())
}
