//! Folders of sentence-transformers: modules and settings beside the encoder.

use std::{
    collections::BTreeMap,
    fmt,
    path::{Component, Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{
    Pretrained,
    options::{Options, json},
    sentence_modules,
};
use crate::{
    DType, Device, Error, Result,
    collect::CollectVec,
    error::ensure,
    models::{Pooling, SentenceEncoder, SentenceModule},
};

/// Similarity function of two text embeddings.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Similarity {
    /// Cosine similarity.
    #[default]
    Cosine,
    /// Dot product.
    Dot,
    /// Negative Euclidean distance.
    Euclidean,
    /// Negative Manhattan distance.
    Manhattan,
}

impl Similarity {
    /// Computes the similarity of two vectors of the same length; 0 if one is empty.
    pub fn of(self, a: &[f64], b: &[f64]) -> f64 {
        let product = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        let distances = a.iter().zip(b).map(|(a, b)| (a - b).abs());
        match self {
            Self::Cosine => product(a, b) / (product(a, a) * product(b, b)).sqrt().max(1e-12),
            Self::Dot => product(a, b),
            // Avoids −0 for a vector with itself.
            Self::Euclidean => 0.0 - distances.map(|distance| distance * distance).sum::<f64>().sqrt(),
            Self::Manhattan => 0.0 - distances.sum::<f64>(),
        }
    }
}

impl fmt::Display for Similarity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cosine => "cosine",
            Self::Dot => "dot",
            Self::Euclidean => "euclidean",
            Self::Manhattan => "manhattan",
        })
    }
}

/// Text settings of a sentence-transformers folder, without the weights.
#[derive(Clone, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct SentenceOptions {
    /// Number of tokens that a text is truncated to, `max_seq_length`; default that of the tokenizer and the model.
    pub max_seq_length: Option<usize>,
    /// If `true`, texts are lower-cased first, `do_lower_case`.
    pub do_lower_case: bool,
    /// A JSON object whose keys take precedence over those of `tokenizer_config.json`, `processor_kwargs`; empty for
    /// none.
    pub tokenizer: String,
    /// Another tokenizer, `tokenizer_name_or_path`, which the caller has to pass as a path.
    pub tokenizer_name: Option<String>,
    /// Prompts that can precede each text, by name, `prompts`.
    pub prompts: BTreeMap<String, String>,
    /// Prompt of texts for which none is named, `default_prompt_name`.
    pub default_prompt: Option<String>,
    /// Similarity that the vectors are meant for, `similarity_fn_name`.
    pub similarity: Similarity,
    /// Number of features that vectors are truncated to, `truncate_dim`.
    pub truncate_dim: Option<usize>,
}

/// File with the list of a folder's modules.
const MODULES: &str = "modules.json";

/// Module in `modules.json`.
pub(super) struct Entry {
    /// Last part of its class name.
    pub class: String,
    /// Folder of the module.
    pub folder: PathBuf,
}

/// Returns the modules of a folder, or `None` if it lists none.
///
/// Errors: a list that cannot be read; classes that are not sentence-transformers' own; folders outside this one.
pub(super) fn entries(folder: &Path) -> Result<Option<Vec<Entry>>> {
    let path = folder.join(MODULES);
    if !path.exists() {
        return Ok(None);
    }
    let broken = |why: String| Error::file(&path, why);
    let value = json(&path)?;
    let list = value.as_array().ok_or_else(|| broken("is not a list of modules".to_string()))?;
    let mut entries = Vec::new();
    for module in list {
        let text = |key: &str| {
            let found = module.get(key).and_then(Value::as_str);
            found.ok_or_else(|| broken(format!("has a module without `{key}`")))
        };
        let (class, place) = (text("type")?, Path::new(text("path")?));
        let Some(("sentence_transformers", last)) =
            class.split_once('.').zip(class.rsplit_once('.')).map(|((first, _), (_, last))| (first, last))
        else {
            return Err(broken(format!("lists the module `{class}`, expected a class of sentence-transformers")));
        };
        ensure!(
            place.components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir)),
            broken(format!("refers to the folder `{}`, expected one below this folder", place.display()))
        );
        entries.push(Entry { class: last.to_string(), folder: folder.join(place) });
    }
    Ok(Some(entries))
}

/// Returns the folder of the token model: that of the module `Transformer`, or the folder itself.
pub(super) fn transformer(folder: &Path) -> Result<PathBuf> {
    let found = entries(folder)?.into_iter().flatten().find(|entry| entry.class == "Transformer");
    Ok(found.map_or_else(|| folder.to_path_buf(), |entry| entry.folder))
}

impl Pretrained {
    /// Creates a sentence encoder with the modules that the folder lists (`modules.json` of sentence-transformers), or
    /// with mean pooling if it lists none.
    ///
    /// Errors: those of [`Pretrained::model`]; a family that generates text, unless the folder lists modules; an
    /// unknown module or option.
    pub fn sentence_encoder(&self, dtype: DType, device: &Device) -> Result<SentenceEncoder> {
        self.check_sentences()?;
        // Small files: errors come before the weights are read.
        let modules = self.sentence_modules(dtype, device)?;
        let encoder = SentenceEncoder::with_modules(self.model(dtype, device)?, modules);
        encoder.map_err(|why| match &self.root {
            Some(root) => Error::file(root.join(MODULES), why.to_string()),
            None => why,
        })
    }

    /// Checks that the model embeds sentences: an encoder, or a causal family whose folder lists modules.
    pub(crate) fn check_sentences(&self) -> Result<()> {
        if !self.family.is_causal() {
            return Ok(());
        }
        let listed = self.root.as_deref().is_some_and(|root| root.join(MODULES).exists());
        let why = format!("belongs to the {} family, which does not embed sentences", self.family);
        ensure!(listed, Error::file(self.file.path(), format_args!("{why} without `{MODULES}` beside it")));
        self.sees_later_tokens()
    }

    /// Rejects configs in which the tokens of a causal family attend to later ones.
    fn sees_later_tokens(&self) -> Result<()> {
        let Some(folder) = &self.folder else { return Ok(()) };
        let path = folder.join("config.json");
        let options = Options { value: json(&path)?, path };
        options.only("is_causal", true)?;
        options.only("use_bidirectional_attention", false)
    }

    /// Returns the modules after the token model, as the folder lists them, with their weights.
    ///
    /// Errors: an unknown module or option; weights that do not fit.
    pub fn sentence_modules(&self, dtype: DType, device: &Device) -> Result<Vec<SentenceModule>> {
        let listed = self.root.as_deref().map(entries).transpose()?.flatten();
        let mut modules = match listed {
            Some(entries) => {
                let path = self.root.as_deref().unwrap_or(Path::new("")).join(MODULES);
                let read = |entry: &Entry| sentence_modules::read(entry, &path, dtype, device).transpose();
                let (first, rest) = entries.split_first().ok_or_else(|| Error::file(&path, "lists no modules"))?;
                ensure!(
                    first.class == "Transformer",
                    Error::file(
                        &path,
                        format_args!("starts with the module `{}`, expected `Transformer`", first.class)
                    )
                );
                rest.iter().filter_map(read).try_collect_vec()?
            }
            None => vec![SentenceModule::Pooling { modes: vec![Pooling::Mean], include_prompt: true }],
        };
        modules.extend(self.sentence_options()?.truncate_dim.map(SentenceModule::Truncate));
        Ok(modules)
    }

    /// Reads the folder's text settings: `sentence_bert_config.json` and `config_sentence_transformers.json` of
    /// sentence-transformers.
    ///
    /// Errors: a file that cannot be read, or an unknown option that changes vectors.
    pub fn sentence_options(&self) -> Result<SentenceOptions> {
        let mut options = SentenceOptions::default();
        let Some(root) = self.root.as_deref().filter(|root| root.join(MODULES).exists()) else { return Ok(options) };
        if let Some(folder) = &self.folder {
            transformer_options(folder, &mut options)?;
        }
        let path = root.join("config_sentence_transformers.json");
        if path.exists() {
            model_options(&Options { value: json(&path)?, path }, &mut options)?;
        }
        Ok(options)
    }
}

/// Reads `sentence_bert_config.json`, which has other names in old folders.
fn transformer_options(folder: &Path, to: &mut SentenceOptions) -> Result<()> {
    const NAMES: [&str; 7] = ["bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet"];
    let names = NAMES.iter().map(|name| folder.join(format!("sentence_{name}_config.json")));
    let Some(path) = names.into_iter().find(|path| path.exists()) else { return Ok(()) };
    let options = Options { value: json(&path)?, path };
    let mut tokenizer = Map::new();
    for (key, value) in options.entries()? {
        if value.is_null() {
            continue;
        }
        match key.as_str() {
            "max_seq_length" => to.max_seq_length = Some(options.size(key, None)?),
            "do_lower_case" => to.do_lower_case = options.flag(key, false)?,
            "tokenizer_args" | "processor_kwargs" => tokenizer.extend(options.object(key)?.clone()),
            "model_args" | "model_kwargs" => {
                // Loading and storage of the weights; here the caller chooses the dtype.
                const INERT: [&str; 11] = [
                    "add_pooling_layer",
                    "attn_implementation",
                    "device_map",
                    "dtype",
                    "local_files_only",
                    "low_cpu_mem_usage",
                    "revision",
                    "token",
                    "torch_dtype",
                    "trust_remote_code",
                    "use_safetensors",
                ];
                options.object_of(key, &INERT)?;
            }
            "config_args" | "config_kwargs" => {
                options.object_of(key, &["trust_remote_code", "revision", "token", "local_files_only", "use_cache"])?;
            }
            "processing_kwargs" => {
                options.object_of(key, &[])?;
            }
            "transformer_task" => options.only(key, "feature-extraction")?,
            "module_output_name" => options.only(key, "token_embeddings")?,
            "modality_config" => {
                let text = serde_json::json!({"method": "forward", "method_output_name": "last_hidden_state"});
                let found = options.object(key)?.get("text");
                ensure!(found == Some(&text), options.refuse(key, format!("is {value}, expected {text} for text")));
            }
            "tokenizer_name_or_path" => to.tokenizer_name = Some(options.text(key, "")?.to_string()),
            // For texts marked as queries or documents, which this crate does not distinguish, and for packing of
            // batches.
            "query_length" | "document_length" | "query_expansion" | "unpad_inputs" => {}
            _ => return Err(options.refuse(key, "is not a supported option of the module `Transformer`")),
        }
    }
    to.tokenizer = Value::Object(tokenizer).to_string();
    Ok(())
}

/// Reads `config_sentence_transformers.json`.
fn model_options(options: &Options, to: &mut SentenceOptions) -> Result<()> {
    for (key, value) in options.entries()? {
        if value.is_null() {
            continue;
        }
        match key.as_str() {
            "prompts" => {
                for (name, prompt) in options.object(key)? {
                    let text = match prompt {
                        Value::Null => "",
                        Value::String(text) => text,
                        other => {
                            return Err(options.refuse(key, format!("has {other} for `{name}`, expected a string")));
                        }
                    };
                    to.prompts.insert(name.clone(), text.to_string());
                }
            }
            "default_prompt_name" => to.default_prompt = Some(options.text(key, "")?.to_string()),
            "similarity_fn_name" => {
                // Others do not compare text embeddings; the package falls back to cosine similarity too.
                to.similarity = match options.text(key, "")? {
                    "dot" | "dot_product" => Similarity::Dot,
                    "euclidean" => Similarity::Euclidean,
                    "manhattan" => Similarity::Manhattan,
                    _ => Similarity::Cosine,
                };
            }
            "truncate_dim" => to.truncate_dim = Some(options.size(key, None)?),
            "model_type" => options.only(key, "SentenceTransformer")?,
            "__version__" => {}
            _ => return Err(options.refuse(key, "is not a supported option of a sentence model")),
        }
    }
    // Every model has these two; they are empty unless the folder sets them.
    for name in ["query", "document"] {
        to.prompts.entry(name.to_string()).or_default();
    }
    match &to.default_prompt {
        Some(name) if !to.prompts.contains_key(name) => {
            let known = to.prompts.keys().map(|name| format!("`{name}`")).collect_vec().join(", ");
            Err(options.refuse("default_prompt_name", format!("is `{name}`, expected one of {known}")))
        }
        _ => Ok(()),
    }
}
