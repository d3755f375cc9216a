//! Learned vocabularies, compared with those of the Python package `tokenizers` (tests/bpe/make.py).

use std::{collections::BTreeMap, fs, path::Path};

use serde::Deserialize;
use x_transformers::{Error, ErrorKind, Result};
use x_transformers_tokenizers::{Tokenizer, learn_byte_level_bpe};

#[derive(Deserialize)]
struct Expected {
    lines: Vec<String>,
    tokens: Vec<String>,
    merges: Vec<String>,
    samples: Vec<(String, Vec<i64>)>,
}

#[derive(Deserialize)]
struct Learned {
    model: Model,
}

#[derive(Deserialize)]
struct Model {
    vocab: BTreeMap<String, usize>,
    merges: Vec<(String, String)>,
}

#[test]
fn vocabulary_is_that_of_python() -> Result<()> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    let expected = fs::read_to_string(folder.join("tests/bpe/expected.json")).expect("what Python learned");
    let expected: Expected = serde_json::from_str(&expected).expect("JSON");
    let plays = fs::read(folder.join("../cli/corpus.txt")).expect("plays");
    let plays = str::from_utf8(&plays[..60000]).expect("UTF-8").to_string();
    let texts = || std::iter::once(plays.clone()).chain(expected.lines.clone()).map(Result::Ok);
    let json = learn_byte_level_bpe(texts(), 400, &["<|endoftext|>"])?;
    let Learned { model } = serde_json::from_str(&json).expect("a tokenizer.json");
    let merges: Vec<String> = model.merges.iter().map(|(a, b)| format!("{a} {b}")).collect();
    assert_eq!(merges, expected.merges);
    assert_eq!((model.vocab.len(), expected.tokens.len()), (400, 400));
    for (id, token) in expected.tokens.iter().enumerate() {
        assert_eq!(model.vocab.get(token), Some(&id), "{token}");
    }
    let tokenizer = Tokenizer::from_json(&json)?;
    assert_eq!((tokenizer.num_tokens(), tokenizer.token("<|endoftext|>")), (400, Some(0)));
    for (text, tokens) in &expected.samples {
        assert_eq!(tokenizer.encode_plain(text)?, *tokens, "{text:?}");
        assert_eq!(tokenizer.decode(tokens)?, text.replace("<|endoftext|>", ""));
    }
    // The order of threads does not matter.
    assert_eq!(learn_byte_level_bpe(texts(), 400, &["<|endoftext|>"])?, json);
    Ok(())
}

#[test]
fn refused_vocabularies() {
    let learn = |num_tokens, special: &[&str]| {
        learn_byte_level_bpe(["some text"].map(|text| Result::Ok(text.to_string())), num_tokens, special)
            .map_err(|error| error.to_string())
    };
    assert!(
        learn(256, &["<end>"]).unwrap_err().contains("at least 257 tokens (256 bytes and 1 special ones), got 256")
    );
    assert!(learn(300, &["<end>", "<end>"]).unwrap_err().contains("`<end>` is empty or given twice"));
    assert!(learn(300, &[""]).is_err());
    assert!(learn(256, &[]).is_ok());
    // The first error of the texts is that of the call.
    let broken = || Error::new(ErrorKind::Option { key: "line".into(), why: "is broken".into() });
    let texts = [Ok("a".to_string()), Err(broken()), Ok("b".to_string())];
    assert!(learn_byte_level_bpe(texts, 300, &[]).unwrap_err().to_string().contains("is broken"));
    // Few pairs give fewer tokens.
    let small = Tokenizer::from_json(&learn(1000, &["<end>"]).expect("a vocabulary")).expect("a tokenizer");
    assert!(small.num_tokens() < 300);
}
