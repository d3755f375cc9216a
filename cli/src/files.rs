//! Where the files of a run lie.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    path::{Path, PathBuf},
};

use x_transformers::train::Checkpoint;

use crate::failure::{Failure, Result};

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
        let parent = dir.parent().filter(|_| dir.ends_with(CHECKPOINT) && dir.is_dir());
        let mut run = Self { dir: parent.unwrap_or(dir).to_path_buf(), lock: None };
        if run.dir.is_dir() {
            run.lock()?;
        }
        Ok(run)
    }

    fn lock(&mut self) -> Result<()> {
        let path = self.dir.join(LOCK);
        let file =
            OpenOptions::new().create(true).append(true).open(&path).map_err(|error| Failure::io(&path, &error))?;
        if let Err(TryLockError::WouldBlock) = file.try_lock() {
            let dir = self.dir.display();
            return Err(Failure::new(format_args!(
                "{dir}: another `xt train` is writing into this folder; wait for it, or choose another one with `--out`"
            )));
        }
        // A file system without locks is no reason not to train.
        self.lock = Some(file);
        Ok(())
    }

    pub fn checkpoint(&self) -> PathBuf {
        self.dir.join(CHECKPOINT)
    }

    pub fn metrics(&self) -> PathBuf {
        self.dir.join("metrics.csv")
    }

    pub fn plot(&self) -> PathBuf {
        self.dir.join("loss.svg")
    }

    /// A new run in a folder, which is made if it is not there.
    ///
    /// Errors: it holds a run already, which may only be replaced if `overwrite` says so and when it has ended.
    pub fn create(dir: &Path, overwrite: bool) -> Result<Self> {
        let mut run = Self { dir: dir.to_path_buf(), lock: None };
        fs::create_dir_all(dir).map_err(|error| Failure::io(dir, &error))?;
        run.lock()?;
        if !overwrite && run.is_begun() {
            let dir = dir.display();
            return Err(Failure::new(format_args!(
                "{dir} holds a trained model; continue it with `--resume {dir}`, replace it with `--overwrite`, or \
                 choose another folder with `--out`"
            )));
        }
        Ok(run)
    }

    /// Whether the folder has a checkpoint to go on from.
    pub fn is_begun(&self) -> bool {
        Checkpoint::load_config(self.checkpoint()).is_ok()
    }
}

const CHECKPOINT: &str = "checkpoint";
const LOCK: &str = ".lock";

/// The checkpoint in a folder: that of the run in it, or the folder itself.
pub fn checkpoint(dir: &Path) -> PathBuf {
    let inner = dir.join(CHECKPOINT);
    if inner.is_dir() { inner } else { dir.to_path_buf() }
}
