//! Summary of files that `xt info --checkpoint` prints first: architecture, weights, tokens and text.

use std::{collections::BTreeMap, path::Path};

use serde_json::Value;
use x_transformers::{
    DType, Device, ParamStore,
    config::{AttentionLayersConfig, Config, TransformerWrapperConfig},
    io::{Format, Metadata, Stored, TensorFile, read_text},
    pretrained::Pretrained,
    train::{
        Checkpoint, ClassifierConfig, DpoConfig, Embedder, EmbedderConfig, LoraConfig, MaskedLmConfig, TrainModel,
    },
};

use crate::{failure::Result, progress::bytes, unused::listed};

/// Bytes of a file that describes a tokenizer.
const MAX_JSON: u64 = 256 << 20;

/// A heading, and lines of names and values.
pub struct Lines {
    heading: String,
    lines: Vec<(&'static str, String)>,
}

impl Lines {
    fn new(what: &str, file: &TensorFile) -> Self {
        let (size, count) = (bytes(file.bytes() as u64), file.names().count());
        Self { heading: format!("{what}: {} of {size}, {count} tensors", file.format()), lines: Vec::new() }
    }

    fn add(&mut self, name: &'static str, value: impl Into<String>) {
        self.lines.push((name, value.into()));
    }

    /// Returns the text of all, and an empty line.
    pub fn text(self) -> String {
        let width = self.lines.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
        let lines = self.lines.into_iter().map(|(name, value)| format!("{name:width$}  {value}\n"));
        format!("{}\n{}\n", self.heading, lines.collect::<String>())
    }
}

/// Describes a pretrained model.
pub fn pretrained(pretrained: &Pretrained) -> Lines {
    let (config, file) = (pretrained.config(), pretrained.file());
    let mut lines = Lines::new(&pretrained.family().to_string(), file);
    architecture(&mut lines, config);
    weights(&mut lines, file);
    let ends: Vec<String> = pretrained.end_tokens().iter().map(ToString::to_string).collect();
    lines.add("end tokens", some((!ends.is_empty()).then(|| ends.join(", "))));
    match pretrained.folder() {
        Some(folder) => of_folder(&mut lines, folder),
        None => of_gguf(&mut lines, file),
    }
    if !pretrained.family().is_causal() {
        let modules = pretrained.folder().and_then(modules);
        lines.add("pooling", modules.unwrap_or_else(|| "mean (no modules.json)".to_string()));
    }
    let unused = pretrained.unused();
    lines.add("not used", if unused.is_empty() { "nothing".to_string() } else { listed(&unused) });
    lines
}

/// Describes a checkpoint that `xt train` wrote.
pub fn own(config: &Config, file: &TensorFile) -> Lines {
    let mut lines = Lines::new("trained by `xt train`", file);
    lines.add("options of", format!("x-transformers {}", config.version()));
    if let Config::AutoregressiveWrapper(config) = config {
        architecture(&mut lines, &config.net);
    }
    weights(&mut lines, file);
    lines.add("tokenizer", "bytes");
    lines
}

/// Describes the checkpoint of a run of another task than continuing texts in full; returns the options of its net too.
pub fn task(dir: &Path) -> Result<Option<(Lines, Config)>> {
    let mut more = Vec::new();
    let (task, config) = if let Some(config) = EmbedderConfig::read(dir)? {
        let shapes = ParamStore::shapes(DType::F32, &Device::Cpu);
        let encoder = <Embedder as TrainModel>::build(&config, &shapes)?.sentence_encoder()?;
        let modules: Vec<String> = encoder.modules().iter().map(ToString::to_string).collect();
        more.push(("modules", modules.join(", ")));
        ("embed", Config::from_value(config.net)?)
    } else if let Some(config) = MaskedLmConfig::read(dir)? {
        more.push((
            "masked",
            format!("{} % of the tokens, by token {}", 100.0 * config.mask_probability, config.mask_token),
        ));
        ("mlm", Config::from_value(config.net)?)
    } else if let Some(config) = ClassifierConfig::read(dir)? {
        let task = if config.labels.is_empty() { "regress" } else { "classify" };
        more.push(("classes", some((!config.labels.is_empty()).then(|| config.labels.join(", ")))));
        (task, Config::from_value(config.net)?)
    } else if let Some(config) = DpoConfig::read(dir)? {
        more.push(("beta", config.beta().to_string()));
        more.push((
            "trained",
            config.lora().map_or("all weights".to_string(), |lora| format!("an adapter of rank {}", lora.r)),
        ));
        ("dpo", config.base_config()?)
    } else if let Some(config) = LoraConfig::read(dir)? {
        more.push(("trained", format!("an adapter of rank {} of {}", config.lora.r, config.base.display())));
        ("lm", config.base_config()?)
    } else {
        return Ok(None);
    };
    let mut lines = Lines::new(&format!("trained by `xt train --task {task}`"), &TensorFile::open(dir)?);
    match &config {
        Config::AutoregressiveWrapper(config) => architecture(&mut lines, &config.net),
        Config::TransformerWrapper(net) => architecture(&mut lines, net),
        _ => {}
    }
    weights(&mut lines, &TensorFile::open(dir)?);
    let tokenizer = Checkpoint::load_training(dir)?.tokenizer;
    lines.add("tokenizer", tokenizer.unwrap_or_else(|| "bytes".to_string()));
    more.into_iter().for_each(|(name, value)| lines.add(name, value));
    Ok(Some((lines, config)))
}

/// Weights of which no config says what they are.
pub fn bare(file: &TensorFile) -> String {
    let mut lines = Lines::new("weights without a config", file);
    weights(&mut lines, file);
    let mut text = lines.text();
    let width = file.names().map(str::len).max().unwrap_or(0);
    for (name, info) in file.names().filter_map(|name| Some((name, file.info(name)?))) {
        text += &format!("{name:width$}  {} {:?}\n", info.stored, info.shape);
    }
    for (name, why) in file.unreadable() {
        text += &format!("{name}  {why}\n");
    }
    text
}

fn some(value: Option<String>) -> String {
    value.unwrap_or_else(|| "none".to_string())
}

fn architecture(lines: &mut Lines, config: &TransformerWrapperConfig) {
    let AttentionLayersConfig { kind, dim, depth, heads, attn, .. } = &config.attn_layers;
    let kv_heads = attn.kv_heads.filter(|kv_heads| kv_heads != heads);
    let shared = kv_heads.map_or_else(String::new, |kv_heads| format!(" ({kv_heads} of keys and values)"));
    let layers = format!("{kind:?} of dim {dim}, depth {depth}, {heads} heads of {}{shared}", attn.dim_head);
    lines.add("architecture", layers);
    let context = match config.max_seq_len {
        0 => "of any length".to_string(),
        length => format!("of {length} tokens"),
    };
    lines.add("vocabulary", format!("{} tokens, a context {context}", config.num_tokens));
}

/// Adds the number and types of the values.
fn weights(lines: &mut Lines, file: &TensorFile) {
    lines.add("weights", types(file));
}

/// Returns the number of the values in a file, and the tensors and bytes of each type.
pub fn types(file: &TensorFile) -> String {
    let mut types: BTreeMap<String, (usize, usize, &str)> = BTreeMap::new();
    let mut elements = 0;
    for info in file.names().filter_map(|name| file.info(name)) {
        let count = info.shape.iter().product::<usize>();
        let (values, size) = info.stored.block();
        let (tensors, total, note) = types.entry(info.stored.to_string()).or_default();
        *tensors += 1;
        *total += count / values * size;
        *note = match info.stored {
            Stored::Quantized(kind) if kind.is_packed() => ", stays packed",
            Stored::Quantized(_) => ", dequantised when loaded",
            _ => "",
        };
        elements += count;
    }
    let types = types
        .into_iter()
        .map(|(name, (tensors, total, note))| format!("{tensors} of {name} ({}{note})", bytes(total as u64)));
    format!("{elements} values: {}", types.collect::<Vec<_>>().join(", "))
}

/// Adds the tokenizer and chat template beside the weights.
fn of_folder(lines: &mut Lines, folder: &Path) {
    let json =
        |name: &str| read_text(folder.join(name), MAX_JSON).ok().and_then(|text| serde_json::from_str(&text).ok());
    let there = |name: &str| folder.join(name).is_file();
    let tokenizer: Option<Value> = json("tokenizer.json");
    let kind = match &tokenizer {
        Some(tokenizer) => {
            Some(format!("tokenizer.json ({})", tokenizer["model"]["type"].as_str().unwrap_or("unknown type")))
        }
        None if there("tokenizer.json") => Some("tokenizer.json (not valid JSON)".to_string()),
        None if there("tokenizer.model") => Some("tokenizer.model (SentencePiece)".to_string()),
        None if there("spiece.model") => Some("spiece.model (SentencePiece)".to_string()),
        None if there("vocab.txt") => Some("vocab.txt (WordPiece)".to_string()),
        None => None,
    };
    lines.add("tokenizer", some(kind));
    let config: Value = json("tokenizer_config.json").unwrap_or_default();
    let template = if there("chat_template.jinja") {
        "chat_template.jinja".to_string()
    } else {
        match config.get("chat_template") {
            Some(Value::String(_)) => "tokenizer_config.json".to_string(),
            Some(Value::Array(several)) => {
                let names = several.iter().filter_map(|one| one["name"].as_str()).collect::<Vec<_>>();
                format!("tokenizer_config.json: {}", names.join(", "))
            }
            _ if there("chat_template.json") => "chat_template.json".to_string(),
            _ => "none".to_string(),
        }
    };
    lines.add("chat template", template);
}

/// Adds the tokenizer and chat template in a GGUF file.
fn of_gguf(lines: &mut Lines, file: &TensorFile) {
    let text = |key: &str| file.metadata().get(key).and_then(Metadata::as_str);
    let kind = text("tokenizer.ggml.model").map(|model| match text("tokenizer.ggml.pre") {
        Some(pre) => format!("{model}, split as {pre}"),
        None => model.to_string(),
    });
    lines.add("tokenizer", some(kind));
    const TEMPLATE: &str = "tokenizer.chat_template";
    let named = file.metadata().keys().filter_map(|key| key.strip_prefix(TEMPLATE)?.strip_prefix('.'));
    let mut templates: Vec<&str> = named.collect();
    if text(TEMPLATE).is_some() {
        templates.insert(0, "default");
    }
    lines.add("chat template", if templates.is_empty() { "none".to_string() } else { templates.join(", ") });
}

/// Returns the modules of sentence-transformers in a folder.
fn modules(folder: &Path) -> Option<String> {
    let json = |path: &Path| -> Option<Value> { serde_json::from_str(&read_text(path, MAX_JSON).ok()?).ok() };
    let modules = json(&folder.join("modules.json"))?;
    let module = |module: &Value| {
        let kind = module["type"].as_str()?;
        let kind = kind.rsplit('.').next().unwrap_or(kind);
        let config = || json(&folder.join(module["path"].as_str()?).join("config.json"));
        let modes = match kind {
            "Pooling" => config().map(|config| modes(&config)),
            _ => None,
        };
        Some(modes.map_or_else(|| kind.to_string(), |modes| format!("{kind} ({modes})")))
    };
    let modules: Vec<String> = modules.as_array()?.iter().filter_map(module).collect();
    Some(modules.join(", "))
}

/// Returns the ways in which a `Pooling` makes one vector of many.
fn modes(config: &Value) -> String {
    match &config["pooling_mode"] {
        Value::String(mode) => mode.clone(),
        Value::Array(modes) => modes.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(" and "),
        _ => {
            let modes = config.as_object().into_iter().flatten().filter(|(_, on)| **on == Value::Bool(true));
            let modes = modes.filter_map(|(key, _)| key.strip_prefix("pooling_mode_"));
            modes
                .map(|mode| mode.trim_end_matches("_tokens").trim_end_matches("_token"))
                .collect::<Vec<_>>()
                .join(" and ")
        }
    }
}

/// If `true`, a path is one file of weights without a config beside it.
pub fn is_bare(path: &Path) -> bool {
    let beside = path.parent().unwrap_or(Path::new("")).join("config.json");
    path.is_file() && !beside.is_file() && TensorFile::open(path).is_ok_and(|file| file.format() != Format::Gguf)
}
