//! Text of tokens that come one at a time.

use x_transformers::Result;

use super::Tokenizer;

/// Turns tokens that come one at a time into text, behind a prompt.
///
/// What a token stands for may depend on the one before, and a character may be spread over several.
pub struct TextStream<'t> {
    tokenizer: &'t Tokenizer,
    /// Tokens whose text is not whole yet, behind those whose text came last.
    tokens: Vec<i64>,
    before: usize,
}

impl<'t> TextStream<'t> {
    pub(crate) fn new(tokenizer: &'t Tokenizer, prompt: &[i64]) -> Self {
        /// Enough of the prompt for what its last tokens stand for.
        const CONTEXT: usize = 8;
        // Without it the space in front of a word would be taken for the start of a text, which has none.
        let tokens = prompt[prompt.len().saturating_sub(CONTEXT)..].to_vec();
        Self { tokenizer, before: tokens.len(), tokens }
    }

    /// The text that is whole with this token, often empty.
    ///
    /// Errors: tokens that the tokenizer refuses.
    pub fn push(&mut self, token: i64) -> Result<String> {
        /// Tokens that are held back at most; a character has no more than four bytes.
        const HELD: usize = 32;
        self.tokens.push(token);
        let fresh = self.fresh()?;
        // A character whose bytes are spread over tokens is not whole yet.
        if fresh.ends_with(char::REPLACEMENT_CHARACTER) && self.tokens.len() - self.before < HELD {
            return Ok(String::new());
        }
        self.tokens.drain(..self.before);
        self.before = self.tokens.len();
        Ok(fresh)
    }

    /// The text of a sequence that stays incomplete.
    ///
    /// Errors: tokens that the tokenizer refuses.
    pub fn finish(self) -> Result<String> {
        self.fresh()
    }

    fn fresh(&self) -> Result<String> {
        let before = self.tokenizer.decode(&self.tokens[..self.before])?;
        let all = self.tokenizer.decode(&self.tokens)?;
        Ok(all.get(before.len()..).unwrap_or_default().to_string())
    }
}
