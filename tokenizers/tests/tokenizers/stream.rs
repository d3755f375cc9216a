//! Text of tokens decoded one at a time, compared with decoding all of them at once.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use x_transformers::{Philox, io::Metadata, pretrained::Pretrained};
use x_transformers_tokenizers::Tokenizer;

fn file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

fn special(id: usize, content: &str) -> Value {
    added(id, content, true)
}

fn added(id: usize, content: &str, special: bool) -> Value {
    json!({
        "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
        "special": special,
    })
}

/// A tokenizer of these pieces with this decoder; the last two are added tokens, the first one of them special.
fn tokenizer(pieces: &[String], decoder: &Value) -> String {
    let n = pieces.len() - 2;
    let vocabulary: serde_json::Map<String, Value> =
        pieces[..n].iter().enumerate().map(|(id, piece)| (piece.clone(), json!(id))).collect();
    json!({
        "version": "1.0", "added_tokens": [special(n, &pieces[n]), added(n + 1, &pieces[n + 1], false)],
        "normalizer": null, "pre_tokenizer": null, "post_processor": null, "decoder": decoder,
        "model": {"type": "WordLevel", "unk_token": pieces[0], "vocab": vocabulary},
    })
    .to_string()
}

fn strings(pieces: &[&str]) -> Vec<String> {
    pieces.iter().map(|piece| piece.to_string()).collect()
}

/// The characters that byte-level tokens are spelled with.
fn byte_letters() -> Vec<String> {
    let (mut more, mut letters) = (0x100, Vec::new());
    for byte in 0..=255u32 {
        let printable = matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
        let code = if printable { byte } else { more };
        more += u32::from(!printable);
        letters.push(char::from_u32(code).expect("a letter").to_string());
    }
    letters
}

/// Pieces and decoders of all kinds: name, pieces, decoder.
fn kinds() -> Vec<(&'static str, Vec<String>, Value)> {
    let space = json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "});
    let (bytes, fuse) = (json!({"type": "ByteFallback"}), json!({"type": "Fuse"}));
    let strip = |start: usize, stop: usize| json!({"type": "Strip", "content": " ", "start": start, "stop": stop});
    let sequence = |decoders: &[&Value]| json!({"type": "Sequence", "decoders": decoders});
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let pieces = [
        strings(&["<unk>", "▁", "▁the", "cat", "▁▁", "é", "a▁", "<0x", "日"]),
        {
            // Bytes of characters of two to four bytes, and some that are of none.
            [0x0a, 0xc3, 0xa9, 0xe6, 0x97, 0xa5, 0xf0, 0x9f, 0x98, 0x80, 0xff, 0x61]
                .map(|byte| format!("<0x{byte:02X}>"))
                .to_vec()
        },
        strings(&["<s>", " — "]),
    ]
    .concat();
    let byte_pieces = [byte_letters(), strings(&["Ġthe", "ĠðŁĺ", "ĢĠ", "æĹ", "¥Ċ", "<|end|>", "x — y"])].concat();
    let words = strings(&["[UNK]", "the", "##s", "##", "do", "not", ".", "n't", "'", "##!", "[CLS]", " "]);
    let suffixed = strings(&["<unk>", "the</w>", "c", "at</w>", "</w>", "a</w>b", "<s>", "—</w>"]);
    let metaspace =
        |scheme: &str| json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": true});
    let regex = json!({"type": "Replace", "pattern": {"Regex": "a+|▁{2}"}, "content": "-"});
    let text = |pattern: &str| json!({"type": "Replace", "pattern": {"String": pattern}, "content": "+"});
    let word_piece = |cleanup: bool| json!({"type": "WordPiece", "prefix": "##", "cleanup": cleanup});
    let ctc = json!({"type": "CTC", "pad_token": "c", "word_delimiter_token": "▁", "cleanup": true});
    vec![
        ("byte-level", byte_pieces.clone(), byte_level.clone()),
        ("Llama", pieces.clone(), sequence(&[&space, &bytes, &fuse, &strip(1, 0)])),
        ("Gemma", pieces.clone(), sequence(&[&space, &bytes, &fuse])),
        ("bytes alone", pieces.clone(), bytes.clone()),
        ("Metaspace", pieces.clone(), metaspace("always")),
        ("Metaspace first", pieces.clone(), sequence(&[&bytes, &metaspace("first")])),
        ("Metaspace never", pieces.clone(), metaspace("never")),
        ("WordPiece", words.clone(), word_piece(false)),
        ("WordPiece cleaned", words.clone(), word_piece(true)),
        ("words", words, Value::Null),
        ("BPE", suffixed, json!({"type": "BPEDecoder", "suffix": "</w>"})),
        ("CTC", pieces.clone(), ctc.clone()),
        ("strip each", pieces.clone(), sequence(&[&space, &strip(1, 0), &fuse])),
        ("regex", pieces.clone(), sequence(&[&regex, &bytes])),
        ("fused", pieces.clone(), sequence(&[&fuse, &text("▁the"), &text("a▁"), &space, &strip(2, 0)])),
        ("fused metaspace", pieces.clone(), sequence(&[&fuse, &metaspace("always")])),
        ("fused metaspace never", pieces.clone(), sequence(&[&fuse, &metaspace("never")])),
        ("fused regex", pieces.clone(), sequence(&[&bytes, &fuse, &regex, &space])),
        ("fused words", pieces.clone(), sequence(&[&space, &fuse, &word_piece(true), &fuse, &word_piece(false)])),
        ("fused CTC", pieces.clone(), sequence(&[&fuse, &ctc, &json!({"type": "BPEDecoder", "suffix": "a"})])),
        ("fused bytes", pieces, sequence(&[&fuse, &bytes, &byte_level])),
        ("byte-level and more", byte_pieces, sequence(&[&byte_level, &text("\n"), &strip(1, 0)])),
    ]
}

fn streamed(tokenizer: &Tokenizer, prompt: &[i64], tokens: &[i64]) -> String {
    let mut stream = tokenizer.stream(prompt);
    let text: String = tokens.iter().map(|&token| stream.push(token).expect("a token")).collect();
    text + &stream.finish().expect("an end")
}

/// Random tokens, special ones and bytes among them, and some that the vocabulary does not have.
fn random_tokens(random: &Philox, at: &mut u64, vocabulary: u64) -> Vec<i64> {
    let mut below = |limit: u64| {
        *at += 1;
        random.below(*at, limit) as i64
    };
    let n = 1 + below(24);
    // Runs of bytes of characters are rare among tokens drawn alike.
    (0..n).map(|_| below(vocabulary + 1)).collect()
}

#[test]
fn streams_are_what_tokenizers_makes_of_all_tokens() {
    let cases = std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(300);
    for (number, (name, pieces, decoder)) in kinds().into_iter().enumerate() {
        let json = tokenizer(&pieces, &decoder);
        let reference: tokenizers::Tokenizer = json.parse().expect("a tokenizer");
        let own = Tokenizer::from_json(&json).expect("a tokenizer");
        let (random, mut at, mut compared) = (Philox::new(7, number as u64), 0, 0);
        for _ in 0..cases {
            let tokens = random_tokens(&random, &mut at, pieces.len() as u64);
            let ids = |tokens: &[i64]| tokens.iter().map(|&token| token as u32).collect::<Vec<u32>>();
            let decode = |tokens: &[i64]| {
                // With no tokens at all, a decoder there panics.
                let shown =
                    tokens.iter().any(|&token| token as usize != pieces.len() - 2 && (token as usize) < pieces.len());
                if shown { reference.decode(&ids(tokens), true).expect("text") } else { String::new() }
            };
            let whole = decode(&tokens);
            assert_eq!(own.decode(&tokens).expect("text"), whole, "{name} of {tokens:?}");
            assert_eq!(streamed(&own, &[], &tokens), whole, "{name} of {tokens:?}");
            let (prompt, new) = tokens.split_at(tokens.len() / 2);
            let shown = decode(prompt);
            // A prompt that ends in the middle of a character is shown with a mark for it.
            if let Some(rest) = whole.strip_prefix(&shown).filter(|_| !shown.contains('\u{fffd}')) {
                assert_eq!(streamed(&own, prompt, new), rest, "{name} of {prompt:?} and {new:?}");
                compared += 1;
            }
        }
        assert!(compared > cases / 20, "{name}: {compared} of {cases}");
    }
}

/// Emitted text never changes, and complete characters do not wait for the end.
#[test]
fn whole_characters_do_not_wait() {
    let (_, pieces, decoder) = kinds().swap_remove(0);
    let own = Tokenizer::from_json(&tokenizer(&pieces, &decoder)).expect("a tokenizer");
    let token = |byte: u8| i64::from(byte);
    let mut stream = own.stream(&"日".as_bytes()[..1].iter().map(|&byte| token(byte)).collect::<Vec<_>>());
    // The prompt's incomplete character is completed first.
    let came: Vec<String> = "日é😀".bytes().skip(1).map(|byte| stream.push(token(byte)).expect("a token")).collect();
    assert_eq!(came, ["", "日", "", "é", "", "", "", "😀"]);
    assert_eq!(stream.push(token(0xe6)).expect("a token"), "");
    assert_eq!(stream.finish().expect("an end"), "\u{fffd}");
}

/// SentencePiece shows each character with its last byte, and a mark for each byte of none.
#[test]
fn runs_of_bytes_match_sentencepiece() {
    let expected: Value = serde_json::from_str(include_str!("../sentencepiece/bytes.json")).expect("JSON");
    let folder = tempfile::tempdir().expect("a folder");
    let model = file("../tests/files/mistral");
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(model.join(name), folder.path().join(name)).expect("a file");
    }
    std::fs::copy(file("tests/sentencepiece/bpe.model"), folder.path().join("tokenizer.model")).expect("a file");
    let own = Tokenizer::of(&Pretrained::open(folder.path()).expect("a model"), None).expect("a tokenizer");
    let cases = expected.as_array().expect("cases");
    for case in cases {
        let tokens: Vec<i64> = case["ids"].as_array().expect("ids").iter().filter_map(Value::as_i64).collect();
        let text = case["decoded"].as_str().expect("text");
        assert_eq!(own.decode(&tokens).expect("text"), text, "{tokens:?}");
        // At every place where a prompt may end: the text is that of the whole, without the prompt's.
        for end in 0..tokens.len() {
            let shown = own.decode(&tokens[..end]).expect("text");
            let streamed = streamed(&own, &tokens[..end], &tokens[end..]);
            // Without the marks for a character that the prompt leaves incomplete.
            let marks = shown.len() - shown.trim_end_matches('\u{fffd}').len();
            let shown_before = (0..=marks.min(9)).step_by(3).map(|less| &shown[..shown.len() - less]);
            assert!(shown_before.into_iter().any(|shown| format!("{shown}{streamed}") == text), "{tokens:?} at {end}");
        }
    }
    assert!(cases.len() > 100);
}

/// `decode` of transformers, with tokens of users and special ones; values of `tests/chat/make.py`.
#[test]
fn streams_are_what_transformers_decodes() {
    let own = Tokenizer::from_json(include_str!("../chat/tokenizer.json")).expect("a tokenizer");
    let expected: Value = serde_json::from_str(include_str!("../chat/expected.json")).expect("JSON");
    let cases = expected["decoded"].as_array().expect("cases");
    for case in cases {
        let tokens: Vec<i64> = case[0].as_array().expect("ids").iter().filter_map(Value::as_i64).collect();
        assert_eq!(streamed(&own, &[], &tokens), case[1].as_str().expect("text"), "{tokens:?}");
    }
    assert!(cases.len() > 70);
}

/// Byte-level tokens of a GGUF file are bytes, in any order.
#[test]
fn tokens_of_gguf_files_are_bytes() {
    let pretrained = Pretrained::open(file("../tests/files/llama.gguf")).expect("a model");
    let own = Tokenizer::of(&pretrained, None).expect("a tokenizer");
    let letters = byte_letters();
    let tokens = pretrained.file().metadata()["tokenizer.ggml.tokens"].as_list().expect("tokens");
    let spelled: Vec<&str> = tokens.iter().filter_map(Metadata::as_str).collect();
    let bytes_of = |token: i64| -> Vec<u8> {
        let Some(spelling) = spelled.get(token as usize).filter(|_| token > 2) else { return Vec::new() };
        let byte = |c: char| letters.iter().position(|letter| letter.starts_with(c)).expect("a byte") as u8;
        spelling.chars().map(byte).collect()
    };
    let (random, mut at) = (Philox::new(9, 0), 0);
    for _ in 0..300 {
        let ids = random_tokens(&random, &mut at, spelled.len() as u64);
        let bytes: Vec<u8> = ids.iter().flat_map(|&id| bytes_of(id)).collect();
        assert_eq!(streamed(&own, &[], &ids), String::from_utf8_lossy(&bytes), "{ids:?}");
    }
}

/// A stream does not keep the tokens that it has shown, so that the cost of a token does not grow with their number.
#[test]
fn long_streams_take_constant_memory() {
    let (_, pieces, decoder) = kinds().swap_remove(1);
    let own = Tokenizer::from_json(&tokenizer(&pieces, &decoder)).expect("a tokenizer");
    let mut stream = own.stream(&[]);
    // All of its state, which cannot be inspected otherwise.
    let (mut length, mut held) = (0, Vec::new());
    for at in 0..64_000 {
        length += stream.push((at % pieces.len()) as i64).expect("a token").len();
        if at % 4_000 < pieces.len() {
            held.push(format!("{stream:?}").len());
        }
    }
    let (first, rest) = held.split_at(pieces.len());
    assert!(length > 64_000 && rest.iter().max() <= first.iter().max(), "{first:?}, later {rest:?}");
}
