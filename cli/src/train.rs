//! `xt train`: a language model from text or tokens, with checkpoints, curves and samples.

use std::{
    fmt, fs,
    io::{Write, stderr},
    path::{Path, PathBuf},
};

use clap::{Args, value_parser};
use x_transformers::{
    Device, Error,
    config::{AutoregressiveConfig, Config, ModelPlan, TransformerWrapperConfig, v2},
    deferred_init,
    models::{AutoregressiveWrapper, XTransformer},
    train::{
        ByteText, Captioner, CaptionerConfig, Checkpoint, Classifier, ClassifierConfig, DpoConfig, DpoModel, Embedder,
        EmbedderConfig, ImageClassifier, ImageClassifierConfig, LoraConfig, LoraModel, MaskedLm, MaskedLmConfig,
        RankOptions, TrainModel, TrainOptions, Trainer, TrainingState,
    },
};

mod captions;
mod chats;
mod data;
pub mod embed;
mod encoder;
mod fit;
mod images;
mod labels;
mod masked;
mod options;
mod preferences;
mod preset;
mod rehearsal;
mod seq2seq;
mod start;
mod task;
mod training;

use self::{
    data::{About, Data, DataArgs, Own},
    options::{LoraArgs, ModelArgs, OptionArgs},
    preset::Preset,
    task::{Kind, Task},
    training::Training,
};
use crate::{
    events::Events,
    failure::{Failure, Result},
    files::{self, Run},
    interrupt,
    keywords::KeywordArgs,
    metrics::Metrics,
    profiler::{ProfileArgs, Profiler},
    progress::Progress,
    ranks,
};

#[derive(Args)]
pub struct TrainArgs {
    #[command(flatten)]
    data: DataArgs,

    /// Path of the JSON config of the model to train, an AutoregressiveWrapper or a TransformerWrapper [default: a
    /// plain decoder]
    #[arg(long, value_name = "FILE", conflicts_with_all = ["dim", "depth", "heads", "resume"])]
    config: Option<PathBuf>,

    /// Model to train by name; without a tokenizer, on bytes
    #[arg(long, value_enum, conflicts_with_all = ["config", "dim", "depth", "heads", "from", "resume"])]
    preset: Option<Preset>,

    /// Path of a model to continue from, with its weights and tokenizer, and new data and options: a checkpoint of `xt train`,
    /// or a pretrained Llama, Mistral or Qwen 2 (a GGUF file or a `transformers` folder)
    #[arg(long, value_name = "PATH", conflicts_with_all = ["config", "dim", "depth", "heads", "set", "resume"])]
    from: Option<PathBuf>,

    /// Task that the model learns: lm (to continue texts); classify or regress, with --from an encoder such as MiniLM or
    /// --preset bert-base, on --jsonl with `text` and `label`; image or caption, on --images; seq2seq, on --pairs; embed,
    /// with --from an encoder, on --jsonl with `anchor` and `positive`, and `negative` if there are hard ones, or with
    /// `sentence1`, `sentence2` and `score`; mlm (masked tokens), on texts, with a new encoder or --from a BERT with its head;
    /// dpo, with --from a model that generates text, on --jsonl with `prompt`, `chosen` and `rejected`
    #[arg(long, value_enum, default_value = "lm", conflicts_with = "resume")]
    task: Kind,

    /// Names of the classes of --task classify, in order [default: the labels that occur]
    #[arg(long, value_name = "NAME", num_args = 2.., requires = "jsonl", conflicts_with = "resume")]
    labels: Vec<String>,

    /// Strength of the pull of --task dpo to the model it begins with [default: 0.1]
    #[arg(long, value_name = "X", requires = "from", conflicts_with = "resume")]
    dpo_beta: Option<f64>,

    /// Probability that --task mlm masks a token [default: 0.15]
    #[arg(long, value_name = "P", conflicts_with = "resume")]
    mask_prob: Option<f64>,

    #[command(flatten)]
    lora: LoraArgs,

    #[command(flatten)]
    model: ModelArgs,

    #[command(flatten)]
    keywords: KeywordArgs,

    #[command(flatten)]
    options: OptionArgs,

    /// Device: auto (a GPU if there is one), cpu or cuda:N; --resume may use another one
    #[arg(long, default_value = "auto")]
    device: String,

    /// Enqueue the ops of each step on a GPU instead of replaying them as a recorded graph: the same bits, less memory, more
    /// time for small models
    #[arg(long)]
    no_graphs: bool,

    /// Folder to write the checkpoint, metrics.csv and loss.svg to
    #[arg(long, value_name = "DIR", default_value = "out", conflicts_with = "resume")]
    out: PathBuf,

    /// Replace the run in --out; its files stay until the first save of the new run
    #[arg(long, conflicts_with = "resume")]
    overwrite: bool,

    /// Write event files for TensorBoard beside metrics.csv
    #[arg(long)]
    tensorboard: bool,

    /// Folder of a run to resume, with its model, its tokenizer and all its options; requires the same data: --text,
    /// --tokens with --validation, --jsonl with the same --field, --parquet with the same --column, the same --separator,
    /// --pairs, or --images with --validation-images. --steps and --every override those of the run; --device, --no-graphs,
    /// --zero, --profile, --trace and --tensorboard are not saved with it
    #[arg(long, value_name = "DIR")]
    resume: Option<PathBuf>,

    /// Number of steps between checkpoints, each with a validation and a sample; the first validations come after 1, 2, 5,
    /// 10, 20 and 50 steps too [default: 100, with --resume that of the run]
    #[arg(long, value_name = "N", value_parser = value_parser!(u64).range(1..))]
    every: Option<u64>,

    /// Run a few steps, print parameters, memory and time of the whole run, and write nothing
    #[arg(long, conflicts_with = "resume")]
    dry_run: bool,

    /// Stage of ZeRO for several processes: with 1 each keeps its part of the optimizer's state and of averaged weights,
    /// with 2 of the summed gradients too, with 3 (which needs --recompute and shows no samples) of the layers' weights too
    #[arg(long, value_name = "STAGE", default_value_t = 0, value_parser = value_parser!(u8).range(0..=3))]
    zero: u8,

    #[command(flatten)]
    profile: ProfileArgs,
}

impl TrainArgs {
    /// Returns the options of a new run, with this learning rate by default.
    fn train_options(&self, max_seq_len: usize, lr: f64) -> TrainOptions {
        let options = self.options.resolve(max_seq_len, lr);
        TrainOptions { every: self.every.unwrap_or(options.every), ..options }
    }

    fn rank_options(&self) -> RankOptions {
        RankOptions { zero: self.zero, ..RankOptions::default() }
    }

    /// Builds a trainer; in stage 3 of ZeRO without weights, of which this rank only ever has its part.
    fn build<T>(&self, new: impl FnOnce() -> T) -> T {
        if self.zero == 3 && ranks::count() > 1 { deferred_init(new) } else { new() }
    }

    /// Returns the model to train, by default with a vocabulary of this size.
    fn config(&self, num_tokens: Option<usize>) -> Result<Config> {
        if let Some(preset) = self.preset {
            let net = preset.config(num_tokens)?;
            return self.changed(AutoregressiveConfig { net, ..Default::default() }.into());
        }
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

    /// Refuses options that a task cannot be used with.
    fn refuse_beside(&self, task: &str, names: &[&str]) -> Result<()> {
        let given = [
            ("from", self.from.is_some()),
            ("lora-rank", self.lora.options().is_some()),
            ("tokenizer", self.data.tokenizer().is_some()),
            ("seq-len", self.options.seq_len.is_some()),
            ("preset", self.preset.is_some()),
            ("config", self.config.is_some()),
            ("field", self.data.names_field()),
        ];
        match given.into_iter().find(|(name, given)| *given && names.contains(name)) {
            Some((name, _)) => {
                Err(Failure::new(format_args!("`--{name}` cannot be used with `--task {task}`; omit it")))
            }
            None => Ok(()),
        }
    }

    /// Refuses to replace the model at a path, which a run of `--task dpo` or of an adapter goes on reading.
    fn keep_reference(&self, from: &Path) -> Result<()> {
        let base = fs::canonicalize(files::checkpoint(from));
        let replaced = [files::checkpoint(&self.out), Run::unlocked(&self.out).best()];
        let is_it = |path: PathBuf| matches!((&base, fs::canonicalize(path)), (Ok(base), Ok(path)) if *base == path);
        match replaced.into_iter().any(is_it) {
            true => Err(Failure::new("`--out` must not be the run of `--from`, which stays the reference")),
            false => Ok(()),
        }
    }

    /// Returns the config with the keywords of the command line.
    fn changed(&self, config: Config) -> Result<Config> {
        let config = self.keywords.apply(config)?;
        match config.plan()? {
            ModelPlan::Autoregressive(_) => Ok(config),
            _ => Err(Failure::new("`--set` cannot change the class of the model")),
        }
    }
}

/// Returns the longest window that a model of this config predicts; 0: no limit.
fn longest(config: &Config) -> usize {
    length(AutoregressiveWrapper::max_seq_len(config))
}

/// Returns a longest window; 0: no limit.
fn length(longest: usize) -> usize {
    if longest == usize::MAX { 0 } else { longest }
}

/// Refuses data with a larger vocabulary than the model has.
fn check_vocabulary(about: &About, model: usize) -> Result<()> {
    match about.num_tokens.filter(|&own| own > model) {
        Some(own) => {
            Err(Failure::new(format_args!("the data has a vocabulary of {own} tokens, but the model has {model}")))
        }
        None => Ok(()),
    }
}

/// Learning rate by default, for models with random weights, for trained ones and for adapters.
const RATES: [f64; 3] = [1e-3, 5e-5, 2e-4];

pub fn run(args: TrainArgs) -> Result<()> {
    ranks::join(&args.device)?;
    let result = train(args);
    ranks::leave(&result);
    result
}

fn train(args: TrainArgs) -> Result<()> {
    let device = ranks::device(&args.device)?;
    if let Some(dir) = &args.resume {
        if !args.keywords.is_empty() {
            return Err(Failure::new("`--set` cannot change the model of a resumed run; start a new run"));
        }
        let run = ranks::first(|| Run::find(dir), || Ok(Run::unlocked(dir)))?;
        if !run.is_begun() && run.metrics().is_file() {
            let why = "the run was interrupted before its first checkpoint; start it again without `--resume`";
            return Err(Failure::new(why).within(&run.dir));
        }
        let training = Checkpoint::load_training(run.checkpoint())?;
        if DpoConfig::read(run.checkpoint())?.is_some() {
            return resume::<DpoModel>(&args, run, &training, &device);
        }
        if EmbedderConfig::read(run.checkpoint())?.is_some() {
            return resume::<Embedder>(&args, run, &training, &device);
        }
        if MaskedLmConfig::read(run.checkpoint())?.is_some() {
            return resume::<MaskedLm>(&args, run, &training, &device);
        }
        if LoraConfig::read(run.checkpoint())?.is_some() {
            return resume::<LoraModel>(&args, run, &training, &device);
        }
        if ClassifierConfig::read(run.checkpoint())?.is_some() {
            return resume::<Classifier>(&args, run, &training, &device);
        }
        if CaptionerConfig::read(run.checkpoint())?.is_some() {
            return resume::<Captioner>(&args, run, &training, &device);
        }
        if ImageClassifierConfig::read(run.checkpoint())?.is_some() {
            return resume::<ImageClassifier>(&args, run, &training, &device);
        }
        let config = Checkpoint::load_config(run.checkpoint()).and_then(|config| config.plan());
        if matches!(config, Ok(ModelPlan::EncoderDecoder(_))) {
            return resume::<XTransformer>(&args, run, &training, &device);
        }
        return resume::<AutoregressiveWrapper>(&args, run, &training, &device);
    }
    let of_one_task = [
        ("--dpo-beta", args.dpo_beta.is_some(), Kind::Dpo, "dpo"),
        ("--mask-prob", args.mask_prob.is_some(), Kind::Mlm, "mlm"),
        ("--labels", !args.labels.is_empty(), Kind::Classify, "classify"),
    ];
    if let Some((name, _, _, task)) = of_one_task.into_iter().find(|(_, given, task, _)| *given && args.task != *task) {
        return Err(Failure::new(format_args!("`{name}` requires `--task {task}`")));
    }
    match (args.task, &args.from) {
        (Kind::Image, _) => return images::begin(&args, &device),
        (Kind::Seq2seq, _) => return seq2seq::begin(&args, &device),
        (Kind::Caption, _) => return captions::begin(&args, &device),
        (Kind::Mlm, _) => return masked::begin(&args, &device),
        (Kind::Embed, Some(from)) => return embed::begin(&args, from, &device),
        (Kind::Dpo, Some(from)) => return preferences::begin(&args, from, &device),
        (Kind::Embed, None) => return Err(Failure::new("`--task embed` requires `--from` an encoder, such as MiniLM")),
        (Kind::Dpo, None) => return Err(Failure::new("`--task dpo` requires `--from` a model that generates text")),
        _ => {}
    }
    match &args.from {
        Some(from) if args.task == Kind::Lm => start::begin(&args, from, &device),
        Some(from) => start::labelled(&args, from, &device),
        None if args.task != Kind::Lm => encoder::begin(&args, &device),
        None => {
            let Data { source, about } = args.data.open(None)?;
            let config = args.config(about.num_tokens)?;
            let options = args.train_options(longest(&config), RATES[0]);
            fit::check(&args, &config, &options, &device)?;
            begin(&args, args.build(|| Trainer::new(config, options, source, &device))?, about, &device)
        }
    }
}

/// Goes on with a run.
fn resume<T: Task>(args: &TrainArgs, run: Run, training: &TrainingState, device: &Device) -> Result<()> {
    let own = training.tokenizer.as_ref().map(|name| Own::open(&run.checkpoint().join(name))).transpose()?;
    let Data { source, about } = T::data(&args.data, own, &run.checkpoint())?;
    let mut trainer = args.build(|| Trainer::<T>::resume_from(run.checkpoint(), source, device))?;
    args.options.steps.map_or(Ok(()), |steps| trainer.set_steps(steps))?;
    args.every.map_or(Ok(()), |every| trainer.set_every(every))?;
    trainer.set_graphs(!args.no_graphs);
    let Some(trainer) = ranks::share(trainer, args.rank_options())? else { return Ok(()) };
    let metrics = Metrics::resume(&run.metrics(), about.unit(), trainer.steps_done())?;
    proceed(args, run, trainer, metrics, about, device)
}

/// Begins a run, or only tries its steps.
fn begin<T: Task>(args: &TrainArgs, mut trainer: Trainer<T>, about: About, device: &Device) -> Result<()> {
    trainer.set_graphs(!args.no_graphs);
    let Some(mut trainer) = ranks::share(trainer, args.rank_options())? else { return Ok(()) };
    if args.dry_run {
        return rehearsal::run(trainer, device, &about);
    }
    let run = Run::create(&args.out, args.overwrite)?;
    if let Some(tokenizer) = &about.tokenizer {
        // Its name is that of its content: a run that is replaced keeps its own until the first save.
        tokenizer.write(&run.checkpoint().join(tokenizer.name()))?;
        trainer.set_tokenizer(Some(tokenizer.name()));
    }
    let (table, unit) = (run.metrics(), about.unit());
    let metrics = if run.is_begun() { Metrics::hold(&table, unit) } else { Metrics::create(&table, unit)? };
    proceed(args, run, trainer, metrics, about, device)
}

/// Runs the steps that are left.
fn proceed<T: Task>(
    args: &TrainArgs,
    run: Run,
    trainer: Trainer<T>,
    metrics: Metrics,
    about: About,
    device: &Device,
) -> Result<()> {
    interrupt::listen();
    let TrainOptions { steps, every, .. } = *trainer.options();
    let progress = Progress::start(trainer.steps_done(), steps, every, device, about.unit());
    let profiler = Profiler::new(&args.profile);
    let events = args.tensorboard.then(|| Events::create(&run.dir, trainer.steps_done())).transpose()?;
    let device = device.clone();
    // A sample would gather all weights in this process.
    let about = if args.zero == 3 { About { prompt: Vec::new(), ..about } } else { about };
    let mut training = Training { run, trainer, metrics, events, progress, device, about, profiler };
    if training.metrics.held().is_none() {
        // A run that is resumed may have been killed after the checkpoint and before the picture. The one of a new run
        // is empty, and not that of an earlier one.
        training.draw().map_err(|failure| training.unsaved(failure))?;
    }
    training.introduce();
    training.all_steps()?;
    training.conclude()
}

/// Names the files below the folders of `--text` that could not be read.
pub fn warn_of_skipped(text: &ByteText) {
    /// Files that are named; the rest is counted.
    const NAMED: usize = 10;
    let skipped = if ranks::is_first() { text.skipped() } else { &[] };
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
    use std::collections::BTreeMap;

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
        /// It says where the run is, as `--resume` does, or what a new one begins with, which the checkpoint keeps.
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
        json!([args.train_options(longest(&config), RATES[0]), config.to_value()])
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
            ("parquet", NotSaved("file")),
            ("column", NotSaved("name")),
            ("separator", NotSaved("|")),
            ("tokenizer", Folder("file")),
            ("images", NotSaved("folder")),
            ("pairs", NotSaved("file")),
            ("validation_images", NotSaved("folder")),
            ("image_size", Folder("64")),
            ("patch_size", Folder("8")),
            ("mean", Folder("0.4")),
            ("std", Folder("0.4")),
            ("flip", Folder("")),
            ("shuffle", Saved("")),
            ("document_mask", Saved("")),
            ("recompute", Saved("")),
            ("config", Saved("config.json")),
            ("dim", Saved("24")),
            ("preset", Saved("modern")),
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
            ("group", Saved("*emb* lr=0.5")),
            ("ema", Saved("0.5")),
            ("patience", Saved("3")),
            ("keep_best", Saved("")),
            ("from", Folder("file")),
            ("task", Folder("classify")),
            ("labels", Folder("good")),
            ("dpo_beta", Folder("0.5")),
            ("mask_prob", Folder("0.5")),
            ("lora_rank", Folder("4")),
            ("lora_alpha", Folder("4")),
            ("lora_dropout", Folder("0.5")),
            ("lora_targets", Folder("q_proj")),
            ("lora_rs", Folder("")),
            ("dora", Folder("")),
            ("dry_run", Folder("")),
            ("seed", Saved("7")),
            ("dtype", Saved("bf16")),
            ("device", NotSaved("cpu")),
            ("out", Folder("other")),
            ("overwrite", Folder("")),
            ("resume", Folder("other")),
            ("every", Changeable("7")),
            ("no_graphs", NotSaved("")),
            ("zero", NotSaved("1")),
            ("profile", NotSaved("")),
            ("trace", NotSaved("file")),
            ("tensorboard", NotSaved("")),
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
                "column" => &["--parquet", "file"],
                "validation_images" | "image_size" | "patch_size" | "mean" | "std" | "flip" => &["--images", "folder"],
                "lora_rank" => &["--from", "file"],
                "dpo_beta" => &["--from", "file"],
                "labels" => &["--jsonl", "file", "--labels", "bad"],
                id if id.starts_with("lora_") || id == "dora" => &["--from", "file", "--lora-rank", "4"],
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
