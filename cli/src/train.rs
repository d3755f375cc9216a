//! `xt train`: a language model from text or tokens, with checkpoints, curves and samples.

use std::{
    collections::BTreeMap,
    fmt,
    io::{Write, stderr},
    path::{Path, PathBuf},
};

use clap::{Args, value_parser};
use x_transformers::{
    DType, Device, Error, Tensor,
    config::{
        AttentionConfig, AttentionLayersConfig, AutoregressiveConfig, Config, ModelPlan, TransformerWrapperConfig, v2,
    },
    models::AutoregressiveWrapper,
    pretrained::Pretrained,
    train::{ByteText, Checkpoint, OptimizerKind, TrainModel, TrainOptions, Trainer},
};

mod data;
mod interrupt;
mod rehearsal;
mod training;

use self::{
    data::{Data, DataArgs},
    training::Training,
};
use crate::{
    compute::{dtypes, fraction, optimizers},
    failure::{Failure, Result},
    files::{self, Run},
    keywords::KeywordArgs,
    metrics::{Metrics, Unit},
    profiler::{ProfileArgs, Profiler},
    progress::Progress,
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

#[derive(Args)]
pub struct TrainArgs {
    #[command(flatten)]
    data: DataArgs,

    /// Path of the JSON config of the model to train, an AutoregressiveWrapper or a TransformerWrapper [default: a
    /// plain decoder]
    #[arg(long, value_name = "FILE", conflicts_with_all = ["dim", "depth", "heads", "resume"])]
    config: Option<PathBuf>,

    /// Path of a checkpoint of `xt train` to continue from: its weights, model and tokenizer, with new data and options
    #[arg(long, value_name = "DIR", conflicts_with_all = ["config", "dim", "depth", "heads", "set", "resume"])]
    from: Option<PathBuf>,

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

    /// Folder of a run to resume, with its model, its tokenizer and all its options; requires the same data: --text,
    /// --tokens with --validation, or --jsonl, with the same --field and --separator. --steps and --every override those of
    /// the run; --device, --profile and --trace are not saved with it
    #[arg(long, value_name = "DIR")]
    resume: Option<PathBuf>,

    /// Number of steps between checkpoints, each with a validation and a sample; the first validations come after 1, 2, 5,
    /// 10, 20 and 50 steps too [default: 100, with --resume that of the run]
    #[arg(long, value_name = "N", value_parser = value_parser!(u64).range(1..))]
    every: Option<u64>,

    /// Run a few steps, print parameters, memory and time of the whole run, and write nothing
    #[arg(long, conflicts_with = "resume")]
    dry_run: bool,

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
    fn layers(&self, document_mask: bool) -> AttentionLayersConfig {
        let Self { dim, depth, heads } = *self;
        let plain = AttentionLayersConfig {
            heads: heads.unwrap_or(defaults::HEADS),
            ..AttentionLayersConfig::decoder(dim.unwrap_or(defaults::DIM), depth.unwrap_or(defaults::DEPTH))
        };
        if dim.is_some() || depth.is_some() || heads.is_some() {
            return plain;
        }
        let attn = AttentionConfig { dim_head: defaults::DIM_HEAD, ..plain.attn };
        // Rotated values know where a row begins, which documents in it must not.
        AttentionLayersConfig { rotary_pos_emb: true, rotary_qk_only: document_mask, attn, ..plain }
    }
}

#[derive(Args)]
struct OptionArgs {
    /// Context length, in tokens [default: 256, or the config's max_seq_len if that is smaller]
    #[arg(long, value_name = "N", conflicts_with = "resume")]
    seq_len: Option<usize>,

    /// Number of sequences in a micro-batch
    #[arg(long, value_name = "N", default_value_t = TrainOptions::default().batch_size, conflicts_with = "resume")]
    batch_size: usize,

    /// Number of micro-batches per step, whose gradients are averaged (gradient accumulation)
    #[arg(long, value_name = "N", default_value_t = TrainOptions::default().accumulate, conflicts_with = "resume")]
    accumulate: usize,

    /// Take the windows of the data in a random order, each once an epoch, instead of at random offsets
    #[arg(long, conflicts_with = "resume")]
    shuffle: bool,

    /// Keep attention within documents; requires tokens, and a model with rotary or relative positions
    #[arg(long, conflicts_with = "resume")]
    document_mask: bool,

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

    /// Stop after N validations in a row without a lower loss, at the next checkpoint; implies --keep-best
    #[arg(long, value_name = "N", value_parser = value_parser!(u64).range(1..), conflicts_with = "resume")]
    patience: Option<u64>,

    /// Keep the checkpoint with the lowest validation loss in the folder `best`
    #[arg(long, conflicts_with = "resume")]
    keep_best: bool,

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
            shuffle: self.shuffle,
            document_mask: self.document_mask,
            lr: self.lr,
            warmup: self.warmup,
            clip: self.clip,
            optimizer: self.optimizer,
            momentum: self.momentum,
            weight_decay: self.weight_decay,
            decay_all: self.decay_all,
            ema_decay: self.ema,
            patience: self.patience,
            keep_best: self.keep_best || self.patience.is_some(),
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

    /// The model to train, by default with a vocabulary of this size.
    fn config(&self, num_tokens: Option<usize>) -> Result<Config> {
        let Some(path) = &self.config else {
            let Some(num_tokens) = num_tokens.or(self.keywords.sets("num_tokens").then_some(1)) else {
                return Err(Failure::new(
                    "the token files do not say the size of their vocabulary; give `--tokenizer`, or the size with `--set \
                     num_tokens=N` (50304 for GPT-2's tokens)",
                ));
            };
            let max_seq_len = self.options.seq_len.unwrap_or(TrainOptions::default().seq_len);
            let attn_layers = self.model.layers(self.options.document_mask);
            let net = TransformerWrapperConfig { num_tokens, max_seq_len, attn_layers, ..Default::default() };
            return self.changed(AutoregressiveConfig { net, ..Default::default() }.into());
        };
        let text = files::config(path)?;
        let broken = |error: Error| Failure::from(error).within(path);
        let config = match Config::from_json(&text).map_err(broken)? {
            Config::TransformerWrapper(net) => AutoregressiveConfig { net, ..Default::default() }.into(),
            Config::V2(config) => match *config {
                v2::Config::TransformerWrapper(net) => v2::AutoregressiveConfig { net, ..Default::default() }.into(),
                config => Config::V2(Box::new(config)),
            },
            config => config,
        };
        // Conflicting options are detected here, where the file is known.
        match config.plan().map_err(broken)? {
            ModelPlan::Autoregressive(_) => self.changed(config),
            _ => Err(Failure::new("expected an AutoregressiveWrapper or a TransformerWrapper").within(path)),
        }
    }

    /// The config with the keywords of the command line.
    fn changed(&self, config: Config) -> Result<Config> {
        let config = self.keywords.apply(config)?;
        match config.plan()? {
            ModelPlan::Autoregressive(_) => Ok(config),
            _ => Err(Failure::new("`--set` cannot change the class of the model")),
        }
    }
}

/// The longest window that a model of this config predicts; 0: no limit.
fn longest(config: &Config) -> usize {
    match AutoregressiveWrapper::max_seq_len(config) {
        usize::MAX => 0,
        longest => longest,
    }
}

pub fn run(args: TrainArgs) -> Result<()> {
    let device = Device::parse(&args.device)?;
    if args.resume.is_some() && !args.keywords.is_empty() {
        return Err(Failure::new("`--set` cannot change the model of a resumed run; start a new run"));
    }
    let resumed = args.resume.as_deref().map(Run::find).transpose()?;
    let own = match &resumed {
        Some(run) if !run.is_begun() && run.metrics().is_file() => {
            let why = "the run was interrupted before its first checkpoint; start it again without `--resume`";
            return Err(Failure::new(why).within(&run.dir));
        }
        Some(run) => Checkpoint::load_training(run.checkpoint())?.tokenizer.map(|name| run.checkpoint().join(name)),
        None => None,
    };
    let start = args.from.as_deref().map(Start::open).transpose()?;
    let own = own.or_else(|| start.as_ref().and_then(|start| start.tokenizer.clone()));
    let Data { source, language, num_tokens, tokenizer, baseline, bytes_per_token, about } =
        args.data.open(own.as_deref())?;
    let unit = Unit { bytes_per_token };
    let (run, trainer, metrics) = match resumed {
        Some(run) => {
            let mut trainer = Trainer::resume(run.checkpoint(), source, &device)?;
            args.options.steps.map_or(Ok(()), |steps| trainer.set_steps(steps))?;
            args.every.map_or(Ok(()), |every| trainer.set_every(every))?;
            let metrics = Metrics::resume(&run.metrics(), unit, trainer.steps_done())?;
            (run, trainer, metrics)
        }
        None => {
            let mut trainer = match start {
                Some(Start { config, weights, .. }) => {
                    let options = args.train_options(longest(&config));
                    Trainer::start_from(config, &weights, options, source, &device)?
                }
                None => {
                    let config = args.config(num_tokens)?;
                    let options = args.train_options(longest(&config));
                    Trainer::new(config, options, source, &device)?
                }
            };
            if args.dry_run {
                return rehearsal::run(trainer, &device, &about);
            }
            let run = Run::create(&args.out, args.overwrite)?;
            if let Some(tokenizer) = &tokenizer {
                // Its name is that of its content: a run that is replaced keeps its own until the first save.
                tokenizer.write(&run.checkpoint().join(tokenizer.name()))?;
                trainer.set_tokenizer(Some(tokenizer.name()));
            }
            let table = run.metrics();
            let metrics = if run.is_begun() { Metrics::hold(&table, unit) } else { Metrics::create(&table, unit)? };
            (run, trainer, metrics)
        }
    };
    interrupt::listen();
    let TrainOptions { steps, every, .. } = *trainer.options();
    let progress = Progress::start(trainer.steps_done(), steps, every, &device, unit);
    let profiler = Profiler::new(&args.profile);
    let mut training = Training { run, trainer, metrics, progress, device, language, unit, baseline, profiler };
    if training.metrics.held().is_none() {
        // A run that is resumed may have been killed after the checkpoint and before the picture. The one of a new run
        // is empty, and not that of an earlier one.
        training.draw().map_err(|failure| training.unsaved(failure))?;
    }
    training.introduce(&about);
    training.all_steps()?;
    training.conclude()
}

/// A model of `xt train` whose weights a new run starts with.
struct Start {
    config: Config,
    weights: BTreeMap<String, Tensor>,
    /// Folder of its tokenizer.
    tokenizer: Option<PathBuf>,
}

impl Start {
    fn open(path: &Path) -> Result<Self> {
        if Pretrained::is_one(path) {
            let why = "is a pretrained model; `--from` continues models of `xt train`";
            return Err(Failure::new(why).within(path));
        }
        let folder = files::checkpoint(path);
        let (config, weights) = Checkpoint::load_averaged(&folder)?;
        if !matches!(config.plan().map_err(|error| Failure::from(error).within(path))?, ModelPlan::Autoregressive(_)) {
            let why = "expected an AutoregressiveWrapper; name a folder that `xt train` wrote";
            return Err(Failure::new(why).within(path));
        }
        let tokenizer = Checkpoint::load_training(&folder).ok().and_then(|training| training.tokenizer);
        Ok(Self { config, weights, tokenizer: tokenizer.map(|name| folder.join(name)) })
    }
}

/// Names the files below the folders of `--text` that could not be read.
pub fn warn_of_skipped(text: &ByteText) {
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
        /// It says where the run is, as `--resume` does, or where its tokenizer comes from, which the checkpoint keeps.
        Folder(&'static str),
    }
    use Kept::{Changeable, Folder, NotSaved, Saved};

    fn parse(arguments: &[&str]) -> std::result::Result<TrainArgs, ErrorKind> {
        let parsed = Alone::try_parse_from([&["train"], arguments].concat());
        parsed.map(|alone| alone.train).map_err(|error| error.kind())
    }

    /// The model and the options of a new run.
    fn run_of(args: &TrainArgs) -> serde_json::Value {
        let config = args.config(Some(256)).expect("a config");
        json!([args.train_options(longest(&config)), config.to_value()])
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
            ("tokens", NotSaved("file")),
            ("validation", NotSaved("file")),
            ("jsonl", NotSaved("file")),
            ("field", NotSaved("name")),
            ("separator", NotSaved("|")),
            ("tokenizer", Folder("file")),
            ("shuffle", Saved("")),
            ("document_mask", Saved("")),
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
            ("patience", Saved("3")),
            ("keep_best", Saved("")),
            ("from", Folder("file")),
            ("dry_run", Folder("")),
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
            let needs: &[&str] = match id {
                "validation" => &["--tokens", "file"],
                "field" => &["--jsonl", "file"],
                _ => &[],
            };
            let own = [name.as_str(), value].into_iter().filter(|part| !part.is_empty());
            let given: Vec<&str> = needs.iter().copied().chain(own).collect();
            let resumed = parse(&[&["--resume", "folder"], &given[..]].concat());
            let begun = parse(&given).map(|args| run_of(&args));
            match kept {
                Saved(_) if id == "set" => {
                    let message = run(resumed.expect("parsed"));
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
