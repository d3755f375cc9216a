//! `xt train`: a byte-level language model from text, with checkpoints, curves and samples.

use std::{
    fmt,
    io::{Write, stderr},
    path::PathBuf,
    time::{Duration, Instant},
};

use clap::{Args, value_parser};
use indicatif::HumanCount;
use x_transformers::{
    DType, Device, Error,
    config::{AttentionConfig, AttentionLayersConfig, AutoregressiveConfig, Config, TransformerWrapperConfig},
    io::write_atomically,
    models::GenerateOptions,
    train::{ByteText, Checkpoint, OptimizerKind, TrainOptions, Trainer},
};

use crate::{
    compute::{dtypes, fraction, optimizers},
    corpus,
    failure::{Failure, Result},
    files::{self, Run, quoted},
    keywords::KeywordArgs,
    markov::Markov,
    metrics::{Metrics, bits},
    plot::Chart,
    profiler::{ProfileArgs, Profiler},
    progress::{Progress, bytes, duration},
    replacement, sample, typed,
};

/// Defaults of a run without arguments; all other options have the library's defaults.
mod defaults {
    pub const DIM: usize = 128;
    pub const DEPTH: usize = 4;
    pub const HEADS: usize = 4;
    pub const STEPS: u64 = 600;
    /// Of the model that is trained when nothing is said about it: it has rotary positions, which a short run learns
    /// with, while learned absolute positions need thousands of steps to look further back than a byte or two.
    pub const DIM_HEAD: usize = 32;
}

/// Bytes of the samples along the way, and of the last one.
const SAMPLE: usize = 96;
const LAST_SAMPLE: usize = 384;

/// The name of the baseline.
const ORDER_2: &str = "order-2 model";

#[derive(Args)]
pub struct TrainArgs {
    /// Paths of text files or folders; the first 90% of the bytes are for training, the rest for validation [default:
    /// eight plays of Shakespeare, built into this program]
    #[arg(long, value_name = "FILE|DIR", num_args = 1..)]
    text: Vec<PathBuf>,

    /// Path of the JSON config of the model to train, an AutoregressiveWrapper or a TransformerWrapper [default: a
    /// plain decoder]
    #[arg(long, value_name = "FILE", conflicts_with_all = ["dim", "depth", "heads", "resume"])]
    config: Option<PathBuf>,

    #[command(flatten)]
    model: ModelArgs,

    #[command(flatten)]
    keywords: KeywordArgs,

    #[command(flatten)]
    options: OptionArgs,

    /// Device: auto (a GPU if there is one), cpu or cuda:N; --resume may use another one
    #[arg(long, default_value = "auto")]
    device: String,

    /// Folder to write the checkpoint, metrics.csv and loss.svg to
    #[arg(long, value_name = "DIR", default_value = "out", conflicts_with = "resume")]
    out: PathBuf,

    /// Replace the run in --out; its files stay until the first save of the new run
    #[arg(long, conflicts_with = "resume")]
    overwrite: bool,

    /// Folder of a run to resume, with its model and all its options; requires the same --text. --steps and --every
    /// override those of the run; --device, --profile and --trace are not saved with it
    #[arg(long, value_name = "DIR")]
    resume: Option<PathBuf>,

    /// Number of steps between checkpoints, each with a validation and a sample [default: 100, with --resume that of
    /// the run]
    #[arg(long, value_name = "N", value_parser = value_parser!(u64).range(1..))]
    every: Option<u64>,

    #[command(flatten)]
    profile: ProfileArgs,
}

/// The shape of the plain decoder.
#[derive(Args)]
struct ModelArgs {
    /// Model dimension of the decoder; --dim, --depth or --heads selects learned positions and heads of 64 features, in
    /// place of rotary positions and heads of 32 [default: 128]
    #[arg(long, value_name = "N", conflicts_with = "resume")]
    dim: Option<usize>,

    /// Number of decoder blocks, each attention and feedforward [default: 4]
    #[arg(long, value_name = "N", conflicts_with = "resume")]
    depth: Option<usize>,

    /// Number of attention heads per block [default: 4]
    #[arg(long, value_name = "N", conflicts_with = "resume")]
    heads: Option<usize>,
}

impl ModelArgs {
    fn layers(&self) -> AttentionLayersConfig {
        let Self { dim, depth, heads } = *self;
        let plain = AttentionLayersConfig {
            heads: heads.unwrap_or(defaults::HEADS),
            ..AttentionLayersConfig::decoder(dim.unwrap_or(defaults::DIM), depth.unwrap_or(defaults::DEPTH))
        };
        if dim.is_some() || depth.is_some() || heads.is_some() {
            return plain;
        }
        let attn = AttentionConfig { dim_head: defaults::DIM_HEAD, ..plain.attn };
        AttentionLayersConfig { rotary_pos_emb: true, attn, ..plain }
    }
}

#[derive(Args)]
struct OptionArgs {
    /// Context length, in bytes [default: 256, or the config's max_seq_len if that is smaller]
    #[arg(long, value_name = "N", conflicts_with = "resume")]
    seq_len: Option<usize>,

    /// Number of sequences in a micro-batch
    #[arg(long, value_name = "N", default_value_t = TrainOptions::default().batch_size, conflicts_with = "resume")]
    batch_size: usize,

    /// Number of micro-batches per step, whose gradients are averaged (gradient accumulation)
    #[arg(long, value_name = "N", default_value_t = TrainOptions::default().accumulate, conflicts_with = "resume")]
    accumulate: usize,

    /// Number of training steps; with --resume, the new total, to which the learning rate schedule adapts [default:
    /// 600, with --resume that of the run]
    #[arg(long, value_name = "N")]
    steps: Option<u64>,

    /// Peak learning rate, which decays to a tenth along a cosine
    #[arg(long, value_name = "X", default_value_t = TrainOptions::default().lr, conflicts_with = "resume")]
    lr: f64,

    /// Number of linear warmup steps to the peak learning rate
    #[arg(long, value_name = "N", default_value_t = TrainOptions::default().warmup, conflicts_with = "resume")]
    warmup: u64,

    /// Maximum global norm of the gradients; larger gradients are scaled down to it
    #[arg(long, value_name = "X", default_value_t = TrainOptions::default().clip, conflicts_with = "resume")]
    clip: f64,

    /// Optimizer; Muon trains the matrices of the layers, and AdamW embeddings, logits and vectors
    #[arg(long, default_value = "adamw", value_parser = optimizers(), conflicts_with = "resume")]
    optimizer: OptimizerKind,

    /// Momentum of SGD and Muon [default: 0.9 for SGD, 0.95 for Muon]
    #[arg(long, value_name = "X", conflicts_with = "resume")]
    momentum: Option<f64>,

    /// Weight decay; parameters of fewer than two dimensions, such as biases, do not decay
    #[arg(long, value_name = "X", default_value_t = TrainOptions::default().weight_decay, conflicts_with = "resume")]
    weight_decay: f64,

    /// Apply weight decay to parameters of fewer than two dimensions too, as PyTorch does by default
    #[arg(long, conflicts_with = "resume")]
    decay_all: bool,

    /// Decay of an exponential moving average of the weights, from 0 to 1, for validation and samples [default: no
    /// average]
    #[arg(long, value_name = "DECAY", value_parser = fraction, conflicts_with = "resume")]
    ema: Option<f64>,

    /// Seed of the initial weights, the batches and dropout
    #[arg(long, value_name = "N", default_value_t = TrainOptions::default().seed, conflicts_with = "resume")]
    seed: u64,

    /// Data type of the weights and activations; with bf16 and f16 the optimizer keeps f32 weights, with f16 the loss
    /// is scaled
    #[arg(long, default_value = "f32", value_parser = dtypes([DType::F32, DType::BF16, DType::F16]), conflicts_with = "resume")]
    dtype: DType,
}

impl OptionArgs {
    fn resolve(&self, max_seq_len: usize) -> TrainOptions {
        let defaults = TrainOptions::default();
        TrainOptions {
            steps: self.steps.unwrap_or(defaults::STEPS),
            batch_size: self.batch_size,
            // 0 means no limit.
            seq_len: self.seq_len.unwrap_or(if max_seq_len == 0 {
                defaults.seq_len
            } else {
                defaults.seq_len.min(max_seq_len)
            }),
            accumulate: self.accumulate,
            lr: self.lr,
            warmup: self.warmup,
            clip: self.clip,
            optimizer: self.optimizer,
            momentum: self.momentum,
            weight_decay: self.weight_decay,
            decay_all: self.decay_all,
            ema_decay: self.ema,
            seed: self.seed,
            dtype: self.dtype,
            ..defaults
        }
    }
}

impl TrainArgs {
    /// The options of a new run.
    fn train_options(&self, max_seq_len: usize) -> TrainOptions {
        let options = self.options.resolve(max_seq_len);
        TrainOptions { every: self.every.unwrap_or(options.every), ..options }
    }

    /// The model to train.
    fn config(&self) -> Result<AutoregressiveConfig> {
        let Some(path) = &self.config else {
            let max_seq_len = self.options.seq_len.unwrap_or(TrainOptions::default().seq_len);
            let attn_layers = self.model.layers();
            let net = TransformerWrapperConfig { num_tokens: 256, max_seq_len, attn_layers, ..Default::default() };
            return self.changed(AutoregressiveConfig { net, ..Default::default() });
        };
        let text = files::config(path)?;
        let broken = |error: Error| Failure::from(error).within(path);
        let config = Config::from_json(&text).map_err(broken)?;
        // Conflicting options are detected here, where the file is known.
        config.layers().map_err(broken)?;
        match config {
            Config::AutoregressiveWrapper(config) => self.changed(config),
            Config::TransformerWrapper(net) => self.changed(AutoregressiveConfig { net, ..Default::default() }),
            _ => Err(Failure::new("expected an AutoregressiveWrapper or a TransformerWrapper").within(path)),
        }
    }

    /// The config with the keywords of the command line.
    fn changed(&self, config: AutoregressiveConfig) -> Result<AutoregressiveConfig> {
        match self.keywords.apply(Config::AutoregressiveWrapper(config))? {
            Config::AutoregressiveWrapper(config) => Ok(config),
            _ => Err(Failure::new("`--set` cannot change the class of the model")),
        }
    }
}

pub fn run(args: TrainArgs) -> Result<()> {
    let device = Device::parse(&args.device)?;
    let text = match &args.text[..] {
        [] => ByteText::from_bytes(corpus::PLAYS)?,
        paths => ByteText::from_paths(paths)?,
    };
    warn_of_skipped(&text);
    // Counted before the text is the trainer's; takes a moment even for large texts.
    let baseline = Markov::new(text.train()).bits_per_byte(text.validation());
    let size = |bytes_: &[u8]| bytes(bytes_.len() as u64);
    let source = if args.text.is_empty() { "eight plays of Shakespeare".into() } else { size(text.bytes()) };
    let sizes = format!("{source}: {} to train on, {} to validate", size(text.train()), size(text.validation()));

    let (run, trainer, metrics) = match &args.resume {
        Some(_) if !args.keywords.is_empty() => {
            return Err(Failure::new("`--set` cannot change the model of a resumed run; start a new run"));
        }
        Some(dir) => {
            let run = Run::find(dir)?;
            if !run.is_begun() && run.metrics().is_file() {
                let why = "the run was interrupted before its first checkpoint; start it again without `--resume`";
                return Err(Failure::new(why).within(&run.dir));
            }
            let mut trainer = Trainer::resume(run.checkpoint(), text, &device)?;
            args.options.steps.map_or(Ok(()), |steps| trainer.set_steps(steps))?;
            args.every.map_or(Ok(()), |every| trainer.set_every(every))?;
            let metrics = Metrics::resume(&run.metrics(), trainer.steps_done())?;
            (run, trainer, metrics)
        }
        None => {
            let config = args.config()?;
            let trainer = Trainer::new(config.clone(), args.train_options(config.net.max_seq_len), text, &device)?;
            let run = Run::create(&args.out, args.overwrite)?;
            let table = run.metrics();
            let metrics = if run.is_begun() { Metrics::hold(&table) } else { Metrics::create(&table)? };
            (run, trainer, metrics)
        }
    };
    let TrainOptions { steps, every, .. } = *trainer.options();
    let progress = Progress::start(trainer.steps_done(), steps, every, &device);
    let profiler = Profiler::new(&args.profile);
    let mut training = Training { run, trainer, metrics, progress, device, baseline, profiler };
    if training.metrics.held().is_none() {
        // A run that is resumed may have been killed after the checkpoint and before the picture. The one of a new run
        // is empty, and not that of an earlier one.
        training.draw().map_err(|failure| training.unsaved(failure))?;
    }
    training.introduce(&sizes);
    training.all_steps()?;
    training.conclude()
}

/// Names the files below the folders of `--text` that could not be read.
fn warn_of_skipped(text: &ByteText) {
    /// Files that are named; the rest is counted.
    const NAMED: usize = 10;
    let skipped = text.skipped();
    // A warning that nobody can read must not stop the run.
    let warn = |line: fmt::Arguments| drop(writeln!(stderr(), "xt: warning: {line}"));
    for (path, why) in skipped.iter().take(NAMED) {
        warn(format_args!("skipped {}: {why}", path.display()));
    }
    if skipped.len() > NAMED {
        warn(format_args!("skipped {} more unreadable files", skipped.len() - NAMED));
    }
}

/// A run and everything that is written about it.
struct Training<'a> {
    run: Run,
    trainer: Trainer,
    metrics: Metrics,
    progress: Progress,
    device: Device,
    /// Bits per byte of the order-2 model.
    baseline: f64,
    /// Watches the steps; what is between them is validation and samples.
    profiler: Profiler<'a>,
}

impl Training<'_> {
    fn introduce(&mut self, text: &str) {
        let options = self.trainer.options().clone();
        let layers = &self.trainer.model().net.plan().layers;
        let attention = layers.layers.iter().find_map(|layer| layer.branch.attention());
        let attention = attention.map_or(String::new(), |plan| format!(", {plan}"));
        let parameters = HumanCount(self.trainer.params().numel() as u64);
        let model =
            format!("{parameters} parameters, {} sublayers of width {}{attention}", layers.layers.len(), layers.dim);
        let batch = options.batch_size * options.accumulate;
        let done = match self.trainer.steps_done() {
            0 => String::new(),
            done => format!(", {done} already done"),
        };
        self.progress.say(format_args!("model       {model}"));
        self.progress.say(format_args!("text        {text}"));
        self.progress.say(format_args!("baseline    {:.3} bits/byte, {ORDER_2}", self.baseline));
        self.progress.say(format_args!("device      {}, {}", self.device, options.dtype));
        self.progress
            .say(format_args!("steps       {}{done}, each {batch} x {} bytes", options.steps, options.seq_len));
        self.progress.say(format_args!("folder      {}\n", self.run.dir.display()));
    }

    fn all_steps(&mut self) -> Result<()> {
        let TrainOptions { steps, every, .. } = *self.trainer.options();
        if self.trainer.steps_done() == 0 {
            self.milestone(steps == 0)?;
        }
        while self.trainer.steps_done() < steps {
            let clock = Instant::now();
            let report = self.profiler.watch(|| self.trainer.step())??;
            let speed = report.tokens as f64 / clock.elapsed().max(Duration::from_nanos(1)).as_secs_f64();
            let written = self.metrics.train(report.step, report.loss, report.lr, speed);
            written.map_err(|failure| self.unsaved(failure))?;
            let done = self.trainer.steps_done();
            self.progress.step(done, report.loss, speed);
            if let (true, Some(scaler)) = (report.skipped, self.trainer.grad_scaler()) {
                let scale = scaler.scale();
                self.progress
                    .say(format_args!("step {done}/{steps}  skipped: gradients overflow; loss scale now {scale}"));
            }
            if done.is_multiple_of(every) || done == steps {
                self.milestone(true)?;
            }
        }
        Ok(())
    }

    /// Validates and, if there is something new, samples and saves.
    fn milestone(&mut self, save: bool) -> Result<()> {
        let done = self.trainer.steps_done();
        let loss = self.trainer.validate()?;
        let written = self.metrics.validation(done, loss);
        written.map_err(|failure| self.unsaved(failure))?;
        let steps = self.trainer.options().steps;
        let line = format!("step {done}/{steps}  validation loss {loss:.4}  {:.3} bits/byte", bits(loss));
        if !save {
            self.progress.say(line);
            return Ok(());
        }
        self.save().map_err(|failure| self.unsaved(failure))?;
        let sample = if done < steps { format!("\n{}", self.sample(SAMPLE)?) } else { String::new() };
        self.progress.say(format_args!("{line}  saved{sample}"));
        Ok(())
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
                replacement::remove(&self.run)?;
            }
        }
        self.draw()
    }

    /// Adds the remedy to the failure of a save.
    fn unsaved(&self, failure: Failure) -> Failure {
        if Checkpoint::load_training(self.run.checkpoint()).is_err() {
            return failure;
        }
        let dir = quoted(&self.run.dir);
        failure.advising(format_args!(
            "the last checkpoint is intact; `{} train --resume {dir}` continues from it",
            typed::program()
        ))
    }

    fn draw(&self) -> Result<()> {
        let reference = Some((ORDER_2, self.baseline));
        let chart = Chart { train: &self.metrics.train, validation: &self.metrics.validation, reference };
        let svg = chart.svg();
        Ok(write_atomically(self.run.plot(), |file| file.write_all(svg.as_bytes()))?)
    }

    fn sample(&self, length: usize) -> Result<String> {
        let options = GenerateOptions { seed: self.trainer.options().seed, ..Default::default() };
        self.trainer.evaluate(|model| Ok(sample::block(model, length, &options, &self.device)))?
    }

    fn conclude(mut self) -> Result<()> {
        self.progress.finish();
        let took = duration(self.progress.elapsed());
        let bits = self.metrics.validation.last().map_or(f64::NAN, |&(_, bits)| bits);
        let sample = self.sample(LAST_SAMPLE)?;
        self.progress.say(format_args!("\nvalidation  {bits:.3} bits/byte after {took}"));
        self.progress.say(format_args!("baseline    {:.3} bits/byte, {ORDER_2} on the same text", self.baseline));
        if let Some(scaler) = self.trainer.grad_scaler() {
            let (scale, skipped) = (scaler.scale(), scaler.skipped());
            self.progress.say(format_args!("loss scale  {scale} at the end, {skipped} steps skipped for overflow"));
        }
        self.progress.say(format_args!("sample\n{sample}"));
        let (checkpoint, metrics, plot) = (self.run.checkpoint(), self.run.metrics(), self.run.plot());
        let files = [&checkpoint, &metrics, &plot].map(|path: &PathBuf| path.display().to_string()).join("  ");
        self.progress.say(format_args!("wrote       {files}"));
        if let Some(report) = self.profiler.finish()? {
            self.progress.say(format_args!("profile of the steps\n{report}"));
        }
        let (xt, dir) = (typed::program(), quoted(&self.run.dir));
        self.progress.say(format_args!("try         {xt} generate --checkpoint {dir} --prompt \"The \" --length 400"));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, fs};

    use clap::{CommandFactory, Parser, error::ErrorKind};
    use serde_json::json;

    use super::*;

    #[derive(Parser)]
    struct Alone {
        #[command(flatten)]
        train: TrainArgs,
    }

    /// Fate of an option when its run is resumed.
    enum Kept {
        /// It is saved in the checkpoint and cannot be given again; a value that is not the default.
        Saved(&'static str),
        /// It is saved in the checkpoint, and another value changes the run.
        Changeable(&'static str),
        /// It is not part of the run; the help of `--resume` says so.
        NotSaved(&'static str),
        /// It says where the run is, as `--resume` does.
        Folder(&'static str),
    }
    use Kept::{Changeable, Folder, NotSaved, Saved};

    fn parse(arguments: &[&str]) -> std::result::Result<TrainArgs, ErrorKind> {
        let parsed = Alone::try_parse_from([&["train"], arguments].concat());
        parsed.map(|alone| alone.train).map_err(|error| error.kind())
    }

    /// The model and the options of a new run.
    fn run_of(args: &TrainArgs) -> serde_json::Value {
        let config = args.config().expect("a config");
        json!([args.train_options(config.net.max_seq_len), Config::AutoregressiveWrapper(config).to_value()])
    }

    /// Every option of the command is in this table, so that none is forgotten by `--resume`.
    #[test]
    fn resuming_keeps_every_option() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let config = folder.path().join("config.json");
        let json = r#"{"model": "TransformerWrapper", "num_tokens": 256, "max_seq_len": 12, "attn_layers":
            {"kind": "Decoder", "dim": 24, "depth": 1}}"#;
        fs::write(&config, json).expect("write");
        let table = BTreeMap::from([
            ("text", NotSaved("file")),
            ("config", Saved("config.json")),
            ("dim", Saved("24")),
            ("depth", Saved("3")),
            ("heads", Saved("2")),
            ("set", Saved("ff_glu=true")),
            ("seq_len", Saved("17")),
            ("batch_size", Saved("3")),
            ("accumulate", Saved("2")),
            ("steps", Changeable("7")),
            ("lr", Saved("0.5")),
            ("warmup", Saved("3")),
            ("clip", Saved("0.5")),
            ("optimizer", Saved("lion")),
            ("momentum", Saved("0.5")),
            ("weight_decay", Saved("0.5")),
            ("decay_all", Saved("")),
            ("ema", Saved("0.5")),
            ("seed", Saved("7")),
            ("dtype", Saved("bf16")),
            ("device", NotSaved("cpu")),
            ("out", Folder("other")),
            ("overwrite", Folder("")),
            ("resume", Folder("other")),
            ("every", Changeable("7")),
            ("profile", NotSaved("")),
            ("trace", NotSaved("file")),
        ]);
        let command = Alone::command();
        let help = command.get_arguments().find(|argument| argument.get_id() == "resume").and_then(|a| a.get_help());
        let help = help.expect("a help").to_string();
        let default = run_of(&parse(&[]).expect("no arguments"));
        let mut seen = 0;
        for argument in command.get_arguments() {
            let id = argument.get_id().as_str();
            let kept = table.get(id).unwrap_or_else(|| panic!("say in this table what --resume does about {id}"));
            let name = format!("--{}", argument.get_long().expect("a long name"));
            let value = match kept {
                Saved("config.json") => config.to_str().expect("UTF-8"),
                Saved(value) | Changeable(value) | NotSaved(value) | Folder(value) => value,
            };
            let given: Vec<&str> = [name.as_str(), value].into_iter().filter(|part| !part.is_empty()).collect();
            let resumed = parse(&[&["--resume", "folder"], &given[..]].concat());
            let begun = parse(&given).map(|args| run_of(&args));
            match kept {
                Saved(_) if id == "set" => {
                    let message = run(TrainArgs { text: vec![config.clone()], ..resumed.expect("parsed") });
                    assert!(message.is_err_and(|failure| failure.to_string().contains("--set")));
                    assert_ne!(begun, Ok(default.clone()));
                }
                Saved(_) => {
                    assert_eq!(resumed.err(), Some(ErrorKind::ArgumentConflict), "{name}");
                    assert_ne!(begun, Ok(default.clone()), "{name} is not part of what is saved");
                }
                Changeable(_) => {
                    assert!(resumed.is_ok() && help.contains(&name), "{name}");
                    assert_ne!(begun, Ok(default.clone()), "{name} is not part of what is saved");
                }
                NotSaved(_) => {
                    assert!(resumed.is_ok() && help.contains(&name), "{name}: {help}");
                    assert_eq!(begun, Ok(default.clone()), "{name}");
                }
                Folder(_) => assert!(resumed.is_err(), "{name}"),
            }
            seen += 1;
        }
        assert_eq!(seen, table.len());
    }
}
