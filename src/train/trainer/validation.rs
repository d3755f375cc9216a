//! Validation of a run.

use super::{Command, Trainer, lower};
use crate::{
    Error, ErrorKind, Result,
    collect::CollectVec,
    error::ensure,
    train::{Batch, Losses, TrainModel, blocks::Pass},
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
    /// time. Of several ranks, those that give an `each` have it called with the batches of all; in stage 3 of ZeRO all weights
    /// are then gathered on each rank.
    ///
    /// Errors: those of [`Trainer::validate`] and of `each`.
    pub fn validate_each(&self, each: &mut dyn FnMut(&M, &M::Batch) -> Result<()>) -> Result<f64> {
        self.validate_with(Some(each))
    }

    fn validate_with(&self, mut each: Option<Each<M>>) -> Result<f64> {
        self.is_whole()?;
        self.lead(Command::Validate)?;
        let request = self.options.request(0, 0, M::num_tokens(&self.config));
        // Batches with targets, their weights, and the losses of those that are this rank's.
        let (mut count, mut weights, mut mine, mut failed) = (0, 0.0, Vec::new(), None);
        let blocks = self.ranks.blocks.clone();
        // All weights for the functions of callers; else those of a layer at a time, in passes that all ranks run.
        let blocks = match blocks {
            Some(blocks) if !self.any(each.is_some())? => Some(blocks),
            _ => None,
        };
        let loss_of = |model: &M, batch: &M::Batch| {
            let pass = blocks.as_ref().map(|blocks| blocks.pass(Pass::Validate));
            let loss = model.loss(batch)?.item()?;
            pass.map_or(Ok(loss), |pass| pass.end().map(|()| loss))
        };
        let mut spare = None;
        self.with_averages(blocks.is_none(), |model| {
            self.data.source().each_validation_batch(&request, &mut |batch| {
                let weight = batch.weight();
                let (counts, is_mine) = (weight > 0.0, self.is_mine(count));
                if counts && is_mine || each.is_some() {
                    let batch = batch.to_device(&self.device)?;
                    if counts && is_mine {
                        mine.push(loss_of(model, &batch)? * weight);
                    }
                    // The loss says more about a run that has diverged, and other ranks wait for it.
                    if let (Some(each), None) = (&mut each, &failed) {
                        failed = each(model, &batch).err();
                    }
                }
                count += usize::from(counts);
                weights += weight;
                if counts && blocks.is_some() {
                    spare = Some(batch);
                }
                Ok(())
            })?;
            match spare.filter(|_| self.is_short_of(count)) {
                // The other ranks gather the weights of a last batch of their own.
                Some(batch) => loss_of(model, &batch.to_device(&self.device)?).map(drop),
                None => Ok(()),
            }
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
    /// `f` returns. All ranks call it together, or all but rank 0 follow, if [`zero`](super::RankOptions::zero) divides
    /// the averages or the weights, which are then gathered as a whole on each rank that does not follow.
    ///
    /// Errors: those of `f`; out of memory; a failed transfer.
    pub fn evaluate<R>(&self, f: impl FnOnce(&M) -> Result<R>) -> Result<R> {
        self.is_whole()?;
        if self.gathers() {
            self.lead(Command::Evaluate)?;
        }
        self.with_averages(true, f)
    }

    /// `whole`: if `true`, all weights are here.
    fn with_averages<R>(&self, whole: bool, f: impl FnOnce(&M) -> Result<R>) -> Result<R> {
        let _swapped = self.swap_in()?;
        let blocks = self.ranks.blocks.as_ref().filter(|_| whole);
        let _opened = blocks.map(|blocks| blocks.open(true)).transpose()?;
        f(&self.model)
    }
}
