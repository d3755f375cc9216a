//! `xt train --task embed` on pretrained encoders and runs, and `xt embed` on what they learned.
#![cfg(feature = "tokenizers")]

use std::{fs, path::Path};

use crate::{
    command::{fails, path, refuses, start, succeeds},
    pretrained::{folder, llama, pieces},
};

const QUICK: [&str; 14] = [
    "--seq-len",
    "12",
    "--batch-size",
    "8",
    "--warmup",
    "0",
    "--device",
    "cpu",
    "--lr",
    "0.01",
    "--steps",
    "60",
    "--every",
    "30",
];

/// Pairs of words that belong together, `the cat word10` and `word20`.
pub(crate) fn write_pairs(path: &str, record: impl Fn(String, String, String, usize) -> serde_json::Value) {
    let word = |index: usize| format!("word{}", 8 + index % 16);
    let line = |index: usize| {
        let (anchor, positive) = (format!("the {}", word(index)), format!("cat word{}", 24 + index % 16));
        format!("{}\n", record(anchor, positive, format!("cat word{}", 24 + (index + 5) % 16), index))
    };
    fs::write(path, (0..48).map(line).collect::<String>()).expect("a file");
}

fn rows(run: &str, of: &str) -> Vec<f64> {
    let table = fs::read_to_string(Path::new(run).join("metrics.csv")).expect("metrics.csv");
    let rows = table.lines().filter(|row| row.split(',').nth(1) == Some(of));
    rows.map(|row| row.split(',').nth(2).and_then(|value| value.parse().ok()).expect("a value")).collect()
}

/// A run that is killed after its first checkpoint, and goes on.
pub(crate) fn killed_and_resumed(train: &[&str], data: &[&str], cut: &str) {
    let mut running = start(&[train, data, &["--out", cut]].concat()).spawn().expect("xt starts");
    while !Path::new(cut).join("checkpoint/training.json").is_file() && running.try_wait().expect("a state").is_none() {
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    running.kill().expect("kill");
    running.wait().expect("wait");
    succeeds(&[&["train", "--resume", cut, "--device", "cpu"], data].concat());
}

pub(crate) fn same_bytes(one: &str, other: &str) {
    for name in ["model.safetensors", "optimizer.safetensors", "config.json"] {
        let [one, other] = [one, other].map(|run| fs::read(Path::new(run).join("checkpoint").join(name)).expect(name));
        assert!(one == other, "{name}");
    }
}

#[test]
fn encoders_learn_which_texts_belong_together() {
    let temporary = tempfile::tempdir().expect("a temporary folder");
    let at = |name: &str| path(temporary.path(), name);
    let encoder = folder("bert", |_| (), ("vocab.txt", &pieces()));
    // Modules of sentence-transformers.
    let write = |name: &str, content: &str| {
        let path = encoder.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).expect("a folder");
        fs::write(path, content).expect("a file");
    };
    write("1_Pooling/config.json", r#"{"word_embedding_dimension": 16, "pooling_mode": "cls"}"#);
    write("sentence_bert_config.json", r#"{"max_seq_length": 9, "do_lower_case": true}"#);
    let module =
        |kind: &str, path: &str| format!(r#"{{"type": "sentence_transformers.models.{kind}", "path": "{path}"}}"#);
    let modules = [module("Transformer", ""), module("Pooling", "1_Pooling"), module("Normalize", "2_Normalize")];
    write("modules.json", &format!("[{}]", modules.join(", ")));
    let encoder = encoder.path().to_string_lossy();
    let (data, whole, cut) = (at("pairs.jsonl"), at("whole"), at("cut"));
    write_pairs(
        &data,
        |anchor, positive, negative, _| serde_json::json!({"anchor": anchor, "positive": positive, "negative": negative, "id": 1}),
    );
    let train = ["train", "--task", "embed", "--from", &encoder];
    let train = [&train[..], &QUICK].concat();
    let source = ["--jsonl", &*data];
    let output = succeeds(&[&train[..], &source, &["--out", &whole, "--keep-best", "--tensorboard"]].concat());
    for part in
        ["44 pairs with a negative to train on, 4 to validate", "recall@1", "mrr", "nats/pair", "embed --checkpoint"]
    {
        assert!(output.contains(part), "{part:?} in\n{output}");
    }
    let losses = rows(&whole, "validation");
    assert!(losses.last() < losses.first(), "{losses:?}");
    assert!(rows(&whole, "recall@1").last() >= rows(&whole, "recall@1").first());
    assert!(rows(&whole, "mrr").iter().all(|mrr| (0.0..=1.0).contains(mrr)));
    assert!(Path::new(&whole).join("best/model.safetensors").is_file());
    // A run that stops and goes on ends with the same bytes; `--keep-best` is of the folder, not of the checkpoint.
    let again = at("again");
    succeeds(&[&train[..], &source, &["--out", &again]].concat());
    killed_and_resumed(&train, &source, &cut);
    same_bytes(&again, &cut);
    assert_eq!(rows(&cut, "mrr").len(), rows(&cut, "validation").len());
    // The pooling, the settings and the tokenizer are in the checkpoint.
    let embed = |checkpoint: &str, texts: &[&str]| {
        let texts: Vec<&str> = texts.iter().flat_map(|text| ["--text", text]).collect();
        succeeds(&[&["embed", "--checkpoint", checkpoint, "--device", "cpu"], &texts[..]].concat())
    };
    let vector = |text: &str| -> Vec<f64> {
        embed(&whole, &[text]).split_whitespace().map(|value| value.parse().expect("a number")).collect()
    };
    let own = vector("the word9");
    assert!(own.len() == 16 && (own.iter().map(|value| value * value).sum::<f64>() - 1.0).abs() < 1e-4);
    assert_eq!(vector("THE Word9"), own, "texts are lower-cased");
    let table = embed(&whole, &["the word9", "cat word25", "cat word30"]);
    let cosines: Vec<f64> =
        table.lines().nth(1).unwrap().split_whitespace().skip(1).take(3).map(|value| value.parse().unwrap()).collect();
    assert!(cosines[1] > cosines[2], "{table}");
    // Without a step it embeds as the folder does.
    let none = at("none");
    succeeds(&[&train[..9], &source, &["--out", &none, "--steps", "0", "--device", "cpu"]].concat());
    assert_eq!(embed(&none, &["the cat"]), embed(&encoder, &["the cat"]));
    let info = succeeds(&["info", "--checkpoint", &whole]);
    assert!(info.contains("xt train --task embed") && info.contains("pooling: first token, normalize"), "{info}");
    assert!(succeeds(&[&train[..], &source, &["--dry-run", "--out", &at("dry")]].concat()).contains("pairs/s"));
    // It goes on with other data: pairs with scores.
    let scores = at("scores.jsonl");
    write_pairs(&scores, |one, other, far, index| {
        let other = if index % 3 == 0 { other } else { far };
        serde_json::json!({"sentence1": one, "sentence2": other, "score": if index % 3 == 0 { 0.9 } else { 0.1 }})
    });
    let scored = at("scored");
    let output = succeeds(
        &[&["train", "--task", "embed", "--from", &whole, "--jsonl", &scores, "--out", &scored], &QUICK[..]].concat(),
    );
    assert!(output.contains("pairs with scores") && output.contains("spearman"), "{output}");
    assert!(output.contains("CoSENT loss"), "{output}");
    let losses = rows(&scored, "validation");
    assert!(losses.last() < losses.first(), "{losses:?}");
    assert!(fails(&["generate", "--checkpoint", &whole, "--prompt", "a"]).contains("checkpoint"));
}

#[test]
fn pairs_that_are_refused() {
    let temporary = tempfile::tempdir().expect("a temporary folder");
    let at = |name: &str| path(temporary.path(), name);
    let encoder = folder("bert", |_| (), ("vocab.txt", &pieces()));
    let encoder = encoder.path().to_string_lossy();
    let (data, out) = (at("pairs.jsonl"), at("out"));
    let train = |records: &[&str], more: &[&str]| {
        fs::write(&data, records.join("\n")).expect("a file");
        let command =
            ["train", "--task", "embed", "--from", &encoder, "--jsonl", &data, "--out", &out, "--seq-len", "12"];
        let message = fails(&[&command[..], more].concat());
        assert!(!Path::new(&out).join("checkpoint/config.json").exists(), "nothing was begun");
        message
    };
    let first = r#"{"anchor": "a", "positive": "b"}"#;
    let scored = r#"{"sentence1": "a", "sentence2": "b", "score": 0.5}"#;
    for (records, expected) in [
        (&[first, r#"{"anchor": "a"}"#][..], "pairs.jsonl: line 2: field `positive` is missing; the record has anchor"),
        (&[first, r#"{"anchor": "a", "positive": ""}"#], "line 2: field `positive` is empty"),
        (&[first, r#"{"anchor": 3, "positive": "b"}"#], "line 2: field `anchor` is a number, expected a string"),
        (&[first, r#"{"anchor": "a", "positive": "b", "negative": "c"}"#], "line 2: has the field `negative`"),
        (&[first, r#"{"anchor": "a", "positive": "b", "score": 1}"#], "line 2: has the field `score`"),
        (&[first, "{"], "line 2: is not JSON"),
        (&[r#"{"text": "a"}"#, first], "line 1: expected a field of the names anchor, query, question, sentence1"),
        (
            &[r#"{"query": "a", "text": "b"}"#, first],
            "line 1: expected a field of the names positive, answer, sentence2",
        ),
        (&[r#"{"anchor": "a", "positive": "b", "negative": "c", "label": 1}"#], "line 1: has `label` and `negative`"),
        (&[scored, r#"{"sentence1": "a", "sentence2": "b", "score": "x"}"#], "line 2: field `score` is a string"),
        (&[scored, scored], "all records have the score 0.5"),
        (&[first], "found 1 records, expected at least 2"),
    ] {
        let message = train(records, &[]);
        assert!(message.contains(expected), "{records:?}: {message}");
    }
    assert!(train(&[first, first], &[]).contains("found fewer than 2 pairs to validate on"));
    assert!(train(&[first; 20], &["--batch-size", "1"]).contains("`--batch-size` must be at least 2"));
    assert!(train(&[first; 20], &["--batch-size", "19"]).contains("`--batch-size` (19) must be at most"));
    let message = train(&[first; 20], &["--field", "anchor"]);
    assert!(message.contains("`--field` cannot be used with `--task embed`"), "{message}");
    for task in ["embed", "mlm", "dpo", "regress", "lm", "image", "caption", "seq2seq"] {
        let message = fails(&["train", "--task", task, "--jsonl", &data, "--labels", "a", "b", "--out", &out]);
        assert!(message.contains("`--labels` requires `--task classify`"), "{task}: {message}");
    }
    assert!(train(&[first, first], &["--lora-rank", "4"]).contains("an encoder is trained in full"));
    assert!(train(&[first, first], &["--dpo-beta", "1"]).contains("`--dpo-beta` requires `--task dpo`"));
    let message = fails(&["train", "--task", "embed", "--from", &llama(), "--jsonl", &data, "--out", &out]);
    assert!(message.contains("does not embed sentences"), "{message}");
    assert!(fails(&["train", "--task", "embed", "--out", &out]).contains("requires `--from`"));
    assert!(fails(&["train", "--task", "embed", "--from", &encoder, "--out", &out]).contains("--jsonl"));
    refuses(&["train", "--resume", &out, "--task", "embed"]);
}
