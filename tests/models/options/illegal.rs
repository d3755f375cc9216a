//! Options that are illegal, unknown, or exclude each other.

use super::*;

/// Options that cannot work are an error when the config is planned, which names the option.
#[test]
fn options_illegal() {
    let cases = [
        ("Decoder", json!({"heads": 0}), "heads"),
        ("Decoder", json!({"dim": 0}), "dim"),
        ("Decoder", json!({"depth": 0}), "depth"),
        ("Decoder", json!({"depth": usize::MAX}), "depth"),
        ("Decoder", json!({"attn_dim_head": 0}), "attn_dim_head"),
        ("Decoder", json!({"attn_dim_head": usize::MAX / 2}), "attn_dim_head"),
        ("Decoder", json!({"attn_dropout": 1.5}), "attn_dropout"),
        ("Decoder", json!({"ff_dropout": -0.1}), "ff_dropout"),
        ("Decoder", json!({"ff_mult": 0.01}), "ff_mult"),
        ("Decoder", json!({"ff_mult": 1e300}), "ff_mult"),
        ("Decoder", json!({"only_cross": true}), "only_cross"),
        ("Decoder", json!({"pre_norm": false, "sandwich_norm": true}), "sandwich_norm"),
        ("Decoder", json!({"alibi_pos_bias": true, "rel_pos_bias": true}), "alibi_pos_bias"),
        ("Encoder", json!({"alibi_pos_bias": true}), "alibi_pos_bias"),
        ("Decoder", json!({"alibi_num_heads": 2}), "alibi_num_heads"),
        ("Decoder", json!({"alibi_learned": true}), "alibi_learned"),
        ("Decoder", json!({"alibi_pos_bias": true, "alibi_num_heads": 5}), "alibi_num_heads"),
        ("Decoder", json!({"alibi_pos_bias": true, "alibi_num_heads": 0}), "alibi_num_heads"),
        ("Decoder", json!({"rel_pos_num_buckets": 8}), "rel_pos_num_buckets"),
        ("Decoder", json!({"rel_pos_bias": true, "rel_pos_num_buckets": 1}), "rel_pos_num_buckets"),
        ("Encoder", json!({"rel_pos_bias": true, "rel_pos_num_buckets": 3}), "rel_pos_num_buckets"),
        ("Decoder", json!({"rel_pos_bias": true, "rel_pos_max_distance": 20}), "rel_pos_num_buckets"),
        ("Decoder", json!({"rotary_pos_emb": true}), "rotary_pos_emb"),
        ("Decoder", json!({"rotary_emb_dim": 32}), "rotary_emb_dim"),
        ("Decoder", json!({"rotary_interpolation_factor": 2.0}), "rotary_interpolation_factor"),
        ("Decoder", json!({"rotary_pos_emb": true, "rotary_interpolation_factor": 0.5}), "rotary_interpolation_factor"),
        ("Decoder", json!({"rotary_llama3_scaling": stretched(8.0, 0.25, 2.0, 16)}), "rotary_llama3_scaling"),
        (
            "Decoder",
            json!({"rotary_pos_emb": true, "rotary_llama3_scaling": stretched(0.5, 0.25, 2.0, 16)}),
            "rotary_llama3_scaling",
        ),
        (
            "Decoder",
            json!({"rotary_pos_emb": true, "rotary_llama3_scaling": stretched(8.0, 2.0, 2.0, 16)}),
            "rotary_llama3_scaling",
        ),
        (
            "Decoder",
            json!({"rotary_pos_emb": true, "rotary_llama3_scaling": stretched(8.0, 0.0, 2.0, 16)}),
            "rotary_llama3_scaling",
        ),
        (
            "Decoder",
            json!({"rotary_pos_emb": true, "rotary_llama3_scaling": stretched(8.0, 0.25, 2.0, 0)}),
            "rotary_llama3_scaling",
        ),
        ("Decoder", json!({"rotary_qk_only": true}), "rotary_qk_only"),
        ("Decoder", json!({"rotary_pos_emb": true, "attn_dim_head": 40, "rotary_emb_dim": 41}), "rotary_pos_emb"),
        (
            "Decoder",
            json!({"rotary_pos_emb": true, "attn_dim_head": 32, "attn_collab_heads": true, "attn_collab_compression": 0.2}),
            "rotary_pos_emb",
        ),
        ("Decoder", json!({"dim": 33, "position_infused_attn": true}), "position_infused_attn"),
        ("Decoder", json!({"custom_layers": []}), "custom_layers"),
        ("Decoder", json!({"custom_layers": ["a", "c"]}), "custom_layers"),
        ("Decoder", json!({"custom_layers": ["a", "f"], "cross_attend": true}), "cross_attend"),
        ("Decoder", json!({"sandwich_coef": 0}), "sandwich_coef"),
        ("Decoder", json!({"sandwich_coef": 3}), "sandwich_coef"),
        ("Decoder", json!({"par_ratio": 1}), "par_ratio"),
        ("Decoder", json!({"cross_residual_attn": true}), "cross_residual_attn"),
        ("CrossAttender", json!({"residual_attn": true}), "residual_attn"),
        ("CrossAttender", json!({"rotary_pos_emb": true}), "rotary_pos_emb"),
        ("Decoder", json!({"shift_tokens": 32}), "shift_tokens"),
        ("Encoder", json!({"shift_tokens": 16}), "shift_tokens"),
        ("Decoder", json!({"shift_tokens": [1, 2]}), "shift_tokens"),
        ("Decoder", json!({"qk_norm_attn_seq_len": 8}), "qk_norm_attn_seq_len"),
        ("Decoder", json!({"use_qk_norm_attn": true, "qk_norm_attn_seq_len": 1}), "qk_norm_attn_seq_len"),
        ("Decoder", json!({"attn_scale_init_value": -1.0}), "attn_scale_init_value"),
        ("Decoder", json!({"attn_sparse_topk": 0}), "attn_sparse_topk"),
        ("Decoder", json!({"attn_collab_compression": 0.5}), "attn_collab_compression"),
        ("Decoder", json!({"attn_collab_heads": true, "attn_collab_compression": 0.0}), "attn_collab_compression"),
    ];
    for (kind, options, key) in cases {
        let refused = config(&wrapper(kind, &options)).and_then(|config| config.layers()).unwrap_err();
        match refused.kind() {
            ErrorKind::Option { key: found, .. } => assert_eq!(found, key, "{options}: {refused}"),
            other => panic!("{options} gave {other}"),
        }
    }
}

/// Options that exclude each other: the message names both.
#[test]
fn options_that_exclude_each_other() {
    let cases = [
        ("Decoder", json!({"only_cross": true}), ["only_cross", "cross_attend"]),
        ("Decoder", json!({"pre_norm": false, "sandwich_norm": true}), ["sandwich_norm", "pre_norm"]),
        ("Decoder", json!({"alibi_pos_bias": true, "rel_pos_bias": true}), ["alibi_pos_bias", "rel_pos_bias"]),
        ("Encoder", json!({"alibi_pos_bias": true}), ["alibi_pos_bias", "kind"]),
        ("Decoder", json!({"alibi_learned": true}), ["alibi_learned", "alibi_pos_bias"]),
        ("Decoder", json!({"rel_pos_max_distance": 256}), ["rel_pos_max_distance", "rel_pos_bias"]),
        ("Decoder", json!({"rotary_pos_emb": true}), ["rotary_pos_emb", "attn_dim_head"]),
        ("Decoder", json!({"rotary_qk_only": true}), ["rotary_qk_only", "rotary_pos_emb"]),
        (
            "Decoder",
            json!({"rotary_pos_emb": true, "attn_dim_head": 32, "attn_collab_heads": true, "attn_collab_compression": 0.2}),
            ["rotary_pos_emb", "attn_collab_heads"],
        ),
        ("Decoder", json!({"cross_attend": true, "custom_layers": ["a", "f"]}), ["cross_attend", "layer order"]),
        ("Decoder", json!({"custom_layers": ["c"]}), ["custom_layers", "cross_attend"]),
        ("Decoder", json!({"cross_residual_attn": true}), ["cross_residual_attn", "cross_attend"]),
        ("Decoder", json!({"dim": 33, "position_infused_attn": true}), ["position_infused_attn", "dim"]),
        ("Decoder", json!({"attn_collab_compression": 0.5}), ["attn_collab_compression", "attn_collab_heads"]),
        ("Decoder", json!({"qk_norm_attn_seq_len": 8}), ["qk_norm_attn_seq_len", "use_qk_norm_attn"]),
        ("Decoder", json!({"ff_swish": true, "ff_glu": true, "ff_relu": true}), ["ff_relu", "ff_swish"]),
        (
            "Decoder",
            json!({"use_qk_norm_attn": true, "attn_qk_norm": true, "attn_scale_init_value": -1.0}),
            ["attn_scale_init_value", "use_qk_norm_attn"],
        ),
    ];
    for (kind, options, names) in cases {
        // If one of them is illegal on its own, this does not test the combination.
        let refused = config(&wrapper(kind, &options)).and_then(|config| config.layers()).unwrap_err();
        assert!(matches!(refused.kind(), ErrorKind::Option { .. }), "{refused}");
        for name in names {
            assert!(refused.to_string().contains(name), "{options}: `{refused}` does not name {name}");
        }
    }
}

#[test]
fn options_illegal_wrappers() {
    let layers = json!({"kind": "Decoder", "dim": 8, "depth": 1});
    let encoder = json!({"kind": "Encoder", "dim": 8, "depth": 1});
    let token = |options: Value| {
        let mut value =
            json!({"model": "TransformerWrapper", "num_tokens": 4, "max_seq_len": 8, "attn_layers": layers});
        merge(&mut value, &options);
        value
    };
    let pair = |options: Value| {
        let mut value = json!({"model": "XTransformer", "dim": 8, "enc_num_tokens": 4, "enc_max_seq_len": 8,
            "enc_depth": 1, "dec_num_tokens": 4, "dec_max_seq_len": 8, "dec_depth": 1});
        merge(&mut value, &options);
        value
    };
    let vision = |image: usize, patch: usize, layers: &Value| json!({"model": "ViTransformerWrapper", "image_size": image, "patch_size": patch, "attn_layers": layers});
    let cases = [
        (token(json!({"num_tokens": 0})), "num_tokens"),
        (token(json!({"max_seq_len": 0})), "max_seq_len"),
        (token(json!({"emb_dim": 0})), "emb_dim"),
        (token(json!({"emb_dim": 6, "tie_embedding": true})), "tie_embedding"),
        (token(json!({"emb_dropout": 2.0})), "emb_dropout"),
        (token(json!({"shift_mem_down": 2})), "shift_mem_down"),
        (token(json!({"num_tokens": "many"})), "num_tokens"),
        (token(json!({"num_tokens": -4})), "num_tokens"),
        (token(json!({"attn_layers": 3})), "attn_layers"),
        (pair(json!({"dim": 0})), "dim"),
        (pair(json!({"tie_token_emb": true, "dec_num_tokens": 5})), "tie_token_emb"),
        (pair(json!({"enc_heads": 0})), "heads"),
        (pair(json!({"dec_depth": "two"})), "dec_depth"),
        (vision(10, 4, &encoder), "patch_size"),
        (vision(8, 0, &encoder), "patch_size"),
        (vision(8, 4, &layers), "kind"),
        (json!({"num_tokens": 4}), "model"),
        (json!({"model": "Transformer"}), "model"),
        (json!({"model": "AutoregressiveWrapper"}), "net"),
        (json!({"model": "Encoder", "dim": 8}), "depth"),
        (json!({"model": "SamplingFilter", "filter_logits_fn": "best"}), "filter_logits_fn"),
        (json!({"model": "AutoregressiveWrapper", "net": {"model": "ViTransformerWrapper"}}), "model"),
    ];
    for (value, key) in cases {
        let refused = config(&value).and_then(|config| config.layers()).unwrap_err();
        match refused.kind() {
            ErrorKind::Option { key: found, .. } => assert_eq!(found, key, "{value}: {refused}"),
            other => panic!("{value} gave {other}"),
        }
    }
}

#[test]
fn options_unknown() {
    let cases = [
        (wrapper("Decoder", &json!({"rotary_pos_embed": true})), "rotary_pos_embed", Some("rotary_pos_emb")),
        (wrapper("Decoder", &json!({"attn_talking_head": true})), "attn_talking_head", Some("attn_talking_heads")),
        (wrapper("Decoder", &json!({"ff_gul": true})), "ff_gul", Some("ff_glu")),
        (wrapper("Decoder", &json!({"collab_heads": true})), "collab_heads", Some("attn_collab_heads")),
        (wrapper("Decoder", &json!({"glu": true})), "glu", Some("ff_glu")),
        (wrapper("Decoder", &json!({"dropout_of_everything": 1})), "dropout_of_everything", None),
        (json!({"model": "Decoder", "dim": 8, "depht": 1}), "depht", Some("depth")),
        (
            json!({"model": "XTransformer", "dim": 8, "dec_num_memory_tokens": 2}),
            "dec_num_memory_tokens",
            Some("enc_num_memory_tokens"),
        ),
        (json!({"model": "XTransformer", "dim": 8, "enc_hedas": 2}), "enc_hedas", Some("enc_heads")),
        (json!({"model": "XTransformer", "dim": 8, "num_tokens": 2}), "num_tokens", Some("enc_num_tokens")),
        (
            json!({"model": "TransformerWrapper", "tie_embeddings": true, "attn_layers": {"kind": "Decoder", "dim": 8,
                "depth": 1}}),
            "tie_embeddings",
            Some("tie_embedding"),
        ),
        (
            json!({"model": "ContinuousTransformerWrapper", "max_seq_len": 4, "emb_dim": 8, "attn_layers": {"kind":
                "Decoder", "dim": 8, "depth": 1}}),
            "emb_dim",
            None,
        ),
        (
            json!({"model": "ViTransformerWrapper", "image_sise": 4, "attn_layers": {"kind": "Encoder", "dim": 8,
                "depth": 1}}),
            "image_sise",
            Some("image_size"),
        ),
        (
            json!({"model": "AutoregressiveWrapper", "ignore_idx": 4, "net": wrapper("Decoder", &json!({}))}),
            "ignore_idx",
            Some("ignore_index"),
        ),
        (json!({"model": "SamplingFilter", "filter_thresh": 0.5}), "filter_thresh", Some("filter_thres")),
    ];
    for (value, key, nearest) in cases {
        match config(&value).unwrap_err().kind() {
            ErrorKind::UnknownOption { key: found, nearest: near, .. } => {
                assert_eq!((found.as_str(), near.as_deref()), (key, nearest), "{value}");
            }
            other => panic!("{value} gave {other}"),
        }
    }
}
