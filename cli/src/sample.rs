//! Text from a model, byte by byte.

use x_transformers::{
    Device, Tensor,
    models::{AutoregressiveWrapper, GenerateOptions},
};

use crate::{failure::Result, text::Decoder};

/// Text of tokens that come one at a time, up to the one that ends it.
pub struct Shown {
    decoder: Decoder,
    stop: Option<i64>,
    ended: bool,
}

impl Shown {
    pub fn new(stop: Option<i64>) -> Self {
        Self { decoder: Decoder::default(), stop, ended: false }
    }

    /// The text that is whole with this token, often empty.
    pub fn push(&mut self, token: i64) -> String {
        self.ended |= self.stop == Some(token);
        if self.ended {
            return String::new();
        }
        // A vocabulary may have tokens behind the bytes; none of them is text, as little as this byte.
        self.decoder.push(u8::try_from(token).unwrap_or(0xff))
    }

    /// The text of a sequence that stays incomplete.
    pub fn finish(self) -> &'static str {
        self.decoder.finish()
    }
}

/// Continues a prompt by `length` bytes and gives the text to `show` as soon as it is whole. Gives the number of tokens.
pub fn stream(
    model: &AutoregressiveWrapper,
    prompt: &[u8],
    length: usize,
    options: &GenerateOptions,
    device: &Device,
    mut show: impl FnMut(&str) -> Result<()>,
) -> Result<usize> {
    let mut text = Shown::new(options.eos_token);
    let start = Tensor::from_slice(prompt, [prompt.len()], device)?;
    let mut count = 0;
    for tokens in model.stream(&start, length, options)? {
        for token in tokens? {
            count += 1;
            let piece = text.push(token);
            if !piece.is_empty() {
                show(&piece)?;
            }
        }
    }
    show(text.finish())?;
    Ok(count)
}

/// A sample in a block of its own, for a look at what a model has learned.
pub fn block(
    model: &AutoregressiveWrapper,
    length: usize,
    options: &GenerateOptions,
    device: &Device,
) -> Result<String> {
    let mut text = String::new();
    stream(model, b"\n", length, options, device, |piece| {
        text.push_str(piece);
        Ok(())
    })?;
    let mut block = String::new();
    for line in text.replace(['\t', '\r'], " ").lines() {
        let characters: Vec<char> = line.chars().collect();
        // A line that is broken here reads better than one that the terminal breaks; an empty one has no chunk.
        for part in characters.chunks(WIDTH).chain(characters.is_empty().then_some(&[][..])) {
            block.push_str("\n  | ");
            block.extend(part);
        }
    }
    Ok(block.trim_start_matches('\n').to_string())
}

/// Characters of a line of a sample.
const WIDTH: usize = 72;
