//! `--overwrite`: the checkpoint and `metrics.csv` of a run are replaced together. The protocol is described at
//! [`Checkpoint`].

use std::{fs, io};

use serde_json::{Value, json};
use x_transformers::{
    io::{create_folders, read_limited, retry_interrupted, write_atomically},
    train::{Checkpoint, TrainingState},
};

use crate::{
    failure::{Failure, Result},
    files::Run,
};

/// The only file in the folder; temporary ones of a killed process go with the folder.
const FILE: &str = "rows.json";
const TRAINING: &str = "training";
const METRICS: &str = "metrics";

/// Says that these rows belong to the checkpoint that will be saved with this state.
pub fn announce(run: &Run, state: &TrainingState, rows: &str) -> Result<()> {
    let folder = run.replacement();
    create_folders(&folder)?;
    let content = json!({ TRAINING: state, METRICS: rows }).to_string();
    Ok(write_atomically(folder.join(FILE), |file| file.write_all(content.as_bytes()))?)
}

/// Completes what was announced if the checkpoint was saved, else forgets about it.
pub fn settle(run: &Run) -> Result<()> {
    let folder = run.replacement();
    match fs::symlink_metadata(&folder) {
        Ok(found) if found.is_dir() => {}
        Ok(_) => return Err(Failure::new("must be a folder; move this file away").within(&folder)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Failure::io(&folder, &error)),
    }
    let path = folder.join(FILE);
    let announced = match read_limited(&path, u64::MAX) {
        // It was written in one step: what is damaged was not written by this program.
        Ok(text) => serde_json::from_slice(&text).unwrap_or_default(),
        Err(error) if error.io_kind() == Some(io::ErrorKind::NotFound) => Value::Null,
        Err(error) => return Err(error.into()),
    };
    // A checkpoint that cannot be read was not saved by that run.
    let saved = Checkpoint::load_training(run.checkpoint()).ok().map(|state| json!(state));
    if let (Some(saved), Some(rows)) = (saved, announced[METRICS].as_str())
        && saved == announced[TRAINING]
    {
        write_atomically(run.metrics(), |file| file.write_all(rows.as_bytes()))?;
        if saved["options"]["keep_best"] != true {
            remove_best(run)?;
        }
    }
    remove(run)
}

/// Removes the best checkpoint of the run that was replaced, if the new one keeps none.
pub fn remove_best(run: &Run) -> Result<()> {
    let best = run.best();
    if !Checkpoint::is_in(&best) {
        return Ok(());
    }
    match retry_interrupted(|| fs::remove_dir_all(&best)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Failure::io(&best, &error)),
        _ => Ok(()),
    }
}

/// Forgets what was announced: it was done.
pub fn remove(run: &Run) -> Result<()> {
    let folder = run.replacement();
    match retry_interrupted(|| fs::remove_dir_all(&folder)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Failure::io(&folder, &error)),
        _ => Ok(()),
    }
}
