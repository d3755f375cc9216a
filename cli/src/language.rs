//! Texts as the tokens of a model, and back.

use std::path::Path;

use x_transformers::{
    Result as LibraryResult,
    models::{RowEnd, StopMatcher},
};

use crate::{
    failure::{Failure, Result},
    stored::Origin,
    text::{self, Decoder},
    tokenize,
    tokenizer::{self, TextStream, Tokenizer},
};

/// Turn of a chat.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Turn {
    pub role: String,
    pub content: String,
}

impl Turn {
    pub fn new(role: &str, content: impl Into<String>) -> Self {
        Self { role: role.to_string(), content: content.into() }
    }
}

/// Meaning of the tokens of a model.
pub enum Language {
    /// A byte each, as `xt train` has it.
    Bytes,
    /// Pieces of texts, as a model was taught.
    Pieces {
        tokenizer: Box<Tokenizer>,
        /// Token before every text, for models of `xt train`; the tokenizer of a pretrained model has its own.
        begin: Option<i64>,
        /// Tokens that end a text.
        ends: Vec<i64>,
    },
}

impl Language {
    /// The language of a pretrained model.
    pub fn pretrained(tokenizer: Tokenizer, ends: &[i64]) -> Self {
        Self::Pieces { tokenizer: Box::new(tokenizer), begin: None, ends: ends.to_vec() }
    }

    /// The language of a model of `xt train`, whose documents begin with a token.
    pub fn own(tokenizer: Tokenizer) -> Self {
        let begin = tokenize::begin(&tokenizer).ok();
        Self::Pieces { begin, ends: begin.into_iter().collect(), tokenizer: Box::new(tokenizer) }
    }

    /// The language of the tokenizer in a folder or a file: that of a pretrained model if a run that tuned one keeps it.
    pub fn open(path: &Path) -> Result<Self> {
        let tokenizer = tokenizer::open(path)?;
        Ok(match Origin::read(path)? {
            Some(Origin { ends, .. }) => Self::pretrained(tokenizer, &ends),
            None => Self::own(tokenizer),
        })
    }

    /// The tokenizer, unless tokens are bytes.
    pub fn tokenizer(&self) -> Option<&Tokenizer> {
        match self {
            Self::Bytes => None,
            Self::Pieces { tokenizer, .. } => Some(tokenizer),
        }
    }

    /// The token before every text, with which a text that is continued from nothing begins.
    pub fn begin(&self) -> Option<i64> {
        match self {
            Self::Bytes => None,
            Self::Pieces { begin, .. } => *begin,
        }
    }

    /// The tokens that end a text.
    pub fn ends(&self) -> &[i64] {
        match self {
            Self::Bytes => &[],
            Self::Pieces { ends, .. } => ends,
        }
    }

    /// Tokens of a text, with those that the model expects around it.
    pub fn encode(&self, text: &str) -> Result<Vec<i64>> {
        match self {
            Self::Bytes => Ok(text.bytes().map(i64::from).collect()),
            Self::Pieces { tokenizer, begin: None, .. } => Ok(tokenizer.encode(text)?),
            Self::Pieces { tokenizer, begin: Some(begin), .. } => {
                Ok([&[*begin][..], &tokenizer.encode_plain(text)?].concat())
            }
        }
    }

    /// Tokens of a chat in the form of the model's chats, up to where the answer begins; `advice` is for models without
    /// such a form.
    pub fn chat(&self, turns: &[Turn], advice: &str) -> Result<Vec<i64>> {
        match self {
            Self::Bytes => {
                Err(Failure::new("chats require a pretrained model, or one tuned from it; this one continues bytes"))
            }
            Self::Pieces { tokenizer, .. } => {
                let tokens = tokenizer::chat(tokenizer, turns);
                tokens.map_err(|why| if tokenizer.has_chat_template() { why } else { why.advising(advice) })
            }
        }
    }

    /// Returns `true` if chats are in a form that the model's files do not state.
    pub fn assumes_chat_form(&self) -> bool {
        matches!(self, Self::Pieces { tokenizer, .. } if !tokenizer.has_chat_template())
    }

    /// The token that ends a turn of a chat, if the tokenizer's files name one.
    pub fn end_of_turn(&self) -> Option<i64> {
        match self {
            Self::Bytes => None,
            Self::Pieces { tokenizer, .. } => tokenizer.end_token(),
        }
    }

    /// The token that a stop string spells, if it is one that texts do not show, such as `</s>`.
    pub fn hidden_token(&self, stop: &str) -> Result<Option<i64>> {
        let Self::Pieces { tokenizer, .. } = self else { return Ok(None) };
        match tokenizer.token(stop) {
            Some(token) if tokenizer.decode(&[token])?.is_empty() => Ok(Some(token)),
            _ => Ok(None),
        }
    }

    /// Bytes of text that a token stands for.
    pub fn length(&self, token: i64) -> Result<usize> {
        match self {
            Self::Bytes => Ok(1),
            Self::Pieces { tokenizer, .. } => Ok(tokenizer.decode(&[token])?.len()),
        }
    }

    /// The ends of rows after these prompts at stop strings; none without any.
    pub fn row_ends(&self, prompts: &[&[i64]], stops: &[String]) -> Result<Vec<Box<dyn RowEnd>>> {
        if stops.is_empty() {
            return Ok(Vec::new());
        }
        let end =
            |prompt: &&[i64]| match self {
                Self::Bytes => Ok(Box::new(ByteEnd { decoder: Decoder::default(), matcher: StopMatcher::new(stops)? })
                    as Box<dyn RowEnd>),
                Self::Pieces { tokenizer, .. } => tokenizer::stop_end(tokenizer, stops, prompt),
            };
        prompts.iter().map(end).collect()
    }

    /// Text of tokens that come one at a time after a prompt, up to an end token or a stop string.
    pub fn shown(&self, prompt: &[i64], ends: &[i64], stops: &[String]) -> Result<Shown<'_>> {
        let text = match self {
            Self::Bytes => Text::Bytes(Decoder::default()),
            Self::Pieces { tokenizer, .. } => Text::Pieces(Box::new(tokenizer.stream(prompt))),
        };
        Ok(Shown { text, ends: ends.to_vec(), matcher: StopMatcher::new(stops)?, tokens: 0, ended: false })
    }
}

/// Ends a row of bytes at a stop string.
#[derive(Clone, Debug)]
struct ByteEnd {
    decoder: Decoder,
    matcher: StopMatcher,
}

impl RowEnd for ByteEnd {
    fn push(&mut self, token: i64) -> LibraryResult<bool> {
        let text = of_byte(&mut self.decoder, token);
        self.matcher.push(&text);
        Ok(self.matcher.stopped())
    }

    fn boxed_clone(&self) -> Box<dyn RowEnd> {
        Box::new(self.clone())
    }
}

/// Returns the text that a token completes. A vocabulary may have tokens after the bytes; like byte 0xff, none of
/// them is text.
fn of_byte(decoder: &mut Decoder, token: i64) -> String {
    decoder.push(u8::try_from(token).unwrap_or(0xff))
}

/// Text of tokens that come one at a time, up to their end. It cannot move the cursor of a terminal.
pub struct Shown<'l> {
    text: Text<'l>,
    ends: Vec<i64>,
    matcher: StopMatcher,
    /// Number of tokens up to the end.
    pub tokens: usize,
    ended: bool,
}

enum Text<'l> {
    Bytes(Decoder),
    Pieces(Box<TextStream<'l>>),
}

impl Shown<'_> {
    /// The text that is certain with this token, often empty.
    pub fn push(&mut self, token: i64) -> Result<String> {
        if self.ended {
            return Ok(String::new());
        }
        self.tokens += 1;
        self.ended = self.ends.contains(&token);
        if self.ended {
            return Ok(String::new());
        }
        let text = match &mut self.text {
            Text::Bytes(decoder) => of_byte(decoder, token),
            Text::Pieces(stream) => stream.push(token)?,
        };
        let shown = self.matcher.push(&text);
        self.ended = self.matcher.stopped();
        Ok(text::clean(&shown))
    }

    /// The text of a sequence that stays incomplete, and what was held back.
    pub fn finish(mut self) -> Result<String> {
        let rest = match self.text {
            Text::Bytes(decoder) => decoder.finish().to_string(),
            Text::Pieces(stream) => stream.finish()?,
        };
        let shown = self.matcher.push(&rest) + &self.matcher.finish();
        Ok(text::clean(&shown))
    }
}
