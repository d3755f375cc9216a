//! Plan of any model.

use super::{
    AroundPlan, AttentionPoolPlan, AutoregressivePlan, ContinuousAutoregressivePlan, ContinuousPlan, CriticPlan,
    LayersPlan, NeoMlpPlan, PoolerPlan, SamplingConfig, TransformerPlan, ViTransformerPlan, XTransformerPlan,
};
use crate::collect::CollectVec;

/// A model of any class, resolved from the options of either version.
#[derive(Clone, PartialEq, Debug)]
#[non_exhaustive]
pub enum ModelPlan {
    /// Tokens in, logits out.
    Transformer(TransformerPlan),
    /// Vectors in, vectors out.
    Continuous(ContinuousPlan),
    /// Images in, classes out.
    Vision(ViTransformerPlan),
    /// A sequence in, another one out.
    EncoderDecoder(Box<XTransformerPlan>),
    /// A decoder with its loss and its sampling.
    Autoregressive(AutoregressivePlan),
    /// A model that predicts vectors.
    ContinuousAutoregressive(ContinuousAutoregressivePlan),
    /// Attention layers without a wrapper.
    Layers(LayersPlan),
    /// Attention of learned queries to a sequence.
    Pool(AttentionPoolPlan),
    /// A sampling filter.
    Filter(SamplingConfig),
    /// Nodes of an MLP that pass messages.
    NeoMlp(Box<NeoMlpPlan>),
    /// A model around a transformer, with a loss of its own.
    Around(Box<AroundPlan>),
}

impl From<AroundPlan> for ModelPlan {
    fn from(plan: AroundPlan) -> Self {
        Self::Around(Box::new(plan))
    }
}

impl ModelPlan {
    /// Returns all attention layers of the model, with the prefixes of their parameters' names.
    pub fn layers(&self) -> Vec<(&'static str, &LayersPlan)> {
        match self {
            Self::Transformer(plan) => vec![("attn_layers", &plan.layers)],
            Self::Continuous(plan) => vec![("attn_layers", &plan.layers)],
            Self::Vision(plan) => vec![("attn_layers", &plan.layers)],
            Self::EncoderDecoder(plan) => {
                vec![("encoder.attn_layers", &plan.enc.layers), ("decoder.net.attn_layers", &plan.dec.layers)]
            }
            Self::Autoregressive(plan) => vec![("net.attn_layers", &plan.net.layers)],
            Self::ContinuousAutoregressive(plan) => vec![("net.attn_layers", &plan.net.layers)],
            Self::Layers(plan) => vec![("", plan)],
            Self::Pool(AttentionPoolPlan { pooler: PoolerPlan::Layers(plan), .. }) => vec![("pooler", plan)],
            Self::Around(plan) => match &**plan {
                AroundPlan::MultiInput(plan, _) | AroundPlan::XVal(plan) => vec![("attn_layers", &plan.layers)],
                AroundPlan::XValLoss(plan, ..) | AroundPlan::Xl(plan, ..) => vec![("net.attn_layers", &plan.layers)],
                AroundPlan::Masked(net, plan) => {
                    let critic = match &plan.critic {
                        CriticPlan::Other(critic) => Some(("token_critic.attn_layers", &critic.layers)),
                        CriticPlan::None | CriticPlan::Own => None,
                    };
                    std::iter::once(("net.attn_layers", &net.layers)).chain(critic).collect_vec()
                }
                AroundPlan::Belief(plan) => {
                    let backward = plan.backward.as_ref().map(|plan| ("backward_decoder.attn_layers", &plan.layers));
                    std::iter::once(("forward_decoder.attn_layers", &plan.forward.layers)).chain(backward).collect_vec()
                }
                AroundPlan::Vae(plan) => {
                    vec![("encoder.attn_layers", &plan.encoder.layers), ("decoder.attn_layers", &plan.decoder.layers)]
                }
                AroundPlan::Dpo(plan, ..) => {
                    vec![("policy_model.attn_layers", &plan.layers), ("ref_model.attn_layers", &plan.layers)]
                }
            },
            Self::NeoMlp(plan) => vec![("transformer", &plan.layers)],
            Self::Pool(_) | Self::Filter(_) => Vec::new(),
        }
    }
}
