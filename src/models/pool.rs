//! Attention of learned queries to a sequence.

use crate::{
    Error, Init, Param, ParamStore, Result, Tensor,
    config::{AttentionPoolPlan, PoolerPlan},
    error::ErrorContext,
    nn::{Attention, AttentionInput, AttentionLayers, ForwardOptions},
};

/// Pools a sequence into a fixed number of vectors: learned queries attend to it.
#[derive(Clone, Debug)]
pub struct AttentionPool {
    /// `[tokens, dim]`
    queries: Option<Param>,
    pooler: Pooler,
    residual: bool,
    squeeze: bool,
}

#[derive(Clone, Debug)]
enum Pooler {
    Attention(Box<Attention>),
    Layers(Box<AttentionLayers>),
}

impl AttentionPool {
    /// Creates the planned pool, with parameters at the store's place.
    pub fn new(plan: &AttentionPoolPlan, store: &ParamStore) -> Result<Self> {
        let queries = || store.param("queries", [plan.tokens, plan.dim], Init::Normal(1e-2));
        let place = store.at("pooler");
        let pooler = match &plan.pooler {
            PoolerPlan::Attention(plan) => Pooler::Attention(Box::new(Attention::new(plan, None, &place)?)),
            PoolerPlan::Layers(plan) => Pooler::Layers(Box::new(AttentionLayers::new(plan, &place)?)),
        };
        Ok(Self {
            queries: (plan.tokens > 0).then(queries).transpose()?,
            pooler,
            residual: plan.residual,
            squeeze: plan.squeeze,
        })
    }

    /// Pools `context [b, m, dim_context]`, of which the mask, `[b, m]` Bool, marks the real vectors: `[b, tokens,
    /// dim]`, or `[b, dim]`. `queries`, `[b, tokens, dim]`, take the place of the learned ones.
    ///
    /// Errors: a model without learned queries that gets none, or shapes that do not match.
    pub fn forward(&self, context: &Tensor, mask: Option<&Tensor>, queries: Option<&Tensor>) -> Result<Tensor> {
        let queries = match (queries, &self.queries) {
            (Some(queries), _) => queries.clone(),
            (None, Some(learned)) => {
                let learned = learned.tensor();
                learned.expand([context.dim(0)?, learned.dim(0)?, learned.dim(1)?])?
            }
            (None, None) => {
                return Err(Error::argument("queries", "are missing: the pool has none, `num_pooled_tokens` is 0"));
            }
        };
        let mut pooled = match &self.pooler {
            Pooler::Attention(attention) => {
                let input = AttentionInput {
                    context: Some(context.clone()),
                    key_mask: mask.cloned(),
                    keys_may_be_empty: mask.is_some(),
                    ..AttentionInput::default()
                };
                attention.forward(&queries, &input).context("pooler")?.out
            }
            Pooler::Layers(layers) => {
                let options = ForwardOptions {
                    context: Some(context.clone()),
                    context_mask: mask.cloned(),
                    ..ForwardOptions::default()
                };
                layers.forward(&queries, &options).context("pooler")?.out
            }
        };
        if self.residual {
            pooled = pooled.add(&queries)?;
        }
        if self.squeeze { pooled.squeeze(1) } else { Ok(pooled) }
    }
}
