//! Options of a call besides its tensors.

use serde_json::Value;

use super::{
    SamplingConfig,
    kwargs::{self, Map, keywords},
    v2,
};
use crate::{Error, Result, error::ensure};

/// Options of one call, as in the key `call` beside a config.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Call {
    /// If `true`, returns normed hidden states instead of logits.
    pub return_embeddings: bool,
    /// If `true`, returns new memories.
    pub return_mems: bool,
    /// If `true`, returns attention maps.
    pub return_attn: bool,
    /// If `true`, returns the embeddings beside the logits.
    pub return_logits_and_embeddings: bool,
    /// If `true`, leaves the positions of `prepend_embeds` out of the output.
    pub excise_prepend_embeds: bool,
    /// If `true`, an `AutoregressiveWrapper` returns its logits beside the loss.
    pub return_outputs: bool,
    /// If `true`, gradients pass from new memories to the call that they come from: `"detach_mems": false`.
    pub attached_mems: bool,
    /// Number of first positions that all tokens see, for a `PrefixDecoder`.
    pub prefix_attn_len: Option<i64>,
    /// Numbers of the sublayers in the order in which this call runs them. Default: that of the config.
    pub layers_execute_order: Option<Vec<usize>>,
    /// If `true`, a `TransformerWrapper` returns the z-loss of the scores of attention, `attn_z_loss`, too.
    pub return_attn_z_loss: bool,
    /// Factor of the z-loss. Default 1e-4.
    pub attn_z_loss_weight: Option<f64>,
    /// Number of passes through the layers of a model with `recycling`. Default: drawn in training, else the config's
    /// `train_max_recycle_steps`; `Model::run` requires it outside of training.
    pub recycle_steps: Option<usize>,
    /// Number of passes through the layers of a model with `looped`. Default `max_looped_steps` of the config.
    pub looped_steps: Option<usize>,
    /// Temperature of the tokens that a `NonAutoregressiveWrapper`'s critic judges. Default: drawn.
    pub generator_sample_temperature: Option<f64>,
    /// If `Some`, generates tokens instead: `"method": "generate"` with the arguments of `generate`.
    pub generate: Option<GenerateCall>,
    /// If `true`, `generate` writes the tokens before a suffix, with a `BeliefStateWrapper`: `"method":
    /// "generate_with_suffix_cond"`.
    pub suffix_cond: bool,
    /// If `Some`, searches for the most likely continuations instead: `"method": "beam_search"`.
    pub beam_search: Option<BeamCall>,
}

/// Arguments of `generate`.
#[derive(Clone, PartialEq, Debug)]
pub struct GenerateCall {
    /// Number of tokens to generate; required but for a `NonAutoregressiveWrapper`.
    pub seq_len: Option<usize>,
    /// Token that ends a row. Default none.
    pub eos_token: Option<i64>,
    /// Filter and temperature.
    pub sampling: SamplingConfig,
    /// If `true`, rows are padded after their ends even if some have not ended, as in version 2.
    pub pads_open_rows: bool,
    /// If `true`, keys and values are cached, like the default.
    pub cache_kv: bool,
    /// If `true`, the context is the last `max_seq_len` tokens, like the default, otherwise all.
    pub restrict_to_max_seq_len: bool,
    /// Arguments of a `NonAutoregressiveWrapper`.
    pub masked: MaskedCall,
}

/// Arguments of `generate` of a `NonAutoregressiveWrapper`.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct MaskedCall {
    /// Number of rows; `None`: one, which comes back without a batch dimension.
    pub batch_size: Option<usize>,
    /// Temperature of the first step. Default 1.
    pub start_temperature: f64,
    /// Share of the vocabulary that is left out. Default 0.7.
    pub filter_thres: f64,
    /// Factor of the noise on a critic's scores. Default 1.
    pub noise_level_scale: f64,
}

impl Default for MaskedCall {
    fn default() -> Self {
        Self { batch_size: None, start_temperature: 1.0, filter_thres: 0.7, noise_level_scale: 1.0 }
    }
}

/// Arguments of `beam_search`.
#[derive(Clone, PartialEq, Debug)]
pub struct BeamCall {
    /// Number of tokens to generate.
    pub seq_len: usize,
    /// Number of beams.
    pub beams: usize,
    /// If `true`, returns all beams and their scores, otherwise the best one.
    pub return_beams_and_scores: bool,
    /// If `true`, the context is the last `max_seq_len` tokens, like the default, otherwise all.
    pub restrict_to_max_seq_len: bool,
}

/// Keys of a call, except those of sampling.
#[derive(Clone)]
struct Keys {
    return_embeddings: bool,
    return_mems: bool,
    return_attn: bool,
    return_logits_and_embeddings: bool,
    excise_prepend_embeds: bool,
    return_outputs: bool,
    detach_mems: bool,
    prefix_attn_len: Option<i64>,
    layers_execute_order: Option<Vec<usize>>,
    return_attn_z_loss: bool,
    attn_z_loss_weight: Option<f64>,
    recycle_steps: Option<usize>,
    looped_steps: Option<usize>,
    method: Option<String>,
    seq_len: Option<usize>,
    eos_token: Option<i64>,
    cache_kv: bool,
    restrict_to_max_seq_len: bool,
    beams: usize,
    return_beams_and_scores: bool,
    generator_sample_temperature: Option<f64>,
    batch_size: Option<usize>,
    start_temperature: f64,
    filter_thres: f64,
    noise_level_scale: f64,
}

impl Default for Keys {
    fn default() -> Self {
        Self {
            return_embeddings: false,
            return_mems: false,
            return_attn: false,
            return_logits_and_embeddings: false,
            excise_prepend_embeds: false,
            return_outputs: false,
            detach_mems: true,
            prefix_attn_len: None,
            layers_execute_order: None,
            return_attn_z_loss: false,
            attn_z_loss_weight: None,
            recycle_steps: None,
            looped_steps: None,
            method: None,
            seq_len: None,
            eos_token: None,
            cache_kv: true,
            restrict_to_max_seq_len: true,
            beams: 4,
            return_beams_and_scores: false,
            generator_sample_temperature: None,
            batch_size: None,
            start_temperature: MaskedCall::default().start_temperature,
            filter_thres: MaskedCall::default().filter_thres,
            noise_level_scale: MaskedCall::default().noise_level_scale,
        }
    }
}

keywords! {
    Keys {
        options {
            return_embeddings, return_mems, return_attn, return_logits_and_embeddings, excise_prepend_embeds,
            return_outputs, detach_mems, prefix_attn_len, layers_execute_order, return_attn_z_loss, attn_z_loss_weight,
            recycle_steps, looped_steps, method, seq_len, eos_token, cache_kv, restrict_to_max_seq_len, beams,
            return_beams_and_scores, generator_sample_temperature, batch_size, start_temperature, filter_thres,
            noise_level_scale,
        }
    }
}

/// Arguments of sampling in version 2.
const SAMPLING_OF_TWO: [&str; 3] = ["filter_logits_fn", "filter_kwargs", "temperature"];

/// Generation of a `BeliefStateWrapper`, whose sampling has other defaults.
const GOAL: &str = "generate_with_suffix_cond";

impl Call {
    /// Reads a JSON object; `two`: with the arguments of version 2.
    ///
    /// Errors: [`ErrorKind::UnknownOption`](crate::ErrorKind::UnknownOption), or
    /// [`ErrorKind::Option`](crate::ErrorKind::Option) for options that cannot be combined.
    pub fn from_value(value: Value, two: bool) -> Result<Self> {
        let map = kwargs::object("call", value)?;
        if two {
            v2::check_call(&map)?;
        }
        let sampling_keys = kwargs::flat(&mut SamplingConfig::default());
        let samples = |key: &String| {
            if two { SAMPLING_OF_TWO.contains(&key.as_str()) } else { sampling_keys.contains_key(key) }
        };
        let (sampling, keys): (Map, Map) = map.into_iter().partition(|(key, _)| samples(key));
        let samples = !sampling.is_empty();
        let mut sampling = sampling;
        if two && keys.get("method").is_some_and(|method| method == GOAL) {
            let unfiltered = !sampling.contains_key("filter_kwargs");
            sampling.entry("temperature").or_insert(1.25.into());
            let filter = sampling.entry("filter_logits_fn").or_insert("min_p".into());
            if unfiltered && filter == "min_p" {
                sampling.insert("filter_kwargs".to_string(), serde_json::json!({"min_p": 0.1}));
            }
        }
        let keys = kwargs::read::<Keys>(keys)?;
        let sampling = if two { v2::SamplingConfig::from_map(sampling)?.sampling()? } else { kwargs::read(sampling)? };
        let restrict_to_max_seq_len = keys.restrict_to_max_seq_len;
        let seq_len = || keys.seq_len.ok_or_else(|| Error::missing_option("seq_len"));
        let (mut generate, mut beam_search) = (None, None);
        match keys.method.as_deref() {
            None => {
                let given = keys.seq_len.is_some() || keys.eos_token.is_some() || samples;
                ensure!(
                    !given,
                    Error::option("method", "must be \"generate\" to use `seq_len`, `eos_token` or sampling options")
                );
            }
            Some("generate" | GOAL) => {
                generate = Some(GenerateCall {
                    seq_len: keys.seq_len,
                    eos_token: keys.eos_token,
                    sampling,
                    pads_open_rows: two,
                    cache_kv: keys.cache_kv,
                    restrict_to_max_seq_len,
                    masked: MaskedCall {
                        batch_size: keys.batch_size,
                        start_temperature: keys.start_temperature,
                        filter_thres: keys.filter_thres,
                        noise_level_scale: keys.noise_level_scale,
                    },
                });
            }
            Some("beam_search") if two => {
                ensure!(
                    keys.eos_token.is_none() && !samples,
                    Error::option(
                        "method",
                        "\"beam_search\" takes neither eos_token nor sampling, like x-transformers"
                    )
                );
                let (beams, return_beams_and_scores) = (keys.beams, keys.return_beams_and_scores);
                beam_search =
                    Some(BeamCall { seq_len: seq_len()?, beams, return_beams_and_scores, restrict_to_max_seq_len });
            }
            Some(other) => return Err(Error::option("method", format_args!("expected \"generate\", got \"{other}\""))),
        }
        Ok(Self {
            suffix_cond: keys.method.as_deref() == Some(GOAL),
            return_embeddings: keys.return_embeddings,
            return_mems: keys.return_mems,
            return_attn: keys.return_attn,
            return_logits_and_embeddings: keys.return_logits_and_embeddings,
            excise_prepend_embeds: keys.excise_prepend_embeds,
            return_outputs: keys.return_outputs,
            attached_mems: !keys.detach_mems,
            prefix_attn_len: keys.prefix_attn_len,
            layers_execute_order: keys.layers_execute_order,
            return_attn_z_loss: keys.return_attn_z_loss,
            attn_z_loss_weight: keys.attn_z_loss_weight,
            recycle_steps: keys.recycle_steps,
            looped_steps: keys.looped_steps,
            generator_sample_temperature: keys.generator_sample_temperature,
            generate,
            beam_search,
        })
    }
}
