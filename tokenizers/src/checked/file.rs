//! Checked access to the parts of `tokenizer.json`.

use serde::de::DeserializeOwned;
use serde_json::Value;

use super::vocabulary::{id, shown};

/// A part of a tokenizer: a normalizer, a pre-tokenizer, a decoder or a post-processor.
#[derive(Clone, Copy)]
pub struct Part<'j> {
    value: &'j Value,
    /// Key of the part in `tokenizer.json`.
    name: &'static str,
    depth: usize,
}

/// Maximum depth of nested sequences.
const MAX_DEPTH: usize = 16;

/// Maximum number of bytes of a text that replaces or precedes another one.
const MAX_AFFIX: usize = 256;

/// Maximum number of bytes of a regular expression.
const MAX_PATTERN: usize = 16 << 10;

impl<'j> Part<'j> {
    /// Returns the part with this name, if there is one.
    pub fn of(tokenizer: &'j Value, name: &'static str) -> Option<Self> {
        tokenizer.get(name).filter(|value| !value.is_null()).map(|value| Self { value, name, depth: 0 })
    }

    /// Returns the key `type`.
    pub fn kind(&self) -> Option<&'j str> {
        let kind = self.value.get("type").and_then(Value::as_str);
        // Old files omit it for sequences.
        kind.or_else(|| {
            let lists = ["normalizers", "pretokenizers", "decoders", "processors"];
            lists.iter().any(|list| self.value.get(list).is_some()).then_some("Sequence")
        })
    }

    /// Returns the members of a sequence.
    pub fn sequence<T>(&self, list: &str, of_part: impl Fn(&Self) -> Result<T, String>) -> Result<Vec<T>, String> {
        if self.depth == MAX_DEPTH {
            return Err(format!("{}: sequences are nested more than {MAX_DEPTH} deep", self.name));
        }
        let Some(Value::Array(parts)) = self.value.get(list) else {
            return Err(self.broken(list, "expected a list"));
        };
        parts.iter().map(|value| of_part(&Self { value, name: self.name, depth: self.depth + 1 })).collect()
    }

    pub fn text(&self, key: &str) -> Result<&'j str, String> {
        self.value.get(key).and_then(Value::as_str).ok_or_else(|| self.broken(key, "expected a string"))
    }

    pub fn flag(&self, key: &str) -> Result<bool, String> {
        self.value.get(key).and_then(Value::as_bool).ok_or_else(|| self.broken(key, "expected true or false"))
    }

    pub fn get(&self, key: &str) -> Option<&'j Value> {
        self.value.get(key)
    }

    /// Returns a text that is inserted for each match or text.
    pub fn affix(&self, key: &str) -> Result<&'j str, String> {
        let text = self.text(key)?;
        if text.len() > MAX_AFFIX {
            return Err(self.broken(key, format_args!("has {} bytes, expected at most {MAX_AFFIX}", text.len())));
        }
        Ok(text)
    }

    /// Returns the replacement of a match.
    pub fn content(&self) -> Result<&'j str, String> {
        self.affix("content")
    }

    /// Returns the key `pattern`: a text or a regular expression.
    pub fn pattern_text(&self) -> Result<String, String> {
        let pattern = self.value.get("pattern");
        let get = |key: &str| pattern.and_then(|pattern| pattern.get(key)).and_then(Value::as_str);
        let text = match (get("String"), get("Regex")) {
            (Some(""), _) => return Err(self.broken("pattern", "is empty and would match everywhere")),
            (Some(text), _) => fancy_regex::escape(text).into_owned(),
            (None, Some(regex)) => regex.to_string(),
            (None, None) => return Err(self.broken("pattern", "expected `String` or `Regex`")),
        };
        if text.len() > MAX_PATTERN {
            return Err(
                self.broken("pattern", format_args!("has {} bytes, expected at most {MAX_PATTERN}", text.len()))
            );
        }
        Ok(text)
    }

    /// Returns the key `pattern`, compiled.
    pub fn pattern(&self) -> Result<fancy_regex::Regex, String> {
        compile(&self.pattern_text()?).map_err(|why| self.broken("pattern", why))
    }

    /// Deserializes the part with the crate `tokenizers`.
    pub fn parse<T: DeserializeOwned>(&self) -> Result<T, String> {
        T::deserialize(self.value).map_err(|why| format!("{}: {why}", self.name))
    }

    /// Returns a decoder of the crate `tokenizers`.
    pub fn decoder<T: DeserializeOwned>(&self) -> Result<T, String> {
        self.check_decoder()?;
        self.parse()
    }

    fn check_decoder(&self) -> Result<(), String> {
        match self.kind() {
            Some("Sequence") => self.sequence("decoders", Self::check_decoder).map(drop),
            Some("Replace") => self.pattern().and(self.content()).map(drop),
            Some(
                "BPEDecoder" | "ByteLevel" | "WordPiece" | "Metaspace" | "CTC" | "Fuse" | "Strip" | "ByteFallback",
            ) => Ok(()),
            _ => Err(self.broken("type", "is not supported")),
        }
    }

    /// Returns a post-processor of the crate `tokenizers`.
    pub fn processor<T: DeserializeOwned>(&self) -> Result<T, String> {
        self.check_processor()?;
        self.parse()
    }

    fn check_processor(&self) -> Result<(), String> {
        let ids = |ids: &Value| ids.as_array().is_some_and(|ids| ids.iter().all(|each| id(each).is_some()));
        match self.kind() {
            Some("Sequence") => self.sequence("processors", Self::check_processor).map(drop),
            Some("BertProcessing" | "RobertaProcessing") => ["cls", "sep"].iter().try_for_each(|key| {
                let token = self.get(key).and_then(|token| token.get(1)).and_then(id);
                token.map(drop).ok_or_else(|| self.broken(key, "expected a token and its id"))
            }),
            Some("ByteLevel") => Ok(()),
            Some("TemplateProcessing") => {
                let Some(Value::Object(tokens)) = self.get("special_tokens") else {
                    return Err(self.broken("special_tokens", "expected an object of tokens"));
                };
                if let Some((name, _)) = tokens.iter().find(|(_, token)| !token.get("ids").is_some_and(ids)) {
                    return Err(self.broken("special_tokens", format_args!("`{}` has invalid ids", shown(name))));
                }
                let Some(Value::Array(pieces)) = self.get("single") else {
                    return Err(self.broken("single", "expected a list of pieces"));
                };
                let mut texts = 0;
                for piece in pieces {
                    let id = |kind: &str| piece.get(kind).and_then(|piece| piece.get("id")).and_then(Value::as_str);
                    match (id("SpecialToken"), id("Sequence")) {
                        (Some(token), _) if tokens.contains_key(token) => {}
                        (Some(token), _) => {
                            let why = format!("refers to `{}`, which is not among its special_tokens", shown(token));
                            return Err(self.broken("single", why));
                        }
                        (None, Some("A")) => texts += 1,
                        _ => {
                            return Err(
                                self.broken("single", "contains a piece that is neither a special token nor the text")
                            );
                        }
                    }
                }
                if texts > MAX_DEPTH {
                    return Err(self.broken(
                        "single",
                        format_args!("contains the text {texts} times, expected at most {MAX_DEPTH}"),
                    ));
                }
                Ok(())
            }
            _ => Err(self.broken("type", "is not supported")),
        }
    }

    /// Like [`Self::parse`], for parts that the crate reads only from text.
    pub fn parse_text<T: DeserializeOwned>(&self) -> Result<T, String> {
        serde_json::from_str(&self.value.to_string()).map_err(|why| format!("{}: {why}", self.name))
    }

    /// Returns an error about a key.
    pub fn broken(&self, key: &str, why: impl std::fmt::Display) -> String {
        let kind = self.kind().map(|kind| format!(" ({})", shown(kind))).unwrap_or_default();
        format!("{}{kind}.{key}: {why}", self.name)
    }
}

/// Compiles a regular expression with bounded memory.
pub fn compile(pattern: &str) -> Result<fancy_regex::Regex, String> {
    fancy_regex::RegexBuilder::new(pattern).delegate_size_limit(8 << 20).build().map_err(|why| why.to_string())
}
