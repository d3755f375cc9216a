//! Models that a trainer trains.

use std::fmt;

use serde_json::Value;

use crate::{
    Error, ParamStore, Result, Tensor,
    config::{AutoregressivePlan, Config, ModelPlan},
    models::{AutoregressiveWrapper, ForwardOptions},
};

/// Model that a [`Trainer`](super::Trainer) trains: built from options that a checkpoint keeps, with parameters in a
/// [`ParamStore`] and a loss on windows of tokens.
pub trait TrainModel: Sized {
    /// Options of the model.
    type Config: fmt::Debug;

    /// Builds the model and registers its parameters in the store.
    ///
    /// Errors: illegal options.
    fn build(config: &Self::Config, store: &ParamStore) -> Result<Self>;

    /// Computes the mean loss, in nats, of predicting each token from those before it: `[batch, seq_len + 1]` I64 to a
    /// scalar. All randomness comes from the tape, which makes a resumed run draw the same numbers.
    fn loss(&self, tokens: &Tensor) -> Result<Tensor>;

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
    /// Options of an `AutoregressiveWrapper` of either version.
    type Config = Config;

    fn build(config: &Config, store: &ParamStore) -> Result<Self> {
        Self::from_plan(plan(config)?, store)
    }

    fn loss(&self, tokens: &Tensor) -> Result<Tensor> {
        self.loss(tokens, &ForwardOptions::default())
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

fn plan(config: &Config) -> Result<AutoregressivePlan> {
    match config.plan()? {
        ModelPlan::Autoregressive(plan) => Ok(plan),
        _ => Err(Error::argument("config", "expected an AutoregressiveWrapper, got another model")),
    }
}
