//! Settings of a folder's tokenizer: `tokenizer_config.json`, `special_tokens_map.json` and `added_tokens.json`.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};
use x_transformers::{Result, io::read_text, pretrained::Family};

use super::file_error;

/// Maximum size of a settings file, in bytes; real ones have a few thousand, with chat templates a hundred thousand.
const MAX_SETTINGS: u64 = 64 << 20;

/// The files of a folder that are read, with what takes precedence over them.
pub struct Settings {
    /// The file that errors name.
    path: PathBuf,
    values: Map<String, Value>,
    /// The class of tokenizer that the files name, without `Fast`.
    class: Option<String>,
    /// If `true`, the folder says something about its tokenizer.
    pub exist: bool,
    /// Tokens by their ids, of `added_tokens_decoder` or the older `added_tokens.json`.
    pub added: Vec<(u64, Token)>,
}

/// Added token, which is matched in texts before they are split.
#[derive(Clone, PartialEq, Debug)]
pub struct Token {
    pub content: String,
    pub single_word: bool,
    pub lstrip: bool,
    pub rstrip: bool,
    /// If `true`, matched after texts are normalized, and normalized like them.
    pub normalized: bool,
    /// If `true`, omitted from decoded texts.
    pub special: bool,
}

/// The named tokens, in the order in which `transformers` adds them.
pub const NAMED: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

fn object(path: &Path) -> Result<Map<String, Value>> {
    let value: Value = serde_json::from_str(&read_text(path, MAX_SETTINGS)?)
        .map_err(|why| file_error(path, format_args!("is not JSON: {why}")))?;
    match value {
        Value::Object(object) => Ok(object),
        _ => Err(file_error(path, "is not a JSON object")),
    }
}

impl Settings {
    /// Reads the settings of a folder; `over` is a JSON object whose keys take precedence, or empty.
    ///
    /// Errors: files that cannot be read, and tokens that are none.
    pub fn read(folder: &Path, over: &str) -> Result<Self> {
        let of = |name: &str| {
            let path = folder.join(name);
            if path.is_file() { object(&path).map(Some) } else { Ok(None) }
        };
        let path = folder.join("tokenizer_config.json");
        let found = of("tokenizer_config.json")?;
        let exist = found.is_some();
        let mut values = found.unwrap_or_default();
        let class = values.get("tokenizer_class").and_then(Value::as_str).map(str::to_string);
        let class = match class {
            // Whatever else is in it is for the model to say.
            None => {
                let config = of("config.json").ok().flatten();
                config.and_then(|config| Some(config.get("tokenizer_class")?.as_str()?.to_string()))
            }
            class => class,
        };
        let class = class.map(|class| class.strip_suffix("Fast").unwrap_or(&class).to_string());
        if !over.is_empty() {
            let over: Map<String, Value> = serde_json::from_str(over)
                .map_err(|why| file_error(folder, format_args!("tokenizer options are not JSON: {why}")))?;
            values.extend(over);
        }
        // The older name of the list, which is read for the newer one.
        let empty = |value: Option<&Value>| match value {
            None | Some(Value::Null) => true,
            Some(Value::Array(list)) => list.is_empty(),
            Some(other) => other.as_object().is_some_and(Map::is_empty),
        };
        let older = "additional_special_tokens";
        let list = values.get(older).is_some_and(|list| list.is_array() || list.is_object());
        if list && empty(values.get("extra_special_tokens")) {
            let list = values.remove(older).unwrap_or_default();
            values.insert("extra_special_tokens".to_string(), list);
        }
        let mut settings = Self { path, values, class, exist, added: Vec::new() };
        match settings.values.get("added_tokens_decoder") {
            Some(Value::Object(added)) => {
                let parse = |(id, token): (&String, &Value)| {
                    let id = id.parse().map_err(|_| settings.refuse("added_tokens_decoder", "has an invalid id"));
                    Ok((id?, settings.token_of("added_tokens_decoder", token, false)?))
                };
                settings.added = added.iter().map(parse).collect::<Result<_>>()?;
            }
            // Both files are of the time before it, and only read without it.
            _ => settings.read_older(of("special_tokens_map.json")?, of("added_tokens.json")?, folder)?,
        }
        settings.added.sort_by_key(|(id, _)| *id);
        Ok(settings)
    }

    fn read_older(
        &mut self,
        special: Option<Map<String, Value>>,
        added: Option<Map<String, Value>>,
        folder: &Path,
    ) -> Result<()> {
        self.values.extend(special.unwrap_or_default());
        // As in `transformers`, those of the older list in the map are not among them.
        let mut special = self.listed("extra_special_tokens")?;
        for name in NAMED {
            special.extend(self.named(name)?);
        }
        for (content, id) in added.unwrap_or_default() {
            let refuse = || {
                file_error(
                    &folder.join("added_tokens.json"),
                    format_args!("`{content}` has the id {id}, expected an integer of at least 0"),
                )
            };
            let id = id.as_u64().ok_or_else(refuse)?;
            let is_special = special.iter().any(|token| token.content == content);
            self.added.push((id, Token { normalized: !is_special, ..Token::new(&content, is_special) }));
        }
        Ok(())
    }

    /// Returns the tokens that the settings name, without those by id: the named ones, then the others.
    ///
    /// Errors: tokens that are none.
    pub fn special(&self) -> Result<Vec<Token>> {
        let mut tokens = Vec::new();
        for name in NAMED {
            tokens.extend(self.named(name)?);
        }
        for (key, value) in &self.values {
            let own = key.ends_with("_token") && !NAMED.contains(&key.as_str());
            if own && (value.is_string() || value.is_object()) {
                tokens.push(self.token_of(key, value, true)?);
            }
        }
        for key in ["extra_special_tokens", "additional_special_tokens"] {
            tokens.extend(self.listed(key)?);
        }
        Ok(tokens)
    }

    /// A list of tokens, or several by names.
    fn listed(&self, key: &str) -> Result<Vec<Token>> {
        match self.values.get(key) {
            None | Some(Value::Null) => Ok(Vec::new()),
            Some(Value::Array(list)) => list.iter().map(|token| self.token_of(key, token, true)).collect(),
            Some(Value::Object(named)) => named.values().map(|token| self.token_of(key, token, true)).collect(),
            Some(other) => Err(self.refuse(key, format_args!("is {other}, expected a list of tokens"))),
        }
    }

    /// Returns a token by name, such as `cls_token`.
    ///
    /// Errors: a value that is not a token.
    pub fn named(&self, name: &str) -> Result<Option<Token>> {
        match self.values.get(name) {
            None | Some(Value::Null | Value::Bool(_)) => Ok(None),
            Some(value) => {
                let token = self.token_of(name, value, true)?;
                // The list of tokens with ids says more about it.
                let listed = self.added.iter().find(|(_, added)| added.content == token.content);
                Ok(Some(listed.map_or(token, |(_, listed)| Token { special: true, ..listed.clone() })))
            }
        }
    }

    fn token_of(&self, key: &str, value: &Value, special: bool) -> Result<Token> {
        let refuse =
            || self.refuse(key, format_args!("has the token {value}, expected a string or an object with `content`"));
        if let Value::String(content) = value {
            return Ok(Token::new(content, special));
        }
        let content = value.get("content").and_then(Value::as_str).ok_or_else(refuse)?;
        let flag = |key: &str, default: bool| value.get(key).and_then(Value::as_bool).unwrap_or(default);
        let special = special || flag("special", false);
        Ok(Token {
            content: content.to_string(),
            single_word: flag("single_word", false),
            lstrip: flag("lstrip", false),
            rstrip: flag("rstrip", false),
            normalized: flag("normalized", !special),
            special,
        })
    }

    /// Returns a boolean setting, or `None` if it is missing or null.
    ///
    /// Errors: another value.
    pub fn flag(&self, key: &str) -> Result<Option<bool>> {
        match self.values.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(*flag)),
            Some(other) => Err(self.refuse(key, format_args!("is {other}, expected true or false"))),
        }
    }

    /// Returns a text setting.
    ///
    /// Errors: another value.
    pub fn text(&self, key: &str) -> Result<Option<&str>> {
        match self.values.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(self.refuse(key, format_args!("is {other}, expected a string"))),
        }
    }

    /// Returns the number of tokens that a text is truncated to, if there is a limit.
    ///
    /// Errors: a value that is not a number of at least 1.
    pub fn max_length(&self) -> Result<Option<usize>> {
        for key in ["model_max_length", "max_len"] {
            match self.values.get(key) {
                None | Some(Value::Null) => {}
                // Tokenizers without a bound have 10³⁰.
                Some(value) => match value.as_f64() {
                    Some(length) if length >= 1.0 => return Ok((length < 1e15).then_some(length as usize)),
                    _ => return Err(self.refuse(key, format_args!("is {value}, expected a number of tokens"))),
                },
            }
        }
        Ok(None)
    }

    /// Returns the class of tokenizer, without `Fast`: the one that the files name, or that of the family.
    pub fn class(&self, family: Family) -> &str {
        self.class.as_deref().unwrap_or(family.tokenizer_class())
    }

    /// The class of tokenizer that the files name, without `Fast`.
    pub fn named_class(&self) -> Option<&str> {
        self.class.as_deref()
    }

    /// Returns an error about a setting.
    pub fn refuse(&self, key: &str, why: impl std::fmt::Display) -> x_transformers::Error {
        file_error(&self.path, format_args!("`{key}` {why}"))
    }
}

impl Token {
    /// Creates a token that does not match spaces around it.
    pub fn new(content: &str, special: bool) -> Self {
        let content = content.to_string();
        Self { content, single_word: false, lstrip: false, rstrip: false, normalized: !special, special }
    }
}
