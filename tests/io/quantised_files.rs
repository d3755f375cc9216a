//! GGUF files made from folders of transformers and from models of this crate: the same logits as before.

use std::{
    collections::BTreeMap,
    fs,
    path::PathBuf,
    sync::atomic::{AtomicUsize, Ordering},
};

use crate::reference::{difference, files};
use x_transformers::{
    DType, Device, ParamStore, QuantType, Result, Tensor,
    config::{AttentionConfig, AttentionLayersConfig, FeedForwardConfig, FinalNorm, TransformerWrapperConfig},
    io::{Metadata, TensorFile},
    models::{ForwardOptions, TransformerWrapper},
    ops::Activation,
    pretrained::{Pretrained, write_quantized},
};

struct Folder(PathBuf);

impl Folder {
    fn new() -> Self {
        static MADE: AtomicUsize = AtomicUsize::new(0);
        let number = MADE.fetch_add(1, Ordering::Relaxed);
        let folder = std::env::temp_dir().join(format!("xt-quantised-{}-{number}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        Self(folder)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn tokens() -> Result<Tensor> {
    Tensor::from_slice(&[3i64, 17, 5, 30, 8, 1, 39, 12, 2, 25], [1, 10], &Device::Cpu)
}

fn logits(model: &TransformerWrapper) -> Result<Tensor> {
    Ok(model.forward(&tokens()?, &ForwardOptions::default())?.out)
}

/// The largest difference beside the largest value.
fn relative(actual: &Tensor, expected: &Tensor) -> Result<f64> {
    let largest = expected.to_f64_vec()?.into_iter().fold(0.0, |most: f64, value| most.max(value.abs()));
    Ok(difference(actual, expected, None)? / largest)
}

/// Biases, key heads, rotations with factors, ties and the order of features arrive where they belong: logits differ by
/// the rounding to Q8_0 and, of rows of 16 values, to F16.
#[test]
fn folders_become_gguf_files_with_the_same_logits() -> Result<()> {
    let folder = Folder::new();
    for name in ["llama", "llama3", "qwen2"] {
        let pretrained = Pretrained::open(files(name))?;
        let path = folder.0.join(format!("{name}.gguf"));
        let more = BTreeMap::from([("tokenizer.ggml.model".to_string(), Metadata::Text("none".to_string()))]);
        pretrained.write_quantized(&path, QuantType::Q8_0, &more)?;
        let written = Pretrained::open(&path)?;
        assert_eq!(written.family(), pretrained.family());
        assert_eq!(written.file().metadata()["tokenizer.ggml.model"], Metadata::Text("none".to_string()));
        let mut emptied = Pretrained::open(&path)?;
        assert!(emptied.take_metadata().contains_key("general.architecture"));
        let error = emptied.write_quantized(folder.0.join("none.gguf"), QuantType::Q8_0, &more).unwrap_err();
        assert!(error.to_string().contains("take_metadata"), "{error}");
        let [before, after] = [&pretrained, &written].map(|model| logits(&model.model(DType::F32, &Device::Cpu)?));
        let off = relative(&after?, &before?)?;
        assert!(off < 0.01, "{name}: {off}");
    }
    Ok(())
}

/// Options that GGUF has no name for are refused, and nothing is written.
#[test]
fn windows_and_other_architectures_are_not_written() -> Result<()> {
    let folder = Folder::new();
    let path = folder.0.join("none.gguf");
    let mistral = Pretrained::open(files("mistral"))?;
    let error = mistral.write_quantized(&path, QuantType::Q8_0, &BTreeMap::new()).unwrap_err().to_string();
    assert!(error.contains("max_attend_past") && error.contains("mistral"), "{error}");
    let error = mistral.write_quantized(&path, QuantType::Q2K, &BTreeMap::new()).unwrap_err().to_string();
    assert!(error.contains("max_attend_past") || error.contains("Q2_K"), "{error}");
    let zeros = |_: &str| Tensor::zeros([1], DType::F32, &Device::Cpu);
    for (config, expected) in [
        (TransformerWrapperConfig { logits_bias: true, ..llama(1) }, "`logits_bias`"),
        (TransformerWrapperConfig { max_seq_len: 0, ..llama(1) }, "GGUF needs a context length"),
        (
            TransformerWrapperConfig { num_memory_tokens: 2, ..llama(1) },
            "`num_memory_tokens` is `2`, expected the default",
        ),
        (
            TransformerWrapperConfig {
                attn_layers: AttentionLayersConfig { sandwich_norm: true, ..llama(1).attn_layers },
                ..llama(1)
            },
            "`sandwich_norm` is `true`",
        ),
    ] {
        let error = write_quantized(&path, &config, QuantType::Q8_0, &BTreeMap::new(), zeros).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    let error = write_quantized(&path, &llama(1), QuantType::Q8_0, &BTreeMap::new(), zeros).unwrap_err().to_string();
    assert!(error.contains("token_emb.weight") && error.contains("expected"), "{error}");
    assert!(!path.exists());
    Ok(())
}

/// Options of a model that has the architecture of Llama.
fn llama(depth: usize) -> TransformerWrapperConfig {
    let attn_layers = AttentionLayersConfig {
        heads: 4,
        use_rmsnorm: true,
        norm_eps: Some(1e-5),
        final_norm: FinalNorm::Same,
        rotary_pos_emb: true,
        rotary_emb_dim: Some(16),
        rotary_qk_only: true,
        attn: AttentionConfig { dim_head: 16, kv_heads: Some(2), out_bias: false, ..AttentionConfig::default() },
        ff: FeedForwardConfig {
            mult: 2.0,
            glu: true,
            activation: Activation::Silu,
            no_bias: true,
            ..FeedForwardConfig::default()
        },
        ..AttentionLayersConfig::decoder(64, depth)
    };
    TransformerWrapperConfig { logits_bias: false, ..TransformerWrapperConfig::new(40, 32, attn_layers) }
}

/// Every parameter of a trained model is in the file, each matrix with the error of its rounding.
#[test]
fn models_of_this_crate_become_gguf_files() -> Result<()> {
    let folder = Folder::new();
    for (kind, most) in [(QuantType::Q8_0, 0.02), (QuantType::Q4_0, 0.3)] {
        let path = folder.0.join(format!("{kind}.gguf"));
        let store = ParamStore::new(7, DType::F32, &Device::Cpu);
        let config = llama(2);
        let model = TransformerWrapper::new(&config, &store)?;
        let params = store.params();
        let parameter = |name: &str| Ok(params.get(name).expect("a parameter").tensor().detach());
        write_quantized(&path, &config, kind, &BTreeMap::new(), parameter)?;
        let written = Pretrained::open(&path)?.dequantized();
        let read = written.model(DType::F32, &Device::Cpu)?;
        let (before, after) = (logits(&model)?, logits(&read)?);
        let off = relative(&after, &before)?;
        assert!(off > 0.0 && off < most, "{kind}: {off}");
        let types = TensorFile::open(&path)?;
        assert_eq!(types.info("blk.1.ffn_down.weight").unwrap().stored.to_string(), kind.to_string());
    }
    Ok(())
}
