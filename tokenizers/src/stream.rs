//! Streaming text of tokens that come one at a time.

use x_transformers::Result;

use super::{Tokenizer, decoder::Decoder};

/// Incremental decoder: converts tokens that come one at a time after a prompt to text.
///
/// The text of a token may depend on those before it, and a character may span several. All pieces together are the
/// text that the model's tokenizer makes of prompt and tokens at once, without that of the prompt: an incomplete
/// character waits for its bytes, and [`TextStream::finish`] returns the rest. A character that the prompt leaves
/// incomplete belongs to the stream. The cost of a token does not grow with their number.
///
/// ```no_run
/// # use x_transformers::pretrained::Pretrained;
/// # use x_transformers_tokenizers::Tokenizer;
/// # fn main() -> x_transformers::Result<()> {
/// let tokenizer = Tokenizer::of(&Pretrained::open("SmolLM2-135M-Instruct.Q4_1.gguf")?, None)?;
/// let prompt = tokenizer.encode("The capital of France")?;
/// let mut text = tokenizer.stream(&prompt);
/// for token in tokenizer.encode(" is Paris")? {
///     print!("{}", text.push(token)?);
/// }
/// println!("{}", text.finish()?);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct TextStream<'t> {
    tokenizer: &'t Tokenizer,
    state: Stream,
}

impl<'t> TextStream<'t> {
    pub(crate) fn new(tokenizer: &'t Tokenizer, prompt: &[i64]) -> Self {
        Self { tokenizer, state: Stream::new(tokenizer, prompt) }
    }

    /// Returns the text that this token completes, often empty.
    ///
    /// Errors: a token that the tokenizer's decoder rejects.
    pub fn push(&mut self, token: i64) -> Result<String> {
        self.state.push(self.tokenizer, token)
    }

    /// Returns the text of a sequence that remains incomplete.
    ///
    /// Errors: those of [`TextStream::push`].
    pub fn finish(mut self) -> Result<String> {
        self.state.finish()
    }
}

/// A stream without its tokenizer.
#[derive(Clone, Debug)]
pub(crate) struct Stream {
    decoder: Decoder,
    /// End of the prompt's text if nothing follows it: it has been shown.
    shown: String,
}

impl Stream {
    pub(crate) fn new(tokenizer: &Tokenizer, prompt: &[i64]) -> Self {
        let mut decoder = tokenizer.decoder();
        for &token in prompt {
            // What the decoder refuses has no text.
            let _ = feed(&mut decoder, tokenizer, token);
        }
        let _ = decoder.cut();
        let shown = decoder.clone().finish().unwrap_or_default();
        Self { decoder, shown }
    }

    pub(crate) fn push(&mut self, tokenizer: &Tokenizer, token: i64) -> Result<String> {
        let text = feed(&mut self.decoder, tokenizer, token)?;
        Ok(self.fresh(text))
    }

    pub(crate) fn finish(&mut self) -> Result<String> {
        let text = self.decoder.finish()?;
        Ok(self.fresh(text))
    }

    /// Leaves out what the prompt ended with.
    fn fresh(&mut self, text: String) -> String {
        if self.shown.is_empty() || text.is_empty() {
            return text;
        }
        if let Some(rest) = self.shown.strip_prefix(&text) {
            self.shown = rest.to_string();
            return String::new();
        }
        // An incomplete character of the prompt has become whole where its ending does not begin the text.
        let shown = std::mem::take(&mut self.shown);
        text.strip_prefix(&shown).map_or(text.clone(), str::to_string)
    }
}

/// The text that a token completes; special tokens, and those without a text, have none.
fn feed(decoder: &mut Decoder, tokenizer: &Tokenizer, token: i64) -> Result<String> {
    match tokenizer.piece(token) {
        Some((piece, added)) => decoder.push(piece, added),
        None => Ok(String::new()),
    }
}
