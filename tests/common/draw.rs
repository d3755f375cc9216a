//! Random legal options of models, for properties that hold for all of them.

#![allow(dead_code, reason = "each suite uses a part")]

use std::sync::LazyLock;

use proptest::prelude::*;
use serde_json::{Map, Value, json};
use x_transformers::{
    Device, ParamMap, Philox, Result, Tensor,
    config::{Config, LayerType},
    ops::Activation,
};

pub const CPU: Device = Device::Cpu;
pub const VOCABULARY: usize = 11;

/// Options of layers, each drawn or not; the plan rejects incompatible ones.
pub static OPTIONS: LazyLock<Vec<String>> = LazyLock::new(|| {
    let activation = |activation: &Activation| Some(format!(r#"{{"ff_{}": true}}"#, activation.option()?));
    LISTED.iter().map(ToString::to_string).chain(Activation::ALL.iter().filter_map(activation)).collect()
});

/// Options that are in none of the tables.
const LISTED: &[&str] = &[
    r#"{"use_scalenorm": true}"#,
    r#"{"use_rmsnorm": true}"#,
    r#"{"use_rezero": true}"#,
    r#"{"alibi_pos_bias": true}"#,
    r#"{"alibi_pos_bias": true, "alibi_num_heads": 1}"#,
    r#"{"alibi_pos_bias": true, "alibi_learned": true}"#,
    r#"{"rel_pos_bias": true}"#,
    r#"{"rel_pos_bias": true, "rel_pos_num_buckets": 4, "rel_pos_max_distance": 6}"#,
    r#"{"position_infused_attn": true}"#,
    r#"{"rotary_pos_emb": true, "attn_dim_head": 33}"#,
    r#"{"rotary_pos_emb": true, "attn_dim_head": 35, "rotary_emb_dim": 33}"#,
    r#"{"rotary_pos_emb": true, "attn_dim_head": 33, "rotary_qk_only": true}"#,
    r#"{"custom_layers": ["a", "f", "a"]}"#,
    r#"{"sandwich_coef": 1}"#,
    r#"{"par_ratio": 2}"#,
    r#"{"residual_attn": true}"#,
    r#"{"macaron": true}"#,
    r#"{"pre_norm": false}"#,
    r#"{"gate_residual": true}"#,
    r#"{"scale_residual": true}"#,
    r#"{"shift_tokens": 1}"#,
    r#"{"shift_tokens": [0, 2, 1, 3]}"#,
    r#"{"sandwich_norm": true}"#,
    r#"{"use_qk_norm_attn": true}"#,
    r#"{"use_qk_norm_attn": true, "qk_norm_attn_seq_len": 9}"#,
    r#"{"attn_qk_norm": true}"#,
    r#"{"attn_talking_heads": true}"#,
    r#"{"attn_head_scale": true}"#,
    r#"{"attn_collab_heads": true}"#,
    r#"{"attn_collab_heads": true, "attn_collab_compression": 1.2}"#,
    r#"{"attn_sparse_topk": 3}"#,
    r#"{"attn_use_entmax15": true}"#,
    r#"{"attn_num_mem_kv": 2}"#,
    r#"{"attn_on_attn": true}"#,
    r#"{"attn_gate_values": true}"#,
    r#"{"attn_max_attend_past": 2}"#,
    r#"{"ff_glu": true}"#,
    r#"{"ff_post_act_ln": true}"#,
    r#"{"attn_kv_heads": 1}"#,
    r#"{"attn_qkv_bias": true}"#,
    r#"{"attn_out_bias": false}"#,
    r#"{"ff_swish": true, "ff_glu": true}"#,
    r#"{"ff_relu": true, "ff_glu": true}"#,
    r#"{"ff_no_bias": true}"#,
    r#"{"norm_eps": 0.25}"#,
    r#"{"final_norm": "none"}"#,
    r#"{"weight_tie_layers": true}"#,
    r#"{"rotary_pos_emb": true, "attn_dim_head": 33, "rotary_qk_only": true, "rotary_interleaved": true}"#,
    r#"{"rotary_pos_emb": true, "attn_dim_head": 33, "rotary_base": 300.0}"#,
    r#"{"rotary_pos_emb": true, "rotary_emb_dim": 4, "rotary_qk_only": true, "rotary_interpolation_factor": 3.0}"#,
    r#"{"cross_attend": true}"#,
    r#"{"cross_attend": true, "cross_residual_attn": true}"#,
    r#"{"cross_attend": true, "only_cross": true}"#,
    r#"{"cross_attend": true, "custom_layers": ["a", "c", "f", "c"]}"#,
];

/// A model and the sizes of its inputs.
#[derive(Debug, Clone)]
pub struct Draw {
    pub value: Value,
    /// The options in it.
    pub picks: Vec<usize>,
    pub batch: usize,
    pub n: usize,
    pub seed: u64,
}

impl Draw {
    pub fn layers(&self) -> &Value {
        &self.value["attn_layers"]
    }

    pub fn given(&self, key: &str) -> bool {
        self.layers().get(key).is_some()
    }

    pub fn has(&self, key: &str) -> bool {
        self.layers().get(key).is_some_and(|value| *value == json!(true))
    }

    /// Queries of cross-attention are aligned with the end of the context: a limit on the past then depends on their
    /// number.
    pub fn counts_queries(&self) -> bool {
        self.has("cross_attend") && self.given("attn_max_attend_past")
    }

    pub fn is_causal(&self) -> bool {
        self.layers()["kind"] == json!("Decoder")
    }

    pub fn is_legal(&self) -> bool {
        Config::from_value(self.value.clone()).and_then(|config| config.layers()).is_ok()
    }

    /// Returns the number of sublayers of this kind.
    pub fn count(&self, kind: LayerType) -> usize {
        let stacks = Config::from_value(self.value.clone()).and_then(|config| config.layers()).unwrap();
        stacks[0].1.layers.iter().filter(|layer| layer.branch.layer_type() == Some(kind)).count()
    }

    /// The same without one of its options.
    pub fn without(&self, pick: usize) -> Self {
        let mut draw = self.clone();
        draw.picks.retain(|&other| other != pick);
        let layers = self.layers();
        let fixed = ["kind", "dim", "depth", "heads", "ff_mult"].map(|key| (key.to_string(), layers[key].clone()));
        draw.value["attn_layers"] = with_options(Map::from_iter(fixed), &draw.picks);
        draw
    }

    /// Returns `true` if an option of this draw has an effect with the others, as documented.
    pub fn acts(&self, option: &Map<String, Value>) -> bool {
        let is = |key: &str| option.contains_key(key);
        let norms = ["use_scalenorm", "use_rmsnorm", "sandwich_norm", "pre_norm"];
        let idle = [
            is("attn_kv_heads") && self.layers()["heads"] == json!(1),
            self.given("use_rezero") && norms.into_iter().any(is),
            self.given("use_rmsnorm") && is("use_scalenorm"),
            is("residual_attn") && self.count(LayerType::SelfAttention) < 2,
            is("cross_residual_attn") && self.count(LayerType::CrossAttention) < 2,
            // Three ways to state the order.
            is("only_cross") && self.given("custom_layers"),
            is("sandwich_coef") && (self.given("par_ratio") || self.given("custom_layers")),
            is("par_ratio") && (self.given("sandwich_coef") || self.given("custom_layers")),
            is("attn_qk_norm") && self.given("use_qk_norm_attn"),
            is("use_qk_norm_attn") && self.given("attn_qk_norm"),
            // Three keys or fewer are left anyway.
            is("attn_sparse_topk") && (self.given("attn_max_attend_past") || self.given("attn_use_entmax15")),
            // All keys that it would leave out may have no weight.
            is("attn_max_attend_past") && (self.given("attn_sparse_topk") || self.given("attn_use_entmax15")),
        ];
        !idle.contains(&true)
    }
}

pub fn option(pick: usize) -> Map<String, Value> {
    serde_json::from_str(&OPTIONS[pick]).unwrap()
}

/// The last of conflicting options wins.
fn with_options(mut layers: Map<String, Value>, picks: &[usize]) -> Value {
    layers.insert("attn_dim_head".to_string(), json!(5));
    picks.iter().for_each(|&pick| layers.extend(option(pick)));
    Value::Object(layers)
}

/// Legal draws: about four options each.
pub fn draws() -> impl Strategy<Value = Draw> {
    let picks = proptest::collection::vec(0usize..OPTIONS.len(), 0..7);
    let wrapper = (any::<bool>(), any::<bool>(), 0usize..3, any::<bool>());
    let sizes = (1usize..4, 1usize..9, 1usize..4, 13usize..15, any::<u64>());
    (picks, any::<bool>(), wrapper, sizes).prop_filter_map("illegal together", |(picks, causal, wrapper, sizes)| {
        let (batch, n, heads, dim, seed) = sizes;
        let kind = if causal { "Decoder" } else { "Encoder" };
        let layers = json!({"kind": kind, "dim": dim, "depth": 2, "heads": heads, "ff_mult": 1.5});
        let mut value = json!({"model": "TransformerWrapper", "num_tokens": VOCABULARY, "max_seq_len": 9,
                               "attn_layers": with_options(layers.as_object().unwrap().clone(), &picks)});
        let (tied, without_positions, memory_tokens, narrow) = wrapper;
        let mut options = Map::new();
        options.extend(tied.then(|| ("tie_embedding".to_string(), json!(true))));
        options.extend(without_positions.then(|| ("use_pos_emb".to_string(), json!(false))));
        options.extend((memory_tokens > 0).then(|| ("num_memory_tokens".to_string(), json!(memory_tokens))));
        options.extend((narrow && !tied).then(|| ("emb_dim".to_string(), json!(7))));
        value.as_object_mut().unwrap().extend(options);
        let draw = Draw { value, picks, batch, n, seed };
        draw.is_legal().then_some(draw)
    })
}

/// Moves every parameter away from constants.
pub fn unsettle(params: &ParamMap, seed: u64) -> Result<()> {
    for (stream, (_, param)) in params.unique().enumerate() {
        let random = Philox::new(seed, stream as u64);
        let noise = |i: usize| f64::from((0.2 * random.normal(i as u64)) as f32);
        let old = param.tensor().detach();
        param.set(old.add(&Tensor::generate(*old.shape(), old.dtype(), old.device(), noise)?)?)?;
    }
    Ok(())
}
