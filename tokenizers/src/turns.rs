//! The turns of a whole chat, for training on what an assistant wrote.

use x_transformers::Result;

use super::{
    Tokenizer,
    chat::{ChatOptions, Message},
    file_error, refused,
};

/// Tokens of a whole chat, and which of them belong to answers.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ChatTurns {
    /// Tokens.
    pub tokens: Vec<i64>,
    /// `true` for each token of an assistant's turn, with what ends it; one per token.
    pub answers: Vec<bool>,
}

impl Tokenizer {
    /// Returns the tokens of a whole chat, formatted with the model's own template, and which of them the assistant wrote:
    /// for training, where only these count.
    ///
    /// A turn of the role `assistant` is what the template writes between the messages before it with the beginning of an
    /// answer, and the messages up to it. A token that begins before that place and ends after it counts.
    ///
    /// ```no_run
    /// # use x_transformers::pretrained::Pretrained;
    /// # use x_transformers_tokenizers::{ChatOptions, Message, Tokenizer};
    /// # fn main() -> x_transformers::Result<()> {
    /// let tokenizer = Tokenizer::of(&Pretrained::open("SmolLM2-135M-Instruct.Q4_1.gguf")?, None)?;
    /// let turns = tokenizer.chat_turns(&[Message::user("hi"), Message::assistant("Hello!")], &ChatOptions::default())?;
    /// let answer: Vec<i64> = turns.tokens.iter().zip(&turns.answers).filter(|(_, by)| **by).map(|(id, _)| *id).collect();
    /// assert_eq!(tokenizer.decode(&answer)?, "Hello!\n");
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// Errors: those of [`Tokenizer::chat`]; a chat without an answer, or that begins with one; a template that writes the
    /// turns of a chat otherwise when others follow them, so that what belongs to a turn is not defined.
    pub fn chat_turns(&self, messages: &[Message], options: &ChatOptions) -> Result<ChatTurns> {
        let with_prompt = |add_generation_prompt| ChatOptions { add_generation_prompt, ..options.clone() };
        let (open, closed) = (with_prompt(true), with_prompt(false));
        let whole = self.rendered(messages, &closed, true)?;
        self.check_messages(messages)?;
        let tokens = self.of_rendered(&whole)?;
        let mut answers = vec![false; tokens.len()];
        let mut found = false;
        for (index, _) in messages.iter().enumerate().filter(|(_, message)| message.role == "assistant") {
            if index == 0 {
                return Err(refused("the chat begins with an answer, expected a message of another role before it"));
            }
            let before = self.rendered(&messages[..index], &open, true)?;
            let after = self.rendered(&messages[..=index], &closed, true)?;
            if !whole.starts_with(&after) || !after.starts_with(&before) {
                return Err(self.undefined(options, index + 1)?);
            }
            // Tokens differ only around the end of a text that goes on.
            let shared = |text: &str| {
                let part = self.of_rendered(text)?;
                Ok::<_, x_transformers::Error>(part.iter().zip(&tokens).take_while(|(one, other)| one == other).count())
            };
            let (start, end) = (shared(&before)?, shared(&after)?);
            answers[start..end.max(start)].fill(true);
            found |= end > start;
        }
        if !found {
            return Err(refused("the chat has no answer: expected a message of the role `assistant`"));
        }
        Ok(ChatTurns { tokens, answers })
    }

    /// Tokens of a text that the template wrote, with the start of a text where the template leaves it to the tokenizer.
    pub(crate) fn of_rendered(&self, text: &str) -> Result<Vec<i64>> {
        let mut tokens = self.of_marked(text)?;
        if let Some(start) = self.templates.start.filter(|start| tokens.first() != Some(start)) {
            tokens.insert(0, start);
        }
        Ok(tokens)
    }

    fn undefined(&self, options: &ChatOptions, turn: usize) -> Result<x_transformers::Error> {
        let template = self.chat_template(options)?;
        let why = format!(
            "chat template `{}` writes message {turn} otherwise when others follow it, or an answer otherwise than it \
             begins one, so it does not say which tokens are the assistant's; use another template",
            template.name
        );
        Ok(if template.path.as_os_str().is_empty() { refused(why) } else { file_error(&template.path, why) })
    }
}
