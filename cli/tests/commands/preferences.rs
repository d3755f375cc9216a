//! `xt train --task dpo` on pretrained models and runs, in full and by adapters.
#![cfg(feature = "tokenizers")]

use std::{fs, path::Path};

use serde_json::{Value, json};

use crate::{
    command::{fails, path, refuses, succeeds, text, write_text, xt},
    embedding::{killed_and_resumed, same_bytes},
    pretrained::llama,
};

const QUICK: [&str; 14] = [
    "--seq-len",
    "48",
    "--batch-size",
    "4",
    "--warmup",
    "0",
    "--device",
    "cpu",
    "--steps",
    "12",
    "--every",
    "3",
    "--lr",
    "0.005",
];

const WORDS: [&str; 6] = ["sphinx", "black", "quartz", "judge", "my", "vow"];

fn write(path: &str, record: impl Fn(&str, &str, &str) -> Value) {
    let line = |index: usize| {
        let [prompt, chosen, rejected] = [index, index * index + 1, index + 3].map(|at| WORDS[at % WORDS.len()]);
        format!("{}\n", record(prompt, &format!("{chosen} yes"), &format!("{rejected} no")))
    };
    fs::write(path, (0..24).map(line).collect::<String>()).expect("a file");
}

fn rows(run: &str, of: &str) -> Vec<f64> {
    let table = fs::read_to_string(Path::new(run).join("metrics.csv")).expect("metrics.csv");
    let rows = table.lines().filter(|row| row.split(',').nth(1) == Some(of));
    rows.map(|row| row.split(',').nth(2).and_then(|value| value.parse().ok()).expect("a value")).collect()
}

#[test]
fn preferences_are_learned() {
    let temporary = tempfile::tempdir().expect("a temporary folder");
    let at = |name: &str| path(temporary.path(), name);
    let base = llama();
    let (texts, chats, implied) = (at("texts.jsonl"), at("chats.jsonl"), at("implied.jsonl"));
    let turn = |role: &str, content: &str| json!({"role": role, "content": content});
    write(
        &texts,
        |prompt, chosen, rejected| json!({"prompt": format!("{prompt} "), "chosen": chosen, "rejected": rejected}),
    );
    write(
        &chats,
        |prompt, chosen, rejected| json!({"prompt": [turn("user", prompt)], "chosen": [turn("assistant", chosen)], "rejected": [turn("assistant", rejected)]}),
    );
    write(&implied, |prompt, chosen, rejected| {
        let whole = |answer: &str| json!([turn("user", prompt), turn("assistant", answer)]);
        json!({"chosen": whole(chosen), "rejected": whole(rejected)})
    });
    let lora = ["--lora-rank", "4", "--lora-dropout", "0.1"];
    for (name, data, more) in [("full", &texts, &[][..]), ("adapter", &chats, &lora), ("implied", &implied, &lora)] {
        let [whole, cut] = ["whole", "cut"].map(|run| at(&format!("{name}-{run}")));
        let train = [&["train", "--task", "dpo", "--from", &base, "--dpo-beta", "0.2"], &QUICK[..], more].concat();
        let source = ["--jsonl", data.as_str()];
        let output = succeeds(&[&train[..], &source, &["--out", &whole]].concat());
        for part in ["22 preferences to train on, 2 to validate", "rewards/accuracies", "rewards/margins", "nats/pair"]
        {
            assert!(output.contains(part), "{part:?} in\n{output}");
        }
        let losses = rows(&whole, "validation");
        // Before the first step both models are the same.
        assert!((losses[0] - 2f64.ln()).abs() < 1e-5 && losses.last() < losses.first(), "{losses:?}");
        assert!(
            rows(&whole, "rewards/margins")[0].abs() < 1e-5 && *rows(&whole, "rewards/margins").last().unwrap() > 0.0
        );
        killed_and_resumed(&train, &source, &cut);
        same_bytes(&whole, &cut);
        let info = succeeds(&["info", "--checkpoint", &whole]);
        assert!(info.contains("--task dpo") && info.contains("0.2"), "{info}");
        // Commands for models accept the run.
        let answer = xt(&[
            "generate",
            "--checkpoint",
            &whole,
            "--prompt",
            "sphinx",
            "--length",
            "6",
            "--temperature",
            "0",
            "--device",
            "cpu",
            "--chat",
        ]);
        assert!(answer.status.success() && !text(&answer.stdout).trim().is_empty(), "{}", text(&answer.stderr));
        let exported = at(&format!("{name}-exported"));
        succeeds(&["export", "--checkpoint", &whole, "--output", &exported]);
        assert!(Path::new(&exported).join("model.safetensors").is_file());
    }
    // Chats are the same, however they are written.
    same_weights(&at("adapter-whole"), &at("implied-whole"));
    let dry = succeeds(
        &[
            &["train", "--task", "dpo", "--from", &base, "--jsonl", &texts, "--dry-run", "--out", &at("dry")],
            &QUICK[..],
        ]
        .concat(),
    );
    assert!(dry.contains("pairs/s") && !Path::new(&at("dry")).exists(), "{dry}");
    // A run learns preferences; it is the reference, and may not be an adapter. What learned them goes on with texts.
    let next = at("next");
    succeeds(
        &[
            &["train", "--task", "dpo", "--from", &at("full-whole"), "--jsonl", &texts, "--out", &next],
            &QUICK[..8],
            &["--steps", "1"],
        ]
        .concat(),
    );
    let message =
        fails(&["train", "--task", "dpo", "--from", &at("adapter-whole"), "--jsonl", &texts, "--out", &at("none")]);
    assert!(message.contains("which cannot be the reference"), "{message}");
    let same = at("full-whole");
    let message = fails(&["train", "--task", "dpo", "--from", &same, "--jsonl", &texts, "--out", &same, "--overwrite"]);
    assert!(message.contains("`--out` must not be the run of `--from`"), "{message}");
    let corpus = at("text.txt");
    write_text(&corpus);
    for run in ["full-whole", "adapter-whole"] {
        let from = at(run);
        succeeds(&[
            "train",
            "--from",
            &from,
            "--text",
            &corpus,
            "--out",
            &at("lm"),
            "--overwrite",
            "--seq-len",
            "16",
            "--steps",
            "1",
        ]);
    }
    // Bytes.
    let bytes = at("bytes");
    succeeds(&[&["train", "--text", &corpus, "--out", &bytes, "--steps", "1"][..], &crate::command::TINY].concat());
    let tuned = at("bytes-tuned");
    succeeds(&[
        "train",
        "--task",
        "dpo",
        "--from",
        &bytes,
        "--jsonl",
        &texts,
        "--out",
        &tuned,
        "--seq-len",
        "8",
        "--steps",
        "1",
        "--overwrite",
    ]);
    succeeds(&["generate", "--checkpoint", &tuned, "--prompt", "a", "--length", "2", "--device", "cpu"]);
}

fn same_weights(one: &str, other: &str) {
    let [one, other] =
        [one, other].map(|run| fs::read(Path::new(run).join("checkpoint/model.safetensors")).expect("weights"));
    assert!(one == other);
}

#[test]
fn preferences_that_are_refused() {
    let temporary = tempfile::tempdir().expect("a temporary folder");
    let at = |name: &str| path(temporary.path(), name);
    let (data, out, base) = (at("pairs.jsonl"), at("out"), llama());
    let first = r#"{"prompt": "a", "chosen": "b", "rejected": "c"}"#;
    let train = |second: &str, more: &[&str]| {
        fs::write(&data, format!("{first}\n{second}\n")).expect("a file");
        let command = ["train", "--task", "dpo", "--from", &base, "--jsonl", &data, "--out", &out, "--seq-len", "48"];
        let message = fails(&[&command[..], more].concat());
        assert!(!Path::new(&out).join("checkpoint/config.json").exists(), "nothing was begun");
        message
    };
    for (second, expected) in [
        (
            r#"{"prompt": "a", "chosen": "b"}"#,
            "pairs.jsonl: line 2: field `rejected` is missing; the record has chosen, prompt",
        ),
        (r#"{"chosen": "b", "rejected": "c"}"#, "line 2: field `prompt` is missing"),
        (r#"{"prompt": "a", "chosen": "", "rejected": "c"}"#, "line 2: field `chosen` is empty"),
        (
            r#"{"prompt": "a", "chosen": "b", "rejected": 3}"#,
            "line 2: field `chosen` is a string, expected a list of messages",
        ),
        (r#"{"prompt": "a", "chosen": [], "rejected": []}"#, "line 2: field `chosen` is empty"),
        (
            r#"{"prompt": "a", "chosen": [{"role": "assistant", "content": "b"}], "rejected": [{"role": "assistant"}]}"#,
            "line 2: `rejected`: message 1: `content` is missing",
        ),
        (
            r#"{"chosen": [{"role": "user", "content": "b"}], "rejected": [{"role": "user", "content": "c"}]}"#,
            "line 2: field `prompt` is missing, and `chosen` and `rejected` do not begin with the same messages",
        ),
        (
            r#"{"prompt": [3], "chosen": [3], "rejected": [3]}"#,
            "line 2: `chosen`: message 1 is a number, expected an object",
        ),
        ("{", "line 2: is not JSON"),
    ] {
        let message = train(second, &[]);
        assert!(message.contains(expected), "{second}: {message}");
    }
    assert!(train("", &[]).contains("found 1 records, expected at least 2"));
    assert!(train(first, &["--dpo-beta", "0"]).contains("dpo_beta"));
    assert!(train(first, &["--mask-prob", "0.2"]).contains("requires `--task mlm`"));
    assert!(fails(&["train", "--task", "dpo", "--out", &out]).contains("requires `--from`"));
    assert!(fails(&["train", "--task", "dpo", "--from", &base, "--out", &out]).contains("--jsonl"));
    refuses(&["train", "--dpo-beta", "0.1"]);
}
