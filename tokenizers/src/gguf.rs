//! The tokenizer of a GGUF file in the form of `tokenizer.json`.

use serde_json::{Map, json};
use x_transformers::io::{Metadata, TensorFile};

use super::{added_token, sentencepiece::SentencePiece};

/// Byte-level BPE with the vocabulary and the merges of a GGUF file, or its pieces of SentencePiece.
pub fn of_gguf(file: &TensorFile) -> std::result::Result<String, String> {
    let metadata = file.metadata();
    let text = |key: &str| metadata.get(key).and_then(Metadata::as_str);
    let list = |key: &str| {
        let found = metadata.get(key).and_then(Metadata::as_list);
        found.ok_or_else(|| format!("has no tokenizer: no list `{key}`"))
    };
    match text("tokenizer.ggml.model") {
        Some("gpt2") => {}
        Some("llama") => {
            let (pieces, customs) = SentencePiece::of_gguf(file)?;
            return pieces.json(customs);
        }
        other => {
            let why = "expected gpt2, byte-level BPE, or llama, SentencePiece";
            return Err(format!("has a tokenizer of the model {other:?}, {why}"));
        }
    }
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let digits = json!({"type": "Digits", "individual_digits": true});
    let pre_tokenizer = match text("tokenizer.ggml.pre").unwrap_or("default") {
        "smollm" => json!({"type": "Sequence", "pretokenizers": [digits, bytes]}),
        "default" | "gpt-2" => bytes.clone(),
        other => return Err(format!("splits text as `{other}` does, known are smollm and gpt-2")),
    };
    let tokens = list("tokenizer.ggml.tokens")?;
    let kinds = list("tokenizer.ggml.token_type").unwrap_or_default();
    let mut vocabulary = Map::new();
    let mut added = Vec::new();
    for (id, token) in tokens.iter().enumerate() {
        let token = token.as_str().ok_or("has a token that is no text")?;
        if vocabulary.insert(token.to_string(), json!(id)).is_some() {
            return Err(format!("has the token `{token}` twice"));
        }
        // Control tokens, and those of users.
        if let Some(3 | 4) = kinds.get(id).and_then(Metadata::as_usize) {
            added.extend(added_token(token, id as u64));
        }
    }
    let merges = list("tokenizer.ggml.merges")?.iter().map(|merge| match merge.as_str()?.split_once(' ') {
        Some((first, second)) if !second.contains(' ') => Some(json!([first, second])),
        _ => None,
    });
    let merges = merges.collect::<Option<Vec<_>>>().ok_or("has a merge that is no pair of tokens")?;
    Ok(json!({
        "version": "1.0",
        "added_tokens": added,
        "normalizer": null,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": null,
        "decoder": bytes,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocabulary, "merges": merges,
        },
    })
    .to_string())
}
