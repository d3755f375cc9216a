//! Low-rank adapters of pretrained models, in PEFT's layout: `adapter_config.json` and `adapter_model.safetensors`.

use std::{collections::BTreeMap, path::Path};

use serde_json::{Map, Value, json};

use super::{Names, Pretrained, llama, llama_gguf, names::Source, options};
use crate::{
    DType, Device, Error, ParamMap, Result, Tensor,
    atomic_file::write_atomically,
    error::{ErrorContext, ensure},
    io::{Format, TensorFile, create_folders, write_safetensors},
    models::{AutoregressiveWrapper, LoraAdapter, LoraOptions, LoraTarget},
    ordered::{ordered, try_ordered},
};

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";
/// Prefix of the names of modules in PEFT.
const BASE: &str = "base_model.model.";

/// Options that PEFT writes and that change nothing at these values; `null`, `false`, `[]` and `{}` never do.
const NEUTRAL: [(&str, &str); 6] = [
    ("peft_type", "\"LORA\""),
    ("bias", "\"none\""),
    ("init_lora_weights", "true"),
    ("init_lora_weights", "\"gaussian\""),
    ("megatron_core", "\"megatron.core\""),
    ("qalora_group_size", "16"),
];
/// Options that say nothing about what is computed.
const DESCRIPTIVE: [&str; 8] = [
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "eva_config",
    "peft_version",
    "revision",
    "runtime_config",
    "task_type",
];

impl Pretrained {
    /// Creates the model with a new low-rank adapter: its parameters are trained, those of the model are frozen. The
    /// names of layers in [`LoraOptions::target_modules`] are those of `transformers`, also for a GGUF file, whose weights
    /// may stay packed.
    ///
    /// ```no_run
    /// use x_transformers::{DType, Device, models::LoraOptions, pretrained::Pretrained};
    /// # fn main() -> x_transformers::Result<()> {
    /// let pretrained = Pretrained::open("SmolLM2-135M-Instruct.Q4_1.gguf")?;
    /// let options = LoraOptions { r: 16, target_modules: vec!["q_proj".into(), "v_proj".into()], ..Default::default() };
    /// let (model, adapter) = pretrained.with_lora(&options, 0, DType::F32, &Device::Cpu)?;
    /// // Train `adapter.params()` on `model.loss(..)`, then:
    /// pretrained.save_adapter(&adapter, "adapter")?;
    /// # let _ = model;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// Errors: those of [`Pretrained::autoregressive`] and [`TransformerWrapper::add_lora`](crate::models::TransformerWrapper::add_lora).
    #[doc(alias = "get_peft_model")]
    pub fn with_lora(
        &self,
        options: &LoraOptions,
        seed: u64,
        dtype: DType,
        device: &Device,
    ) -> Result<(AutoregressiveWrapper, LoraAdapter)> {
        let (model, _, adapter) = self.with_lora_and_params(options, seed, dtype, device)?;
        Ok((model, adapter))
    }

    /// Like [`Pretrained::with_lora`], and returns the model's parameters, those among them too that packed weights replace.
    pub(crate) fn with_lora_and_params(
        &self,
        options: &LoraOptions,
        seed: u64,
        dtype: DType,
        device: &Device,
    ) -> Result<(AutoregressiveWrapper, ParamMap, LoraAdapter)> {
        let (mut model, params) = self.load_autoregressive(dtype, device)?;
        let adapter = model.net.attach_lora(&self.lora_targets(&params, "net.")?, options, seed)?;
        params.unique().for_each(|(_, param)| param.set_requires_grad(false));
        Ok((model, params, adapter))
    }

    /// Creates the model with an adapter that PEFT or [`Pretrained::save_adapter`] wrote.
    ///
    /// Errors: those of [`Pretrained::autoregressive`]; options of the adapter that are not supported, by name; weights of
    /// an adapter for another model.
    pub fn with_adapter(
        &self,
        folder: impl AsRef<Path>,
        dtype: DType,
        device: &Device,
    ) -> Result<(AutoregressiveWrapper, LoraAdapter)> {
        let folder = folder.as_ref();
        let (options, weights) = read(folder)?;
        let (model, adapter) = self.with_lora(&options, 0, dtype, device).context(folder.display())?;
        let wide = weights.into_iter().map(|(name, tensor)| Ok((name, tensor.to_dtype(dtype)?.to_device(device)?)));
        adapter.params().load(&try_ordered(wide)?).context(folder.join(WEIGHTS).display())?;
        Ok((model, adapter))
    }

    /// Writes an adapter in PEFT's layout: the folder is loaded by `PeftModel.from_pretrained`.
    ///
    /// Errors: [`ErrorKind::Io`](crate::ErrorKind::Io).
    pub fn save_adapter(&self, adapter: &LoraAdapter, folder: impl AsRef<Path>) -> Result<()> {
        let folder = folder.as_ref();
        create_folders(folder)?;
        let LoraOptions { r, lora_alpha, lora_dropout, use_rslora, use_dora, .. } = *adapter.options();
        let base = self.folder().unwrap_or(self.file().path()).display().to_string();
        let config = json!({
            "peft_type": "LORA", "task_type": if self.family.is_causal() { "CAUSAL_LM" } else { "FEATURE_EXTRACTION" },
            "base_model_name_or_path": base, "r": r, "lora_alpha": lora_alpha, "lora_dropout": lora_dropout,
            "use_rslora": use_rslora, "use_dora": use_dora, "bias": "none", "fan_in_fan_out": false,
            "inference_mode": true, "target_modules": adapter.places(),
        });
        let weights = ordered(adapter.params().iter().map(|(name, param)| (name.to_string(), param.tensor().detach())));
        write_safetensors(folder.join(WEIGHTS), &weights, &ordered([("format".to_string(), "pt".to_string())]))?;
        let text = format!("{config:#}\n");
        write_atomically(folder.join(CONFIG), |file| file.write_all(text.as_bytes()))
    }

    /// Linear layers by their names in `transformers`; the names of the parameters begin with `place`.
    fn lora_targets(&self, params: &ParamMap, place: &str) -> Result<Vec<LoraTarget>> {
        let names = self.names_of_transformers()?;
        let mut targets = Vec::new();
        for weight in &names.weights {
            let Some(param) = params.get(&format!("{place}{}", weight.ours)) else { continue };
            let rows = param.tensor().shape().first().copied().unwrap_or(0);
            let sources = match &weight.theirs {
                Source::One(name) | Source::Halves(name, _) => vec![(name, None)],
                Source::Stacked([first, second]) => {
                    vec![(first, Some(0..rows / 2)), (second, Some(rows / 2..rows))]
                }
            };
            for (name, rows) in sources {
                if let Some(place) = name.strip_suffix(".weight") {
                    targets.push(LoraTarget { place: place.to_string(), leaf: param.leaf(), rows });
                }
            }
        }
        Ok(targets)
    }

    fn names_of_transformers(&self) -> Result<Names> {
        if self.file.format() == Format::Gguf {
            Ok(llama::names(&llama_gguf::sizes(&self.config)?, llama::TABLE))
        } else {
            Ok(self.names.clone())
        }
    }
}

/// The options and the weights of an adapter's folder.
fn read(folder: &Path) -> Result<(LoraOptions, BTreeMap<String, Tensor>)> {
    let path = folder.join(CONFIG);
    let config = options::json(&path)?;
    let config = config.as_object().ok_or_else(|| Error::file(&path, "is not a JSON object"))?;
    let mut read = LoraOptions { target_modules: Vec::new(), ..LoraOptions::default() };
    supported(&path, config)?;
    let number = |key: &str, default: f64| match config.get(key) {
        None | Some(Value::Null) => Ok(default),
        Some(value) => {
            value.as_f64().ok_or_else(|| Error::file(&path, format_args!("`{key}` is {value}, expected a number")))
        }
    };
    let flag = |key: &str| match config.get(key) {
        None | Some(Value::Null) => Ok(false),
        Some(Value::Bool(flag)) => Ok(*flag),
        Some(value) => Err(Error::file(&path, format_args!("`{key}` is {value}, expected true or false"))),
    };
    read.r = number("r", 8.0)? as usize;
    read.lora_alpha = number("lora_alpha", 8.0)?;
    read.lora_dropout = number("lora_dropout", 0.0)?;
    (read.use_rslora, read.use_dora) = (flag("use_rslora")?, flag("use_dora")?);
    let file = [WEIGHTS, "adapter_model.bin"].map(|name| folder.join(name));
    let file = file.iter().find(|path| path.is_file()).unwrap_or(&file[0]);
    let weights = TensorFile::open(file)?.tensors()?;
    // The weights say which layers there are, whatever pattern chose them.
    for name in weights.keys() {
        let place = name.strip_prefix(BASE).and_then(|name| {
            let ends = [".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"];
            ends.iter().find_map(|end| name.strip_suffix(end))
        });
        let Some(place) = place else {
            return Err(Error::file(
                file,
                format_args!(
                    "has `{name}`, expected only lora_A, lora_B and lora_magnitude_vector of \
                modules below `{BASE}`"
                ),
            ));
        };
        // Names are in alphabetical order: those of a module follow each other.
        if read.target_modules.last().is_none_or(|last| last != place) {
            read.target_modules.push(place.to_string());
        }
    }
    Ok((read, weights))
}

/// Refuses options that change what an adapter computes.
fn supported(path: &Path, config: &Map<String, Value>) -> Result<()> {
    const READ: [&str; 7] =
        ["r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "target_modules", "exclude_modules"];
    for (key, value) in config {
        let empty = match value {
            Value::Null | Value::Bool(false) => true,
            Value::Array(list) => list.is_empty(),
            Value::Object(map) => map.is_empty(),
            _ => false,
        };
        let known = READ.contains(&key.as_str()) || DESCRIPTIVE.contains(&key.as_str());
        let text = value.to_string();
        let neutral = NEUTRAL.iter().any(|(name, neutral)| name == key && *neutral == text);
        ensure!(
            empty || known || neutral,
            Error::file(
                path,
                format_args!("`{key}` is {value}, which is not supported: only plain LoRA, rsLoRA and DoRA are")
            )
        );
    }
    ensure!(
        config.get("peft_type").and_then(Value::as_str) == Some("LORA"),
        Error::file(path, "`peft_type` is not LORA, the only kind of adapter that is supported")
    );
    Ok(())
}
