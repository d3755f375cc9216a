//! Normalizers: from text to text.
//!
//! The crate `tokenizers` tracks the origin of each byte, which takes many times the size of a text. Origins are not
//! used here, so texts are normalized in short parts where that gives the same result.

use std::borrow::Cow;

use fancy_regex::Regex;
use tokenizers::{NormalizedString, Normalizer as _, NormalizerWrapper, normalizer::Range};

use super::{Failure, charsmap, file::Part};

/// A normalizer of `tokenizer.json`.
pub enum Normalizer {
    Sequence(Vec<Self>),
    Replace {
        pattern: Regex,
        content: String,
    },
    Prepend(String),
    Strip {
        left: bool,
        right: bool,
    },
    /// A normalizer that may work in parts, cut at characters for which [`is_alone`] is true.
    Local(NormalizerWrapper),
}

/// Factor by which a text may grow, in addition to [`GROWTH`] bytes.
const TIMES: usize = 64;
const GROWTH: usize = 1 << 20;

impl Normalizer {
    /// Reads a normalizer; `depth` is the number of enclosing sequences.
    pub fn of_json(part: &Part) -> Result<Self, String> {
        Ok(match part.kind() {
            Some("Sequence") => Self::Sequence(part.sequence("normalizers", Self::of_json)?),
            Some("Replace") => Self::Replace { pattern: part.pattern()?, content: part.content()?.to_string() },
            Some("Prepend") => Self::Prepend(part.affix("prepend")?.to_string()),
            Some("Strip") => Self::Strip { left: part.flag("strip_left")?, right: part.flag("strip_right")? },
            Some("Precompiled") => Self::Local(NormalizerWrapper::Precompiled(charsmap::of_json(part)?)),
            _ => match part.parse()? {
                normalizer @ (NormalizerWrapper::BertNormalizer(_)
                | NormalizerWrapper::StripAccents(_)
                | NormalizerWrapper::NFC(_)
                | NormalizerWrapper::NFD(_)
                | NormalizerWrapper::NFKC(_)
                | NormalizerWrapper::NFKD(_)
                | NormalizerWrapper::Lowercase(_)
                | NormalizerWrapper::Nmt(_)
                | NormalizerWrapper::ByteLevel(_)) => Self::Local(normalizer),
                _ => return Err(part.broken("type", "is not supported")),
            },
        })
    }

    /// Returns the normalized text. Sets `first` to `false` if its first character is no longer that of the text.
    pub fn normalize<'t>(&self, text: Cow<'t, str>, first: &mut bool) -> Result<Cow<'t, str>, Failure> {
        let limit = text.len().saturating_mul(TIMES).saturating_add(GROWTH);
        self.within(text, first, limit)
    }

    fn within<'t>(&self, text: Cow<'t, str>, first: &mut bool, limit: usize) -> Result<Cow<'t, str>, Failure> {
        if text.is_empty() {
            return Ok(text);
        }
        let made = match self {
            Self::Sequence(parts) => {
                return parts.iter().try_fold(text, |text, part| part.within(text, first, limit));
            }
            Self::Replace { pattern, content } => match replace(&text, pattern, content, first, limit)? {
                Some(made) => made.into(),
                None => text,
            },
            Self::Prepend(prefix) => format!("{prefix}{text}").into(),
            Self::Strip { left, right } => {
                let mut range = text.as_ref();
                if *left {
                    range = range.trim_start();
                    *first &= range.len() == text.len();
                }
                if *right {
                    range = range.trim_end();
                }
                range.to_string().into()
            }
            Self::Local(normalizer) => {
                let mut made = String::with_capacity(text.len());
                let mut rest = text.as_ref();
                while !rest.is_empty() {
                    let (part, behind) = rest.split_at(part(rest));
                    let mut part = NormalizedString::from(part);
                    normalizer.normalize(&mut part)?;
                    if made.is_empty() {
                        let start = part.get().chars().next().map_or(0, char::len_utf8);
                        let from = part.convert_offsets(Range::Normalized(0..start)).map_or(0, |range| range.start);
                        *first &= from == 0 && start > 0;
                    }
                    made.push_str(part.get());
                    grown(&made, limit)?;
                    rest = behind;
                }
                made.into()
            }
        };
        grown(&made, limit)?;
        Ok(made)
    }
}

fn grown(text: &str, limit: usize) -> Result<(), Failure> {
    if text.len() > limit {
        return Err(format!("the normalized text has more than {limit} bytes").into());
    }
    Ok(())
}

/// Replaces all matches; returns `None` if there are none.
fn replace(
    text: &str,
    pattern: &Regex,
    content: &str,
    first: &mut bool,
    limit: usize,
) -> Result<Option<String>, Failure> {
    let mut made = String::new();
    let mut end = 0;
    let mut any = false;
    for found in pattern.find_iter(text) {
        let found = found.map_err(|why| format!("a regular expression of the normalizer failed: {why}"))?;
        // A replacement of several characters takes the position of the last one.
        *first &= found.start() > 0 || !content.is_empty() && found.as_str().chars().count() < 2;
        made.push_str(&text[end..found.start()]);
        made.push_str(content);
        grown(&made, limit)?;
        end = found.end();
        any = true;
    }
    if !any {
        return Ok(None);
    }
    made.push_str(&text[end..]);
    Ok(Some(made))
}

/// Returns the number of bytes of the next part of a text.
fn part(text: &str) -> usize {
    const PART: usize = 4096;
    if text.len() <= PART {
        return text.len();
    }
    let start = text.floor_char_boundary(PART);
    let mut before = text[..start].chars().next_back().unwrap_or('\n');
    for (at, character) in text[start..].char_indices() {
        if is_alone(before) && is_alone(character) {
            return start + at;
        }
        before = character;
    }
    text.len()
}

/// Returns `true` for characters that neither compose nor form a grapheme with each other: between two of them, a text
/// can be split for normalization. Returns `false` for characters that are not known to be safe.
fn is_alone(character: char) -> bool {
    matches!(character,
        ' '..='~' | '\t'
        | '\u{c0}'..='\u{17f}'
        | 'Α'..='Ω' | 'α'..='ω' | 'А'..='я'
        | 'א'..='ת' | '\u{621}'..='\u{64a}'
        | '\u{905}'..='\u{939}' | '\u{e01}'..='\u{e30}'
        | '\u{3041}'..='\u{3096}' | '\u{30a1}'..='\u{30fa}'
        | '\u{4e00}'..='\u{9fff}' | '\u{ac00}'..='\u{d7a3}'
        | '\u{1f300}'..='\u{1f3fa}' | '\u{1f400}'..='\u{1faff}')
}
