//! Texts as the tokens of a model, and back.

use crate::{
    failure::{Failure, Result},
    text::{self, Decoder},
    tokenizer::Tokenizer,
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
            Self::Pieces(tokenizer) => tokenizer.encode(text),
        }
    }

    /// A question in the form of a chat, up to where the answer begins.
    pub fn chat(&self, question: &str) -> Result<String> {
        match self {
            Self::Bytes => {
                Err(Failure::new("`--chat` is for pretrained models; what `xt train` wrote continues bytes"))
            }
            Self::Pieces(tokenizer) => tokenizer.chat(question),
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
        /// Enough of the prompt for what its last pieces stand for.
        const CONTEXT: usize = 8;
        let tokens = match self {
            Self::Bytes => Vec::new(),
            // Without it the space in front of a word would be taken for the start of a text, which has none.
            Self::Pieces(_) => prompt[prompt.len().saturating_sub(CONTEXT)..].to_vec(),
        };
        Shown { language: self, decoder: Decoder::default(), stop, ended: false, before: tokens.len(), tokens }
    }
}

/// Text of tokens that come one at a time, up to the one that ends it. It cannot move the cursor of a terminal.
pub struct Shown<'l> {
    language: &'l Language,
    decoder: Decoder,
    stop: Option<i64>,
    ended: bool,
    /// Pieces whose text is not whole yet, behind those that were shown last: what a piece stands for may depend on the
    /// one before.
    tokens: Vec<i64>,
    before: usize,
}

impl Shown<'_> {
    /// The text that is whole with this token, often empty.
    pub fn push(&mut self, token: i64) -> Result<String> {
        /// Tokens that are held back at most; a character has no more than four bytes.
        const HELD: usize = 32;
        self.ended |= self.stop == Some(token);
        if self.ended {
            return Ok(String::new());
        }
        let Language::Pieces(tokenizer) = self.language else {
            // A vocabulary may have tokens behind the bytes; none of them is text, as little as this byte.
            return Ok(self.decoder.push(u8::try_from(token).unwrap_or(0xff)));
        };
        self.tokens.push(token);
        let fresh = self.fresh(tokenizer)?;
        // A character whose bytes are spread over tokens is not whole yet.
        if fresh.ends_with(char::REPLACEMENT_CHARACTER) && self.tokens.len() - self.before < HELD {
            return Ok(String::new());
        }
        self.tokens.drain(..self.before);
        self.before = self.tokens.len();
        Ok(text::decode(fresh.as_bytes()))
    }

    /// The text of a sequence that stays incomplete.
    pub fn finish(self) -> Result<String> {
        match self.language {
            Language::Bytes => Ok(self.decoder.finish().to_string()),
            Language::Pieces(tokenizer) => Ok(text::decode(self.fresh(tokenizer)?.as_bytes())),
        }
    }

    fn fresh(&self, tokenizer: &Tokenizer) -> Result<String> {
        let before = tokenizer.decode(&self.tokens[..self.before])?;
        let all = tokenizer.decode(&self.tokens)?;
        Ok(all.get(before.len()..).unwrap_or_default().to_string())
    }
}
