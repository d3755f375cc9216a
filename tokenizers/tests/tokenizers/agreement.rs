//! The tokens of texts are those of Hugging Face's crate `tokenizers`, for its models, normalizers and pre-tokenizers.

use std::panic::{self, AssertUnwindSafe};

use serde_json::{Map, Value, json};
use x_transformers_tokenizers::Tokenizer;

/// A generator of numbers (Steele et al., SplitMix64).
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ z >> 31) >> 16) as usize % limit
    }

    fn of<'a, T>(&mut self, list: &'a [T]) -> &'a T {
        &list[self.below(list.len())]
    }
}

const PARTS: [&str; 44] = [
    "a",
    "b",
    "c",
    "d",
    "e",
    "ab",
    "cd",
    "the",
    " ",
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    "▁",
    "'s",
    "don't",
    "I'LL",
    "1",
    "42",
    "x",
    ".",
    ",",
    "!?",
    "é",
    "e\u{301}",
    "Ä",
    "ß",
    "ﬁ",
    "語",
    "学",
    "日本",
    "한",
    "ก",
    "\u{200b}",
    "\u{feff}",
    "👨\u{200d}👩\u{200d}👧",
    "🇩🇪",
    "<mask>",
    "<s>",
    "[CLS]",
    "new",
    "New",
    "\u{3000}",
];

fn text(random: &mut Random) -> String {
    let length = random.below(24);
    let mut text: String = (0..length).map(|_| *random.of(&PARTS)).collect();
    // Long words, and long texts now and then.
    match random.below(12) {
        0 => text += &random.of(&["a", "ab", "語", "é ", "abc", " ", "c<s>", "dcba"]).repeat(1 + random.below(1500)),
        1 => text = text.repeat(1 + random.below(300)),
        _ => {}
    }
    text
}

fn added(content: &str, flags: [bool; 5], id: usize) -> Value {
    let [single_word, lstrip, rstrip, normalized, special] = flags;
    json!({
        "id": id, "content": content, "single_word": single_word, "lstrip": lstrip, "rstrip": rstrip,
        "normalized": normalized, "special": special,
    })
}

/// Tokens of the characters, and some of their pairs.
fn bpe(random: &mut Random, bytes: bool, options: Value) -> Value {
    let mut tokens: Vec<String> = if bytes {
        let plain = (b'!'..=b'~').map(char::from);
        plain.chain('\u{a1}'..='\u{ac}').chain('\u{ae}'..='\u{143}').map(String::from).collect()
    } else {
        ["<unk>", "a", "b", "c", "d", "e", "t", "h", "▁", " ", "é", "語", "1", "4", "2", ".", "n", "w"]
            .map(String::from)
            .into()
    };
    let first = tokens.len();
    let common = if bytes {
        ["a", "b", "c", "d", "Ġ", "t", "h", "e", "Ã"]
    } else {
        ["a", "b", "c", "d", "▁", "t", "h", "e", "é"]
    };
    let mut merges = Vec::new();
    for _ in 0..120 {
        let mut pick = |tokens: &[String]| {
            if tokens.len() > first && random.below(2) == 0 {
                tokens[first + random.below(tokens.len() - first)].clone()
            } else {
                random.of(&common).to_string()
            }
        };
        let (left, right) = (pick(&tokens), pick(&tokens));
        let whole = format!("{left}{right}");
        if whole.chars().count() < 12 {
            if !tokens.contains(&whole) {
                tokens.push(whole);
            }
            merges.push(json!([left, right]));
        }
    }
    if options["byte_fallback"] == true {
        tokens.extend((0..=255).map(|byte| format!("<0x{byte:02X}>")));
    }
    let vocabulary: Map<String, Value> = tokens.into_iter().enumerate().map(|(id, token)| (token, json!(id))).collect();
    let mut model = json!({
        "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null,
        "fuse_unk": false, "byte_fallback": false, "ignore_merges": false, "vocab": vocabulary, "merges": merges,
    });
    model.as_object_mut().unwrap().extend(options.as_object().unwrap().clone());
    model
}

fn unigram(random: &mut Random, bytes: bool, unknown: Option<usize>) -> Value {
    let mut pieces = vec![json!(["<unk>", 0.0])];
    let mut known = std::collections::BTreeSet::from(["<unk>".to_string()]);
    let parts = ["a", "b", "c", "d", "▁", "t", "h", "e", "é", "語", "1", "."];
    while pieces.len() < 90 {
        let piece: String = (0..1 + random.below(5)).map(|_| *random.of(&parts)).collect();
        if known.insert(piece.clone()) {
            pieces.push(json!([piece, -(random.below(64) as f64) / 8.0 - 1.0]));
        }
    }
    if bytes {
        pieces.extend((0..=255).map(|byte| json!([format!("<0x{byte:02X}>"), -20.0])));
    }
    json!({"type": "Unigram", "unk_id": unknown, "vocab": pieces, "byte_fallback": bytes})
}

fn words(kind: &str, prefix: &str) -> Value {
    let list = [
        "[UNK]", "[CLS]", "[SEP]", "a", "b", "ab", "the", "##a", "##b", "##c", "##ab", "##the", "c", "d", "e", "##d",
        "##e", "don", "'", "s", "##s", "1", "42", "##2", "new", "語", "##語", "é", ".", "▁a", "▁the",
    ];
    let vocabulary: Map<String, Value> =
        list.iter().enumerate().map(|(id, token)| (token.to_string(), json!(id))).collect();
    json!({
        "type": kind, "unk_token": "[UNK]", "continuing_subword_prefix": prefix, "max_input_chars_per_word": 12,
        "vocab": vocabulary,
    })
}

/// A trie of the rules é → e, ﬁ → fi and the removal of U+200B.
fn rules() -> String {
    include_str!("../rules.txt").trim().to_string()
}

fn replace(pattern: Value, content: &str) -> Value {
    json!({"type": "Replace", "pattern": pattern, "content": content})
}

fn normalizers() -> Vec<Value> {
    let one = |name: &str| json!({"type": name});
    let sequence = |list: Vec<Value>| json!({"type": "Sequence", "normalizers": list});
    let bert = |accents: Value, lower: bool| {
        json!({
            "type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": lower, "strip_accents": accents,
            "lowercase": lower,
        })
    };
    vec![
        Value::Null,
        one("NFC"),
        one("NFD"),
        one("NFKC"),
        one("NFKD"),
        one("Lowercase"),
        one("Nmt"),
        one("ByteLevel"),
        sequence(vec![one("NFD"), one("StripAccents")]),
        bert(Value::Null, true),
        bert(json!(false), true),
        bert(json!(true), false),
        json!({"type": "Strip", "strip_left": true, "strip_right": true}),
        json!({"type": "Strip", "strip_left": false, "strip_right": true}),
        json!({"type": "Prepend", "prepend": "▁"}),
        sequence(vec![json!({"type": "Prepend", "prepend": "▁"}), replace(json!({"String": " "}), "▁")]),
        sequence(vec![replace(json!({"Regex": " {2,}"}), " "), replace(json!({"String": "a"}), "")]),
        replace(json!({"Regex": r"(?<=a)b|\s+(?=c)"}), "xy"),
        json!({"type": "Precompiled", "precompiled_charsmap": rules()}),
        sequence(vec![
            json!({"type": "Precompiled", "precompiled_charsmap": rules()}),
            json!({"type": "Strip", "strip_left": false, "strip_right": true}),
            replace(json!({"Regex": " {2,}"}), "▁"),
        ]),
    ]
}

fn splitters() -> Vec<Value> {
    let one = |name: &str| json!({"type": name});
    let split = |pattern: Value, behavior: &str, invert: bool| json!({"type": "Split", "pattern": pattern, "behavior": behavior, "invert": invert});
    let bytes = |space: bool, words: bool| json!({"type": "ByteLevel", "add_prefix_space": space, "trim_offsets": true, "use_regex": words});
    let metaspace = |scheme: &str, split: bool| json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split});
    let sequence = |list: Vec<Value>| json!({"type": "Sequence", "pretokenizers": list});
    let llama3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
    let mut all = vec![
        Value::Null,
        one("BertPreTokenizer"),
        one("Whitespace"),
        one("WhitespaceSplit"),
        one("UnicodeScripts"),
        json!({"type": "Punctuation", "behavior": "Contiguous"}),
        json!({"type": "Digits", "individual_digits": true}),
        json!({"type": "Digits", "individual_digits": false}),
        json!({"type": "CharDelimiterSplit", "delimiter": "a"}),
        json!({"type": "FixedLength", "length": 3}),
        bytes(true, true),
        bytes(false, true),
        bytes(true, false),
        metaspace("always", true),
        metaspace("first", true),
        metaspace("never", true),
        metaspace("first", false),
        sequence(vec![split(json!({"Regex": llama3}), "Isolated", false), bytes(false, false)]),
        sequence(vec![json!({"type": "Digits", "individual_digits": true}), bytes(false, true)]),
        sequence(vec![one("WhitespaceSplit"), metaspace("first", true)]),
        sequence(vec![one("Punctuation"), metaspace("always", true)]),
        split(json!({"Regex": r"\s+(?=\S)|[.,]"}), "Isolated", false),
        // Possessive quantifiers, which never backtrack.
        split(json!({"Regex": r"\p{L}++|\p{N}?+.|\s+(?!\S)|\s+"}), "Isolated", false),
    ];
    for behavior in ["Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous"] {
        for invert in [false, true] {
            all.push(split(json!({"Regex": r"b+|\s"}), behavior, invert));
            all.push(split(json!({"String": "a"}), behavior, invert));
        }
    }
    all
}

fn template() -> Value {
    let special = |name: &str| json!({"SpecialToken": {"id": name, "type_id": 0}});
    let text = json!({"Sequence": {"id": "A", "type_id": 0}});
    json!({
        "type": "TemplateProcessing", "single": [special("[CLS]"), special("[CLS]"), text, special("[SEP]")],
        "pair": [text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            "[CLS]": {"id": "[CLS]", "ids": [1, 7], "tokens": ["[CLS]", "a"]},
            "[SEP]": {"id": "[SEP]", "ids": [2], "tokens": ["[SEP]"]},
        },
    })
}

fn tokenizer(random: &mut Random, model: &Value, normalizer: &Value, splitter: &Value) -> Value {
    let tokens = ["<mask>", "<s>", "[CLS]", "new", "New", "  ", "b a"];
    let tokens: Vec<Value> = (0..random.below(5))
        .map(|_| {
            let mut flag = || random.below(2) == 0;
            let mut flags = [flag(), flag(), flag(), flag(), flag()];
            let at = random.below(tokens.len());
            // An added token that a normalizer makes empty matches nowhere here, and everywhere there, where it panics
            // inside a character.
            flags[3] &= tokens[at] != "  ";
            (at, flags)
        })
        .collect::<std::collections::BTreeMap<_, _>>()
        .into_iter()
        .map(|(at, flags)| added(tokens[at], flags, 900 + at))
        .collect();
    let around = match random.below(4) {
        0 => template(),
        1 => json!({"type": "BertProcessing", "cls": ["[CLS]", 1], "sep": ["[SEP]", 2]}),
        2 => json!({"type": "Sequence", "processors": [
            {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true}, template()]}),
        _ => Value::Null,
    };
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": tokens, "normalizer": normalizer,
        "pre_tokenizer": splitter, "post_processor": around, "decoder": {"type": "Fuse"}, "model": model,
    })
}

#[test]
fn texts_have_the_tokens_of_hugging_face() {
    let seed = std::env::var("XT_AGREEMENT_SEED").map_or(1, |seed| seed.parse().unwrap());
    let rounds = std::env::var("XT_AGREEMENT_ROUNDS").map_or(300, |rounds| rounds.parse().unwrap());
    let random = &mut Random(seed);
    let mut models = vec![words("WordPiece", "##"), words("WordLevel", ""), words("WordPiece", "")];
    for unknown in [Value::Null, json!("<unk>")] {
        for fallback in [false, true] {
            for fuse in [false, true] {
                let options = json!({"unk_token": unknown, "byte_fallback": fallback, "fuse_unk": fuse});
                models.push(bpe(random, false, options));
            }
        }
    }
    models.push(bpe(random, false, json!({"ignore_merges": true, "unk_token": "<unk>"})));
    models.push(bpe(random, true, json!({})));
    models.push(bpe(random, true, json!({"ignore_merges": true})));
    models.push(bpe(random, false, json!({"end_of_word_suffix": "e", "unk_token": "<unk>"})));
    models.push(unigram(random, false, Some(0)));
    models.push(unigram(random, true, Some(0)));
    models.push(unigram(random, false, Some(5)));
    let (normalizers, splitters) = (normalizers(), splitters());
    let mut tokens = 0;
    for round in 0..rounds {
        // Each of them is there, and by chance with others.
        let splitter = &splitters[round % splitters.len()];
        // The crate `tokenizers` decides by offsets in the text which word is the first one.
        let alone = splitter["pretokenizers"][1]["prepend_scheme"] == "first";
        let normalizer = &normalizers[if alone { 0 } else { round % normalizers.len() }];
        let model = random.of(&models);
        let json = tokenizer(random, model, normalizer, splitter).to_string();
        let theirs: tokenizers::Tokenizer = json.parse().unwrap_or_else(|why| panic!("{why}: {json}"));
        let ours = Tokenizer::parse("tokenizer.json", &json).unwrap_or_else(|why| panic!("{why}: {json}"));
        for _ in 0..12 {
            let text = text(random);
            let got = match ours.encode(&text) {
                Ok(got) => got,
                // If a regular expression gives up, that crate takes the rest of the text as one word.
                Err(why) => {
                    assert!(why.to_string().contains("a regular expression") && text.len() > 1000, "{why}: {text:?}");
                    continue;
                }
            };
            // It panics if the spaces that added tokens strip overlap.
            let expected = panic::catch_unwind(AssertUnwindSafe(|| theirs.encode_fast(text.as_str(), true)));
            let Ok(expected) = expected else { continue };
            let expected: Vec<i64> = expected.unwrap().get_ids().iter().map(|&id| id.into()).collect();
            assert!(got == expected, "round {round}: {text:?}\n{got:?}\n{expected:?}\n{json}");
            tokens += got.len();
        }
    }
    assert!(tokens > 50 * rounds, "{tokens}");
}
