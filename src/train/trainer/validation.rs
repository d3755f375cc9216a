//! Validation of a run.

use super::{Command, Trainer, lower};
use crate::{
    Error, ErrorKind, Result,
    collect::CollectVec,
    error::ensure,
    train::{Batch, Losses, TrainModel},
};

impl<M: TrainModel> Trainer<M> {
    /// Returns the batches of the validation set, on the device of the run.
    ///
    /// Errors: those of [`BatchSource::validation_batches`](crate::train::BatchSource::validation_batches); out of
    /// memory.
    pub fn validation_batches(&self) -> Result<Vec<M::Batch>> {
        let request = self.options.request(0, 0, M::num_tokens(&self.config));
        let batches = self.data.source().validation_batches(&request)?;
        batches.iter().map(|batch| batch.to_device(&self.device)).try_collect_vec()
    }

    /// Computes the mean loss over the validation set of the source, in nats per token, without dropout and, with
    /// `ema_decay`, with the averaged weights.
    ///
    /// Errors: those of [`BatchSource::validation_batches`](crate::train::BatchSource::validation_batches);
    /// [`ErrorKind::NonFinite`]; out of memory.
    pub fn validate(&self) -> Result<f64> {
        self.lead(Command::Validate)?;
        let request = self.options.request(0, 0, M::num_tokens(&self.config));
        let batches = self.data.source().validation_batches(&request)?;
        let weights: f64 = batches.iter().map(Batch::weight).sum();
        ensure!(weights > 0.0, Error::argument("data", "no target of the validation set counts"));
        let total = self.evaluate(|model| {
            let counted = batches.iter().filter(|batch| batch.weight() > 0.0).collect_vec();
            let one = |at: usize| Ok(model.loss(&counted[at].to_device(&self.device)?)?.item()? * counted[at].weight());
            Ok(self.shared(counted.len(), one)?.into_iter().fold(0.0, |total, loss| total + loss))
        })?;
        let loss = total / weights;
        ensure!(
            loss.is_finite(),
            Error::new(ErrorKind::NonFinite { step: self.step, what: "validation loss".to_string() })
        );
        let losses = self.losses.get();
        let improved = losses.best_validation.is_none_or(|best| loss < best);
        self.losses.set(Losses {
            last_validation: Some(loss),
            best_validation: lower(losses.best_validation, loss),
            since_best: if improved { 0 } else { losses.since_best + 1 },
            ..losses
        });
        Ok(loss)
    }

    /// Calls `f` with the weights for inference: with `ema_decay` the averaged ones, which the parameters hold until
    /// `f` returns.
    ///
    /// Errors: those of `f`; out of memory.
    pub fn evaluate<R>(&self, f: impl FnOnce(&M) -> Result<R>) -> Result<R> {
        let _swapped = self.ema.as_ref().map(|ema| ema.swap_in(&self.params)).transpose()?;
        f(&self.model)
    }
}
