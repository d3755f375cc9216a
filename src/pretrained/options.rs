//! Options in `config.json` of `transformers`.

use std::{
    fmt,
    path::{Path, PathBuf},
};

use serde_json::{Map, Value};

use crate::{
    Error, Result,
    error::ensure,
    io::{mistaken, read_limited},
};

/// Maximum size of a JSON file, in bytes; real ones have a few thousand.
const MAX_JSON: u64 = 16 << 20;

/// Maximum number of blocks of a model.
pub(super) const MAX_DEPTH: usize = 10_000;

/// Reads a JSON file of bounded size in Python's dialect: it may have `NaN` and `Infinity`, which become text.
pub(super) fn json(path: &Path) -> Result<Value> {
    let bytes = read_limited(path, MAX_JSON)?;
    serde_json::from_slice(&bytes)
        .or_else(|why| serde_json::from_slice(&with_quoted_numbers(&bytes)).map_err(|_| why))
        .map_err(|why| {
            Error::file(path, mistaken(&bytes).map_or_else(|| format!("is not JSON: {why}"), str::to_string))
        })
}

/// Returns `true` if a file is evidently not meant to be a config.
pub(super) fn is_mistaken(path: &Path) -> bool {
    read_limited(path, MAX_JSON).is_ok_and(|bytes| mistaken(&bytes).is_some())
}

/// Returns JSON with `NaN`, `Infinity` and `-Infinity` in quotes.
fn with_quoted_numbers(bytes: &[u8]) -> Vec<u8> {
    const NUMBERS: [&[u8]; 3] = [b"NaN", b"Infinity", b"-Infinity"];
    let mut quoted = Vec::with_capacity(bytes.len());
    let (mut rest, mut in_text) = (bytes, false);
    while let [first, after @ ..] = rest {
        match first {
            b'"' => in_text = !in_text,
            // Escaped quotes do not end a text.
            b'\\' if in_text => {
                quoted.push(*first);
                rest = after;
                if let [escaped, after @ ..] = rest {
                    quoted.push(*escaped);
                    rest = after;
                }
                continue;
            }
            _ if !in_text => {
                if let Some(number) = NUMBERS.into_iter().find(|number| rest.starts_with(number)) {
                    quoted.push(b'"');
                    quoted.extend_from_slice(number);
                    quoted.push(b'"');
                    rest = &rest[number.len()..];
                    continue;
                }
            }
            _ => {}
        }
        quoted.push(*first);
        rest = after;
    }
    quoted
}

/// `config.json` of `transformers`.
pub(super) struct Options {
    pub(super) path: PathBuf,
    pub(super) value: Value,
}

impl Options {
    pub(super) fn refuse(&self, key: &str, why: impl fmt::Display) -> Error {
        Error::file(&self.path, format_args!("`{key}` {why}"))
    }

    pub(super) fn get(&self, key: &str) -> Option<&Value> {
        self.value.get(key).filter(|value| !value.is_null())
    }

    /// Returns `true` if the key is present, even with null.
    pub(super) fn has(&self, key: &str) -> bool {
        self.value.get(key).is_some()
    }

    /// Returns all keys with their values.
    pub(super) fn entries(&self) -> Result<&Map<String, Value>> {
        self.value.as_object().ok_or_else(|| Error::file(&self.path, "is not a JSON object"))
    }

    /// Rejects keys that a module does not have.
    pub(super) fn known(&self, module: &str, keys: &[&str]) -> Result<()> {
        match self.entries()?.keys().find(|key| !keys.contains(&key.as_str())) {
            Some(key) => Err(self.refuse(key, format!("is not a supported option of the module `{module}`"))),
            None => Ok(()),
        }
    }

    /// A JSON object.
    pub(super) fn object(&self, key: &str) -> Result<&Map<String, Value>> {
        let value = self.value.get(key).unwrap_or(&Value::Null);
        value.as_object().ok_or_else(|| self.refuse(key, format!("is {value}, expected an object")))
    }

    /// Returns a JSON object that has only these keys.
    pub(super) fn object_of(&self, key: &str, keys: &[&str]) -> Result<()> {
        match self.object(key)?.iter().find(|(name, value)| !value.is_null() && !keys.contains(&name.as_str())) {
            Some((name, value)) => Err(self.refuse(key, format!("sets `{name}` to {value}, which is not supported"))),
            None => Ok(()),
        }
    }

    pub(super) fn size(&self, key: &str, default: Option<usize>) -> Result<usize> {
        let value = match (self.get(key), default) {
            (Some(value), _) => value.as_u64().and_then(|value| usize::try_from(value).ok()),
            (None, default) => default,
        };
        value.filter(|value| (1..=1 << 30).contains(value)).ok_or_else(|| {
            let found = self.get(key).map_or_else(|| "missing".to_string(), ToString::to_string);
            self.refuse(key, format!("is {found}, expected a number from 1 to {}", 1 << 30))
        })
    }

    /// Returns the number of blocks, which is bounded because lists have one entry per block.
    pub(super) fn depth(&self, default: usize) -> Result<usize> {
        const KEY: &str = "num_hidden_layers";
        let depth = self.size(KEY, Some(default))?;
        ensure!(depth <= MAX_DEPTH, self.refuse(KEY, format!("is {depth}, expected at most {MAX_DEPTH}")));
        Ok(depth)
    }

    pub(super) fn number(&self, key: &str, default: f64) -> Result<f64> {
        match self.get(key) {
            None => Ok(default),
            Some(value) => value.as_f64().ok_or_else(|| self.refuse(key, format!("is {value}, expected a number"))),
        }
    }

    pub(super) fn flag(&self, key: &str, default: bool) -> Result<bool> {
        match self.get(key) {
            None => Ok(default),
            Some(value) => {
                value.as_bool().ok_or_else(|| self.refuse(key, format!("is {value}, expected true or false")))
            }
        }
    }

    pub(super) fn text<'a>(&'a self, key: &str, default: &'a str) -> Result<&'a str> {
        match self.get(key) {
            None => Ok(default),
            Some(value) => value.as_str().ok_or_else(|| self.refuse(key, format!("is {value}, expected a string"))),
        }
    }

    /// Rejects values of an option that this crate does not support.
    pub(super) fn only(&self, key: &str, value: impl Into<Value>) -> Result<()> {
        let value = value.into();
        match self.get(key) {
            Some(found) if *found != value => Err(self.refuse(key, format!("is {found}, expected {value}"))),
            _ => Ok(()),
        }
    }
}
