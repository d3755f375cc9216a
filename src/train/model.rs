//! Models that a trainer trains.

use std::fmt;

use serde_json::Value;

use crate::{
    Error, ParamStore, Result, Tensor,
    config::{AutoregressiveConfig, Config},
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
    type Config = AutoregressiveConfig;

    fn build(config: &AutoregressiveConfig, store: &ParamStore) -> Result<Self> {
        Self::new(config, store)
    }

    fn loss(&self, tokens: &Tensor) -> Result<Tensor> {
        self.loss(tokens, &ForwardOptions::default())
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
