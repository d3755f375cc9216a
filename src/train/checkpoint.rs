//! Checkpoints: folders from which a run continues as if it had never stopped.

use std::{collections::BTreeMap, fs, path::Path};

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::{DataPrint, GradScaler, TrainOptions};
use crate::{
    Error, ErrorKind, Result, Tensor,
    config::Config,
    error::ensure,
    io::{FileSet, Writer, pack, read_limited, read_with_metadata},
    ordered::ordered,
};

pub(super) const CONFIG: &str = "config.json";
pub(super) const MODEL: &str = "model.safetensors";
pub(super) const OPTIMIZER: &str = "optimizer.safetensors";
const TRAINING: &str = "training.json";
const FILES: [&str; 4] = [CONFIG, MODEL, OPTIMIZER, TRAINING];

/// Prefix of the names of averaged weights in the optimizer's file.
pub(super) const EMA: &str = "ema.";

/// Maximum size of a checkpoint's JSON files, in bytes; real ones have a few thousand.
const MAX_JSON: u64 = 16 << 20;

/// Number of retries of a read while other checkpoints are being saved.
const RETRIES: usize = 100;

/// Complete state of a run, as saved in a folder.
///
/// # Files
///
/// | file | content |
/// |---|---|
/// | `config.json` | the options of the model |
/// | `model.safetensors` | its weights, by PyTorch's names |
/// | `optimizer.safetensors` | the state of the [`Optimizer`](super::Optimizer), and averaged weights as `ema.NAME` |
/// | `training.json` | [`TrainingState`] |
///
/// The four belong together and are replaced together. [`Checkpoint::save`]
///
/// 1. completes or removes what a process that was killed left (see the table);
/// 2. creates the folder `.incoming.partial`, writes the four files there, each with the mode and owner of the one that
///    it will replace, and calls `fsync` for each and for the folder;
/// 3. renames `.incoming.partial` to `.incoming`, **which is the save**, and calls `fsync` for the checkpoint's folder;
/// 4. renames each file out of `.incoming` over the old one, calls `fsync` for the folder again, and removes
///    `.incoming`.
///
/// Readers take each file from `.incoming` if it is there, else from the checkpoint's folder.
///
/// | killed in step | is left | readers find | [`Checkpoint::complete`] and the next save |
/// |---|---|---|---|
/// | 1, 2 | `.incoming.partial`, with any part of the files | the old checkpoint | remove it |
/// | 3 | `.incoming` with all four files | the new checkpoint | do step 4 |
/// | 4 | `.incoming` with some of them, or empty | the new checkpoint | do the rest of step 4 |
///
/// [`Trainer::resume`](super::Trainer::resume) calls `complete`, so a resumed run leaves the same files as one that was
/// never interrupted, even if there was nothing left to train. The same holds for a write that fails (a full disk, a
/// failing one): the error is returned, what was written in step 2 is removed, and the last whole checkpoint is there.
///
/// Two processes or threads that save into one folder do so one after the other: `.incoming.partial` and `.incoming`
/// are locked (`flock`) while they are in use, and what is locked is never taken for the remains of a killed process. A
/// reader that meets a save reads again, so it never gets files of two checkpoints. Where folders cannot be brought
/// to the disk (`fsync` answers `EINVAL`, `EBADF` or "not supported") or locked, saving does without. A symbolic link
/// in the place of one of the four files is replaced by the file, and what it points to stays as it is (the
/// checkpoint's folder itself may be a link); anything but a folder at `.incoming` or `.incoming.partial` is an error
/// that says so, before anything is written.
///
/// # The folder of `xt train`
///
/// `xt train --out DIR` has its checkpoint in `DIR/checkpoint`, a row per step in `DIR/metrics.csv` and the curves in
/// `DIR/loss.svg`. Rows are appended one by one; before each save they are brought to the disk. After it the picture is
/// drawn, replaced in one step ([`write_atomically`](crate::io::write_atomically)). `--resume` completes the
/// checkpoint, drops the rows of steps that it does not contain, which will be done again, and draws the picture: after
/// a kill at any moment all files end as those of an uninterrupted run (but for the speed in `metrics.csv`, which is
/// measured). A run that was killed before its first save left no checkpoint and is begun again.
///
/// With `--keep-best` or `--patience`, `DIR/best` is a second checkpoint: that of the step with the lowest validation
/// loss. It is saved after `DIR/checkpoint`; a run that was killed in between saves it when it is resumed.
///
/// `--overwrite` replaces checkpoint, metrics and picture at its first save; before, the old run is whole. It keeps
/// its rows in memory until then. For the save it writes a file in `DIR/.replacement` that holds its [`TrainingState`]
/// and the rows, then saves the checkpoint, then replaces `metrics.csv` by the rows, removes `.replacement` and draws
/// the picture. Whoever opens the folder next compares the state in `.replacement` with the one of the checkpoint: if
/// they are equal the save took place, and `metrics.csv` is replaced now; if not, the old run goes on. `.replacement`
/// is removed in both cases.
#[derive(Clone, Debug)]
pub struct Checkpoint<C = Config> {
    /// Options of the model: the config of a library model, or those that a custom model writes.
    pub config: C,
    /// State dict of the model.
    pub model: BTreeMap<String, Tensor>,
    /// State of the optimizer, and the averaged weights as `ema.NAME`.
    pub optimizer: BTreeMap<String, Tensor>,
    /// Progress of the run.
    pub training: TrainingState,
}

/// Progress of a run: the content of `training.json`.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainingState {
    /// Version of this crate that wrote the checkpoint.
    pub version: String,
    /// Number of completed steps.
    pub step: u64,
    /// Options of the run, including its random seed.
    pub options: TrainOptions,
    /// Fingerprint of the data.
    #[serde(alias = "text")]
    pub data: DataPrint,
    /// Losses up to this step.
    pub losses: Losses,
    /// Name of the folder beside the files of the checkpoint that has the tokenizer ([`Trainer::set_tokenizer`](
    /// super::Trainer::set_tokenizer)).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokenizer: Option<String>,
    /// Loss scaling of a run in f16.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grad_scaler: Option<GradScaler>,
}

/// Losses in nats per token; `None` before the first one.
#[derive(Clone, Copy, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Losses {
    /// Training loss of the last step.
    pub last: Option<f64>,
    /// Lowest training loss of any step.
    pub best: Option<f64>,
    /// Loss of the last validation.
    pub last_validation: Option<f64>,
    /// Lowest loss of any validation.
    pub best_validation: Option<f64>,
    /// Number of validations since the one with the lowest loss.
    #[serde(default)]
    pub since_best: u64,
}

impl<C: Serialize> Checkpoint<C> {
    /// Saves the checkpoint in a folder, which is created if missing; other files in it are not touched. At every
    /// instant the folder has a whole checkpoint, the previous one or this one; see [above](Self#files).
    ///
    /// Errors: [`ErrorKind::Io`] with the path for every failure, such as a full disk; the previous checkpoint remains,
    /// or this one if the failure came after step 3.
    pub fn save(&self, folder: impl AsRef<Path>) -> Result<()> {
        let metadata = self.metadata();
        self.save_with(folder.as_ref(), |files| {
            self.write_model(files)?;
            let path = files.path(OPTIMIZER);
            pack(&path, &self.optimizer, &metadata, |write| files.write(OPTIMIZER, write))
        })
    }

    /// Metadata of the files of tensors.
    pub(super) fn metadata(&self) -> BTreeMap<String, String> {
        ordered([("format".to_string(), "pt".to_string()), ("step".to_string(), self.training.step.to_string())])
    }

    /// Writes the file of the model.
    pub(super) fn write_model(&self, files: &Writer) -> Result<()> {
        pack(&files.path(MODEL), &self.model, &self.metadata(), |write| files.write(MODEL, write))
    }

    /// Saves the checkpoint like [`Checkpoint::save`], with the files of tensors that `tensors` writes.
    pub(super) fn save_with(&self, folder: &Path, tensors: impl FnOnce(&Writer) -> Result<()>) -> Result<()> {
        let (config, training) = (json(folder, &self.config)?, json(folder, &self.training)?);
        files(folder).replace(|files| {
            files.write(CONFIG, |file| file.write_all(&config))?;
            tensors(files)?;
            files.write(TRAINING, |file| file.write_all(&training))
        })
    }
}

impl Checkpoint {
    /// Completes a save that was interrupted after its third step, or removes the remains of one that was interrupted
    /// earlier; see [above](Self#files). Only other programs, which read the files by name, need it before reading.
    ///
    /// Errors: [`ErrorKind::Io`]; the checkpoint can be read as before.
    pub fn complete(folder: impl AsRef<Path>) -> Result<()> {
        files(folder.as_ref()).complete()
    }

    /// Returns `true` if a folder has any file of a checkpoint, readable or not.
    pub fn is_in(folder: impl AsRef<Path>) -> bool {
        // A file that cannot be examined counts as present.
        FILES.iter().any(|name| {
            !matches!(files(folder.as_ref()).read(name, found).map_err(Error::into_kind), Err(ErrorKind::File { .. }))
        })
    }

    /// Reads a checkpoint of a library model.
    ///
    /// Errors: [`ErrorKind::File`] for a missing file, a file with unexpected content, or files of different
    /// checkpoints; [`ErrorKind::Io`] if one cannot be read.
    pub fn load(folder: impl AsRef<Path>) -> Result<Self> {
        Self::load_as(folder)
    }

    /// Reads only the options of the model.
    ///
    /// Errors: those of [`Checkpoint::load`].
    pub fn load_config(folder: impl AsRef<Path>) -> Result<Config> {
        read_config(folder.as_ref())
    }

    /// Reads only the progress of the run.
    ///
    /// Errors: those of [`Checkpoint::load`].
    pub fn load_training(folder: impl AsRef<Path>) -> Result<TrainingState> {
        read_json(folder.as_ref(), TRAINING)
    }

    /// Reads only the options and the state dict of the model; the other two files are not needed.
    ///
    /// Errors: those of [`Checkpoint::load`].
    pub fn load_model(folder: impl AsRef<Path>) -> Result<(Config, BTreeMap<String, Tensor>)> {
        let folder = folder.as_ref();
        undisturbed(folder, || model(folder))
    }

    /// Reads the model like [`Checkpoint::load_model`], but with the averaged weights of a run that has them
    /// ([`TrainOptions::ema_decay`]), which its validation uses.
    ///
    /// Errors: those of [`Checkpoint::load`].
    pub fn load_averaged(folder: impl AsRef<Path>) -> Result<(Config, BTreeMap<String, Tensor>)> {
        let folder = folder.as_ref();
        undisturbed(folder, || {
            let (config, mut model) = model(folder)?;
            // A folder with only a config and weights is a model too.
            let has_training = files(folder).read(TRAINING, found).is_ok();
            if has_training && Self::load_training(folder)?.options.ema_decay.is_some() {
                let (optimizer, _) = files(folder).read(OPTIMIZER, read_with_metadata)?;
                let averages = optimizer
                    .into_iter()
                    .filter_map(|(name, value)| Some((name.strip_prefix(EMA)?.to_string(), value)));
                model.extend(averages);
            }
            Ok((config, model))
        })
    }
}

impl<C: DeserializeOwned> Checkpoint<C> {
    /// Reads the model of a checkpoint, with the averaged weights of a run that has them.
    pub(super) fn averaged(folder: &Path) -> Result<(C, BTreeMap<String, Tensor>)> {
        let Self { config, mut model, optimizer, .. } = Self::load_as(folder)?;
        let averages = optimizer.into_iter().filter_map(|(name, value)| Some((name.strip_prefix(EMA)?.into(), value)));
        model.extend(averages);
        Ok((config, model))
    }

    /// Reads a checkpoint whose model has options of this type.
    ///
    /// Errors: those of [`Checkpoint::load`].
    pub fn load_as(folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref();
        undisturbed(folder, || {
            let training = Checkpoint::load_training(folder)?;
            let tensors = |name| {
                files(folder).read(name, |path| {
                    let (tensors, metadata) = read_with_metadata(path)?;
                    let step = metadata.get("step");
                    ensure!(
                        step.is_none_or(|step| *step == training.step.to_string()),
                        Error::file(
                            path,
                            format_args!(
                                "is from step {}, but {TRAINING} is from step {}: the files belong to different \
                                 checkpoints",
                                step.map_or("", String::as_str),
                                training.step
                            )
                        )
                    );
                    Ok(tensors)
                })
            };
            let (config, model, optimizer) = (read_json(folder, CONFIG)?, tensors(MODEL)?, tensors(OPTIMIZER)?);
            Ok(Self { config, model, optimizer, training })
        })
    }
}

fn files(folder: &Path) -> FileSet<'_> {
    FileSet { folder, names: &FILES }
}

fn model(folder: &Path) -> Result<(Config, BTreeMap<String, Tensor>)> {
    let (model, _) = files(folder).read(MODEL, read_with_metadata)?;
    Ok((read_config(folder)?, model))
}

/// The class of models that learn preferences; their weights are those of the model whose options they have as
/// `config`.
pub(super) const DPO: &str = "DpoModel";

/// Classes of runs whose config is not that of a model that continues text.
const TASKS: [&str; 5] = ["Embedder", "MaskedLm", "ImageClassifier", "Captioner", "Classifier"];

fn read_config(folder: &Path) -> Result<Config> {
    let value: serde_json::Value = read_json(folder, CONFIG)?;
    let class = value.get("model").and_then(serde_json::Value::as_str).unwrap_or_default();
    let refused =
        |why: &str| Err(Error::file(folder.join(CONFIG), format_args!("is that of a run of `{class}`, {why}")));
    match class {
        "LoraModel" => return refused("an adapter of another model: read it with that model"),
        class if TASKS.contains(&class) => return refused("which does not continue text"),
        _ => {}
    }
    match config_of::<serde_json::Value>(folder, DPO)? {
        Some(value) => Config::from_value(value.get("config").cloned().unwrap_or_default())
            .map_err(|error| Error::file(folder.join(CONFIG), format_args!("is damaged: {error}"))),
        None => read_json(folder, CONFIG),
    }
}

/// Retries `read` if another process saved a checkpoint meanwhile: it may have read files of both.
fn undisturbed<R>(folder: &Path, read: impl Fn() -> Result<R>) -> Result<R> {
    // Unique to each checkpoint, within a run and across runs: it has all bits of the losses.
    let state = || files(folder).read(TRAINING, bytes).ok();
    let mut before = state();
    for _ in 0..RETRIES {
        let result = read();
        let after = state();
        if before == after {
            return result;
        }
        before = after;
    }
    Err(Error::file(folder, "is being replaced faster than it can be read"))
}

fn found(path: &Path) -> Result<()> {
    fs::metadata(path).map(drop).map_err(|source| Error::io(path, source))
}

fn bytes(path: &Path) -> Result<Vec<u8>> {
    read_limited(path, MAX_JSON)
}

fn json(folder: &Path, value: &impl Serialize) -> Result<Vec<u8>> {
    let mut text = serde_json::to_vec_pretty(value).map_err(|error| Error::io(folder, error.into()))?;
    text.push(b'\n');
    Ok(text)
}

/// Returns the options of the model in a folder, or `None` if its `model` is of another class.
pub(super) fn config_of<T: DeserializeOwned>(folder: &Path, class: &str) -> Result<Option<T>> {
    let value: serde_json::Value = undisturbed(folder, || read_json(folder, CONFIG))?;
    if value.get("model").and_then(serde_json::Value::as_str) != Some(class) {
        return Ok(None);
    }
    let damaged = |error| Error::file(folder.join(CONFIG), format_args!("is damaged: {error}"));
    serde_json::from_value(value).map(Some).map_err(damaged)
}

fn read_json<T: DeserializeOwned>(folder: &Path, name: &str) -> Result<T> {
    files(folder).read(name, |path| {
        serde_json::from_slice(&bytes(path)?).map_err(|error| Error::file(path, format_args!("is damaged: {error}")))
    })
}
