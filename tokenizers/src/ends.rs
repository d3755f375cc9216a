//! Special tokens of byte-level vocabularies in GGUF files: those around a text, and which of them are text.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use x_transformers::io::Metadata;

use super::{
    added_token,
    decoder::{ADDED_AS_TEXT, OWN},
};

/// The tokens around a text, with their spellings, and if a space is put in front of it.
pub(crate) struct Ends {
    start: Option<(usize, String)>,
    end: Option<(usize, String)>,
    prefix: bool,
}

impl Ends {
    /// `add_bos_token`, `add_eos_token` and `add_space_prefix`; what a file does not ask for it does not get.
    ///
    /// Errors: flags that are not true or false, and a token that is asked for and missing.
    pub(crate) fn of_gguf(all: &BTreeMap<String, Metadata>) -> Result<Self, String> {
        let metadata = |key: &str| all.get(&format!("tokenizer.ggml.{key}"));
        let flag = |key: &str, default: bool| match metadata(key) {
            None => Ok(default),
            Some(Metadata::Bool(flag)) => Ok(*flag),
            Some(_) => Err(format!("`tokenizer.ggml.{key}` is not a boolean")),
        };
        let tokens = metadata("tokens").and_then(Metadata::as_list).unwrap_or_default();
        let token = |wanted: bool, flag: &str, key: &str| {
            if !wanted {
                return Ok(None);
            }
            let id = metadata(key).and_then(Metadata::as_usize);
            let found = id.and_then(|id| Some((id, tokens.get(id)?.as_str()?.to_string())));
            match found {
                Some(found) => Ok(Some(found)),
                // Of a model that has none.
                None if metadata(key).is_none() => Ok(None),
                None => {
                    Err(format!("sets `tokenizer.ggml.{flag}`, but `tokenizer.ggml.{key}` is not the id of a token"))
                }
            }
        };
        let start = token(flag("add_bos_token", false)?, "add_bos_token", "bos_token_id")?;
        let end = token(flag("add_eos_token", false)?, "add_eos_token", "eos_token_id")?;
        Ok(Self { start, end, prefix: flag("add_space_prefix", false)? })
    }

    /// The normalizer that puts a space in front.
    pub(crate) fn normalizer(&self) -> Value {
        if self.prefix { json!({"type": "Prepend", "prepend": " "}) } else { Value::Null }
    }

    /// The post-processor that puts them around a text.
    pub(crate) fn around(&self) -> Value {
        if self.start.is_none() && self.end.is_none() {
            return Value::Null;
        }
        let of = |sequence: &str, type_id: u8| -> Vec<Value> {
            let special = |(_, text): &(usize, String)| json!({"SpecialToken": {"id": text, "type_id": type_id}});
            let text = json!({"Sequence": {"id": sequence, "type_id": type_id}});
            self.start.iter().map(special).chain([text]).chain(self.end.iter().map(special)).collect()
        };
        let tokens = self.start.iter().chain(&self.end);
        let tokens: serde_json::Map<String, Value> =
            tokens.map(|(id, text)| (text.clone(), json!({"id": text, "ids": [id], "tokens": [text]}))).collect();
        let pair = [of("A", 0), of("B", 1)].concat();
        json!({"type": "TemplateProcessing", "single": of("A", 0), "pair": pair, "special_tokens": tokens})
    }
}

/// The entry of a token that is looked for in texts, by its kind: control tokens (3) have no text of their own, those of
/// users (4) are text.
pub(crate) fn added(token: &str, id: usize, kind: Option<usize>) -> Option<Value> {
    let mut entry = added_token(token, id as u64).filter(|_| matches!(kind, Some(3 | 4)))?;
    entry["special"] = json!(kind == Some(3));
    Some(entry)
}

/// The decoder of byte-level tokens, beside which tokens of users are text as they are.
pub(crate) fn byte_decoder() -> Value {
    json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true, OWN: ADDED_AS_TEXT})
}

#[cfg(test)]
mod tests {
    use x_transformers::io::TensorFile;

    use super::super::{Tokenizer, gguf::of_gguf};

    /// A value of a GGUF file's metadata.
    #[derive(Clone)]
    enum Entry<'a> {
        Text(&'a str),
        Flag(bool),
        Number(u32),
        Texts(&'a [&'a str]),
        Numbers(&'a [u32]),
    }

    use Entry::{Flag, Number, Numbers, Text, Texts};

    /// A file without tensors.
    fn opened(entries: &[(&str, Entry)]) -> Result<Tokenizer, String> {
        let text = |text: &str| [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat();
        let list = |kind: u32, length: usize, values: Vec<Vec<u8>>| {
            [
                9u32.to_le_bytes().to_vec(),
                kind.to_le_bytes().to_vec(),
                (length as u64).to_le_bytes().to_vec(),
                values.concat(),
            ]
            .concat()
        };
        let entry = |(key, entry): &(&str, Entry)| {
            let value = match entry {
                Text(value) => [8u32.to_le_bytes().to_vec(), text(value)].concat(),
                Flag(value) => [7u32.to_le_bytes().to_vec(), vec![u8::from(*value)]].concat(),
                Number(value) => [4u32.to_le_bytes(), value.to_le_bytes()].concat(),
                Texts(values) => list(8, values.len(), values.iter().map(|value| text(value)).collect()),
                Numbers(values) => {
                    list(5, values.len(), values.iter().map(|value| value.to_le_bytes().to_vec()).collect())
                }
            };
            [text(&format!("tokenizer.ggml.{key}")), value].concat()
        };
        let all: Vec<Vec<u8>> = entries.iter().map(entry).collect();
        let head = [b"GGUF", &3u32.to_le_bytes()[..], &0u64.to_le_bytes(), &(all.len() as u64).to_le_bytes()].concat();
        let file = tempfile::Builder::new().suffix(".gguf").tempfile().expect("a file");
        std::fs::write(file.path(), [head, all.concat()].concat()).expect("a file");
        let json = of_gguf(TensorFile::open(file.path()).expect("a GGUF file").metadata())?;
        Tokenizer::from_json(&json).map_err(|error| error.to_string())
    }

    const TOKENS: [&str; 10] = ["a", "b", "Ġ", "<s>", "</s>", "  ", "—", "é", "Ã©", "<think>"];
    const KINDS: [u32; 10] = [1, 1, 1, 3, 3, 4, 4, 4, 1, 4];

    fn tokenizer(more: Vec<(&'static str, Entry<'static>)>) -> Result<Tokenizer, String> {
        let mut entries = vec![("model", Text("gpt2")), ("tokens", Texts(&TOKENS)), ("token_type", Numbers(&KINDS))];
        entries.push(("merges", Texts(&[])));
        entries.extend([("bos_token_id", Number(3)), ("eos_token_id", Number(4))]);
        entries.extend(more);
        opened(&entries)
    }

    /// Tokens of users are text, shown as they are and looked for in texts; control tokens have no text.
    #[test]
    fn tokens_of_users_are_text() {
        let tokenizer = tokenizer(vec![]).unwrap();
        assert_eq!(tokenizer.decode(&[0, 5, 1, 6, 7, 8, 3, 9, 2, 0, 4]).unwrap(), "a  b—éé<think> a");
        assert_eq!(tokenizer.encode("a  b—é<think></s> a").unwrap(), [0, 5, 1, 6, 7, 9, 4, 2, 0]);
        // A character that a byte and one of these make is none.
        assert_eq!(tokenizer.decode(&[7, 6]).unwrap(), "é—");
    }

    /// The tokens that a file wants around a text.
    #[test]
    fn flags_put_tokens_around_texts() {
        let ids =
            |more| tokenizer(more).and_then(|tokenizer| tokenizer.encode("ab").map_err(|error| error.to_string()));
        assert_eq!(ids(vec![]).unwrap(), [0, 1]);
        assert_eq!(ids(vec![("add_bos_token", Flag(true))]).unwrap(), [3, 0, 1]);
        assert_eq!(ids(vec![("add_bos_token", Flag(false)), ("add_eos_token", Flag(true))]).unwrap(), [0, 1, 4]);
        assert_eq!(ids(vec![("add_bos_token", Flag(true)), ("add_eos_token", Flag(true))]).unwrap(), [3, 0, 1, 4]);
        assert_eq!(ids(vec![("add_space_prefix", Flag(true))]).unwrap(), [2, 0, 1]);
        assert!(ids(vec![("add_bos_token", Number(1))]).unwrap_err().contains("add_bos_token` is not a boolean"));
        let named = [("model", Text("gpt2")), ("tokens", Texts(&TOKENS)), ("merges", Texts(&[]))];
        let lost = opened(&[&named[..], &[("add_bos_token", Flag(true)), ("bos_token_id", Number(77))]].concat());
        assert!(lost.unwrap_err().contains("`tokenizer.ggml.bos_token_id` is not the id of a token"));
        assert!(opened(&[&named[..], &[("add_bos_token", Flag(true))]].concat()).is_ok());
    }
}
