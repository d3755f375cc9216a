//! The models: what x-transformers calls wrappers.

#![forbid(unsafe_code)]

mod autoregressive;
mod cache;
mod continuous;
mod encoder_decoder;
pub mod parity;
#[cfg(feature = "cuda")]
mod recorded;
mod run;
mod sampling;
mod transformer;
mod vision;

pub use crate::nn::ForwardOptions;
pub use autoregressive::{AutoregressiveWrapper, GenerateOptions};
pub use cache::DecodeCache;
pub use continuous::{ContinuousAutoregressiveWrapper, ContinuousTransformerWrapper};
pub use encoder_decoder::{EncoderDecoderOptions, XTransformer};
#[cfg(feature = "cuda")]
pub use recorded::RecordedDecode;
pub use run::{Model, RunOptions};
pub use sampling::{filter_probabilities, sample, sample_tokens};
pub use transformer::{Output, TransformerWrapper};
pub use vision::ViTransformerWrapper;
