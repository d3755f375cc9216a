//! The steps of a run, and everything that is written about them.

use std::time::{Duration, Instant};

use x_transformers::{
    Device,
    io::write_atomically,
    models::GenerateOptions,
    train::{Checkpoint, StepReport, TrainOptions, Trainer},
};

use super::{data::About, task::Task};
use crate::{
    events::{self, Events},
    failure::{Failure, Result},
    files::{Run, quoted},
    interrupt,
    metrics::{Metrics, Target},
    plot::Chart,
    profiler::Profiler,
    progress::{Progress, duration},
    replacement, sample,
    stored::{StoredTokenizer, remove_others},
    typed,
};

/// Bytes of the samples along the way, and of the last one.
const SAMPLE: usize = 96;
const LAST_SAMPLE: usize = 384;

/// Steps after which the first validations come.
const EARLY: [u64; 6] = [1, 2, 5, 10, 20, 50];

/// The name of the baseline.
const ORDER_2: &str = "order-2 model";

/// A run and everything that is written about it.
pub struct Training<'a, T: Task> {
    pub run: Run,
    pub trainer: Trainer<T>,
    pub metrics: Metrics,
    pub events: Option<Events>,
    pub progress: Progress,
    pub device: Device,
    /// Tokenizer, sizes and units of the data; without a tokenizer or bytes the run has no samples.
    pub about: About,
    /// Watches the steps; between them are validation and samples.
    pub profiler: Profiler<'a>,
}

impl<T: Task> Training<'_, T> {
    pub fn introduce(&mut self) {
        let options = self.trainer.options().clone();
        let layers = self.trainer.model().layers();
        let attention = layers.layers.iter().find_map(|layer| layer.branch.attention());
        let attention = attention.map_or(String::new(), |plan| format!(", {plan}"));
        let (described, count, dim) = (T::describe(&self.trainer), layers.layers.len(), layers.dim);
        let model = format!("{described}, {count} sublayers of width {dim}{attention}");
        let batch = options.batch_size * options.accumulate;
        let done = match self.trainer.steps_done() {
            0 => String::new(),
            done => format!(", {done} already done"),
        };
        self.progress.say(format_args!("model       {model}"));
        let (name, tokens) = if self.about.baseline.is_some() { ("text", "bytes") } else { ("data", "tokens") };
        let text = &self.about.line;
        self.progress.say(format_args!("{name:<11} {text}"));
        if let Some(baseline) = self.about.baseline {
            self.progress.say(format_args!("baseline    {baseline:.3} bits/byte, {ORDER_2}"));
        }
        self.progress.say(format_args!("device      {}, {}", self.device, options.dtype));
        if let Some(ranks) = self.trainer.ranks() {
            self.progress.say(format_args!("ranks       {}", ranks.size()));
        }
        let each = match self.about.target {
            Target::Token | Target::Masked => format!("{batch} x {} {tokens}", options.seq_len),
            Target::Pair | Target::Score => format!("{batch} pairs of at most {} tokens a text", options.seq_len),
            Target::Image => format!("{batch} images"),
            Target::Class | Target::Value => format!("{batch} texts of at most {} tokens", options.seq_len),
        };
        self.progress.say(format_args!("steps       {}{done}, each {each}", options.steps));
        self.progress.say(format_args!("folder      {}\n", self.run.dir.display()));
    }

    pub fn all_steps(&mut self) -> Result<()> {
        let TrainOptions { steps, every, .. } = *self.trainer.options();
        match self.trainer.steps_done() {
            0 => self.milestone(steps == 0)?,
            // The run may have been killed between the two checkpoints.
            _ => self.keep_best()?,
        }
        let mut said = 0;
        while self.trainer.steps_done() < steps && !self.has_stopped() {
            if interrupt::asked() {
                self.trainer.ask_to_stop();
            }
            self.steps_until(self.next_stop())?;
            for reason in &self.trainer.eager_reasons()[said..] {
                self.progress.say(format_args!("note        {reason}"));
            }
            said = self.trainer.eager_reasons().len();
            let done = self.trainer.steps_done();
            let saves = done.is_multiple_of(every) || done == steps;
            if saves || EARLY.contains(&done) && done < every {
                self.milestone(saves)?;
            }
            if (interrupt::asked() || self.trainer.asked_to_stop()) && done < steps {
                return self.interrupted(saves);
            }
        }
        Ok(())
    }

    /// Returns the number of steps after which something else than a step comes: a validation, a checkpoint or the end. Ranks
    /// and profiles take each step by itself.
    fn next_stop(&self) -> u64 {
        let TrainOptions { steps, every, .. } = *self.trainer.options();
        let done = self.trainer.steps_done();
        if self.trainer.ranks().is_some() || self.profiler.is_on() {
            return done + 1;
        }
        let early = EARLY.into_iter().find(|&early| early > done && early < every);
        let stop = steps.min((done / every + 1).saturating_mul(every));
        early.map_or(stop, |early| early.min(stop))
    }

    /// Runs steps, and writes about each.
    fn steps_until(&mut self, until: u64) -> Result<()> {
        let Self { trainer, metrics, events, progress, profiler, .. } = self;
        let (steps, mut clock, mut written) = (trainer.options().steps, Instant::now(), Ok(()));
        let mut each = |report: &StepReport| {
            let took = std::mem::replace(&mut clock, Instant::now()).elapsed().max(Duration::from_nanos(1));
            let speed = report.tokens as f64 / took.as_secs_f64();
            let done = report.step + 1;
            // One more step may come after the first failure.
            if written.is_ok() {
                written = metrics.train(report.step, report.loss, report.lr, speed).and_then(|()| {
                    let curves = [("loss/train", report.loss), ("lr", report.lr), ("speed", speed)];
                    let mut events = events.iter_mut();
                    events.try_for_each(|to| curves.iter().try_for_each(|&(tag, value)| to.scalar(done, tag, value)))
                });
            }
            progress.step(done, report.loss, speed);
            if report.skipped {
                let scale = report.loss_scale;
                progress.say(format_args!("step {done}/{steps}  skipped: gradients overflow; loss scale now {scale}"));
            }
            written.is_ok() && !interrupt::asked()
        };
        let ran = profiler.watch(|| trainer.run(until, &mut each));
        written.map_err(|failure| self.unsaved(failure))?;
        Ok(ran??)
    }

    /// Returns `true` once the loss has not become lower for as long as the options say. That is at a checkpoint, where a
    /// resumed run stops too.
    fn has_stopped(&self) -> bool {
        let TrainOptions { every, patience, .. } = *self.trainer.options();
        let done = self.trainer.steps_done();
        done > 0 && done.is_multiple_of(every) && patience.is_some_and(|most| self.trainer.losses().since_best >= most)
    }

    /// Ends a run after Ctrl-C, with its last step saved.
    fn interrupted(&mut self, saved: bool) -> Result<()> {
        if !saved {
            self.save().map_err(|failure| self.unsaved(failure))?;
        }
        self.progress.finish();
        let (xt, dir, done) = (typed::program(), quoted(&self.run.dir), self.trainer.steps_done());
        Err(Failure::new(format_args!(
            "interrupted after step {done}, which is saved; `{xt} train --resume {dir}` with the same data continues"
        )))
    }

    /// Saves the best checkpoint, if it is kept and the last validation is the best one.
    fn keep_best(&self) -> Result<()> {
        let losses = self.trainer.losses();
        let is_best = losses.since_best == 0 && losses.last_validation.is_some();
        let best = self.run.best();
        let state = self.trainer.state();
        let known = || Checkpoint::load_training(&best).is_ok_and(|saved| saved == state);
        if !self.trainer.options().keep_best || !is_best || known() {
            return Ok(());
        }
        if let Some(name) = &state.tokenizer {
            StoredTokenizer::read(&self.run.checkpoint().join(name))?.write(&best.join(name))?;
        }
        self.trainer.save(&best)?;
        remove_others(&best, state.tokenizer.as_deref());
        Ok(())
    }

    /// Validates and, if there is something new, samples and saves.
    fn milestone(&mut self, save: bool) -> Result<()> {
        let done = self.trainer.steps_done();
        let mut seen = T::Seen::default();
        let loss = if T::SEES {
            self.trainer.validate_each(&mut |model, batch| model.see(batch, &mut seen))?
        } else {
            self.trainer.validate()?
        };
        let written = self.metrics.validation(done, loss);
        written.map_err(|failure| self.unsaved(failure))?;
        self.event(done, &[("loss/validation", loss)])?;
        let steps = self.trainer.options().steps;
        let mut line = format!("step {done}/{steps}  validation loss {}", self.about.unit().show(loss));
        for (name, score) in self.trainer.model().scores(seen, loss) {
            let written = self.metrics.score(done, name, score);
            written.map_err(|failure| self.unsaved(failure))?;
            self.event(done, &[(name, score)])?;
            line += &format!("  {name} {score:.4}");
        }
        if !save {
            self.progress.say(line);
            return Ok(());
        }
        self.save().and_then(|()| self.keep_best()).map_err(|failure| self.unsaved(failure))?;
        let sample = if done < steps { self.sample(SAMPLE)? } else { None };
        let sample = sample.map_or(String::new(), |sample| format!("\n{sample}"));
        self.progress.say(format_args!("{line}  saved{sample}"));
        Ok(())
    }

    /// Adds values of curves to the event file, if there is one.
    fn event(&mut self, step: u64, curves: &[(&str, f64)]) -> Result<()> {
        let Some(events) = &mut self.events else { return Ok(()) };
        let written = curves.iter().try_for_each(|&(tag, value)| events.scalar(step, tag, value));
        written.map_err(|failure| self.unsaved(failure))
    }

    /// Saves the checkpoint, with the rows up to it on the disk, and draws the picture.
    fn save(&mut self) -> Result<()> {
        let checkpoint = self.run.checkpoint();
        match self.metrics.held() {
            None => {
                self.metrics.sync()?;
                self.trainer.save(checkpoint)?;
            }
            Some(rows) => {
                let saved = replacement::announce(&self.run, &self.trainer.state(), rows)
                    .and_then(|()| Ok(self.trainer.save(checkpoint)?));
                if let Err(failure) = saved {
                    // The first error counts; who opens the folder next settles it too.
                    let _ = replacement::settle(&self.run);
                    return Err(failure);
                }
                self.metrics.place()?;
                if !self.trainer.options().keep_best {
                    replacement::remove_best(&self.run)?;
                }
                events::remove_others(&self.run.dir, self.events.as_ref());
                replacement::remove(&self.run)?;
            }
        }
        remove_others(&self.run.checkpoint(), self.trainer.state().tokenizer.as_deref());
        self.draw()
    }

    /// Adds the remedy to the failure of a save.
    pub fn unsaved(&self, failure: Failure) -> Failure {
        if Checkpoint::load_training(self.run.checkpoint()).is_err() {
            return failure;
        }
        let dir = quoted(&self.run.dir);
        failure.advising(format_args!(
            "the last checkpoint is intact; `{} train --resume {dir}` continues from it",
            typed::program()
        ))
    }

    pub fn draw(&self) -> Result<()> {
        let reference = self.about.baseline.map(|baseline| (ORDER_2, baseline));
        let Metrics { train, validation, .. } = &self.metrics;
        let chart = Chart { unit: self.about.unit().name(), train, validation, reference };
        let svg = chart.svg();
        Ok(write_atomically(self.run.plot(), |file| file.write_all(svg.as_bytes()))?)
    }

    /// Text of the model, if the meaning of its tokens is known.
    fn sample(&self, length: usize) -> Result<Option<String>> {
        let About { language, prompt, chats, .. } = &self.about;
        let Some(language) = language.as_ref().filter(|_| !prompt.is_empty()) else { return Ok(None) };
        let seed = self.trainer.options().seed;
        let mut ends = language.ends().to_vec();
        ends.extend(language.end_of_turn().filter(|_| *chats));
        let options = GenerateOptions { seed, eos_tokens: ends, eos_in_prompt: false, ..Default::default() };
        // Tokens are longer than bytes.
        let length = if language.tokenizer().is_some() { length / 2 } else { length };
        if self.trainer.model().generator().is_none() {
            return Ok(None);
        }
        let block = |model: &T| {
            Ok(model.generator().map(|model| sample::block(model, language, prompt, length, &options, &self.device)))
        };
        self.trainer.evaluate(block)?.transpose()
    }

    pub fn conclude(mut self) -> Result<()> {
        self.progress.finish();
        let took = duration(self.progress.elapsed());
        // The other processes take part.
        let sample = self.sample(LAST_SAMPLE)?;
        self.trainer.end_ranks()?;
        let (done, steps) = (self.trainer.steps_done(), self.trainer.options().steps);
        if done < steps {
            let since = self.trainer.losses().since_best;
            self.progress.say(format_args!("stopped at step {done}/{steps}: no lower loss in {since} validations"));
        }
        let loss = self.metrics.validation.last().map_or(f64::NAN, |&(_, loss)| loss);
        self.progress.say(format_args!("\nvalidation  {} after {took}", self.about.unit().short(loss)));
        if let Some(baseline) = self.about.baseline {
            self.progress.say(format_args!("baseline    {baseline:.3} bits/byte, {ORDER_2} on the same text"));
        }
        if let Some(scaler) = self.trainer.grad_scaler() {
            let (scale, skipped) = (scaler.scale(), scaler.skipped());
            self.progress.say(format_args!("loss scale  {scale} at the end, {skipped} steps skipped for overflow"));
        }
        if let Some(sample) = &sample {
            self.progress.say(format_args!("sample\n{sample}"));
        }
        let (checkpoint, metrics, plot) = (self.run.checkpoint(), self.run.metrics(), self.run.plot());
        let best = self.trainer.options().keep_best.then(|| self.run.best());
        let files = [Some(&checkpoint), best.as_ref(), Some(&metrics), Some(&plot)];
        let files: Vec<_> = files.into_iter().flatten().map(|path| path.display().to_string()).collect();
        let files = files.join("  ");
        self.progress.say(format_args!("wrote       {files}"));
        if let Some(report) = self.profiler.finish()? {
            self.progress.say(format_args!("profile of the steps\n{report}"));
        }
        let (xt, dir) = (typed::program(), quoted(&self.run.dir));
        if let Some(hint) = T::hint(&dir, &self.about) {
            self.progress.say(format_args!("try         {xt} {hint}"));
        } else if matches!(self.about.target, Target::Class | Target::Value) {
            self.progress.say(format_args!("try         {xt} classify --checkpoint {dir} --text \"…\""));
        } else if sample.is_some() {
            let hint = match self.about.chats {
                true => format!("{xt} chat --checkpoint {dir}"),
                false => format!("{xt} generate --checkpoint {dir} --prompt \"The \" --length 400"),
            };
            self.progress.say(format_args!("try         {hint}"));
        }
        Ok(())
    }
}
