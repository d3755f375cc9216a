//! Any bytes that look like a SentencePiece model give a tokenizer or an error that names the file. Begin from the
//! files in tokenizers/tests.

#![no_main]

use std::{env, fs, process};

use libfuzzer_sys::fuzz_target;
use x_transformers::io::Family;
use x_transformers_tokenizers::Tokenizer;

fuzz_target!(|bytes: &[u8]| {
    let path = env::temp_dir().join(format!("fuzz-sentencepiece-{}.model", process::id()));
    fs::write(&path, bytes).unwrap();
    for family in [Family::Llama, Family::Albert] {
        let Ok(tokenizer) = Tokenizer::open(&path, family) else { continue };
        for text in ["the tensor", "é 語\u{301} <mask>\n\n  1,", "C(=O)[O-]>>Cl"] {
            if let Ok(tokens) = tokenizer.encode(text) {
                let _ = tokenizer.decode(&tokens);
            }
        }
    }
});
