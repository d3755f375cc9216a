//! Text from a model, token by token.

use x_transformers::{
    Device, Tensor,
    models::{AutoregressiveWrapper, GenerateOptions},
};

use crate::{
    failure::Result,
    language::{Language, Shown},
};

/// Continues a prompt by `length` tokens or up to an end, and gives the `text` to `show` as soon as it is whole. Gives
/// the number of tokens.
pub fn stream(
    model: &AutoregressiveWrapper,
    mut text: Shown,
    prompt: &[i64],
    length: usize,
    options: &GenerateOptions,
    device: &Device,
    mut show: impl FnMut(&str) -> Result<()>,
) -> Result<usize> {
    let start = Tensor::from_slice(prompt, [prompt.len()], device)?;
    let mut count = 0;
    for tokens in model.stream(&start, length, options)? {
        for token in tokens? {
            count += 1;
            let piece = text.push(token)?;
            if !piece.is_empty() {
                show(&piece)?;
            }
        }
    }
    show(&text.finish()?)?;
    Ok(count)
}

/// A sample in a block of its own, for a look at what a model has learned.
pub fn block(
    model: &AutoregressiveWrapper,
    language: &Language,
    prompt: &[i64],
    length: usize,
    options: &GenerateOptions,
    device: &Device,
) -> Result<String> {
    let mut text = String::new();
    let shown = language.shown(prompt, &options.eos_tokens, &[])?;
    stream(model, shown, prompt, length, options, device, |piece| {
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
