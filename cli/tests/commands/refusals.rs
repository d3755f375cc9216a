//! A system that refuses memory, threads or writes, and paths that are not files: exit code 0 or 1, and one line.

#![cfg(unix)]

use std::{
    fs::{self, OpenOptions},
    os::unix::{fs::symlink, process::CommandExt},
    path::Path,
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

use crate::command::{TINY, failed, path, refuses, start, succeeds, text, write_text};

/// Lowers a limit of the shell for one command.
fn limited(limit: &str, arguments: &[&str], variables: &[(&str, &str)]) -> Output {
    let script = format!("ulimit {limit}; exec \"$0\" \"$@\"");
    let mut command = Command::new("sh");
    command.args(["-c", &script, env!("CARGO_BIN_EXE_xt")]).args(arguments).envs(variables.iter().copied());
    command.stdin(Stdio::null()).output().expect("sh starts")
}

/// Runs a command that must end by itself: one that waits for a pipe is killed.
fn ends(arguments: &[&str]) -> Output {
    let mut child = start(arguments).spawn().expect("xt starts");
    let began = Instant::now();
    while child.try_wait().expect("wait").is_none() {
        if began.elapsed() > Duration::from_secs(60) {
            child.kill().expect("kill");
            panic!("xt {arguments:?} waits");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    child.wait_with_output().expect("output")
}

fn pipe(path: &str) {
    assert!(Command::new("mkfifo").arg(path).status().expect("mkfifo starts").success());
}

#[test]
fn paths_that_are_not_regular_files() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = |name: &str| path(folder.path(), name);
    let (fifo, fifo_json, zero_json) = (file("pipe"), file("pipe.json"), file("zero.json"));
    pipe(&fifo);
    pipe(&fifo_json);
    symlink("/dev/zero", &zero_json).expect("link");
    let llama = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/files/llama.gguf");
    let case = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/parity/decoder_gpt");
    let part = |name: &str| format!("{case}/{name}");
    let (config, weights, inputs) = (part("config.json"), part("weights.safetensors"), part("inputs.safetensors"));
    let out = file("out");
    for special in [fifo.as_str(), "/dev/zero"] {
        for arguments in [
            &["info", "--config", special][..],
            &["bench", "--mode", "forward", "--config", special],
            &["train", "--steps", "1", "--out", &out, "--config", special],
            &["run", "--weights", &weights, "--inputs", &inputs, "--outputs", &out, "--config", special],
            &["run", "--config", &config, "--inputs", &inputs, "--outputs", &out, "--weights", special],
            &["run", "--config", &config, "--weights", &weights, "--outputs", &out, "--inputs", special],
            &["generate", "--checkpoint", llama, "--score", special],
        ] {
            let message = failed(arguments, ends(arguments));
            assert!(message.contains(special) && message.contains("is not a regular file"), "{message}");
        }
    }
    if cfg!(feature = "tokenizers") {
        for special in [&fifo_json, &zero_json] {
            let arguments = ["generate", "--checkpoint", llama, "--prompt", "a", "--tokenizer", special];
            let message = failed(&arguments, ends(&arguments));
            assert!(message.contains(special) && message.contains("is not a regular file"), "{message}");
        }
    }
    // The same inside a folder that is an argument.
    let run = folder.path().join("run/checkpoint");
    fs::create_dir_all(&run).expect("create");
    for name in ["config.json", "model.safetensors", "optimizer.safetensors", "training.json"] {
        pipe(run.join(name).to_str().expect("UTF-8"));
    }
    for command in [["generate", "--checkpoint"], ["info", "--checkpoint"], ["train", "--resume"]] {
        let run = file("run");
        let arguments = [command[0], command[1], &run];
        let message = failed(&arguments, ends(&arguments));
        assert!(message.contains("is not a regular file"), "{message}");
    }
    assert!(!fs::exists(&out).expect("exists"));
}

/// A run of a tiny model in a folder, on its own text.
fn train<'a>(folder: &Path, storage: &'a mut Vec<String>, more: &[&'a str]) -> Vec<&'a str> {
    *storage = vec![path(folder, "text.txt"), path(folder, "a b's")];
    write_text(&storage[0]);
    [&["train", "--text", &storage[0], "--out", &storage[1], "--steps", "1"], &TINY[..], more].concat()
}

#[test]
fn allocations_that_fail() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut storage = Vec::new();
    let arguments = train(folder.path(), &mut storage, &["--overwrite"]);
    let mut refused = 0;
    for kibibytes in [60_000, 100_000, 140_000, 200_000, 300_000, 400_000] {
        let output = limited(&format!("-v {kibibytes}"), &arguments, &[]);
        let message = text(&output.stderr);
        match output.status.code() {
            Some(0) => assert_eq!(message, "", "{kibibytes}"),
            // Below the size of the program itself the loader gives up.
            Some(127) if message.contains("shared librar") => {}
            code => {
                assert_eq!((code, message.lines().count()), (Some(1), 1), "{kibibytes}: {message}");
                assert!(message.starts_with("xt: "), "{kibibytes}: {message}");
                refused += 1;
            }
        }
    }
    assert!(refused > 0, "no limit was low enough to test anything");
}

#[test]
fn threads_that_cannot_start() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut storage = Vec::new();
    let arguments = train(folder.path(), &mut storage, &[]);
    // The stacks of 2000 threads exceed the limit.
    let many = [("RAYON_NUM_THREADS", "2000")];
    let message = failed(&arguments, limited("-v 1500000", &arguments, &many));
    // Memory for a stack is looked for first.
    assert!(message.contains("RAYON_NUM_THREADS=1") || message.contains("out of memory"), "{message}");
    let output = limited("-v 1500000", &arguments, &[("RAYON_NUM_THREADS", "1")]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
}

#[test]
#[cfg(target_os = "linux")]
fn standard_error_that_is_full() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut storage = Vec::new();
    succeeds(&train(folder.path(), &mut storage, &[]));
    let full = || OpenOptions::new().write(true).open("/dev/full").expect("open");
    let arguments = ["generate", "--checkpoint", &storage[1], "--prompt", "the", "--length", "3", "--stats"];
    let output = start(&arguments).stderr(full()).output().expect("xt starts");
    assert_eq!(output.status.code(), Some(0));
    assert!(text(&output.stdout).starts_with("the"));
    // An error that cannot be printed still has its exit code.
    let output = start(&["info", "--checkpoint", "/nothing"]).stderr(full()).output().expect("xt starts");
    assert_eq!(output.status.code(), Some(1));
}

/// The last line of a run can be pasted into a shell, whatever the name of the folder and however `xt` was started.
#[test]
fn the_hint_is_a_command() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut storage = Vec::new();
    let arguments = train(folder.path(), &mut storage, &["--overwrite"]);
    let hint = |command: &mut Command| {
        let output = command.output().expect("xt starts");
        let out = text(&output.stdout);
        assert_eq!(output.status.code(), Some(0), "{out}{}", text(&output.stderr));
        out.lines().last().and_then(|line| line.strip_prefix("try ")).expect("a hint").trim().to_string()
    };

    let direct = hint(start(&arguments).env_remove("CARGO_PKG_NAME"));
    let script = direct.replace("--length 400", "--length 4");
    let output = Command::new("sh").args(["-c", &script]).output().expect("sh starts");
    assert_eq!(output.status.code(), Some(0), "{direct}: {}", text(&output.stderr));

    // Started by a shell from PATH, and by cargo.
    let rest = &direct[direct.find(" generate ").expect("a command")..];
    let installed = hint(start(&arguments).env_remove("CARGO_PKG_NAME").arg0("xt"));
    assert_eq!(installed, format!("xt{rest}"));
    let run = if cfg!(debug_assertions) { "cargo run --" } else { "cargo run --release --" };
    assert_eq!(hint(start(&arguments).env("CARGO_PKG_NAME", "x-transformers-cli")), format!("{run}{rest}"));

    let arguments = ["generate", "--checkpoint", &storage[1], "--prompt", ""];
    assert!(refuses(&arguments).contains("got an empty string"));
}

/// Unreadable files below a folder are named and skipped; one that is an argument itself is an error.
#[test]
fn files_of_a_folder_that_cannot_be_read() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let texts = folder.path().join("texts");
    fs::create_dir(&texts).expect("create");
    write_text(&path(&texts, "a.txt"));
    let dangling = path(&texts, "gone.txt");
    symlink("nowhere", &dangling).expect("link");
    symlink("loop.txt", texts.join("loop.txt")).expect("link");
    symlink("nowhere", texts.join(".#a.txt")).expect("link");
    pipe(&path(&texts, "pipe.txt"));
    let (texts, out) = (path(folder.path(), "texts"), path(folder.path(), "out"));
    let train = |source: &str, out: &str| {
        let arguments = [&["train", "--text", source, "--out", out, "--steps", "1"], &TINY[..]].concat();
        ends(&arguments)
    };
    let output = train(&texts, &out);
    let warnings = text(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{warnings}");
    let lines: Vec<&str> = warnings.lines().collect();
    assert!(lines.len() == 2 && lines.iter().all(|line| line.starts_with("xt: warning: skipped ")), "{warnings}");
    assert!(lines[0].contains("gone.txt: No such file") && lines[1].contains("loop.txt: "), "{warnings}");
    let message = failed(&["train"], train(&dangling, &out));
    assert!(message.contains("gone.txt") && message.contains("check the path"), "{message}");
    fs::remove_file(folder.path().join("texts/a.txt")).expect("remove");
    let message = failed(&["train"], train(&texts, &out));
    assert!(message.contains("no readable text") && message.contains("gone.txt"), "{message}");
}
