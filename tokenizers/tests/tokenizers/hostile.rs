//! Damaged and malicious files: each gives a tokenizer or an error that names the file, and no text hangs.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use x_transformers::{Error, ErrorKind, pretrained::Family};
use x_transformers_tokenizers::Tokenizer;

use crate::models;

const TEXTS: [&str; 6] =
    ["the é", "", "hello <mask> 語\u{301}", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", " \t\n", "t\u{0}e\u{feff}"];

/// Tokens of some texts, or an error that names the file.
fn tokens(json: &str) -> Result<Vec<Vec<i64>>, String> {
    let named = |why: Error| match why.kind() {
        ErrorKind::File { path, .. } if path == Path::new("there/tokenizer.json") => why.to_string(),
        other => panic!("{other:?}"),
    };
    let tokenizer = Tokenizer::parse("there/tokenizer.json", json).map_err(named)?;
    let start = Instant::now();
    let mut all = Vec::new();
    for text in TEXTS {
        // A refused text is an error, not a panic.
        if let Ok(tokens) = tokenizer.encode(text) {
            let _ = tokenizer.decode(&tokens);
            all.push(tokens);
        }
    }
    for tokens in [&[][..], &[0], &[-1, i64::MAX, 1 << 32, 3]] {
        let _ = tokenizer.decode(tokens);
    }
    assert!(start.elapsed() < Duration::from_secs(120), "{json}");
    Ok(all)
}

/// A small tokenizer with other values in it.
fn with(path: &str, value: Value) -> String {
    let mut tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null, "pre_tokenizer": null,
        "post_processor": null, "decoder": null,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "vocab": {"t": 0, "h": 1, "th": 2, "e": 3, "a": 4, "aa": 5}, "merges": [["t", "h"], ["a", "a"]],
        },
    });
    *tokenizer.pointer_mut(path).unwrap() = value;
    tokenizer.to_string()
}

#[test]
fn descriptions_are_checked() {
    let sequence = |depth: usize, list: &str| {
        (0..depth).fold(json!({"type": "Lowercase"}), |inner, _| json!({"type": "Sequence", list: [inner]}))
    };
    let template = |single: Value, ids: Value| {
        json!({
            "type": "TemplateProcessing", "single": single, "pair": single,
            "special_tokens": {"[CLS]": {"id": "[CLS]", "ids": ids, "tokens": ["[CLS]"]}},
        })
    };
    let special = |name: &str| json!({"SpecialToken": {"id": name, "type_id": 0}});
    let text = json!({"Sequence": {"id": "A", "type_id": 0}});
    let replace = |pattern: Value, content: &str| json!({"type": "Replace", "pattern": pattern, "content": content});
    let split = |pattern: Value| json!({"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": false});
    let rules = |text: &str| json!({"type": "Precompiled", "precompiled_charsmap": text});
    let unigram = |vocabulary: Value, unknown: u64| json!({"type": "Unigram", "unk_id": unknown, "vocab": vocabulary});
    let words = |unknown: &str| json!({"type": "WordLevel", "unk_token": unknown, "vocab": {"a": 0}});
    let added = |id: u64, content: &str| json!([{"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": true, "special": true}]);
    let refused = [
        (with("/version", json!("2.0")), "`version` is \"2.0\", expected 1.0"),
        (with("/model", Value::Null), "model.vocab is missing"),
        (with("/model", json!([])), "model.vocab is missing"),
        (with("/model/vocab", json!({"a": -1})), "the id of `a` is -1"),
        (with("/model/vocab", json!({"a": 4_294_967_295u32})), "the id of `a` is 4294967295, expected 0 to 2147483647"),
        (with("/model/vocab", json!({"a": 1u64 << 40})), "the id of `a` is 1099511627776"),
        (with("/model/vocab", json!({"a": 0.5})), "the id of `a` is 0.5"),
        (with("/model/vocab", json!(["a"])), "model.vocab: expected an object"),
        (with("/model/merges", json!([["t", "x"]])), "`x` is not in the vocabulary"),
        (with("/model/merges", json!([["h", "t"]])), "`ht` is not in the vocabulary"),
        (with("/model/merges", json!([["t"]])), "merge 0 is not a pair"),
        (with("/model/merges", json!(["t h", "t h e"])), "merge 1 is not a pair"),
        (with("/model/merges", json!(7)), "model.merges: expected a list"),
        (
            with("/model/continuing_subword_prefix", json!("##")),
            "`h` does not start with continuing_subword_prefix (`##`)",
        ),
        (with("/model/continuing_subword_prefix", json!("#".repeat(65))), "has 65 bytes"),
        (with("/model/unk_token", json!("[UNK]")), "`[UNK]` is not in the vocabulary"),
        (with("/model/dropout", json!(0.1)), "model.dropout is 0.1"),
        (with("/model/type", json!("Magic")), "model.type is `Magic`"),
        (with("/model", unigram(json!([["a", 0.0]]), 1)), "model.unk_id is 1"),
        (with("/model", unigram(json!([]), 0)), "model.unk_id is 0"),
        (with("/model", unigram(json!([["a"]]), 0)), "piece 0 is not a pair of string and score"),
        (with("/model", words("b")), "`b` is not in the vocabulary"),
        (with("/normalizer", sequence(17, "normalizers")), "sequences are nested more than 16 deep"),
        (with("/pre_tokenizer", sequence(60, "pretokenizers")), "sequences are nested more than 16 deep"),
        (with("/decoder", sequence(17, "decoders")), "sequences are nested more than 16 deep"),
        (with("/post_processor", sequence(17, "processors")), "sequences are nested more than 16 deep"),
        (with("/normalizer", sequence(200, "normalizers")), "recursion limit exceeded"),
        (with("/normalizer", replace(json!({"String": ""}), "x")), "is empty"),
        (with("/normalizer", replace(json!({"Regex": "("}), "x")), "normalizer (Replace).pattern"),
        (with("/normalizer", replace(json!({"Regex": "a".repeat(20_000)}), "x")), "has 20000 bytes"),
        (with("/normalizer", replace(json!({"String": "a"}), &"x".repeat(300))), "has 300 bytes, expected at most 256"),
        (with("/normalizer", json!({"type": "Prepend", "prepend": "x".repeat(1000)})), "has 1000 bytes"),
        (with("/normalizer", rules("AAAA")), "precompiled_charsmap: has no trie size"),
        (with("/normalizer", rules("_")), "is not base64"),
        (with("/normalizer", rules("/////w==")), "its trie has 4294967295 bytes"),
        (with("/normalizer", rules("AAAAAA==")), "has an empty trie"),
        (with("/normalizer", json!({"type": "Magic"})), "normalizer"),
        (with("/normalizer", json!({"pattern": {"String": "a"}, "content": "b"})), "normalizer"),
        (with("/pre_tokenizer", split(json!({"String": ""}))), "is empty"),
        (with("/pre_tokenizer", split(json!({"Regex": "(?<"}))), "pre_tokenizer (Split).pattern"),
        (with("/pre_tokenizer", split(json!({"Regex": "(".repeat(5000)}))), "pre_tokenizer (Split).pattern"),
        (with("/pre_tokenizer", json!({"type": "FixedLength", "length": 0})), "is 0, expected at least 1"),
        (with("/pre_tokenizer", json!({"type": "CharDelimiterSplit", "delimiter": "ab"})), "expected one character"),
        (with("/post_processor", template(json!([special("[NOPE]"), text]), json!([1]))), "refers to `[NOPE]`"),
        (with("/post_processor", template(json!([special("[CLS]")]), json!([1u64 << 32]))), "`[CLS]` has invalid ids"),
        (
            with("/post_processor", template(json!([{"Sequence": {"id": "B", "type_id": 0}}]), json!([1]))),
            "neither a special",
        ),
        (with("/post_processor", template(json!(vec![text; 1000]), json!([1]))), "contains the text 1000 times"),
        (with("/post_processor", json!({"type": "BertProcessing", "cls": ["a", -1], "sep": ["a", 1]})), "cls"),
        (with("/decoder", replace(json!({"String": ""}), "x")), "is empty"),
        (with("/decoder", json!({"type": "Magic"})), "decoder"),
        (with("/added_tokens", added(4_294_967_295, "x")), "id of `x`"),
        (with("/added_tokens", added(9, &"x".repeat(1 << 17))), "has 131072 bytes"),
        (with("/added_tokens", json!([{"id": 9}])), "has no `content`"),
    ];
    for (json, why) in refused {
        let error = tokens(&json).expect_err(&json);
        assert!(error.contains(why) && error.contains("there/tokenizer.json"), "{error}\n{why}\n{json}");
    }
}

#[test]
fn given_files_are_refused_by_name() {
    for (name, why) in [
        ("bpe-big.json", "the id of `a` is 4294967295"),
        ("bpe-prefix-panic.json", "does not start with"),
        ("precompiled.json", "has no trie size"),
        ("template.json", "refers to `[NOPE]`"),
    ] {
        let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/hostile").join(name);
        let error = Tokenizer::open(&path, Family::Llama).map(drop).unwrap_err().to_string();
        assert!(error.contains(why) && error.contains(name), "{error}");
    }
}

/// More is stripped than a token has, where the crate `tokenizers` panics.
#[test]
fn decoders_strip_at_most_the_whole_token() {
    let strip = json!({"type": "Strip", "content": "h", "start": 0, "stop": 9});
    let tokenizer = Tokenizer::parse("there/tokenizer.json", &with("/decoder", strip)).unwrap();
    assert_eq!(tokenizer.decode(&[1]).unwrap(), "");
    assert_eq!(tokenizer.encode("the").unwrap(), [2, 3]);
}

#[test]
fn texts_do_not_explode() {
    let more = json!({"type": "Replace", "pattern": {"String": "a"}, "content": "a".repeat(200)});
    let sequence = json!({"type": "Sequence", "normalizers": vec![more; 12]});
    let tokenizer = Tokenizer::parse("tokenizer.json", &with("/normalizer", sequence)).unwrap();
    let error = tokenizer.encode(&"a".repeat(1000)).unwrap_err().to_string();
    assert!(error.contains("the normalized text has more than"), "{error}");
}

#[test]
fn failing_regular_expressions_are_named() {
    let split =
        json!({"type": "Split", "pattern": {"Regex": "(?:a(?=a)|aa?)+b"}, "behavior": "Isolated", "invert": false});
    let tokenizer = Tokenizer::parse("tokenizer.json", &with("/pre_tokenizer", split)).unwrap();
    let error = tokenizer.encode(&"a".repeat(5000)).unwrap_err().to_string();
    assert!(error.contains("failed"), "{error}");
}

/// A model of SentencePiece with some rules.
fn sentence_piece(rules: &[u8]) -> Vec<u8> {
    let field = |number: u8, bytes: &[u8]| [&[number << 3 | 2, bytes.len() as u8][..], bytes].concat();
    let piece = |text: &str, kind: u8| {
        field(1, &[&field(1, text.as_bytes())[..], &[2 << 3 | 5], &(-1f32).to_le_bytes(), &[3 << 3, kind]].concat())
    };
    let letters: Vec<u8> = "▁abcdefgh".chars().flat_map(|letter| piece(&letter.to_string(), 1)).collect();
    let ends = [piece("<unk>", 2), piece("<s>", 3), piece("</s>", 3)].concat();
    [ends, letters, field(2, &[3 << 3, 1]), field(3, &field(2, rules))].concat()
}

#[test]
fn rules_of_sentencepiece_are_checked() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokenizer.model");
    let outside = [&4u32.to_le_bytes()[..], b"\xff\xff\xff\x7f\0"].concat();
    let cases: [(&[u8], &str); 6] = [
        (&[1, 2, 3], "has no trie size"),
        (&[255; 4], "its trie has 4294967295 bytes"),
        (b"\0\0\0\x80\0\0\0\0\0\0\0\0\0\0\0\0", "its trie has 2147483648 bytes"),
        (&[0; 4], "an empty trie"),
        (&outside, "refers to node"),
        (&[7; 64], "its trie has 117901063 bytes"),
    ];
    for (rules, why) in cases {
        fs::write(&path, sentence_piece(rules)).unwrap();
        let error = Tokenizer::open(&path, Family::Llama).map(drop).unwrap_err().to_string();
        assert!(error.contains(why) && error.contains("tokenizer.model"), "{rules:?}: {error}");
    }
    // Empty rules are no rules.
    fs::write(&path, sentence_piece(&[])).unwrap();
    assert_eq!(Tokenizer::open(&path, Family::Llama).unwrap().encode("a").unwrap().len(), 3);
}

#[test]
fn long_pieces_and_words_end() {
    let long = "a".repeat(200_000);
    let unigram = json!({"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], [long, -1.0], ["a", -2.0]]});
    let words = json!({
        "type": "WordPiece", "unk_token": "t", "continuing_subword_prefix": "", "max_input_chars_per_word": u64::MAX,
        "vocab": {"t": 0, "a": 1},
    });
    let start = Instant::now();
    for model in [unigram, words] {
        // Its trie is as deep as the piece is long, and must not be walked recursively.
        let tokenizer = Tokenizer::parse("tokenizer.json", &with("/model", model)).unwrap();
        assert_eq!(tokenizer.encode(&"a".repeat(1000)).unwrap().len(), 1000);
    }
    // Spaces that an added token strips are scanned once.
    let token = json!([{"id": 9, "content": " ", "single_word": true, "lstrip": true, "rstrip": true, "normalized": false, "special": true}]);
    let tokenizer = Tokenizer::parse("tokenizer.json", &with("/added_tokens", token)).unwrap();
    tokenizer.encode(&" ".repeat(1 << 18)).unwrap();
    assert!(start.elapsed() < Duration::from_secs(120), "{:?}", start.elapsed());
}

/// Time that a text takes grows with it, for every model: four times the text at most six times the time, where a square
/// would take sixteen. `cargo bench` shows the ratio of one megabyte and two.
#[test]
fn time_grows_with_the_text() {
    const BYTES: usize = 8 << 10;
    for (name, tokenizer) in models::all() {
        for (kind, text) in models::texts(4 * BYTES) {
            let seconds = |bytes: usize| {
                let text = &text[..text.floor_char_boundary(bytes)];
                let once = |_| {
                    let start = models::computed();
                    tokenizer.encode(text).unwrap();
                    models::computed() - start
                };
                (0..3).map(once).fold(f64::INFINITY, f64::min)
            };
            // Another program may come between.
            let ratio = || seconds(4 * BYTES) / seconds(BYTES);
            assert!((0..4).any(|_| ratio() < 6.0), "{name}: {kind}");
        }
    }
}

/// Files with a few bytes changed, drawn from a seed, are a tokenizer or an error.
#[test]
fn damaged_files_are_answered() {
    let folder = tempfile::tempdir().unwrap();
    let tests = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests");
    let piece = |name: &str| (fs::read(tests.join("sentencepiece").join(name)).unwrap(), "model");
    let hostile = ["bpe-prefix-panic.json", "precompiled.json", "template.json"];
    let json = hostile.map(|name| (fs::read(tests.join("hostile").join(name)).unwrap(), "json"));
    let whole = with("/normalizer", json!({"type": "Replace", "pattern": {"Regex": " +|a"}, "content": "x"}));
    let vocabulary = "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n##b\nthe".as_bytes().to_vec();
    let mut files = vec![piece("bpe.model"), piece("unigram.model"), (whole.into_bytes(), "json"), (vocabulary, "txt")];
    files.extend(json);
    let mut state = std::env::var("XT_MUTATION_SEED").map_or(7u64, |seed| seed.parse().unwrap());
    let seconds = std::env::var("XT_MUTATION_SECONDS").map_or(2, |seconds| seconds.parse().unwrap());
    let mut below = |limit: usize| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as usize % limit
    };
    let start = Instant::now();
    let mut read = 0;
    while start.elapsed() < Duration::from_secs(seconds) {
        let (bytes, kind) = &files[below(files.len())];
        let mut damaged = bytes.clone();
        for _ in 0..1 + below(3) {
            let at = below(damaged.len());
            match below(5) {
                0 => damaged[at] ^= 1 << below(8),
                1 => damaged[at] = b"\"{}[]0189-,:\xff\0"[below(14)],
                2 => damaged.truncate(at.max(1)),
                3 => drop(damaged.drain(at..(at + 1 + below(8)).min(damaged.len()))),
                _ => {
                    let from = below(damaged.len());
                    let part = damaged[from..(from + 1 + below(32)).min(damaged.len())].to_vec();
                    damaged.splice(at..at, part);
                }
            }
            if damaged.is_empty() {
                damaged.push(0);
            }
        }
        let path = folder.path().join("tokenizer").with_extension(kind);
        fs::write(&path, &damaged).unwrap();
        match Tokenizer::open(&path, Family::Llama) {
            Ok(tokenizer) => {
                read += 1;
                for text in TEXTS {
                    if let Ok(tokens) = tokenizer.encode(text) {
                        let _ = tokenizer.decode(&tokens);
                    }
                }
            }
            Err(why) => assert!(why.to_string().contains("tokenizer."), "{why}"),
        }
    }
    assert!(read > 0);
}
