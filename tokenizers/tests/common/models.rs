//! A tokenizer of each kind, and long texts.

use std::{fs, path::Path, sync::OnceLock, time::Instant};

use serde_json::{Map, Value, json};
use x_transformers::pretrained::Family;
use x_transformers_tokenizers::Tokenizer;

/// A byte-level BPE with the beginnings of some words.
fn bytes(splitter: Value) -> Value {
    let characters = (b'!'..=b'~').map(char::from).chain('\u{a1}'..='\u{ac}').chain('\u{ae}'..='\u{143}');
    let mut tokens: Vec<String> = characters.map(String::from).collect();
    let mut merges = Vec::new();
    let words =
        ["the", "tensor", "token", "model", "aaaaaaaa", "11", "ing", "Ġthe", "Ġtensor", "ĠĠĠĠ", "ĉĉ", "èªŀ", "the Ġ"];
    for word in words.iter().flat_map(|word| word.split(' ')) {
        let mut before = String::new();
        for character in word.chars() {
            let whole = format!("{before}{character}");
            if !before.is_empty() && !tokens.contains(&whole) {
                tokens.push(whole.clone());
                merges.push(json!([before, character.to_string()]));
            }
            before = whole;
        }
    }
    let vocabulary: Map<String, Value> = tokens.into_iter().zip(0..).map(|(token, id)| (token, json!(id))).collect();
    json!({
        "version": "1.0", "added_tokens": [token("<mask>", 900, true), token("<s>", 901, false)], "pre_tokenizer": splitter,
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": merges},
    })
}

fn token(content: &str, id: u32, spaces: bool) -> Value {
    json!({
        "id": id, "content": content, "single_word": false, "lstrip": spaces, "rstrip": spaces, "normalized": false,
        "special": true,
    })
}

/// BERT's, with pieces for long words too.
fn word_pieces(longest: u32) -> Value {
    let letters = ('a'..='z').flat_map(|letter| [letter.to_string(), format!("##{letter}")]);
    let others = ["[UNK]", "the", "##the", "##ing", "token", "語", "##学", "1", "##1", "."].map(String::from);
    let vocabulary: Map<String, Value> =
        others.into_iter().chain(letters).zip(0..).map(|(token, id)| (token, json!(id))).collect();
    json!({
        "version": "1.0", "added_tokens": [token("<mask>", 900, true)],
        "normalizer": {
            "type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true, "strip_accents": null,
            "lowercase": true,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"}, "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true},
        "model": {
            "type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
            "max_input_chars_per_word": longest, "vocab": vocabulary,
        },
    })
}

/// The tokenizers.
pub fn all() -> Vec<(&'static str, Tokenizer)> {
    let gpt2 = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let pattern = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
    let llama3 = json!({"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false},
        {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
    ]});
    let parse = |name: &'static str, json: Value| (name, Tokenizer::parse(name, &json.to_string()).unwrap());
    let model = |name: &'static str, file: &str, family| {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/sentencepiece").join(file);
        (name, Tokenizer::open(path, family).unwrap())
    };
    vec![
        parse("byte-level BPE, GPT-2", bytes(gpt2)),
        parse("byte-level BPE, Llama 3", bytes(llama3)),
        model("SentencePiece BPE", "bpe.model", Family::Llama),
        model("SentencePiece unigram", "unigram.model", Family::Albert),
        parse("WordPiece", word_pieces(100)),
        parse("WordPiece, long words", word_pieces(100_000_000)),
    ]
}

/// Texts of a given number of bytes, without a space except for the last ones.
pub fn texts(bytes: usize) -> Vec<(&'static str, String)> {
    let fill = |parts: &[&str]| {
        let mut text = String::with_capacity(bytes + 16);
        let mut state = 1u64;
        while text.len() < bytes {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            text.push_str(parts[(state >> 33) as usize % parts.len()]);
        }
        text
    };
    let letters: Vec<String> = ('a'..='z').map(String::from).collect();
    let letters: Vec<&str> = letters.iter().map(String::as_str).collect();
    vec![
        ("one letter", fill(&["a"])),
        ("letters", fill(&letters)),
        ("words", fill(&["the", "tensor", "of", "token", "model", "ing", "a"])),
        ("digits", fill(&["1", "2", "3"])),
        ("Japanese", fill(&["語", "学", "本", "日"])),
        ("marks", fill(&["e\u{301}", "\u{302}", "ü"])),
        ("emoji", fill(&["👨\u{200d}👩", "🇩🇪", "\u{fe0f}"])),
        ("punctuation", fill(&[".", "-", "'", "<"])),
        ("tabs", fill(&["\t"])),
        ("tokens", fill(&["<mask>", "<s>", "x"])),
        ("spaces", fill(&[" "])),
        ("words, spaces", fill(&["the ", "tensor ", "of ", "token ", "ing\n"])),
    ]
}

/// Returns the CPU seconds of this thread, or the elapsed time if the system does not report them.
pub fn computed() -> f64 {
    // The kernel updates the count at ticks, and when a thread yields.
    std::thread::yield_now();
    let scheduled = fs::read_to_string("/proc/thread-self/schedstat").ok();
    let nanoseconds = scheduled.and_then(|times| times.split_whitespace().next()?.parse::<u64>().ok());
    static START: OnceLock<Instant> = OnceLock::new();
    nanoseconds.map_or_else(|| START.get_or_init(Instant::now).elapsed().as_secs_f64(), |time| time as f64 / 1e9)
}
