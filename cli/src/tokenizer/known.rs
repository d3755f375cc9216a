//! Descriptions of tokenizers in the form of `tokenizer.json`.

use std::{fs, path::Path};

use serde_json::{Map, Value, json};
use x_transformers::io::{Family, Metadata, TensorFile};

use crate::failure::{Failure, Result};

/// Bytes that a file may have; the largest vocabularies have some ten million.
const MAX_FILE: u64 = 256 << 20;

fn read(path: &Path) -> Result<String> {
    let broken = |error| Failure::io(path, &error);
    let length = fs::metadata(path).map_err(broken)?.len();
    if length > MAX_FILE {
        return Err(Failure::new(format_args!("has {length} bytes, too many for a tokenizer")).within(path));
    }
    fs::read_to_string(path).map_err(broken)
}

/// `tokenizer.json`, or what BERT's `vocab.txt` stands for.
pub fn of_folder(folder: &Path, family: Family) -> Result<String> {
    let whole = folder.join("tokenizer.json");
    if whole.is_file() {
        return read(&whole);
    }
    let vocabulary = folder.join("vocab.txt");
    if family != Family::Bert || !vocabulary.is_file() {
        let why = "has no tokenizer: no `tokenizer.json`, and no `vocab.txt` of BERT";
        return Err(Failure::new(why).within(folder));
    }
    let options = folder.join("tokenizer_config.json");
    let options: Value = if options.is_file() {
        serde_json::from_str(&read(&options)?).map_err(|error| Failure::new(error).within(&options))?
    } else {
        Value::Null
    };
    let lowercase = options["do_lower_case"].as_bool().unwrap_or(true);
    word_pieces(&read(&vocabulary)?, lowercase).map_err(|why| Failure::new(why).within(&vocabulary))
}

/// BERT's tokenizer with a vocabulary of one piece a line.
fn word_pieces(vocabulary: &str, lowercase: bool) -> std::result::Result<String, String> {
    let pieces: Map<String, Value> =
        vocabulary.lines().enumerate().map(|(id, piece)| (piece.to_string(), json!(id))).collect();
    let special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"];
    let ids = special.map(|token| pieces.get(token).and_then(Value::as_u64));
    let [_, Some(_), Some(start), Some(end), _] = ids else {
        return Err("lacks one of [UNK], [CLS] and [SEP]".to_string());
    };
    let added = special.iter().zip(ids).filter_map(|(token, id)| added_token(token, id?));
    Ok(json!({
        "version": "1.0",
        "added_tokens": added.collect::<Vec<_>>(),
        "normalizer": {
            "type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true, "strip_accents": null,
            "lowercase": lowercase,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {"type": "BertProcessing", "sep": ["[SEP]", end], "cls": ["[CLS]", start]},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true},
        "model": {
            "type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100, "vocab": pieces,
        },
    })
    .to_string())
}

/// A token that is looked for in the text as it is, and left out of decoded text.
fn added_token(token: &str, id: u64) -> Option<Value> {
    Some(json!({
        "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
        "special": true,
    }))
}

/// Byte-level BPE with the vocabulary and the merges of a GGUF file.
pub fn of_gguf(file: &TensorFile) -> std::result::Result<String, String> {
    let metadata = file.metadata();
    let text = |key: &str| metadata.get(key).and_then(Metadata::as_str);
    let list = |key: &str| {
        let found = metadata.get(key).and_then(Metadata::as_list);
        found.ok_or_else(|| format!("has no tokenizer: no list `{key}`"))
    };
    match text("tokenizer.ggml.model") {
        Some("gpt2") => {}
        other => return Err(format!("has a tokenizer of the model {other:?}, expected gpt2, byte-level BPE")),
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
