//! Columns of Parquet files that pyarrow wrote (`tests/files/parquet/make.py`), and what is refused.

use std::{fs, path::Path};

use crate::command::{fails, path, refuses};
#[cfg(feature = "parquet")]
use crate::{
    command::{TINY, start, succeeds},
    embedding::{killed_and_resumed, same_bytes},
};

fn file(name: &str) -> String {
    path(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/files/parquet"), name)
}

#[cfg(feature = "parquet")]
fn tokens(folder: &Path) -> [Vec<u8>; 2] {
    ["train.tokens", "validation.tokens"].map(|name| fs::read(folder.join(name)).expect(name))
}

/// Rows are documents as the lines of JSONL are, whatever the codec and the encoding.
#[cfg(feature = "parquet")]
#[test]
fn rows_are_documents() {
    let temporary = tempfile::tempdir().expect("a temporary folder");
    let at = |name: &str| path(temporary.path(), name);
    let (jsonl, data) = (file("stories.jsonl"), at("data"));
    succeeds(&["tokenize", "--jsonl", &jsonl, "--train-bpe", "280", "--output", &data]);
    let expected = tokens(Path::new(&data));
    for name in ["plain", "snappy", "zstd", "gzip", "delta", "lengths"] {
        let (table, out) = (file(&format!("{name}.parquet")), at(name));
        // A vocabulary that is learned from it is the same too.
        let output = succeeds(&["tokenize", "--parquet", &table, "--train-bpe", "280", "--output", &out]);
        assert!(output.contains("documents   60\n"), "{name}: {output}");
        assert!(tokens(Path::new(&out)) == expected, "{name}");
    }
    // Several files, and one without rows.
    let [first, second, empty] = ["plain", "zstd", "none"].map(|name| file(&format!("{name}.parquet")));
    let (twice, again) = (at("twice"), at("again"));
    let tokenize = ["tokenize", "--tokenizer", &data];
    let tables = ["--parquet", &first, &empty, &second, "--column", "text"];
    succeeds(&[&tokenize[..], &tables, &["--output", &twice]].concat());
    succeeds(&[&tokenize[..], &["--jsonl", &jsonl, &jsonl, "--output", &again]].concat());
    assert!(tokens(Path::new(&twice)) == tokens(Path::new(&again)));
    assert!(fails(&[&tokenize[..], &["--parquet", &empty, "--output", &at("no")]].concat()).contains("no documents"));
}

#[cfg(feature = "parquet")]
#[test]
fn runs_resume() {
    let temporary = tempfile::tempdir().expect("a temporary folder");
    let at = |name: &str| path(temporary.path(), name);
    let (data, whole, cut, records) = (at("data"), at("whole"), at("cut"), at("records"));
    let (table, jsonl) = (file("zstd.parquet"), file("stories.jsonl"));
    succeeds(&["tokenize", "--parquet", &table, "--train-bpe", "280", "--output", &data]);
    let train =
        [&["train", "--tokenizer", &data, "--device", "cpu", "--steps", "40", "--every", "4"][..], &TINY].concat();
    let from = ["--parquet", &*table];
    let output = succeeds(&[&train[..], &from, &["--out", &whole]].concat());
    assert!(output.contains("60 documents") && output.contains("bits/byte"), "{output}");
    // Not with the tokenizer again: the checkpoint has it.
    let mut running = start(&[&train[..], &from, &["--out", &cut]].concat()).spawn().expect("xt starts");
    while !Path::new(&cut).join("checkpoint/training.json").is_file() && running.try_wait().expect("a state").is_none()
    {
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    running.kill().expect("kill");
    running.wait().expect("wait");
    let resume = ["train", "--resume", &cut, "--device", "cpu"];
    // Another text is another run, and nothing is lost.
    let message = fails(&[&resume[..], &["--parquet", &file("plain.parquet"), &table]].concat());
    assert!(message.contains("use the same data"), "{message}");
    succeeds(&[&resume[..], &from].concat());
    same_bytes(&whole, &cut);
    // The same as from JSONL.
    succeeds(&[&train[..], &["--jsonl", &jsonl, "--out", &records]].concat());
    same_bytes(&whole, &records);
    // Masked tokens, which have texts as well.
    let (masked, other) = (at("masked"), at("other"));
    let train =
        [&["train", "--task", "mlm", "--steps", "20", "--every", "2", "--tokenizer", &data], &TINY[..]].concat();
    succeeds(&[&train[..], &from, &["--out", &masked]].concat());
    killed_and_resumed(&train, &from, &other);
    same_bytes(&masked, &other);
}

#[cfg(feature = "parquet")]
#[test]
fn tables_that_are_refused() {
    let temporary = tempfile::tempdir().expect("a temporary folder");
    let at = |name: &str| path(temporary.path(), name);
    let out = at("out");
    let refused = |table: &str, column: &str, expected: &str| {
        let arguments = ["tokenize", "--parquet", table, "--column", column, "--train-bpe", "280", "--output", &out];
        let message = fails(&arguments);
        assert!(message.contains(expected), "{expected:?} in {message}");
        assert!(!Path::new(&out).join("train.tokens").exists(), "nothing was written");
    };
    let [plain, snappy] = ["plain.parquet", "snappy.parquet"].map(file);
    refused(&plain, "story", "plain.parquet: column `story` is missing; the file has meta, text, id");
    refused(&plain, "meta", "plain.parquet: column `meta` is nested, expected strings");
    refused(&plain, "meta.tags", "column `meta` is nested");
    refused(&plain, "id", "plain.parquet: column `id` has the type INT64, expected strings");
    refused(&file("bytes.parquet"), "text", "column `text` has the type bytes, expected strings");
    let row = "null.parquet: row 41, counted from 0: column `text` is null, expected a string";
    refused(&file("null.parquet"), "text", row);
    refused(&file("empty.parquet"), "text", "empty.parquet: row 3, counted from 0: column `text` is empty");
    refused(&file("brotli.parquet"), "text", "column `text` is compressed with BROTLI");
    refused(&file("stories.jsonl"), "text", "stories.jsonl: is not a whole Parquet file");
    refused(&at("missing.parquet"), "text", "missing.parquet: ");
    refused(temporary.path().to_str().expect("UTF-8"), "text", "is a folder; give the Parquet files in it");
    // Damaged: cut short, without its first half, with another byte in a page that has a checksum, with bytes that are not
    // UTF-8 in one that has none.
    let write = |name: &str, bytes: &[u8]| {
        fs::write(at(name), bytes).expect("a file");
        at(name)
    };
    let whole = fs::read(&plain).expect("a file");
    for length in [0, 3, 8, whole.len() / 2, whole.len() - 1] {
        refused(&write("cut.parquet", &whole[..length]), "text", "cut.parquet: is not a whole Parquet file");
    }
    let behind = [b"PAR1", &whole[whole.len() / 2..]].concat();
    refused(
        &write("behind.parquet", &behind),
        "text",
        "behind.parquet: row 0, counted from 0: column `text` cannot be read",
    );
    // Of the places of a name, the first ones may be in the statistics of the file.
    let replaced = |bytes: &[u8], number: usize, with: &[u8]| {
        let mut places = (0..bytes.len()).filter(|&at| bytes[at..].starts_with("Zoë's ".as_bytes()));
        let place = places.nth(number).expect("a name");
        [&bytes[..place], with, &bytes[place + 7..]].concat()
    };
    let changed = replaced(&whole, 50, b"Zoee's ");
    refused(&write("changed.parquet", &changed), "text", "column `text` cannot be read: Page CRC checksum mismatch");
    let latin = replaced(&fs::read(&snappy).expect("a file"), 0, b"Zo\xe9\xe9's ");
    refused(&write("latin.parquet", &latin), "text", "row 0, counted from 0: column `text` is not UTF-8");
    let run = ["train", "--parquet", &plain, "--out", &out];
    assert!(fails(&run).contains("`--parquet` requires `--tokenizer`"));
}

/// Without the feature the option says what to build.
#[cfg(not(feature = "parquet"))]
#[test]
fn the_feature_is_named() {
    let temporary = tempfile::tempdir().expect("a temporary folder");
    let out = path(temporary.path(), "out");
    for command in
        [&["train", "--out", &out, "--parquet"][..], &["tokenize", "--train-bpe", "280", "--output", &out, "--parquet"]]
    {
        let message = fails(&[command, &[&file("plain.parquet"), "--column", "text"]].concat());
        assert!(message.contains("requires `xt` built with the feature `parquet`"), "{message}");
    }
    assert!(!fs::exists(&out).expect("a state"), "nothing was begun");
}

#[test]
fn options_that_conflict() {
    let table = file("plain.parquet");
    for other in [&["--text", "a.txt"][..], &["--tokens", "a.tokens"], &["--jsonl", "a.jsonl"], &["--separator", "|"]] {
        refuses(&[&["train", "--parquet", &table][..], other].concat());
    }
    refuses(&["train", "--column", "text"]);
}
