//! Options of `xt generate` besides plain text.

use std::fs;

use crate::command::{TINY, fails, path, refuses, succeeds, write_text};

#[test]
fn text_from_a_model_in_every_way() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (corpus, out) = (path(folder.path(), "text.txt"), path(folder.path(), "out"));
    write_text(&corpus);
    succeeds(&[&["train", "--text", &corpus, "--out", &out, "--steps", "3", "--every", "3"][..], &TINY].concat());
    let generate = |more: &[&str]| {
        let all = [&["generate", "--checkpoint", &out, "--length", "40", "--device", "cpu"][..], more].concat();
        succeeds(&all)
    };
    let cat = ["--prompt", "the cat"];
    let greedy = generate(&[&cat[..], &["--temperature", "0"]].concat());
    assert!(greedy.starts_with("the cat"), "{greedy:?}");
    // A cache, a draft, one beam and a batch do not change it.
    for same in [
        &["--temperature", "0", "--no-cache"][..],
        &["--temperature", "0", "--prefill", "2"],
        &["--temperature", "0", "--draft", &out, "--ahead", "3"],
        &["--beams", "1"],
    ] {
        assert_eq!(generate(&[&cat[..], same].concat()), greedy, "{same:?}");
    }
    let both = generate(&["--prompt", "the cat", "--prompt", "a dog and", "--temperature", "0"]);
    assert!(both.starts_with(&greedy) && both[greedy.len()..].starts_with("a dog and"), "{both:?}");
    let plain = generate(&cat);
    for other in [
        &["--top-k", "3"][..],
        &["--top-p", "0.5"],
        &["--min-p", "0.3"],
        &["--top-a", "0.5"],
        &["--entmax"],
        &["--repetition-penalty", "3"],
        &["--seed", "9"],
        &["--beams", "3", "--length-penalty", "0.5"],
        &["--weights", "bf16"],
        &["--weights", "q8_0", "--temperature", "5"],
    ] {
        let text = generate(&[&cat[..], other].concat());
        assert!(text.starts_with("the cat") && text == generate(&[&cat[..], other].concat()), "{other:?}");
    }
    // Every space ends a text.
    let ended = generate(&["--prompt", "the", "--eos", "32", "--temperature", "3"]);
    assert!(!ended.trim_end_matches('\n').contains(' '), "{ended:?} of {plain:?}");
    // That of the prompt does not.
    assert!(generate(&["--prompt", "the cat", "--eos", "32", "--temperature", "3"]).len() > "the cat\n".len());
    // A prompt longer than the window is continued from its end.
    assert!(generate(&["--prompt", &"the cat ".repeat(5), "--temperature", "0"]).len() > 60);
    assert!(refuses(&["generate", "--checkpoint", &out, "--prompt", ""]).contains("--prompt"));
    let score = |weights: &str| {
        let line =
            succeeds(&["generate", "--checkpoint", &out, "--device", "cpu", "--score", &corpus, "--weights", weights]);
        line.split(' ').next().and_then(|bits| bits.parse::<f64>().ok()).expect("a number of bits")
    };
    let (exact, small) = (score("f32"), score("q8_0"));
    assert!(exact > 0.0 && exact < 9.0 && (exact - small).abs() < 0.1, "{exact} {small}");
    let short = path(folder.path(), "short.txt");
    fs::write(&short, "s").expect("a file");
    assert!(fails(&["generate", "--checkpoint", &out, "--score", &short]).contains("short.txt"));
    // Every byte but the first is predicted once, those of the last window too.
    fs::write(&short, b"short\xff and more").expect("a file");
    assert!(succeeds(&["generate", "--checkpoint", &out, "--score", &short]).ends_with("per byte of 14 bytes\n"));
    assert!(fails(&["generate", "--checkpoint", &out, "--score", "none.txt"]).contains("none.txt"));
    assert!(fails(&["generate", "--checkpoint", &out, "--draft", "none"]).contains("none"));
    assert!(refuses(&["generate", "--checkpoint", &out, "--repetition-penalty", "0"]).contains("--repetition-penalty"));
}

/// A run with averaged weights generates with them: it scores a text as its validation does, not with its last weights.
#[test]
fn averaged_weights_are_used() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (text, out) = (path(folder.path(), "text.txt"), path(folder.path(), "out"));
    write_text(&text);
    let options = ["--steps", "30", "--lr", "0.02", "--ema", "0.9"];
    succeeds(&[&["train", "--text", &text, "--out", &out, "--device", "cpu"][..], &options, &TINY].concat());
    let score = || succeeds(&["generate", "--checkpoint", &out, "--score", &text, "--device", "cpu"]);
    let averaged = score();
    let training = folder.path().join("out/checkpoint/training.json");
    let json = fs::read_to_string(&training).expect("a file");
    assert!(json.contains("\"ema_decay\": 0.9"), "{json}");
    fs::write(&training, json.replace("\"ema_decay\": 0.9", "\"ema_decay\": null")).expect("a file");
    assert_ne!(score(), averaged);
    // Weights and config are enough for a model; a damaged file is an error.
    fs::write(&training, "{").expect("a file");
    assert!(fails(&["generate", "--checkpoint", &out]).contains("training.json"));
    fs::remove_file(&training).expect("a file");
    assert_ne!(score(), averaged);
}

/// Loss due to q8_0 weights on a trained model, in bits per byte. The README has figures of a larger model.
#[test]
fn eight_bits_cost_little() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (corpus, out) = (path(folder.path(), "text.txt"), path(folder.path(), "out"));
    write_text(&corpus);
    let sizes =
        ["--dim", "64", "--depth", "2", "--heads", "2", "--seq-len", "64", "--batch-size", "8", "--warmup", "10"];
    let steps = ["--steps", "120", "--every", "120", "--lr", "3e-3", "--device", "cpu"];
    succeeds(&[&["train", "--text", &corpus, "--out", &out][..], &sizes, &steps].concat());
    let score = |weights: &str| {
        let all = ["generate", "--checkpoint", &out, "--device", "cpu", "--score", &corpus, "--weights", weights];
        let line = succeeds(&all);
        line.split(' ').next().and_then(|bits| bits.parse::<f64>().ok()).expect("a number of bits")
    };
    let (exact, half, small) = (score("f32"), score("bf16"), score("q8_0"));
    println!("bits per byte: f32 {exact}, bf16 {half}, q8_0 {small}");
    assert!(exact < 2.5, "{exact}: nothing was learned");
    assert!((half - exact).abs() < 0.02 && (small - exact).abs() < 0.01, "{exact} {half} {small}");
}

#[test]
fn ways_that_exclude_each_other() {
    let with = |more: &[&str]| refuses(&[&["generate", "--checkpoint", "out"][..], more].concat());
    assert!(with(&["--top-k", "3", "--top-p", "0.5"]).contains("--top-p"));
    assert!(with(&["--beams", "3", "--top-k", "2"]).contains("--top-k"));
    assert!(with(&["--beams", "3", "--draft", "small"]).contains("--draft"));
    assert!(with(&["--ahead", "3"]).contains("--draft"));
    assert!(with(&["--length-penalty", "3"]).contains("--beams"));
    assert!(with(&["--weights", "int3"]).contains("q8_0"));
}
