//! Tokens and their ids.

use std::sync::Arc;

use ahash::AHashMap;
use serde_json::Value;

/// Tokens of a model, by text and by id.
#[derive(Default)]
pub struct Vocabulary {
    ids: AHashMap<Arc<str>, u32>,
    tokens: AHashMap<u32, Arc<str>>,
    /// Number of bytes of the longest token.
    longest: usize,
}

impl Vocabulary {
    /// Reads the object of texts and ids in `tokenizer.json`.
    pub fn of_json(vocabulary: Value) -> Result<Self, String> {
        let Value::Object(vocabulary) = vocabulary else {
            return Err("model.vocab: expected an object of tokens and ids".to_string());
        };
        let mut made = Self::default();
        made.ids.reserve(vocabulary.len());
        made.tokens.reserve(vocabulary.len());
        for (token, id) in vocabulary {
            let id = self::id(&id)
                .ok_or_else(|| format!("model.vocab: the id of `{}` is {id}, expected 0 to {MAX_ID}", shown(&token)))?;
            made.add(&token, id);
        }
        Ok(made)
    }

    /// Adds a token; of two with the same text, the last one stays.
    pub fn add(&mut self, token: &str, id: u32) {
        let token: Arc<str> = token.into();
        self.longest = self.longest.max(token.len());
        self.ids.insert(token.clone(), id);
        self.tokens.insert(id, token);
    }

    pub fn id(&self, token: &str) -> Option<u32> {
        self.ids.get(token).copied()
    }

    pub fn token(&self, id: u32) -> Option<&str> {
        self.tokens.get(&id).map(AsRef::as_ref)
    }

    /// Returns the number of bytes of the longest token.
    pub fn longest(&self) -> usize {
        self.longest
    }

    pub fn len(&self) -> usize {
        self.ids.len()
    }

    /// Returns the tokens of one character.
    pub fn characters(&self) -> AHashMap<char, u32> {
        let single = |(token, &id): (&Arc<str>, &u32)| {
            let mut characters = token.chars();
            let first = characters.next()?;
            characters.next().is_none().then_some((first, id))
        };
        self.ids.iter().filter_map(single).collect()
    }

    pub fn iter(&self) -> impl Iterator<Item = (&str, u32)> {
        self.ids.iter().map(|(token, &id)| (token.as_ref(), id))
    }
}

/// Maximum id: ids are rows of an embedding table.
pub const MAX_ID: u32 = i32::MAX as u32;

/// Reads an id from JSON.
pub fn id(value: &Value) -> Option<u32> {
    value.as_u64().and_then(|id| u32::try_from(id).ok()).filter(|&id| id <= MAX_ID)
}

/// Returns the beginning of a text from a file, for messages.
pub fn shown(text: &str) -> String {
    let mut start: String = text.chars().take(40).collect();
    if start.len() < text.len() {
        start.push('…');
    }
    start
}
