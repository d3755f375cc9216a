//! Runs `xt` with an interposer between it and the C library, which counts calls and makes one of them fail.

use std::{
    collections::BTreeMap,
    env, fs,
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::{
        OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use x_transformers::train::Checkpoint;

use crate::command::{start, text};

pub const KILL: &str = "kill";
pub const TEAR: &str = "tear";
pub const SHORT: &str = "short";
pub const FULL: &str = "full";
pub const EINTR: &str = "4";
pub const EIO: &str = "5";
pub const ENOSPC: &str = "28";

pub fn exhaustive() -> bool {
    env::var_os("XT_EXHAUSTIVE").is_some_and(|value| value == "1")
}

/// Builds the library that counts calls and makes them fail; `None` without a compiler.
pub fn interposer() -> Option<&'static Path> {
    static BUILT: OnceLock<Option<PathBuf>> = OnceLock::new();
    let build = || {
        let library = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("interpose-{}.so", std::process::id()));
        let compiler = env::var("CXX").unwrap_or_else(|_| "g++".into());
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/faults/interpose.cpp");
        let flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o"];
        match Command::new(&compiler).args(flags).arg(&library).args([source, "-ldl"]).status() {
            Ok(status) => {
                assert!(status.success(), "{source} does not compile");
                Some(library)
            }
            Err(error) => {
                let required = env::var("XT_REQUIRE_GXX").as_deref() == Ok("1");
                assert!(!required, "no host compiler ({compiler}: {error}), but XT_REQUIRE_GXX=1 promises it");
                eprintln!("skipped: no host compiler ({compiler}: {error})");
                None
            }
        }
    };
    BUILT.get_or_init(build).as_deref()
}

/// All files below a folder with their content, empty folders, and where links point to.
pub type Files = BTreeMap<String, Vec<u8>>;

pub fn files(root: &Path) -> Files {
    let mut found = Files::new();
    let mut open = vec![root.to_path_buf()];
    while let Some(folder) = open.pop() {
        let Ok(entries) = fs::read_dir(&folder) else { continue };
        let before = found.len() + open.len();
        for path in entries.map(|entry| entry.expect("an entry").path()) {
            let name = path.strip_prefix(root).expect("below").display().to_string();
            if path.is_symlink() {
                found.insert(name, fs::read_link(path).expect("a link").into_os_string().into_encoded_bytes());
            } else if path.is_dir() {
                open.push(path);
            } else {
                found.insert(name, fs::read(path).expect("a file"));
            }
        }
        if found.len() + open.len() == before {
            found.insert(format!("{}/", folder.strip_prefix(root).expect("below").display()), Vec::new());
        }
    }
    found
}

pub fn restore(files: &Files, root: &Path) {
    let _ = fs::remove_dir_all(root);
    for (name, content) in files {
        let path = root.join(name);
        fs::create_dir_all(path.parent().expect("a folder")).expect("create");
        if name.ends_with('/') {
            fs::create_dir_all(path).expect("create");
        } else {
            fs::write(path, content).expect("write");
        }
    }
}

/// Names of files that differ.
pub fn difference(a: &Files, b: &Files) -> Vec<String> {
    let names = a.keys().chain(b.keys());
    let mut differing: Vec<_> = names.filter(|name| a.get(*name) != b.get(*name)).cloned().collect();
    differing.sort();
    differing.dedup();
    differing
}

/// `xt` on one thread with the interposer, its files below `root`.
pub fn xt(arguments: &[String], root: &Path) -> Command {
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let mut command = start(&arguments);
    command.env("LD_PRELOAD", interposer().expect("compiled")).env("FAULT_ROOT", root).env("RAYON_NUM_THREADS", "1");
    command
}

pub fn output(command: &mut Command) -> Output {
    command.output().expect("xt starts")
}

#[track_caller]
pub fn succeeds(command: &mut Command) {
    let output = output(command);
    assert_eq!((output.status.code(), text(&output.stderr)), (Some(0), String::new()), "{command:?}");
}

/// A call of the log.
pub struct Call {
    pub name: String,
    pub path: String,
}

/// The calls in a log.
pub fn logged(log: &Path) -> Vec<Call> {
    let text = fs::read_to_string(log).expect("a log");
    let calls = text.lines().enumerate().map(|(index, line)| {
        let [number, name, path] = line.splitn(3, ' ').collect::<Vec<_>>()[..] else { panic!("{line}") };
        assert_eq!(number.parse(), Ok(index + 1));
        Call { name: name.to_string(), path: path.to_string() }
    });
    calls.collect()
}

/// Operation on a folder with failing calls.
pub struct Scenario<'a> {
    pub name: &'a str,
    /// The folder at the beginning.
    pub before: Files,
    /// The command, given the folder.
    pub command: &'a (dyn Fn(&str) -> Vec<String> + Sync),
    /// Completes the work on the folder after the command failed or was killed.
    pub recover: &'a (dyn Fn(&Path) + Sync),
    /// The folder at the end of an uninterrupted command.
    pub goal: Files,
    /// The folder at the end if nothing was changed: the files to be replaced are still there.
    pub old: Option<Files>,
    /// The call that replaces it.
    pub switch: &'a str,
}

impl Scenario<'_> {
    fn command(&self, root: &Path) -> Command {
        xt(&(self.command)(root.to_str().expect("UTF-8")), root)
    }

    /// The calls of the command, which succeeds and reaches the goal.
    fn calls(&self, folder: &Path) -> Vec<Call> {
        let (root, log) = (folder.join("run"), folder.join("log"));
        restore(&self.before, &root);
        succeeds(self.command(&root).env("FAULT_LOG", &log));
        assert_eq!(difference(&files(&root), &self.goal), [""; 0], "{}", self.name);
        logged(&log)
    }

    /// Makes one call fail, and checks the remaining files and the result of completing them.
    fn try_fault(&self, calls: &[Call], at: usize, kind: &str, root: &Path) {
        let call = &calls[at - 1];
        let place = format!("{}: {kind} at call {at}, {} {}", self.name, call.name, call.path);
        restore(&self.before, root);
        let output = output(self.command(root).env("FAULT_AT", at.to_string()).env("FAULT_KIND", kind));
        let message = text(&output.stderr);
        let checkpoint = root.join("checkpoint");
        // The first call is number 1: those before `at` took place.
        let saved =
            calls[..at - 1].iter().any(is_save) || self.before.keys().any(|name| name.starts_with("checkpoint/"));
        if saved && let Err(error) = Checkpoint::load(&checkpoint) {
            panic!("{place}: {error}");
        }
        match (kind, output.status.code()) {
            (KILL | TEAR, _) => assert_eq!(output.status.signal(), Some(9), "{place}: {message}"),
            (_, Some(0)) => {
                assert_eq!(message, "", "{place}");
                assert_eq!(difference(&files(root), &self.goal), [""; 0], "{place}");
                return;
            }
            (EINTR | SHORT, code) => panic!("{place}: exit code {code:?}, {message}"),
            (_, code) => {
                assert_eq!(code, Some(1), "{place}: {message}");
                let one_line = message.starts_with("xt: ") && message.lines().count() == 1;
                let names = message.contains(root.to_str().expect("UTF-8")) && message.contains("; ");
                assert!(one_line && names, "{place}: {message}");
            }
        }
        (self.recover)(root);
        let end = files(root);
        let switch = calls.iter().position(|call| call.path.ends_with(self.switch)).map_or(0, |index| index + 1);
        match &self.old {
            // A full disk may show only after the switch.
            Some(old) if at <= switch && (kind != FULL || end == *old) => {
                assert_eq!(difference(&end, old), [""; 0], "{place}: not the old files");
            }
            _ => assert_eq!(difference(&end, &self.goal), [""; 0], "{place}: not the files of an uninterrupted run"),
        }
    }

    /// Makes every call fail in every way, or in some of them.
    pub fn try_all(&self) {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let calls = self.calls(folder.path());
        assert!(calls.len() > 4, "{}: {} calls", self.name, calls.len());
        let mut faults = Vec::new();
        for (index, call) in calls.iter().enumerate() {
            let at = index + 1;
            for (number, kind) in [KILL, TEAR, SHORT, FULL, EINTR, EIO, ENOSPC].into_iter().enumerate() {
                let fits = !matches!(kind, TEAR | SHORT) || call.name == "write";
                let chosen = kind == KILL || kind == TEAR || exhaustive() || (at + number).is_multiple_of(6);
                if fits && chosen {
                    faults.push((at, kind));
                }
            }
        }
        let next = AtomicUsize::new(0);
        let workers = thread::available_parallelism().map_or(2, usize::from);
        thread::scope(|scope| {
            for worker in 0..workers {
                let (folder, faults, calls, next) = (folder.path(), &faults, &calls, &next);
                scope.spawn(move || {
                    let root = folder.join(format!("run-{worker}"));
                    while let Some(&(at, kind)) = faults.get(next.fetch_add(1, Ordering::Relaxed)) {
                        self.try_fault(calls, at, kind, &root);
                    }
                });
            }
        });
    }
}

/// The rename that is the save of a checkpoint.
fn is_save(call: &Call) -> bool {
    call.name == "rename" && call.path.ends_with("/checkpoint/.incoming")
}
