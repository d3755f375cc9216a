//! The commands on a GPU, or on the emulated driver (`scripts/emulated`), with the same results as on the CPU.
//!
//! `XT_TEST_DEVICE` names the device; without it the tests are skipped with a message.

#![cfg(feature = "cuda")]

mod command;

use std::{fs, io::Write, path::Path};

use command::{TINY, failed, fails, path, refuses, start, succeeds, write_text};

fn device(test: &str) -> Option<String> {
    let device = std::env::var("XT_TEST_DEVICE").ok().filter(|name| name != "cpu");
    if device.is_none() {
        // Straight to the stream: the harness hides what a passing test prints.
        let _ = writeln!(std::io::stderr(), "skipped: {test}: XT_TEST_DEVICE names no GPU");
    }
    device
}

/// Returns the losses of a run.
fn losses(run: &str) -> Vec<f64> {
    let table = fs::read_to_string(Path::new(run).join("metrics.csv")).expect("metrics.csv");
    table.lines().skip(1).map(|row| row.split(',').nth(2).expect("a loss").parse().expect("a number")).collect()
}

#[test]
fn training_and_text_match_the_cpu() {
    let Some(device) = device("training_and_text_match_the_cpu") else { return };
    let folder = tempfile::tempdir().expect("a temporary folder");
    let corpus = path(folder.path(), "text.txt");
    write_text(&corpus);
    for (dtype, bound) in [("f32", 1e-5), ("bf16", 2e-2), ("f16", 4e-3)] {
        let run = |device: &str| {
            let out = path(folder.path(), &format!("{dtype}-{}", device.replace(':', "")));
            let options = ["--text", &corpus, "--out", &out, "--steps", "4", "--every", "2", "--device", device];
            succeeds(&[&["train", "--dtype", dtype][..], &options, &TINY].concat());
            out
        };
        let (here, there) = (run("cpu"), run(&device));
        let (expected, actual) = (losses(&here), losses(&there));
        assert_eq!(expected.len(), actual.len());
        let close = |(a, e): (&f64, &f64)| (a - e).abs() <= bound * e.abs();
        assert!(actual.iter().zip(&expected).all(close), "{dtype}: {actual:?}, on the CPU {expected:?}");

        // The same checkpoint gives the same text on both.
        let generate = |device: &str| {
            succeeds(&["generate", "--checkpoint", &there, "--length", "20", "--prompt", "the", "--device", device])
        };
        assert_eq!(generate(&device), generate("cpu"), "{dtype}");
    }
}

/// Steps that are replayed as a graph and read one step late have the bits of steps that run op by op, and are all written.
#[test]
fn graphs_change_no_bit() {
    let Some(device) = device("graphs_change_no_bit") else { return };
    let folder = tempfile::tempdir().expect("a temporary folder");
    let corpus = path(folder.path(), "text.txt");
    write_text(&corpus);
    let options = ["--text", &corpus, "--device", &device, "--set", "ff_dropout=0.1", "--accumulate", "2"];
    let run = |name: &str, more: &[&str]| {
        let out = path(folder.path(), name);
        let steps = ["--out", &out, "--steps", "7", "--every", "4"];
        let said = succeeds(&[&["train"][..], &options, &steps, &TINY, more].concat());
        let rows = fs::read_to_string(Path::new(&out).join("metrics.csv")).expect("metrics.csv");
        // Without the speed, and without validation's rows, which have none.
        let rows: Vec<String> =
            rows.lines().map(|row| row.rsplit_once(',').expect("several columns").0.to_string()).collect();
        let file = |name: &str| fs::read(Path::new(&out).join("checkpoint").join(name)).expect(name);
        (said, rows, ["model.safetensors", "optimizer.safetensors"].map(file))
    };
    let (said, rows, files) = run("graphs", &[]);
    assert!(!said.contains("note "), "{said}");
    let (_, eager_rows, eager_files) = run("eager", &["--no-graphs"]);
    assert_eq!(rows, eager_rows);
    assert!(files == eager_files, "the checkpoints differ");
    // An optimizer that no graph has: said once, and not where nobody asked for graphs.
    let (said, ..) = run("lion", &["--optimizer", "lion"]);
    assert_eq!(said.matches("note ").count(), 1, "{said}");
    let (said, ..) = run("eager-lion", &["--optimizer", "lion", "--no-graphs"]);
    assert!(!said.contains("note "), "{said}");
}

#[test]
fn a_checkpoint_continues_with_the_same_bits() {
    let Some(device) = device("a_checkpoint_continues_with_the_same_bits") else { return };
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (corpus, config) = (path(folder.path(), "text.txt"), path(folder.path(), "c.json"));
    write_text(&corpus);
    let json = r#"{"model": "TransformerWrapper", "num_tokens": 256, "max_seq_len": 8, "attn_layers":
        {"kind": "Decoder", "dim": 16, "depth": 1, "heads": 2, "attn_dim_head": 32, "rotary_pos_emb": true,
         "attn_dropout": 0.1, "ff_dropout": 0.1}}"#;
    fs::write(&config, json).expect("write");
    let run = |out: &str, limit: &str| {
        let out = path(folder.path(), out);
        let options = ["--text", &corpus, "--config", &config, "--out", &out, "--device", &device, "--batch-size", "2"];
        succeeds(&[&["train", "--every", "2", "--steps", limit][..], &options].concat());
        out
    };
    let (whole, again) = (run("whole", "6"), run("again", "6"));
    let weights = |run: &str| fs::read(Path::new(run).join("checkpoint/model.safetensors")).expect("read");
    assert!(weights(&whole) == weights(&again), "two runs differ");
}

#[test]
fn a_case_runs_as_on_the_cpu() {
    let Some(device) = device("a_case_runs_as_on_the_cpu") else { return };
    let cases = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/parity");
    let one = path(Path::new(cases), "rel_pos_bias");
    let verified = succeeds(&["verify", &one, &path(Path::new(cases), "alibi_learned"), "--device", &device]);
    assert!(verified.trim_end().ends_with("2 passed, 0 failed"), "{verified}");
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = |name: &str| path(Path::new(&one), name);
    let run = |device: &str| {
        let out = path(folder.path(), &format!("{}.safetensors", device.replace(':', "")));
        let files = [file("config.json"), file("weights.safetensors"), file("inputs.safetensors")];
        let [config, weights, inputs] = &files;
        let arguments = ["--config", config, "--weights", weights, "--inputs", inputs, "--outputs", &out];
        succeeds(&[&["run", "--grad", "--dtype", "f64", "--device", device][..], &arguments].concat());
        x_transformers::io::read_safetensors(&out).expect("outputs")
    };
    let (here, there) = (run("cpu"), run(&device));
    assert_eq!(here.keys().collect::<Vec<_>>(), there.keys().collect::<Vec<_>>());
    for (name, expected) in &here {
        let (expected, actual) = (expected.to_f64_vec().expect("values"), there[name].to_f64_vec().expect("values"));
        let error: f64 = expected.iter().zip(&actual).map(|(e, a)| (e - a).powi(2)).sum::<f64>().sqrt();
        let norm: f64 = expected.iter().map(|e| e * e).sum::<f64>().sqrt().max(1e-6);
        assert!(error <= 1e-11 * norm, "{name}: {:e}", error / norm);
    }
}

/// Before its first step, whatever memory the card has.
#[test]
fn runs_that_cannot_fit() {
    let Some(device) = device("runs_that_cannot_fit") else { return };
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (corpus, out) = (path(folder.path(), "text.txt"), path(folder.path(), "out"));
    write_text(&corpus);
    let train = ["train", "--text", &corpus, "--out", &out, "--device", &device, "--steps", "1", "--seq-len", "16"];
    let expected = format!("of memory are available on {device}");
    let message = fails(&[&train[..], &["--dim", "65536", "--depth", "100", "--heads", "8"]].concat());
    assert!(message.contains("a step needs about") && message.contains(&expected), "{message}");
    assert!(!Path::new(&out).join("checkpoint").exists(), "nothing was begun");
    if std::env::var_os("XT_EMULATOR").is_none() {
        return;
    }
    // A small card. Of 1.6 million weights in f32 with gradients and two moments.
    let small = [&train[..], &["--dim", "256", "--depth", "2", "--heads", "2", "--batch-size", "1"]].concat();
    let output = start(&small).env("XT_EMULATOR_MEMORY", "20000000").output().expect("xt starts");
    let message = failed(&small, output);
    assert!(message.contains("needs about") && message.contains(&expected), "{message}");
}

#[test]
fn devices_are_described() {
    let Some(device) = device("devices_are_described") else { return };
    let described = succeeds(&["devices"]);
    assert!(described.contains(&device) && described.contains("sm_"), "{described}");
    let message = fails(&["info", "--config", "none.json"]);
    assert!(message.contains("none.json"), "{message}");
    let none = fails(&["generate", "--checkpoint", "none", "--device", "cuda:99"]);
    assert!(none.contains("cuda:99 does not exist"), "{none}");
}

#[test]
fn kernels_are_compiled_once() {
    let Some(_) = device("kernels_are_compiled_once") else { return };
    let folder = tempfile::tempdir().expect("a temporary folder");
    let cache = path(folder.path(), "kernels");
    let compile = || succeeds(&["kernels", "softmax", "--arch", "sm_80,90", "--cache", &cache]);
    let first = compile();
    assert!(first.contains("sm_80: 4 compiled, 0 already cached") && first.contains("sm_90: 4 compiled"), "{first}");
    let second = compile();
    assert!(second.contains("sm_80: 0 compiled, 4 already cached"), "{second}");
    // Truncated, changed, and another program's.
    let files: Vec<_> = fs::read_dir(&cache).expect("read").map(|entry| entry.expect("entry").path()).collect();
    let sm_80: Vec<_> = files.iter().filter(|file| file.to_string_lossy().contains("sm_80")).collect();
    let mut bytes = fs::read(sm_80[0]).expect("read");
    fs::write(sm_80[0], &bytes[..bytes.len() / 2]).expect("write");
    bytes = fs::read(sm_80[1]).expect("read");
    *bytes.last_mut().expect("code") ^= 1;
    fs::write(sm_80[1], &bytes).expect("write");
    fs::write(sm_80[2], b"something else").expect("write");
    let third = compile();
    assert!(third.contains("sm_80: 3 compiled, 1 already cached"), "{third}");
    assert!(compile().contains("sm_80: 0 compiled, 4 already cached"));
}

/// Errors that need no GPU.
#[test]
fn kernels_that_cannot_be_compiled() {
    assert!(refuses(&["kernels", "--arch", "sm_60"]).contains("sm_75 or later"));
    assert!(refuses(&["kernels", "--arch", "hopper"]).contains("sm_80"));
    let message = fails(&["kernels", "softmaxx", "--cache", "none"]);
    assert!(message.contains("softmaxx") && message.contains("cross_entropy"), "{message}");
}
