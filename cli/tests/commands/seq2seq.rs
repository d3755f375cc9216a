//! `xt train --task seq2seq` on pairs of texts, and what generates with its runs.

use std::{fs, path::Path};

use crate::{
    command::{fails, path, refuses, succeeds},
    images::killed_and_resumed,
};

const WORDS: [&str; 6] = ["one", "two", "three", "four", "five", "six"];

fn json(index: usize) -> String {
    let at = index % WORDS.len();
    format!("{}\n", serde_json::json!({"source": WORDS[at], "target": format!("={}", at + 1)}))
}

const QUICK: [&str; 18] = [
    "--dim",
    "32",
    "--depth",
    "1",
    "--heads",
    "2",
    "--batch-size",
    "8",
    "--warmup",
    "0",
    "--device",
    "cpu",
    "--lr",
    "0.01",
    "--seq-len",
    "16",
    "--steps",
    "120",
];

#[test]
fn pairs_are_learned() {
    let temporary = tempfile::tempdir().expect("a temporary folder");
    let at = |name: &str| path(temporary.path(), name);
    let (data, whole, cut) = (at("pairs.jsonl"), at("whole"), at("cut"));
    fs::write(&data, (0..62).map(json).collect::<String>()).expect("a file");
    let train = [&["train", "--task", "seq2seq", "--pairs", &data][..], &QUICK].concat();
    let output = succeeds(&[&train[..], &["--out", &whole, "--every", "60"]].concat());
    for part in ["56 pairs to train on, 6 to validate", "exact_match 1.0000", "perplexity 1.0"] {
        assert!(output.contains(part), "{part:?} in\n{output}");
    }
    killed_and_resumed(&train, &whole, &cut, &["--pairs", &data]);
    let generate = ["generate", "--checkpoint", &whole, "--device", "cpu", "--prompt", "three"];
    assert_eq!(succeeds(&[&generate[..], &["--prompt", "six"]].concat()), "=3\n=6\n");
    assert_eq!(succeeds(&[&generate[..], &["--no-cache", "--length", "1"]].concat()), "=\n");
    assert_eq!(succeeds(&[&generate[..], &["--stop", "3"]].concat()), "=\n");
    assert!(succeeds(&["info", "--checkpoint", &whole]).contains("encoder"));
    assert!(succeeds(&[&train[..], &["--dry-run", "--out", &at("none")]].concat()).contains("tokens/s"));
    for (more, expected) in [
        (&["--chat"][..], "`--chat` cannot be used"),
        (&["--beams", "2"], "`--beams` cannot be used"),
        (&["--weights", "bf16"], "`--weights` cannot be used"),
        (&["--tokenizer", "a"], "`--tokenizer` cannot be used"),
        (&["--prompt", "seventeen letters"], "the prompt has 17 tokens, expected 1 to 16"),
    ] {
        let output = crate::command::xt(&[&generate[..], more].concat());
        let message = crate::command::text(&output.stderr);
        assert!(output.status.code() == Some(1) && message.contains(expected), "{more:?}: {message}");
    }
    assert!(fails(&["generate", "--checkpoint", &whole]).contains("give its input with `--prompt`"));
    // Other pairs, no pairs, pairs for another task.
    let other = at("other.jsonl");
    fs::write(&other, (1..63).map(json).collect::<String>()).expect("a file");
    let resume = ["train", "--resume", &whole, "--steps", "121"];
    assert!(fails(&[&resume[..], &["--pairs", &other]].concat()).contains("use the same data"));
    assert!(fails(&resume).contains("requires `--pairs`"));
    assert!(fails(&["train", "--pairs", &data, "--out", &at("lm")]).contains("`--pairs` requires `--task seq2seq`"));

    // A vocabulary of its own, columns of a table, and a model of version 2.
    let (text, bpe, table, own) = (at("text.txt"), at("bpe"), at("pairs.tsv"), at("own"));
    fs::write(&text, "one two three four five six =1 =2 =3 =4 =5 =6\n".repeat(40)).expect("a file");
    succeeds(&["tokenize", "--text", &text, "--train-bpe", "280", "--output", &bpe]);
    fs::write(&table, (0..60).map(|index| format!("{}\t={}\r\n", WORDS[index % 6], index % 6 + 1)).collect::<String>())
        .expect("a file");
    let train = ["train", "--task", "seq2seq", "--pairs", &table, "--tokenizer", &bpe, "--out", &own, "--every", "120"];
    let output = succeeds(&[&train[..], &QUICK].concat());
    assert!(output.contains("exact_match 1.0000"), "{output}");
    assert_eq!(succeeds(&["generate", "--checkpoint", &own, "--prompt", "five", "--device", "cpu"]), "=5\n");
    let config = at("two.json");
    let json = r#"{"version": "2", "model": "XTransformer", "dim": 16, "tie_token_emb": true, "enc_num_tokens": 256, "enc_depth": 1,
        "enc_heads": 2, "enc_max_seq_len": 12, "dec_num_tokens": 256, "dec_depth": 1, "dec_heads": 2, "dec_max_seq_len": 12}"#;
    fs::write(&config, json).expect("a file");
    let two = at("two");
    succeeds(&["train", "--task", "seq2seq", "--pairs", &table, "--config", &config, "--out", &two, "--steps", "2"]);
    succeeds(&["generate", "--checkpoint", &two, "--prompt", "five", "--device", "cpu"]);
}

#[test]
fn pairs_that_are_refused() {
    let temporary = tempfile::tempdir().expect("a temporary folder");
    let at = |name: &str| path(temporary.path(), name);
    let out = at("out");
    let train = |name: &str, content: &str, more: &[&str]| {
        fs::write(at(name), content).expect("a file");
        let message = fails(&[&["train", "--task", "seq2seq", "--pairs", &at(name), "--out", &out][..], more].concat());
        assert!(!Path::new(&out).join("checkpoint/config.json").exists(), "nothing was begun");
        message
    };
    let good = json(0);
    for (name, second, expected) in [
        ("a.jsonl", r#"{"source": "a"}"#, "a.jsonl: line 2: field `target` is missing; the record has source"),
        ("a.jsonl", r#"{"source": "", "target": "b"}"#, "line 2: field `source` is empty"),
        ("a.jsonl", r#"{"source": "a", "target": 1}"#, "line 2: field `target` is a number, expected a string"),
        ("a.jsonl", r#"["a", "b"]"#, "line 2: is not a JSON object"),
        ("a.jsonl", r#"{"source": "a\u0000", "target": "b"}"#, "line 2: has the byte 0"),
    ] {
        let message = train(name, &format!("{good}{second}\n"), &[]);
        assert!(message.contains(expected), "{second}: {message}");
    }
    for (second, expected) in [
        ("a", "b.tsv: line 2: has 1 columns, expected 2"),
        ("a\tb\tc", "line 2: has 3 columns"),
        ("a\t", "line 2: has an empty column"),
    ] {
        let message = train("b.tsv", &format!("x\ty\n{second}\n"), &[]);
        assert!(message.contains(expected), "{second}: {message}");
    }
    assert!(train("c.jsonl", &good, &[]).contains("found 1 pairs, expected at least 2"));
    let two = good.repeat(2);
    assert!(
        train("d.jsonl", &two, &["--set", "enc_num_tokens=50", "--set", "tie_token_emb=false"])
            .contains("the data has a vocabulary of 256 tokens, but the model has 50")
    );
    assert!(
        train("d.jsonl", &two, &["--preset", "modern"]).contains("`--preset` cannot be used with `--task seq2seq`")
    );
    refuses(&["train", "--task", "seq2seq", "--pairs", &at("d.jsonl"), "--separator", "|"]);
    assert!(train("d.jsonl", &two, &["--document-mask"]).contains("document_mask"));
    let config = at("lm.json");
    fs::write(&config, r#"{"model": "TransformerWrapper", "num_tokens": 256, "max_seq_len": 8, "attn_layers": {"kind": "Decoder", "dim": 8, "depth": 1}}"#)
        .expect("a file");
    assert!(train("d.jsonl", &two, &["--config", &config]).contains("lm.json: expected an XTransformer"));
}
