//! Steps of a run: one by one, or as recorded graphs that are enqueued one step ahead.

use std::mem;

use super::{
    Command, Trainer,
    graphs::{Enqueued, Settled},
    lower,
    ranks::Part,
};
use crate::{
    DType, Error, ErrorKind, Gradients, Result, Tape, Tensor,
    error::ensure,
    train::{
        Batch, GradScaler, Losses, StepInfo, StepReport, TrainModel, TrainOptions,
        blocks::{Pass, Passing},
        random::tape_seed,
    },
};

impl<M: TrainModel> Trainer<M> {
    /// Runs one step, which updates the weights; in f16 it occasionally skips the update while it searches for the
    /// scale of the loss. [`Trainer::run`] waits less for a GPU.
    ///
    /// Errors, with the weights unchanged: [`ErrorKind::NonFinite`] with the step, and the parameter if one is the
    /// cause, for a loss or a gradient that is NaN or infinite; out of memory.
    pub fn step(&mut self) -> Result<StepReport> {
        let mut last = None;
        let each = &mut |report: &StepReport| {
            last = Some(*report);
            true
        };
        self.run(self.step.saturating_add(1), each)?;
        last.ok_or_else(|| Error::option("steps", "no step is left"))
    }

    /// Runs steps until `until` are done, and calls `each` with the report of each; no further step begins after it returns
    /// `false`. With the same bits as [`Trainer::step`].
    ///
    /// Where steps are recorded as a graph ([`Trainer::set_graphs`]), a step is enqueued before the report of the step
    /// before it is read, so that a GPU does not wait for the processor: that step still runs, and is reported, if `each`
    /// returns `false`. Nothing is pending when this returns.
    ///
    /// Errors: those of [`Trainer::step`], with the weights after the last step that was reported.
    ///
    /// ```
    /// # use x_transformers::{prelude::*, train::{ByteText, TrainOptions, Trainer}};
    /// # fn main() -> x_transformers::Result<()> {
    /// # let net = TransformerWrapperConfig::new(256, 16, AttentionLayersConfig::decoder(16, 1));
    /// # let config = AutoregressiveConfig { net, ..Default::default() };
    /// # let options = TrainOptions { seq_len: 16, batch_size: 2, ..Default::default() };
    /// # let text = ByteText::from_bytes("It was the best of times. ".repeat(20))?;
    /// let mut trainer = Trainer::new(config, options, text, &Device::best())?;
    /// trainer.run(10, &mut |report| {
    ///     println!("{}: {}", report.step, report.loss);
    ///     report.step < 4
    /// })?;
    /// assert!((5..=6).contains(&trainer.steps_done()));
    /// # Ok(())
    /// # }
    /// ```
    pub fn run(&mut self, until: u64, each: &mut dyn FnMut(&StepReport) -> bool) -> Result<()> {
        if self.is_whole().is_err() {
            self.materialize(&self.model.frozen_params())?;
        }
        let (mut pending, mut ready, mut goes) = (None, Vec::new(), true);
        loop {
            let wanted = goes && self.step + u64::from(pending.is_some()) < until;
            let next = if wanted { self.enqueue(pending.as_ref(), mem::take(&mut ready)).map(Some) } else { Ok(None) };
            if let Some(before) = pending.take() {
                match self.settle(before)? {
                    Settled::Done(report) => goes &= each(&report),
                    Settled::Again(batches) => {
                        // The step enqueued after it has changed nothing either. Its batches are kept: a source that is
                        // read in order would begin anew to give them again.
                        ready = next.ok().flatten().map_or_else(Vec::new, Enqueued::into_batches);
                        let report = self.eager_step_with_room(batches)?;
                        goes &= each(&report);
                        continue;
                    }
                }
            }
            match next {
                // Of a step that nobody wants any more.
                Err(_) if !goes => return Ok(()),
                Err(error) => return Err(error),
                Ok(Some(Enqueued::Replayed(next))) => pending = Some(next),
                Ok(Some(Enqueued::Eager(batches))) if goes => {
                    let report = self.eager_step_with_room(batches)?;
                    goes &= each(&report);
                }
                Ok(_) => return Ok(()),
            }
        }
    }

    /// Runs one step without a graph, and once more without the memory of one if there is too little.
    fn eager_step_with_room(&mut self, batches: Vec<M::Batch>) -> Result<StepReport> {
        self.release_shared()?;
        match self.eager_step(batches) {
            Err(error) if matches!(error.kind(), ErrorKind::OutOfMemory { .. }) && self.free_graph() => {
                self.eager_step(Vec::new())
            }
            done => done,
        }
    }

    /// Runs one step without a graph. `batches`: those of the step on the device, or none, which are then built.
    fn eager_step(&mut self, batches: Vec<M::Batch>) -> Result<StepReport> {
        self.lead(Command::Step)?;
        self.ranks.reset();
        let TrainOptions { batch_size, accumulate, seed, .. } = self.options;
        let scale = self.scaler.as_ref().map_or(1.0, GradScaler::scale);
        let mut losses = Vec::new();
        let (mut grads, mut last) = (Gradients::default(), None);
        let mut ready = batches.into_iter();
        for micro in self.micros() {
            let batch = match ready.next() {
                Some(batch) => batch,
                None => self.batch(self.step, micro)?.to_device(&self.device)?,
            };
            // 1 unless targets are masked: then each counts alike, in whichever batch it is.
            let weight = batch.weight() / batch_size as f64;
            if weight == 0.0 {
                if last.is_none() {
                    last = self.stand_in()?;
                }
                self.skip_round(last.as_ref())?;
                losses.push(None);
                continue;
            }
            let mut tape = Tape::train(tape_seed(seed, self.step, micro));
            let blocks = self.ranks.blocks.clone();
            let pass = blocks.as_ref().map(|blocks| blocks.pass(Pass::Train));
            let output = self.loss(&batch)?;
            let start = Tensor::full(*output.shape(), scale * weight, output.dtype(), output.device())?;
            if let Some(mut part) = self.backward(&mut tape, &output, &start)? {
                if accumulate > 1 {
                    widen(&mut part)?;
                }
                grads.accumulate(part)?;
            }
            pass.map_or(Ok(()), Passing::end)?;
            losses.push(Some((output.detach(), weight, batch.targets())));
            last = Some(batch);
        }
        // Read after all passes are enqueued: a GPU does not wait for the processor in between.
        let part = self.sum(&losses, &mut grads, last.as_ref())?;
        ensure!(part.weight > 0.0, self.no_target());
        let mean = 1.0 / part.weight;
        if !(part.loss * mean).is_finite() {
            return Err(self.diverged(&grads));
        }
        let lr = self.options.schedule().at(self.step);
        // The pass that updates the weights takes the mean over the micro-batches.
        let info = self.update(&grads, mean / scale, lr)?;
        Ok(self.count(part, info.map(|info| info.grad_norm), lr))
    }

    /// Counts a step that is done. `norm`: that of the gradients, or `None` if the update was skipped.
    pub(super) fn count(&mut self, part: Part, norm: Option<f64>, lr: f64) -> StepReport {
        let loss = part.loss * (1.0 / part.weight);
        let report = StepReport {
            step: self.step,
            loss,
            grad_norm: norm.unwrap_or(f64::INFINITY),
            lr,
            tokens: part.targets,
            skipped: norm.is_none(),
            loss_scale: self.scaler.as_ref().map_or(1.0, GradScaler::scale),
        };
        self.step += 1;
        let losses = self.losses.get();
        self.losses.set(Losses { last: Some(loss), best: lower(losses.best, loss), ..losses });
        report
    }

    /// Computes the loss of a batch as the options say.
    fn loss(&self, batch: &M::Batch) -> Result<Tensor> {
        loss(&self.model, batch, self.options.recompute)
    }

    /// Returns the batch of a micro-step, while those after it are being prepared.
    pub(super) fn batch(&mut self, step: u64, micro: u64) -> Result<M::Batch> {
        let Self { options, data, config, ranks, .. } = self;
        let (accumulate, num_tokens) = (options.accumulate as u64, M::num_tokens(config));
        let first = step * accumulate + micro;
        let request = |index: u64| options.request(index / accumulate, index % accumulate, num_tokens);
        // None after the last step; a run may be told to go on, and waits for its first batch then.
        let end = (options.steps * accumulate).max(first + 1);
        data.batch(request(first), (first + 1..end).filter(|&index| ranks.has(index % accumulate)).map(request))
    }

    /// Updates the weights and their average, or returns `None` without an update if a smaller scale of the loss may
    /// help.
    fn update(&mut self, grads: &Gradients, scale: f64, lr: f64) -> Result<Option<StepInfo>> {
        let info = match self.optimizer.step_scaled(&self.params, grads, scale, lr, Some(self.options.clip)) {
            Ok(info) => info,
            Err(error) => {
                let ErrorKind::NonFinite { what, .. } = error.kind() else { return Err(error) };
                let what = what.clone();
                return match &mut self.scaler {
                    Some(scaler) if scaler.can_back_off() => {
                        scaler.update(false);
                        Ok(None)
                    }
                    _ => Err(Error::new(ErrorKind::NonFinite { step: self.step, what })),
                };
            }
        };
        if let Some(scaler) = &mut self.scaler {
            scaler.update(true);
        }
        self.average()?;
        Ok(Some(info))
    }
}

/// Computes the loss of a batch.
pub(super) fn loss<M: TrainModel>(model: &M, batch: &M::Batch, recompute: bool) -> Result<Tensor> {
    if recompute { model.loss_recomputed(batch) } else { model.loss(batch) }
}

/// Converts gradients of half types to f32, in which micro-batches are summed.
pub(super) fn widen(grads: &mut Gradients) -> Result<()> {
    for grad in grads.tensors_mut() {
        if matches!(grad.dtype(), DType::BF16 | DType::F16) {
            *grad = grad.to_dtype(DType::F32)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Device,
        config::{AttentionLayersConfig, AutoregressiveConfig, TransformerWrapperConfig},
        models::ForwardOptions,
        train::ByteText,
    };

    /// Gradients that are not finite at any scale are finally an error, with the weights unchanged.
    #[test]
    fn trainer_gives_up_scaling() -> Result<()> {
        let attn_layers = AttentionLayersConfig::decoder(8, 1);
        let net = TransformerWrapperConfig { num_tokens: 128, max_seq_len: 8, attn_layers, ..Default::default() };
        let options = TrainOptions { dtype: DType::F16, seq_len: 8, ..Default::default() };
        let text = ByteText::from_bytes("abcdefgh ".repeat(20))?;
        let config = AutoregressiveConfig { net, ..Default::default() };
        let mut trainer = Trainer::new(config, options, text, &Device::Cpu)?;
        let tokens = trainer.batch(0, 0)?.tokens;
        let mut tape = Tape::grad();
        let mut grads = tape.backward(&trainer.model.loss(&tokens, &ForwardOptions::default())?)?;
        for grad in grads.tensors_mut() {
            *grad = grad.affine(f64::NAN, 0.0)?;
        }
        let values = |trainer: &Trainer| -> Result<Vec<Vec<f64>>> {
            trainer.params.iter().map(|(_, param)| param.tensor().to_f64_vec()).collect()
        };
        let before = values(&trainer)?;
        for halved in 1..=16 {
            assert_eq!(trainer.update(&grads, 1.0, 0.1)?, None);
            assert_eq!(trainer.grad_scaler().map(GradScaler::scale), Some(2f64.powi(16 - halved)));
        }
        assert!(matches!(
            trainer.update(&grads, 1.0, 0.1).map_err(Error::into_kind),
            Err(ErrorKind::NonFinite { step: 0, .. })
        ));
        assert_eq!(values(&trainer)?, before);
        Ok(())
    }
}
