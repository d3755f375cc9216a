//! End tokens, as files of pretrained models name them.

use std::path::Path;

use serde_json::Value;

use super::options::{Options, json};
use crate::{
    Error, Result,
    collect::CollectVec,
    io::{Metadata, TensorFile},
};

/// Tokens that llama.cpp treats as end tokens by their spelling, since many files name none or only one of them.
const SPELLINGS: [&str; 10] = [
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "<end_of_utterance>",
];

/// Returns the ends of a text (`eos`), a turn (`eot`) and a message (`eom`) that a GGUF file names, and tokens spelled
/// like one.
pub(super) fn of_gguf(file: &TensorFile, vocabulary: usize) -> Vec<i64> {
    let metadata = |key: &str| file.metadata().get(&format!("tokenizer.ggml.{key}"));
    let named = ["eos_token_id", "eot_token_id", "eom_token_id"];
    let named = named.iter().filter_map(|key| metadata(key).and_then(Metadata::as_usize)).map(|id| id as i64);
    let tokens = metadata("tokens").and_then(Metadata::as_list).unwrap_or_default();
    let spelled =
        tokens.iter().enumerate().filter(|(_, token)| token.as_str().is_some_and(|token| SPELLINGS.contains(&token)));
    within(named.chain(spelled.map(|(id, _)| id as i64)), vocabulary)
}

/// Returns `eos_token_id` of `generation_config.json`, which takes precedence if it has the key, or of `config.json`.
///
/// Errors: a `generation_config.json` that is not JSON, or ids that are not numbers.
pub(super) fn of_folder(options: &Options, folder: &Path, vocabulary: usize) -> Result<Vec<i64>> {
    const KEY: &str = "eos_token_id";
    let place = folder.join("generation_config.json");
    let generation = if place.is_file() { json(&place)? } else { Value::Null };
    let (path, value) = match generation.get(KEY) {
        Some(value) => (&place, value),
        None => (&options.path, options.value.get(KEY).unwrap_or(&Value::Null)),
    };
    let id = |value: &Value| {
        let why = || format!("`{KEY}` is {value}, expected a token id, a list of them, or null");
        value.as_i64().ok_or_else(|| Error::file(path, why()))
    };
    let ids = match value {
        Value::Null => Vec::new(),
        Value::Array(list) => list.iter().map(id).try_collect_vec()?,
        value => vec![id(value)?],
    };
    Ok(within(ids, vocabulary))
}

/// Returns each token once, without those outside the vocabulary, such as -1.
fn within(ids: impl IntoIterator<Item = i64>, vocabulary: usize) -> Vec<i64> {
    let mut ends = Vec::new();
    for id in ids {
        if usize::try_from(id).is_ok_and(|id| id < vocabulary) && !ends.contains(&id) {
            ends.push(id);
        }
    }
    ends
}
