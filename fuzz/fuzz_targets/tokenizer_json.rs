//! Any text that looks like a `tokenizer.json` gives a tokenizer or an error that names the file, and so does any text that
//! the tokenizer is given. Begin from the files in tokenizers/tests.

#![no_main]

use libfuzzer_sys::fuzz_target;
use x_transformers_tokenizers::Tokenizer;

fuzz_target!(|bytes: &[u8]| {
    let Ok(json) = str::from_utf8(bytes) else { return };
    let Ok(tokenizer) = Tokenizer::parse("tokenizer.json", json) else { return };
    for text in ["the tensor", "é 語\u{301} <mask>\n\n  1,", json] {
        if let Ok(tokens) = tokenizer.encode(text) {
            let _ = tokenizer.decode(&tokens);
        }
    }
    let _ = tokenizer.decode(&[0, -1, 7, i64::MAX]);
});
