//! Stop strings: text that ends a row of generated tokens.

use x_transformers::{
    Result,
    models::{RowEnd, StopMatcher},
};

use super::{Tokenizer, stream::Stream};

/// Ends a row at the first stop string in its text; one for each row goes to `GenerateOptions::row_ends`.
///
/// A stop string may be cut anywhere across tokens. To show the row's text without it, pass that of a
/// [`TextStream`](super::TextStream) through a [`StopMatcher`] of the same strings.
///
/// ```no_run
/// use x_transformers::{
///     DType, Device, Tensor,
///     pretrained::Pretrained,
///     models::{GenerateOptions, StopMatcher},
/// };
/// use x_transformers_tokenizers::Tokenizer;
/// # fn main() -> x_transformers::Result<()> {
/// let pretrained = Pretrained::open("SmolLM2-135M-Instruct.Q4_1.gguf")?;
/// let tokenizer = Tokenizer::of(&pretrained, None)?;
/// let model = pretrained.autoregressive(DType::F32, &Device::Cpu)?;
/// let (prompt, stops) = (tokenizer.encode("Q: What is ice?\nA:")?, ["\nQ:"]);
/// let options = GenerateOptions {
///     eos_tokens: pretrained.end_tokens().to_vec(),
///     row_ends: vec![Box::new(tokenizer.stop_strings(&stops, &prompt)?)],
///     ..GenerateOptions::default()
/// };
/// let (mut text, mut matcher) = (tokenizer.stream(&prompt), StopMatcher::new(&stops)?);
/// for tokens in model.stream(&Tensor::from_slice(&prompt, [prompt.len()], &Device::Cpu)?, 100, &options)? {
///     print!("{}", matcher.push(&text.push(tokens?[0])?));
/// }
/// println!("{}{}", matcher.push(&text.finish()?), matcher.finish());
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct StopStrings {
    tokenizer: Tokenizer,
    stream: Stream,
    matcher: StopMatcher,
}

impl Tokenizer {
    /// Returns the stopping criterion of a row after `prompt`: any of some stop strings, without the prompt's text.
    ///
    /// Errors: an empty stop string.
    pub fn stop_strings<S: AsRef<str>>(&self, stops: &[S], prompt: &[i64]) -> Result<StopStrings> {
        let matcher = StopMatcher::new(stops)?;
        Ok(StopStrings { tokenizer: self.clone(), stream: Stream::new(self, prompt), matcher })
    }
}

impl RowEnd for StopStrings {
    fn push(&mut self, token: i64) -> Result<bool> {
        let text = self.stream.push(&self.tokenizer, token)?;
        self.matcher.push(&text);
        Ok(self.matcher.stopped())
    }

    fn boxed_clone(&self) -> Box<dyn RowEnd> {
        Box::new(self.clone())
    }
}
