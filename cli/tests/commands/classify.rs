//! `xt train --task classify` and `regress` on a pretrained encoder, and `xt classify`.

use std::{fs, path::Path};

use crate::{
    command::{fails, path, refuses, succeeds},
    pretrained::{folder, llama, pieces},
};

const QUICK: [&str; 14] = [
    "--seq-len",
    "12",
    "--batch-size",
    "4",
    "--warmup",
    "0",
    "--device",
    "cpu",
    "--lr",
    "0.01",
    "--steps",
    "100",
    "--every",
    "50",
];

/// Texts whose first word says what they are.
fn write_texts(path: &str, label: impl Fn(bool) -> serde_json::Value) {
    let record = |index: usize| {
        let good = index % 3 != 1;
        let word = if good { "cat" } else { "word9" };
        serde_json::json!({"text": format!("the {word} word{}", 10 + index % 20), "label": label(good)})
    };
    fs::write(path, (0..40).map(|index| format!("{}\n", record(index))).collect::<String>()).expect("a file");
}

fn rows(run: &str, of: &str) -> Vec<f64> {
    let table = fs::read_to_string(Path::new(run).join("metrics.csv")).expect("metrics.csv");
    let rows = table.lines().filter(|row| row.split(',').nth(1) == Some(of));
    rows.map(|row| row.split(',').nth(2).and_then(|value| value.parse().ok()).expect("a value")).collect()
}

#[test]
fn texts_are_classified() {
    let temporary = tempfile::tempdir().expect("a temporary folder");
    let at = |name: &str| path(temporary.path(), name);
    let encoder = folder("bert", |_| (), ("vocab.txt", &pieces()));
    let encoder = encoder.path().to_string_lossy();
    let (data, whole, cut) = (at("texts.jsonl"), at("whole"), at("cut"));
    write_texts(&data, |good| if good { "good" } else { "bad" }.into());
    let train = ["train", "--task", "classify", "--from", &encoder, "--jsonl", &data];
    let output = succeeds(&[&train[..], &["--out", &whole], &QUICK].concat());
    for part in
        ["36 texts to train on, 4 to validate, classes bad, good", "accuracy 1.0000", "f1 1.0000", "xt classify"]
    {
        assert!(output.contains(part.trim_start_matches("xt ")), "{part:?} in\n{output}");
    }
    assert_eq!(rows(&whole, "accuracy").last(), Some(&1.0));
    assert!(rows(&whole, "validation").last() < rows(&whole, "validation").first());
    let config = fs::read_to_string(Path::new(&whole).join("checkpoint/config.json")).expect("a config");
    assert!(config.contains("\"bad\"") && config.contains("\"Classifier\""), "{config}");
    // A run that stops and goes on ends with the same bytes; its table has no row twice.
    let half = [&QUICK[..10], &["--steps", "100", "--every", "5"]].concat();
    let mut running =
        crate::command::start(&[&train[..], &["--out", &cut], &half].concat()).spawn().expect("xt starts");
    while !Path::new(&cut).join("checkpoint/training.json").is_file() && running.try_wait().expect("a state").is_none()
    {
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    running.kill().expect("kill");
    running.wait().expect("wait");
    succeeds(&["train", "--resume", &cut, "--jsonl", &data, "--device", "cpu", "--every", "50"]);
    for name in ["model.safetensors", "optimizer.safetensors"] {
        let [one, other] =
            [&whole, &cut].map(|run| fs::read(Path::new(run).join("checkpoint").join(name)).expect(name));
        assert!(one == other, "{name}");
    }
    assert_eq!(rows(&cut, "accuracy").len(), rows(&cut, "validation").len());
    // The tokenizer and the labels are in the checkpoint.
    let classify = ["classify", "--checkpoint", &whole, "--device", "cpu", "--text", "the cat word11"];
    let said = succeeds(&[&classify[..], &["--text", "the word9 word11"]].concat());
    let lines: Vec<&str> = said.lines().collect();
    assert!(lines.len() == 2 && lines[0].starts_with("good  0.") && lines[1].starts_with("bad  0."), "{said}");
    let all = succeeds(&[&classify[..], &["--all"]].concat());
    let sum: f64 = all.lines().map(|line| line.split("  ").nth(1).unwrap().parse::<f64>().unwrap()).sum();
    assert!(all.lines().count() == 2 && (sum - 1.0).abs() < 1e-3, "{all}");
    assert!(fails(&["generate", "--checkpoint", &whole, "--prompt", "a"]).contains("checkpoint"));
    assert!(fails(&["classify", "--checkpoint", &llama(), "--text", "a"]).contains("--task classify"));
    // Dry runs say texts.
    assert!(succeeds(&[&train[..], &["--dry-run", "--out", &at("none")], &QUICK].concat()).contains("texts/s"));

    // Numbers.
    let (data, values) = (at("values.jsonl"), at("values"));
    write_texts(&data, |good| if good { 1.5 } else { -0.5 }.into());
    let train = ["train", "--task", "regress", "--from", &encoder, "--jsonl", &data, "--out", &values];
    let output = succeeds(&[&train[..], &QUICK].concat());
    assert!(output.contains("spearman") && output.contains("mean square error"), "{output}");
    let said =
        succeeds(&["classify", "--checkpoint", &values, "--text", "the cat word11", "--text", "the word9 word11"]);
    let numbers: Vec<f64> = said.lines().map(|line| line.split("  ").next().unwrap().parse().unwrap()).collect();
    assert!(numbers[0] > numbers[1], "{said}");
}

#[test]
fn labels_that_are_refused() {
    let temporary = tempfile::tempdir().expect("a temporary folder");
    let at = |name: &str| path(temporary.path(), name);
    let encoder = folder("bert", |_| (), ("vocab.txt", &pieces()));
    let encoder = encoder.path().to_string_lossy();
    let (data, out) = (at("texts.jsonl"), at("out"));
    let train = |task: &str, second: &str, more: &[&str]| {
        fs::write(&data, format!("{{\"text\": \"a\", \"label\": 0}}\n{second}\n")).expect("a file");
        let command = ["train", "--task", task, "--from", &encoder, "--jsonl", &data, "--out", &out, "--seq-len", "12"];
        let message = fails(&[&command[..], more].concat());
        assert!(!Path::new(&out).join("checkpoint/config.json").exists(), "nothing was begun");
        message
    };
    for (second, labels, expected) in [
        (
            r#"{"text": "a", "label": 5}"#,
            &["--labels", "x", "y"][..],
            "line 2: label 5 is out of range, expected 0 to 1",
        ),
        (r#"{"text": "a", "label": "z"}"#, &["--labels", "x", "y"], "line 2: label `z` is unknown, expected x, y"),
        (r#"{"text": "a", "label": "z"}"#, &[], "line 1: the label is an index, others are names"),
        (r#"{"text": "a", "label": 0}"#, &[], "found the class 0 alone, expected at least 2"),
        (r#"{"text": "a", "label": -1}"#, &[], "line 2: field `label` is -1, expected a name or the index of a class"),
        (r#"{"text": "a"}"#, &[], "line 2: field `label` is missing; the record has text"),
        (r#"{"text": "", "label": 1}"#, &[], "line 2: field `text` is empty"),
    ] {
        let message = train("classify", second, labels);
        assert!(message.contains("texts.jsonl") || message.contains("alone"), "{message}");
        assert!(message.contains(expected), "{second}: {message}");
    }
    let message = train("regress", r#"{"text": "a", "label": "x"}"#, &[]);
    assert!(message.contains("line 2: field `label` is a string, expected a number"), "{message}");
    write_texts(&data, |good| if good { "good" } else { "bad" }.into());
    let message = fails(&["train", "--task", "classify", "--from", &llama(), "--jsonl", &data, "--out", &out]);
    assert!(message.contains("generates text; use an encoder"), "{message}");
    assert!(fails(&["train", "--task", "classify", "--out", &out]).contains("require `--from`"));
    refuses(&["train", "--task", "sort"]);
}

/// BERT's encoder, made smaller, from random weights; the same tokens are read when it classifies.
#[test]
fn an_encoder_with_random_weights() {
    let temporary = tempfile::tempdir().expect("a temporary folder");
    let at = |name: &str| path(temporary.path(), name);
    let vocabulary = at("vocab.txt");
    fs::write(&vocabulary, pieces()).expect("a file");
    fs::write(at("tokenizer_config.json"), r#"{"tokenizer_class": "BertTokenizer"}"#).expect("a file");
    let (data, out) = (at("texts.jsonl"), at("out"));
    write_texts(&data, |good| if good { "good" } else { "bad" }.into());
    let small = ["--preset", "bert-base", "--set", "dim=32", "--set", "depth=1", "--set", "heads=2"];
    let train = ["train", "--task", "classify", "--jsonl", &data, "--out", &out];
    let train = [&train[..], &small, &QUICK].concat();
    let output = succeeds(&[&train[..], &["--tokenizer", &vocabulary]].concat());
    assert!(output.contains("accuracy 1.0000"), "{output}");
    let said = succeeds(&["classify", "--checkpoint", &out, "--device", "cpu", "--text", "the cat word11"]);
    assert!(said.starts_with("good  "), "{said}");
    assert!(succeeds(&["info", "--checkpoint", &out]).contains("classes of texts"));
    assert!(fails(&train).contains("requires `--tokenizer`"));
    let message = fails(&["train", "--preset", "bert-base", "--out", &at("lm")]);
    assert!(message.contains("requires `--task classify`"), "{message}");
    let message =
        fails(&["train", "--task", "classify", "--preset", "modern", "--tokenizer", &vocabulary, "--jsonl", &data]);
    assert!(message.contains("requires a `--preset` for encoders"), "{message}");
}
