//! Options of sampling.

use clap::{Args, value_parser};
use x_transformers::{
    config::{FilterLogits, SamplingConfig},
    models::GenerateOptions,
};

use crate::compute::{fraction, positive, positive_or_zero};

#[derive(Args)]
pub struct SamplingArgs {
    /// Sampling temperature, which divides the logits; 0 always takes the most likely token [default: 1, for chat 0.7, for
    /// models with an encoder 0]
    #[arg(long, value_name = "T", value_parser = positive_or_zero)]
    temperature: Option<f64>,

    /// Top-k sampling: keep the N most likely tokens [default: a tenth of the vocabulary, unless another filter is
    /// given]
    #[arg(long, value_name = "N", value_parser = value_parser!(u32).range(1..), group = "filter")]
    top_k: Option<u32>,

    /// Nucleus (top-p) sampling: keep the smallest set of tokens whose probability reaches P
    #[arg(long, value_name = "P", value_parser = fraction, group = "filter")]
    top_p: Option<f64>,

    /// Min-p sampling: keep tokens with at least P times the probability of the most likely one
    #[arg(long, value_name = "P", value_parser = fraction, group = "filter")]
    min_p: Option<f64>,

    /// Top-a sampling: keep tokens with at least P times the squared probability of the most likely one, and draw them
    /// uniformly
    #[arg(long, value_name = "P", value_parser = fraction, group = "filter")]
    top_a: Option<f64>,

    /// Sample from the 1.3-entmax of the logits instead of their softmax
    #[arg(long, group = "filter")]
    entmax: bool,

    /// Penalty on tokens that are already in the text; above 1 makes them less likely
    #[arg(long, value_name = "R", default_value_t = 1.0, value_parser = positive)]
    repetition_penalty: f64,

    /// Seed of the random number generator; the same seed gives the same text
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
}

impl SamplingArgs {
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// Options of generation with this temperature by default.
    pub fn options(&self, temperature: f64) -> GenerateOptions {
        GenerateOptions {
            sampling: self.config(temperature),
            seed: self.seed,
            repetition_penalty: self.repetition_penalty,
            ..Default::default()
        }
    }

    fn config(&self, temperature: f64) -> SamplingConfig {
        let config = SamplingConfig { temperature: self.temperature.unwrap_or(temperature), ..Default::default() };
        match (self.top_p, self.min_p, self.top_a, self.entmax) {
            (Some(mass), ..) => {
                SamplingConfig { filter_logits_fn: FilterLogits::Nucleus, filter_thres: mass, ..config }
            }
            (_, Some(share), ..) => {
                SamplingConfig { filter_logits_fn: FilterLogits::MinP, min_p_ratio: share, ..config }
            }
            (_, _, Some(share), _) => {
                SamplingConfig { filter_logits_fn: FilterLogits::TopA, min_p_ratio: share, ..config }
            }
            (.., true) => SamplingConfig { filter_logits_fn: FilterLogits::Entmax, ..config },
            _ => SamplingConfig { k: self.top_k.map(|k| k as usize), ..config },
        }
    }
}
