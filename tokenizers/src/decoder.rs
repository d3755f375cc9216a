//! Decoders of `tokenizer.json` that take one token at a time.
//!
//! A decoder there maps the list of all tokens to text. Each of its steps is a [`Stage`] here that keeps what later tokens
//! can still change: the bytes of an incomplete character, spaces that go if the text ends with them. The text of all
//! calls together is that of the whole list.

use std::{mem, sync::Arc};

use serde_json::Value;
use tokenizers::{Decoder as _, decoders::wordpiece::cleanup, normalizers::Replace};
use x_transformers::Result;

use super::refused;

/// Key of a decoder's JSON for what only descriptions written by this crate have; the crate `tokenizers` skips it.
pub(crate) const OWN: &str = "x_transformers";
/// Value of [`OWN`] for `ByteFallback`: each character comes with its last byte, as in SentencePiece. Without it, a run of
/// bytes is text or not as a whole.
pub(crate) const BY_CHARACTER: &str = "by_character";
/// Value of [`OWN`] for `ByteLevel`: added tokens are text as they are, as in GGUF files.
pub(crate) const ADDED_AS_TEXT: &str = "added_as_text";

/// A decoder in the middle of a text.
#[derive(Clone, Debug)]
pub(crate) struct Decoder {
    stages: Vec<Stage>,
    added_as_text: bool,
}

#[derive(Clone, Debug)]
enum Stage {
    /// No decoder: a space between tokens.
    Join {
        first: bool,
    },
    /// Characters that stand for bytes; the beginning of a character waits.
    ByteLevel {
        pending: Vec<u8>,
    },
    WordPiece {
        prefix: String,
        cleanup: bool,
        first: bool,
    },
    /// `strips`: the first piece has no space in front.
    Metaspace {
        replacement: char,
        strips: bool,
        first: bool,
    },
    Ctc {
        pad: String,
        delimiter: String,
        cleanup: bool,
        last: Option<String>,
    },
    /// The last token ends differently.
    Bpe {
        suffix: String,
        held: Option<String>,
    },
    Replace(Arc<Replace>),
    ByteFallback {
        run: Vec<u8>,
        by_character: bool,
    },
    Strip {
        content: char,
        start: usize,
        stop: usize,
    },
    // Those below see one text in pieces.
    /// Replaces a string that may be cut across pieces.
    ReplaceText {
        pattern: String,
        content: String,
        held: String,
    },
    /// `start`: characters that may still go; `held`: characters that go if the text ends with them.
    StripText {
        content: char,
        start: usize,
        stop: usize,
        held: usize,
    },
    /// Needs the whole text, so that nothing comes before the end.
    Whole {
        stage: Box<Stage>,
        text: String,
    },
}

impl Decoder {
    /// From the JSON of a decoder; `Null` joins tokens with spaces.
    ///
    /// Errors: a decoder that the crate `tokenizers` does not have.
    pub(crate) fn new(decoder: &Value) -> Result<Self> {
        let mut built = Self { stages: Vec::new(), added_as_text: false };
        if decoder.is_null() {
            built.stages.push(Stage::Join { first: true });
        } else {
            built.add(decoder, &mut false)?;
        }
        Ok(built)
    }

    /// Adds the stages of a decoder; `fused` says whether those before make one text.
    fn add(&mut self, decoder: &Value, fused: &mut bool) -> Result<()> {
        let text = |key: &str| decoder[key].as_str().unwrap_or_default().to_string();
        let flag = |key: &str| decoder[key].as_bool().unwrap_or(false);
        let letter =
            |key: &str, default: char| decoder[key].as_str().and_then(|text| text.chars().next()).unwrap_or(default);
        let count = |key: &str| decoder[key].as_u64().map_or(0, |count| usize::try_from(count).unwrap_or(usize::MAX));
        let whole = |stage: Stage| Stage::Whole { stage: Box::new(stage), text: String::new() };
        let stage = match decoder["type"].as_str() {
            Some("Sequence") => {
                let decoders = decoder["decoders"].as_array().map(Vec::as_slice).unwrap_or_default();
                return decoders.iter().try_for_each(|decoder| self.add(decoder, fused));
            }
            Some("Fuse") => {
                *fused = true;
                return Ok(());
            }
            Some("ByteLevel") => {
                self.added_as_text |= self.stages.is_empty() && decoder[OWN] == ADDED_AS_TEXT;
                let stage = Stage::ByteLevel { pending: Vec::new() };
                let stage = if *fused { whole(stage) } else { stage };
                *fused = true;
                stage
            }
            Some("WordPiece") => {
                let stage = Stage::WordPiece { prefix: text("prefix"), cleanup: flag("cleanup"), first: true };
                match (*fused, flag("cleanup")) {
                    (false, _) => stage,
                    (true, true) => whole(stage),
                    (true, false) => return Ok(()),
                }
            }
            Some("Metaspace") => {
                let strips = decoder["prepend_scheme"] != "never";
                let replacement = letter("replacement", '▁');
                if *fused && strips {
                    let pattern = replacement.to_string();
                    Stage::ReplaceText { pattern, content: String::new(), held: String::new() }
                } else {
                    Stage::Metaspace { replacement, strips, first: true }
                }
            }
            Some("CTC") => {
                let (pad, delimiter) = (text("pad_token"), text("word_delimiter_token"));
                let stage = Stage::Ctc { pad, delimiter, cleanup: flag("cleanup"), last: None };
                if *fused { whole(stage) } else { stage }
            }
            Some("BPEDecoder") => {
                let stage = Stage::Bpe { suffix: text("suffix"), held: None };
                if *fused { whole(stage) } else { stage }
            }
            Some("ByteFallback") => {
                let by_character = decoder[OWN] == BY_CHARACTER;
                let stage = Stage::ByteFallback { run: Vec::new(), by_character };
                if *fused { whole(stage) } else { stage }
            }
            Some("Replace") => {
                let pattern = decoder["pattern"]["String"].as_str().filter(|pattern| !pattern.is_empty());
                match (pattern, *fused) {
                    (Some(pattern), true) => Stage::ReplaceText {
                        pattern: pattern.to_string(),
                        content: text("content"),
                        held: String::new(),
                    },
                    (_, fused) => {
                        let replace = serde_json::from_value(decoder.clone()).map_err(refused)?;
                        let stage = Stage::Replace(Arc::new(replace));
                        if fused { whole(stage) } else { stage }
                    }
                }
            }
            Some("Strip") => {
                let (content, start, stop) = (letter("content", ' '), count("start"), count("stop"));
                if *fused {
                    Stage::StripText { content, start, stop, held: 0 }
                } else {
                    Stage::Strip { content, start, stop }
                }
            }
            other => return Err(refused(format_args!("unsupported decoder {other:?}"))),
        };
        self.stages.push(stage);
        Ok(())
    }

    /// Takes a token, `added` if it is not one of the model's; returns the text that is certain by now, often empty.
    ///
    /// Errors: a regular expression of the decoder that gives up on the token.
    pub(crate) fn push(&mut self, token: String, added: bool) -> Result<String> {
        if let (true, true, Some(Stage::ByteLevel { pending })) = (added, self.added_as_text, self.stages.first_mut()) {
            pending.extend(token.as_bytes());
            let text = whole_characters(pending);
            return self.through(1, vec![text]);
        }
        self.through(0, vec![token])
    }

    /// The text of what the stage before `first` has given.
    fn through(&mut self, first: usize, mut pieces: Vec<String>) -> Result<String> {
        for stage in &mut self.stages[first..] {
            let mut out = Vec::new();
            pieces.into_iter().try_for_each(|piece| stage.push(piece, &mut out))?;
            pieces = out;
        }
        Ok(pieces.concat())
    }

    /// Takes whole characters that only wait for the end of their run of bytes as certain: they are shown by now.
    ///
    /// Errors: as [`Decoder::push`].
    pub(crate) fn cut(&mut self) -> Result<()> {
        for at in 0..self.stages.len() {
            if let Stage::ByteFallback { run, .. } = &mut self.stages[at] {
                let whole = str::from_utf8(run).map_or_else(|error| error.valid_up_to(), str::len);
                let text = String::from_utf8_lossy(&run[..whole]).into_owned();
                run.drain(..whole);
                if !text.is_empty() {
                    self.through(at + 1, vec![text])?;
                }
            }
        }
        Ok(())
    }

    /// The text that remains when no token follows.
    ///
    /// Errors: as [`Decoder::push`].
    pub(crate) fn finish(&mut self) -> Result<String> {
        let mut pieces = Vec::new();
        for stage in &mut self.stages {
            let mut out = Vec::new();
            pieces.into_iter().try_for_each(|piece| stage.push(piece, &mut out))?;
            stage.finish(&mut out)?;
            pieces = out;
        }
        Ok(pieces.concat())
    }
}

impl Stage {
    fn push(&mut self, piece: String, out: &mut Vec<String>) -> Result<()> {
        match self {
            Self::Join { first } => {
                out.push(if mem::take(first) { piece } else { format!(" {piece}") });
            }
            Self::ByteLevel { pending } => {
                match piece.chars().map(byte).collect::<Option<Vec<u8>>>() {
                    Some(bytes) => pending.extend(bytes),
                    None => pending.extend(piece.as_bytes()),
                }
                out.push(whole_characters(pending));
            }
            Self::WordPiece { prefix, cleanup: clean, first } => {
                let piece = match (mem::take(first), piece.strip_prefix(&*prefix)) {
                    (true, _) => piece,
                    (false, Some(rest)) => rest.to_string(),
                    (false, None) => format!(" {piece}"),
                };
                out.push(if *clean { cleanup(&piece) } else { piece });
            }
            Self::Metaspace { replacement, strips, first } => {
                let gone = mem::take(first) && *strips;
                let character = |c| if c == *replacement { (!gone).then_some(' ') } else { Some(c) };
                out.push(piece.chars().filter_map(character).collect());
            }
            Self::Ctc { pad, delimiter, cleanup: clean, last } => {
                if last.as_ref() != Some(&piece) {
                    let mut text = piece.replace(&*pad, "");
                    if *clean {
                        text = cleanup(&text).replace(&*delimiter, " ");
                    }
                    *last = Some(piece);
                    out.extend((!text.is_empty()).then_some(text));
                }
            }
            Self::Bpe { suffix, held } => {
                out.extend(held.replace(piece).map(|piece| piece.replace(&*suffix, " ")));
            }
            Self::Replace(replace) => {
                out.extend(replace.decode_chain(vec![piece]).map_err(refused)?);
            }
            Self::ByteFallback { run, by_character } => match fallback_byte(&piece) {
                Some(byte) => {
                    run.push(byte);
                    if *by_character {
                        out.push(characters(run));
                    }
                }
                None => {
                    flush_run(run, *by_character, out);
                    out.push(piece);
                }
            },
            Self::Strip { content, start, stop } => {
                let from = piece.chars().take(*start).take_while(|c| c == content).map(char::len_utf8).sum();
                let rest = &piece[from..];
                let gone: usize = rest.chars().rev().take(*stop).take_while(|c| c == content).map(char::len_utf8).sum();
                out.push(rest[..rest.len() - gone].to_string());
            }
            Self::ReplaceText { pattern, content, held } => {
                held.push_str(&piece);
                let mut text = String::new();
                while let Some(at) = held.find(&*pattern) {
                    text.push_str(&held[..at]);
                    text.push_str(content);
                    held.drain(..at + pattern.len());
                }
                let first = held.len().saturating_sub(pattern.len() - 1);
                let begins =
                    |at: &usize| held.is_char_boundary(*at) && pattern.as_bytes().starts_with(&held.as_bytes()[*at..]);
                let at = (first..held.len()).find(begins).unwrap_or(held.len());
                text.extend(held.drain(..at));
                out.push(text);
            }
            Self::StripText { content, start, stop, held } => {
                let mut rest = &*piece;
                while let Some(after) = rest.strip_prefix(*content).filter(|_| *start > 0) {
                    (rest, *start) = (after, *start - 1);
                }
                if !rest.is_empty() {
                    *start = 0;
                }
                let mut text = content.to_string().repeat(mem::take(held));
                text.push_str(rest);
                *held = text.chars().rev().take(*stop).take_while(|c| c == content).count();
                text.truncate(text.len() - *held * content.len_utf8());
                out.push(text);
            }
            Self::Whole { text, .. } => text.push_str(&piece),
        }
        Ok(())
    }

    fn finish(&mut self, out: &mut Vec<String>) -> Result<()> {
        match self {
            Self::ByteLevel { pending } => out.push(String::from_utf8_lossy(&mem::take(pending)).into_owned()),
            Self::Bpe { suffix, held } => out.extend(held.take().map(|piece| piece.replace(&*suffix, ""))),
            Self::ByteFallback { run, by_character } => flush_run(run, *by_character, out),
            Self::ReplaceText { held, .. } => out.push(mem::take(held)),
            Self::Whole { stage, text } => {
                stage.push(mem::take(text), out)?;
                stage.finish(out)?;
            }
            _ => {}
        }
        Ok(())
    }
}

/// The byte that a character of a byte-level token stands for.
pub(crate) fn byte(character: char) -> Option<u8> {
    // Printable ones stand for themselves, the 68 others in order for those from U+0100 on.
    match u32::from(character) {
        code @ (0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff) => u8::try_from(code).ok(),
        code @ 0x100..=0x143 => {
            let number = (code - 0x100) as u8;
            Some(match number {
                0..=0x20 => number,
                0x21..=0x42 => number - 0x21 + 0x7f,
                _ => 0xad,
            })
        }
        _ => None,
    }
}

/// The byte of a token such as `<0x0A>`.
fn fallback_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>').filter(|digits| digits.len() == 2)?;
    u8::from_str_radix(digits, 16).ok()
}

/// Takes what is decided of some bytes: whole characters, and a mark for each part that cannot become one.
fn whole_characters(pending: &mut Vec<u8>) -> String {
    take_characters(pending, |_| 1)
}

/// The same with a mark for each byte that cannot become a character, as SentencePiece has it.
fn characters(pending: &mut Vec<u8>) -> String {
    take_characters(pending, |invalid| invalid)
}

fn take_characters(pending: &mut Vec<u8>, marks: fn(usize) -> usize) -> String {
    let mut text = String::new();
    let mut done = 0;
    loop {
        match str::from_utf8(&pending[done..]) {
            Ok(valid) => {
                text.push_str(valid);
                done = pending.len();
                break;
            }
            Err(error) => {
                let valid = &pending[done..done + error.valid_up_to()];
                text.push_str(&String::from_utf8_lossy(valid));
                done += valid.len();
                let Some(invalid) = error.error_len() else { break };
                text.extend(std::iter::repeat_n(char::REPLACEMENT_CHARACTER, marks(invalid)));
                done += invalid;
            }
        }
    }
    pending.drain(..done);
    text
}

/// The text of a run of bytes that has ended; a mark for each byte of what is not text.
fn flush_run(run: &mut Vec<u8>, by_character: bool, out: &mut Vec<String>) {
    let mark = char::REPLACEMENT_CHARACTER.to_string();
    if by_character {
        out.push(characters(run));
    }
    if run.is_empty() {
        return;
    }
    match String::from_utf8(mem::take(run)) {
        Ok(text) => out.push(text),
        Err(error) => out.extend(error.into_bytes().iter().map(|_| mark.clone())),
    }
}

/// The JSON of a tokenizer's decoder, with the keys of this crate.
pub(crate) fn description(decoder: Option<&tokenizers::DecoderWrapper>, json: &str) -> Result<Value> {
    const KEY: &str = "\"decoder\":";
    // Files of others, up to tens of megabytes, have been parsed once already; in the text of this crate's own the decoder
    // is near the beginning.
    if let Some(at) = json.find(KEY) {
        let mut values = serde_json::Deserializer::from_str(&json[at + KEY.len()..]).into_iter::<Value>();
        if let Some(decoder) =
            values.next().and_then(|value| value.ok()).filter(|value| value.to_string().contains(OWN))
        {
            return Ok(decoder);
        }
    }
    serde_json::to_value(decoder).map_err(refused)
}
