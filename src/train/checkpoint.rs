//! A checkpoint: a folder from which a run continues as if it had never stopped.
//!
//! | file | content |
//! |---|---|
//! | `config.json` | the model's keywords |
//! | `model.safetensors` | its weights, by PyTorch's names |
//! | `optimizer.safetensors` | [`AdamW`](super::AdamW)'s state, and averaged weights as `ema.NAME` |
//! | `training.json` | [`TrainingState`] |
//!
//! # Killed at any instant
//!
//! The four files belong together, so that replacing them one by one is not enough. A save
//!
//! 1. writes all four, each brought to the disk, into the folder `.incoming.partial`;
//! 2. renames that to `.incoming`: this one step is the save;
//! 3. moves the files out of `.incoming` over the old ones, and removes it.
//!
//! A reader takes each file from `.incoming` if it is there, else from the folder. Before step 2 it finds the old
//! checkpoint, from then on the new one, wherever step 3 stops; the next save completes step 3 or removes what step 1
//! left.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::{GradScaler, TrainOptions};
use crate::{
    Error, Result, Tensor,
    config::Config,
    error::ensure,
    io::{read_with_metadata, sync_folder, write_atomically, write_safetensors},
};

const CONFIG: &str = "config.json";
const MODEL: &str = "model.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const TRAINING: &str = "training.json";
const FILES: [&str; 4] = [CONFIG, MODEL, OPTIMIZER, TRAINING];

/// Names of averaged weights in the optimizer's file begin with it.
pub(super) const EMA: &str = "ema.";

/// A whole checkpoint whose files are on their way into the folder.
const INCOMING: &str = ".incoming";
/// A checkpoint that is being written.
const PARTIAL: &str = ".incoming.partial";

/// Bytes that a JSON file of a checkpoint may have; real ones have some thousand.
const MAX_JSON: u64 = 16 << 20;

/// All that a run needs to continue.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    /// The model's keywords.
    pub config: Config,
    /// The model's state dict.
    pub model: BTreeMap<String, Tensor>,
    /// The optimizer's state, and the averaged weights under `ema.NAME`.
    pub optimizer: BTreeMap<String, Tensor>,
    /// Where the run is.
    pub training: TrainingState,
}

/// Where a run is: the content of `training.json`.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainingState {
    /// The version of this crate that wrote the checkpoint.
    pub version: String,
    /// Steps done.
    pub step: u64,
    /// The options of the run, the seed of its random numbers among them.
    pub options: TrainOptions,
    /// The text that it trains on.
    pub text: TextPrint,
    /// Losses so far.
    pub losses: Losses,
    /// The loss scaling of a run in f16.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grad_scaler: Option<GradScaler>,
}

/// What a text is recognised by.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TextPrint {
    /// Its length in bytes.
    pub bytes: u64,
    /// Its hash in hexadecimal digits.
    pub fingerprint: String,
}

/// Losses in nats per byte; `None` before the first one.
#[derive(Clone, Copy, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Losses {
    /// Of the last step.
    pub last: Option<f64>,
    /// The lowest of any step.
    pub best: Option<f64>,
    /// Of the last validation.
    pub last_validation: Option<f64>,
    /// The lowest of any validation.
    pub best_validation: Option<f64>,
}

impl Checkpoint {
    /// Writes the checkpoint into a folder, which is made if it is not there; other files in it are left alone. At
    /// every instant the folder has a whole checkpoint, the previous one or this one.
    ///
    /// Errors: [`Error::Io`] with the path for whatever fails, a full disk for instance; the previous checkpoint is
    /// still there then.
    pub fn save(&self, folder: impl AsRef<Path>) -> Result<()> {
        let folder = folder.as_ref();
        fs::create_dir_all(folder).map_err(|source| Error::io(folder, source))?;
        complete(folder)?;
        let partial = folder.join(PARTIAL);
        remove(&partial)?;
        let written = self.write(&partial).and_then(|()| {
            let incoming = folder.join(INCOMING);
            fs::rename(&partial, &incoming).map_err(|source| Error::io(incoming, source))
        });
        if let Err(error) = written {
            // The first error counts; what could not be removed is removed by the next save.
            let _ = remove(&partial);
            return Err(error);
        }
        sync_folder(folder).map_err(|source| Error::io(folder, source))?;
        complete(folder)
    }

    fn write(&self, folder: &Path) -> Result<()> {
        fs::create_dir(folder).map_err(|source| Error::io(folder, source))?;
        let metadata = BTreeMap::from([
            ("format".to_string(), "pt".to_string()),
            ("step".to_string(), self.training.step.to_string()),
        ]);
        write_json(&folder.join(CONFIG), &self.config)?;
        write_safetensors(folder.join(MODEL), &self.model, &metadata)?;
        write_safetensors(folder.join(OPTIMIZER), &self.optimizer, &metadata)?;
        write_json(&folder.join(TRAINING), &self.training)
    }

    /// Reads a checkpoint.
    ///
    /// Errors: [`Error::File`] for a folder without one of the files, a file with another content than it should
    /// have, or files of different checkpoints; [`Error::Io`] if one cannot be read.
    pub fn load(folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref();
        let training: TrainingState = read_json(folder, TRAINING)?;
        let tensors = |name| {
            member(folder, name, |path| {
                let (tensors, metadata) = read_with_metadata(path)?;
                let step = metadata.get("step");
                ensure!(
                    step.is_none_or(|step| *step == training.step.to_string()),
                    Error::file(
                        path,
                        format!(
                            "is of step {}, {TRAINING} of step {}: the files are of different checkpoints",
                            step.map_or("", String::as_str),
                            training.step
                        )
                    )
                );
                Ok(tensors)
            })
        };
        Ok(Self {
            config: Self::load_config(folder)?,
            model: tensors(MODEL)?,
            optimizer: tensors(OPTIMIZER)?,
            training,
        })
    }

    /// Reads the model's keywords alone.
    ///
    /// Errors: as [`Checkpoint::load`].
    pub fn load_config(folder: impl AsRef<Path>) -> Result<Config> {
        read_json(folder.as_ref(), CONFIG)
    }

    /// Reads the model alone, its keywords and its state dict; the other two files are not needed.
    ///
    /// Errors: as [`Checkpoint::load`].
    pub fn load_model(folder: impl AsRef<Path>) -> Result<(Config, BTreeMap<String, Tensor>)> {
        let folder = folder.as_ref();
        let (model, _) = member(folder, MODEL, read_with_metadata)?;
        Ok((Self::load_config(folder)?, model))
    }

    /// Reads the model as [`Checkpoint::load_model`], with the averaged weights of a run that has them
    /// ([`TrainOptions::ema_decay`]): those that its validation judges.
    ///
    /// Errors: as [`Checkpoint::load`].
    pub fn load_averaged(folder: impl AsRef<Path>) -> Result<(Config, BTreeMap<String, Tensor>)> {
        let folder = folder.as_ref();
        let (config, mut model) = Self::load_model(folder)?;
        // A folder with a config and weights alone is a model too.
        let has_training =
            [folder.join(INCOMING), folder.to_path_buf()].iter().any(|place| place.join(TRAINING).exists());
        if has_training && read_json::<TrainingState>(folder, TRAINING)?.options.ema_decay.is_some() {
            let (optimizer, _) = member(folder, OPTIMIZER, read_with_metadata)?;
            let averages =
                optimizer.into_iter().filter_map(|(name, value)| Some((name.strip_prefix(EMA)?.to_string(), value)));
            model.extend(averages);
        }
        Ok((config, model))
    }
}

/// Moves what is in `.incoming` into the folder.
fn complete(folder: &Path) -> Result<()> {
    let incoming = folder.join(INCOMING);
    if !incoming.is_dir() {
        return Ok(());
    }
    for name in FILES {
        let target = folder.join(name);
        match fs::rename(incoming.join(name), &target) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(Error::io(target, error)),
            _ => {}
        }
    }
    sync_folder(folder).map_err(|source| Error::io(folder, source))?;
    remove(&incoming)
}

/// Removes a folder if it is there.
fn remove(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::io(folder, error)),
        _ => Ok(()),
    }
}

/// Reads a file of the checkpoint from where it is.
fn member<T>(folder: &Path, name: &str, read: impl Fn(&Path) -> Result<T>) -> Result<T> {
    let places: [PathBuf; 2] = [folder.join(INCOMING).join(name), folder.join(name)];
    for place in places {
        match read(&place) {
            Err(Error::Io { source, .. })
                if matches!(source.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {}
            answer => return answer,
        }
    }
    let why = match fs::metadata(folder) {
        Ok(found) if found.is_dir() => "is not a checkpoint",
        Ok(_) => "is not a folder, so not a checkpoint",
        Err(_) => "does not exist, so there is no checkpoint",
    };
    Err(Error::file(folder, format!("{why}: it has no {name} (expected {})", FILES.join(", "))))
}

fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let mut text = serde_json::to_vec_pretty(value).map_err(|error| Error::io(path, error.into()))?;
    text.push(b'\n');
    write_atomically(path, |file| file.write_all(&text))
}

fn read_json<T: DeserializeOwned>(folder: &Path, name: &str) -> Result<T> {
    member(folder, name, |path| {
        let broken = |source| Error::io(path, source);
        let found = fs::metadata(path).map_err(broken)?;
        ensure!(found.is_file(), Error::file(path, "is not a regular file"));
        ensure!(
            found.len() <= MAX_JSON,
            Error::file(path, format!("has {} bytes, at most {MAX_JSON} are expected", found.len()))
        );
        let text = fs::read(path).map_err(broken)?;
        serde_json::from_slice(&text).map_err(|error| Error::file(path, format!("is damaged: {error}")))
    })
}
