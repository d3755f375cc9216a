//! Models that continue texts: what `xt train` wrote, and pretrained ones.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use clap::{Args, ValueEnum};
use x_transformers::{
    DType, Device, Error, ParamStore, QuantType, Tensor,
    config::{AutoregressivePlan, ModelPlan},
    models::AutoregressiveWrapper,
    pretrained::Pretrained,
    train::{Checkpoint, LoraConfig, LoraModel, TrainingState},
};

use crate::{
    allocator,
    compute::dtypes,
    failure::{Failure, Result},
    files,
    language::Language,
    tokenizer::Tokenizer,
    unused::StrictArgs,
};

/// Data type of the weights in memory.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Weights {
    /// Quantized weights as the file has them, others as f32
    Stored,
    /// 32-bit floats
    F32,
    /// 16-bit bfloat16
    Bf16,
    /// 16-bit half precision
    F16,
    /// 8-bit integers with a scale per 32 values
    #[value(name = "q8_0")]
    Q8_0,
    /// 4-bit integers with a scale per 32 values
    #[value(name = "q4_0")]
    Q4_0,
    /// 4-bit integers with 6-bit scales and minimums
    #[value(name = "q4_k")]
    Q4K,
}

/// Types of what a model computes with.
#[derive(Args, Clone, Copy)]
pub struct WeightsArgs {
    /// Data type of the weights in memory
    #[arg(long, value_enum, default_value_t = Weights::Stored)]
    weights: Weights,

    /// Data type of activations and the KV cache beside quantized weights [default: f32]
    #[arg(long, value_name = "DTYPE", value_parser = dtypes([DType::F32, DType::BF16, DType::F16]))]
    activations: Option<DType>,
}

impl WeightsArgs {
    /// Returns `true` if the weights are rounded to f16, which some overflow.
    pub fn are_f16(self) -> bool {
        self.dtype() == DType::F16
    }

    /// Returns `true` unless a type was asked for.
    pub fn are_stored(self) -> bool {
        self.weights == Weights::Stored && self.activations.is_none()
    }

    /// The type of activations, and of the weights that are not quantized.
    fn dtype(self) -> DType {
        match self.weights {
            Weights::Bf16 => DType::BF16,
            Weights::F16 => DType::F16,
            _ => self.activations.unwrap_or(DType::F32),
        }
    }

    /// Errors: another type of activations than that of weights which are not quantized.
    fn check(self) -> Result<()> {
        let fixed = matches!(self.weights, Weights::F32 | Weights::Bf16 | Weights::F16);
        if fixed && self.activations.is_some() {
            return Err(Failure::new(
                "`--activations` applies to quantized weights; others have the type of `--weights` throughout",
            ));
        }
        Ok(())
    }
}

impl Weights {
    /// The type that weights are rounded to.
    fn quantized(self) -> Option<QuantType> {
        match self {
            Self::Q8_0 => Some(QuantType::Q8_0),
            Self::Q4_0 => Some(QuantType::Q4_0),
            Self::Q4K => Some(QuantType::Q4K),
            Self::Stored | Self::F32 | Self::Bf16 | Self::F16 => None,
        }
    }
}

/// A checkpoint whose model is made later, when it is known that the texts fit.
pub struct Source {
    pub language: Language,
    kind: Kind,
    path: PathBuf,
    /// Folder of an adapter in PEFT's layout.
    adapter: Option<PathBuf>,
}

enum Kind {
    Trained(Box<AutoregressivePlan>, BTreeMap<String, Tensor>),
    Pretrained(Box<Pretrained>),
    /// A run that trained an adapter.
    Lora(Box<AutoregressivePlan>),
}

impl Source {
    /// Opens a folder of `xt train`, a folder of `transformers`, or a GGUF file; with a tokenizer if it is elsewhere.
    /// Quantised weights stay packed if they are kept as they are stored.
    pub fn open(path: &Path, tokenizer: Option<&Path>, strict: StrictArgs, types: WeightsArgs) -> Result<Self> {
        types.check()?;
        if Pretrained::is_one(path) {
            let mut pretrained = Pretrained::open(path)?;
            if types.weights != Weights::Stored {
                pretrained = pretrained.dequantized();
            }
            strict.check(&pretrained, path)?;
            if !pretrained.family().is_causal() {
                let why = format!(
                    "belongs to the {} family, which does not generate text; use a causal model such as Llama, or `xt \
                     embed`",
                    pretrained.family()
                );
                return Err(Failure::new(why).within(path));
            }
            let language = Language::pretrained(Tokenizer::of(&pretrained, tokenizer)?, pretrained.end_tokens());
            drop(pretrained.take_metadata());
            allocator::trim();
            let kind = Kind::Pretrained(Box::new(pretrained));
            return Ok(Self { language, kind, path: path.to_path_buf(), adapter: None });
        }
        let path = files::checkpoint(path);
        let broken = |error: Error| Failure::from(error).within(&path);
        if let Some(config) = LoraConfig::read(&path)? {
            let ModelPlan::Autoregressive(plan) = config.base_config().and_then(|base| base.plan()).map_err(broken)?
            else {
                return Err(Failure::new("expected an adapter of an AutoregressiveWrapper").within(&path));
            };
            let language = language(&path, tokenizer, plan.net.num_tokens)?;
            return Ok(Self { language, kind: Kind::Lora(Box::new(plan)), path, adapter: None });
        }
        let (config, values) = Checkpoint::load_averaged(&path)?;
        let ModelPlan::Autoregressive(plan) = config.plan().map_err(broken)? else {
            let why = "expected an AutoregressiveWrapper; name a folder that `xt train` wrote";
            return Err(Failure::new(why).within(&path));
        };
        let language = language(&path, tokenizer, plan.net.num_tokens)?;
        Ok(Self { language, kind: Kind::Trained(Box::new(plan), values), path, adapter: None })
    }

    /// Adds an adapter in PEFT's layout, with which the model will be made.
    ///
    /// Errors: a model that is not pretrained.
    pub fn add_adapter(&mut self, folder: &Path) -> Result<()> {
        let Kind::Pretrained(_) = &self.kind else {
            let why =
                "is not a pretrained model; `--adapter` is in PEFT's layout, whose names are those of transformers";
            return Err(Failure::new(why).within(&self.path));
        };
        self.adapter = Some(folder.to_path_buf());
        Ok(())
    }

    /// The tokens that end a text, or a turn of a chat, as the files name them.
    pub fn ends(&self, chat: bool) -> Vec<i64> {
        let mut ends = self.language.ends().to_vec();
        let of_turns = self.language.end_of_turn().filter(|&end| chat && (end as usize) < self.vocabulary());
        ends.extend(of_turns.filter(|end| !ends.contains(end)));
        ends
    }

    /// Tokens that the model sees.
    pub fn window(&self) -> usize {
        match &self.kind {
            Kind::Trained(plan, _) | Kind::Lora(plan) => plan.net.window(),
            Kind::Pretrained(pretrained) => pretrained.config().max_seq_len,
        }
    }

    /// Tokens that a loss predicts at once. One of version 2 reads the last token too, which a table of positions must hold.
    pub fn predicted(&self) -> usize {
        match &self.kind {
            Kind::Trained(plan, _) | Kind::Lora(plan)
                if plan.loss.reads_all && plan.net.absolute_positions.is_table() =>
            {
                self.window().saturating_sub(1).max(1)
            }
            _ => self.window(),
        }
    }

    /// Number of tokens in the vocabulary.
    pub fn vocabulary(&self) -> usize {
        match &self.kind {
            Kind::Trained(plan, _) | Kind::Lora(plan) => plan.net.num_tokens,
            Kind::Pretrained(pretrained) => pretrained.config().num_tokens,
        }
    }

    /// Returns the number of tokens that may follow a text of this many: models of `xt train` have no limit, since they
    /// continue from the last tokens in their context.
    pub fn room(&self, tokens: usize) -> Result<usize> {
        match &self.kind {
            Kind::Trained(..) | Kind::Lora(_) => Ok(usize::MAX),
            Kind::Pretrained(_) => {
                let window = self.window();
                if tokens >= window {
                    return Err(Failure::new(format_args!(
                        "the prompt has {tokens} tokens, but the model's context is {window}; use a shorter prompt"
                    )));
                }
                Ok(window - tokens)
            }
        }
    }

    /// The model with its weights.
    pub fn model(&self, types: WeightsArgs, device: &Device) -> Result<AutoregressiveWrapper> {
        let dtype = types.dtype();
        let broken = |error: Error| Failure::from(error).within(&self.path);
        let mut model = match &self.kind {
            Kind::Pretrained(pretrained) => match &self.adapter {
                None => pretrained.autoregressive(dtype, device)?,
                Some(folder) => {
                    let (mut model, _) = pretrained.with_adapter(folder, dtype, device)?;
                    if types.weights != Weights::Stored {
                        model.net.merge_lora()?;
                    }
                    model
                }
            },
            Kind::Lora(_) => {
                // As it is stored means: what is quantized stays so, with the adapter beside it. Else it is in the weights.
                let packed = types.weights == Weights::Stored;
                let model = LoraModel::load(&self.path, dtype, device, packed)?;
                if packed { model.into_inner() } else { model.merged()?.0 }
            }
            Kind::Trained(plan, values) => {
                let store = ParamStore::zeros(dtype, device);
                let model = AutoregressiveWrapper::from_plan((**plan).clone(), &store).map_err(broken)?;
                store.params().load(values).map_err(broken)?;
                model
            }
        };
        if let Some(kind) = types.weights.quantized() {
            model.quantize(kind).map_err(broken)?;
        }
        Ok(model)
    }
}

/// Checks that the tokens of a run without a tokenizer were bytes.
pub fn check_bytes(checkpoint: &Path, training: &TrainingState) -> Result<()> {
    if matches!(&*training.data.kind, "text" | "pairs" | "captions" | "groups") {
        return Ok(());
    }
    let why = "is a model of tokens whose run had no tokenizer; name one with `--tokenizer`";
    Err(Failure::new(why).within(checkpoint))
}

/// The language of a model of `xt train`: that of its tokenizer, or bytes.
pub fn language(checkpoint: &Path, given: Option<&Path>, num_tokens: usize) -> Result<Language> {
    let training = Checkpoint::load_training(checkpoint).ok();
    let own = training.as_ref().and_then(|training| Some(checkpoint.join(training.tokenizer.as_ref()?)));
    let Some(path) = given.or(own.as_deref()) else {
        // A folder with only a config and weights is a model of bytes.
        return match training {
            Some(training) => check_bytes(checkpoint, &training).map(|()| Language::Bytes),
            None => Ok(Language::Bytes),
        };
    };
    let language = Language::open(path)?;
    let count = language.tokenizer().map_or(0, Tokenizer::num_tokens);
    if count > num_tokens {
        let why = format!("has a vocabulary of {count} tokens, but the model has {num_tokens}");
        return Err(Failure::new(why).within(path));
    }
    Ok(language)
}
