//! Models that a trainer trains.

use std::{fmt, path::Path};

use serde::de::DeserializeOwned;
use serde_json::Value;

use super::{Batch, Checkpoint, TokenBatch, TrainOptions};
use crate::{
    DType, Device, Error, ParamMap, ParamStore, Result, Tensor,
    config::{AbsolutePositions, AttentionPlan, AutoregressivePlan, BranchPlan, Config, ModelPlan},
    error::{ErrorContext, ensure},
    models::{AutoregressiveWrapper, ForwardOptions},
};

/// Model that a [`Trainer`](super::Trainer) trains: built from options that a checkpoint keeps, with parameters in a
/// [`ParamStore`] and a loss on batches of one type.
pub trait TrainModel: Sized {
    /// Options of the model.
    type Config: fmt::Debug;
    /// Batches that the model trains on: [`TokenBatch`] for language models.
    type Batch: Batch;

    /// Builds the model and registers its parameters in the store.
    ///
    /// Errors: illegal options.
    fn build(config: &Self::Config, store: &ParamStore) -> Result<Self>;

    /// Returns the parameters that are trained and that a checkpoint keeps. Default: those of the store.
    fn trained_params(&self, store: &ParamStore) -> ParamMap {
        store.params()
    }

    /// Returns the parameters that are not trained, which stage 3 of ZeRO divides too. Default: none.
    fn frozen_params(&self) -> ParamMap {
        ParamMap::default()
    }

    /// Computes the mean loss of a batch, for language models in nats per predicted token, a scalar. All randomness comes
    /// from the tape, which makes a resumed run draw the same numbers.
    ///
    /// On a GPU its operations are recorded once and replayed ([`Trainer::set_graphs`](super::Trainer::set_graphs)): what
    /// they are may depend on the shapes of the batch and on constants, but not on anything else that changes.
    fn loss(&self, batch: &Self::Batch) -> Result<Tensor>;

    /// Computes the loss like [`TrainModel::loss`], with the activations of layers computed again in the backward pass, for
    /// [`recompute`](TrainOptions::recompute).
    ///
    /// Errors: by default, [`TrainModel::check`] refuses the option.
    fn loss_recomputed(&self, _batch: &Self::Batch) -> Result<Tensor> {
        Err(Error::option("recompute", "is not supported by this model"))
    }

    /// Checks that the model can be trained with these options.
    ///
    /// Errors: [`ErrorKind::Option`](crate::ErrorKind::Option). By default for
    /// [`document_mask`](TrainOptions::document_mask) and [`recompute`](TrainOptions::recompute), which a model must know about.
    fn check(_config: &Self::Config, options: &TrainOptions) -> Result<()> {
        options.refuse_document_mask()?;
        ensure!(!options.recompute, Error::option("recompute", "is not supported by this model"));
        Ok(())
    }

    /// Returns the options as JSON: the content of `config.json` in a checkpoint.
    fn config_to_json(config: &Self::Config) -> Value;

    /// Parses the options that [`TrainModel::config_to_json`] wrote.
    ///
    /// Errors: options of another model, or illegal ones.
    fn config_from_json(json: Value) -> Result<Self::Config>;

    /// Returns the size of the vocabulary. Default 256: bytes.
    fn num_tokens(_config: &Self::Config) -> usize {
        256
    }

    /// Returns the longest window that the model predicts. Default no limit.
    fn max_seq_len(_config: &Self::Config) -> usize {
        usize::MAX
    }
}

/// Reads the model of a checkpoint, with the averaged weights of a run that has them.
///
/// Errors: a folder that is not a checkpoint of this model; out of memory.
pub(super) fn load<M: TrainModel<Config: DeserializeOwned>>(folder: &Path, dtype: DType, device: &Device) -> Result<M> {
    let (config, weights) = Checkpoint::<M::Config>::averaged(folder)?;
    let store = ParamStore::zeros(dtype, device);
    let model = M::build(&config, &store).context(folder.display())?;
    store.params().load(&weights).context(folder.display())?;
    Ok(model)
}

/// Parses the options of a model, which an error calls `what`.
pub(super) fn parse<C: DeserializeOwned>(json: Value, what: &str) -> Result<C> {
    let wrong = |error| Error::argument("config", format_args!("expected the options of {what}: {error}"));
    serde_json::from_value(json).map_err(wrong)
}

impl TrainModel for AutoregressiveWrapper {
    /// Options of an `AutoregressiveWrapper` of either version.
    type Config = Config;
    type Batch = TokenBatch;

    fn build(config: &Config, store: &ParamStore) -> Result<Self> {
        Self::from_plan(plan(config)?, store)
    }

    fn loss(&self, batch: &TokenBatch) -> Result<Tensor> {
        loss_with(self, batch, ForwardOptions::default())
    }

    fn loss_recomputed(&self, batch: &TokenBatch) -> Result<Tensor> {
        loss_with(self, batch, ForwardOptions { checkpoint_layers: true, ..ForwardOptions::default() })
    }

    /// Options that let a token see others except by attention, or count positions from the start of the row, cannot be
    /// combined with [`document_mask`](TrainOptions::document_mask). Absolute positions begin anew with each document.
    fn check(config: &Config, options: &TrainOptions) -> Result<()> {
        if !options.document_mask {
            return Ok(());
        }
        let AutoregressivePlan { net, loss } = plan(config)?;
        let layers = || net.layers.layers.iter();
        let attention =
            |what: &dyn Fn(&AttentionPlan) -> bool| layers().any(|layer| layer.branch.attention().is_some_and(what));
        let positions = &net.layers.positions;
        let wrong = [
            ("infused positions; use rotary or relative ones", positions.infused),
            ("polar positions; use rotary or relative ones", positions.polar.is_some()),
            (
                "rotated values; set `rotary_qk_only`",
                attention(&|plan| plan.rotary.as_ref().is_some_and(|rotary| rotary.values)),
            ),
            ("memory tokens", net.num_memory_tokens > 0),
            ("class tokens", net.num_cls_tokens > 0),
            ("memory keys and values", attention(&|plan| plan.num_mem_kv > 0 || plan.zero_kv)),
            ("`shift_tokens`", layers().any(|layer| layer.wrap.shifts.is_some())),
            ("`orthog_residual`", layers().any(|layer| layer.residual.orthogonal)),
            ("`mv_split_residual`", layers().any(|layer| layer.residual.split)),
            ("custom branches", layers().any(|layer| layer.branch == BranchPlan::Custom)),
            ("`mask_prob` and `add_attn_z_loss`", loss.mask_prob > 0.0 || loss.attn_z_loss),
        ];
        match wrong.into_iter().find(|(_, on)| *on) {
            Some((what, _)) => Err(Error::option("document_mask", format_args!("cannot be used with {what}"))),
            None => Ok(()),
        }
    }

    fn config_to_json(config: &Config) -> Value {
        config.to_value()
    }

    fn config_from_json(json: Value) -> Result<Config> {
        let config = Config::from_value(json)?;
        plan(&config)?;
        Ok(config)
    }

    fn num_tokens(config: &Config) -> usize {
        plan(config).map_or(0, |plan| plan.net.num_tokens)
    }

    fn max_seq_len(config: &Config) -> usize {
        match plan(config) {
            // A model that reads the last token too has one less to predict.
            Ok(plan) if plan.net.max_seq_len > 0 => plan.net.max_seq_len - usize::from(plan.loss.reads_all),
            _ => usize::MAX,
        }
    }
}

/// Returns the loss of a batch, with these options.
fn loss_with(model: &AutoregressiveWrapper, batch: &TokenBatch, mut options: ForwardOptions) -> Result<Tensor> {
    let n = model.tokens_read(batch.tokens.dim(1)?);
    if let Some(documents) = &batch.documents {
        let documents = documents.narrow(1, 0, n)?;
        options.attn_mask = Some(documents.unsqueeze(2)?.eq(&documents.unsqueeze(1)?)?.unsqueeze(1)?);
        if model.net.plan().absolute_positions != AbsolutePositions::None {
            options.pos = batch.positions().map(|positions| positions.narrow(1, 0, n)).transpose()?;
        }
    }
    match &batch.loss_mask {
        None => model.loss(&batch.tokens, &options),
        Some(mask) => model.masked_loss(&batch.tokens, mask, &options),
    }
}

fn plan(config: &Config) -> Result<AutoregressivePlan> {
    match config.plan()? {
        ModelPlan::Autoregressive(plan) => Ok(plan),
        _ => Err(Error::argument("config", "expected an AutoregressiveWrapper, got another model")),
    }
}
