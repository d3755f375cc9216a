//! Training of an encoder and a decoder on pairs of sequences.

use serde_json::Value;

use super::{PairBatch, TrainModel, TrainOptions};
use crate::{
    Error, ParamStore, Result, Tensor,
    config::{Config, ModelPlan, XTransformerPlan},
    models::{EncoderDecoderOptions, XTransformer},
};

/// ```
/// use x_transformers::{config::Config, prelude::*, train::{Pair, Pairs}};
/// # fn main() -> x_transformers::Result<()> {
/// let layers = AttentionLayersConfig::encoder(16, 1);
/// let cross = AttentionLayersConfig { cross_attend: true, ..AttentionLayersConfig::decoder(16, 1) };
/// let config = Config::XTransformer(Box::new(XTransformerConfig {
///     enc: TransformerWrapperConfig::new(16, 8, layers),
///     dec: TransformerWrapperConfig::new(16, 8, cross),
///     tie_token_emb: true,
/// }));
/// let pair = |a: i64| Pair { source: vec![a, a + 1], target: vec![a + 1, a] };
/// let source = Pairs::new((1..9).map(pair).collect(), vec![pair(9)], 0)?;
/// let options = TrainOptions { steps: 6, warmup: 1, seq_len: 8, lr: 1e-2, ..Default::default() };
/// let mut trainer = Trainer::<XTransformer>::start(config, options, source, &Device::Cpu)?;
/// let before = trainer.validate()?;
/// while trainer.steps_done() < 6 {
///     trainer.step()?;
/// }
/// assert!(trainer.validate()? < before);
/// # Ok(())
/// # }
/// ```
impl TrainModel for XTransformer {
    /// Options of an `XTransformer` of either version.
    type Config = Config;
    type Batch = PairBatch;

    fn build(config: &Config, store: &ParamStore) -> Result<Self> {
        Self::from_plan(plan(config)?, store)
    }

    fn loss(&self, batch: &PairBatch) -> Result<Tensor> {
        loss_with(self, batch, false)
    }

    fn loss_recomputed(&self, batch: &PairBatch) -> Result<Tensor> {
        loss_with(self, batch, true)
    }

    fn check(config: &Config, options: &TrainOptions) -> Result<()> {
        plan(config)?;
        options.refuse_document_mask()
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
        plan(config).map_or(0, |plan| plan.enc.num_tokens.min(plan.dec.num_tokens))
    }

    fn max_seq_len(config: &Config) -> usize {
        let limit = |length: usize| if length == 0 { usize::MAX } else { length };
        let Ok(plan) = plan(config) else { return 0 };
        // A decoder that reads the last token too has one less to predict.
        let decoder = limit(plan.dec.max_seq_len);
        let decoder = if plan.loss.reads_all && decoder < usize::MAX { decoder - 1 } else { decoder };
        limit(plan.enc.max_seq_len).min(decoder)
    }
}

fn loss_with(model: &XTransformer, batch: &PairBatch, checkpoint_layers: bool) -> Result<Tensor> {
    let src_mask = Some(batch.source_mask.clone());
    let options = EncoderDecoderOptions { src_mask, checkpoint_layers, ..Default::default() };
    match &batch.target.loss_mask {
        Some(mask) => model.masked_loss(&batch.source, &batch.target.tokens, mask, &options),
        None => model.loss(&batch.source, &batch.target.tokens, &options),
    }
}

fn plan(config: &Config) -> Result<XTransformerPlan> {
    match config.plan()? {
        ModelPlan::EncoderDecoder(plan) => Ok(*plan),
        _ => Err(Error::argument("config", "expected an XTransformer, got another model")),
    }
}
