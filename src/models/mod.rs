//! Models, which x-transformers calls wrappers.

#![forbid(unsafe_code)]

mod around;
mod autoregressive;
mod beam;
mod belief;
mod cache;
mod continuous;
mod continuous_autoregressive;
mod embeddings;
mod encoder_decoder;
mod ends;
mod generate;
mod gpt_vae;
mod looped;
mod lora;
mod model;
mod model_inputs;
mod named;
mod neo_mlp;
mod nonautoregressive;
mod pool;
mod positions;
#[cfg(feature = "cuda")]
mod recorded;
mod rows;
mod sampling;
mod sentence;
mod speculative;
mod transformer;
mod vision;

pub use crate::nn::ForwardOptions;
pub use around::{Dpo, Preference, XValAutoregressiveWrapper, XlAutoregressiveWrapper};
pub use autoregressive::AutoregressiveWrapper;
pub use beam::{BeamOptions, Hypothesis};
pub use belief::BeliefStateWrapper;
pub use cache::DecodeCache;
pub use continuous::ContinuousTransformerWrapper;
pub use continuous_autoregressive::ContinuousAutoregressiveWrapper;
pub use encoder_decoder::{EncoderDecoderOptions, XTransformer};
pub use ends::{RowEnd, StopMatcher};
pub use generate::{GenerateOptions, TokenStream};
pub use gpt_vae::GptVae;
pub(crate) use lora::LoraTarget;
pub use lora::{LoraAdapter, LoraOptions};
pub use model::{Model, RunOptions};
pub use neo_mlp::NeoMlp;
pub use nonautoregressive::NonAutoregressiveWrapper;
pub use pool::AttentionPool;
#[cfg(feature = "cuda")]
pub use recorded::RecordedDecode;
pub use sampling::{filter_probabilities, sample, sample_tokens};
pub use sentence::{DenseActivation, DenseLayer, DenseResidual, Features, Pooling, SentenceEncoder, SentenceModule};
pub(crate) use sentence::{embed_by, normalized};
pub use speculative::SpeculativeStats;
pub use transformer::{Output, TransformerWrapper};
pub use vision::ViTransformerWrapper;
