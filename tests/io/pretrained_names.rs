//! Pretrained folders as trainers and other programs write them: other names, unused tensors, tied weights, and configs
//! written by Python. Hidden states always agree with transformers.

use std::{collections::BTreeMap, fs, path::PathBuf};

use crate::reference::{Tensors, check, device, difference, files, options};
use x_transformers::{
    DType, Device, Result, Tensor,
    io::{TensorFile, read_safetensors, write_safetensors},
    pretrained::Pretrained,
};

/// A folder of `tests/files` with other tensors in one file.
fn changed(of: &str, label: &str, change: impl FnOnce(&mut Tensors)) -> PathBuf {
    let folder = std::env::temp_dir().join(format!("xt-changed-{of}-{label}-{}", std::process::id()));
    fs::create_dir_all(&folder).unwrap();
    let mut weights = TensorFile::open(files(of)).unwrap().tensors().unwrap();
    change(&mut weights);
    fs::copy(files(of).join("config.json"), folder.join("config.json")).unwrap();
    write_safetensors(folder.join("model.safetensors"), &weights, &BTreeMap::new()).unwrap();
    folder
}

fn rename(weights: &mut Tensors, new: impl Fn(&str) -> String) {
    *weights = std::mem::take(weights).into_iter().map(|(name, tensor)| (new(&name), tensor)).collect();
}

/// The same hidden states as transformers, whatever the names of the tensors are.
fn check_renamed(of: &str, label: &str, new: impl Fn(&str) -> String) -> Result<()> {
    let expected = read_safetensors(files(of).join("expected.safetensors"))?;
    let folder = changed(of, label, |weights| rename(weights, new));
    let unused = check(&format!("{of} {label}"), (folder.clone(), expected))?.unused();
    assert!(unused.is_empty(), "{of} {label}: {unused:?}");
    fs::remove_dir_all(folder).unwrap();
    Ok(())
}

#[test]
fn names_of_wrappers_and_trainers_are_known() -> Result<()> {
    let without = |name: &str, base: &str| name.strip_prefix(base).unwrap_or(name).to_string();
    for of in ["llama", "qwen2"] {
        check_renamed(of, "none", |name| without(name, "model."))?;
        for wrapper in
            ["module.", "_orig_mod.", "module._orig_mod.", "state_dict.model.", "model.", "net.", "policy.actor."]
        {
            check_renamed(of, &wrapper.replace('.', "-"), |name| format!("{wrapper}{name}"))?;
            // The model without a head, and the head next to it.
            check_renamed(of, &wrapper.replace('.', "+"), |name| format!("{wrapper}{}", without(name, "model.")))?;
        }
        let inside = |name: &str| name.replace(".layers.0.", ".layers.0._checkpoint_wrapped_module.");
        check_renamed(of, "inside", inside)?;
        check_renamed(of, "compiled", |name| name.replace(".layers.1.mlp.", ".layers.1._orig_mod.mlp."))?;
    }
    for wrapper in
        ["bert.", "0.auto_model.", "module.bert.", "model.", "encoder.", "state_dict.model.bert.", "query_encoder."]
    {
        check_renamed("bert", &wrapper.replace('.', "-"), |name| format!("{wrapper}{name}"))?;
    }
    let old = |name: &str| match name.contains("LayerNorm") {
        true => name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"),
        false => name.to_string(),
    };
    check_renamed("bert", "gamma", old)?;
    check_renamed("bert", "bert-gamma", |name| format!("bert.{}", old(name)))?;
    check_renamed("bert", "layers", |name| without(name, "encoder."))
}

#[test]
fn one_model_of_several_in_a_file_is_meant_or_refused() -> Result<()> {
    let expected = read_safetensors(files("llama/expected.safetensors"))?;
    let both = |label: &str, first: &str, second: &str| {
        changed("llama", label, |weights| {
            for (name, tensor) in std::mem::take(weights) {
                let other = tensor.affine(2.0, 0.0).unwrap();
                weights.insert(format!("{first}{name}"), tensor);
                weights.insert(format!("{second}{name}"), other);
            }
        })
    };
    for (label, first, second) in [("own", "", "ema."), ("known", "module.", "ema."), ("own-known", "", "module.")] {
        let folder = both(label, first, second);
        let unused = check(label, (folder.clone(), expected.clone()))?.unused();
        assert_eq!(unused.len(), expected_names("llama"), "{label}");
        assert!(unused.iter().all(|name| name.starts_with(second)), "{label}: {unused:?}");
        fs::remove_dir_all(folder).unwrap();
    }
    for (label, first, second) in [("wrappers", "module.", "net."), ("strange", "student.", "teacher.")] {
        let folder = both(label, first, second);
        let refused = Pretrained::open(&folder).unwrap_err().to_string();
        assert!(refused.contains(first) && refused.contains(second), "{refused}");
        fs::remove_dir_all(folder).unwrap();
    }
    Ok(())
}

fn expected_names(of: &str) -> usize {
    TensorFile::open(files(of)).unwrap().names().count()
}

#[test]
fn unused_weights_are_listed_but_buffers_are_not() -> Result<()> {
    let expected = read_safetensors(files("llama/expected.safetensors"))?;
    let ones = |shape: &[usize], dtype: DType| Tensor::ones(shape, dtype, &Device::Cpu).unwrap();
    let folder = changed("llama", "extra", |weights| {
        let extra = [
            ("model.rotary_emb.inv_freq", ones(&[4], DType::F32)),
            ("model.layers.0.self_attn.rotary_emb.inv_freq", ones(&[4], DType::F32)),
            ("model.layers.1.self_attn.bias", ones(&[1, 1, 8, 8], DType::F32)),
            ("model.rng_state", ones(&[9], DType::I64)),
            ("mask", ones(&[3], DType::Bool)),
            ("score.weight", ones(&[2, 16], DType::F32)),
            ("lm_head.bias", ones(&[40], DType::F64)),
        ];
        weights.extend(extra.map(|(name, tensor)| (name.to_string(), tensor)));
        rename(weights, |name| format!("module.{name}"));
    });
    assert_eq!(check("extra", (folder.clone(), expected))?.unused(), ["module.lm_head.bias", "module.score.weight"]);
    fs::remove_dir_all(folder).unwrap();
    // Tensors that modify other weights are an error, and so is a missing weight.
    for (name, part) in [
        ("model.layers.0.mlp.up_proj.weight_scale", "quantised"),
        ("model.layers.0.mlp.up_proj.weight_scale_inv", "quantised"),
        ("model.layers.0.mlp.up_proj.qweight", "quantised"),
        ("model.layers.0.mlp.up_proj.weight.absmax", "quantised"),
        ("base.model.layers.0.mlp.up_proj.lora_A.default.weight", "LoRA"),
    ] {
        let folder = changed("llama", "scaled", |weights| drop(weights.insert(name.into(), ones(&[1], DType::F32))));
        let refused = Pretrained::open(&folder)?.model(DType::F32, &Device::Cpu).unwrap_err().to_string();
        assert!(refused.contains(name) && refused.contains(part), "{refused}");
        fs::remove_dir_all(folder).unwrap();
    }
    let folder = changed("llama", "missing", |weights| drop(weights.remove("model.norm.weight")));
    let refused = Pretrained::open(&folder)?.model(DType::F32, &Device::Cpu).unwrap_err().to_string();
    assert!(refused.contains("missing         model.norm.weight"), "{refused}");
    fs::remove_dir_all(folder).unwrap();
    Ok(())
}

/// If a tied table and a head differ, the head takes precedence; if one is missing, the other is used.
#[test]
fn heads_beside_tied_weights_count() -> Result<()> {
    let expected = read_safetensors(files("qwen2/expected.safetensors"))?;
    let (table, head) = ("model.embed_tokens.weight", "lm_head.weight");
    let tied = |label: &str, change: &dyn Fn(&mut Tensors)| changed("qwen2", label, change);
    for folder in [
        tied("both", &|weights| drop(weights.insert(head.into(), weights[table].clone()))),
        tied("head", &|weights| {
            let moved = weights.remove(table).unwrap();
            weights.insert(head.into(), moved);
        }),
    ] {
        let pretrained = check("tied", (folder.clone(), expected.clone()))?;
        assert!(pretrained.config().tie_embedding && pretrained.unused().is_empty());
        fs::remove_dir_all(folder).unwrap();
    }
    let folder = tied("other", &|weights| drop(weights.insert(head.into(), weights[table].affine(2.0, 0.0).unwrap())));
    let pretrained = Pretrained::open(&folder)?;
    assert!(!pretrained.config().tie_embedding);
    let model = pretrained.model(DType::F32, &device())?;
    let hidden = model.forward(&expected["tokens"].to_device(&device())?, &options(&expected)?)?.out;
    assert!(difference(&hidden, &expected["hidden"], None)? < 1e-4);
    let n = expected["logits"].dim(1)?;
    let logits = model.logits(&hidden.narrow(1, hidden.dim(1)? - n, n)?)?;
    assert!(difference(&logits, &expected["logits"].affine(2.0, 0.0)?, None)? < 1e-3);
    fs::remove_dir_all(folder).unwrap();
    Ok(())
}

#[test]
fn weights_that_overflow_are_named() -> Result<()> {
    let name = "model.layers.0.mlp.up_proj.weight";
    let folder = changed("llama", "large", |weights| {
        let large = weights[name].affine(0.0, 70000.0).unwrap();
        weights.insert(name.into(), large);
    });
    let pretrained = Pretrained::open(&folder)?;
    let refused = pretrained.model(DType::F16, &Device::Cpu).unwrap_err().to_string();
    for part in ["gate_proj", "up_proj", "70000", "f16", "bf16"] {
        assert!(refused.contains(part), "{part}: {refused}");
    }
    assert!(pretrained.model(DType::BF16, &Device::Cpu).is_ok());
    fs::remove_dir_all(folder).unwrap();
    Ok(())
}

#[test]
fn configs_are_read_as_python_writes_them() -> Result<()> {
    let folder = changed("llama", "config", |_| {});
    let config = fs::read_to_string(folder.join("config.json")).unwrap();
    let with =
        |more: &str| fs::write(folder.join("config.json"), config.replacen('{', &format!("{{{more}, "), 1)).unwrap();
    let expected = read_safetensors(files("llama/expected.safetensors"))?;
    for more in [
        r#""a": Infinity"#,
        r#""a": [-Infinity, NaN], "text": "NaN \" Infinity \\", "b": {"c": NaN}"#,
        r#""Infinity": -Infinity"#,
    ] {
        with(more);
        check(more, (folder.clone(), expected.clone()))?;
        assert!(Pretrained::is_one(&folder));
    }
    with(r#""rms_norm_eps": Infinity"#);
    let text = config.replace("0.001", "Infinity");
    fs::write(folder.join("config.json"), text).unwrap();
    let refused = Pretrained::open(&folder).unwrap_err().to_string();
    assert!(refused.contains("rms_norm_eps") && refused.contains("Infinity"), "{refused}");
    for (text, part) in [
        (config.replace("model_type", "kind"), "no `model_type`"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n".to_string(), "Git LFS"),
        ("<!DOCTYPE html><p>".to_string(), "HTML"),
        ("{".to_string(), "not JSON"),
    ] {
        fs::write(folder.join("config.json"), text).unwrap();
        let refused = Pretrained::open(&folder).unwrap_err().to_string();
        assert!(refused.contains(part), "{part}: {refused}");
    }
    fs::remove_dir_all(folder).unwrap();
    Ok(())
}
