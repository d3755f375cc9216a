//! Tokenizers in the metadata of GGUF files.

use std::{fs, path::PathBuf};

use serde_json::{Map, Value, json};
use x_transformers::{io::Metadata, pretrained::Pretrained};
use x_transformers_tokenizers::Tokenizer;

/// A folder of a Llama with this many tokens and a `tokenizer.json`.
fn folder(tokens: usize, tokenizer: &Value, settings: &Value) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let files = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/files/qwen2");
    let config = fs::read_to_string(files.join("config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&config).unwrap();
    config["vocab_size"] = json!(tokens);
    fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    fs::copy(files.join("model.safetensors"), folder.path().join("model.safetensors")).unwrap();
    fs::write(folder.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    fs::write(folder.path().join("tokenizer_config.json"), settings.to_string()).unwrap();
    folder
}

fn described(tokens: usize, tokenizer: &Value, settings: &Value) -> Result<Map<String, Value>, String> {
    let folder = folder(tokens, tokenizer, settings);
    let pretrained = Pretrained::open(folder.path()).unwrap();
    let metadata = Tokenizer::gguf_metadata(&pretrained, None).map_err(|error| error.to_string())?;
    let value = |value: &Metadata| match value {
        Metadata::Text(text) => json!(text),
        Metadata::Int(number) => json!(number),
        Metadata::Bool(flag) => json!(flag),
        Metadata::List(list) => json!(list.len()),
        other => panic!("{other:?}"),
    };
    Ok(metadata.iter().map(|(key, found)| (key.clone(), value(found))).collect())
}

fn bytes(words: bool) -> Value {
    json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": words})
}

fn split(expression: &str) -> Value {
    let split = json!({"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": false});
    json!({"type": "Sequence", "pretokenizers": [split, bytes(false)]})
}

/// A byte-level vocabulary, whose tokens and merges are those of `tests/gguf/make.py`.
fn tokenizer(pre_tokenizer: Value, ignore_merges: bool) -> Value {
    let cases: Value = serde_json::from_str(include_str!("../gguf/pre.json")).unwrap();
    let tokens = cases["tokens"].as_array().unwrap().iter().enumerate();
    let vocabulary: Map<String, Value> =
        tokens.map(|(id, token)| (token.as_str().unwrap().to_string(), json!(id))).collect();
    let added = |id: u32, content: &str, special: bool| {
        json!({
            "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
            "special": special,
        })
    };
    json!({
        "version": "1.0", "normalizer": null, "pre_tokenizer": pre_tokenizer, "decoder": bytes(true),
        "added_tokens": [added(900, "<s>", true), added(901, "</s>", true), added(902, "<tool>", false)],
        "post_processor": {
            "type": "TemplateProcessing", "pair": [],
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [900], "tokens": ["<s>"]}},
        },
        "model": {"type": "BPE", "vocab": vocabulary, "merges": cases["merges"], "ignore_merges": ignore_merges},
    })
}

const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Each split gets the name under which llama.cpp splits so, with the special tokens of the folder and its template.
#[test]
fn byte_level_tokenizers_are_named() {
    let digits =
        json!({"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": true}, bytes(true)]});
    let settings = json!({"bos_token": "<s>", "eos_token": "</s>", "chat_template": "{{ messages }}"});
    for (pre_tokenizer, ignore_merges, expected) in [
        (split(LLAMA3), true, "llama-bpe"),
        (split(LLAMA3), false, "dbrx"),
        (split(QWEN2), false, "qwen2"),
        (digits, false, "smollm"),
        (bytes(true), false, "gpt-2"),
    ] {
        let found = described(910, &tokenizer(pre_tokenizer, ignore_merges), &settings).unwrap();
        let ggml = |key: &str| &found[&format!("tokenizer.ggml.{key}")];
        assert_eq!(ggml("pre"), expected);
        assert_eq!((ggml("model"), ggml("tokens"), ggml("token_type")), (&json!("gpt2"), &json!(910), &json!(910)));
        assert_eq!((ggml("bos_token_id"), ggml("eos_token_id")), (&json!(900), &json!(901)));
        assert_eq!((ggml("add_bos_token"), ggml("add_eos_token")), (&json!(true), &json!(false)));
        assert_eq!(found["tokenizer.chat_template"], "{{ messages }}");
    }
}

/// Tokenizers that llama.cpp would read as others are refused, and so is a vocabulary larger than the model's.
#[test]
fn other_tokenizers_are_refused() {
    let settings = json!({"bos_token": "<s>", "eos_token": "</s>"});
    let refused = |tokens, tokenizer: &Value| described(tokens, tokenizer, &settings).unwrap_err();
    let letters = tokenizer(split(r"\w"), false);
    assert!(refused(910, &letters).contains("differently from every pre-tokenizer that llama.cpp knows"));
    let mut lower = tokenizer(bytes(true), false);
    lower["normalizer"] = json!({"type": "Lowercase"});
    assert!(refused(910, &lower).contains("Hello, world!"));
    assert!(refused(902, &tokenizer(bytes(true), false)).contains("902 tokens"));
    let mut words = tokenizer(bytes(true), false);
    words["model"] = json!({"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"});
    words["post_processor"] = Value::Null;
    assert!(refused(910, &words).contains("is not BPE"), "{}", refused(910, &words));
}
