//! Pre-tokenizers: from a text to its words.

use fancy_regex::Regex;
use regex_automata::{PatternID, meta};
use serde_json::Value;
use tokenizers::{
    OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer as _, PreTokenizerWrapper, SplitDelimiterBehavior,
};
use unicode_categories::UnicodeCategories;

use super::{Failure, file::Part, file::compile};

/// A pre-tokenizer of `tokenizer.json`.
pub enum Splitter {
    /// Splits at matches of a pattern.
    Split {
        find: Find,
        behavior: SplitDelimiterBehavior,
        invert: bool,
    },
    /// Maps bytes to characters, after splitting into words if there is a pattern.
    ByteLevel {
        space: bool,
        words: Option<Find>,
    },
    Metaspace {
        replacement: char,
        prepend: Prepend,
        split: bool,
    },
    /// Any other, implemented by the crate `tokenizers`.
    Other(PreTokenizerWrapper),
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Prepend {
    Never,
    /// Prepends to the first word only.
    First,
    Always,
}

/// Pattern at which a text is split.
pub enum Find {
    Character(fn(char) -> bool),
    One(char),
    Pattern(Box<Regex>),
    /// A pattern that ends with `\s+(?!\S)|\s+`: its other alternatives, with spaces handled separately.
    Words(Box<meta::Regex>),
}

/// Word pattern of GPT-2.
const WORDS: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

/// Receives each word, with `true` for one at the start of the text.
type Sink<'s> = &'s mut dyn FnMut(&str, bool) -> Result<(), Failure>;

impl Splitter {
    /// Reads a pre-tokenizer; a sequence is flattened into its members.
    pub fn of_json(part: &Part) -> Result<Vec<Self>, String> {
        use SplitDelimiterBehavior::{Contiguous, Isolated, Removed};
        let split = |find, behavior| Self::Split { find, behavior, invert: false };
        Ok(match part.kind() {
            Some("Sequence") => {
                return Ok(part.sequence("pretokenizers", Self::of_json)?.into_iter().flatten().collect());
            }
            Some("Split") => {
                let find = Find::pattern(&part.pattern_text()?).map_err(|why| part.broken("pattern", why))?;
                vec![Self::Split { find, behavior: behavior(part)?, invert: part.flag("invert")? }]
            }
            Some("ByteLevel") => {
                let words = part.get("use_regex").is_none() || part.flag("use_regex")?;
                let words = words.then(|| Find::pattern(WORDS)).transpose()?;
                vec![Self::ByteLevel { space: part.flag("add_prefix_space")?, words }]
            }
            Some("BertPreTokenizer") => vec![
                split(Find::Character(char::is_whitespace), Removed),
                split(Find::Character(is_punctuation), Isolated),
            ],
            Some("WhitespaceSplit") => vec![split(Find::Character(char::is_whitespace), Removed)],
            Some("Whitespace") => {
                let find = Find::Pattern(Box::new(compile(r"\w+|[^\w\s]+")?));
                vec![Self::Split { find, behavior: Removed, invert: true }]
            }
            Some("Punctuation") => {
                let behavior = if part.get("behavior").is_some() { behavior(part)? } else { Isolated };
                vec![split(Find::Character(is_punctuation), behavior)]
            }
            Some("Digits") => {
                let behavior = if part.flag("individual_digits")? { Isolated } else { Contiguous };
                vec![split(Find::Character(char::is_numeric), behavior)]
            }
            Some("Delimiter" | "CharDelimiterSplit") => vec![split(Find::One(character(part, "delimiter")?), Removed)],
            Some("Metaspace") => match part.parse()? {
                PreTokenizerWrapper::Metaspace(space) => vec![Self::Metaspace {
                    replacement: space.get_replacement(),
                    prepend: match space.get_prepend_scheme() {
                        tokenizers::pre_tokenizers::metaspace::PrependScheme::Never => Prepend::Never,
                        tokenizers::pre_tokenizers::metaspace::PrependScheme::First => Prepend::First,
                        tokenizers::pre_tokenizers::metaspace::PrependScheme::Always => Prepend::Always,
                    },
                    split: space.get_split(),
                }],
                _ => return Err(part.broken("type", "is not supported")),
            },
            Some("FixedLength") => {
                if part.get("length").and_then(Value::as_u64) == Some(0) {
                    return Err(part.broken("length", "is 0, expected at least 1"));
                }
                vec![Self::Other(part.parse()?)]
            }
            Some("UnicodeScripts") => vec![Self::Other(part.parse()?)],
            _ => return Err(part.broken("type", "is not supported")),
        })
    }

    /// Splits a text by the first of the pre-tokenizers, and its words by the others; `first` is `true` at the start of
    /// the whole text.
    pub fn split_all(splitters: &[Self], text: &str, first: bool, sink: Sink<'_>) -> Result<(), Failure> {
        if text.is_empty() {
            return Ok(());
        }
        let Some((splitter, others)) = splitters.split_first() else { return sink(text, first) };
        splitter.split(text, first, &mut |word, at_start| {
            if word.is_empty() {
                return Ok(());
            }
            Self::split_all(others, word, first && at_start, sink)
        })
    }

    fn split(&self, text: &str, first: bool, sink: Sink<'_>) -> Result<(), Failure> {
        match self {
            Self::Split { find, behavior, invert } => find.split(text, *behavior, *invert, sink),
            Self::ByteLevel { space, words } => {
                let spaced;
                let text = if *space && !text.starts_with(' ') {
                    spaced = format!(" {text}");
                    &spaced
                } else {
                    text
                };
                let mut characters = String::new();
                let mut sink = |word: &str, at_start: bool| {
                    characters.clear();
                    characters.extend(word.bytes().map(character_of_byte));
                    sink(&characters, at_start)
                };
                match words {
                    Some(words) => words.split(text, SplitDelimiterBehavior::Isolated, false, &mut sink),
                    None => sink(text, true),
                }
            }
            Self::Metaspace { replacement, prepend, split } => {
                let mut replaced = String::with_capacity(text.len() + 4);
                let wanted = *prepend == Prepend::Always || *prepend == Prepend::First && first;
                if wanted && !text.starts_with(*replacement) && !text.starts_with(' ') {
                    replaced.push(*replacement);
                }
                replaced.extend(text.chars().map(|character| if character == ' ' { *replacement } else { character }));
                if *split {
                    Find::One(*replacement).split(&replaced, SplitDelimiterBehavior::MergedWithNext, false, sink)
                } else {
                    sink(&replaced, true)
                }
            }
            Self::Other(splitter) => {
                let mut text = PreTokenizedString::from(text);
                splitter.pre_tokenize(&mut text)?;
                let words = text.get_splits(OffsetReferential::Normalized, OffsetType::None);
                words.into_iter().try_for_each(|(word, (start, _), _)| sink(word, start == 0))
            }
        }
    }
}

impl Find {
    /// Compiles a regular expression. The end that most models share is matched without backtracking.
    fn pattern(pattern: &str) -> Result<Self, String> {
        // The crate `regex` interprets possessive quantifiers differently.
        if let Some(others) = pattern.strip_suffix(r"|\s+(?!\S)|\s+").filter(|others| !is_possessive(others))
            && let Ok(words) = meta::Regex::new_many(&[others, r"\s+"])
            && let Ok(parsed) = regex_syntax::parse(others)
            && parsed.properties().minimum_len().is_some_and(|length| length > 0)
        {
            return Ok(Self::Words(Box::new(words)));
        }
        compile(pattern).map(|pattern| Self::Pattern(Box::new(pattern)))
    }

    /// Calls `found` with all parts of the text in order, with `true` for a match.
    fn each(
        &self,
        text: &str,
        found: &mut dyn FnMut(usize, usize, bool) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let mut end = 0;
        let mut each = |start: usize, stop: usize| {
            if end < start {
                found(end, start, false)?;
            }
            end = stop;
            found(start, stop, true)
        };
        let by = |is: &dyn Fn(char) -> bool, each: &mut dyn FnMut(usize, usize) -> Result<(), Failure>| {
            let mut characters = text.char_indices().filter(|&(_, character)| is(character));
            characters.try_for_each(|(at, character)| each(at, at + character.len_utf8()))
        };
        match self {
            Self::Character(is) => by(is, &mut each)?,
            Self::One(one) => by(&|character| character == *one, &mut each)?,
            Self::Pattern(pattern) => pattern.find_iter(text).try_for_each(|place| {
                let place = place.map_err(|why| format!("a regular expression of the pre-tokenizer failed: {why}"))?;
                each(place.start(), place.end())
            })?,
            Self::Words(words) => {
                let mut start = 0;
                let spaces = PatternID::must(1);
                while let Some(place) = words.find(regex_automata::Input::new(text).range(start..)) {
                    let mut stop = place.end();
                    // The last of several spaces belongs to the next word.
                    if place.pattern() == spaces && stop < text.len() {
                        let last = text[..stop].chars().next_back().map_or(0, char::len_utf8);
                        if stop - last > place.start() {
                            stop -= last;
                        }
                    }
                    each(place.start(), stop)?;
                    start = stop;
                }
            }
        }
        if end < text.len() {
            found(end, text.len(), false)?;
        }
        Ok(())
    }

    fn split(&self, text: &str, behavior: SplitDelimiterBehavior, invert: bool, sink: Sink<'_>) -> Result<(), Failure> {
        use SplitDelimiterBehavior::{Contiguous, Isolated, MergedWithNext, MergedWithPrevious, Removed};
        // Start of an incomplete word.
        let mut open: Option<(usize, usize)> = None;
        let mut before = false;
        self.each(text, &mut |start, end, is_match| {
            let is_match = is_match != invert;
            let joins = match behavior {
                Removed if is_match => return Ok(()),
                Removed | Isolated => return sink(&text[start..end], start == 0),
                Contiguous => is_match == before,
                MergedWithPrevious => is_match && !before,
                // Here `before` belongs to the match that is waiting for its next part.
                MergedWithNext => !is_match && before,
            };
            before = is_match;
            match &mut open {
                Some(open) if joins => open.1 = end,
                open => {
                    if let Some((start, end)) = open.replace((start, end)) {
                        sink(&text[start..end], start == 0)?;
                    }
                }
            }
            Ok(())
        })?;
        open.map_or(Ok(()), |(start, end)| sink(&text[start..end], start == 0))
    }
}

/// Returns `true` for a pattern with `?+`, `*+`, `++` or `{1,2}+`.
fn is_possessive(pattern: &str) -> bool {
    let counts = |before: &str| {
        let count = before.strip_suffix('}').and_then(|before| before.rsplit_once('{'));
        count.is_some_and(|(_, count)| count.bytes().all(|byte| byte.is_ascii_digit() || byte == b','))
    };
    pattern.match_indices('+').any(|(at, _)| {
        let before = &pattern[..at];
        before.ends_with(['?', '*', '+']) || counts(before)
    })
}

fn behavior(part: &Part) -> Result<SplitDelimiterBehavior, String> {
    Ok(match part.text("behavior")? {
        "Removed" => SplitDelimiterBehavior::Removed,
        "Isolated" => SplitDelimiterBehavior::Isolated,
        "MergedWithPrevious" => SplitDelimiterBehavior::MergedWithPrevious,
        "MergedWithNext" => SplitDelimiterBehavior::MergedWithNext,
        "Contiguous" => SplitDelimiterBehavior::Contiguous,
        _ => return Err(part.broken("behavior", "is not supported")),
    })
}

fn character(part: &Part, key: &str) -> Result<char, String> {
    let mut characters = part.text(key)?.chars();
    match (characters.next(), characters.next()) {
        (Some(character), None) => Ok(character),
        _ => Err(part.broken(key, "expected one character")),
    }
}

fn is_punctuation(character: char) -> bool {
    character.is_ascii_punctuation() || character.is_punctuation()
}

/// Returns the character that stands for a byte in tokens (Radford et al., GPT-2).
fn character_of_byte(byte: u8) -> char {
    match byte {
        b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => char::from(byte),
        0..=0x20 => char::from_u32(0x100 + u32::from(byte)).unwrap_or_default(),
        0x7f..=0xa0 => char::from_u32(0x121 + u32::from(byte - 0x7f)).unwrap_or_default(),
        0xad => '\u{143}',
    }
}
