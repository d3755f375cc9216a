//! Pretrained models of other families, as their files describe them.

mod bert;
mod ends;
mod gguf;
mod llama;
mod options;
mod rope;
mod sentence;

use std::{
    fmt,
    path::{Path, PathBuf},
};

use self::options::{Options, json};
use super::{Format, TensorFile, names::Names, tensor_file::holds_gguf};
use crate::{
    DType, Device, Error, ParamMap, Result, Store,
    config::{AutoregressiveConfig, TransformerWrapperConfig},
    error::{At, ensure},
    models::{AutoregressiveWrapper, TransformerWrapper},
};

/// A pretrained model of another family: its options as keywords of this crate, and its file of weights.
///
/// | family | from |
/// |---|---|
/// | BERT, MiniLM among them | a folder with `config.json` and weights |
/// | ALBERT | the same |
/// | Llama, SmolLM and TinyLlama among them | the same, or GGUF of the architecture `llama` |
/// | Mistral | a folder, or GGUF of the architecture `llama` |
/// | Qwen 2 and 2.5 | a folder, or GGUF of the architecture `qwen2` |
///
/// Weights are in any of the formats of [`TensorFile`]. What of these families is not supported is refused by name, never
/// left out:
///
/// | | supported | refused |
/// |---|---|---|
/// | rotation of a folder | `default`, `linear`, `dynamic` up to `max_position_embeddings`, `yarn`, `llama3` | `longrope`, a part of each head |
/// | rotation of GGUF | `none`, `linear` by either key, `yarn`, `rope_freqs.weight` | `longrope` |
/// | window | that of Mistral; that of Qwen 2 if all layers have it or none | layers that differ |
/// | biases | attention and feedforward of Llama, queries, keys and values of Qwen 2 | |
/// | sizes per layer in GGUF | equal ones | layers that differ, mixtures of experts |
/// | GGUF types | F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K to Q6_K, IQ4_NL, IQ4_XS, mixed as in Q4_K_M | IQ1 to IQ3, TQ, MXFP4 |
///
/// ```no_run
/// use x_transformers::{DType, Device, io::Pretrained};
/// # fn main() -> x_transformers::Result<()> {
/// let pretrained = Pretrained::open("SmolLM2-135M-Instruct.Q4_1.gguf")?;
/// println!("{} with {} tokens", pretrained.family(), pretrained.config().num_tokens);
/// let model = pretrained.autoregressive(DType::F32, &Device::Cpu)?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Pretrained {
    family: Family,
    config: TransformerWrapperConfig,
    names: Names,
    file: TensorFile,
    folder: Option<PathBuf>,
    ends: Vec<i64>,
}

/// A family of models.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Family {
    /// Devlin et al., <https://arxiv.org/abs/1810.04805>.
    Bert,
    /// Lan et al., <https://arxiv.org/abs/1909.11942>.
    Albert,
    /// Touvron et al., <https://arxiv.org/abs/2302.13971>.
    Llama,
    /// Jiang et al., <https://arxiv.org/abs/2310.06825>.
    Mistral,
    /// Qwen 2 and 2.5, <https://arxiv.org/abs/2407.10671>.
    Qwen2,
}

impl Family {
    /// Whether its models continue texts; the others embed them.
    pub fn is_causal(self) -> bool {
        matches!(self, Self::Llama | Self::Mistral | Self::Qwen2)
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Bert => "BERT",
            Self::Albert => "ALBERT",
            Self::Llama => "Llama",
            Self::Mistral => "Mistral",
            Self::Qwen2 => "Qwen2",
        })
    }
}

/// What a family makes of a file: the options, and where each parameter comes from.
type Described = (TransformerWrapperConfig, Names);

impl Pretrained {
    /// Whether a path is that of a pretrained model, and not of a checkpoint that this crate wrote.
    pub fn is_one(path: impl AsRef<Path>) -> bool {
        let path = path.as_ref();
        if path.is_dir() {
            // What this crate writes has the key `model`.
            return matches!(json(&path.join("config.json")), Ok(config) if config.get("model_type").is_some())
                || holds_gguf(path);
        }
        path.is_file()
    }

    /// Opens a folder or a GGUF file.
    ///
    /// Errors: a file that cannot be read, a family that is not among those above, or options that they do not have here.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let file = TensorFile::open(path)?;
        if file.format() == Format::Gguf {
            let (family, (config, names)) = gguf::of_gguf(&file)?;
            let ends = ends::of_gguf(&file, config.num_tokens);
            return Ok(Self { family, config, names, file, folder: None, ends });
        }
        let folder = if path.is_dir() { path } else { path.parent().unwrap_or(Path::new("")) };
        let place = folder.join("config.json");
        let options = Options { value: json(&place)?, path: place };
        let (family, (config, names)) = match options.text("model_type", "")? {
            "bert" => (Family::Bert, bert::bert(&options, &file)?),
            "albert" => (Family::Albert, bert::albert(&options, &file)?),
            "llama" => (Family::Llama, llama::of_json(&options, Family::Llama)?),
            "mistral" => (Family::Mistral, llama::of_json(&options, Family::Mistral)?),
            "qwen2" => (Family::Qwen2, llama::of_json(&options, Family::Qwen2)?),
            other => {
                let why = format!("is `{other}`, expected bert, albert, llama, mistral or qwen2");
                return Err(options.refuse("model_type", why));
            }
        };
        let ends = if family.is_causal() { ends::of_folder(&options, folder, config.num_tokens)? } else { Vec::new() };
        Ok(Self { family, config, names, file, folder: Some(folder.to_path_buf()), ends })
    }

    /// The family.
    pub fn family(&self) -> Family {
        self.family
    }

    /// The options.
    pub fn config(&self) -> &TransformerWrapperConfig {
        &self.config
    }

    /// The file with the weights.
    pub fn file(&self) -> &TensorFile {
        &self.file
    }

    /// The folder with what belongs to the model, a tokenizer for instance; none for a GGUF file, which holds all.
    pub fn folder(&self) -> Option<&Path> {
        self.folder.as_deref()
    }

    /// The tokens that end a text, for [`GenerateOptions::eos_tokens`]; none of a model that embeds texts.
    ///
    /// A folder names them in `generation_config.json`, or else in `config.json`. A GGUF file names the ends of a text, a
    /// turn and a message; tokens that are spelled like one, `<|im_end|>` for instance, are ends too, as in llama.cpp.
    /// Numbers outside of the vocabulary, such as -1, are left out.
    ///
    /// [`GenerateOptions::eos_tokens`]: crate::models::GenerateOptions::eos_tokens
    pub fn end_tokens(&self) -> &[i64] {
        &self.ends
    }

    /// The model with its weights.
    ///
    /// Errors: [`Error::Weights`] with a table of tensors that are missing, unused or of another shape, by the file's
    /// names; weights that are NaN or infinite; memory that runs out.
    pub fn model(&self, dtype: DType, device: &Device) -> Result<TransformerWrapper> {
        self.check()?;
        let store = Store::zeros(dtype, device);
        let model = TransformerWrapper::new(&self.config, &store)?;
        self.load(&store.params(), "")?;
        Ok(model)
    }

    /// The same as a model that continues texts.
    ///
    /// Errors: those of [`Pretrained::model`], or a model that sees later tokens.
    pub fn autoregressive(&self, dtype: DType, device: &Device) -> Result<AutoregressiveWrapper> {
        ensure!(
            self.family.is_causal(),
            Error::file(self.file.path(), format!("is of the family {}, which does not continue texts", self.family))
        );
        let config = AutoregressiveConfig { net: self.config.clone(), ..AutoregressiveConfig::default() };
        self.check()?;
        let store = Store::zeros(dtype, device);
        let model = AutoregressiveWrapper::new(&config, &store)?;
        self.load(&store.params(), "net.")?;
        Ok(model)
    }

    /// Whether file and options fit, before memory is taken for what the options say.
    fn check(&self) -> Result<()> {
        let shapes = Store::shapes(DType::F32, &Device::Cpu);
        TransformerWrapper::new(&self.config, &shapes)?;
        self.names.check(&self.file, &shapes.params()).at(self.file.path().display())
    }

    fn load(&self, params: &ParamMap, place: &str) -> Result<()> {
        params.load(&self.names.read(&self.file, place)?).at(self.file.path().display())
    }
}

/// The `mult` that gives exactly so many inner features of a feedforward.
fn ff_mult(dim: usize, inner: usize) -> f64 {
    // Rounded down in the plan: the middle of the interval is safe.
    (inner as f64 + 0.5) / dim as f64
}
