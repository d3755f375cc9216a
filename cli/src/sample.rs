//! Text from a model, byte by byte.

use x_transformers::{
    Device, Tensor,
    models::{AutoregressiveWrapper, GenerateOptions},
};

use crate::{failure::Result, text::Decoder};

/// Continues a prompt by `length` bytes and gives the text to `show` as soon as it is whole.
pub fn stream(
    model: &AutoregressiveWrapper,
    prompt: &[u8],
    length: usize,
    options: &GenerateOptions,
    device: &Device,
    mut show: impl FnMut(&str) -> Result<()>,
) -> Result<()> {
    let mut decoder = Decoder::default();
    let mut shown = Ok(());
    let mut on_token = |tokens: &[i64]| {
        for &token in tokens {
            // A vocabulary may have tokens behind the bytes; none of them is text, as little as this byte.
            let piece = decoder.push(u8::try_from(token).unwrap_or(0xff));
            if !piece.is_empty() && shown.is_ok() {
                shown = show(&piece);
            }
        }
        shown.is_ok()
    };
    let start = Tensor::from_slice(prompt, [prompt.len()], device)?;
    model.generate(&start, length, options, &mut on_token)?;
    shown?;
    show(decoder.finish())
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
