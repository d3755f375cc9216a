//! Any text as a chat template writes a chat or gives an error, within bounded time and memory. Begin from the templates in
//! tokenizers/tests.

#![no_main]

use std::{
    sync::LazyLock,
    time::{Duration, SystemTime},
};

use libfuzzer_sys::fuzz_target;
use x_transformers_tokenizers::{ChatOptions, Message, Tokenizer};

static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(|| {
    let vocabulary = r#"{"a": 0, "b": 1, "<|im_start|>": 2, "<|im_end|>": 3}"#;
    let json = format!(r#"{{"model": {{"type": "BPE", "vocab": {vocabulary}, "merges": []}}}}"#);
    Tokenizer::parse("tokenizer.json", &json).expect("a small tokenizer")
});

fuzz_target!(|bytes: &[u8]| {
    let Ok(text) = str::from_utf8(bytes) else { return };
    let messages = [
        Message::new("system", "You are <|im_start|> terse."),
        Message::new("user", "abba"),
        Message::new("assistant", ""),
    ];
    let options = ChatOptions {
        template: Some(text.to_string()),
        now: Some(SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000)),
        ..ChatOptions::default()
    };
    let _ = TOKENIZER.chat_text(&messages, &options);
    let _ = TOKENIZER.chat(&messages, &options);
});
