//! Building blocks of models: modules created from a plan and a [`ParamStore`](crate::ParamStore), and composed of
//! tensor methods.
//!
//! A module is a cheap handle: cloning it shares its parameters. Its parameters have the names of PyTorch's
//! `state_dict()`.

#![forbid(unsafe_code)]

mod attention;
mod branch;
mod cache;
mod feedforward;
mod forward_options;
mod hyper;
mod key_masks;
mod layer;
mod layers;
mod linear;
mod links;
mod lora;
mod norm;
mod position_bias;
mod positions;
mod residual;
mod step;
mod wrap;

pub(crate) use attention::log_sigmoid;
pub use attention::{Attention, AttentionInput, AttentionOutput};
pub use branch::{Branch, Past};
pub use cache::LayersCache;
pub use feedforward::FeedForward;
pub use forward_options::ForwardOptions;
pub(crate) use key_masks::drop_tokens;
pub use layers::{AttentionLayers, LayersOutput};
pub(crate) use linear::Packer;
pub use linear::{Embedding, Linear};
pub(crate) use lora::{Lora, LoraPart, lengths};
pub use norm::Norm;
pub use position_bias::{DynamicPositionBias, RelativePositionBias};
pub(crate) use positions::unit_length;
pub use positions::{
    AbsolutePositionalEmbedding, PolarEmbedding, PolarTurn, Rotation, ScaledSinusoidalEmbedding, Turn,
};
pub use residual::Residual;
