//! Plans of models around a transformer.

use super::{
    LayersPlan,
    wrapper_plan::{LossPlan, TransformerPlan},
};

/// Models around a [`TransformerWrapper`](crate::models::TransformerWrapper) with losses of their own, resolved.
#[derive(Clone, PartialEq, Debug)]
#[non_exhaustive]
pub enum AroundPlan {
    /// Several inputs and outputs, by these names; the first is that of the token table.
    MultiInput(TransformerPlan, Vec<String>),
    /// Tokens and numbers in, logits and numbers out.
    XVal(TransformerPlan),
    /// Loss of tokens and, with this weight, of numbers.
    XValLoss(TransformerPlan, LossPlan, f64),
    /// Segments of long sequences, one after the other, with memories; gradients pass this many segments.
    Xl(TransformerPlan, LossPlan, usize),
    /// Direct preference optimization: the factor of log-ratios, and the token that is padding.
    Dpo(TransformerPlan, f64, Option<i64>),
    /// Masked tokens that are filled in.
    Masked(TransformerPlan, Box<MaskedPlan>),
    /// Text from both sides.
    Belief(Box<BeliefPlan>),
    /// A style of each sequence.
    Vae(Box<GptVaePlan>),
}

/// A [`BeliefStateWrapper`](crate::models::BeliefStateWrapper), resolved.
#[derive(Clone, PartialEq, Debug)]
pub struct BeliefPlan {
    /// Decoder of the text before.
    pub forward: TransformerPlan,
    /// Decoder of the text after, in reverse; `None`: the same.
    pub backward: Option<TransformerPlan>,
    /// Weight of predictions of the text after.
    pub backward_weight: f64,
    /// Number of distances between both that are told apart, and the weight of their loss.
    pub distance: Option<(usize, f64)>,
}

/// A [`GptVae`](crate::models::GptVae), resolved.
#[derive(Clone, PartialEq, Debug)]
pub struct GptVaePlan {
    /// From a sequence to the mean of its vectors.
    pub encoder: TransformerPlan,
    /// Language model.
    pub decoder: TransformerPlan,
    /// Width of a style.
    pub dim_latent: usize,
    /// Weight of the divergence of styles from a normal distribution, and what of it is free.
    pub divergence: [f64; 2],
    /// Share of the sequences whose style is left out in training.
    pub latents_dropout: f64,
    /// Token that is padding.
    pub pad: i64,
}

/// A [`NeoMlp`](crate::models::NeoMlp), resolved.
#[derive(Clone, PartialEq, Debug)]
pub struct NeoMlpPlan {
    /// Number of input, hidden and output nodes.
    pub nodes: [usize; 3],
    /// Layers that pass messages between the nodes.
    pub layers: LayersPlan,
}

/// Training and steps of a [`NonAutoregressiveWrapper`](crate::models::NonAutoregressiveWrapper).
#[derive(Clone, PartialEq, Debug)]
pub struct MaskedPlan {
    /// Token of masked positions.
    pub mask_id: i64,
    /// Number of steps of generation.
    pub steps: usize,
    /// With self-conditioning, the share of training steps whose embeddings are those of a pass before.
    pub self_cond: Option<f64>,
    /// Share of the masked tokens that half of the steps leave as they are.
    pub no_replace: f64,
    /// Share of the masked tokens that half of the steps replace at random.
    pub random_token: f64,
    /// If `true`, the masked share is `cos(π t / 2)` at time `t`, otherwise `1 − t`.
    pub cosine: bool,
    /// If `true`, a step of generation may mask tokens that an earlier one has kept.
    pub can_mask_prev_unmasked: bool,
    /// Critic of the generated tokens.
    pub critic: CriticPlan,
    /// Weight of the critic's loss.
    pub critic_loss_weight: f64,
    /// If `true`, losses have the weights of masked diffusion.
    pub weighted: bool,
}

/// Model that tells tokens of the data from generated ones.
#[derive(Clone, PartialEq, Debug)]
#[non_exhaustive]
pub enum CriticPlan {
    /// None.
    None,
    /// A linear layer on the embeddings of the generator.
    Own,
    /// A model with one logit for each token.
    Other(Box<TransformerPlan>),
}

impl MaskedPlan {
    /// Returns the share of tokens that is masked at a time from 0 to 1.
    pub(crate) fn masked_share(&self, time: f64) -> f64 {
        if self.cosine { libm::cos(time * std::f64::consts::FRAC_PI_2) } else { 1.0 - time }
    }

    /// Returns the weight of a loss at this time: the rate of unmasking over the unmasked share.
    pub(crate) fn loss_weight(&self, time: f64) -> f64 {
        let rate = match self.cosine {
            true => libm::sin(time * std::f64::consts::FRAC_PI_2) * std::f64::consts::FRAC_PI_2,
            false => 1.0,
        };
        rate / (1.0 - self.masked_share(time)).max(1e-9)
    }

    /// Returns the number of `n` tokens that a step of generation leaves masked, in the arithmetic of PyTorch's floats.
    pub(crate) fn masked_after(&self, step: usize, n: usize) -> usize {
        let (step, steps) = (step + 1, self.steps);
        let width = 1.0 / steps as f32;
        let time = if 2 * step <= steps { width * step as f32 } else { 1.0 - width * (steps - step) as f32 };
        let share = match self.cosine {
            true => libm::cosf(time * std::f32::consts::PI / 2.0),
            false => 1.0 - time,
        };
        (share * n as f32).max(0.0) as usize
    }
}

impl AroundPlan {
    /// Returns the plan of the wrapped model.
    pub fn net(&self) -> &TransformerPlan {
        match self {
            Self::MultiInput(plan, _)
            | Self::XVal(plan)
            | Self::XValLoss(plan, ..)
            | Self::Xl(plan, ..)
            | Self::Dpo(plan, ..)
            | Self::Masked(plan, _) => plan,
            Self::Belief(plan) => &plan.forward,
            Self::Vae(plan) => &plan.decoder,
        }
    }
}
