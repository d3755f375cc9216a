//! Folders in the layout of `transformers`, made from models.

use std::{collections::BTreeMap, path::Path};

use serde_json::{Value, json};

use super::{
    Family, llama,
    llama::{Scaling, Sizes},
    llama_gguf,
    names::Source,
};
use crate::{
    Error, Result, Tensor,
    atomic_file::write_atomically,
    config::TransformerWrapperConfig,
    error::{ErrorContext, ensure},
    io::{create_folders, write_safetensors},
    ordered::ordered,
};

/// Writes a model of this crate as a folder of `transformers`: `config.json`, `model.safetensors` and, with end tokens,
/// `generation_config.json`. The tokenizer's files are for the caller to write.
///
/// The model must have the architecture of Llama, Mistral or Qwen 2, as models do that were tuned from a
/// [`Pretrained`](super::Pretrained) one. `parameter` returns a parameter by its name in a
/// [`TransformerWrapper`](crate::models::TransformerWrapper). Returns the family.
///
/// ```
/// use x_transformers::{pretrained::{self, Family, Pretrained}, prelude::*};
/// # fn main() -> x_transformers::Result<()> {
/// let mut layers = AttentionLayersConfig::decoder(32, 2);
/// layers.use_rmsnorm = true;
/// layers.final_norm = x_transformers::config::FinalNorm::Same;
/// layers.rotary_pos_emb = true;
/// layers.rotary_qk_only = true;
/// layers.rotary_emb_dim = Some(64);
/// layers.attn.out_bias = false;
/// layers.ff.glu = true;
/// layers.ff.activation = x_transformers::ops::Activation::Silu;
/// layers.ff.no_bias = true;
/// layers.norm_eps = Some(1e-5);
/// let config = TransformerWrapperConfig { logits_bias: false, ..TransformerWrapperConfig::new(256, 64, layers) };
/// let store = ParamStore::new(0, DType::F32, &Device::Cpu);
/// TransformerWrapper::new(&config, &store)?;
/// # let folder = std::env::temp_dir().join(format!("xt-export-{}", std::process::id()));
/// let params = store.params();
/// let parameter = |name: &str| Ok(params.get(name).expect("a parameter").tensor());
/// assert_eq!(pretrained::write_folder(&folder, &config, &[0], parameter)?, Family::Llama);
/// assert_eq!(Pretrained::open(&folder)?.end_tokens(), [0]);
/// # std::fs::remove_dir_all(&folder).ok();
/// # Ok(())
/// # }
/// ```
///
/// Errors: another architecture, with the option that differs; [`ErrorKind::Io`](crate::ErrorKind::Io).
pub fn write_folder(
    folder: impl AsRef<Path>,
    config: &TransformerWrapperConfig,
    end_tokens: &[i64],
    parameter: impl Fn(&str) -> Result<Tensor>,
) -> Result<Family> {
    let folder = folder.as_ref();
    let sizes = llama_gguf::sizes(config)?;
    let (family, mut options) = options(&sizes)?;
    let mut weights = BTreeMap::new();
    for weight in llama::names(&sizes, llama::TABLE).weights {
        let value = parameter(&weight.ours).context(&weight.ours)?;
        match weight.theirs {
            Source::One(name) | Source::Halves(name, _) => drop(weights.insert(name, value)),
            Source::Stacked([first, second]) => {
                let rows = value.dim(0)? / 2;
                // Tensors that share memory are not written.
                weights.insert(first, value.narrow(0, 0, rows)?.contiguous()?);
                weights.insert(second, value.narrow(0, rows, rows)?.contiguous()?);
            }
        }
    }
    let dtype = weights.values().next().map_or("float32", |tensor| match tensor.dtype() {
        crate::DType::BF16 => "bfloat16",
        crate::DType::F16 => "float16",
        crate::DType::F64 => "float64",
        _ => "float32",
    });
    options["torch_dtype"] = json!(dtype);
    create_folders(folder)?;
    let write = |name: &str, value: &Value| {
        let text = format!("{value:#}\n");
        write_atomically(folder.join(name), |file| file.write_all(text.as_bytes()))
    };
    if !end_tokens.is_empty() {
        let ends = if let [end] = end_tokens { json!(end) } else { json!(end_tokens) };
        options["eos_token_id"] = ends.clone();
        write("generation_config.json", &json!({"eos_token_id": ends}))?;
    }
    write_safetensors(
        folder.join("model.safetensors"),
        &weights,
        &ordered([("format".to_string(), "pt".to_string())]),
    )?;
    // Last: a folder without it is not a model.
    write("config.json", &options)?;
    Ok(family)
}

/// Returns the family that has a model of these sizes, and its `config.json`.
fn options(sizes: &Sizes) -> Result<(Family, Value)> {
    ensure!(
        sizes.positions > 0,
        Error::option("max_seq_len", "is 0, no limit, which models of transformers cannot have")
    );
    ensure!(
        sizes.rotation.factors.is_none(),
        Error::option("rotary_freq_factors", "cannot be described in the layout of transformers")
    );
    let [queries, output, inner] = sizes.biases;
    let window = sizes.max_attend_past.map(|past| past + 1);
    let (family, name, class) = match (queries, output, window) {
        (true, false, _) => (Family::Qwen2, "qwen2", "Qwen2ForCausalLM"),
        (false, false, Some(_)) => (Family::Mistral, "mistral", "MistralForCausalLM"),
        (_, _, None) if queries == output => (Family::Llama, "llama", "LlamaForCausalLM"),
        (false, true, _) => {
            let why = "is true without `attn_qkv_bias`, which models of transformers cannot have";
            return Err(Error::option("attn_out_bias", why));
        }
        _ => {
            let why = "cannot be used with biases of the attention's output in models of transformers";
            return Err(Error::option("attn_max_attend_past", why));
        }
    };
    let mut value = json!({
        "architectures": [class],
        "model_type": name,
        "vocab_size": sizes.tokens,
        "hidden_size": sizes.dim,
        "intermediate_size": sizes.inner,
        "num_hidden_layers": sizes.depth,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "head_dim": sizes.dim_head,
        "hidden_act": "silu",
        "max_position_embeddings": sizes.positions,
        "rms_norm_eps": sizes.eps,
        "rope_theta": sizes.rotation.base,
        "rope_scaling": scaling(&sizes.rotation.scaling),
        "tie_word_embeddings": sizes.tied,
        "attention_dropout": 0.0,
        "use_cache": true,
    });
    match family {
        Family::Llama => {
            value["attention_bias"] = json!(queries);
            value["mlp_bias"] = json!(inner);
        }
        _ => {
            ensure!(
                !inner,
                Error::option("ff_no_bias", format_args!("is false, which models of {family} cannot have"))
            );
            value["sliding_window"] = json!(window);
            if family == Family::Qwen2 {
                value["use_sliding_window"] = json!(window.is_some());
                value["max_window_layers"] = json!(if window.is_some() { 0 } else { sizes.depth });
            }
        }
    }
    Ok((family, value))
}

fn scaling(scaling: &Scaling) -> Value {
    match scaling {
        Scaling::None => Value::Null,
        Scaling::Linear(factor) => json!({"rope_type": "linear", "factor": factor}),
        Scaling::Llama3(scaling) => json!({
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
        }),
        Scaling::Yarn(scaling) => json!({
            "rope_type": "yarn",
            "factor": scaling.factor,
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
            "attention_factor": scaling.attention_factor,
            "beta_fast": scaling.beta_fast,
            "beta_slow": scaling.beta_slow,
            "truncate": scaling.truncate,
        }),
    }
}
