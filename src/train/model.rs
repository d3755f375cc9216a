//! Models that a trainer trains.

use std::fmt;

use serde_json::Value;

use super::{Batch, TokenBatch, TrainOptions};
use crate::{
    DType, Error, ParamStore, Result, Tensor,
    config::{AttentionPlan, AutoregressiveConfig, Config, ShiftTokens},
    error::{ErrorContext, ensure},
    models::{AutoregressiveWrapper, ForwardOptions},
};

/// Target of a token that does not count in the loss.
const IGNORED: i64 = -100;

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

    /// Computes the mean loss of a batch, for language models in nats per predicted token, a scalar. All randomness comes
    /// from the tape, which makes a resumed run draw the same numbers.
    fn loss(&self, batch: &Self::Batch) -> Result<Tensor>;

    /// Checks that the model can be trained with these options.
    ///
    /// Errors: [`ErrorKind::Option`](crate::ErrorKind::Option). By default for
    /// [`document_mask`](TrainOptions::document_mask), which a model must know about.
    fn check(_config: &Self::Config, options: &TrainOptions) -> Result<()> {
        ensure!(!options.document_mask, Error::option("document_mask", "is not supported by this model"));
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

impl TrainModel for AutoregressiveWrapper {
    type Config = AutoregressiveConfig;
    type Batch = TokenBatch;

    fn build(config: &AutoregressiveConfig, store: &ParamStore) -> Result<Self> {
        Self::new(config, store)
    }

    fn loss(&self, batch: &TokenBatch) -> Result<Tensor> {
        let n = batch.tokens.dim(1)? - 1;
        let mut options = ForwardOptions::default();
        if let Some(documents) = &batch.documents {
            let documents = documents.narrow(1, 0, n)?;
            options.attn_mask = Some(documents.unsqueeze(2)?.eq(&documents.unsqueeze(1)?)?.unsqueeze(1)?);
        }
        let Some(mask) = &batch.loss_mask else { return self.loss(&batch.tokens, &options) };
        options.return_embeddings = true;
        let out = self.net.forward(&batch.tokens.narrow(1, 0, n)?, &options).context("net")?.out;
        let ignored = Tensor::full((), IGNORED as f64, DType::I64, mask.device())?;
        let targets = mask.narrow(1, 1, n)?.where_cond(&batch.tokens.narrow(1, 1, n)?, &ignored)?;
        self.net.cross_entropy(&out, &targets, IGNORED).context("net")
    }

    /// Options that let a token see others except by attention, or count positions from the start of the row, cannot be
    /// combined with [`document_mask`](TrainOptions::document_mask).
    fn check(config: &AutoregressiveConfig, options: &TrainOptions) -> Result<()> {
        if !options.document_mask {
            return Ok(());
        }
        let net = config.net.plan()?;
        let layers = || net.layers.layers.iter();
        let attention =
            |what: &dyn Fn(&AttentionPlan) -> bool| layers().any(|layer| layer.branch.attention().is_some_and(what));
        let wrong = [
            ("absolute positions; use rotary or relative ones", net.absolute_positions),
            ("infused positions; use rotary or relative ones", net.layers.positions.infused),
            (
                "rotated values; set `rotary_qk_only`",
                attention(&|plan| plan.rotary.as_ref().is_some_and(|rotary| rotary.values)),
            ),
            ("memory tokens", net.num_memory_tokens > 0),
            ("memory keys and values", attention(&|plan| plan.num_mem_kv > 0)),
            ("`shift_tokens`", config.net.attn_layers.shift_tokens != ShiftTokens::default()),
        ];
        match wrong.into_iter().find(|(_, on)| *on) {
            Some((what, _)) => Err(Error::option("document_mask", format_args!("cannot be used with {what}"))),
            None => Ok(()),
        }
    }

    fn config_to_json(config: &AutoregressiveConfig) -> Value {
        Config::AutoregressiveWrapper(config.clone()).to_value()
    }

    fn config_from_json(json: Value) -> Result<AutoregressiveConfig> {
        match Config::from_value(json)? {
            Config::AutoregressiveWrapper(config) => Ok(config),
            _ => Err(Error::argument("config", "expected an AutoregressiveWrapper, got another model")),
        }
    }

    fn num_tokens(config: &AutoregressiveConfig) -> usize {
        config.net.num_tokens
    }

    fn max_seq_len(config: &AutoregressiveConfig) -> usize {
        if config.net.max_seq_len == 0 { usize::MAX } else { config.net.max_seq_len }
    }
}
