//! Models that `xt train` trains, and what is particular to each kind.

use std::path::Path;

use clap::ValueEnum;
use indicatif::HumanCount;
use x_transformers::{
    Result as LibraryResult,
    config::LayersPlan,
    models::AutoregressiveWrapper,
    train::{Classifier, ClassifierConfig, LoraModel, TokenBatch, TrainModel, Trainer, accuracy, macro_f1, spearman},
};

use super::data::{About, Data, DataArgs, Own};
use crate::failure::{Failure, Result};

/// Task that a model learns.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Kind {
    /// Predict each token of a text from those before it
    Lm,
    /// Predict the class of a text
    Classify,
    /// Predict a number for a text
    Regress,
    /// Embed texts so that those that belong together are near
    Embed,
    /// Predict masked tokens of texts
    Mlm,
    /// Prefer one of two answers (direct preference optimization)
    Dpo,
    /// Predict the class of an image
    Image,
    /// Predict a text from another one
    Seq2seq,
    /// Predict the caption of an image
    Caption,
}

/// Model that `xt train` trains.
pub trait Task: TrainModel + Sized {
    /// Predictions on the validation set, from which its scores are computed.
    type Seen: Default;

    /// `true` if [`Task::see`] collects scores beside the loss.
    const SEES: bool = true;

    /// Opens the data of a run whose checkpoint is in a folder.
    fn data(args: &DataArgs, own: Option<Own>, checkpoint: &Path) -> Result<Data<Self::Batch>>;

    /// The model's layers.
    fn layers(&self) -> &LayersPlan;

    /// The model that generates text.
    fn generator(&self) -> Option<&AutoregressiveWrapper> {
        None
    }

    /// Describes what is trained.
    fn describe(trainer: &Trainer<Self>) -> String {
        format!("{} parameters", HumanCount(trainer.params().numel() as u64))
    }

    /// Arguments of the command that uses a run in this folder, if it is particular to the task.
    fn hint(_dir: &str, _about: &About) -> Option<String> {
        None
    }

    /// Adds the predictions for a batch of the validation set.
    fn see(&self, _batch: &Self::Batch, _seen: &mut Self::Seen) -> LibraryResult<()> {
        Ok(())
    }

    /// Scores of the validation set beside the loss.
    fn scores(&self, _seen: Self::Seen, _loss: f64) -> Vec<(&'static str, f64)> {
        Vec::new()
    }
}

impl Task for AutoregressiveWrapper {
    type Seen = ();

    const SEES: bool = false;

    fn data(args: &DataArgs, own: Option<Own>, _: &Path) -> Result<Data<TokenBatch>> {
        args.open(own)
    }

    fn layers(&self) -> &LayersPlan {
        &self.net.plan().layers
    }

    fn generator(&self) -> Option<&AutoregressiveWrapper> {
        Some(self)
    }
}

impl Task for LoraModel {
    type Seen = ();

    const SEES: bool = false;

    fn data(args: &DataArgs, own: Option<Own>, _: &Path) -> Result<Data<TokenBatch>> {
        args.open(own)
    }

    fn layers(&self) -> &LayersPlan {
        &self.net.plan().layers
    }

    fn generator(&self) -> Option<&AutoregressiveWrapper> {
        Some(self)
    }

    fn describe(trainer: &Trainer<Self>) -> String {
        let adapter = trainer.model().adapter();
        let (rank, layers) = (adapter.options().r, adapter.places().len());
        let trained = HumanCount(trainer.params().numel() as u64);
        let kind = if adapter.options().use_dora { "DoRA" } else { "LoRA" };
        format!("{trained} parameters of {kind} of rank {rank} on {layers} layers, the others frozen")
    }
}

impl Task for Classifier {
    /// Logits and labels.
    type Seen = [Vec<f64>; 2];

    fn data(args: &DataArgs, own: Option<Own>, checkpoint: &Path) -> Result<Data<Self::Batch>> {
        let missing = || Failure::new("has no tokenizer").within(checkpoint);
        let (Some(config), Some(own)) = (ClassifierConfig::read(checkpoint)?, own) else { return Err(missing()) };
        let classes = Some(&config.labels[..]).filter(|labels| !labels.is_empty());
        Ok(args.labelled(own, classes)?.0)
    }

    fn layers(&self) -> &LayersPlan {
        &self.net().plan().layers
    }

    fn see(&self, batch: &Self::Batch, [predicted, labels]: &mut Self::Seen) -> LibraryResult<()> {
        predicted.extend(self.logits(&batch.tokens, &batch.mask)?.to_f64_vec()?);
        labels.extend(batch.labels.to_f64_vec()?);
        Ok(())
    }

    fn scores(&self, [predicted, labels]: Self::Seen, _: f64) -> Vec<(&'static str, f64)> {
        let classes = self.config().labels.len();
        if classes == 0 {
            return vec![("spearman", spearman(&predicted, &labels))];
        }
        let best = |row: &[f64]| (0..row.len()).max_by(|&one, &other| row[one].total_cmp(&row[other])).unwrap_or(0);
        let predicted: Vec<usize> = predicted.chunks_exact(classes).map(best).collect();
        let labels: Vec<usize> = labels.into_iter().map(|label| label as usize).collect();
        vec![("accuracy", accuracy(&predicted, &labels)), ("f1", macro_f1(&predicted, &labels))]
    }
}
