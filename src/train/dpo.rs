//! Direct preference optimization.

use std::{
    collections::BTreeMap,
    ops::Deref,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{GroupBatch, LoraConfig, LoraModel, TrainModel, TrainOptions, checkpoint::DPO, lora::Base};
use crate::{
    DType, Error, ParamMap, ParamStore, Result, Tape, Tensor,
    collect::CollectVec,
    config::{Config, ModelPlan},
    error::{ErrorContext, ensure},
    models::{AutoregressiveWrapper, ForwardOptions, LoraAdapter, LoraOptions},
    nn::log_sigmoid,
};

/// Options of a [`DpoModel`]: `config.json` in the checkpoint of its run.
#[derive(Clone, PartialEq, Debug)]
pub struct DpoConfig {
    part: Part,
    beta: f64,
}

/// The weights that are trained.
#[derive(Clone, PartialEq, Debug)]
enum Part {
    All(Reference),
    Adapter(Box<LoraConfig>),
}

/// The model that a run of all weights began with, which stays where it is.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Reference {
    model: Class,
    base: PathBuf,
    fingerprint: String,
    config: Value,
    dpo_beta: f64,
}

/// The value of `model` by which these options are known.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
enum Class {
    DpoModel,
}

impl DpoConfig {
    /// Creates the options of a run that trains all weights of the model at a path, or an adapter of it: a pretrained model
    /// that generates text, or a checkpoint of this crate. The model is also the reference, which stays as it is.
    ///
    /// Errors: those of [`LoraConfig::new`]; a `beta` that is not positive.
    pub fn new(base: impl AsRef<Path>, lora: Option<LoraOptions>, beta: f64, seed: u64) -> Result<Self> {
        let mut adapter = LoraConfig::new(base, lora.clone().unwrap_or_default(), seed)?;
        ensure!(
            beta > 0.0 && beta.is_finite(),
            Error::option("dpo_beta", format_args!("expected a positive number, got {beta}"))
        );
        let part = match lora {
            Some(_) => {
                adapter.dpo_beta = Some(beta);
                Part::Adapter(Box::new(adapter))
            }
            None => {
                let LoraConfig { base, fingerprint, config, .. } = adapter;
                Part::All(Reference { model: Class::DpoModel, base, fingerprint, config, dpo_beta: beta })
            }
        };
        let config = Self { part, beta };
        config.check_base()?;
        Ok(config)
    }

    /// Reads the options of the checkpoint in a folder; `None` if its run does not learn preferences.
    ///
    /// Errors: a `config.json` that cannot be read, or is damaged.
    pub fn read(folder: impl AsRef<Path>) -> Result<Option<Self>> {
        let folder = folder.as_ref();
        if let Some(reference) = super::checkpoint::config_of::<Reference>(folder, DPO)? {
            return Ok(Some(Self { beta: reference.dpo_beta, part: Part::All(reference) }));
        }
        let adapter = LoraConfig::read(folder)?;
        let with = |config: LoraConfig| Some(Self { beta: config.dpo_beta?, part: Part::Adapter(Box::new(config)) });
        Ok(adapter.and_then(with))
    }

    /// Returns β, the strength of the pull to the reference.
    pub fn beta(&self) -> f64 {
        self.beta
    }

    /// Returns the options of the adapter that is trained, if not all weights are.
    pub fn lora(&self) -> Option<&LoraOptions> {
        match &self.part {
            Part::All(_) => None,
            Part::Adapter(config) => Some(&config.lora),
        }
    }

    /// Returns the options of the model.
    ///
    /// Errors: options that no model has.
    pub fn base_config(&self) -> Result<Config> {
        match &self.part {
            Part::All(reference) => Config::from_value(reference.config.clone()),
            Part::Adapter(config) => config.base_config(),
        }
    }

    /// Returns the weights that a run of all of them begins with ([`Trainer::start_from`](super::Trainer::start_from)).
    ///
    /// Errors: a base that cannot be opened, or has changed.
    pub fn state_dict(&self) -> Result<BTreeMap<String, Tensor>> {
        match &self.part {
            Part::All(reference) => reference.open()?.state_dict(),
            Part::Adapter(_) => Err(Error::option("lora", "must be none: an adapter begins without weights")),
        }
    }

    /// Checks that the model predicts each token only from those before it.
    fn check_base(&self) -> Result<()> {
        let reads_all = match self.base_config()?.plan()? {
            ModelPlan::Autoregressive(plan) => plan.loss.reads_all,
            _ => return Err(Error::argument("config", "expected an AutoregressiveWrapper, got another model")),
        };
        ensure!(!reads_all, Error::option("config", "a model that reads the last token too cannot learn preferences"));
        Ok(())
    }
}

impl Reference {
    fn open(&self) -> Result<Base> {
        let base = Base::open(&self.base, false).map_err(|error| error.context("the reference of the run"))?;
        ensure!(
            base.fingerprint()? == self.fingerprint && base.config().to_value() == self.config,
            Error::file(&self.base, "has changed since the run began with it; use the model as it was")
        );
        Ok(base)
    }
}

/// Language model that learns which of two answers is preferred (Rafailov et al., <https://arxiv.org/abs/2305.18290>), from
/// [`Groups`](super::Groups) of a preferred and a rejected sequence, in which the answers' tokens are marked.
///
/// The loss is `DPOTrainer`'s of `trl`: `−ln σ(r₀ − r₁)`, where a reward `r` is `β` times the log-probability of the answer minus
/// that by the reference. The reference is the model that the run began with: with an adapter the base itself, which shares its
/// weights, else a frozen copy.
///
/// ```
/// use x_transformers::{models::LoraOptions, prelude::*, train::{DpoConfig, DpoModel, Group, Groups, Sequence}};
/// # fn main() -> x_transformers::Result<()> {
/// # let folder = std::env::temp_dir().join(format!("xt-dpo-{}", std::process::id()));
/// let text = ByteText::from_bytes("It was the best of times, it was the worst of times. ".repeat(10))?;
/// let net = TransformerWrapperConfig::new(256, 16, AttentionLayersConfig::decoder(16, 1));
/// let config = AutoregressiveConfig { net, ..Default::default() };
/// let options = TrainOptions { steps: 4, warmup: 1, seq_len: 16, batch_size: 2, lr: 1e-2, ..Default::default() };
/// Trainer::new(config, options.clone(), text, &Device::Cpu)?.save(folder.join("base"))?;
///
/// let answer = |answer: u8| Sequence { tokens: vec![1, 2, answer.into()], loss_mask: vec![false, false, true] };
/// let pairs = vec![Group { sequences: vec![answer(b'a'), answer(b'b')], score: None }; 2];
/// let source = Groups::new(pairs.clone(), pairs)?;
/// let config = DpoConfig::new(folder.join("base"), Some(LoraOptions::default()), 0.1, 0)?;
/// let mut trainer = Trainer::<DpoModel>::start(config, options, source, &Device::Cpu)?;
/// let before = trainer.validate()?; // ln 2: both models are the same
/// while trainer.steps_done() < 4 {
///     trainer.step()?;
/// }
/// assert!(trainer.validate()? < before);
/// # std::fs::remove_dir_all(&folder).ok();
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
#[doc(alias = "DPOTrainer")]
pub struct DpoModel {
    policy: Policy,
    reference: AutoregressiveWrapper,
    /// Parameters of the reference.
    frozen: ParamMap,
    beta: f64,
}

/// The model that learns.
#[derive(Clone, Debug)]
enum Policy {
    All(Box<AutoregressiveWrapper>),
    Adapter(Box<LoraModel>),
}

impl Deref for DpoModel {
    type Target = AutoregressiveWrapper;

    fn deref(&self) -> &AutoregressiveWrapper {
        match &self.policy {
            Policy::All(model) => model,
            Policy::Adapter(model) => model,
        }
    }
}

impl DpoModel {
    /// Returns the adapter that is trained, if not all weights are.
    pub fn adapter(&self) -> Option<&LoraAdapter> {
        match &self.policy {
            Policy::All(_) => None,
            Policy::Adapter(model) => Some(model.adapter()),
        }
    }

    /// Computes the rewards of the preferred and the rejected sequences of a batch, `[b, 2]`.
    ///
    /// Errors: groups of another size; tokens that the model does not have.
    pub fn rewards(&self, batch: &GroupBatch) -> Result<Tensor> {
        self.rewards_with(batch, false)
    }

    fn rewards_with(&self, batch: &GroupBatch, checkpoint_layers: bool) -> Result<Tensor> {
        let [b, count, n] = [batch.tokens.dim(0)?, batch.tokens.dim(1)?, batch.tokens.dim(2)?];
        ensure!(
            count == 2 && n >= 2,
            Error::shape(
                "dpo",
                format_args!("expected [batch, 2, n] with n of at least 2, got {:?}", batch.tokens.shape())
            )
        );
        let rows = |tensor: &Tensor| tensor.reshape([2 * b, n]);
        let answers = Answers::new(&rows(&batch.tokens)?, &rows(&batch.mask)?)?;
        let policy = answers.log_probabilities(self, checkpoint_layers)?;
        let reference = {
            // The innermost tape decides about dropout: the reference has none, and nothing of it is recorded.
            let _tape = Tape::grad();
            answers.log_probabilities(&self.reference, false).context("reference")?.detach()
        };
        policy.sub(&reference)?.affine(self.beta, 0.0)?.reshape([b, 2])
    }

    fn loss_with(&self, batch: &GroupBatch, checkpoint_layers: bool) -> Result<Tensor> {
        let rewards = self.rewards_with(batch, checkpoint_layers)?;
        log_sigmoid(&rewards.select(1, 0)?.sub(&rewards.select(1, 1)?)?)?.mean(&[])?.neg()
    }
}

/// Sequences whose marked tokens are predicted, for the policy and the reference alike.
struct Answers {
    /// Tokens that are read, `[rows, n - 1]`.
    read: Tensor,
    /// The token after each, or -100 where it is not marked.
    targets: Tensor,
    /// Number of marked tokens of each row.
    counts: Vec<usize>,
}

impl Answers {
    /// Creates the answers of rows of tokens and their marks, `[rows, n]`.
    fn new(tokens: &Tensor, mask: &Tensor) -> Result<Self> {
        let n = tokens.dim(1)?;
        let mask = mask.narrow(1, 1, n - 1)?.contiguous()?;
        let ignored = Tensor::full((), -100.0, DType::I64, tokens.device())?;
        let targets = mask.where_cond(&tokens.narrow(1, 1, n - 1)?, &ignored)?;
        let marks = mask.to_vec::<bool>()?;
        let counts = marks.chunks_exact(n - 1).map(|row| row.iter().filter(|&&marked| marked).count()).collect_vec();
        Ok(Self { read: tokens.narrow(1, 0, n - 1)?, targets, counts })
    }

    /// Returns the summed log-probabilities of each row, `[rows]`.
    fn log_probabilities(&self, model: &AutoregressiveWrapper, checkpoint_layers: bool) -> Result<Tensor> {
        let options = ForwardOptions { return_embeddings: true, checkpoint_layers, ..ForwardOptions::default() };
        let hidden = model.net.forward(&self.read, &options).context("net")?.out;
        let sums = self.counts.iter().enumerate().map(|(row, &count)| {
            if count == 0 {
                return Tensor::zeros([1], hidden.dtype().accumulator(), hidden.device());
            }
            let (hidden, targets) = (hidden.narrow(0, row, 1)?, self.targets.narrow(0, row, 1)?);
            let mean = model.net.cross_entropy(&hidden, &targets, -100).context("net")?;
            mean.affine(-(count as f64), 0.0)?.reshape([1])
        });
        let sums: Vec<Tensor> = sums.try_collect_vec()?;
        Tensor::cat(&sums.iter().collect_vec(), 0)
    }
}

impl TrainModel for DpoModel {
    type Config = DpoConfig;
    type Batch = GroupBatch;

    fn build(config: &DpoConfig, store: &ParamStore) -> Result<Self> {
        let beta = config.beta;
        match &config.part {
            Part::Adapter(config) => {
                let model = LoraModel::build(config, store)?;
                let (reference, frozen) = (model.without_adapter()?, model.frozen_params());
                Ok(Self { policy: Policy::Adapter(Box::new(model)), reference, frozen, beta })
            }
            Part::All(reference) => {
                let (options, weights) = (config.base_config()?, reference.open()?.state_dict()?);
                let frozen = ParamStore::zeros(store.dtype(), store.device());
                let reference = <AutoregressiveWrapper as TrainModel>::build(&options, &frozen)?;
                frozen.params().load(&weights)?;
                frozen.params().unique().for_each(|(_, param)| param.set_requires_grad(false));
                let policy = <AutoregressiveWrapper as TrainModel>::build(&options, store)?;
                Ok(Self { policy: Policy::All(Box::new(policy)), reference, frozen: frozen.params(), beta })
            }
        }
    }

    fn trained_params(&self, store: &ParamStore) -> ParamMap {
        self.adapter().map_or_else(|| store.params(), |adapter| adapter.params().clone())
    }

    fn frozen_params(&self) -> ParamMap {
        self.frozen.clone()
    }

    fn loss(&self, batch: &GroupBatch) -> Result<Tensor> {
        self.loss_with(batch, false)
    }

    fn loss_recomputed(&self, batch: &GroupBatch) -> Result<Tensor> {
        self.loss_with(batch, true)
    }

    fn check(config: &DpoConfig, options: &TrainOptions) -> Result<()> {
        config.check_base()?;
        options.refuse_document_mask()
    }

    fn config_to_json(config: &DpoConfig) -> Value {
        match &config.part {
            Part::All(reference) => serde_json::to_value(reference),
            Part::Adapter(config) => serde_json::to_value(config),
        }
        .unwrap_or_default()
    }

    fn config_from_json(json: Value) -> Result<DpoConfig> {
        let wrong = |why: String| Error::argument("config", format_args!("expected the options of preferences: {why}"));
        if json.get("model").and_then(Value::as_str) == Some(DPO) {
            let reference: Reference = serde_json::from_value(json).map_err(|error| wrong(error.to_string()))?;
            return Ok(DpoConfig { beta: reference.dpo_beta, part: Part::All(reference) });
        }
        let config = <LoraModel as TrainModel>::config_from_json(json)?;
        let beta = config.dpo_beta.ok_or_else(|| wrong("no `dpo_beta`".to_string()))?;
        Ok(DpoConfig { beta, part: Part::Adapter(Box::new(config)) })
    }

    fn num_tokens(config: &DpoConfig) -> usize {
        config.base_config().map_or(0, |config| <AutoregressiveWrapper as TrainModel>::num_tokens(&config))
    }

    fn max_seq_len(config: &DpoConfig) -> usize {
        config.base_config().map_or(0, |config| <AutoregressiveWrapper as TrainModel>::max_seq_len(&config))
    }
}
