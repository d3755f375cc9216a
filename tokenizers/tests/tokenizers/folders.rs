//! Tokens of texts, compared with `transformers` on folders that `tests/folders/make.py` wrote.

use std::{fs, path::Path};

use serde_json::Value;
use x_transformers::pretrained::Pretrained;
use x_transformers_tokenizers::Tokenizer;

#[test]
fn tokens_match_transformers() {
    let files = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/folders");
    let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/files");
    let cases: Vec<Value> = serde_json::from_str(&fs::read_to_string(files.join("cases.json")).unwrap()).unwrap();
    assert!(cases.len() > 15, "{}", cases.len());
    let mut wrong = Vec::new();
    for case in &cases {
        let folder = tempfile::tempdir().unwrap();
        for (path, content) in case["files"].as_object().unwrap() {
            fs::write(folder.path().join(path), content.as_str().unwrap()).unwrap();
        }
        for (path, source) in case["copies"].as_object().unwrap() {
            fs::copy(files.join(source.as_str().unwrap()), folder.path().join(path)).unwrap();
        }
        // Any weights of the family: they are not used here.
        let pretrained = Pretrained::open(models.join(case["family"].as_str().unwrap())).unwrap();
        let tokenizer = match Tokenizer::of(&pretrained, Some(folder.path())) {
            Ok(tokenizer) => tokenizer,
            Err(why) => {
                wrong.push(format!("{}: {why}", case["name"]));
                continue;
            }
        };
        for (text, tokens) in case["texts"].as_array().unwrap().iter().zip(case["tokens"].as_array().unwrap()) {
            let found = tokenizer.encode(text.as_str().unwrap()).unwrap();
            if serde_json::json!(found) != *tokens {
                wrong.push(format!("{} {text}: {found:?}, expected {tokens}", case["name"]));
            }
        }
    }
    assert!(wrong.is_empty(), "{} differ\n{}", wrong.len(), wrong.join("\n"));
}
