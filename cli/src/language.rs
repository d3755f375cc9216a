//! Texts as the tokens of a model, and back.

use crate::{
    failure::{Failure, Result},
    text::{self, Decoder},
    tokenizer::{TextStream, Tokenizer},
};

/// What the tokens of a model stand for.
pub enum Language {
    /// A byte each, as `xt train` has it.
    Bytes,
    /// Pieces of texts, as a pretrained model was taught.
    Pieces(Box<Tokenizer>),
}

impl Language {
    /// Tokens of a text, with those that the model expects around it.
    pub fn encode(&self, text: &str) -> Result<Vec<i64>> {
        match self {
            Self::Bytes => Ok(text.bytes().map(i64::from).collect()),
            Self::Pieces(tokenizer) => Ok(tokenizer.encode(text)?),
        }
    }

    /// A question in the form of a chat, up to where the answer begins.
    pub fn chat(&self, question: &str) -> Result<String> {
        match self {
            Self::Bytes => {
                Err(Failure::new("`--chat` is for pretrained models; what `xt train` wrote continues bytes"))
            }
            Self::Pieces(tokenizer) => Ok(tokenizer.chat(question)?),
        }
    }

    /// Bytes of text that a token stands for.
    pub fn length(&self, token: i64) -> Result<usize> {
        match self {
            Self::Bytes => Ok(1),
            Self::Pieces(tokenizer) => Ok(tokenizer.decode(&[token])?.len()),
        }
    }

    /// Text of tokens that come one at a time behind a prompt, up to the one that ends it.
    pub fn shown(&self, prompt: &[i64], stop: Option<i64>) -> Shown<'_> {
        let text = match self {
            Self::Bytes => Text::Bytes(Decoder::default()),
            Self::Pieces(tokenizer) => Text::Pieces(tokenizer.stream(prompt)),
        };
        Shown { text, stop, ended: false }
    }
}

/// Text of tokens that come one at a time, up to the one that ends it. It cannot move the cursor of a terminal.
pub struct Shown<'l> {
    text: Text<'l>,
    stop: Option<i64>,
    ended: bool,
}

enum Text<'l> {
    Bytes(Decoder),
    Pieces(TextStream<'l>),
}

impl Shown<'_> {
    /// The text that is whole with this token, often empty.
    pub fn push(&mut self, token: i64) -> Result<String> {
        self.ended |= self.stop == Some(token);
        if self.ended {
            return Ok(String::new());
        }
        match &mut self.text {
            // A vocabulary may have tokens behind the bytes; none of them is text, as little as this byte.
            Text::Bytes(decoder) => Ok(decoder.push(u8::try_from(token).unwrap_or(0xff))),
            Text::Pieces(stream) => Ok(text::decode(stream.push(token)?.as_bytes())),
        }
    }

    /// The text of a sequence that stays incomplete.
    pub fn finish(self) -> Result<String> {
        match self.text {
            Text::Bytes(decoder) => Ok(decoder.finish().to_string()),
            Text::Pieces(stream) => Ok(text::decode(stream.finish()?.as_bytes())),
        }
    }
}
