//! Pretrained models of other families: options, names and weights, as their files describe them.

mod bert;
mod ends;
mod export;
mod family;
mod gguf;
mod llama;
mod llama_gguf;
mod names;
mod options;
mod peft;
mod quantize;
mod rope;
mod sentence;
mod sentence_modules;

use std::{
    collections::{BTreeMap, HashSet},
    path::{Path, PathBuf},
};

pub use self::{
    export::write_folder,
    family::Family,
    quantize::write_quantized,
    sentence::{SentenceOptions, Similarity},
};

use self::{
    names::Names,
    options::{Options, is_mistaken, json},
};
use crate::{
    DType, Device, Error, ErrorKind, ParamMap, ParamStore, Result, Tensor,
    collect::CollectVec,
    config::{AutoregressiveConfig, TransformerWrapperConfig},
    error::ensure,
    io::{Format, Metadata, Renamed, TensorFile, holds_gguf},
    models::{AutoregressiveWrapper, TransformerWrapper},
    params::defers,
    sort::sort,
};

/// Pretrained model of another family: its options as options of this crate, and its file of weights.
///
/// [`Family`] lists the families. A model is a folder with `config.json` and weights in any of the formats of
/// [`TensorFile`], or a GGUF file. Unsupported features of these families are errors that name them, never ignored:
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
    /// Folder that was opened: the model's, or the one above it with the modules of sentence-transformers.
    root: Option<PathBuf>,
    ends: Vec<i64>,
    /// If `true`, quantised weights stay packed.
    packed: bool,
}

/// File as its family reads it: the options, and the source of each parameter.
type Described = (TransformerWrapperConfig, Names);

impl Pretrained {
    /// Returns `true` for the path of a pretrained model, `false` for a checkpoint that this crate wrote.
    pub fn is_one(path: impl AsRef<Path>) -> bool {
        let path = path.as_ref();
        if !path.is_dir() {
            return path.is_file();
        }
        let folder = sentence::transformer(path).unwrap_or_else(|_| path.to_path_buf());
        match json(&folder.join("config.json")) {
            // This crate writes the key `model`.
            Ok(config) => config.is_object() && (config.get("model_type").is_some() || config.get("model").is_none()),
            // The error should name a config that a failed download left.
            Err(_) if is_mistaken(&folder.join("config.json")) => true,
            Err(_) => holds_gguf(path),
        }
    }

    /// Opens a folder, a file of weights with `config.json` beside it, or a GGUF file.
    ///
    /// The weights of a folder may have names from wrappers and trainers: below `module.`, `_orig_mod.`, `state_dict.`,
    /// `0.auto_model.` and the like, with or without the `model.` or `bert.` of a model with a head, with `gamma` and
    /// `beta` for a norm's `weight` and `bias`. If a file has the weights of a model in several such places, the
    /// family's own place takes precedence, then one below known wrappers. [`Pretrained::unused`] lists weights that
    /// the model does not use.
    ///
    /// Errors: a file that cannot be read, an unsupported family or option, or weights in several ambiguous places.
    #[doc(alias = "from_pretrained")]
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let root = path.as_ref();
        let path = &if root.is_dir() { sentence::transformer(root)? } else { root.to_path_buf() };
        let mut file = TensorFile::open(path)?;
        if file.format() == Format::Gguf {
            let (family, (config, names)) = gguf::of_gguf(&file)?;
            let ends = ends::of_gguf(&file, config.num_tokens);
            let renamed = Renamed::default();
            return Ok(Self { family, config, names, file, renamed, folder: None, root: None, ends, packed: true });
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
            packed: true,
        })
    }

    /// Returns the family.
    pub fn family(&self) -> Family {
        self.family
    }

    /// Returns the options.
    pub fn config(&self) -> &TransformerWrapperConfig {
        &self.config
    }

    /// Returns the file with the weights, by the family's names in `transformers` or in GGUF.
    pub fn file(&self) -> &TensorFile {
        &self.file
    }

    /// Moves the metadata out of a GGUF file, the vocabulary among them: several megabytes that a model does not need. The
    /// tokenizer is read before, and [`Pretrained::write_quantized`] needs them.
    pub fn take_metadata(&mut self) -> BTreeMap<String, Metadata> {
        self.file.take_metadata()
    }

    /// Returns the folder with the model's other files, such as the tokenizer; `None` for a GGUF file, which holds all.
    pub fn folder(&self) -> Option<&Path> {
        self.folder.as_deref()
    }

    /// Returns the end tokens, for [`GenerateOptions::eos_tokens`]; none for a model that embeds texts.
    ///
    /// A folder names them in `generation_config.json`, or else in `config.json`. A GGUF file names the ends of a text,
    /// a turn and a message; tokens spelled like one, such as `<|im_end|>`, are end tokens too, as in llama.cpp.
    /// Numbers outside the vocabulary, such as -1, are omitted.
    ///
    /// [`GenerateOptions::eos_tokens`]: crate::models::GenerateOptions::eos_tokens
    pub fn end_tokens(&self) -> &[i64] {
        &self.ends
    }

    /// Returns the weights of the file that the model does not use, by their names in the file, in alphabetical order:
    /// for instance a classification head or the moments of an optimizer. Buffers, such as positions and rotations, are
    /// not included.
    ///
    /// A folder with such weights loads without them; they may indicate that its config belongs to another model.
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
        let mut unused: Vec<String> = unused.iter().map(|name| self.renamed.of_file(name)).collect_vec();
        sort(&mut unused);
        unused
    }

    /// Returns the same model with weights that are dequantised when they are loaded, instead of staying packed.
    ///
    /// Needed for training them, and to compute with their exact values: products of packed weights round their inputs.
    #[must_use]
    pub fn dequantized(self) -> Self {
        Self { packed: false, ..self }
    }

    /// Creates the model with its weights.
    ///
    /// Quantised matrices of a type that [is packed](crate::QuantType::is_packed) stay as the file has them, see
    /// [`PackedMatrix`](crate::ops::PackedMatrix), unless the model is [dequantized](Pretrained::dequantized); `dtype` is that
    /// of the other weights, of activations and of the key/value cache.
    ///
    /// Errors: [`ErrorKind::Weights`] with a table of tensors that are missing or have another shape and, for a GGUF
    /// file, unused ones, by the file's names; weights that are NaN, infinite or too large for the dtype; out of
    /// memory.
    pub fn model(&self, dtype: DType, device: &Device) -> Result<TransformerWrapper> {
        let new = |store: &ParamStore| TransformerWrapper::new(&self.config, store);
        Ok(self.load(dtype, device, "", new, |model| model)?.0)
    }

    /// Creates the model with its weights, as a model that generates text; see [`Pretrained::model`].
    ///
    /// Errors: those of [`Pretrained::model`], or a model that is not causal.
    #[doc(alias = "AutoModelForCausalLM")]
    pub fn autoregressive(&self, dtype: DType, device: &Device) -> Result<AutoregressiveWrapper> {
        Ok(self.load_autoregressive(dtype, device)?.0)
    }

    /// Returns the options and the weights of the model that generates text, by this crate's names and dequantised: what a
    /// run that tunes all of them begins with ([`Trainer::start_from`]).
    ///
    /// [`Trainer::start_from`]: crate::train::Trainer::start_from
    ///
    /// Errors: those of [`Pretrained::autoregressive`].
    pub fn state_dict(&self) -> Result<(AutoregressiveConfig, BTreeMap<String, Tensor>)> {
        self.check_causal()?;
        self.check()?;
        let config = AutoregressiveConfig { net: self.config.clone(), ..AutoregressiveConfig::default() };
        let store = ParamStore::shapes(DType::F32, &Device::Cpu);
        AutoregressiveWrapper::new(&config, &store)?;
        self.names.load(&self.file, &store.params(), "net.", &HashSet::new(), false)?;
        Ok((config, store.params().state_dict()))
    }

    /// Returns the options and the weights of the model by itself, by this crate's names and dequantised, such as those of an
    /// encoder that gets a head.
    ///
    /// Errors: those of [`Pretrained::model`].
    pub fn encoder_state_dict(&self) -> Result<(TransformerWrapperConfig, BTreeMap<String, Tensor>)> {
        self.check()?;
        let store = ParamStore::shapes(DType::F32, &Device::Cpu);
        TransformerWrapper::new(&self.config, &store)?;
        self.names.load(&self.file, &store.params(), "", &HashSet::new(), false)?;
        Ok((self.config.clone(), store.params().state_dict()))
    }

    fn check_causal(&self) -> Result<()> {
        ensure!(
            self.family.is_causal(),
            Error::file(
                self.file.path(),
                format_args!("belongs to the {} family, which does not generate text", self.family)
            )
        );
        Ok(())
    }

    /// Like [`Pretrained::autoregressive`], and returns the parameters, those among them too that packed weights replace.
    fn load_autoregressive(&self, dtype: DType, device: &Device) -> Result<(AutoregressiveWrapper, ParamMap)> {
        self.check_causal()?;
        let config = AutoregressiveConfig { net: self.config.clone(), ..AutoregressiveConfig::default() };
        self.load(dtype, device, "net.", |store| AutoregressiveWrapper::new(&config, store), |model| &mut model.net)
    }

    /// Creates a model with its weights, whose names begin with `place`.
    fn load<M>(
        &self,
        dtype: DType,
        device: &Device,
        place: &str,
        new: impl FnOnce(&ParamStore) -> Result<M>,
        net: impl Fn(&mut M) -> &mut TransformerWrapper,
    ) -> Result<(M, ParamMap)> {
        self.check()?;
        // Every parameter is replaced: those of the file by their values, and packed ones by their matrices.
        let store = ParamStore::shapes(dtype, device);
        let mut model = new(&store)?;
        let mut may_be_packed = HashSet::new();
        if self.packed {
            net(&mut model).pack(&mut |param| {
                may_be_packed.insert(param.leaf());
                Ok(None)
            })?;
        }
        let packed = self.names.load(&self.file, &store.params(), place, &may_be_packed, defers())?;
        net(&mut model).pack(&mut |param| Ok(packed.get(&param.leaf()).cloned()))?;
        Ok((model, store.params()))
    }

    /// Checks that file and options fit, before allocating memory for the model.
    fn check(&self) -> Result<()> {
        let shapes = ParamStore::shapes(DType::F32, &Device::Cpu);
        TransformerWrapper::new(&self.config, &shapes)?;
        // Programs that read GGUF use all of its tensors.
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
}

/// Returns the `mult` for exactly this number of inner features of a feedforward.
fn ff_mult(dim: usize, inner: usize) -> f64 {
    // The plan rounds down: the middle of the interval is safe.
    (inner as f64 + 0.5) / dim as f64
}
