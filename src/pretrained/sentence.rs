//! Folders of sentence-transformers: what they hold besides the encoder.

use std::{
    collections::BTreeMap,
    fmt,
    path::{Component, Path, PathBuf},
};

use serde_json::{Map, Value};

use super::{
    Pretrained,
    options::{Options, json},
    sentence_modules,
};
use crate::{
    DType, Device, Error, Result,
    error::ensure,
    models::{Pooling, SentenceEncoder, SentenceModule},
};

/// Similarity of the vectors of two texts.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
#[non_exhaustive]
pub enum Similarity {
    /// The cosine of their angle.
    #[default]
    Cosine,
    /// Their product.
    Dot,
    /// Their distance, negative.
    Euclidean,
    /// The sum of the distances of their features, negative.
    Manhattan,
}

impl Similarity {
    /// Of two vectors of the same length; 0 if one is empty.
    pub fn of(self, a: &[f64], b: &[f64]) -> f64 {
        let product = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        let distances = a.iter().zip(b).map(|(a, b)| (a - b).abs());
        match self {
            Self::Cosine => product(a, b) / (product(a, a) * product(b, b)).sqrt().max(1e-12),
            Self::Dot => product(a, b),
            // Not −0 of a vector with itself.
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

/// Settings for texts of a folder of sentence-transformers, without the weights.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
#[non_exhaustive]
pub struct SentenceOptions {
    /// Number of tokens that a text is cut to, `max_seq_length`; that of the tokenizer and the model by default.
    pub max_seq_length: Option<usize>,
    /// If `true`, texts are lower-cased before anything else, `do_lower_case`.
    pub do_lower_case: bool,
    /// A JSON object whose keys take precedence over those of `tokenizer_config.json`, `processor_kwargs`; empty for
    /// none.
    pub tokenizer: String,
    /// Another tokenizer, `tokenizer_name_or_path`, which has to be given as a path.
    pub tokenizer_name: Option<String>,
    /// Texts that are put in front of each text, by name, `prompts`.
    pub prompts: BTreeMap<String, String>,
    /// The prompt of texts for which none is named, `default_prompt_name`.
    pub default_prompt: Option<String>,
    /// Similarity that the vectors are meant for, `similarity_fn_name`.
    pub similarity: Similarity,
    /// Number of features that vectors are cut to, `truncate_dim`.
    pub truncate_dim: Option<usize>,
}

/// The list of modules of a folder.
const MODULES: &str = "modules.json";

/// A module of `modules.json`.
pub(super) struct Entry {
    /// The last part of its class.
    pub class: String,
    /// Its folder.
    pub folder: PathBuf,
}

/// The modules of a folder, or `None` if it lists none.
///
/// Errors: a list that cannot be read; classes that are not sentence-transformers' own; folders outside of this one.
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
            return Err(broken(format!("lists the module `{class}`, which is not one of sentence-transformers")));
        };
        ensure!(
            place.components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir)),
            broken(format!("names the folder `{}`, expected one below this one", place.display()))
        );
        entries.push(Entry { class: last.to_string(), folder: folder.join(place) });
    }
    Ok(Some(entries))
}

/// The folder of the model of tokens: that of the module `Transformer`, or the folder itself.
pub(super) fn transformer(folder: &Path) -> Result<PathBuf> {
    let found = entries(folder)?.into_iter().flatten().find(|entry| entry.class == "Transformer");
    Ok(found.map_or_else(|| folder.to_path_buf(), |entry| entry.folder))
}

impl Pretrained {
    /// The same as a model that gives one vector for a text, by the modules that the folder lists (`modules.json` of
    /// sentence-transformers), by the mean of the tokens if it lists none.
    ///
    /// Errors: those of [`Pretrained::model`]; a family that continues texts, unless the folder lists modules; a module
    /// or an option that is not known.
    pub fn sentence_encoder(&self, dtype: DType, device: &Device) -> Result<SentenceEncoder> {
        let listed = self.root.as_deref().is_some_and(|root| root.join(MODULES).exists());
        if self.family.is_causal() {
            let why = format!("is of the family {}, which embeds no sentences", self.family);
            ensure!(listed, Error::file(self.file.path(), format_args!("{why} without `{MODULES}` beside it")));
            self.sees_later_tokens()?;
        }
        // Small, and sooner refused than weights are read.
        let modules = self.sentence_modules(dtype, device)?;
        let encoder = SentenceEncoder::with_modules(self.model(dtype, device)?, modules);
        encoder.map_err(|why| match &self.root {
            Some(root) => Error::file(root.join(MODULES), why.to_string()),
            None => why,
        })
    }

    /// Refuses configs that let the tokens of a family that continues texts see later ones.
    fn sees_later_tokens(&self) -> Result<()> {
        let Some(folder) = &self.folder else { return Ok(()) };
        let path = folder.join("config.json");
        let options = Options { value: json(&path)?, path };
        options.only("is_causal", true)?;
        options.only("use_bidirectional_attention", false)
    }

    /// The modules after the model of tokens, as the folder lists them, with their weights.
    ///
    /// Errors: a module or an option that is not known; weights that do not fit.
    pub fn sentence_modules(&self, dtype: DType, device: &Device) -> Result<Vec<SentenceModule>> {
        let listed = self.root.as_deref().map(entries).transpose()?.flatten();
        let mut modules = match listed {
            Some(entries) => {
                let path = self.root.as_deref().unwrap_or(Path::new("")).join(MODULES);
                let read = |entry: &Entry| sentence_modules::read(entry, &path, dtype, device).transpose();
                let (first, rest) = entries.split_first().ok_or_else(|| Error::file(&path, "lists no module"))?;
                ensure!(
                    first.class == "Transformer",
                    Error::file(
                        &path,
                        format_args!("begins with the module `{}`, expected `Transformer`", first.class)
                    )
                );
                rest.iter().filter_map(read).collect::<Result<Vec<_>>>()?
            }
            None => vec![SentenceModule::Pooling { modes: vec![Pooling::Mean], include_prompt: true }],
        };
        modules.extend(self.sentence_options()?.truncate_dim.map(SentenceModule::Truncate));
        Ok(modules)
    }

    /// The folder's settings for texts: `sentence_bert_config.json` and `config_sentence_transformers.json` of
    /// sentence-transformers.
    ///
    /// Errors: a file that cannot be read, or an option that changes vectors and is not known.
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
                // How the weights are loaded and kept; what they are multiplied with is for the caller to say here.
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
                ensure!(
                    found == Some(&text),
                    options.refuse(key, format!("is {value}, expected the last hidden state of texts, {text}"))
                );
            }
            "tokenizer_name_or_path" => to.tokenizer_name = Some(options.text(key, "")?.to_string()),
            // Of texts that are marked as queries or documents, which is not asked here; and how batches are packed.
            "query_length" | "document_length" | "query_expansion" | "unpad_inputs" => {}
            _ => return Err(options.refuse(key, "is not a known option of the module `Transformer`")),
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
                        other => return Err(options.refuse(key, format!("has {other} for `{name}`, expected text"))),
                    };
                    to.prompts.insert(name.clone(), text.to_string());
                }
            }
            "default_prompt_name" => to.default_prompt = Some(options.text(key, "")?.to_string()),
            "similarity_fn_name" => {
                // Others are not of vectors of texts, and the package goes back to cosines too.
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
            _ => return Err(options.refuse(key, "is not a known option of a model of sentences")),
        }
    }
    // These two are there in every model, and empty unless the folder says otherwise.
    for name in ["query", "document"] {
        to.prompts.entry(name.to_string()).or_default();
    }
    match &to.default_prompt {
        Some(name) if !to.prompts.contains_key(name) => {
            let known = to.prompts.keys().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
            Err(options.refuse("default_prompt_name", format!("is `{name}`, expected one of {known}")))
        }
        _ => Ok(()),
    }
}
