//! Every call that changes or syncs a file fails once: the process dies there, the disk is full or failing, a signal
//! interrupts the call, a write is short. In each case the last complete checkpoint loads, and the resumed run ends
//! with the very same files as one that was never interrupted.
//!
//! Kills are tried at every call. Of the other failures `cargo test` tries some, `XT_EXHAUSTIVE=1` all.
#![cfg(target_os = "linux")]

mod command;
mod faults;

use std::{
    fs,
    os::unix::{
        fs::{PermissionsExt, symlink},
        process::ExitStatusExt,
    },
    path::Path,
    process::{Command, Stdio},
};

use command::{text, write_text};
use faults::{
    Call, EINTR, EIO, ENOSPC, FULL, Files, KILL, SHORT, Scenario, TEAR, difference, exhaustive, files, interposer,
    logged, output, restore, succeeds, xt,
};
use tempfile::TempDir;
use x_transformers::train::Checkpoint;

/// A text, and runs that train on it.
struct Runs {
    folder: TempDir,
    text: String,
}

impl Runs {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let text = command::path(folder.path(), "text.txt");
        write_text(&text);
        Self { folder, text }
    }

    /// Trains a model in a folder, with two saves.
    fn train(&self, out: &str, more: &[&str]) -> Vec<String> {
        let model = ["--dim", "8", "--depth", "1", "--heads", "1", "--seq-len", "8", "--batch-size", "1"];
        let run = ["--warmup", "1", "--steps", "4", "--every", "2", "--device", "cpu", "--ema", "0.5"];
        let files = ["train", "--text", &self.text, "--out", out];
        [&files[..], &model, &run, more].concat().into_iter().map(String::from).collect()
    }

    fn resume(&self, out: &str) -> Vec<String> {
        ["train", "--resume", out, "--text", &self.text, "--device", "cpu"].map(String::from).to_vec()
    }

    /// Resumes the run, or restarts it if it had not saved.
    fn go_on(&self, root: &Path) {
        let out = root.to_str().expect("UTF-8");
        let output = output(&mut xt(&self.resume(out), root));
        if output.status.code() == Some(0) {
            return;
        }
        let message = text(&output.stderr);
        assert!(!Checkpoint::is_in(root.join("checkpoint")), "{message}");
        assert!(message.contains("start it again") || message.contains("checkpoint"), "{message}");
        succeeds(&mut xt(&self.train(out, &[]), root));
    }

    /// The files of an uninterrupted run.
    fn whole(&self, more: &[&str]) -> Files {
        let root = self.folder.path().join("whole");
        let _ = fs::remove_dir_all(&root);
        succeeds(&mut xt(&self.train(root.to_str().expect("UTF-8"), more), &root));
        files(&root)
    }

    /// The files of a run that dies before the `number`th of the calls that `which` names.
    fn killed(&self, which: impl Fn(&Call) -> bool, number: usize) -> Files {
        let (root, log) = (self.folder.path().join("killed"), self.folder.path().join("log"));
        let command = |root: &Path| xt(&self.train(root.to_str().expect("UTF-8"), &[]), root);
        let _ = fs::remove_dir_all(&root);
        succeeds(command(&root).env("FAULT_LOG", &log));
        let calls = logged(&log);
        let at = calls.iter().enumerate().filter(|(_, call)| which(call)).nth(number - 1).expect("such a call").0 + 1;
        let _ = fs::remove_dir_all(&root);
        let output = output(command(&root).env("FAULT_AT", at.to_string()).env("FAULT_KIND", KILL));
        assert_eq!(output.status.signal(), Some(9));
        files(&root)
    }
}

#[test]
fn a_run_from_its_beginning() {
    if interposer().is_none() {
        return;
    }
    let runs = Runs::new();
    let goal = runs.whole(&[]);
    let names: Vec<_> = goal.keys().map(String::as_str).collect();
    let checkpoint = ["config.json", "model.safetensors", "optimizer.safetensors", "training.json"];
    let mut expected: Vec<_> = checkpoint.iter().map(|name| format!("checkpoint/{name}")).collect();
    expected.extend([".lock", "loss.svg", "metrics.csv"].map(String::from));
    expected.sort();
    assert_eq!(names, expected);
    Scenario {
        name: "train",
        before: Files::new(),
        command: &|out| runs.train(out, &[]),
        recover: &|root| runs.go_on(root),
        goal,
        old: None,
        switch: "",
    }
    .try_all();
}

/// The old run is complete until the new one saves, then the new one is: never a mix of files.
#[test]
fn a_run_that_replaces_another() {
    if interposer().is_none() {
        return;
    }
    let runs = Runs::new();
    let old = runs.whole(&[]);
    let other = ["--seed", "9", "--lr", "0.01", "--overwrite"];
    Scenario {
        name: "overwrite",
        before: old.clone(),
        command: &|out| runs.train(out, &other),
        recover: &|root| runs.go_on(root),
        goal: runs.whole(&other[..4]),
        old: Some(old),
        switch: "/checkpoint/.incoming",
    }
    .try_all();
}

/// Resuming is interrupted too: a run killed while its first and while its last checkpoint moved into place, before its
/// plot was drawn, and one killed in the middle of its replacement.
#[test]
fn runs_that_are_resumed() {
    if interposer().is_none() {
        return;
    }
    let runs = Runs::new();
    let goal = runs.whole(&[]);
    let moves = |call: &Call| call.name == "rename" && call.path.ends_with("checkpoint/optimizer.safetensors");
    let drawn = |call: &Call| call.name == "rename" && call.path.ends_with("loss.svg");
    let states = [
        ("first save", runs.killed(moves, 1)),
        ("last save", runs.killed(moves, 2)),
        ("picture", runs.killed(drawn, 2)),
    ];
    for (name, before) in states {
        assert_ne!(difference(&before, &goal), [""; 0], "{name}: nothing was interrupted");
        let command = |out: &str| runs.resume(out);
        let recover = |root: &Path| runs.go_on(root);
        Scenario { name, before, command: &command, recover: &recover, goal: goal.clone(), old: None, switch: "" }
            .try_all();
    }
}

/// Some network and user-space file systems cannot sync folders, others have no locks.
#[test]
fn file_systems_that_know_less() {
    if interposer().is_none() {
        return;
    }
    let runs = Runs::new();
    let (goal, root) = (runs.whole(&["--seed", "9"]), runs.folder.path().join("run"));
    let [ebadf, einval, enolck, enosys, enotsup] = ["9", "22", "37", "38", "95"];
    let folders = [ebadf, einval, enosys, enotsup].map(|errno| ("FAULT_FOLDERS", errno));
    let locks = [enolck, enosys, enotsup].map(|errno| ("FAULT_LOCKS", errno));
    for (fault, errno) in folders.into_iter().chain(locks) {
        restore(&Files::new(), &root);
        for more in [&[][..], &["--seed", "9", "--overwrite"]] {
            succeeds(xt(&runs.train(root.to_str().expect("UTF-8"), more), &root).env(fault, errno));
        }
        assert_eq!(difference(&files(&root), &goal), [""; 0], "{fault} {errno}");
    }
}

/// `xt run` replaces its output, which is a link to a file that only its owner may read.
#[test]
fn outputs_of_a_model() {
    if interposer().is_none() {
        return;
    }
    let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/parity/decoder_gpt");
    let command = |out: &str| {
        let file = |name: &str| format!("{golden}/{name}");
        let (config, weights, inputs) = (file("config.json"), file("weights.safetensors"), file("inputs.safetensors"));
        let (files, outputs) = (["--config", &config, "--weights", &weights, "--inputs", &inputs], format!("{out}/o"));
        [&["run"][..], &files, &["--outputs", &outputs]].concat().into_iter().map(String::from).collect::<Vec<_>>()
    };
    let prepared = |root: &Path| {
        fs::create_dir_all(root).expect("create");
        if !root.join("o").is_symlink() {
            symlink("target", root.join("o")).expect("a link");
        }
    };
    let folder = tempfile::tempdir().expect("a temporary folder");
    let before = Files::from([("target".to_string(), b"precious".to_vec())]);
    let started = |root: &Path| {
        restore(&before, root);
        prepared(root);
        fs::set_permissions(root.join("target"), PermissionsExt::from_mode(0o600)).expect("mode");
    };
    let (root, log) = (folder.path().join("run"), folder.path().join("log"));
    let run = |root: &Path| xt(&command(root.to_str().expect("UTF-8")), root);
    started(&root);
    succeeds(run(&root).env("FAULT_LOG", &log));
    let goal = files(&root);
    assert_eq!(goal.keys().collect::<Vec<_>>(), ["o", "target"]);
    for at in 1..=logged(&log).len() {
        for kind in [KILL, TEAR, SHORT, FULL, EINTR, EIO, ENOSPC] {
            started(&root);
            let output = output(run(&root).env("FAULT_AT", at.to_string()).env("FAULT_KIND", kind));
            let content = fs::read(root.join("target")).expect("a file");
            assert!(content == b"precious" || content == goal["target"], "{kind} at call {at}");
            if kind == EINTR || kind == SHORT || output.status.code() == Some(0) {
                assert_eq!((output.status.code(), files(&root) == goal), (Some(0), true), "{kind} at call {at}");
            } else if output.status.code() == Some(1) {
                let message = text(&output.stderr);
                assert!(message.contains("/o: ") && message.lines().count() == 1, "{kind} at call {at}: {message}");
                assert_eq!(files(&root).len(), 2, "{kind} at call {at}: a temporary file is left");
            }
            succeeds(&mut run(&root));
            assert!(files(&root) == goal, "{kind} at call {at}");
            let mode = fs::metadata(root.join("target")).expect("a file").permissions().mode();
            assert_eq!(mode & 0o7777, 0o600, "{kind} at call {at}");
        }
    }
}

/// A log that cannot be written any more, because its disk is full or the terminal is gone, does not stop the run.
#[test]
fn a_log_that_cannot_be_written() {
    if interposer().is_none() {
        return;
    }
    let runs = Runs::new();
    let goal = runs.whole(&[]);
    let at = |name: &str| runs.folder.path().join(name);
    let (root, log, calls) = (at("run"), at("stdout"), at("calls"));
    let train = |at: usize, kind: &str| {
        let _ = fs::remove_dir_all(&root);
        let mut command = xt(&runs.train(root.to_str().expect("UTF-8"), &[]), &log);
        command.stdout(fs::File::create(&log).expect("a log"));
        let faults = command.env("FAULT_AT", at.to_string()).env("FAULT_KIND", kind).env("FAULT_LOG", &calls);
        let output = output(faults);
        let message = text(&output.stderr);
        assert_eq!(output.status.code(), Some(0), "{kind} at line {at}: {message}");
        assert_eq!(difference(&files(&root), &goal), [""; 0], "{kind} at line {at}");
        // The memory differs from run to run.
        let lines = String::from_utf8_lossy(&fs::read(&log).expect("a log")).into_owned();
        let lines = lines.lines().map(|line| line.split("  peak memory").next().unwrap_or_default());
        (message, lines.collect::<Vec<_>>().join("\n"))
    };
    let (silent, whole) = train(0, "");
    assert_eq!(silent, "");
    let lines = logged(&calls).len();
    for at in (1..=lines).step_by(if exhaustive() { 1 } else { 5 }) {
        for kind in [SHORT, EINTR] {
            assert_eq!(train(at, kind).1, whole, "{kind} at line {at}");
        }
        for kind in [FULL, EIO, ENOSPC] {
            let (message, written) = train(at, kind);
            assert!(message.starts_with("xt: standard output: ") && message.lines().count() == 1, "{message}");
            // Where there is space again, so are the lines.
            let ends = written.contains(" generate --checkpoint ");
            let is_last = at == lines;
            assert!(is_last || ends == (kind != FULL), "{kind} at line {at} of {lines}: {written}");
        }
    }
}

/// `strace` sees the calls that the interposer counts, and no others that change files.
#[test]
fn no_call_is_missed() {
    if !exhaustive() || interposer().is_none() {
        return;
    }
    let runs = Runs::new();
    let (root, log, trace) =
        (runs.folder.path().join("run"), runs.folder.path().join("log"), runs.folder.path().join("trace"));
    restore(&runs.whole(&[]), &root);
    let out = root.to_str().expect("UTF-8");
    let traced = xt(&runs.train(out, &["--seed", "9", "--overwrite"]), &root);
    let status = Command::new("strace")
        .args(["-f", "-y", "-s", "0", "-o"])
        .arg(&trace)
        .args(["-E", &format!("LD_PRELOAD={}", interposer().expect("compiled").display())])
        .args(["-E", &format!("FAULT_ROOT={out}"), "-E", &format!("FAULT_LOG={}", log.display())])
        .args(["-E", "RAYON_NUM_THREADS=1"])
        .arg(traced.get_program())
        .args(traced.get_args())
        .stdout(Stdio::null())
        .status()
        .expect("strace, which XT_EXHAUSTIVE=1 needs");
    assert!(status.success());
    let counted = logged(&log);
    let text = fs::read_to_string(trace).expect("a trace");
    // Paths are cut off by `-s 0`; those of open files are not, and every name that is opened or changed has one or
    // belongs to the calls below.
    let harmless = [
        "read",
        "pread64",
        "readlink",
        "statx",
        "newfstatat",
        "fstat",
        "lseek",
        "close",
        "mmap",
        "fcntl",
        "getdents64",
        "execve",
        "access",
        "getcwd",
        "ioctl",
        "fadvise64",
    ];
    let changing = [
        "write",
        "writev",
        "pwrite64",
        "pwritev",
        "fsync",
        "fdatasync",
        "ftruncate",
        "fallocate",
        "fchmod",
        "fchown",
        "flock",
        "copy_file_range",
        "sendfile",
        "rename",
        "renameat",
        "renameat2",
        "mkdir",
        "mkdirat",
        "unlink",
        "unlinkat",
        "rmdir",
        "link",
        "linkat",
        "symlink",
        "symlinkat",
        "chmod",
        "fchmodat",
        "chown",
        "fchownat",
        "truncate",
        "utimensat",
    ];
    let mut seen = 0;
    for line in text.lines() {
        let call = line.trim_start_matches(|c: char| c.is_ascii_digit() || c == ' ');
        let Some((name, arguments)) = call.split_once('(') else { continue };
        let below = arguments.contains(out);
        if name == "openat" {
            let writes = ["O_WRONLY", "O_RDWR", "O_CREAT", "O_TRUNC"].iter().any(|flag| arguments.contains(flag));
            // The opened path is shown after the `=`.
            seen += usize::from(below && writes);
        } else if below {
            assert!(harmless.contains(&name) || changing.contains(&name), "unknown call: {line}");
            seen += usize::from(changing.contains(&name));
        }
    }
    assert_eq!(seen, counted.len(), "{text}");
}
