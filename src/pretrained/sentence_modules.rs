//! Modules of sentence-transformers after the token model.

use std::path::Path;

use serde_json::Value;

use super::{
    options::{Options, json},
    sentence::Entry,
};
use crate::{
    DType, Device, Error, ErrorKind, Result, Tensor,
    collect::CollectVec,
    error::ensure,
    io::TensorFile,
    models::{DenseActivation, DenseLayer, DenseResidual, Features, Pooling, SentenceModule},
};

/// Reads a module from its folder; returns `None` if it has no effect in inference.
///
/// Errors: an unknown module or option, by name; weights that do not fit.
pub(super) fn read(entry: &Entry, list: &Path, dtype: DType, device: &Device) -> Result<Option<SentenceModule>> {
    let path = entry.folder.join("config.json");
    let value = if path.exists() { json(&path)? } else { Value::Object(serde_json::Map::new()) };
    let options = &Options { path, value };
    match entry.class.as_str() {
        "Pooling" => pooling(options).map(Some),
        "Dense" => dense(entry, options, dtype, device).map(Some),
        "LayerNorm" => {
            options.known("LayerNorm", &["dimension"])?;
            let dim = options.size("dimension", None)?;
            let weights = Weights::open(entry, dtype, device, &["norm.weight", "norm.bias"])?;
            let (weight, bias) = (weights.read("norm.weight", &[dim])?, weights.read("norm.bias", &[dim])?);
            Ok(Some(SentenceModule::LayerNorm { weight, bias }))
        }
        "Normalize" => {
            options.known("Normalize", &["module_input_name", "module_output_name"])?;
            Ok(Some(SentenceModule::Normalize(features(options)?)))
        }
        "Dropout" => Ok(None),
        other => {
            let known = "Transformer, Pooling, Dense, LayerNorm, Normalize, Dropout";
            Err(Error::file(list, format_args!("lists the module `{other}`, expected one of {known}")))
        }
    }
}

/// Pooling modes by name, in the order in which the older form concatenates them.
const MODES: [(&str, &str, Pooling); 6] = [
    ("cls", "pooling_mode_cls_token", Pooling::FirstToken),
    ("max", "pooling_mode_max_tokens", Pooling::Max),
    ("mean", "pooling_mode_mean_tokens", Pooling::Mean),
    ("mean_sqrt_len_tokens", "pooling_mode_mean_sqrt_len_tokens", Pooling::MeanSqrtLen),
    ("weightedmean", "pooling_mode_weightedmean_tokens", Pooling::WeightedMean),
    ("lasttoken", "pooling_mode_lasttoken", Pooling::LastToken),
];

fn pooling(options: &Options) -> Result<SentenceModule> {
    const KEY: &str = "pooling_mode";
    let mut known = vec!["embedding_dimension", "word_embedding_dimension", "include_prompt", KEY];
    known.extend(MODES.map(|(_, flag, _)| flag));
    options.known("Pooling", &known)?;
    let named = |name: &Value| {
        let found = MODES.iter().find(|(mode, ..)| name.as_str() == Some(mode));
        found.map(|&(_, _, pooling)| pooling).ok_or_else(|| {
            let known = MODES.map(|(mode, ..)| mode).join(", ");
            options.refuse(KEY, format!("is {name}, expected one of {known}, or a list of them"))
        })
    };
    let modes = match options.get(KEY) {
        Some(Value::Array(names)) if !names.is_empty() => names.iter().map(named).try_collect_vec()?,
        Some(name) => vec![named(name)?],
        None => {
            let mut modes = Vec::new();
            for (_, flag, pooling) in MODES {
                modes.extend(options.flag(flag, false)?.then_some(pooling));
            }
            if modes.is_empty() { vec![Pooling::Mean] } else { modes }
        }
    };
    Ok(SentenceModule::Pooling { modes, include_prompt: options.flag("include_prompt", true)? })
}

fn dense(entry: &Entry, options: &Options, dtype: DType, device: &Device) -> Result<SentenceModule> {
    const KNOWN: [&str; 7] = [
        "in_features",
        "out_features",
        "bias",
        "activation_function",
        "use_residual",
        "module_input_name",
        "module_output_name",
    ];
    options.known("Dense", &KNOWN)?;
    let (columns, rows) = (options.size("in_features", None)?, options.size("out_features", None)?);
    let (bias, residual) = (options.flag("bias", true)?, options.flag("use_residual", false)?);
    let projected = residual && rows != columns;
    let mut names = vec!["linear.weight"];
    names.extend(bias.then_some("linear.bias"));
    names.extend(projected.then_some("residual.weight"));
    let weights = Weights::open(entry, dtype, device, &names)?;
    let layer = DenseLayer {
        weight: weights.read("linear.weight", &[rows, columns])?,
        bias: if bias { Some(weights.read("linear.bias", &[rows])?) } else { None },
        activation: activation(options)?,
        residual: match residual {
            true if projected => DenseResidual::Projected(weights.read("residual.weight", &[rows, columns])?),
            true => DenseResidual::Input,
            false => DenseResidual::None,
        },
    };
    Ok(SentenceModule::Dense(layer, features(options)?))
}

/// Returns the activation by the last part of its PyTorch class.
fn activation(options: &Options) -> Result<DenseActivation> {
    const KEY: &str = "activation_function";
    const CLASSES: [(&str, DenseActivation); 9] = [
        ("Identity", DenseActivation::Identity),
        ("Tanh", DenseActivation::Tanh),
        ("Sigmoid", DenseActivation::Sigmoid),
        ("ReLU", DenseActivation::Relu),
        ("GELU", DenseActivation::Gelu),
        ("SiLU", DenseActivation::Silu),
        ("LeakyReLU", DenseActivation::LeakyRelu),
        ("ELU", DenseActivation::Elu),
        ("ReLU6", DenseActivation::Relu6),
    ];
    if !options.has(KEY) {
        return Ok(DenseActivation::Tanh);
    }
    let class = options.text(KEY, "torch.nn.Identity")?;
    let last = class.strip_prefix("torch.nn.").map(|rest| rest.rsplit('.').next().unwrap_or(rest));
    CLASSES.iter().find(|(name, _)| last == Some(name)).map(|&(_, activation)| activation).ok_or_else(|| {
        let known = CLASSES.map(|(name, _)| name).join(", ");
        options.refuse(KEY, format!("is `{class}`, expected a `torch.nn` class: {known}"))
    })
}

/// Vectors that a module reads and writes.
fn features(options: &Options) -> Result<Features> {
    const KEY: &str = "module_input_name";
    let name = options.text(KEY, "sentence_embedding")?;
    options.only("module_output_name", name)?;
    match name {
        "sentence_embedding" => Ok(Features::Texts),
        "token_embeddings" => Ok(Features::Tokens),
        other => Err(options.refuse(KEY, format!("is `{other}`, expected sentence_embedding or token_embeddings"))),
    }
}

/// Weights of a module.
struct Weights<'d> {
    file: TensorFile,
    dtype: DType,
    device: &'d Device,
}

impl<'d> Weights<'d> {
    /// Errors: tensors beyond these.
    fn open(entry: &Entry, dtype: DType, device: &'d Device, names: &[&str]) -> Result<Self> {
        let file = TensorFile::open(&entry.folder)?;
        let unused: Vec<String> = file.names().filter(|name| !names.contains(name)).map(str::to_string).collect_vec();
        let lacks = |name: &&&str| file.info(name).is_none();
        let missing: Vec<String> = names.iter().filter(lacks).map(ToString::to_string).collect_vec();
        ensure!(
            unused.is_empty() && missing.is_empty(),
            Error::new(ErrorKind::Weights { missing, unused, mismatched: Vec::new() }).context(file.path().display())
        );
        Ok(Self { file, dtype, device })
    }

    /// Errors: another shape, NaN or infinity.
    fn read(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let found = self.file.info(name).map(|info| info.shape).unwrap_or_default();
        ensure!(
            found == shape,
            Error::file(
                self.file.path(),
                format_args!("`{name}` has shape {found:?}, expected {shape:?} by its config.json")
            )
        );
        let tensor = self.file.tensor(name)?;
        let finite = tensor.dtype().is_float() && tensor.to_f64_vec()?.iter().all(|value| value.is_finite());
        ensure!(finite, Error::file(self.file.path(), format_args!("`{name}` contains NaN, infinity or integers")));
        tensor.to_dtype(self.dtype)?.to_device(self.device)
    }
}
