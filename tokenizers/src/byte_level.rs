//! Byte-level BPE in two files: `vocab.json` and `merges.txt`.

use std::path::Path;

use serde_json::{Map, Value, json};
use x_transformers::{Error, Result, pretrained::Family};

use super::{described::Described, file_error, pretokenizer::QWEN2, settings::Settings};

/// Describes the tokenizer of the two files, with the settings beside them.
///
/// Errors: files that are none, or a class of tokenizer that splits texts otherwise.
pub fn of_files(vocabulary: (&Path, &str), merges: &str, settings: &Settings, family: Family) -> Result<Described> {
    let class = settings.class(family);
    let defaults: &[(&str, &str)] = match class {
        "GPT2Tokenizer" => {
            &[("bos_token", "<|endoftext|>"), ("eos_token", "<|endoftext|>"), ("unk_token", "<|endoftext|>")]
        }
        "Qwen2Tokenizer" => {
            &[("eos_token", "<|endoftext|>"), ("unk_token", "<|endoftext|>"), ("pad_token", "<|endoftext|>")]
        }
        "RobertaTokenizer" => &[
            ("bos_token", "<s>"),
            ("eos_token", "</s>"),
            ("unk_token", "<unk>"),
            ("sep_token", "</s>"),
            ("pad_token", "<pad>"),
            ("cls_token", "<s>"),
            ("mask_token", "<mask>"),
        ],
        other => {
            let why = format_args!(
                "is `{other}`, but `vocab.json` with `merges.txt` is supported only for GPT2Tokenizer, Qwen2Tokenizer \
                 and RobertaTokenizer; save a `tokenizer.json` with transformers"
            );
            return Err(settings.refuse("tokenizer_class", why));
        }
    };
    let broken = |why: String| file_error(vocabulary.0, why);
    let pieces: Map<String, Value> =
        serde_json::from_str(vocabulary.1).map_err(|why| broken(format!("is not a JSON object of tokens: {why}")))?;
    let merges = merges.lines().filter(|line| !line.starts_with("#version") && !line.trim().is_empty());
    let merges: Vec<Value> = merges
        .map(|line| match line.trim_end().split_once(' ') {
            Some((first, second)) if !second.contains(' ') => Ok(json!([first, second])),
            _ => Err(broken(format!("has a `merges.txt` beside it with the line `{line}`, expected two tokens"))),
        })
        .collect::<Result<_>>()?;
    let prefix = settings.flag("add_prefix_space")?.unwrap_or(false);
    let bytes = |use_regex: bool| json!({"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": true, "use_regex": use_regex});
    let (normalizer, pre_tokenizer) = match class {
        "Qwen2Tokenizer" => {
            let split = json!({"type": "Split", "pattern": {"Regex": QWEN2}, "behavior": "Isolated", "invert": false});
            (json!({"type": "NFC"}), json!({"type": "Sequence", "pretokenizers": [split, bytes(false)]}))
        }
        _ => (Value::Null, bytes(true)),
    };
    let name = |key: &str| match settings.named(key)? {
        Some(token) => Ok::<String, Error>(token.content),
        None => Ok(defaults.iter().find(|(name, _)| *name == key).map_or("", |(_, content)| content).to_string()),
    };
    let end = |key: &str| {
        let name = name(key)?;
        let listed = settings.added.iter().find(|(_, token)| token.content == name).map(|(id, _)| *id);
        match pieces.get(&name).and_then(Value::as_u64).or(listed) {
            Some(id) => Ok((name, id)),
            None => Err(broken(format!("lacks the token `{name}`, which `{key}` names"))),
        }
    };
    let flag = |key: &str| Ok::<bool, Error>(settings.flag(key)?.unwrap_or(false));
    let post_processor = if class == "RobertaTokenizer" {
        json!({"type": "RobertaProcessing", "sep": end("sep_token")?, "cls": end("cls_token")?, "trim_offsets": true, "add_prefix_space": prefix})
    } else {
        let mut template = vec![json!({"Sequence": {"id": "A", "type_id": 0}})];
        let mut special = Map::new();
        for (asked, key) in [(flag("add_bos_token")?, "bos_token"), (flag("add_eos_token")?, "eos_token")] {
            if !asked {
                continue;
            }
            let (name, id) = end(key)?;
            let at = if key == "bos_token" { 0 } else { template.len() };
            template.insert(at, json!({"SpecialToken": {"id": name, "type_id": 0}}));
            special.insert(name.clone(), json!({"id": name, "ids": [id], "tokens": [name]}));
        }
        json!({"type": "TemplateProcessing", "single": template, "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}], "special_tokens": special})
    };
    let json = json!({
        "version": "1.0",
        "added_tokens": [],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": post_processor,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": "",
            "end_of_word_suffix": "", "fuse_unk": false, "byte_fallback": false, "vocab": pieces, "merges": merges,
        },
    });
    Described::with(json.to_string(), settings, defaults)
}
