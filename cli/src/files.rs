//! Where the files of a run lie.

use std::{
    fs::{File, OpenOptions, TryLockError},
    io,
    path::{Path, PathBuf},
};

use x_transformers::{
    io::{create_folders, read_text},
    train::Checkpoint,
};

use crate::{
    failure::{Failure, Result},
    replacement,
};

/// The folder of a training run, which no other run can have at the same time.
pub struct Run {
    pub dir: PathBuf,
    /// Locked until it is closed, which the system does for a process that is killed.
    lock: Option<File>,
}

impl Run {
    /// The run in a folder, or that of a checkpoint.
    ///
    /// Errors: another one is writing into it.
    pub fn find(dir: &Path) -> Result<Self> {
        let mut run = Self::unlocked(dir);
        if run.dir.is_dir() {
            run.lock()?;
            replacement::settle(&run)?;
        }
        Ok(run)
    }

    /// The run in a folder, or that of a checkpoint, which another process has locked.
    pub fn unlocked(dir: &Path) -> Self {
        let parent = dir.parent().filter(|_| dir.ends_with(CHECKPOINT) && dir.is_dir());
        Self { dir: parent.unwrap_or(dir).to_path_buf(), lock: None }
    }

    fn lock(&mut self) -> Result<()> {
        let path = self.dir.join(LOCK);
        let file =
            OpenOptions::new().create(true).append(true).open(&path).map_err(|error| Failure::io(&path, &error))?;
        let interrupted = |error: &TryLockError| matches!(error, TryLockError::Error(error) if error.kind() == io::ErrorKind::Interrupted);
        let mut locked = file.try_lock();
        while locked.as_ref().is_err_and(interrupted) {
            locked = file.try_lock();
        }
        if let Err(TryLockError::WouldBlock) = locked {
            let dir = self.dir.display();
            return Err(Failure::new(format_args!(
                "{dir}: another `xt train` is writing to this folder; wait for it, or choose another folder with \
                 `--out`"
            )));
        }
        // Training continues on a file system without locks.
        self.lock = Some(file);
        Ok(())
    }

    pub fn checkpoint(&self) -> PathBuf {
        self.dir.join(CHECKPOINT)
    }

    /// The checkpoint of the step with the lowest validation loss.
    pub fn best(&self) -> PathBuf {
        self.dir.join("best")
    }

    pub fn metrics(&self) -> PathBuf {
        self.dir.join("metrics.csv")
    }

    /// The rows of a run that replaces the one in the folder, while it does.
    pub fn replacement(&self) -> PathBuf {
        self.dir.join(".replacement")
    }

    pub fn plot(&self) -> PathBuf {
        self.dir.join("loss.svg")
    }

    /// A new run in a folder, which is made if it is not there.
    ///
    /// Errors: it holds a run already, which may only be replaced if `overwrite` says so and when it has ended.
    pub fn create(dir: &Path, overwrite: bool) -> Result<Self> {
        let mut run = Self { dir: dir.to_path_buf(), lock: None };
        create_folders(dir)?;
        run.lock()?;
        replacement::settle(&run)?;
        if !overwrite && run.is_begun() {
            let (dir, word) = (dir.display(), quoted(dir));
            return Err(Failure::new(format_args!(
                "{dir} holds a trained model; continue it with `--resume {word}`, replace it with `--overwrite`, or \
                 choose another folder with `--out`"
            )));
        }
        // Find now whatever is in the way of the first save.
        create_folders(run.checkpoint())?;
        Ok(run)
    }

    /// If the folder has a checkpoint, even a damaged one: it is not replaced unless that is asked for.
    pub fn is_begun(&self) -> bool {
        Checkpoint::is_in(self.checkpoint())
    }
}

const CHECKPOINT: &str = "checkpoint";
const LOCK: &str = ".lock";

/// A path as a word of a POSIX shell, so that a command with it can be pasted.
///
/// A name with control characters or with bytes that are not UTF-8 takes the form `$'…'`, which bash, zsh, ksh and
/// POSIX 2024 know.
pub fn quoted(path: &Path) -> String {
    let bytes = path.as_os_str().as_encoded_bytes();
    let plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"/._-+=:,@%".contains(byte);
    let option = if bytes.starts_with(b"-") { "./" } else { "" };
    match path.to_str() {
        Some(text) if !bytes.is_empty() && bytes.iter().all(plain) => format!("{option}{text}"),
        Some(text) if !text.contains(char::is_control) => format!("{option}'{}'", text.replace('\'', r"'\''")),
        _ => {
            let escaped = bytes.iter().map(|&byte| match byte {
                b'\'' | b'\\' => format!("\\{}", byte as char),
                b' '..=b'~' => (byte as char).to_string(),
                _ => format!("\\{byte:03o}"),
            });
            format!("{option}$'{}'", escaped.collect::<String>())
        }
    }
}

/// Bytes that a config may have; real ones have some thousand.
const MAX_CONFIG: u64 = 16 << 20;

/// The text of a config.
///
/// Errors: a file that cannot be read, is not a regular file, is too long, or is not UTF-8.
pub fn config(path: &Path) -> Result<String> {
    Ok(read_text(path, MAX_CONFIG)?)
}

/// The checkpoint in a folder: that of the run in it, or the folder itself.
pub fn checkpoint(dir: &Path) -> PathBuf {
    let inner = dir.join(CHECKPOINT);
    if inner.is_dir() { inner } else { dir.to_path_buf() }
}

#[cfg(test)]
mod tests {
    use std::{ffi::OsStr, os::unix::ffi::OsStrExt, path::Path, process::Command};

    use super::quoted;

    /// Bash reads the word as the path.
    #[test]
    #[cfg(unix)]
    fn quoted_paths_are_one_word() {
        let names: [&[u8]; 12] = [
            b"out",
            b"a b",
            b"it's",
            b"$HOME",
            b"a\nb",
            b"a\\b\t'",
            b"-x",
            b"*",
            b"~",
            "\u{e9}".as_bytes(),
            b"\xff\xfe",
            b"`id`;#\"",
        ];
        for name in names {
            let path = Path::new(OsStr::from_bytes(name));
            let script = format!("printf %s {}", quoted(path));
            let shown = Command::new("bash").args(["-c", &script]).output().expect("bash starts").stdout;
            let expected = [if name == b"-x" { &b"./"[..] } else { b"" }, name].concat();
            assert_eq!(shown, expected, "{script}");
        }
    }
}
