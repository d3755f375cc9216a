//! The chat templates that a model's files hold, and the special tokens that they write.

use std::path::{Path, PathBuf};

use serde_json::Value;
use x_transformers::{
    Result,
    io::{Metadata, TensorFile, read_limited},
    pretrained::{Family, Pretrained},
};

use super::{checked::Checked, file_error};

/// Bytes that a template may have; real ones have some thousand.
const MAX_TEMPLATE: u64 = 1 << 20;
/// Bytes that a JSON file beside it may have: it can list all added tokens.
const MAX_JSON: u64 = 64 << 20;
/// Templates that a model may have.
const MAX_TEMPLATES: usize = 100;

/// Special tokens that templates know by name.
const SPECIAL: [&str; 7] = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// Chat templates by name, that of ordinary chats is `default`; and the special tokens that a template can write.
#[derive(Debug, Default)]
pub(crate) struct Templates {
    pub(crate) named: Vec<Template>,
    /// Spellings by the names that templates use, `bos_token` for instance.
    pub(crate) special: Vec<(&'static str, String)>,
    /// Token in front of every text, a chat too, where the template leaves it to the tokenizer.
    pub(crate) start: Option<i64>,
}

#[derive(Debug)]
pub(crate) struct Template {
    pub(crate) name: String,
    pub(crate) source: String,
    /// The file that it comes from.
    pub(crate) path: PathBuf,
}

impl Templates {
    /// Those of the model's files, or of the tokenizer's own folder or file if one is given and has some.
    ///
    /// Errors: files that cannot be read, or templates that are not text.
    pub(crate) fn of(tokenizer: &Checked, pretrained: &Pretrained, given: Option<&Path>) -> Result<Self> {
        let folder = given.map(|given| if given.is_dir() { given } else { given.parent().unwrap_or(Path::new("")) });
        if let Some(folder) = folder {
            let found = Self::of_folder(tokenizer, folder, pretrained.family())?;
            if !found.named.is_empty() || pretrained.folder().is_some_and(|own| own == folder) {
                return Ok(found);
            }
        }
        match pretrained.folder() {
            Some(own) => Self::of_folder(tokenizer, own, pretrained.family()),
            None => {
                let mut own = Self::of_gguf(pretrained.file())?;
                if given.is_none() {
                    // Where llama.cpp puts the start in front of texts, it does so for chats.
                    let around = tokenizer.encode("", true).unwrap_or_default();
                    let start = token(pretrained.file(), "bos_token_id");
                    own.start =
                        around.first().map(|&id| i64::from(id)).filter(|first| start == usize::try_from(*first).ok());
                }
                Ok(own)
            }
        }
    }

    pub(crate) fn of_folder(tokenizer: &Checked, folder: &Path, family: Family) -> Result<Self> {
        let config = json(&folder.join("tokenizer_config.json"))?;
        let mut named = Vec::new();
        // Templates in files of their own win over the others.
        let alone = folder.join("chat_template.jinja");
        if alone.is_file() {
            named.push(Template { name: "default".to_string(), source: text(&alone)?, path: alone });
        }
        let more = folder.join("additional_chat_templates");
        if more.is_dir() {
            let entries = std::fs::read_dir(&more).map_err(|why| file_error(&more, why))?;
            let mut paths: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
            paths.retain(|path| path.extension().is_some_and(|extension| extension == "jinja"));
            paths.sort();
            for path in paths.into_iter().take(MAX_TEMPLATES) {
                let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
                named.push(Template { name, source: text(&path)?, path });
            }
        }
        for name in ["tokenizer_config.json", "chat_template.json"] {
            if named.is_empty() {
                let path = folder.join(name);
                let found = if name == "tokenizer_config.json" {
                    config["chat_template"].clone()
                } else {
                    json(&path)?["chat_template"].clone()
                };
                named = of_json(&found, &path)?;
            }
        }
        let map = json(&folder.join("special_tokens_map.json"))?;
        let spelling = |value: &Value| value.as_str().or(value["content"].as_str()).map(str::to_string);
        let class = config["tokenizer_class"].as_str();
        let special = SPECIAL.iter().filter_map(|&key| {
            let said = spelling(&config[key]).or_else(|| spelling(&map[key]));
            // `null` is a token that there is not.
            let silent = config.get(key).is_none();
            let default = || default_token(class, family, key).filter(|token| silent && tokenizer.id(token).is_some());
            Some((key, said.or_else(|| default().map(str::to_string))?))
        });
        Ok(Self { named, special: special.collect(), start: None })
    }

    fn of_gguf(file: &TensorFile) -> Result<Self> {
        let metadata = file.metadata();
        let mut named = Vec::new();
        let mut add = |name: &str, key: &str| {
            let Some(found) = metadata.get(key) else { return Ok(()) };
            let Some(source) = found.as_str().filter(|source| source.len() as u64 <= MAX_TEMPLATE) else {
                let why = format!("`{key}` is not a string of at most {MAX_TEMPLATE} bytes");
                return Err(file_error(file.path(), why));
            };
            let path = file.path().to_path_buf();
            named.push(Template { name: name.to_string(), source: source.to_string(), path });
            Ok(())
        };
        add("default", "tokenizer.chat_template")?;
        let names = metadata.get("tokenizer.chat_templates").and_then(Metadata::as_list).unwrap_or_default();
        for name in names.iter().filter_map(Metadata::as_str).take(MAX_TEMPLATES) {
            add(name, &format!("tokenizer.chat_template.{name}"))?;
        }
        let tokens = metadata.get("tokenizer.ggml.tokens").and_then(Metadata::as_list).unwrap_or_default();
        // The key of the separator is misspelt in the format.
        let keys = ["bos", "eos", "unknown", "seperator", "padding", "cls", "mask"];
        let special = SPECIAL.iter().zip(keys).filter_map(|(&name, key)| {
            let id = token(file, &format!("{key}_token_id"))?;
            Some((name, tokens.get(id)?.as_str()?.to_string()))
        });
        Ok(Self { special: special.collect(), named, start: None })
    }
}

/// A token's id in the metadata of a GGUF file.
fn token(file: &TensorFile, key: &str) -> Option<usize> {
    file.metadata().get(&format!("tokenizer.ggml.{key}")).and_then(Metadata::as_usize)
}

/// A template, or several with names, in the two ways that files have them.
fn of_json(found: &Value, path: &Path) -> Result<Vec<Template>> {
    let template = |name: &str, source: &Value| {
        let source = source.as_str().filter(|source| source.len() as u64 <= MAX_TEMPLATE).ok_or_else(|| {
            file_error(path, format!("`chat_template` `{name}` is not a string of at most {MAX_TEMPLATE} bytes"))
        })?;
        Ok(Template { name: name.to_string(), source: source.to_string(), path: path.to_path_buf() })
    };
    match found {
        Value::Null => Ok(Vec::new()),
        Value::Array(list) => list
            .iter()
            .take(MAX_TEMPLATES)
            .map(|entry| template(entry["name"].as_str().unwrap_or("default"), &entry["template"]))
            .collect(),
        Value::Object(map) => map.iter().take(MAX_TEMPLATES).map(|(name, source)| template(name, source)).collect(),
        source => Ok(vec![template("default", source)?]),
    }
}

/// Special tokens of a class of tokenizers in `transformers`, where its files do not name them.
fn default_token(class: Option<&str>, family: Family, key: &str) -> Option<&'static str> {
    let class = class.map_or(family.tokenizer_class(), |class| class.trim_end_matches("Fast"));
    let table: [&str; 4] = match class {
        "LlamaTokenizer" | "CodeLlamaTokenizer" => ["<s>", "</s>", "<unk>", ""],
        "Qwen2Tokenizer" => ["", "<|endoftext|>", "<|endoftext|>", "<|endoftext|>"],
        "GemmaTokenizer" => ["<bos>", "<eos>", "<unk>", "<pad>"],
        "GPT2Tokenizer" => ["<|endoftext|>", "<|endoftext|>", "<|endoftext|>", ""],
        _ => return None,
    };
    let at = ["bos_token", "eos_token", "unk_token", "pad_token"].iter().position(|name| *name == key)?;
    Some(table[at]).filter(|token| !token.is_empty())
}

/// A JSON file, `Null` if there is none.
fn json(path: &Path) -> Result<Value> {
    if !path.is_file() {
        return Ok(Value::Null);
    }
    serde_json::from_slice(&read_limited(path, MAX_JSON)?)
        .map_err(|why| file_error(path, format!("is not JSON: {why}")))
}

fn text(path: &Path) -> Result<String> {
    x_transformers::io::read_text(path, MAX_TEMPLATE)
}
