//! Reading and writing configs of version 2.

use serde_json::{Value, json};

use super::{
    super::kwargs::{self, Map},
    AttentionConfig, AttentionLayersConfig, AttentionPoolConfig, AutoregressiveConfig, BeliefStateConfig, Config,
    ContinuousAutoregressiveConfig, ContinuousTransformerWrapperConfig, DpoConfig, FeedForwardConfig, FilterConfig,
    GptVaeConfig, LayersKind, MultiInputConfig, NeoMlpConfig, NonAutoregressiveConfig, PerLayer, SamplingConfig,
    TransformerWrapperConfig, ViTransformerWrapperConfig, XTransformerConfig, XValAutoregressiveConfig, XValConfig,
    XlAutoregressiveConfig,
    fields::{Options, differing, take},
    refused,
};
use crate::{
    Error, ErrorKind, Result,
    collect::CollectVec,
    error::{ErrorContext, ensure},
};

pub(super) const TRANSFORMER: &str = "TransformerWrapper";

/// The names that `model` can have, besides those of attention layers.
const MODELS: [&str; 17] = [
    "TransformerWrapper",
    "ContinuousTransformerWrapper",
    "ViTransformerWrapper",
    "XTransformer",
    "AutoregressiveWrapper",
    "ContinuousAutoregressiveWrapper",
    "MultiInputTransformerWrapper",
    "XValTransformerWrapper",
    "XValAutoregressiveWrapper",
    "XLAutoregressiveWrapper",
    "NonAutoregressiveWrapper",
    "DPO",
    "BeliefStateWrapper",
    "NeoMLP",
    "GPTVAE",
    "AttentionPool",
    "SamplingFilter",
];

impl Config {
    /// Reads the options of a model, without `version`.
    pub(in crate::config) fn from_map(mut map: Map) -> Result<Self> {
        let all = || MODELS.into_iter().chain(LayersKind::ALL.map(|(name, _)| name)).collect_vec().join(", ");
        let model = match map.remove("model") {
            Some(Value::String(model)) => model,
            Some(other) => return Err(Error::option("model", format_args!("expected a name, got {other}"))),
            None => return Err(Error::option("model", format_args!("is required: one of {}", all()))),
        };
        if let Some((_, kind)) = LayersKind::ALL.into_iter().find(|(name, _)| *name == model) {
            ensure!(!map.contains_key("kind"), unknown("kind", Some("model")));
            return layers(map, Some(kind), "").map(Box::new).map(Self::AttentionLayers);
        }
        Ok(match model.as_str() {
            "TransformerWrapper" => Self::TransformerWrapper(transformer(map, "")?),
            "ContinuousTransformerWrapper" => Self::ContinuousTransformerWrapper(continuous(map)?),
            "ViTransformerWrapper" => {
                let attn_layers = nested_layers(&mut map)?;
                let mut config = ViTransformerWrapperConfig { attn_layers, ..Default::default() };
                required(&map, &["image_size", "patch_size"])?;
                take(&mut config, "", &mut map)?;
                finish(map, "", "", &[ViTransformerWrapperConfig::NAMES])?;
                Self::ViTransformerWrapper(config)
            }
            "XTransformer" => Self::XTransformer(Box::new(encoder_decoder(map)?)),
            "AutoregressiveWrapper" => {
                let net = net(&mut map, "net", TRANSFORMER, |map| transformer(map, ""))?;
                let mut config = AutoregressiveConfig { net, ..Default::default() };
                take(&mut config, "", &mut map)?;
                finish(map, "", refused::AUTOREGRESSIVE, &[AutoregressiveConfig::NAMES])?;
                Self::AutoregressiveWrapper(config)
            }
            "ContinuousAutoregressiveWrapper" => {
                let net = net(&mut map, "net", "ContinuousTransformerWrapper", continuous)?;
                let mut config = ContinuousAutoregressiveConfig { net, ..Default::default() };
                take(&mut config, "", &mut map)?;
                finish(map, "", refused::CONTINUOUS_AUTOREGRESSIVE, &[ContinuousAutoregressiveConfig::NAMES])?;
                Self::ContinuousAutoregressiveWrapper(config)
            }
            "MultiInputTransformerWrapper" => {
                let attn_layers = nested_layers(&mut map)?;
                let mut config = MultiInputConfig { attn_layers, ..Default::default() };
                required(&map, &["num_tokens", "max_seq_len"])?;
                take(&mut config, "", &mut map)?;
                finish(map, "", "", &[MultiInputConfig::NAMES])?;
                Self::MultiInput(config)
            }
            "XValTransformerWrapper" => Self::XVal(numbers(map)?),
            "XValAutoregressiveWrapper" => {
                let net = net(&mut map, "net", "XValTransformerWrapper", numbers)?;
                let mut config = XValAutoregressiveConfig { net, ..Default::default() };
                take(&mut config, "", &mut map)?;
                finish(map, "", "", &[XValAutoregressiveConfig::NAMES])?;
                Self::XValAutoregressive(config)
            }
            "XLAutoregressiveWrapper" => {
                let net = net(&mut map, "net", TRANSFORMER, |map| transformer(map, ""))?;
                let mut config = XlAutoregressiveConfig { net, ..Default::default() };
                take(&mut config, "", &mut map)?;
                finish(map, "", refused::XL, &[XlAutoregressiveConfig::NAMES])?;
                Self::XlAutoregressive(config)
            }
            "NonAutoregressiveWrapper" => {
                let read = |map| transformer(map, "");
                let critic = map.contains_key("token_critic").then(|| net(&mut map, "token_critic", TRANSFORMER, read));
                let net = net(&mut map, "net", TRANSFORMER, read)?;
                let token_critic = critic.transpose()?;
                let mut config = NonAutoregressiveConfig { net, token_critic, ..Default::default() };
                required(&map, &["mask_id"])?;
                take(&mut config, "", &mut map)?;
                finish(map, "", "", &[NonAutoregressiveConfig::NAMES])?;
                Self::NonAutoregressive(Box::new(config))
            }
            "DPO" => {
                let net = net(&mut map, "net", TRANSFORMER, |map| transformer(map, ""))?;
                let mut config = DpoConfig { net, ..Default::default() };
                take(&mut config, "", &mut map)?;
                finish(map, "", "", &[DpoConfig::NAMES])?;
                Self::Dpo(config)
            }
            "BeliefStateWrapper" => Self::BeliefState(Box::new(BeliefStateConfig::from_map(map)?)),
            "NeoMLP" => Self::NeoMlp(Box::new(NeoMlpConfig::from_map(map)?)),
            "GPTVAE" => Self::GptVae(Box::new(GptVaeConfig::from_map(map)?)),
            "AttentionPool" => {
                let mut config = AttentionPoolConfig::default();
                required(&map, &["dim"])?;
                take(&mut config, "", &mut map)?;
                finish(map, "", refused::POOL, &[AttentionPoolConfig::NAMES])?;
                Self::AttentionPool(config)
            }
            "SamplingFilter" => Self::SamplingFilter(SamplingConfig::from_map(map)?),
            other => return Err(Error::option("model", format_args!("expected one of {}, got `{other}`", all()))),
        })
    }

    /// Returns the options as JSON, without those at their defaults, and `version`.
    pub(in crate::config) fn to_map(&self) -> Map {
        let (model, mut map) = match self {
            Self::TransformerWrapper(config) => ("TransformerWrapper", config.to_map()),
            Self::ContinuousTransformerWrapper(config) => ("ContinuousTransformerWrapper", config.to_map()),
            Self::ViTransformerWrapper(config) => {
                let mut map = differing(config, &Default::default(), "");
                map.insert("attn_layers".to_string(), Value::Object(config.attn_layers.to_map()));
                ("ViTransformerWrapper", map)
            }
            Self::XTransformer(config) => ("XTransformer", config.to_map()),
            Self::AutoregressiveWrapper(config) => {
                let mut map = differing(config, &Default::default(), "");
                map.insert("net".to_string(), with_model(config.net.to_map(), TRANSFORMER));
                ("AutoregressiveWrapper", map)
            }
            Self::ContinuousAutoregressiveWrapper(config) => {
                let mut map = differing(config, &Default::default(), "");
                map.insert("net".to_string(), with_model(config.net.to_map(), "ContinuousTransformerWrapper"));
                ("ContinuousAutoregressiveWrapper", map)
            }
            Self::MultiInput(config) => {
                let mut map = differing(config, &Default::default(), "");
                map.insert("max_seq_len".to_string(), json!(config.max_seq_len));
                map.insert("attn_layers".to_string(), Value::Object(config.attn_layers.to_map()));
                ("MultiInputTransformerWrapper", map)
            }
            Self::XVal(config) => ("XValTransformerWrapper", config.to_map()),
            Self::XValAutoregressive(config) => {
                let mut map = differing(config, &Default::default(), "");
                map.insert("net".to_string(), with_model(config.net.to_map(), "XValTransformerWrapper"));
                ("XValAutoregressiveWrapper", map)
            }
            Self::XlAutoregressive(config) => {
                let mut map = differing(config, &Default::default(), "");
                map.insert("net".to_string(), with_model(config.net.to_map(), TRANSFORMER));
                ("XLAutoregressiveWrapper", map)
            }
            Self::NonAutoregressive(config) => {
                let mut map = differing(&**config, &Default::default(), "");
                map.insert("mask_id".to_string(), json!(config.mask_id));
                map.insert("net".to_string(), with_model(config.net.to_map(), TRANSFORMER));
                if let Some(critic) = &config.token_critic {
                    map.insert("token_critic".to_string(), with_model(critic.to_map(), TRANSFORMER));
                }
                ("NonAutoregressiveWrapper", map)
            }
            Self::Dpo(config) => {
                let mut map = differing(config, &Default::default(), "");
                map.insert("net".to_string(), with_model(config.net.to_map(), TRANSFORMER));
                ("DPO", map)
            }
            Self::BeliefState(config) => ("BeliefStateWrapper", config.to_map()),
            Self::NeoMlp(config) => ("NeoMLP", config.to_map()),
            Self::GptVae(config) => ("GPTVAE", config.to_map()),
            Self::AttentionPool(config) => ("AttentionPool", differing(config, &Default::default(), "")),
            Self::SamplingFilter(config) => ("SamplingFilter", config.to_map()),
            Self::AttentionLayers(config) => {
                let mut map = config.to_map();
                map.remove("kind");
                (config.kind.name(), map)
            }
        };
        map.insert("model".to_string(), json!(model));
        map.insert("version".to_string(), json!("2"));
        map
    }
}

pub(super) fn with_model(mut map: Map, model: &str) -> Value {
    map.insert("model".to_string(), json!(model));
    Value::Object(map)
}

impl TransformerWrapperConfig {
    pub(super) fn to_map(&self) -> Map {
        let mut map = differing(self, &Self::default(), "");
        map.insert("num_tokens".to_string(), json!(self.num_tokens));
        map.insert("max_seq_len".to_string(), json!(self.max_seq_len));
        map.insert("attn_layers".to_string(), Value::Object(self.attn_layers.to_map()));
        map
    }
}

impl XValConfig {
    fn to_map(&self) -> Map {
        let mut map = differing(self, &Self::default(), "");
        map.insert("num_tokens".to_string(), json!(self.num_tokens));
        map.insert("max_seq_len".to_string(), json!(self.max_seq_len));
        map.insert("numerical_token_id".to_string(), json!(self.numerical_token_id));
        map.insert("attn_layers".to_string(), Value::Object(self.attn_layers.to_map()));
        map
    }
}

impl ContinuousTransformerWrapperConfig {
    fn to_map(&self) -> Map {
        let mut map = differing(self, &Self::default(), "");
        map.insert("attn_layers".to_string(), Value::Object(self.attn_layers.to_map()));
        map
    }
}

impl SamplingConfig {
    /// Reads a filter with its arguments and the temperature.
    pub(in crate::config) fn from_map(mut map: Map) -> Result<Self> {
        let mut config = Self::default();
        if let Some(filter) = map.remove("filter_kwargs") {
            let mut filter = kwargs::object("filter_kwargs", filter)?;
            take(&mut config.filter, "", &mut filter).context("filter_kwargs")?;
            finish(filter, "", "", &[FilterConfig::NAMES]).context("filter_kwargs")?;
        }
        take(&mut config, "", &mut map)?;
        finish(map, "", "", &[Self::NAMES])?;
        Ok(config)
    }

    fn to_map(&self) -> Map {
        let mut map = differing(self, &Self::default(), "");
        let filter = differing(&self.filter, &FilterConfig::default(), "");
        if !filter.is_empty() {
            map.insert("filter_kwargs".to_string(), Value::Object(filter));
        }
        map
    }
}

impl XTransformerConfig {
    fn to_map(&self) -> Map {
        let mut map = differing(self, &Self::default(), "");
        for (prefix, side) in [("enc_", &self.enc), ("dec_", &self.dec)] {
            let mut options = side.to_map();
            options.remove("attn_layers");
            let mut layers = side.attn_layers.to_map();
            ["kind", "dim", "cross_attend"].iter().for_each(|key| drop(layers.remove(*key)));
            // Set by the class: the encoder has no logits.
            options.remove("return_only_embed");
            map.extend(options.into_iter().chain(layers).map(|(key, value)| (format!("{prefix}{key}"), value)));
        }
        map.insert("dim".to_string(), json!(self.enc.attn_layers.dim));
        map
    }
}

/// Options of a wrapper that are options of an `XTransformer` too; the last only of its encoder.
const SIDE: [&str; 6] =
    ["num_tokens", "max_seq_len", "emb_dropout", "scaled_sinu_pos_emb", "use_abs_pos_emb", "num_memory_tokens"];

fn encoder_decoder(mut map: Map) -> Result<XTransformerConfig> {
    let mut config = XTransformerConfig::default();
    take(&mut config, "", &mut map)?;
    let dim = map.remove("dim").ok_or_else(|| missing("dim"))?;
    for (prefix, kind) in [("enc_", LayersKind::Encoder), ("dec_", LayersKind::Decoder)] {
        let keys: Vec<String> = map.keys().filter(|key| key.starts_with(prefix)).cloned().collect_vec();
        let (mut options, mut of_layers) = (Map::new(), Map::new());
        for key in keys {
            let name = key.trim_start_matches(prefix);
            let memory = prefix == "enc_" || name != "num_memory_tokens";
            let into = if SIDE.contains(&name) && memory { &mut options } else { &mut of_layers };
            into.extend(map.remove(&key).map(|value| (name.to_string(), value)));
        }
        ensure!(!of_layers.contains_key("dim"), Error::option(format!("{prefix}dim"), "is `dim` for both sides"));
        of_layers.insert("dim".to_string(), dim.clone());
        of_layers.insert("cross_attend".to_string(), json!(kind == LayersKind::Decoder));
        let side = || {
            let attn_layers = layers(of_layers, Some(kind), "")?;
            let mut side = TransformerWrapperConfig { attn_layers, ..Default::default() };
            required(&options, &["num_tokens", "max_seq_len"])?;
            take(&mut side, "", &mut options)?;
            Ok(side)
        };
        let side = side().map_err(|error| kwargs::with_prefix(error, prefix))?;
        match kind {
            LayersKind::Encoder => config.enc = TransformerWrapperConfig { return_only_embed: true, ..side },
            _ => config.dec = side,
        }
    }
    finish(map, "", refused::ENCODER_DECODER, &[XTransformerConfig::NAMES])?;
    Ok(config)
}

pub(super) fn transformer(mut map: Map, prefix: &str) -> Result<TransformerWrapperConfig> {
    let attn_layers = nested_layers(&mut map)?;
    let mut config = TransformerWrapperConfig { attn_layers, ..Default::default() };
    required(&map, &["num_tokens", "max_seq_len"])?;
    take(&mut config, prefix, &mut map)?;
    finish(map, "", refused::TRANSFORMER, &[TransformerWrapperConfig::NAMES])?;
    Ok(config)
}

fn numbers(mut map: Map) -> Result<XValConfig> {
    let attn_layers = nested_layers(&mut map)?;
    let mut config = XValConfig { attn_layers, ..Default::default() };
    required(&map, &["num_tokens", "max_seq_len", "numerical_token_id"])?;
    take(&mut config, "", &mut map)?;
    finish(map, "", "emb_dim=null", &[XValConfig::NAMES])?;
    Ok(config)
}

fn continuous(mut map: Map) -> Result<ContinuousTransformerWrapperConfig> {
    let attn_layers = nested_layers(&mut map)?;
    let mut config = ContinuousTransformerWrapperConfig { attn_layers, ..Default::default() };
    take(&mut config, "", &mut map)?;
    finish(map, "", refused::CONTINUOUS, &[ContinuousTransformerWrapperConfig::NAMES])?;
    Ok(config)
}

/// Takes an option that is a model of this class, `net` for instance.
pub(super) fn net<T>(map: &mut Map, key: &'static str, model: &str, read: impl FnOnce(Map) -> Result<T>) -> Result<T> {
    let mut net = kwargs::object(key, map.remove(key).ok_or_else(|| missing(key))?)?;
    let given = net.remove("model").unwrap_or_else(|| json!(model));
    ensure!(given == model, Error::option("model", format_args!("expected \"{model}\", got {given}")).context(key));
    read(net).context(key)
}

fn nested_layers(map: &mut Map) -> Result<AttentionLayersConfig> {
    let of_layers = map.remove("attn_layers").ok_or_else(|| missing("attn_layers"))?;
    layers(kwargs::object("attn_layers", of_layers)?, None, "").context("attn_layers")
}

/// Reads the options of attention layers, whose class the map has under `kind` unless it is given.
pub(super) fn layers(mut map: Map, kind: Option<LayersKind>, prefix: &str) -> Result<AttentionLayersConfig> {
    let kind = match kind {
        Some(kind) => kind,
        None => {
            let kind = map.remove("kind").ok_or_else(|| missing("kind"))?;
            let found = LayersKind::ALL.into_iter().find(|(name, _)| kind.as_str() == Some(name));
            let all = || LayersKind::ALL.map(|(name, _)| name).join(", ");
            found.ok_or_else(|| Error::option("kind", format_args!("expected one of {}, got {kind}", all())))?.1
        }
    };
    let mut config = AttentionLayersConfig { kind, ..Default::default() };
    required(&map, &["dim"])?;
    take(&mut config, prefix, &mut map)?;
    let mut cross = group(&mut map, "cross_attn_", AttentionConfig::NAMES);
    let mut own = group(&mut map, "attn_", AttentionConfig::NAMES);
    // Cross-attention has all options of self-attention that are not lists, and those of its own.
    if !cross.is_empty() || own.values().any(Value::is_array) {
        for (key, value) in own.iter().filter(|(_, value)| !value.is_array()) {
            cross.entry(key.clone()).or_insert_with(|| value.clone());
        }
        config.cross_attn = Some(per_layer(&mut cross, "cross_attn_")?);
    }
    config.attn = per_layer(&mut own, "attn_")?;
    config.ff = per_layer(&mut group(&mut map, "ff_", FeedForwardConfig::NAMES), "ff_")?;
    let map = without_refused(map, "cross_attn_", refused::ATTENTION)?;
    let map = without_refused(map, "ff_", refused::FEEDFORWARD)?;
    let map = without_refused(map, "", refused::LAYERS)?;
    let names = [AttentionLayersConfig::NAMES];
    let groups: Vec<String> =
        [("attn_", AttentionConfig::NAMES), ("cross_attn_", AttentionConfig::NAMES), ("ff_", FeedForwardConfig::NAMES)]
            .into_iter()
            .flat_map(|(prefix, names)| names.iter().map(move |name| format!("{prefix}{name}")))
            .collect_vec();
    let groups: Vec<&str> = groups.iter().map(String::as_str).collect_vec();
    finish(map, "attn_", refused::ATTENTION, &[names[0], &groups])?;
    Ok(config)
}

/// Takes the options of a group out of a map, without their prefix.
fn group(map: &mut Map, prefix: &str, names: &[&str]) -> Map {
    let mut group = Map::new();
    for name in names {
        if let Some(value) = map.remove(&format!("{prefix}{name}")) {
            group.insert(name.to_string(), value);
        }
    }
    group
}

/// Reads the options of one kind of sublayer: an array has a value for each.
fn per_layer<T: Options>(map: &mut Map, prefix: &str) -> Result<PerLayer<T>> {
    let in_context = |error| kwargs::with_prefix(error, prefix);
    let mut lengths = map.iter().filter_map(|(key, value)| Some((key, value.as_array()?.len())));
    let Some((first, length)) = lengths.next() else {
        let mut all = T::default();
        take(&mut all, "", map).map_err(in_context)?;
        return Ok(PerLayer::All(all));
    };
    if let Some((other, count)) = lengths.find(|(_, count)| *count != length) {
        let why = format_args!("has {count} values, `{prefix}{first}` has {length}").to_string();
        return Err(Error::option(format!("{prefix}{other}"), why));
    }
    let mut each = vec![T::default(); length];
    for (index, options) in each.iter_mut().enumerate() {
        let one = |value: &Value| value.as_array().map_or_else(|| value.clone(), |values| values[index].clone());
        let mut own: Map = map.iter().map(|(key, value)| (key.clone(), one(value))).collect();
        take(options, "", &mut own).map_err(in_context)?;
    }
    Ok(PerLayer::Each(each))
}

/// Writes the options of one kind of sublayer that differ from others.
fn write_per_layer<T: Options>(options: &PerLayer<T>, others: &T, prefix: &str) -> Map {
    let each = match options {
        PerLayer::All(all) => return differing(all, others, prefix),
        PerLayer::Each(each) => each,
    };
    let mut map = Map::new();
    for (index, name) in T::NAMES.iter().enumerate() {
        let value = |options: &T| options.fields()[index].write();
        let values: Vec<Value> = each.iter().map(value).collect_vec();
        if values.iter().all(|one| *one == values[0]) {
            if values.first().is_some_and(|one| *one != value(others)) {
                map.insert(format!("{prefix}{name}"), values[0].clone());
            }
        } else {
            map.insert(format!("{prefix}{name}"), Value::Array(values));
        }
    }
    map
}

impl AttentionLayersConfig {
    pub(super) fn to_map(&self) -> Map {
        let mut map = differing(self, &Self::default(), "");
        map.insert("kind".to_string(), json!(self.kind.name()));
        map.insert("dim".to_string(), json!(self.dim));
        map.extend(write_per_layer(&self.attn, &AttentionConfig::default(), "attn_"));
        if let Some(cross) = &self.cross_attn {
            map.extend(write_per_layer(cross, &inherited(&self.attn), "cross_attn_"));
        }
        map.extend(write_per_layer(&self.ff, &FeedForwardConfig::default(), "ff_"));
        map
    }
}

/// Returns the options that cross-attention has from self-attention: those that are the same in all layers.
pub(super) fn inherited(own: &PerLayer<AttentionConfig>) -> AttentionConfig {
    let mut inherited = AttentionConfig::default();
    let each = match own {
        PerLayer::All(all) => return all.clone(),
        PerLayer::Each(each) => each,
    };
    for (index, field) in inherited.fields_mut().into_iter().enumerate() {
        let mut values = each.iter().map(|options| options.fields()[index].write());
        if let Some(first) = values.next()
            && values.all(|value| value == first)
        {
            // A value of this very field.
            field.read(&first);
        }
    }
    inherited
}

fn missing(key: &str) -> Error {
    Error::missing_option(key)
}

pub(super) fn required(map: &Map, keys: &[&str]) -> Result<()> {
    match keys.iter().find(|key| !map.contains_key(**key)) {
        Some(key) => Err(missing(key)),
        None => Ok(()),
    }
}

/// Returns `true` if this is an option of a model or of attention layers, perhaps not the one that it was given to.
fn is_of_second(key: &str) -> bool {
    let known = [
        AttentionLayersConfig::NAMES,
        TransformerWrapperConfig::NAMES,
        ContinuousTransformerWrapperConfig::NAMES,
        ViTransformerWrapperConfig::NAMES,
        AutoregressiveConfig::NAMES,
        SamplingConfig::NAMES,
    ];
    let of_branch = |prefix: &str, names: &[&str]| key.strip_prefix(prefix).is_some_and(|name| names.contains(&name));
    known.iter().any(|names| names.contains(&key))
        || of_branch("attn_", AttentionConfig::NAMES)
        || of_branch("ff_", FeedForwardConfig::NAMES)
}

fn unknown(key: &str, nearest: Option<&str>) -> Error {
    let nearest = nearest.map(str::to_string);
    Error::new(ErrorKind::UnknownOption { key: key.to_string(), nearest, later: false })
}

/// Returns the error of an option that is not supported, by its name without a prefix.
fn not_supported(key: String, name: &str) -> Error {
    let reason = refused::reason(name);
    Error::option(key, format_args!("is an option of x-transformers 2 that is not supported yet{reason}"))
}

/// Rejects arguments of calls that are not supported.
pub(in crate::config) fn check_call(map: &Map) -> Result<()> {
    match refused::CALL.split_ascii_whitespace().find(|name| map.contains_key(*name)) {
        Some(name) => Err(not_supported(name.to_string(), name)),
        None => Ok(()),
    }
}

/// Removes options that are not supported yet and have their defaults, and those that never change a number.
///
/// Errors: one that is not supported yet and has another value.
fn without_refused(mut map: Map, prefix: &str, refused: &str) -> Result<Map> {
    for row in refused.split_ascii_whitespace() {
        let (name, default) = row.split_once('=').unwrap_or((row, "null"));
        let key = format!("{prefix}{name}");
        let Some(value) = map.remove(&key) else { continue };
        let default: Value = serde_json::from_str(default).unwrap_or_default();
        let same = value == default || value.as_f64().is_some_and(|value| Some(value) == default.as_f64());
        ensure!(same, not_supported(key, name));
    }
    refused::WITHOUT_EFFECT.split_ascii_whitespace().for_each(|key| drop(map.remove(key)));
    Ok(map)
}

/// Rejects what is left of a map: options that are not supported yet, of version 0.22, or of none.
pub(super) fn finish(map: Map, prefix: &str, refused: &str, known: &[&[&str]]) -> Result<()> {
    let map = without_refused(map, prefix, refused)?;
    let Some(key) = map.keys().next() else { return Ok(()) };
    if kwargs::is_of_first(key) && !is_of_second(key) {
        let why = "is an option of x-transformers 0.22, which version 2 lacks: remove \"version\" to follow 0.22";
        return Err(Error::option(key, why));
    }
    let all: Vec<String> = known.iter().flat_map(|names| names.iter().map(ToString::to_string)).collect_vec();
    Err(unknown(key, kwargs::nearest(key, &all).as_deref()))
}
