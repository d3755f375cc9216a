//! `xt convert`: configs and runs of x-transformers 0.22 with the numbers of version 2, and what stands in the way.

use std::fs;

use serde_json::{Value, json};

use crate::command::{fails, path, succeeds, write_text};

/// Options that version 2 has too, in another order of heads, features and names.
fn gpt() -> Value {
    json!({"model": "AutoregressiveWrapper", "net": {
        "model": "TransformerWrapper", "num_tokens": 256, "max_seq_len": 24, "logits_bias": false,
        "attn_layers": {
            "kind": "Decoder", "dim": 24, "depth": 2, "heads": 6, "attn_dim_head": 8, "attn_kv_heads": 2,
            "attn_out_bias": false, "use_rmsnorm": true, "final_norm": "same", "rotary_pos_emb": true,
            "rotary_qk_only": true, "rotary_emb_dim": 6, "rotary_base": 500.0, "rotary_interpolation_factor": 2.0, "ff_glu": true,
            "ff_swish": true,
        },
    }})
}

#[test]
fn converted_runs_have_the_same_numbers() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| path(folder.path(), name);
    let (config, text) = (at("config.json"), at("text.txt"));
    write_text(&text);
    for (index, options) in [
        json!({}),
        json!({"rotary_interleaved": true, "attn_kv_heads": 6, "use_rmsnorm": false, "use_scalenorm": true}),
        json!({"rotary_pos_emb": false, "pre_norm": false, "alibi_pos_bias": true, "attn_kv_heads": 6}),
        json!({"rotary_pos_emb": false, "rel_pos_bias": true, "attn_kv_heads": 6, "attn_head_scale": true, "macaron": true,
            "shift_tokens": 1, "sandwich_norm": true}),
        json!({"attn_kv_heads": 6, "weight_tie_layers": true, "gate_residual": true, "scale_residual": true}),
    ]
    .into_iter()
    .enumerate()
    {
        let mut gpt = gpt();
        let layers = gpt["net"]["attn_layers"].as_object_mut().unwrap();
        layers.extend(options.as_object().unwrap().clone());
        if layers["rotary_pos_emb"] == json!(false) {
            layers.retain(|name, _| !name.starts_with("rotary_"));
        }
        if index % 2 == 0 {
            let net = gpt["net"].as_object_mut().unwrap();
            net.remove("logits_bias");
            net.insert("tie_embedding".to_string(), json!(true));
        }
        if index == 2 {
            gpt["net"]["use_pos_emb"] = json!(false);
        }
        fs::write(&config, gpt.to_string()).unwrap();
        let (run, two, two_config) = (at(&format!("run{index}")), at(&format!("two{index}")), at(&format!("{index}.json")));
        succeeds(&[
            "train", "--config", &config, "--text", &text, "--steps", "3", "--batch-size", "2", "--lr", "0.01", "--device",
            "cpu", "--out", &run,
        ]);
        let said = succeeds(&["convert", &run, &two]);
        assert!(said.contains("options of x-transformers 2"), "{said}");
        succeeds(&["convert", &config, &two_config]);
        let read = |file: String| serde_json::from_str::<Value>(&fs::read_to_string(file).unwrap()).unwrap();
        assert_eq!(read(two_config), read(format!("{two}/config.json")));
        let score = |model: &str| {
            let score = succeeds(&["generate", "--checkpoint", model, "--device", "cpu", "--score", &text]);
            score.split(' ').next().and_then(|bits| bits.parse::<f64>().ok()).expect("a number of bits")
        };
        let (old, new) = (score(&run), score(&two));
        assert!((old - new).abs() < 1e-4, "{options}: {old} bits per byte before, {new} after");
        assert!(fails(&["convert", &run, &two]).contains("--overwrite"));
        succeeds(&["convert", &run, &two, "--overwrite"]);
        assert!(fails(&["convert", &two, &at("again")]).contains("already"));
    }
}

#[test]
fn obstacles_are_all_named() {
    let folder = tempfile::tempdir().unwrap();
    let (config, out) = (path(folder.path(), "config.json"), path(folder.path(), "out.json"));
    let net = json!({"model": "TransformerWrapper", "num_tokens": 256, "max_seq_len": 24,
        "attn_layers": {"kind": "Decoder", "dim": 24, "depth": 1, "rotary_pos_emb": true, "attn_talking_heads": true}});
    fs::write(&config, net.to_string()).unwrap();
    let message = fails(&["convert", &config, &out]);
    for option in ["use_rmsnorm", "final_norm", "attn_out_bias", "logits_bias", "rotary_qk_only", "attn_talking_heads"]
    {
        assert!(message.contains(&format!("`{option}`")), "{option} in {message}");
    }
    assert!(!fs::exists(&out).unwrap());
    fs::write(
        &config,
        r#"{"model": "Encoder", "dim": 8, "depth": 1, "use_rmsnorm": true, "pre_norm": false,
        "attn_out_bias": false}"#,
    )
    .unwrap();
    // Version 2 has a norm after the last sum too.
    assert!(fails(&["convert", &config, &out]).contains("sublayer 1"));
    let encoder = r#"{"kind": "Encoder", "dim": 8, "depth": 1}"#;
    let vit =
        format!(r#"{{"model": "ViTransformerWrapper", "image_size": 8, "patch_size": 4, "attn_layers": {encoder}}}"#);
    fs::write(&config, vit).unwrap();
    assert!(fails(&["convert", &config, &out]).contains("class token"));
    let vectors = format!(
        r#"{{"model": "ContinuousTransformerWrapper", "max_seq_len": 8, "dim_in": 3, "attn_layers": {encoder}}}"#
    );
    fs::write(&config, vectors).unwrap();
    let message = fails(&["convert", &config, &out]);
    assert!(message.contains("`dim_in`") && message.contains("`final_norm`"), "{message}");
}
