//! `xt tokenize`, and `xt train` on tokens: vocabularies, files, records, and the errors that name them.

use std::{fs, path::Path};

use crate::command::{TINY, fails, path, refuses, succeeds};
use x_transformers::train::TokenFile;

/// Writes a text with enough different pairs for some hundred merges.
fn write_text(path: &str) {
    let words = ["the", "cat", "sat", "on", "a", "mat", "and", "looked", "at", "Zoë's", "hat"];
    let text: String = (0..2000usize).map(|i| format!("{} {i}\n", words[(i * i + i / 7) % words.len()])).collect();
    fs::write(path, text).expect("a temporary file can be written");
}

fn read(path: &str) -> (TokenFile, Vec<i64>) {
    let file = TokenFile::open(path).expect("a token file");
    let mut tokens = vec![0; file.len() as usize];
    file.read(0, &mut tokens, usize::MAX).expect("tokens");
    (file, tokens)
}

fn rows(folder: &Path) -> Vec<String> {
    let table = fs::read_to_string(folder.join("metrics.csv")).expect("metrics.csv");
    table.lines().map(|row| row.rsplit_once(',').expect("six columns").0.to_string()).collect()
}

fn weights(folder: &Path) -> Vec<u8> {
    fs::read(folder.join("checkpoint/model.safetensors")).expect("weights")
}

/// The only folder of a tokenizer in a checkpoint.
fn kept(run: &Path) -> Vec<String> {
    let entries = fs::read_dir(run.join("checkpoint")).expect("a checkpoint");
    let names = entries.map(|entry| entry.expect("an entry").file_name().into_string().expect("UTF-8"));
    names.filter(|name| name.starts_with("tokenizer-")).collect()
}

/// From a text to a vocabulary, token files, a model and its text, without naming the tokenizer again.
#[test]
fn a_vocabulary_of_its_own() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let at = |name: &str| path(folder.path(), name);
    let (corpus, data, out) = (at("text.txt"), at("data"), at("out"));
    write_text(&corpus);
    let learn = ["tokenize", "--text", &corpus, "--train-bpe", "300", "--output", &data];
    let output = succeeds(&learn);
    for part in [
        "documents   1\n",
        "vocabulary  300 tokens",
        "train.tokens",
        "validation.tokens",
        "bytes per token",
        "train --tokens",
    ] {
        assert!(output.contains(part), "{part:?} in\n{output}");
    }
    let [(train, first), (validation, last)] =
        ["train.tokens", "validation.tokens"].map(|name| read(&at(&format!("data/{name}"))));
    assert_eq!((train.num_tokens(), train.end_of_text()), (Some(300), Some(0)));
    // Both parts begin with the end of text, and their texts are the file.
    assert!(first[0] == 0 && last[0] == 0 && !first[1..].contains(&0));
    let length = fs::metadata(&corpus).expect("a text").len();
    assert_eq!(train.text_bytes().expect("bytes") + validation.text_bytes().expect("bytes"), length);
    assert!((7..=12).contains(&(validation.text_bytes().expect("bytes") * 100 / length)));
    // The same again, and only if that is asked for.
    assert!(fails(&learn).contains("already exists; replace it with `--overwrite`"));
    let before = fs::read(at("data/train.tokens")).expect("tokens");
    succeeds(&[&learn[..], &["--overwrite"]].concat());
    assert!(fs::read(at("data/train.tokens")).expect("tokens") == before);

    let options = ["--steps", "6", "--every", "3", "--device", "cpu"];
    let train = [&["train", "--tokens", &data, "--out", &out][..], &options, &TINY].concat();
    let output = succeeds(&train);
    for part in ["tokens to train on", "bits/byte", "each 2 x 8 tokens", "sample", "generate --checkpoint"] {
        assert!(output.contains(part), "{part:?} in\n{output}");
    }
    assert!(!output.contains("order-2"), "{output}");
    let run = folder.path().join("out");
    let config = fs::read_to_string(run.join("checkpoint/config.json")).expect("a config");
    assert!(config.contains("\"num_tokens\": 300"), "{config}");
    assert!(fs::read_to_string(run.join("loss.svg")).expect("a picture").contains("bits per byte"));
    // Bits per byte are those of the tokens: nats, over the bytes of a token.
    let ratio = validation.text_bytes().expect("bytes") as f64 / last.len() as f64;
    for row in &rows(&run)[1..] {
        let columns: Vec<f64> = row.split(',').skip(2).take(2).map(|x| x.parse().expect("a number")).collect();
        assert!((columns[0] / ratio / std::f64::consts::LN_2 - columns[1]).abs() < 1e-5, "{row}");
    }
    // The tokenizer is in the checkpoint: the folder of the data is not needed any more.
    let names = kept(&run);
    assert_eq!(names.len(), 1, "{names:?}");
    fs::rename(&data, at("moved")).expect("a move");
    let generate = ["generate", "--checkpoint", &out, "--device", "cpu", "--length", "12"];
    let text = succeeds(&[&generate[..], &["--prompt", "the cat"]].concat());
    assert!(text.starts_with("the cat") && text.len() > "the cat\n".len(), "{text:?}");
    assert!(!succeeds(&generate).starts_with('\n'), "a document does not begin with a newline");
    let score = ["generate", "--checkpoint", &out, "--device", "cpu", "--score", &corpus];
    let line = succeeds(&score);
    let bits: f64 = line.split(' ').next().and_then(|bits| bits.parse().ok()).expect("a number of bits");
    assert!(bits > 0.0 && bits < 9.0 && line.ends_with(&format!("per byte of {length} bytes\n")), "{line}");
    // Another tokenizer that fits, and one that does not.
    let small = at("small");
    succeeds(&["tokenize", "--text", &corpus, "--train-bpe", "270", "--output", &small]);
    succeeds(&[&generate[..], &["--tokenizer", &small]].concat());
    let large = at("large");
    succeeds(&["tokenize", "--text", &corpus, "--train-bpe", "330", "--output", &large]);
    assert!(fails(&[&generate[..], &["--tokenizer", &large]].concat()).contains("330 tokens, but the model has 300"));

    // Resumed with the files at their new place; other tokens are another run.
    let moved = at("moved");
    let resume = ["train", "--resume", &out, "--steps", "8", "--device", "cpu"];
    assert!(succeeds(&[&resume[..], &["--tokens", &moved]].concat()).contains("6 already done"));
    assert!(fails(&[&resume[..], &["--tokens", &small]].concat()).contains("270"));
    assert!(fails(&[&resume[..], &["--text", &corpus]].concat()).contains("use the same data"));
    // A run of bytes in its place has no tokenizer.
    succeeds(&[&["train", "--text", &corpus, "--out", &out, "--overwrite", "--steps", "1"][..], &TINY].concat());
    assert!(kept(&run).is_empty());
    assert!(succeeds(&[&generate[..], &["--prompt", "x"]].concat()).starts_with('x'));
}

/// Texts and records through a tokenizer train as the token files of `xt tokenize` do.
#[test]
fn texts_and_records_through_a_tokenizer() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let at = |name: &str| path(folder.path(), name);
    let words = ["the", "cat", "sat", "on", "a", "mat", "and", "looked", "at", "Zoë's", "hat"];
    let documents: Vec<String> = (0..60usize)
        .map(|number| {
            (0..40)
                .map(|i| format!("{} ", words[(i * i + number) % words.len()]))
                .collect::<String>()
                .trim()
                .to_string()
        })
        .collect();
    let records: String =
        documents.iter().map(|text| format!("{}\n", serde_json::json!({"id": 7, "story": text}))).collect();
    let (jsonl, joined, data) = (at("stories.jsonl"), at("stories.txt"), at("data"));
    fs::write(&jsonl, records).expect("records");
    fs::write(&joined, documents.join("\n<|endoftext|>\n")).expect("a text");
    let from_records = ["--jsonl", &jsonl, "--field", "story"];
    let from_text = ["--text", &joined, "--separator", "<|endoftext|>"];
    succeeds(&[&["tokenize", "--train-bpe", "290", "--output", &data][..], &from_records].concat());
    let (file, tokens) = read(&at("data/train.tokens"));
    let (_, validation) = read(&at("data/validation.tokens"));
    // Whole documents: each is in one of the two.
    let count = |tokens: &[i64]| tokens.iter().filter(|&&token| token == 0).count();
    assert!(count(&tokens) + count(&validation) == 60 && (4..=8).contains(&count(&validation)));
    assert!(file.text_bytes().is_some());
    // A tokenizer that exists gives the same files.
    let again = at("again");
    succeeds(&[&["tokenize", "--tokenizer", &data, "--output", &again][..], &from_text].concat());
    for name in ["train.tokens", "validation.tokens", "tokenizer.json", "tokenizer_config.json"] {
        assert!(
            fs::read(at(&format!("data/{name}"))).expect(name) == fs::read(at(&format!("again/{name}"))).expect(name),
            "{name}"
        );
    }

    let options = [&["--steps", "4", "--device", "cpu", "--shuffle"][..], &TINY].concat();
    let run = |name: &str, source: &[&str]| {
        let out = at(name);
        succeeds(&[&["train", "--out", &out][..], source, &options].concat());
        weights(&folder.path().join(name))
    };
    let whole = run("a", &["--tokens", &data]);
    let tokenizer = ["--tokenizer", &*data];
    assert!(run("b", &[&from_records[..], &tokenizer].concat()) == whole);
    assert!(run("c", &[&from_text[..], &tokenizer].concat()) == whole);
    // One step, and the rest when resumed; the tokenizer comes from the checkpoint.
    let out = at("d");
    let first = [&options[2..], &["--steps", "1", "--out", &out]].concat();
    succeeds(&[&["train"][..], &from_records, &tokenizer, &first].concat());
    succeeds(&[&["train", "--resume", &out, "--steps", "4", "--device", "cpu"][..], &from_records].concat());
    let output = succeeds(&[
        "train",
        "--resume",
        &out,
        "--steps",
        "4",
        "--device",
        "cpu",
        from_text[0],
        from_text[1],
        from_text[2],
        from_text[3],
    ]);
    assert!(output.contains("4 already done"), "{output}");

    // Attention within documents, which the default model can.
    let masked = [
        "train",
        "--tokens",
        &data,
        "--out",
        &at("e"),
        "--document-mask",
        "--steps",
        "2",
        "--seq-len",
        "64",
        "--batch-size",
        "2",
        "--device",
        "cpu",
    ];
    succeeds(&masked);
    // Absolute positions begin anew with each document.
    succeeds(
        &[&["train", "--tokens", &data, "--out", &at("g"), "--document-mask", "--steps", "2"][..], &TINY].concat(),
    );
    let message = fails(&["train", "--text", &joined, "--out", &at("f"), "--document-mask"]);
    assert!(message.contains("document_mask") && message.contains("bytes"), "{message}");
}

/// Files of nanoGPT, whose vocabulary nobody knows.
#[test]
fn tokens_without_a_tokenizer() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let at = |name: &str| path(folder.path(), name);
    fs::create_dir(at("nano")).expect("a folder");
    let tokens = |count: usize, from: usize| -> Vec<u8> {
        (from..from + count).flat_map(|at| ((at * at / 7 % 120) as u16).to_le_bytes()).collect()
    };
    fs::write(at("nano/train.bin"), tokens(2000, 0)).expect("tokens");
    fs::write(at("nano/val.bin"), tokens(300, 2000)).expect("tokens");
    let (nano, out) = (at("nano"), at("out"));
    let train = [&["train", "--tokens", &nano, "--out", &out, "--steps", "2", "--device", "cpu"][..], &TINY].concat();
    let message = fails(&train);
    assert!(message.contains("--set num_tokens=N"), "{message}");
    let message = fails(&[&train[..], &["--set", "num_tokens=100"]].concat());
    assert!(message.contains(".bin: has token") && message.contains("model's vocabulary has 100"), "{message}");
    let output = succeeds(&[&train[..], &["--set", "num_tokens=128"]].concat());
    assert!(output.contains("2,000 tokens to train on, 300 to validate") && !output.contains("bits"), "{output}");
    assert!(output.contains("nats/token") && !output.contains("sample"), "{output}");
    assert!(fs::read_to_string(at("out/loss.svg")).expect("a picture").contains("nats per token"));
    assert!(fs::read_to_string(at("out/metrics.csv")).expect("rows").contains(",,"));
    let resumed = succeeds(&["train", "--resume", &out, "--tokens", &nano, "--steps", "3", "--device", "cpu"]);
    assert!(resumed.contains("2 already done"), "{resumed}");
    let message = fails(&["generate", "--checkpoint", &out, "--prompt", "x"]);
    assert!(message.contains("had no tokenizer; name one with `--tokenizer`"), "{message}");
    // Nor is it trained on bytes, which its tokens were not.
    let from = [&["train", "--from", &out, "--device", "cpu", "--steps", "1"][..], &TINY[6..]].concat();
    let (text, again) = (at("text.txt"), at("again"));
    fs::write(&text, "to be or not to be ".repeat(60)).expect("a text");
    let message = fails(&[&from[..], &["--text", &text, "--out", &again]].concat());
    assert!(message.contains("had no tokenizer; name one with `--tokenizer`"), "{message}");
    succeeds(&[&from[..], &["--tokens", &nano, "--out", &again]].concat());
    // One file, the end of which validates; and files that are named.
    let one = at("nano/train.bin");
    let [set, size] = ["--set", "num_tokens=128"];
    let output =
        succeeds(&[&["train", "--tokens", &one, "--out", &at("b"), "--steps", "1", set, size][..], &TINY].concat());
    assert!(output.contains("1,800 tokens to train on, 200 to validate"), "{output}");
    let val = at("nano/val.bin");
    let output = succeeds(
        &[&["train", "--tokens", &one, "--validation", &val, "--out", &at("c"), "--steps", "1", set, size][..], &TINY]
            .concat(),
    );
    assert!(output.contains("2,000 tokens to train on, 300 to validate"), "{output}");
}

#[test]
fn bad_input_is_named() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let at = |name: &str| path(folder.path(), name);
    let (corpus, out) = (at("text.txt"), at("out"));
    write_text(&corpus);
    let learn = |more: &[&str]| fails(&[&["tokenize", "--train-bpe", "300", "--output", &out][..], more].concat());
    let write = |name: &str, content: &[u8]| {
        fs::write(at(name), content).expect("a file");
        at(name)
    };
    let records = write("a.jsonl", b"{\"text\": \"a b c\"}\n{\"text\": 3}\n");
    assert!(learn(&["--jsonl", &records]).contains("a.jsonl: line 2: field `text` is a number, expected a string"));
    assert!(
        learn(&["--jsonl", &records, "--field", "body"])
            .contains("line 1: field `body` is missing; the record has text")
    );
    let latin = write("latin.txt", b"caf\xe9");
    assert!(learn(&["--text", &latin]).contains("latin.txt: is not UTF-8 at byte 3"));
    assert!(learn(&["--text", "none"]).contains("none"));
    assert!(fails(&["tokenize", "--text", &corpus, "--train-bpe", "200", "--output", &out]).contains("at least 257"));
    for missing in
        [&["tokenize", "--text", &corpus, "--output", &out][..], &["tokenize", "--train-bpe", "300", "--output", &out]]
    {
        refuses(missing);
    }
    // Nothing was left of them.
    let left: Vec<_> =
        fs::read_dir(&out).expect("a folder").map(|entry| entry.expect("an entry").file_name()).collect();
    assert!(left.is_empty(), "{left:?}");

    succeeds(&["tokenize", "--text", &corpus, "--train-bpe", "300", "--output", &out]);
    let tokens = at("out/train.tokens");
    let bytes = fs::read(&tokens).expect("tokens");
    let train = |tokens: &str, more: &[&str]| {
        fails(&[&["train", "--tokens", tokens, "--out", &at("run")][..], &TINY, more].concat())
    };
    let short = write("short.tokens", &bytes[..bytes.len() - 1]);
    let message = train(&short, &[]);
    assert!(message.contains("short.tokens: is truncated") && message.contains("tokens of 2 bytes"), "{message}");
    let other = at("other");
    succeeds(&["tokenize", "--text", &corpus, "--train-bpe", "280", "--output", &other]);
    let message = train(&tokens, &["--tokenizer", &other]);
    assert!(message.contains("280 tokens, but the token files have 300"), "{message}");
    let config = write(
        "config.json",
        br#"{"model": "TransformerWrapper", "num_tokens": 256, "max_seq_len": 8, "attn_layers": {"kind": "Decoder", "dim": 16, "depth": 1}}"#,
    );
    let message = fails(&["train", "--tokens", &tokens, "--config", &config, "--out", &at("run")]);
    assert!(
        message.contains("train.tokens: has a vocabulary of 300 tokens, but the model has `num_tokens` 256"),
        "{message}"
    );
    assert!(train(&at("text.txt"), &[]).contains("text.txt: is not a file of tokens"));
    assert!(fails(&["train", "--jsonl", &records, "--out", &at("run")]).contains("`--jsonl` requires `--tokenizer`"));
    let message = fails(&["train", "--text", &corpus, "--tokenizer", &at("text.txt"), "--out", &at("run")]);
    assert!(message.contains("text.txt"), "{message}");
    refuses(&["train", "--text", &corpus, "--tokens", &tokens]);
    refuses(&["train", "--validation", &tokens]);
    assert!(!Path::new(&at("run")).join("checkpoint").exists(), "nothing was begun");
}
