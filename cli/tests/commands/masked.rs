//! `xt train --task mlm`: new encoders and pretrained ones, and what is made of them.

use std::{fs, path::Path};

use crate::command::{fails, path, start, succeeds, write_text};
#[cfg(feature = "tokenizers")]
use crate::{
    command::refuses,
    embedding::write_pairs,
    pretrained::{folder, llama, pieces, words},
};

const TINY: [&str; 18] = [
    "--dim",
    "16",
    "--depth",
    "1",
    "--heads",
    "2",
    "--seq-len",
    "16",
    "--batch-size",
    "4",
    "--warmup",
    "0",
    "--steps",
    "12",
    "--every",
    "3",
    "--device",
    "cpu",
];

fn rows(run: &str, of: &str) -> Vec<f64> {
    let table = fs::read_to_string(Path::new(run).join("metrics.csv")).expect("metrics.csv");
    let rows = table.lines().filter(|row| row.split(',').nth(1) == Some(of));
    rows.map(|row| row.split(',').nth(2).and_then(|value| value.parse().ok()).expect("a value")).collect()
}

fn same_bytes(one: &str, other: &str) {
    for name in ["model.safetensors", "optimizer.safetensors", "config.json"] {
        let [one, other] = [one, other].map(|run| fs::read(Path::new(run).join("checkpoint").join(name)).expect(name));
        assert!(one == other, "{name}");
    }
}

/// A run that is killed after its first checkpoint, and goes on.
fn killed_and_resumed(train: &[&str], data: &[&str], cut: &str) {
    let mut running = start(&[train, data, &["--out", cut]].concat()).spawn().expect("xt starts");
    while !Path::new(cut).join("checkpoint/training.json").is_file() && running.try_wait().expect("a state").is_none() {
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    running.kill().expect("kill");
    running.wait().expect("wait");
    succeeds(&[&["train", "--resume", cut, "--device", "cpu"], data].concat());
}

/// Bytes, of which 256 masks one.
#[test]
fn encoders_learn_masked_bytes() {
    let temporary = tempfile::tempdir().expect("a temporary folder");
    let at = |name: &str| path(temporary.path(), name);
    let (text, whole, cut) = (at("text.txt"), at("whole"), at("cut"));
    write_text(&text);
    let train = [&["train", "--task", "mlm", "--mask-prob", "0.25", "--lr", "0.01"], &TINY[..]].concat();
    let data = ["--text", &*text];
    let output = succeeds(&[&train[..], &data, &["--out", &whole]].concat());
    for part in ["to train on", "perplexity", "accuracy", "nats/masked token"] {
        assert!(output.contains(part), "{part:?} in\n{output}");
    }
    assert!(!output.contains("order-2"), "{output}");
    let (losses, perplexities) = (rows(&whole, "validation"), rows(&whole, "perplexity"));
    assert!(losses.last() < losses.first(), "{losses:?}");
    assert!((losses[0].exp() - perplexities[0]).abs() < 1e-2 * perplexities[0]);
    killed_and_resumed(&train, &data, &cut);
    same_bytes(&whole, &cut);
    let info = succeeds(&["info", "--checkpoint", &whole]);
    assert!(info.contains("--task mlm") && info.contains("25 % of the tokens, by token 256"), "{info}");
    // With a config, and from there.
    let config = at("config.json");
    let options = r#"{"model": "TransformerWrapper", "num_tokens": 300, "max_seq_len": 16, "attn_layers":
        {"kind": "Encoder", "dim": 16, "depth": 1, "heads": 2}}"#;
    fs::write(&config, options).expect("a file");
    let own = at("own");
    let short = ["--steps", "1", "--device", "cpu", "--batch-size", "2"];
    succeeds(
        &[&["train", "--task", "mlm", "--config", &config, "--out", &own, "--set", "ff_glu=true"], &data[..], &short]
            .concat(),
    );
    let next = at("next");
    succeeds(&[&["train", "--task", "mlm", "--from", &own, "--out", &next], &data[..], &short].concat());
    assert!(fs::read_to_string(Path::new(&next).join("checkpoint/config.json")).unwrap().contains("ff_glu"));
    let dry = succeeds(&[&train[..], &data, &["--out", &at("dry"), "--dry-run"]].concat());
    assert!(dry.contains("masked tokens/s"), "{dry}");
    // Invalid options and data.
    let refused = |more: &[&str]| fails(&[&["train", "--task", "mlm", "--out", &at("none")], more].concat());
    fs::write(&config, options.replace("Encoder", "Decoder")).expect("a file");
    assert!(refused(&["--config", &config]).contains("trains a TransformerWrapper with an Encoder"));
    fs::write(&config, options.replace("300", "256")).expect("a file");
    assert!(refused(&["--config", &config]).contains("expected 0 to 255, got 256"));
    assert!(refused(&["--mask-prob", "1.5"]).contains("mask_prob"));
    assert!(refused(&["--from", &at("nothing")]).contains("nothing"));
    assert!(refused(&["--seq-len", "1"]).contains("at least 2"));
    assert!(fails(&["train", "--mask-prob", "0.5", "--out", &at("none")]).contains("requires `--task mlm`"));
    assert!(fails(&["generate", "--checkpoint", &whole, "--prompt", "a"]).contains("checkpoint"));
}

/// A pretrained BERT with its head, a new one with its tokenizer, and embeddings from both.
#[test]
#[cfg(feature = "tokenizers")]
fn pretrained_encoders_learn_masked_tokens() {
    let temporary = tempfile::tempdir().expect("a temporary folder");
    let at = |name: &str| path(temporary.path(), name);
    let encoder = folder("masked", |_| (), ("vocab.txt", &pieces()));
    let vocabulary = path(encoder.path(), "vocab.txt");
    fs::write(encoder.path().join("tokenizer_config.json"), r#"{"tokenizer_class": "BertTokenizer"}"#).expect("a file");
    let encoder = encoder.path().to_string_lossy();
    let (records, whole, cut) = (at("texts.jsonl"), at("whole"), at("cut"));
    let record =
        |index: usize| serde_json::json!({"text": format!("the cats word{} word{}", 8 + index % 9, 20 + index % 9)});
    fs::write(&records, (0..60).map(|index| format!("{}\n", record(index))).collect::<String>()).expect("a file");
    let train = [&["train", "--task", "mlm", "--from", &encoder, "--lr", "0.01"], &TINY[6..]].concat();
    let data = ["--jsonl", &*records];
    let output = succeeds(&[&train[..], &data, &["--out", &whole]].concat());
    assert!(output.contains("60 documents") && output.contains("--task embed --from"), "{output}");
    assert!(rows(&whole, "validation").last() < rows(&whole, "validation").first());
    killed_and_resumed(&train, &data, &cut);
    same_bytes(&whole, &cut);
    // A new encoder with the tokenizer.
    let new = at("new");
    succeeds(&[&["train", "--task", "mlm", "--tokenizer", &vocabulary, "--out", &new], &data[..], &TINY].concat());
    assert!(succeeds(&["info", "--checkpoint", &new]).contains("by token 4"));
    let pairs = at("pairs.jsonl");
    write_pairs(&pairs, |one, other, _, _| serde_json::json!({"query": one, "answer": other}));
    for from in [&whole, &new] {
        let out = at("embedder");
        let output = succeeds(&[
            "train",
            "--task",
            "embed",
            "--from",
            from,
            "--jsonl",
            &pairs,
            "--out",
            &out,
            "--overwrite",
            "--steps",
            "2",
            "--device",
            "cpu",
            "--seq-len",
            "12",
        ]);
        assert!(output.contains("44 pairs to train on"), "{output}");
        let vector = succeeds(&["embed", "--checkpoint", &out, "--text", "the cat", "--device", "cpu"]);
        assert_eq!(vector.split_whitespace().count(), 16);
    }
    let message = fails(&["embed", "--checkpoint", &whole, "--text", "a"]);
    assert!(message.contains("another task than `xt train --task embed`"), "{message}");
    // No head, no encoder, no mask, chats, and vocabularies that do not fit.
    let refused = |more: &[&str]| fails(&[&["train", "--task", "mlm", "--out", &at("none")], &data[..], more].concat());
    let plain = folder("bert", |_| (), ("vocab.txt", &pieces()));
    assert!(refused(&["--from", &plain.path().to_string_lossy()]).contains("has no masked-LM head"));
    assert!(refused(&["--from", &llama()]).contains("mask token"));
    let unmasked = folder("masked", |_| (), ("tokenizer.json", &words()));
    assert!(refused(&["--from", &unmasked.path().to_string_lossy()]).contains("has no mask token, such as [MASK]"));
    assert!(refused(&["--from", &encoder, "--lora-rank", "2"]).contains("an encoder is trained in full"));
    refuses(&["train", "--task", "mlm", "--resume", &whole]);
}
