//! Low-rank adapters of pretrained models against PEFT, see `tests/files/peft/make.py`.

use std::{collections::BTreeMap, fs, path::PathBuf};

use crate::reference::{device, difference, files};
use x_transformers::{
    DType, Device, Result, Tape, Tensor,
    io::{TensorFile, read_safetensors},
    models::{AutoregressiveWrapper, ForwardOptions, LoraAdapter, LoraOptions},
    pretrained::Pretrained,
    train::{AdamW, AdamWOptions, Optimizer},
};

const ADAPTERS: [&str; 4] = ["plain", "all", "half", "dora"];

type Tensors = BTreeMap<String, Tensor>;

fn expected() -> Tensors {
    read_safetensors(files("peft").join("expected.safetensors")).unwrap()
}

/// The tensors whose names begin so, without that beginning.
fn below(all: &Tensors, start: &str) -> Tensors {
    let named = all.iter().filter_map(|(name, tensor)| Some((name.strip_prefix(start)?.to_string(), tensor.clone())));
    named.collect()
}

fn on_device(tensor: &Tensor) -> Tensor {
    tensor.to_device(&device()).unwrap()
}

fn logits(model: &AutoregressiveWrapper, tokens: &Tensor) -> Result<Tensor> {
    Ok(model.net.forward(tokens, &ForwardOptions::default())?.out)
}

fn close(actual: &Tensor, expected: &Tensor, most: f64, what: &str) {
    let off = difference(&actual.to_device(&Device::Cpu).unwrap(), expected, None).unwrap();
    assert!(off < most, "{what}: off by {off:.1e}");
}

fn opened(name: &str) -> Result<(AutoregressiveWrapper, LoraAdapter)> {
    Pretrained::open(files("llama"))?.with_adapter(files("peft").join(name), DType::F32, &device())
}

/// Logits, loss and gradients of adapters that PEFT wrote, and the logits of the merged model.
#[test]
fn adapters_of_peft_compute_the_same() -> Result<()> {
    let expected = expected();
    for name in ADAPTERS {
        let (mut model, adapter) = opened(name)?;
        let tokens = on_device(&expected[&format!("{name}.tokens")]);
        close(&logits(&model, &tokens)?, &expected[&format!("{name}.logits")], 1e-4, name);
        let mut tape = Tape::train(0);
        let loss = model.loss(&tokens, &ForwardOptions::default())?;
        let grads = tape.backward(&loss)?;
        drop(tape);
        let gradients = below(&expected, &format!("{name}.grad."));
        assert_eq!(gradients.len(), adapter.params().iter().count());
        for (place, gradient) in &gradients {
            let own = adapter.params().get(place).unwrap_or_else(|| panic!("{name} has no {place}"));
            close(grads.get(&own.tensor()).expect("a gradient"), gradient, 1e-4, &format!("{name} {place}"));
        }
        assert_eq!(grads.len(), gradients.len(), "{name}: frozen weights have gradients");
        model.net.merge_lora()?;
        close(&logits(&model, &tokens)?, &expected[&format!("{name}.merged")], 1e-4, &format!("{name} merged"));
    }
    Ok(())
}

/// From PEFT's initial values three steps of AdamW have its losses.
#[test]
fn adapters_train_as_with_peft() -> Result<()> {
    let expected = expected();
    for name in ADAPTERS {
        let (model, adapter) = opened(name)?;
        let initial = below(&expected, &format!("{name}.initial."));
        let initial: Tensors = initial.into_iter().map(|(name, tensor)| (name, on_device(&tensor))).collect();
        adapter.params().load(&initial)?;
        let tokens = on_device(&expected[&format!("{name}.tokens")]);
        let mut optimizer = AdamW::new(AdamWOptions::default())?;
        for (step, loss) in expected[&format!("{name}.losses")].to_f64_vec()?.into_iter().enumerate() {
            let mut tape = Tape::train(0);
            let own = model.loss(&tokens, &ForwardOptions::default())?;
            assert!((own.item()? - loss).abs() < 2e-4, "{name}, step {step}: {} instead of {loss}", own.item()?);
            let grads = tape.backward(&own)?;
            optimizer.step(adapter.params(), &grads, 0.05, None)?;
        }
    }
    Ok(())
}

struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let folder = std::env::temp_dir().join(format!("xt-peft-{name}-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        Self(folder)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Written adapters have the same tensors, and compute the same when they are read.
#[test]
fn adapters_are_saved_in_the_layout_of_peft() -> Result<()> {
    let folder = Folder::new("saved");
    let expected = expected();
    let pretrained = Pretrained::open(files("llama"))?;
    for name in ADAPTERS {
        let (_, adapter) = opened(name)?;
        pretrained.save_adapter(&adapter, &folder.0)?;
        let file = |folder: &PathBuf| TensorFile::open(folder.join("adapter_model.safetensors"))?.tensors();
        let (written, before) = (file(&folder.0)?, file(&files("peft").join(name))?);
        assert!(written.keys().eq(before.keys()), "{name}");
        for (key, tensor) in &written {
            assert_eq!(tensor.to_f64_vec()?, before[key].to_f64_vec()?, "{name} {key}");
        }
        let (model, again) = pretrained.with_adapter(&folder.0, DType::F32, &device())?;
        assert_eq!((again.options().scale(), again.options().use_dora), (adapter.options().scale(), name == "dora"));
        let tokens = on_device(&expected[&format!("{name}.tokens")]);
        close(&logits(&model, &tokens)?, &expected[&format!("{name}.logits")], 1e-4, name);
    }
    Ok(())
}

/// A new adapter changes nothing, and trains on packed weights, which have no gradients.
#[test]
fn packed_weights_take_adapters() -> Result<()> {
    let pretrained = Pretrained::open(files("llama.gguf"))?;
    let plain = pretrained.autoregressive(DType::F32, &device())?;
    let tokens = Tensor::arange(24, &device())?.reshape([2, 12])?;
    for use_dora in [false, true] {
        let options = LoraOptions { r: 4, use_dora, lora_dropout: 0.1, ..LoraOptions::default() };
        let (mut model, adapter) = pretrained.with_lora(&options, 1, DType::F32, &device())?;
        assert!(adapter.places().iter().any(|place| place == "model.layers.0.mlp.gate_proj"), "{:?}", adapter.places());
        close(&logits(&model, &tokens)?, &logits(&plain, &tokens)?.to_device(&Device::Cpu)?, 1e-4, "no update");
        let mut optimizer = AdamW::new(AdamWOptions::default())?;
        let mut losses = Vec::new();
        for step in 0..8 {
            let mut tape = Tape::train(step);
            let loss = model.loss(&tokens, &ForwardOptions::default())?;
            let grads = tape.backward(&loss)?;
            assert_eq!(grads.len(), adapter.params().iter().count());
            optimizer.step(adapter.params(), &grads, 0.02, None)?;
            losses.push(loss.item()?);
        }
        assert!(losses[7] < losses[0] - 0.1, "{losses:?}");
        assert!(model.net.merge_lora().unwrap_err().to_string().contains("quantised"));
    }
    // Dequantised weights are merged.
    let pretrained = Pretrained::open(files("llama.gguf"))?.dequantized();
    let (mut model, adapter) = pretrained.with_lora(&LoraOptions::default(), 1, DType::F32, &device())?;
    for (name, param) in adapter.params().iter().filter(|(name, _)| name.contains("lora_B")) {
        param.set(param.tensor().detach().affine(0.0, 0.01)?)?;
        assert!(name.starts_with("base_model.model.model.layers."), "{name}");
    }
    let before = logits(&model, &tokens)?;
    model.net.merge_lora()?;
    close(&logits(&model, &tokens)?, &before.to_device(&Device::Cpu)?, 1e-3, "merged");
    assert!((before.sub(&logits(&plain, &tokens)?)?.square()?.mean(&[])?.item()?) > 1e-6);
    Ok(())
}

/// Adapters for other models and of other kinds are refused by name.
#[test]
fn unsupported_adapters_are_refused() -> Result<()> {
    let folder = Folder::new("refused");
    let pretrained = Pretrained::open(files("llama"))?;
    let source = files("peft").join("plain");
    fs::copy(source.join("adapter_model.safetensors"), folder.0.join("adapter_model.safetensors")).unwrap();
    let config = fs::read_to_string(source.join("adapter_config.json")).unwrap();
    let refused = |config: &str| {
        fs::write(folder.0.join("adapter_config.json"), config).unwrap();
        pretrained.with_adapter(&folder.0, DType::F32, &device()).map(drop).unwrap_err().to_string()
    };
    for (from, to, message) in [
        ("\"peft_type\": \"LORA\"", "\"peft_type\": \"IA3\"", "`peft_type` is \"IA3\""),
        ("\"bias\": \"none\"", "\"bias\": \"all\"", "`bias` is \"all\""),
        ("\"fan_in_fan_out\": false", "\"fan_in_fan_out\": true", "`fan_in_fan_out`"),
        ("\"rank_pattern\": {}", "\"rank_pattern\": {\"q_proj\": 2}", "`rank_pattern`"),
        ("\"r\": 4", "\"r\": 5", "adapter_model.safetensors"),
        ("\"r\": 4", "\"r\": \"four\"", "`r` is \"four\""),
        ("\"use_rslora\": false", "\"use_rslora\": \"yes\"", "`use_rslora` is \"yes\", expected true or false"),
        ("\"loftq_config\": {}", "\"loftq_config\": {\"loftq_bits\": 4}", "`loftq_config`"),
    ] {
        assert!(config.contains(from), "{config}");
        let error = refused(&config.replace(from, to));
        assert!(error.contains(message), "{error}");
    }
    fs::write(folder.0.join("adapter_config.json"), &config).unwrap();
    let other = Pretrained::open(files("qwen2"))?;
    let options = LoraOptions { target_modules: vec!["c_attn".into()], ..LoraOptions::default() };
    let error = other.with_lora(&options, 0, DType::F32, &device()).map(drop).unwrap_err().to_string();
    assert!(error.contains("`c_attn`"), "{error}");
    for options in [
        LoraOptions { r: 0, ..LoraOptions::default() },
        LoraOptions { lora_alpha: f64::NAN, ..LoraOptions::default() },
        LoraOptions { lora_dropout: 1.0, ..LoraOptions::default() },
        LoraOptions { target_modules: Vec::new(), ..LoraOptions::default() },
    ] {
        assert!(pretrained.with_lora(&options, 0, DType::F32, &device()).is_err(), "{options:?}");
    }
    Ok(())
}
