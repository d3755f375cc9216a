//! Runs the real binary.

// Each test file uses a part of it.
#![allow(dead_code)]

use std::{
    fs,
    path::Path,
    process::{Command, Output, Stdio},
};

/// Runs `xt` with these arguments and reads its output through pipes.
pub fn xt(arguments: &[&str]) -> Output {
    start(arguments).output().expect("xt starts")
}

pub fn start(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_xt"));
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Returns the standard output of a run that must succeed.
#[track_caller]
pub fn succeeds(arguments: &[&str]) -> String {
    let output = xt(arguments);
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(output.status.code(), Some(0), "xt {arguments:?}\n{out}\n{err}");
    assert_eq!(err, "", "xt {arguments:?}");
    out
}

/// Returns the message of a run that must fail: one line on standard error, exit code 1.
#[track_caller]
pub fn fails(arguments: &[&str]) -> String {
    failed(arguments, xt(arguments))
}

#[track_caller]
pub fn failed(arguments: &[&str], output: Output) -> String {
    let err = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "xt {arguments:?}\n{err}");
    assert!(err.starts_with("xt: ") && err.ends_with('\n') && err.lines().count() == 1, "xt {arguments:?}\n{err}");
    err
}

/// Returns the message of a run with wrong usage: exit code 2.
#[track_caller]
pub fn refuses(arguments: &[&str]) -> String {
    let output = xt(arguments);
    let err = text(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "xt {arguments:?}\n{err}");
    err
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("output is UTF-8")
}

/// Arguments of a model that trains in a moment.
pub const TINY: [&str; 12] =
    ["--dim", "16", "--depth", "1", "--heads", "2", "--seq-len", "8", "--batch-size", "2", "--warmup", "2"];

/// A folder as an argument.
pub fn path(folder: &Path, name: &str) -> String {
    folder.join(name).to_str().expect("a temporary path is UTF-8").to_string()
}

/// Writes a text of some kilobytes with words in it.
pub fn write_text(path: &str) {
    let words = ["the", "cat", "sat", "on", "a", "mat", "and", "looked", "at", "Zoë's", "hat"];
    let text: String = (0..2000usize).map(|i| format!("{} ", words[(i * i + i / 7) % words.len()])).collect();
    fs::write(path, text).expect("a temporary file can be written");
}
