//! Validation of a run.

use super::{Command, Trainer, lower};
use crate::{
    Error, ErrorKind, Result,
    collect::CollectVec,
    error::ensure,
    train::{Batch, Losses, TrainModel},
};

/// Function that takes the batches of a validation, with the model.
type Each<'e, M> = &'e mut dyn FnMut(&M, &<M as TrainModel>::Batch) -> Result<()>;

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
        self.validate_with(None)
    }

    /// Computes [`Trainer::validate`] and calls `each` with the model and every batch of the validation set, on the device of
    /// the run, for metrics of your own; not again after an error. Each batch is built once, and image sources hold one at a
    /// time. Of several ranks, those that give an `each` have it called with the batches of all.
    ///
    /// Errors: those of [`Trainer::validate`] and of `each`.
    pub fn validate_each(&self, each: &mut dyn FnMut(&M, &M::Batch) -> Result<()>) -> Result<f64> {
        self.validate_with(Some(each))
    }

    fn validate_with(&self, mut each: Option<Each<M>>) -> Result<f64> {
        self.lead(Command::Validate)?;
        let request = self.options.request(0, 0, M::num_tokens(&self.config));
        // Batches with targets, their weights, and the losses of those that are this rank's.
        let (mut count, mut weights, mut mine, mut failed) = (0, 0.0, Vec::new(), None);
        self.evaluate(|model| {
            self.data.source().each_validation_batch(&request, &mut |batch| {
                let weight = batch.weight();
                let (counts, is_mine) = (weight > 0.0, self.is_mine(count));
                if counts && is_mine || each.is_some() {
                    let batch = batch.to_device(&self.device)?;
                    if counts && is_mine {
                        mine.push(model.loss(&batch)?.item()? * weight);
                    }
                    // The loss says more about a run that has diverged, and other ranks wait for it.
                    if let (Some(each), None) = (&mut each, &failed) {
                        failed = each(model, &batch).err();
                    }
                }
                count += usize::from(counts);
                weights += weight;
                Ok(())
            })
        })?;
        ensure!(weights > 0.0, Error::argument("data", "no target of the validation set counts"));
        let loss = self.gathered(count, mine)?.into_iter().fold(0.0, |total, loss| total + loss) / weights;
        ensure!(
            loss.is_finite(),
            Error::new(ErrorKind::NonFinite { step: self.step, what: "validation loss".to_string() })
        );
        failed.map_or(Ok(()), Err)?;
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
