//! Rotary position embedding: from options to the frequencies of the feature pairs.

use std::{f64::consts::TAU, sync::Arc};

use super::{
    options::{AttentionLayersConfig, Llama3Scaling, YarnScaling},
    ranges::{WIDEST, without},
};
use crate::{Error, Result, error::ensure};

/// Rotary position embedding.
#[derive(Clone, PartialEq, Debug)]
#[non_exhaustive]
pub struct RotaryPlan {
    /// Number of features in the exponents of the frequencies.
    pub dim: usize,
    /// If `true`, values are rotated too.
    pub values: bool,
    /// The base of the frequencies.
    pub base: f64,
    /// Divides all frequencies.
    pub interpolation: f64,
    /// Divides positions, whose frequencies are stored without it.
    pub position_divisor: f64,
    /// Positions per power of the scales that xPos multiplies queries by, and divides keys by
    /// (<https://arxiv.org/abs/2212.10554>).
    pub xpos: Option<f64>,
    /// Divides slow frequencies.
    pub llama3: Option<Llama3Scaling>,
    /// Divides slow frequencies, and multiplies queries and keys.
    pub yarn: Option<YarnScaling>,
    /// Divisors of the frequencies, one per feature pair.
    pub factors: Option<Arc<[f64]>>,
    /// If `true`, the pairs are `2k, 2k + 1`, otherwise `k, k + r/2`.
    pub interleaved: bool,
}

impl RotaryPlan {
    /// Creates the paper's rotation of this number of features.
    pub(crate) fn plain(dim: usize) -> Self {
        Self {
            dim,
            values: false,
            base: 10000.0,
            interpolation: 1.0,
            position_divisor: 1.0,
            xpos: None,
            llama3: None,
            yarn: None,
            factors: None,
            interleaved: false,
        }
    }

    /// Returns the rotation that the options describe, for heads of `dim_head` features, of which queries and keys have
    /// `dim_qk`; `None` without `rotary_pos_emb`.
    pub(super) fn new(config: &AttentionLayersConfig, dim_head: usize, dim_qk: usize) -> Result<Option<Self>> {
        if !config.rotary_pos_emb {
            let changed = config.rotary_base != AttentionLayersConfig::default().rotary_base;
            for (name, given) in [
                ("rotary_emb_dim", config.rotary_emb_dim.is_some()),
                ("rotary_qk_only", config.rotary_qk_only),
                ("rotary_interleaved", config.rotary_interleaved),
                ("rotary_base", changed),
                ("rotary_interpolation_factor", config.rotary_interpolation_factor != 1.0),
                ("rotary_llama3_scaling", config.rotary_llama3_scaling.is_some()),
                ("rotary_yarn_scaling", config.rotary_yarn_scaling.is_some()),
                ("rotary_freq_factors", config.rotary_freq_factors.is_some()),
            ] {
                without(name, given, "rotary_pos_emb")?;
            }
            return Ok(None);
        }
        without("rotary_interleaved", config.rotary_interleaved && !config.rotary_qk_only, "rotary_qk_only")?;
        // Written so that NaN is refused.
        ensure!(
            config.rotary_base > 1.0 && config.rotary_base.is_finite(),
            Error::option("rotary_base", format_args!("expected a number above 1, got {}", config.rotary_base))
        );
        let factor = config.rotary_interpolation_factor;
        ensure!(
            at_least_1(factor),
            Error::option(
                "rotary_interpolation_factor",
                format_args!("expected a finite number of at least 1, got {factor}")
            )
        );
        if let Some(scaling) = &config.rotary_llama3_scaling {
            check_llama3(scaling)?;
        }
        // 0.22 rotates at least 32 features; other rotations may be as narrow as those of other libraries.
        let least = if config.rotary_qk_only && config.rotary_emb_dim.is_some() { 2 } else { 32 };
        let plan = Self {
            values: !config.rotary_qk_only,
            base: config.rotary_base,
            interpolation: factor,
            llama3: config.rotary_llama3_scaling,
            yarn: config.rotary_yarn_scaling,
            factors: config.rotary_freq_factors.as_deref().map(Arc::from),
            interleaved: config.rotary_interleaved,
            ..Self::plain(config.rotary_emb_dim.unwrap_or(dim_head / 2).max(least))
        };
        ensure!(
            plan.dim <= WIDEST && plan.features() <= dim_head,
            Error::option(
                "rotary_pos_emb",
                format_args!(
                    "rotates {} features (at least {least}), but `attn_dim_head` is only {dim_head}",
                    plan.dim
                )
            )
        );
        ensure!(
            plan.features() <= dim_qk,
            Error::option(
                "rotary_pos_emb",
                format_args!("rotates {} features, but `attn_collab_heads` shares only {dim_qk}", plan.dim)
            )
        );
        if let Some(scaling) = &plan.yarn {
            plan.check_yarn(scaling, dim_head)?;
        }
        if let Some(factors) = &plan.factors {
            let pairs = plan.features() / 2;
            ensure!(
                factors.len() == pairs && factors.iter().all(|&factor| factor > 0.0 && factor.is_finite()),
                Error::option(
                    "rotary_freq_factors",
                    format_args!("expected {pairs} finite numbers above 0, one per pair of features, got {factors:?}")
                )
            );
        }
        Ok(Some(plan))
    }

    fn check_yarn(&self, scaling: &YarnScaling, dim_head: usize) -> Result<()> {
        const NAME: &str = "rotary_yarn_scaling";
        let YarnScaling { factor, original_max_position_embeddings, attention_factor, beta_fast, beta_slow, .. } =
            *scaling;
        let above_0 = |value: f64| value > 0.0 && value.is_finite();
        ensure!(
            at_least_1(factor)
                && original_max_position_embeddings > 0
                && above_0(attention_factor)
                && above_0(beta_fast)
                && above_0(beta_slow),
            Error::option(
                NAME,
                format_args!(
                    "expected a factor of at least 1, and original_max_position_embeddings, attention_factor, beta_fast \
                     and beta_slow above 0, got {scaling:?}"
                )
            )
        );
        ensure!(
            self.interpolation == 1.0 && self.llama3.is_none(),
            Error::option(NAME, "cannot be used with `rotary_interpolation_factor` or `rotary_llama3_scaling`")
        );
        // The factor on queries and keys then becomes one on the scores.
        ensure!(
            !self.values && self.features() == dim_head,
            Error::option(
                NAME,
                format_args!(
                    "requires `rotary_qk_only = true` and `rotary_emb_dim` equal to `attn_dim_head` ({dim_head})"
                )
            )
        );
        Ok(())
    }

    /// Returns the number of features per head that are rotated: `dim`, rounded up to an even number.
    pub fn features(&self) -> usize {
        2 * self.dim.div_ceil(2)
    }

    /// Returns xPos's scale of pair `k`, in f32 as PyTorch computes it.
    pub fn xpos_scale(&self, k: usize) -> f64 {
        let dim = self.dim as f64;
        f64::from(((2 * k) as f32 + (0.4 * dim) as f32) / (1.4 * dim) as f32)
    }

    /// Returns the factor on the scores of rotated queries and keys, each of which YaRN multiplies by
    /// `attention_factor`.
    pub fn score_factor(&self) -> f64 {
        self.yarn.map_or(1.0, |scaling| scaling.attention_factor * scaling.attention_factor)
    }

    /// Returns the frequency of pair `k`, the change of its angle per position: `base^(−2k / dim)`, scaled.
    pub fn frequency(&self, k: usize) -> f64 {
        // The f32 roundings are PyTorch's.
        let exponent = (2 * k) as f32 / self.dim as f32;
        let frequency = f64::from(1.0 / libm::pow(self.base, f64::from(exponent)) as f32) / self.interpolation;
        let scaled = match (&self.llama3, &self.yarn) {
            (Some(scaling), _) => {
                let Llama3Scaling { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } =
                    *scaling;
                let turns = original_max_position_embeddings as f64 * frequency / TAU;
                let fast = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0);
                frequency * (fast + (1.0 - fast) / factor)
            }
            (None, Some(scaling)) => {
                let [low, high] = self.transition(scaling);
                let slow = ((k as f64 - low) / (high - low)).clamp(0.0, 1.0);
                frequency * (slow / scaling.factor + (1.0 - slow))
            }
            (None, None) => frequency,
        };
        scaled / self.factors.as_ref().and_then(|factors| factors.get(k)).copied().unwrap_or(1.0)
    }

    /// Returns the pairs between which YaRN's fast frequencies change into slow ones.
    fn transition(&self, scaling: &YarnScaling) -> [f64; 2] {
        let dim = self.dim as f64;
        let tokens = scaling.original_max_position_embeddings as f64;
        // Pair with this number of turns.
        let pair = |turns: f64| dim * libm::log(tokens / (turns * TAU)) / (2.0 * libm::log(self.base));
        let (mut low, mut high) = (pair(scaling.beta_fast), pair(scaling.beta_slow));
        if scaling.truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        (low, high) = (low.max(0.0), high.min(dim - 1.0));
        // Both ends may be the same pair.
        [low, if low == high { high + 0.001 } else { high }]
    }
}

fn at_least_1(value: f64) -> bool {
    value >= 1.0 && value.is_finite()
}

fn check_llama3(scaling: &Llama3Scaling) -> Result<()> {
    let Llama3Scaling { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } = *scaling;
    ensure!(
        at_least_1(factor)
            && low_freq_factor > 0.0
            && high_freq_factor > low_freq_factor
            && high_freq_factor.is_finite()
            && original_max_position_embeddings > 0,
        Error::option(
            "rotary_llama3_scaling",
            format_args!(
                "expected a factor of at least 1, 0 < low_freq_factor < high_freq_factor and \
                 original_max_position_embeddings above 0, got {scaling:?}"
            )
        )
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::{super::AttentionLayersConfig, RotaryPlan};

    fn plan(options: &Value) -> crate::Result<Option<RotaryPlan>> {
        let mut config = json!({"kind": "Decoder", "dim": 64, "depth": 1, "heads": 4, "attn_dim_head": 16,
            "rotary_pos_emb": true, "rotary_qk_only": true, "rotary_emb_dim": 16});
        config.as_object_mut().unwrap().extend(options.as_object().unwrap().clone());
        let config: AttentionLayersConfig = serde_json::from_value(config).unwrap();
        super::super::LayersPlan::new(&config).map(|plan| plan.positions.rotary)
    }

    fn yarn(factor: f64, tokens: usize, attention: f64, fast: f64, slow: f64, truncate: bool) -> Value {
        json!({"factor": factor, "original_max_position_embeddings": tokens, "attention_factor": attention,
            "beta_fast": fast, "beta_slow": slow, "truncate": truncate})
    }

    /// Compares with transformers 5.24, `ROPE_INIT_FUNCTIONS["yarn"]`.
    #[test]
    fn frequencies_of_yarn() {
        let cases = [
            (
                yarn(4.0, 4096, 1.0, 32.0, 1.0, true),
                [1.0, 0.31622776, 0.1, 0.025693506, 0.0062499996, 0.0013834966, 0.00025, 0.000079056947],
            ),
            (
                yarn(8.0, 64, 1.0, 8.0, 0.5, false),
                [1.0, 0.22543858, 0.034956351, 0.0039528473, 0.00125, 0.00039528473, 0.000125, 0.000039528473],
            ),
        ];
        for (scaling, expected) in cases {
            let plan = plan(&json!({"rotary_yarn_scaling": scaling})).unwrap().unwrap();
            for (k, expected) in expected.into_iter().enumerate() {
                let frequency = plan.frequency(k);
                assert!((frequency / expected - 1.0).abs() < 3e-7, "{k}: {frequency}, expected {expected}");
            }
        }
    }

    #[test]
    fn factors_divide_frequencies() {
        let factors = [1.0, 2.0, 4.0, 8.0, 8.0, 8.0, 8.0, 0.5];
        let plain = plan(&json!({"rotary_interpolation_factor": 2.0})).unwrap().unwrap();
        let divided = plan(&json!({"rotary_interpolation_factor": 2.0, "rotary_freq_factors": factors}));
        let divided = divided.unwrap().unwrap();
        for (k, factor) in factors.into_iter().enumerate() {
            assert_eq!(divided.frequency(k), plain.frequency(k) / factor);
        }
    }

    #[test]
    fn scalings_that_make_no_sense_are_refused() {
        let usual = yarn(4.0, 16, 1.5, 32.0, 1.0, true);
        assert_eq!(plan(&json!({"rotary_yarn_scaling": usual})).unwrap().unwrap().score_factor(), 2.25);
        let cases = [
            (
                json!({"rotary_yarn_scaling": usual, "rotary_qk_only": false, "rotary_emb_dim": null, "attn_dim_head": 32}),
                "rotary_qk_only",
            ),
            (json!({"rotary_yarn_scaling": usual, "rotary_emb_dim": 8}), "`attn_dim_head` (16)"),
            (json!({"rotary_yarn_scaling": usual, "rotary_interpolation_factor": 2.0}), "cannot be used with"),
            (json!({"rotary_yarn_scaling": usual, "attn_qk_norm": true}), "attn_qk_norm"),
            (json!({"rotary_yarn_scaling": yarn(0.5, 16, 1.0, 32.0, 1.0, true)}), "a factor of at least 1"),
            (json!({"rotary_yarn_scaling": yarn(4.0, 0, 1.0, 32.0, 1.0, true)}), "above 0"),
            (json!({"rotary_yarn_scaling": yarn(4.0, 16, 0.0, 32.0, 1.0, true)}), "above 0"),
            (json!({"rotary_yarn_scaling": yarn(4.0, 16, 1.0, -1.0, 1.0, true)}), "above 0"),
            (json!({"rotary_yarn_scaling": yarn(4.0, 16, 1.0, 32.0, 0.0, true)}), "above 0"),
            (json!({"rotary_freq_factors": [1.0, 2.0]}), "expected 8 finite numbers above 0"),
            (json!({"rotary_freq_factors": vec![0.0; 8]}), "expected 8 finite numbers above 0"),
        ];
        for (options, expected) in cases {
            let error = plan(&options).unwrap_err().to_string();
            assert!(error.contains(expected), "{options}: {error}");
        }
        let off = json!({"rotary_pos_emb": false, "rotary_qk_only": false, "rotary_emb_dim": null});
        for (key, value) in [("rotary_yarn_scaling", usual), ("rotary_freq_factors", json!([1.0]))] {
            let mut options = off.clone();
            options[key] = value;
            let error = plan(&options).unwrap_err().to_string();
            assert!(error.contains(key) && error.contains("requires `rotary_pos_emb"), "{error}");
        }
    }
}
