//! The tokenizer of a GGUF file in the form of `tokenizer.json`.

use std::collections::BTreeMap;

use serde_json::{Map, json};
use x_transformers::io::Metadata;

use super::{
    ends::{self, Ends},
    pretokenizer::{self, PreTokenizer},
    sentencepiece::SentencePiece,
};

/// Byte-level BPE with the vocabulary and the merges of a GGUF file, or its pieces of SentencePiece.
pub fn of_gguf(metadata: &BTreeMap<String, Metadata>) -> std::result::Result<String, String> {
    let text = |key: &str| metadata.get(key).and_then(Metadata::as_str);
    let list = |key: &str| {
        let found = metadata.get(key).and_then(Metadata::as_list);
        found.ok_or_else(|| format!("has no tokenizer: missing list `{key}`"))
    };
    match text("tokenizer.ggml.model") {
        Some("gpt2") => {}
        Some("llama") => {
            let (pieces, customs) = SentencePiece::of_gguf(metadata)?;
            return pieces.json(customs);
        }
        other => {
            let why = "expected gpt2 (byte-level BPE) or llama (SentencePiece)";
            return Err(format!("has `tokenizer.ggml.model` = {other:?}, {why}"));
        }
    }
    // Files from before there were names of splits have what their models had.
    let usual = if text("general.architecture") == Some("qwen2") { "qwen2" } else { "gpt-2" };
    let name = text("tokenizer.ggml.pre").unwrap_or(usual);
    let PreTokenizer { json: pre_tokenizer, ignore_merges } = pretokenizer::of(name).ok_or_else(|| {
        format!(
            "has `tokenizer.ggml.pre` = `{name}`, expected gpt-2, llama-bpe, qwen2, tekken, smollm, deepseek-llm or a \
             variant of one"
        )
    })?;
    let tokens = list("tokenizer.ggml.tokens")?;
    let kinds = list("tokenizer.ggml.token_type").unwrap_or_default();
    let mut vocabulary = Map::new();
    let mut added = Vec::new();
    for (id, token) in tokens.iter().enumerate() {
        let token = token.as_str().ok_or("has a token that is not a string")?;
        if vocabulary.insert(token.to_string(), json!(id)).is_some() {
            return Err(format!("has the token `{token}` twice"));
        }
        added.extend(ends::added(token, id, kinds.get(id).and_then(Metadata::as_usize)));
    }
    let ends = Ends::of_gguf(metadata)?;
    let merges = list("tokenizer.ggml.merges")?.iter().map(|merge| match merge.as_str()?.split_once(' ') {
        Some((first, second)) if !second.contains(' ') => Some(json!([first, second])),
        _ => None,
    });
    let merges = merges.collect::<Option<Vec<_>>>().ok_or("has a merge that is not a pair of tokens")?;
    Ok(json!({
        "version": "1.0",
        "added_tokens": added,
        "normalizer": ends.normalizer(),
        "pre_tokenizer": pre_tokenizer,
        "post_processor": ends.around(),
        "decoder": ends::byte_decoder(),
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocabulary, "merges": merges,
            "ignore_merges": ignore_merges,
        },
    })
    .to_string())
}

#[cfg(test)]
mod tests {
    use serde_json::Value;
    use x_transformers::io::TensorFile;

    use super::of_gguf;

    fn text(text: &str) -> Vec<u8> {
        [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
    }

    /// A pair of metadata with a list.
    fn list(key: &str, kind: u32, values: impl IntoIterator<Item = Vec<u8>>) -> Vec<u8> {
        let values: Vec<Vec<u8>> = values.into_iter().collect();
        let count = (values.len() as u64).to_le_bytes();
        [&text(key)[..], &9u32.to_le_bytes(), &kind.to_le_bytes(), &count, &values.concat()].concat()
    }

    fn pair(key: &str, value: &str) -> Vec<u8> {
        [&text(key)[..], &8u32.to_le_bytes(), &text(value)].concat()
    }

    fn file(entries: &[Vec<u8>]) -> TensorFile {
        let count = (entries.len() as u64).to_le_bytes();
        let head = [b"GGUF", &3u32.to_le_bytes()[..], &0u64.to_le_bytes(), &count].concat();
        TensorFile::from_bytes([head, entries.concat()].concat()).unwrap()
    }

    /// A file of a byte-level vocabulary.
    fn gguf(pairs: &[(&str, &str)], tokens: &[&str], merges: &[&str]) -> TensorFile {
        let mut entries: Vec<Vec<u8>> = pairs.iter().map(|(key, value)| pair(key, value)).collect();
        entries.push(pair("tokenizer.ggml.model", "gpt2"));
        entries.push(list("tokenizer.ggml.tokens", 8, tokens.iter().map(|token| text(token))));
        entries.push(list("tokenizer.ggml.merges", 8, merges.iter().map(|merge| text(merge))));
        file(&entries)
    }

    fn strings(value: &Value) -> Vec<&str> {
        value.as_array().unwrap().iter().map(|value| value.as_str().unwrap()).collect()
    }

    /// Awkward texts have the tokens of transformers and tokenizers, see `tests/gguf/make.py`.
    #[test]
    fn texts_are_split_as_their_models_split_them() {
        let cases: Value = serde_json::from_str(include_str!("../tests/gguf/pre.json")).unwrap();
        let (tokens, merges, texts) = (strings(&cases["tokens"]), strings(&cases["merges"]), strings(&cases["texts"]));
        let names = cases["names"].as_object().unwrap();
        assert!(names.len() > 35 && texts.len() > 35);
        // Of names that split alike one has to do: reading the vocabulary takes the time.
        let mut wrong = Vec::new();
        for (list, expected) in cases["lists"].as_array().unwrap().iter().enumerate() {
            let mut alike = names.iter().filter(|(_, number)| number.as_u64() == Some(list as u64));
            let ids = |name: &str| -> Vec<Vec<u32>> {
                let json = of_gguf(gguf(&[("tokenizer.ggml.pre", name)], &tokens, &merges).metadata()).unwrap();
                let tokenizer: tokenizers::Tokenizer = json.parse().unwrap();
                texts.iter().map(|text| tokenizer.encode(*text, false).unwrap().get_ids().to_vec()).collect()
            };
            let (name, _) = alike.next().unwrap();
            for ((text, ids), expected) in texts.iter().zip(ids(name)).zip(expected.as_array().unwrap()) {
                if serde_json::json!(ids) != *expected {
                    wrong.push(format!("{name} {text:?}: {ids:?}, expected {expected}"));
                }
            }
            for (name, _) in alike {
                assert!(super::pretokenizer::of(name).is_some(), "{name}");
            }
        }
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    }

    #[test]
    fn splits_without_a_name_are_those_of_the_architecture() {
        let split = |pairs: &[(&str, &str)]| {
            let json = of_gguf(gguf(pairs, &["1", "2", "12", "Ġ", "Ġ1"], &["1 2", "Ġ 1"]).metadata()).unwrap();
            let tokenizer: tokenizers::Tokenizer = json.parse().unwrap();
            tokenizer.encode(" 12", false).unwrap().get_ids().to_vec()
        };
        assert_eq!(split(&[("general.architecture", "llama")]), [3, 2]);
        assert_eq!(split(&[("general.architecture", "qwen2")]), [3, 0, 1]);
        assert_eq!(split(&[("general.architecture", "qwen2"), ("tokenizer.ggml.pre", "gpt-2")]), [3, 2]);
        let error = of_gguf(gguf(&[("tokenizer.ggml.pre", "kimi-k2")], &["a"], &[]).metadata()).unwrap_err();
        assert!(error.contains("`kimi-k2`") && error.contains("llama-bpe"), "{error}");
    }

    /// Llama 3's words that are tokens are so, whatever the merges say.
    #[test]
    fn whole_words_go_before_merges() {
        let ids = |name: &str| {
            let file = gguf(&[("tokenizer.ggml.pre", name)], &["a", "b", "c", "ab", "abc", "bc"], &["b c", "a b"]);
            let tokenizer: tokenizers::Tokenizer = of_gguf(file.metadata()).unwrap().parse().unwrap();
            tokenizer.encode("abc", false).unwrap().get_ids().to_vec()
        };
        assert_eq!(ids("llama-bpe"), [4]);
        assert_eq!(ids("tekken"), [4]);
        assert_eq!(ids("gpt-2"), [0, 5]);
    }

    /// Texts have the tokens of SentencePiece under each setting, see `tests/gguf/make.py`.
    #[test]
    fn pieces_have_the_settings_of_their_file() {
        let written: Value = serde_json::from_str(include_str!("../tests/gguf/pieces.json")).unwrap();
        let values = |key: &str| written[key].as_array().unwrap().clone();
        let flag = |key: &str, value: bool| [&text(key)[..], &7u32.to_le_bytes(), &[value.into()]].concat();
        let id = |key: &str, id: u32| [&text(key)[..], &4u32.to_le_bytes(), &id.to_le_bytes()].concat();
        for case in values("cases") {
            let rules = case["charsmap"].as_array().unwrap();
            let mut kinds: Vec<i32> = values("types").iter().map(|kind| kind.as_i64().unwrap() as i32).collect();
            // One that fills up the vocabulary is like the others.
            let filling = kinds.iter().rposition(|&kind| kind == 1).unwrap();
            kinds[filling] = 5;
            let mut entries = vec![
                pair("tokenizer.ggml.model", "llama"),
                list("tokenizer.ggml.tokens", 8, strings(&written["tokens"]).into_iter().map(text)),
                list(
                    "tokenizer.ggml.scores",
                    6,
                    values("scores").iter().map(|score| (score.as_f64().unwrap() as f32).to_le_bytes().to_vec()),
                ),
                list("tokenizer.ggml.token_type", 5, kinds.iter().map(|kind| kind.to_le_bytes().to_vec())),
                id("tokenizer.ggml.bos_token_id", 1),
                flag("tokenizer.ggml.add_space_prefix", case["add_space_prefix"].as_bool().unwrap()),
                flag("tokenizer.ggml.remove_extra_whitespaces", case["remove_extra_whitespaces"].as_bool().unwrap()),
            ];
            if !rules.is_empty() {
                let bytes = rules.iter().map(|byte| vec![byte.as_u64().unwrap() as u8]);
                // Both kinds of 8 bits are written.
                let kind = u32::from(case["add_space_prefix"].as_bool().unwrap());
                entries.push(list("tokenizer.ggml.precompiled_charsmap", kind, bytes));
            }
            let tokenizer: tokenizers::Tokenizer = of_gguf(file(&entries).metadata()).unwrap().parse().unwrap();
            for (text, expected) in strings(&written["texts"]).into_iter().zip(case["ids"].as_array().unwrap()) {
                let ids = tokenizer.encode(text, false).unwrap().get_ids().to_vec();
                assert_eq!(serde_json::json!(ids), *expected, "{text:?} {case}");
            }
            // Without kinds all but the user's token is known by its spelling or its id.
            entries.retain(|entry| !entry.starts_with(&text("tokenizer.ggml.token_type")));
            let tokenizer: tokenizers::Tokenizer = of_gguf(file(&entries).metadata()).unwrap().parse().unwrap();
            for (text, expected) in strings(&written["texts"]).into_iter().zip(case["ids"].as_array().unwrap()) {
                let ids = tokenizer.encode(text, false).unwrap().get_ids().to_vec();
                assert_eq!(serde_json::json!(ids), *expected, "{text:?} {case}");
            }
            entries.pop();
            entries.push(pair("tokenizer.ggml.precompiled_charsmap", "rules"));
            assert!(of_gguf(file(&entries).metadata()).unwrap_err().contains("precompiled_charsmap"));
        }
    }
}
