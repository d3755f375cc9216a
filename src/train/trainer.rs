//! Training loop.

mod finite;
#[cfg_attr(not(feature = "cuda"), path = "trainer/no_graphs.rs")]
mod graphs;
mod ranks;
mod step;
mod validation;

use std::{cell::Cell, collections::BTreeMap, fmt, io, path::Path, sync::Arc};

use serde_json::Value;

pub use self::ranks::RankOptions;
use self::{
    graphs::Graphs,
    ranks::{Command, Ranks},
};
use super::{
    BatchSource, Checkpoint, DataPrint, Ema, GradScaler, Losses, Optimizer, TokenBatch, TrainModel, TrainOptions,
    TrainingState,
    checkpoint::{CONFIG, EMA},
    data::Ahead,
    random::MAX_STEPS,
};
use crate::{
    DType, Device, Error, ErrorKind, ParamMap, ParamStore, Result, Tensor,
    config::Config,
    error::{ErrorContext, ensure},
    models::AutoregressiveWrapper,
    ordered::ordered,
};

/// Trainer of a model on the batches of a source, step by step: an [`AutoregressiveWrapper`], or any [`TrainModel`]
/// with [`Trainer::start`] and [`Trainer::resume_from`].
///
/// All randomness depends on the seed and the number of the step: a run that is saved, killed and resumed ends with
/// the same bits as an uninterrupted one, on any number of threads. A thread prepares the batches ahead of the step
/// ([`Trainer::set_workers`]), which changes no bit either.
///
/// Half types train with f32 master weights in the optimizer and the loss in f32, f16 also with a scaled loss
/// ([`GradScaler`]).
///
/// ```
/// use x_transformers::{
///     Device,
///     config::{AttentionLayersConfig, AutoregressiveConfig, TransformerWrapperConfig},
///     train::{ByteText, TrainOptions, Trainer},
/// };
/// # fn main() -> x_transformers::Result<()> {
/// let net = TransformerWrapperConfig {
///     num_tokens: 256,
///     max_seq_len: 16,
///     attn_layers: AttentionLayersConfig::decoder(16, 1),
///     ..Default::default()
/// };
/// let config = AutoregressiveConfig { net, ..Default::default() };
/// let options = TrainOptions { steps: 3, warmup: 1, seq_len: 16, batch_size: 2, ..Default::default() };
/// let text = ByteText::from_bytes("It was the best of times, it was the worst of times. ".repeat(10))?;
/// let mut trainer = Trainer::new(config, options, text, &Device::Cpu)?;
/// let before = trainer.validate()?;
/// while trainer.steps_done() < trainer.options().steps {
///     trainer.step()?;
/// }
/// assert!(trainer.validate()? < before);
/// # Ok(())
/// # }
/// ```
#[doc(alias = "fit")]
pub struct Trainer<M: TrainModel = AutoregressiveWrapper> {
    config: M::Config,
    options: TrainOptions,
    data: Ahead<M::Batch>,
    print: DataPrint,
    device: Device,
    model: M,
    params: ParamMap,
    optimizer: Box<dyn Optimizer>,
    ema: Option<Ema>,
    scaler: Option<GradScaler>,
    step: u64,
    losses: Cell<Losses>,
    tokenizer: Option<String>,
    ranks: Ranks,
    graphs: Graphs,
    deferred: Deferred,
}

/// State of a trainer with deferred parameters, until they have their values.
enum Deferred {
    No,
    /// A new run.
    New,
    /// A resumed run, with the state of its optimizer.
    Resumed(BTreeMap<String, Tensor>),
}

impl<M: TrainModel> fmt::Debug for Trainer<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { config, options, print, device, step, .. } = self;
        f.debug_struct("Trainer")
            .field("config", config)
            .field("options", options)
            .field("data", print)
            .field("device", device)
            .field("step", step)
            .finish_non_exhaustive()
    }
}

/// Creates the optimizer of a run.
type MakeOptimizer<'m> = &'m mut dyn FnMut(&TrainOptions, &ParamMap) -> Result<Box<dyn Optimizer>>;

/// Result of a step.
#[derive(Clone, Copy, PartialEq, Debug)]
#[non_exhaustive]
pub struct StepReport {
    /// Index of the step, from 0.
    pub step: u64,
    /// Loss before the update, in nats per token, averaged over the micro-batches.
    pub loss: f64,
    /// Global norm of all gradients, before clipping; infinite in a skipped step.
    pub grad_norm: f64,
    /// Learning rate.
    pub lr: f64,
    /// Number of targets: predicted tokens.
    pub tokens: u64,
    /// If `true`, the weights were not updated because the gradients of a scaled loss were not finite.
    pub skipped: bool,
    /// Scale of the loss after the step ([`GradScaler`]); 1 except in f16.
    pub loss_scale: f64,
}

impl Trainer {
    /// Starts a run with random weights.
    ///
    /// Errors: [`ErrorKind::Option`] for an illegal config or illegal options, and those of [`BatchSource::check`]:
    /// data too short for `seq_len`, or tokens that the model does not have.
    pub fn new(
        config: impl Into<Config>,
        options: TrainOptions,
        data: impl BatchSource<Batch = TokenBatch> + 'static,
        device: &Device,
    ) -> Result<Self> {
        Self::start(config.into(), options, data, device)
    }

    /// Resumes a run from a checkpoint of [`Trainer::save`]. An interrupted save is completed first
    /// ([`Checkpoint::complete`]), unless the folder cannot be written.
    ///
    /// Errors: those of [`Checkpoint::load`] and [`Checkpoint::complete`]; data other than the run's
    /// ([`ErrorKind::Option`]); weights or a state that do not fit the config, with the name of the file.
    pub fn resume(
        folder: impl AsRef<Path>,
        data: impl BatchSource<Batch = TokenBatch> + 'static,
        device: &Device,
    ) -> Result<Self> {
        Self::resume_from(folder, data, device)
    }
}

impl<M: TrainModel> Trainer<M> {
    /// Starts a run of any model, like [`Trainer::new`].
    ///
    /// Errors: those of [`Trainer::new`] and [`TrainModel::build`].
    pub fn start(
        config: M::Config,
        options: TrainOptions,
        data: impl BatchSource<Batch = M::Batch> + 'static,
        device: &Device,
    ) -> Result<Self> {
        Self::start_with(config, options, data, device, TrainOptions::build_optimizer)
    }

    /// Starts a run like [`Trainer::start`], with an optimizer of the caller's in place of that of the options.
    ///
    /// ```
    /// use x_transformers::{prelude::*, train::{Lion, LionOptions, Optimizer}};
    /// # fn main() -> x_transformers::Result<()> {
    /// let net = TransformerWrapperConfig::new(256, 16, AttentionLayersConfig::decoder(16, 1));
    /// let config = AutoregressiveConfig { net, ..Default::default() }.into();
    /// let options = TrainOptions { seq_len: 16, batch_size: 2, ..Default::default() };
    /// let text = ByteText::from_bytes("It was the best of times. ".repeat(20))?;
    /// let own = |_: &TrainOptions, _: &ParamMap| Ok(Box::new(Lion::new(LionOptions::default())?) as Box<dyn Optimizer>);
    /// let mut trainer = Trainer::<AutoregressiveWrapper>::start_with(config, options, text, &Device::Cpu, own)?;
    /// trainer.step()?; // `resume_with` goes on with the same one
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// Errors: those of [`Trainer::start`] and of `optimizer`.
    pub fn start_with(
        config: M::Config,
        options: TrainOptions,
        data: impl BatchSource<Batch = M::Batch> + 'static,
        device: &Device,
        mut optimizer: impl FnMut(&TrainOptions, &ParamMap) -> Result<Box<dyn Optimizer>>,
    ) -> Result<Self> {
        let store = ParamStore::new(options.seed, options.dtype, device);
        Self::build(config, options, Arc::new(data), store, None, &mut optimizer)
    }

    /// Starts a run with given weights, a state dict, which are converted to the dtype of the options: a model that was
    /// trained before goes on with other data and options, and a new optimizer.
    ///
    /// Errors: those of [`Trainer::start`] and [`ParamMap::load`].
    pub fn start_from(
        config: M::Config,
        weights: &BTreeMap<String, Tensor>,
        options: TrainOptions,
        data: impl BatchSource<Batch = M::Batch> + 'static,
        device: &Device,
    ) -> Result<Self> {
        let store = ParamStore::zeros(options.dtype, device);
        Self::build(config, options, Arc::new(data), store, Some(weights), &mut TrainOptions::build_optimizer)
    }

    fn build(
        config: M::Config,
        options: TrainOptions,
        data: Arc<dyn BatchSource<Batch = M::Batch>>,
        store: ParamStore,
        weights: Option<&BTreeMap<String, Tensor>>,
        optimizer: MakeOptimizer,
    ) -> Result<Self> {
        options.check(M::max_seq_len(&config))?;
        M::check(&config, &options)?;
        data.check(&options.request(0, 0, M::num_tokens(&config)))?;
        let model = M::build(&config, &store)?;
        let params = model.trained_params(&store);
        weights.map_or(Ok(()), |weights| params.load(weights))?;
        let optimizer = optimizer(&options, &params)?;
        let ema = match options.ema_decay {
            Some(decay) if params.is_deferred() => Some(Ema::deferred(&params, decay)),
            Some(decay) => Some(Ema::new(&params, decay)?),
            None => None,
        };
        let print = data.print()?;
        let scaler = (options.dtype == DType::F16).then(GradScaler::default);
        let (device, losses, data) = (store.device().clone(), Cell::default(), Ahead::new(data));
        let deferred = if params.is_deferred() { Deferred::New } else { Deferred::No };
        let (step, tokenizer) = (0, None);
        Ok(Self {
            config,
            options,
            data,
            print,
            device,
            model,
            params,
            optimizer,
            ema,
            scaler,
            step,
            losses,
            tokenizer,
            ranks: Ranks::default(),
            graphs: Graphs::default(),
            deferred,
        })
    }

    /// Resumes a run of any model, like [`Trainer::resume`].
    ///
    /// Errors: those of [`Trainer::resume`] and [`TrainModel::config_from_json`].
    pub fn resume_from(
        folder: impl AsRef<Path>,
        data: impl BatchSource<Batch = M::Batch> + 'static,
        device: &Device,
    ) -> Result<Self> {
        Self::resume_with(folder, data, device, TrainOptions::build_optimizer)
    }

    /// Resumes a run that [`Trainer::start_with`] started.
    ///
    /// Errors: those of [`Trainer::resume_from`]; a state of another optimizer.
    pub fn resume_with(
        folder: impl AsRef<Path>,
        data: impl BatchSource<Batch = M::Batch> + 'static,
        device: &Device,
        mut optimizer: impl FnMut(&TrainOptions, &ParamMap) -> Result<Box<dyn Optimizer>>,
    ) -> Result<Self> {
        let folder = folder.as_ref();
        match Checkpoint::complete(folder) {
            Err(error)
                if matches!(
                    error.io_kind(),
                    Some(io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem)
                ) => {}
            completed => completed?,
        }
        let Checkpoint { config, model, optimizer: state, training } = Checkpoint::<Value>::load_as(folder)?;
        let broken = |error| Error::file(folder.join(CONFIG), format_args!("does not match the checkpoint: {error}"));
        let config = M::config_from_json(config).map_err(broken)?;
        let TrainingState { step, options, data: print, losses, grad_scaler, tokenizer, .. } = training;
        ensure!(
            step <= MAX_STEPS,
            Error::file(folder, format_args!("is from step {step}, expected at most {MAX_STEPS}"))
        );
        let store = ParamStore::zeros(options.dtype, device);
        let mut trainer =
            Self::build(config, options, Arc::new(data), store, None, &mut optimizer).context(folder.display())?;
        ensure!(
            trainer.print == print,
            Error::option(
                "data",
                format_args!(
                    "the run in {} trains on {print}, but this is {}; use the same data",
                    folder.display(),
                    trainer.print
                )
            )
        );
        if let (Some(scaler), Some(saved)) = (&mut trainer.scaler, grad_scaler) {
            saved.check().context(folder.display())?;
            *scaler = saved;
        }
        trainer.load(model, state, step).context(folder.display())?;
        trainer.step = step;
        trainer.losses = Cell::new(losses);
        trainer.tokenizer = tokenizer;
        trainer.ranks = Ranks::resumed();
        Ok(trainer)
    }

    fn load(&mut self, model: BTreeMap<String, Tensor>, state: BTreeMap<String, Tensor>, step: u64) -> Result<()> {
        // Converting weights would silently lose precision.
        let other = model
            .iter()
            .find(|(name, value)| self.params.get(name).is_some_and(|param| param.tensor().dtype() != value.dtype()));
        if let Some((name, value)) = other {
            let message = format!("{name} is {}, but the run trains in {}", value.dtype(), self.options.dtype);
            return Err(Error::dtype("resume", message));
        }
        self.params.load(&model).context("model.safetensors")?;
        let (mut averages, mut optimizer) = (BTreeMap::new(), BTreeMap::new());
        for (name, value) in state {
            match (name.strip_prefix(EMA), &self.ema) {
                (Some(name), Some(_)) => averages.insert(name.to_string(), value),
                // Without an average in the options it is unused, which is an error of the optimizer.
                _ => optimizer.insert(name, value),
            };
        }
        if let Some(ema) = &mut self.ema {
            ema.load_state_dict(&averages).context("optimizer.safetensors")?;
        }
        if !matches!(self.deferred, Deferred::No) {
            self.deferred = Deferred::Resumed(optimizer);
            return Ok(());
        }
        self.optimizer.load_state_dict(&self.params, &optimizer).context("optimizer.safetensors")?;
        self.check_steps(step)
    }

    /// Gives deferred parameters their values, and the optimizer and the average those of the checkpoint.
    fn materialize(&mut self, frozen: &ParamMap) -> Result<()> {
        if matches!(self.deferred, Deferred::No) {
            return Ok(());
        }
        self.params.materialize()?;
        frozen.materialize()?;
        if let Some(ema) = &mut self.ema {
            let averages = ema.state_dict();
            let given = !ema.is_deferred();
            let mut whole = Ema::new(&self.params, ema.decay())?;
            if given {
                whole.load_state_dict(&averages)?;
            }
            *ema = whole;
        }
        self.load_deferred()
    }

    /// Loads the state of the optimizer of a run that was resumed with deferred parameters.
    fn load_deferred(&mut self) -> Result<()> {
        if let Deferred::Resumed(state) = &self.deferred {
            self.optimizer.load_state_dict(&self.params, state).context("optimizer.safetensors")?;
            self.check_steps(self.step)?;
        }
        self.deferred = Deferred::No;
        Ok(())
    }

    /// Fails for a trainer of deferred parameters that has none of their values yet.
    fn is_whole(&self) -> Result<()> {
        ensure!(matches!(self.deferred, Deferred::No), Tensor::not_here());
        Ok(())
    }

    /// Checks that the optimizer has done the steps of the run.
    fn check_steps(&self, step: u64) -> Result<()> {
        let (steps, skipped) = (self.optimizer.steps(), self.skipped_steps());
        ensure!(
            steps.checked_add(skipped) == Some(step),
            Error::argument(
                "resume",
                format_args!("the optimizer has done {steps} steps and skipped {skipped}, but the run has done {step}")
            )
        );
        Ok(())
    }

    /// Saves a checkpoint in a folder with [`Checkpoint::save`].
    ///
    /// Errors, with the previous checkpoint intact: [`ErrorKind::NonFinite`] for weights with NaN or infinity, from
    /// which no run could continue; [`ErrorKind::Io`].
    pub fn save(&self, folder: impl AsRef<Path>) -> Result<()> {
        self.lead(Command::Save)?;
        self.is_whole()?;
        if let Some(name) = self.weight_not_finite()? {
            return Err(Error::new(ErrorKind::NonFinite { step: self.step, what: format!("parameter {name}") }));
        }
        let averages = self.ema.iter().flat_map(Ema::state_dict);
        let averages = averages.map(|(name, average)| (format!("{EMA}{name}"), average));
        let (config, model, training) = (M::config_to_json(&self.config), self.whole_weights(), self.state());
        let mut checkpoint = Checkpoint { config, model, optimizer: BTreeMap::new(), training };
        if let (Some(ranks), Some(sharded)) = (self.ranks(), self.optimizer.sharded()) {
            return self.save_divided(&**ranks, sharded, &checkpoint, ordered(averages), folder.as_ref());
        }
        checkpoint.optimizer = self.optimizer.state_dict()?;
        checkpoint.optimizer.extend(averages);
        self.by_first(|| checkpoint.save(folder))
    }

    /// Returns the progress of the run, which [`Trainer::save`] writes to `training.json`.
    pub fn state(&self) -> TrainingState {
        TrainingState {
            version: env!("CARGO_PKG_VERSION").to_string(),
            step: self.step,
            options: self.options.clone(),
            data: self.print.clone(),
            losses: self.losses.get(),
            tokenizer: self.tokenizer.clone(),
            grad_scaler: self.scaler,
        }
    }

    /// Returns the number of completed steps, including those before a resume.
    pub fn steps_done(&self) -> u64 {
        self.step
    }

    /// Returns the loss scaling of a run in f16.
    pub fn grad_scaler(&self) -> Option<&GradScaler> {
        self.scaler.as_ref()
    }

    fn skipped_steps(&self) -> u64 {
        self.scaler.as_ref().map_or(0, GradScaler::skipped)
    }

    /// Changes the total number of steps: the remaining learning rates are those of a run started with that number.
    ///
    /// Errors: [`ErrorKind::Option`] for fewer steps than completed, or more than possible.
    pub fn set_steps(&mut self, steps: u64) -> Result<()> {
        ensure!(
            (self.step..=MAX_STEPS).contains(&steps),
            Error::option("steps", format_args!("expected {} (the steps done) to {MAX_STEPS}, got {steps}", self.step))
        );
        self.options.steps = steps;
        Ok(())
    }

    /// Changes the number of steps between validations and checkpoints, [`TrainOptions::every`].
    ///
    /// Errors: [`ErrorKind::Option`] for 0.
    pub fn set_every(&mut self, every: u64) -> Result<()> {
        ensure!(every > 0, Error::option("every", "expected at least 1, got 0"));
        self.options.every = every;
        Ok(())
    }

    /// Returns the options of the run.
    pub fn options(&self) -> &TrainOptions {
        &self.options
    }

    /// Returns the options of the model.
    pub fn config(&self) -> &M::Config {
        &self.config
    }

    /// Returns the model, with the weights of the last step.
    pub fn model(&self) -> &M {
        &self.model
    }

    /// Returns the parameters of the model.
    pub fn params(&self) -> &ParamMap {
        &self.params
    }

    /// Returns the source of the batches.
    pub fn data(&self) -> &dyn BatchSource<Batch = M::Batch> {
        self.data.source()
    }

    /// Names the folder beside the files of a checkpoint that has the tokenizer; the caller writes it there.
    pub fn set_tokenizer(&mut self, name: Option<String>) {
        self.tokenizer = name;
    }

    /// Changes the number of threads that prepare batches ahead of the step, 1 at the start; with 0 each step prepares
    /// its own. Sources that are [in order](BatchSource::in_order) have one at most.
    pub fn set_workers(&mut self, count: usize) {
        self.data.set_workers(count);
    }

    /// Allows or forbids recorded graphs, which are allowed at the start: on a GPU that supports them, steps of AdamW whose
    /// batches have the shapes of the step before are recorded as one graph and replayed, with the same bits. `false` drops
    /// the graph and its memory.
    pub fn set_graphs(&mut self, allowed: bool) {
        self.graphs.allow(allowed);
    }

    /// Returns `true` if a graph of a step is recorded.
    pub fn has_graph(&self) -> bool {
        self.graphs.has_one()
    }

    /// Returns the reasons for which steps on a GPU ran eagerly instead of as a graph, each once, in the order in which they
    /// occurred. The first steps, and those under a [`Profile`](crate::profile::Profile), are eager without one.
    pub fn eager_reasons(&self) -> &[String] {
        self.graphs.reasons()
    }

    /// Returns the losses so far.
    pub fn losses(&self) -> Losses {
        self.losses.get()
    }
}

fn lower(best: Option<f64>, loss: f64) -> Option<f64> {
    Some(best.map_or(loss, |best| best.min(loss)))
}
