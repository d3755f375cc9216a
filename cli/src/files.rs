//! Where the files of a run lie.

use std::{
    fs,
    path::{Path, PathBuf},
};

use x_transformers::train::Checkpoint;

use crate::failure::{Failure, Result};

/// The folder of a training run.
pub struct Run {
    pub dir: PathBuf,
}

impl Run {
    /// The run in a folder, or that of a checkpoint.
    pub fn find(dir: &Path) -> Self {
        let parent = dir.parent().filter(|_| dir.ends_with(CHECKPOINT) && dir.is_dir());
        Self { dir: parent.unwrap_or(dir).to_path_buf() }
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

    /// Makes the folder.
    ///
    /// Errors: it holds a run already, which may only be replaced if `overwrite` says so.
    pub fn create(&self, overwrite: bool) -> Result<()> {
        if !overwrite && Checkpoint::load_config(self.checkpoint()).is_ok() {
            let dir = self.dir.display();
            return Err(Failure::new(format_args!(
                "{dir} holds a trained model; continue it with `--resume {dir}`, replace it with `--overwrite`, or \
                 choose another folder with `--out`"
            )));
        }
        fs::create_dir_all(&self.dir).map_err(|error| Failure::io(&self.dir, &error))
    }
}

const CHECKPOINT: &str = "checkpoint";

/// The checkpoint in a folder: that of the run in it, or the folder itself.
pub fn checkpoint(dir: &Path) -> PathBuf {
    let inner = dir.join(CHECKPOINT);
    if inner.is_dir() { inner } else { dir.to_path_buf() }
}
