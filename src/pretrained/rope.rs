//! RoPE scaling for longer contexts, by the keys of `config.json` and of GGUF.

use serde_json::Value;

use super::{
    Options,
    gguf::Keys,
    llama::{Rotation, Scaling},
};
use crate::{
    Error, Result,
    config::{Llama3Scaling, YarnScaling},
    error::ensure,
    io::TensorFile,
};

/// Largest context that a file may name.
const MAX_TOKENS: usize = 1 << 30;

/// Returns `attention_factor` of the YaRN paper, times `mscale` if a file has one.
pub(super) fn mscale(factor: f64, mscale: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
}

/// Object in `config.json` that describes the rotation.
struct Rope<'a> {
    options: &'a Options,
    value: Option<&'a Value>,
}

impl Rope<'_> {
    const KEY: &'static str = "rope_scaling";

    fn get(&self, key: &str) -> Option<&Value> {
        self.value.and_then(|rope| rope.get(key)).filter(|value| !value.is_null())
    }

    fn kind(&self) -> Option<&Value> {
        self.get("rope_type").or_else(|| self.get("type"))
    }

    fn number(&self, key: &str) -> Result<Option<f64>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let number = value.as_f64();
        let why = || self.options.refuse(Self::KEY, format!("has `{key}` = {value}, expected a number"));
        number.map(Some).ok_or_else(why)
    }

    fn needed(&self, key: &str) -> Result<f64> {
        self.number(key)?.ok_or_else(|| {
            let kind = self.kind().and_then(Value::as_str).unwrap_or_default();
            self.options.refuse(Self::KEY, format!("has type `{kind}`, which requires a number `{key}`"))
        })
    }

    /// Returns the context length before scaling; the key of the config itself takes precedence, as in transformers.
    fn original(&self, positions: usize) -> Result<usize> {
        const KEY: &str = "original_max_position_embeddings";
        if self.options.get(KEY).is_some() {
            return self.options.size(KEY, None);
        }
        let Some(value) = self.number(KEY)? else { return Ok(positions) };
        ensure!(
            (1.0..=MAX_TOKENS as f64).contains(&value) && value.fract() == 0.0,
            self.options.refuse(Self::KEY, format!("has `{KEY}` = {value}, expected a number from 1 to {MAX_TOKENS}"))
        );
        Ok(value as usize)
    }

    fn yarn(&self, positions: usize) -> Result<YarnScaling> {
        let original = self.original(positions)?;
        // Some files have null: the factor is then the ratio of the two context lengths.
        let factor = match self.value.and_then(|rope| rope.get("factor")) {
            Some(Value::Null) => positions as f64 / original as f64,
            _ => self.needed("factor")?,
        };
        // In each of these zero means unset.
        let some = |key: &str| Ok::<_, Error>(self.number(key)?.filter(|&number| number != 0.0));
        let attention_factor = match (self.number("attention_factor")?, some("mscale")?, some("mscale_all_dim")?) {
            (Some(given), ..) => given,
            (None, Some(one), Some(all)) => mscale(factor, one) / mscale(factor, all),
            _ => mscale(factor, 1.0),
        };
        let truncate = match self.get("truncate") {
            None => true,
            Some(value) => value.as_bool().ok_or_else(|| {
                self.options.refuse(Self::KEY, format!("has `truncate` = {value}, expected true or false"))
            })?,
        };
        Ok(YarnScaling {
            factor,
            original_max_position_embeddings: original,
            attention_factor,
            beta_fast: some("beta_fast")?.unwrap_or(32.0),
            beta_slow: some("beta_slow")?.unwrap_or(1.0),
            truncate,
        })
    }
}

/// Returns the rotation of a model of `transformers` with a context of `positions` tokens.
pub(super) fn of_json(options: &Options, positions: usize) -> Result<Rotation> {
    // As in transformers, the older key takes precedence unless it is empty.
    let full = |key: &str| options.get(key).filter(|value| value.as_object().is_none_or(|map| !map.is_empty()));
    let value = full("rope_scaling").or_else(|| full("rope_parameters"));
    ensure!(
        value.is_none_or(Value::is_object),
        options.refuse(Rope::KEY, format!("is {}, expected an object", value.unwrap_or(&Value::Null)))
    );
    let rope = Rope { options, value };
    for key in ["full_attention", "sliding_attention"] {
        ensure!(
            rope.get(key).is_none(),
            options.refuse(Rope::KEY, "differs by layer, expected the same for all layers")
        );
    }
    let part =
        rope.number("partial_rotary_factor")?.map_or_else(|| options.number("partial_rotary_factor", 1.0), Ok)?;
    ensure!(
        part == 1.0,
        options.refuse("partial_rotary_factor", format!("is {part}, expected 1: partial rotation is not supported"))
    );
    let base = rope.number("rope_theta")?.map_or_else(|| options.number("rope_theta", 10000.0), Ok)?;
    let scaling = match rope.kind().map(Value::as_str) {
        // Dynamic frequencies equal the plain ones for texts up to `max_position_embeddings`, which is the context of
        // this model.
        None | Some(Some("default" | "dynamic")) => Scaling::None,
        Some(Some("linear")) => Scaling::Linear(rope.needed("factor")?),
        Some(Some("llama3")) => Scaling::Llama3(Llama3Scaling {
            factor: rope.needed("factor")?,
            low_freq_factor: rope.needed("low_freq_factor")?,
            high_freq_factor: rope.needed("high_freq_factor")?,
            original_max_position_embeddings: rope.original(positions)?,
        }),
        Some(Some("yarn")) => Scaling::Yarn(rope.yarn(positions)?),
        Some(kind) => {
            let kind = kind.unwrap_or("not a string");
            let why = format!("has type `{kind}`, expected default, linear, dynamic, yarn or llama3");
            return Err(options.refuse(Rope::KEY, why));
        }
    };
    Ok(Rotation { base, scaling, factors: None })
}

/// Tensor of factors that divide the frequencies of the pairs, in GGUF files of Llama 3.1 and later.
pub(super) const FREQ_FACTORS: &str = "rope_freqs.weight";

/// Returns the rotation of a GGUF model with a context of `positions` tokens and this number of feature pairs per
/// head.
pub(super) fn of_gguf(file: &TensorFile, keys: &Keys, positions: usize, pairs: usize) -> Result<Rotation> {
    // The newer key takes precedence; a factor of 0 means none.
    let factor = match keys.number("rope.scaling.factor")? {
        Some(factor) => Some(factor),
        None => keys.number("rope.scale_linear")?,
    };
    let factor = factor.filter(|&factor| factor != 0.0).unwrap_or(1.0);
    let kind = keys.get("rope.scaling.type");
    let scaling = match kind.map(|kind| kind.as_str()) {
        Some(Some("none")) => Scaling::None,
        // Without a type the scaling is linear.
        None | Some(Some("linear")) if factor == 1.0 => Scaling::None,
        None | Some(Some("linear")) => Scaling::Linear(factor),
        Some(Some("yarn")) => Scaling::Yarn(yarn(keys, factor, positions)?),
        Some(kind) => {
            let why = format!("is `{}`, expected none, linear or yarn", kind.unwrap_or("not a string"));
            return Err(keys.refuse("rope.scaling.type", why));
        }
    };
    let factors = match file.info(FREQ_FACTORS) {
        None => None,
        Some(info) => {
            ensure!(
                info.shape == [pairs],
                Error::file(
                    file.path(),
                    format_args!(
                        "tensor `{FREQ_FACTORS}` has shape {:?}, expected [{pairs}], one value per pair",
                        info.shape
                    )
                )
            );
            let factors = file.tensor(FREQ_FACTORS)?.to_f64_vec()?;
            ensure!(
                factors.iter().all(|&factor| factor > 0.0 && factor.is_finite()),
                Error::file(
                    file.path(),
                    format_args!("tensor `{FREQ_FACTORS}` contains {factors:?}, expected numbers above 0")
                )
            );
            Some(factors)
        }
    };
    let base = keys.number("rope.freq_base")?.unwrap_or(10000.0);
    Ok(Rotation { base, scaling, factors })
}

/// Returns YaRN scaling as in llama.cpp, whose attention keys multiply the paper's value.
fn yarn(keys: &Keys, factor: f64, positions: usize) -> Result<YarnScaling> {
    let number = |key: &str, default: f64| Ok::<_, Error>(keys.number(key)?.unwrap_or(default));
    let mix = number("rope.scaling.yarn_ext_factor", 1.0)?;
    // Below 0 means unset.
    ensure!(mix == 1.0 || mix < 0.0, keys.refuse("rope.scaling.yarn_ext_factor", format!("is {mix}, expected 1")));
    let all = number("rope.scaling.yarn_log_multiplier", 0.0)?;
    let own = number("rope.scaling.attn_factor", 1.0)? * number("rope.scaling.yarn_attn_factor", 1.0)?;
    Ok(YarnScaling {
        attention_factor: own * mscale(factor, 1.0) / mscale(factor, all),
        beta_fast: number("rope.scaling.yarn_beta_fast", 32.0)?,
        beta_slow: number("rope.scaling.yarn_beta_slow", 1.0)?,
        ..YarnScaling::new(factor, keys.size("rope.scaling.original_context_length", Some(positions))?)
    })
}
