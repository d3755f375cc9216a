//! `xt info`: what a model consists of and what it costs, without building it in memory.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use clap::{ArgGroup, Args, value_parser};
use indicatif::HumanCount;
use x_transformers::{
    DType, Device, Error, ParamMap, ParamStore,
    config::{Config, LayersPlan},
    io::TensorFile,
    models::Model,
    pretrained::Pretrained,
    train::Checkpoint,
};

use crate::{
    cost::{Batch, Cost, Sizes},
    describe,
    failure::{Failure, Result, print},
    files,
    keywords::KeywordArgs,
    progress::{bytes, operations},
    scaling::{ScalingArgs, Step},
    tasks,
    unused::StrictArgs,
};

#[derive(Args)]
#[command(group = ArgGroup::new("model").required(true))]
pub struct InfoArgs {
    /// Path of the JSON config of a model
    #[arg(long, value_name = "FILE", group = "model")]
    config: Option<PathBuf>,

    /// Path of the checkpoint: a folder written by `xt train`, a pretrained model (a GGUF file or a `transformers`
    /// folder), or a file of weights without a config
    #[arg(long, value_name = "PATH", group = "model")]
    checkpoint: Option<PathBuf>,

    #[command(flatten)]
    strict: StrictArgs,

    #[command(flatten)]
    keywords: KeywordArgs,

    /// Number of sequences in the training step whose cost is estimated
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = value_parser!(u32).range(1..))]
    batch_size: u32,

    /// Sequence length, in tokens [default: the model's max_seq_len, or 1024 if it has none]
    #[arg(long, value_name = "N", value_parser = value_parser!(u32).range(1..))]
    seq_len: Option<u32>,

    #[command(flatten)]
    scaling: ScalingArgs,
}

pub fn run(args: InfoArgs) -> Result<()> {
    if let Some(dir) = args.checkpoint.as_deref().map(files::checkpoint)
        && Checkpoint::is_in(&dir)
        && !Pretrained::is_one(&dir)
        && let Some((task, models)) = tasks::of(&dir)?
    {
        print(task)?;
        for (name, config) in models {
            print(if name.is_empty() { String::new() } else { format!("\n{name}\n") })?;
            show(&args, &dir, config)?;
        }
        return Ok(());
    }
    match read(&args)? {
        Some((path, config)) => show(&args, &path, config),
        None => Ok(()),
    }
}

/// Shows a model.
fn show(args: &InfoArgs, path: &Path, config: Config) -> Result<()> {
    let config = args.keywords.apply(config)?;
    let broken = |error: Error| Failure::from(error).within(path);
    let layers = config.layers().map_err(broken)?;
    let store = ParamStore::shapes(DType::F32, &Device::Cpu);
    let params = Model::new(&config, &store).map_err(broken)?.params().clone();
    print(modules(&params, &layers))?;
    print(format_args!("\noptions of x-transformers {}\n", config.version()))?;
    for (name, plan) in &layers {
        let order: Vec<String> =
            plan.layers.iter().filter_map(|layer| Some(layer.branch.layer_type()?.letter().to_string())).collect();
        let of = if name.is_empty() { String::new() } else { format!(" of {name}") };
        print(format_args!("\nlayer order{of}: {}\n{plan}", order.join(" ")))?;
    }
    let sizes = Sizes { rows: args.batch_size as usize, tokens: args.seq_len.map(|tokens| tokens as usize) };
    match Cost::of_model(&config, sizes).map_err(broken)? {
        Some((batch, cost)) => {
            print(step(&params, batch, cost))?;
            if args.scaling.is_empty() {
                return Ok(());
            }
            let dim = layers.iter().map(|(_, plan)| plan.dim).max().unwrap_or(0);
            let step = Step::new(&params, DType::BF16, cost, (batch.rows * batch.tokens * dim) as f64);
            print(args.scaling.table(&step, batch.rows * batch.tokens))
        }
        None => Ok(()),
    }
}

/// The config, and the file or folder that it is in; `None` for weights alone, of which all is said then.
fn read(args: &InfoArgs) -> Result<Option<(PathBuf, Config)>> {
    Ok(Some(match (&args.config, &args.checkpoint) {
        (Some(path), _) => {
            let text = files::config(path)?;
            let config = Config::from_json(&text).map_err(|error| Failure::from(error).within(path))?;
            (path.clone(), config)
        }
        (None, Some(path)) if describe::is_bare(path) => {
            print(describe::bare(&TensorFile::open(path)?))?;
            return Ok(None);
        }
        (None, Some(path)) if Pretrained::is_one(path) => {
            let pretrained = Pretrained::open(path)?;
            args.strict.refuse(&pretrained, path)?;
            print(describe::pretrained(&pretrained).text())?;
            (path.clone(), Config::TransformerWrapper(pretrained.config().clone()))
        }
        (None, Some(dir)) => {
            let dir = files::checkpoint(dir);
            if let Some((lines, config)) = describe::task(&dir)? {
                print(lines.text())?;
                return Ok(Some((dir, config)));
            }
            let config = Checkpoint::load_config(&dir)?;
            // The config says what is wanted, even where the weights are not there or damaged.
            if let Ok(file) = TensorFile::open(&dir) {
                print(describe::own(&config, &file).text())?;
            }
            (dir, config)
        }
        (None, None) => return Err(Failure::new("expected --config or --checkpoint")),
    }))
}

type Stacks = [(&'static str, LayersPlan)];

/// A table of the modules and their parameters; sublayers are modules of their own.
fn modules(params: &ParamMap, stacks: &Stacks) -> String {
    let mut sizes: BTreeMap<Module, usize> = BTreeMap::new();
    for (name, param) in params.unique() {
        *sizes.entry(Module::of(name, stacks)).or_default() += param.tensor().numel();
    }
    let rows = sizes.into_iter().map(|(module, elements)| (module.name, elements));
    let rows: Vec<(String, usize)> = rows.chain([("total".to_string(), params.numel())]).collect();
    let width = rows.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    let mut text = format!("{:width$}  {:>15}\n", "module", "parameters");
    for (name, elements) in rows {
        text += &format!("{name:width$}  {:>15}\n", HumanCount(elements as u64).to_string());
    }
    text
}

/// Module that parameters are counted under, in the order of a forward pass.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Module {
    /// Index of the attention layers that it, or its wrapper, belongs to.
    stack: usize,
    /// Before them, in them, or after them.
    part: Part,
    sublayer: usize,
    name: String,
}

#[derive(PartialEq, Eq, PartialOrd, Ord)]
enum Part {
    Before,
    Layers,
    After,
}

impl Module {
    fn of(parameter: &str, stacks: &Stacks) -> Self {
        // The names of layers without a wrapper have no prefix.
        let dotted = |path: &str| if path.is_empty() { String::new() } else { format!("{path}.") };
        for (stack, (layers, _)) in stacks.iter().enumerate() {
            let wrapper = layers.rsplit_once('.').map_or("", |(wrapper, _)| wrapper);
            if let Some(inner) = parameter.strip_prefix(&dotted(layers)) {
                let parts: Vec<&str> = inner.split('.').collect();
                let numbered = (parts[0] == "layers").then(|| parts.get(1)?.parse().ok()).flatten();
                let inner = numbered.map_or(parts[0].to_string(), |number: usize| format!("layers.{number}"));
                let name = dotted(layers) + &inner;
                return Self { stack, part: Part::Layers, sublayer: numbered.unwrap_or(0), name };
            }
            if let Some(inner) = parameter.strip_prefix(&dotted(wrapper)) {
                let inner = inner.split('.').next().unwrap_or(inner);
                let part = if inner.contains("emb") || inner.contains("token") || inner == "project_in" {
                    Part::Before
                } else {
                    Part::After
                };
                return Self { stack, part, sublayer: 0, name: dotted(wrapper) + inner };
            }
        }
        Self { stack: stacks.len(), part: Part::After, sublayer: 0, name: parameter.to_string() }
    }
}

/// Describes the operations and the memory of a training step.
fn step(params: &ParamMap, batch: Batch, cost: Cost) -> String {
    const FLOAT: f64 = 4.0;
    let weights = FLOAT * params.numel() as f64;
    let activations = FLOAT * cost.saved;
    let size = |count: f64| bytes(count as u64);
    format!(
        "\na training step of {} x {} in f32\n\
         forward pass   {}\n\
         whole step     {}, backward pass included\n\
         memory         {}: weights {}, gradients {}, Adam moments {}, activations {}\n",
        batch.rows,
        batch.tokens,
        operations(cost.forward),
        operations(cost.training()),
        size(4.0 * weights + activations),
        size(weights),
        size(weights),
        size(2.0 * weights),
        size(activations),
    )
}
