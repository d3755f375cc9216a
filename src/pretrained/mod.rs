//! Pretrained models of other families: their options, names and weights, as their files describe them.

mod bert;
mod ends;
mod family;
mod gguf;
mod llama;
mod names;
mod options;
mod rope;
mod sentence;
mod sentence_modules;

use std::path::{Path, PathBuf};

pub use self::{
    family::Family,
    sentence::{SentenceOptions, Similarity},
};

use self::{
    names::Names,
    options::{Options, is_mistaken, json},
};
use crate::{
    DType, Device, Error, ErrorKind, ParamMap, ParamStore, Result,
    config::{AutoregressiveConfig, TransformerWrapperConfig},
    error::ensure,
    io::{Format, Renamed, TensorFile, holds_gguf},
    models::{AutoregressiveWrapper, TransformerWrapper},
    sort::sort,
};

/// A pretrained model of another family: its options as keywords of this crate, and its file of weights.
///
/// [`Family`] lists the families. A model is a folder with `config.json` and weights in any of the formats of
/// [`TensorFile`], or a GGUF file. What of these families is not supported is refused by name, never left out:
///
/// | | supported | refused |
/// |---|---|---|
/// | rotation of a folder | `default`, `linear`, `dynamic` up to `max_position_embeddings`, `yarn`, `llama3` |
/// `longrope`, a part of each head |
/// | rotation of GGUF | `none`, `linear` by either key, `yarn`, `rope_freqs.weight` | `longrope` |
/// | window | that of Mistral; that of Qwen 2 if all layers have it or none | layers that differ |
/// | biases | attention and feedforward of Llama, queries, keys and values of Qwen 2 | |
/// | sizes per layer in GGUF | equal ones | layers that differ, mixtures of experts |
/// | GGUF types | F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K to Q6_K, IQ4_NL, IQ4_XS, mixed as in Q4_K_M | IQ1
/// to IQ3, TQ, MXFP4 |
///
/// ```no_run
/// use x_transformers::{DType, Device, pretrained::Pretrained};
/// # fn main() -> x_transformers::Result<()> {
/// let pretrained = Pretrained::open("SmolLM2-135M-Instruct.Q4_1.gguf")?;
/// println!("{} with {} tokens", pretrained.family(), pretrained.config().num_tokens);
/// let model = pretrained.autoregressive(DType::F32, &Device::Cpu)?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
#[doc(alias = "AutoModel")]
#[doc(alias = "from_pretrained")]
pub struct Pretrained {
    family: Family,
    config: TransformerWrapperConfig,
    names: Names,
    file: TensorFile,
    renamed: Renamed,
    folder: Option<PathBuf>,
    /// The folder that was opened: the same one, or that above it with the modules of sentence-transformers.
    root: Option<PathBuf>,
    ends: Vec<i64>,
}

/// A file as its family reads it: the options, and where each parameter comes from.
type Described = (TransformerWrapperConfig, Names);

impl Pretrained {
    /// Returns `true` for the path of a pretrained model, `false` for that of a checkpoint which this crate wrote.
    pub fn is_one(path: impl AsRef<Path>) -> bool {
        let path = path.as_ref();
        if !path.is_dir() {
            return path.is_file();
        }
        let folder = sentence::transformer(path).unwrap_or_else(|_| path.to_path_buf());
        match json(&folder.join("config.json")) {
            // This crate writes the key `model`.
            Ok(config) => config.is_object() && (config.get("model_type").is_some() || config.get("model").is_none()),
            // A config that a failed download left is the reason to give.
            Err(_) if is_mistaken(&folder.join("config.json")) => true,
            Err(_) => holds_gguf(path),
        }
    }

    /// Opens a folder, a file of weights with `config.json` beside it, or a GGUF file.
    ///
    /// The weights of a folder may have the names that wrappers and trainers give them: below `module.`, `_orig_mod.`,
    /// `state_dict.`, `0.auto_model.` and the like, with or without the `model.` or `bert.` of a model with a head,
    /// with `gamma` and `beta` for a norm's `weight` and `bias`. Where a file has the weights of a model at several
    /// such places, the family's own place is meant, then one below known wrappers. What the model has no use for is
    /// [`Pretrained::unused`].
    ///
    /// Errors: a file that cannot be read, a family that is not among those above, options that they do not have here,
    /// or weights at several places that may be meant.
    #[doc(alias = "from_pretrained")]
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let root = path.as_ref();
        let path = &if root.is_dir() { sentence::transformer(root)? } else { root.to_path_buf() };
        let mut file = TensorFile::open(path)?;
        if file.format() == Format::Gguf {
            let (family, (config, names)) = gguf::of_gguf(&file)?;
            let ends = ends::of_gguf(&file, config.num_tokens);
            let renamed = Renamed::default();
            return Ok(Self { family, config, names, file, renamed, folder: None, root: None, ends });
        }
        let folder = if path.is_dir() { path } else { path.parent().unwrap_or(Path::new("")) };
        let root = if root.is_dir() { root } else { folder };
        let place = folder.join("config.json");
        let options = Options { value: json(&place)?, path: place };
        let family = Family::of(&options)?;
        let renamed = family.layout().apply(&mut file)?;
        let (config, names) = family.read(&options, &file)?;
        let ends = if family.is_causal() { ends::of_folder(&options, folder, config.num_tokens)? } else { Vec::new() };
        Ok(Self {
            family,
            config,
            names,
            file,
            renamed,
            folder: Some(folder.to_path_buf()),
            root: Some(root.to_path_buf()),
            ends,
        })
    }

    /// The family.
    pub fn family(&self) -> Family {
        self.family
    }

    /// The options.
    pub fn config(&self) -> &TransformerWrapperConfig {
        &self.config
    }

    /// The file with the weights, under the names that the family has in `transformers` or in GGUF.
    pub fn file(&self) -> &TensorFile {
        &self.file
    }

    /// The folder with what belongs to the model, a tokenizer for instance; none for a GGUF file, which holds all.
    pub fn folder(&self) -> Option<&Path> {
        self.folder.as_deref()
    }

    /// The tokens that end a text, for [`GenerateOptions::eos_tokens`]; none of a model that embeds texts.
    ///
    /// A folder names them in `generation_config.json`, or else in `config.json`. A GGUF file names the ends of a text,
    /// a turn and a message; tokens that are spelled like one, `<|im_end|>` for instance, are ends too, as in
    /// llama.cpp. Numbers outside of the vocabulary, such as -1, are left out.
    ///
    /// [`GenerateOptions::eos_tokens`]: crate::models::GenerateOptions::eos_tokens
    pub fn end_tokens(&self) -> &[i64] {
        &self.ends
    }

    /// The weights of the file that the model has no use for, by their names in the file, in alphabetical order: those
    /// of a classifier's head, say, or the moments of an optimizer. Buffers, such as positions and rotations, are not
    /// among them.
    ///
    /// A folder with such weights is loaded without them; they may be a sign that its config is not theirs.
    ///
    /// ```no_run
    /// # fn main() -> x_transformers::Result<()> {
    /// let pretrained = x_transformers::pretrained::Pretrained::open("bert-base-uncased")?;
    /// assert!(pretrained.unused().is_empty(), "left out: {:?}", pretrained.unused());
    /// # Ok(())
    /// # }
    /// ```
    pub fn unused(&self) -> Vec<String> {
        let unused = self.names.unused(&self.file);
        let mut unused: Vec<String> = unused.iter().map(|name| self.renamed.of_file(name)).collect();
        sort(&mut unused);
        unused
    }

    /// The model with its weights.
    ///
    /// Errors: [`ErrorKind::Weights`] with a table of tensors that are missing or of another shape, and for a GGUF file
    /// unused, by the file's names; weights that are NaN, infinite or too large for the dtype; memory that runs out.
    pub fn model(&self, dtype: DType, device: &Device) -> Result<TransformerWrapper> {
        self.check()?;
        let store = ParamStore::zeros(dtype, device);
        let model = TransformerWrapper::new(&self.config, &store)?;
        self.load(&store.params(), "")?;
        Ok(model)
    }

    /// The same as a model that continues texts.
    ///
    /// Errors: those of [`Pretrained::model`], or a model that sees later tokens.
    #[doc(alias = "AutoModelForCausalLM")]
    pub fn autoregressive(&self, dtype: DType, device: &Device) -> Result<AutoregressiveWrapper> {
        ensure!(
            self.family.is_causal(),
            Error::file(
                self.file.path(),
                format_args!("is of the family {}, which does not continue texts", self.family)
            )
        );
        let config = AutoregressiveConfig { net: self.config.clone(), ..AutoregressiveConfig::default() };
        self.check()?;
        let store = ParamStore::zeros(dtype, device);
        let model = AutoregressiveWrapper::new(&config, &store)?;
        self.load(&store.params(), "net.")?;
        Ok(model)
    }

    /// Checks that file and options fit, before memory is taken for what the options say.
    fn check(&self) -> Result<()> {
        let shapes = ParamStore::shapes(DType::F32, &Device::Cpu);
        TransformerWrapper::new(&self.config, &shapes)?;
        // Programs that read GGUF use all that is in it.
        let strict = self.file.format() == Format::Gguf;
        let of_file = |names: Vec<String>| names.iter().map(|name| self.renamed.of_file(name)).collect();
        self.names.check(&self.file, &shapes.params(), strict).map_err(|error| match error.into_kind() {
            ErrorKind::Weights { missing, unused, mismatched } => {
                let named = |(name, model, file): (String, _, _)| (self.renamed.of_file(&name), model, file);
                let mismatched = mismatched.into_iter().map(named).collect();
                let error =
                    Error::new(ErrorKind::Weights { missing: of_file(missing), unused: of_file(unused), mismatched });
                error.context(self.file.path().display())
            }
            other => Error::new(other),
        })
    }

    fn load(&self, params: &ParamMap, place: &str) -> Result<()> {
        self.names.load(&self.file, params, place)
    }
}

/// The `mult` that gives exactly so many inner features of a feedforward.
fn ff_mult(dim: usize, inner: usize) -> f64 {
    // Rounded down in the plan: the middle of the interval is safe.
    (inner as f64 + 0.5) / dim as f64
}
