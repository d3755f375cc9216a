//! Language models of which a run trains a low-rank adapter.

use std::{
    collections::BTreeMap,
    fmt,
    ops::Deref,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Checkpoint, TokenBatch, TrainModel, TrainOptions, checkpoint::config_of};
use crate::{
    DType, Device, Error, ParamMap, ParamStore, Result, Tensor,
    config::{AutoregressiveConfig, Config, ModelPlan},
    error::{ErrorContext, ensure},
    hash::{FNV1A_START, fnv1a_from},
    models::{AutoregressiveWrapper, LoraAdapter, LoraOptions},
    pretrained::Pretrained,
};

/// Number of bytes of a tensor that the fingerprint of a model depends on.
const PROBE: usize = 4096;

/// Options of a [`LoraModel`]: `config.json` in the checkpoint of its run.
///
/// A checkpoint keeps the adapter; the base stays where it is, and is opened again from there.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoraConfig {
    model: Class,
    /// Path of the base: a pretrained model that generates text, or a checkpoint of this crate.
    pub base: PathBuf,
    /// Hash of the base's names, shapes and first values.
    pub fingerprint: String,
    /// Options of the base.
    pub config: Value,
    /// Options of the adapter.
    pub lora: LoraOptions,
    /// If `true`, quantised weights of the base stay packed.
    pub packed: bool,
    /// Seed of the adapter's initial values.
    pub seed: u64,
    /// `Some(β)` if the adapter learns preferences ([`DpoModel`](super::DpoModel)).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dpo_beta: Option<f64>,
}

/// The value of `model` by which these options are known.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
enum Class {
    LoraModel,
}

/// Base of an adapter.
pub(super) enum Base {
    Pretrained(Box<Pretrained>),
    Own(Box<Config>, BTreeMap<String, Tensor>),
}

impl Base {
    pub(super) fn open(path: &Path, packed: bool) -> Result<Self> {
        if Pretrained::is_one(path) {
            let pretrained = Pretrained::open(path)?;
            return Ok(Self::Pretrained(Box::new(if packed { pretrained } else { pretrained.dequantized() })));
        }
        let (config, weights) = Checkpoint::load_averaged(path)?;
        ensure!(
            matches!(config.plan()?, ModelPlan::Autoregressive(_)),
            Error::file(path, "is not an AutoregressiveWrapper")
        );
        Ok(Self::Own(Box::new(config), weights))
    }

    pub(super) fn config(&self) -> Config {
        match self {
            Self::Pretrained(pretrained) => {
                AutoregressiveConfig { net: pretrained.config().clone(), ..Default::default() }.into()
            }
            Self::Own(config, _) => (**config).clone(),
        }
    }

    /// Returns the weights, dequantised.
    pub(super) fn state_dict(&self) -> Result<BTreeMap<String, Tensor>> {
        match self {
            Self::Pretrained(pretrained) => Ok(pretrained.state_dict()?.1),
            Self::Own(_, weights) => Ok(weights.clone()),
        }
    }

    pub(super) fn fingerprint(&self) -> Result<String> {
        let mut hash = FNV1A_START;
        let mut add = |name: &str, shape: &[usize], bytes: &[u8]| {
            hash = fnv1a_from(hash, name.as_bytes());
            for size in shape {
                hash = fnv1a_from(hash, &(*size as u64).to_le_bytes());
            }
            hash = fnv1a_from(hash, &bytes[..bytes.len().min(PROBE)]);
        };
        match self {
            Self::Pretrained(pretrained) => {
                let file = pretrained.file();
                for name in file.names() {
                    let bytes = file.first_bytes(name, PROBE)?;
                    add(name, &file.info(name).map(|info| info.shape).unwrap_or_default(), &bytes);
                }
            }
            Self::Own(_, weights) => {
                for (name, tensor) in weights {
                    add(name, &tensor.shape()[..], tensor.to_device(&Device::Cpu)?.contiguous()?.bytes()?);
                }
            }
        }
        Ok(format!("{hash:016x}"))
    }

    fn with_lora(
        &self,
        options: &LoraOptions,
        seed: u64,
        dtype: DType,
        device: &Device,
    ) -> Result<(AutoregressiveWrapper, ParamMap, LoraAdapter)> {
        match self {
            Self::Pretrained(pretrained) => pretrained.with_lora_and_params(options, seed, dtype, device),
            Self::Own(config, weights) => {
                let store = ParamStore::zeros(dtype, device);
                let mut model = <AutoregressiveWrapper as TrainModel>::build(config, &store)?;
                store.params().load(weights)?;
                let adapter = model.net.add_lora(&store.params(), options, seed)?;
                Ok((model, store.params(), adapter))
            }
        }
    }
}

impl LoraConfig {
    /// Creates the options of an adapter for a base, whose quantised weights stay packed.
    ///
    /// Errors: a base that cannot be opened, or does not generate text.
    pub fn new(base: impl AsRef<Path>, lora: LoraOptions, seed: u64) -> Result<Self> {
        let path = base.as_ref();
        lora.check()?;
        // The folder of a run may be used from elsewhere.
        let path = path.canonicalize().map_err(|error| Error::io(path, error))?;
        let base = Base::open(&path, true)?;
        if let Base::Pretrained(pretrained) = &base {
            ensure!(
                pretrained.family().is_causal(),
                Error::file(
                    &path,
                    format_args!("belongs to the {} family, which does not generate text", pretrained.family())
                )
            );
        }
        let (fingerprint, config) = (base.fingerprint()?, base.config().to_value());
        let (model, dpo_beta) = (Class::LoraModel, None);
        Ok(Self { model, base: path, fingerprint, config, lora, packed: true, seed, dpo_beta })
    }

    /// Reads the options of the checkpoint in a folder; `None` if its run does not train an adapter.
    ///
    /// Errors: a `config.json` that cannot be read, or is damaged.
    pub fn read(folder: impl AsRef<Path>) -> Result<Option<Self>> {
        config_of(folder.as_ref(), "LoraModel")
    }

    /// Returns the options of the base.
    ///
    /// Errors: options that no model has.
    pub fn base_config(&self) -> Result<Config> {
        Config::from_value(self.config.clone())
    }
}

/// Language model whose weights are frozen, with a low-rank adapter that is trained.
///
/// ```
/// use x_transformers::{models::LoraOptions, prelude::*, train::{LoraConfig, LoraModel}};
/// # fn main() -> x_transformers::Result<()> {
/// # let folder = std::env::temp_dir().join(format!("xt-lora-{}", std::process::id()));
/// let text = ByteText::from_bytes("It was the best of times, it was the worst of times. ".repeat(10))?;
/// let net = TransformerWrapperConfig::new(256, 16, AttentionLayersConfig::decoder(16, 1));
/// let config = AutoregressiveConfig { net, ..Default::default() };
/// let options = TrainOptions { steps: 2, warmup: 1, seq_len: 16, batch_size: 2, ..Default::default() };
/// Trainer::new(config, options.clone(), text.clone(), &Device::Cpu)?.save(folder.join("base"))?;
///
/// let lora = LoraOptions { r: 4, ..Default::default() };
/// let config = LoraConfig::new(folder.join("base"), lora, 0)?;
/// let mut trainer = Trainer::<LoraModel>::start(config, options, text, &Device::Cpu)?;
/// trainer.step()?;
/// trainer.save(folder.join("tuned"))?; // the adapter, its optimizer, and where the base is
/// let tuned = LoraModel::load(folder.join("tuned"), DType::F32, &Device::Cpu, true)?;
/// let (model, params) = tuned.merged()?; // an AutoregressiveWrapper and its weights, for instance to save them
/// # let _ = (model, params);
/// # std::fs::remove_dir_all(&folder).ok();
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct LoraModel {
    model: AutoregressiveWrapper,
    base: ParamMap,
    adapter: LoraAdapter,
}

impl fmt::Debug for LoraModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LoraModel").field("adapter", &self.adapter).finish_non_exhaustive()
    }
}

impl Deref for LoraModel {
    type Target = AutoregressiveWrapper;

    fn deref(&self) -> &AutoregressiveWrapper {
        &self.model
    }
}

impl LoraModel {
    /// Reads the checkpoint of a run, with the averaged weights of one that has them; if not `packed`, quantised weights of
    /// the base are dequantised.
    ///
    /// Errors: those of [`Checkpoint::load`]; a base that is not there any more, or has changed.
    pub fn load(folder: impl AsRef<Path>, dtype: DType, device: &Device, packed: bool) -> Result<Self> {
        let folder = folder.as_ref();
        let (config, weights) = Checkpoint::<LoraConfig>::averaged(folder)?;
        let config = LoraConfig { packed: packed && config.packed, ..config };
        let loaded = Self::build(&config, &ParamStore::zeros(dtype, device))?;
        loaded.adapter.params().load(&weights).context(folder.display())?;
        Ok(loaded)
    }

    /// Returns the adapter.
    pub fn adapter(&self) -> &LoraAdapter {
        &self.adapter
    }

    /// Returns the model with the adapter.
    pub fn into_inner(self) -> AutoregressiveWrapper {
        self.model
    }

    /// Returns the base, which shares its weights with this model.
    ///
    /// Errors: out of memory.
    pub(super) fn without_adapter(&self) -> Result<AutoregressiveWrapper> {
        let mut base = self.model.clone();
        base.net.without_lora()?;
        Ok(base)
    }

    /// Returns the model with the adapter's updates in its weights, and its parameters.
    ///
    /// Errors: weights that are packed; out of memory.
    pub fn merged(mut self) -> Result<(AutoregressiveWrapper, ParamMap)> {
        self.model.net.merge_lora()?;
        Ok((self.model, self.base))
    }
}

impl TrainModel for LoraModel {
    type Config = LoraConfig;
    type Batch = TokenBatch;

    fn build(config: &LoraConfig, store: &ParamStore) -> Result<Self> {
        let LoraConfig { base: path, fingerprint, lora, packed, seed, .. } = config;
        let base = Base::open(path, *packed).map_err(|error| error.context("the base of the adapter"))?;
        ensure!(
            base.fingerprint()? == *fingerprint && base.config().to_value() == config.config,
            Error::file(path, "has changed since the adapter was trained on it; use the model as it was")
        );
        let (model, base, adapter) = base.with_lora(lora, *seed, store.dtype(), store.device())?;
        Ok(Self { model, base, adapter })
    }

    fn trained_params(&self, _store: &ParamStore) -> ParamMap {
        self.adapter.params().clone()
    }

    fn frozen_params(&self) -> ParamMap {
        self.base.clone()
    }

    fn loss(&self, batch: &TokenBatch) -> Result<Tensor> {
        TrainModel::loss(&self.model, batch)
    }

    fn loss_recomputed(&self, batch: &TokenBatch) -> Result<Tensor> {
        self.model.loss_recomputed(batch)
    }

    fn check(config: &LoraConfig, options: &TrainOptions) -> Result<()> {
        <AutoregressiveWrapper as TrainModel>::check(&config.base_config()?, options)
    }

    fn config_to_json(config: &LoraConfig) -> Value {
        serde_json::to_value(config).unwrap_or_default()
    }

    fn config_from_json(json: Value) -> Result<LoraConfig> {
        super::model::parse(json, "an adapter")
    }

    fn num_tokens(config: &LoraConfig) -> usize {
        config.base_config().map_or(0, |config| <AutoregressiveWrapper as TrainModel>::num_tokens(&config))
    }

    fn max_seq_len(config: &LoraConfig) -> usize {
        config.base_config().map_or(0, |config| <AutoregressiveWrapper as TrainModel>::max_seq_len(&config))
    }
}
