//! Options of a call besides its tensors.

use serde_json::Value;

use super::{
    SamplingConfig,
    kwargs::{self, Map, keywords},
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
    /// If `Some`, generates tokens instead: `"method": "generate"` with the arguments of `generate`.
    pub generate: Option<GenerateCall>,
}

/// Arguments of `generate`.
#[derive(Clone, PartialEq, Debug)]
pub struct GenerateCall {
    /// Number of tokens to generate.
    pub seq_len: usize,
    /// Token that ends a row. Default none.
    pub eos_token: Option<i64>,
    /// Filter and temperature.
    pub sampling: SamplingConfig,
}

/// Keys of a call, except those of sampling.
#[derive(Clone, Default)]
struct Keys {
    return_embeddings: bool,
    return_mems: bool,
    return_attn: bool,
    method: Option<String>,
    seq_len: Option<usize>,
    eos_token: Option<i64>,
}

keywords! {
    Keys {
        options { return_embeddings, return_mems, return_attn, method, seq_len, eos_token }
    }
}

impl Call {
    /// Reads a JSON object.
    ///
    /// Errors: [`ErrorKind::UnknownOption`](crate::ErrorKind::UnknownOption), or
    /// [`ErrorKind::Option`](crate::ErrorKind::Option) for options that cannot be combined.
    pub fn from_value(value: Value) -> Result<Self> {
        let map = kwargs::object("call", value)?;
        let sampling_keys = kwargs::flat(&mut SamplingConfig::default());
        let (sampling, keys): (Map, Map) = map.into_iter().partition(|(key, _)| sampling_keys.contains_key(key));
        let samples = !sampling.is_empty();
        let (keys, sampling) = (kwargs::read::<Keys>(keys)?, kwargs::read(sampling)?);
        let generate = match keys.method.as_deref() {
            None => {
                let given = keys.seq_len.is_some() || keys.eos_token.is_some() || samples;
                ensure!(
                    !given,
                    Error::option("method", "must be \"generate\" to use `seq_len`, `eos_token` or sampling options")
                );
                None
            }
            Some("generate") => {
                let seq_len = keys.seq_len.ok_or_else(|| Error::missing_option("seq_len"))?;
                Some(GenerateCall { seq_len, eos_token: keys.eos_token, sampling })
            }
            Some(other) => return Err(Error::option("method", format_args!("expected \"generate\", got \"{other}\""))),
        };
        Ok(Self {
            return_embeddings: keys.return_embeddings,
            return_mems: keys.return_mems,
            return_attn: keys.return_attn,
            generate,
        })
    }
}
