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
