//! Models of 0.22 with the options and names of version 2: the same numbers.

use serde_json::json;
use x_transformers::{
    DType, Device, ParamStore, Result, Tensor,
    config::{Call, Config, v2::Conversion},
    models::{Model, RunOptions},
};

#[test]
fn converted_models_have_the_same_outputs() -> Result<()> {
    let layers = json!({"kind": "Encoder", "dim": 16, "depth": 2, "heads": 4, "attn_dim_head": 4, "attn_out_bias": false,
        "use_rmsnorm": true, "final_norm": "same", "ff_glu": true});
    let x = Tensor::generate([2, 7, 16], DType::F64, &Device::Cpu, |i| (i * 37 % 101) as f64 / 50.0 - 1.0)?;
    let inputs = [("x".to_string(), x)].into();
    for config in [
        json!({"model": "ContinuousTransformerWrapper", "max_seq_len": 8, "attn_layers": layers}),
        json!({"model": "ContinuousTransformerWrapper", "max_seq_len": 8, "use_pos_emb": false, "attn_layers": layers}),
    ] {
        let config = Config::from_value(config)?;
        let (old, store) = (ParamStore::new(5, DType::F64, &Device::Cpu), ParamStore::zeros(DType::F64, &Device::Cpu));
        let old = Model::new(&config, &old)?;
        let conversion = Conversion::new(&config)?;
        let new = Model::new(conversion.config(), &store)?;
        let mut weights = std::collections::BTreeMap::new();
        for (name, tensor) in old.params().state_dict() {
            weights.insert(conversion.name(&name), conversion.tensor(&name, &tensor)?);
        }
        new.params().load(&weights)?;
        let run = |model: &Model| model.run(&inputs, &Call::default(), &RunOptions::default())?["out"].to_f64_vec();
        let (before, after) = (run(&old)?, run(&new)?);
        let off = before.iter().zip(&after).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(off < 1e-12 && before.iter().any(|x| x.abs() > 0.1), "{config:?}: off by {off}");
    }
    Ok(())
}

/// An encoder and a decoder whose logits have no bias: the same loss. With one, the error names it.
#[test]
fn an_encoder_and_a_decoder_are_converted() -> Result<()> {
    let mut config = json!({"model": "XTransformer", "dim": 16, "tie_token_emb": true, "dec_logits_bias": false});
    for (side, grouped) in [("enc", 4), ("dec", 2)] {
        for (name, value) in [
            ("num_tokens", json!(11)),
            ("max_seq_len", json!(12)),
            ("depth", json!(2)),
            ("heads", json!(4)),
            ("attn_dim_head", json!(8)),
            ("attn_kv_heads", json!(grouped)),
            ("attn_out_bias", json!(false)),
            ("use_rmsnorm", json!(true)),
            ("final_norm", json!("same")),
            ("rotary_pos_emb", json!(side == "dec")),
            ("rotary_qk_only", json!(side == "dec")),
            ("rotary_emb_dim", if side == "dec" { json!(4) } else { json!(null) }),
        ] {
            config[format!("{side}_{name}")] = value;
        }
    }
    config.as_object_mut().unwrap().retain(|_, value| !value.is_null());
    let mut biased = config.clone();
    biased.as_object_mut().unwrap().remove("dec_logits_bias");
    biased["enc_use_rmsnorm"] = json!(false);
    let error = Conversion::new(&Config::from_value(biased)?).unwrap_err().to_string();
    assert!(error.contains("`dec_logits_bias`") && error.contains("`enc_use_rmsnorm`"), "{error}");

    let config = Config::from_value(config)?;
    assert_eq!(Config::from_json(&config.to_json())?, config);
    let (old, store) = (ParamStore::new(5, DType::F64, &Device::Cpu), ParamStore::zeros(DType::F64, &Device::Cpu));
    let old = Model::new(&config, &old)?;
    let conversion = Conversion::new(&config)?;
    let new = Model::new(conversion.config(), &store)?;
    let kept = old.params().state_dict().into_iter().filter(|(name, _)| conversion.keeps(name));
    let weights = kept.map(|(name, tensor)| Ok((conversion.name(&name), conversion.tensor(&name, &tensor)?)));
    new.params().load(&weights.collect::<Result<std::collections::BTreeMap<_, _>>>()?)?;
    let tokens = |step: i64| Tensor::from_vec((0..14).map(|i| (i * step + 1) % 11).collect(), [2, 7], &Device::Cpu);
    let inputs = [("src".to_string(), tokens(3)?), ("tgt".to_string(), tokens(5)?)].into();
    let run = |model: &Model| model.run(&inputs, &Call::default(), &RunOptions::default())?["loss"].item();
    let (before, after) = (run(&old)?, run(&new)?);
    assert!((before - after).abs() < 1e-12 && before > 0.1, "{before}, {after}");
    Ok(())
}
