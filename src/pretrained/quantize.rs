//! GGUF files with quantised weights, made from models.

use std::{collections::BTreeMap, path::Path};

use super::{
    Family, Pretrained,
    llama_gguf::{Described, Part, describe},
    rope::FREQ_FACTORS,
};
use crate::{
    DType, Device, Error, ParamStore, QuantType, Result, Tensor,
    collect::CollectVec,
    config::TransformerWrapperConfig,
    error::{ErrorContext, ensure},
    io::{Format, GgufTensor, Metadata, Stored, write_gguf},
    models::TransformerWrapper,
};

/// Number in `general.file_type` of a file whose matrices have a type, as llama.cpp names mixtures.
fn file_type(kind: QuantType) -> Result<i64> {
    Ok(match kind {
        QuantType::Q4_0 => 2,
        QuantType::Q4_1 => 3,
        QuantType::Q8_0 => 7,
        QuantType::Q5_0 => 8,
        QuantType::Q5_1 => 9,
        QuantType::Q4K => 14,
        QuantType::Q5K => 16,
        QuantType::Q6K => 18,
        QuantType::Iq4Nl => 25,
        QuantType::Q2K | QuantType::Q3K | QuantType::Iq4Xs => {
            return Err(Error::argument("write_quantized", format_args!("files are not written in {kind}")));
        }
    })
}

/// Writes a model of this crate to a GGUF file whose matrices are rounded to a type; llama.cpp reads it too.
///
/// The model must be one that GGUF has a name for: Llama's architecture, of the options that
/// [`Pretrained::config`] has for a Llama. `parameter` returns a parameter by its name in a
/// [`TransformerWrapper`](crate::models::TransformerWrapper); `metadata` is added, for the tokenizer. Types are chosen as
/// by [`Pretrained::write_quantized`].
///
/// Errors: another architecture, with the option that differs; those of [`Pretrained::write_quantized`].
pub fn write_quantized(
    path: impl AsRef<Path>,
    config: &TransformerWrapperConfig,
    kind: QuantType,
    metadata: &BTreeMap<String, Metadata>,
    parameter: impl Fn(&str) -> Result<Tensor>,
) -> Result<()> {
    let read = |ours: &str, half: Option<usize>| {
        let whole = parameter(ours)?;
        let Some(half) = half else { return Ok(whole) };
        let rows = whole.dim(0)? / 2;
        whole.narrow(0, half * rows, rows)
    };
    write(path.as_ref(), config, Family::Llama, kind, metadata, &read)
}

impl Pretrained {
    /// Writes the model to a GGUF file whose matrices are rounded to a type, in one step; llama.cpp reads it too.
    ///
    /// As in llama.cpp the weights of the logits, which may be the table of embeddings, are kept more precisely, as Q6_K
    /// (Q8_0 for Q8_0); rows that are not whole blocks take the type of [`QuantType::for_rows_of`], or else F16. Matrices
    /// that have their type already are copied; others are rounded anew, whatever they were rounded to before. Norms and
    /// biases stay as they are.
    ///
    /// The metadata of a GGUF file stay, tokenizer included. For a folder they are made from its config, and `metadata` is
    /// added, in which the caller describes the tokenizer (`gguf_metadata` of the crate `x-transformers-tokenizers`).
    ///
    /// Errors: a GGUF file whose metadata [were taken](Pretrained::take_metadata); a folder with options that GGUF has no name for, such as a window; a type that
    /// [is not packed](QuantType::is_packed); weights that are not finite or cannot be read;
    /// [`ErrorKind::Io`](crate::ErrorKind::Io).
    pub fn write_quantized(
        &self,
        path: impl AsRef<Path>,
        kind: QuantType,
        metadata: &BTreeMap<String, Metadata>,
    ) -> Result<()> {
        self.check()?;
        if self.file.format() == Format::Gguf {
            return self.write_anew(path.as_ref(), kind, metadata);
        }
        let mut metadata = metadata.clone();
        let name = self.folder.as_deref().and_then(Path::file_name).map(|name| name.to_string_lossy().into_owned());
        if let Some(name) = name {
            metadata.entry("general.name".to_string()).or_insert(Metadata::Text(name));
        }
        let read = |ours: &str, half: Option<usize>| {
            let weight = self.names.weights.iter().find(|weight| weight.ours == ours);
            let Some(weight) = weight else {
                return Err(Error::argument("write_quantized", format_args!("`{ours}` is in no file")));
            };
            weight.part(&self.file, half)
        };
        write(path.as_ref(), &self.config, self.family, kind, &metadata, &read).context(self.file.path().display())
    }

    /// Writes a GGUF file with the tensors of one.
    fn write_anew(&self, path: &Path, kind: QuantType, more: &BTreeMap<String, Metadata>) -> Result<()> {
        let file = &self.file;
        let mut metadata: BTreeMap<String, Metadata> = file.metadata().clone();
        ensure!(
            metadata.contains_key("general.architecture"),
            Error::file(file.path(), "has no metadata any more: they were moved out by `Pretrained::take_metadata`")
        );
        metadata.retain(|key, _| key != "general.alignment" && !key.starts_with("split."));
        metadata.extend(more.clone());
        let tied = self.config.tie_embedding;
        let tensors: Vec<GgufTensor> = file
            .names()
            .filter_map(|name| {
                let info = file.info(name)?;
                let stored = stored_as(name, &info.shape, kind, tied);
                Some(GgufTensor { name: name.to_string(), shape: info.shape, stored })
            })
            .collect();
        write_tensors(path, metadata, kind, &tensors, &|index| {
            let GgufTensor { name, stored, .. } = &tensors[index];
            if file.info(name).is_some_and(|info| info.stored == *stored) {
                return Ok(file.raw(name)?.bytes);
            }
            rounded(&file.tensor(name)?, *stored).context(name).context(file.path().display())
        })
    }
}

/// Returns a parameter by its name, or half of its rows.
type Read<'a> = dyn Fn(&str, Option<usize>) -> Result<Tensor> + 'a;

/// Writes a model with these options.
fn write(
    path: &Path,
    config: &TransformerWrapperConfig,
    family: Family,
    kind: QuantType,
    more: &BTreeMap<String, Metadata>,
    read: &Read,
) -> Result<()> {
    let Described { mut metadata, tensors: written, factors, tied } = describe(config, family)?;
    metadata.extend(more.clone());
    let shapes = ParamStore::shapes(DType::F32, &Device::Cpu);
    TransformerWrapper::new(config, &shapes)?;
    let params = shapes.params();
    let mut tensors = Vec::new();
    for tensor in &written {
        let Some(param) = params.get(&tensor.ours) else {
            return Err(Error::argument("write_quantized", format_args!("the model has no `{}`", tensor.ours)));
        };
        let mut shape = param.tensor().shape().to_vec();
        if let Part::Half(_) = tensor.part {
            shape[0] /= 2;
        }
        let stored = stored_as(&tensor.name, &shape, kind, tied);
        tensors.push(GgufTensor { name: tensor.name.clone(), shape, stored });
    }
    if let Some(factors) = &factors {
        let (name, shape) = (FREQ_FACTORS.to_string(), vec![factors.len()]);
        tensors.push(GgufTensor { name, shape, stored: Stored::F32 });
    }
    write_tensors(path, metadata, kind, &tensors, &|index| {
        let Some(tensor) = written.get(index) else {
            let factors: Vec<f32> = factors.iter().flatten().map(|&factor| factor as f32).collect_vec();
            return bytes(&Tensor::from_slice(&factors, [factors.len()], &Device::Cpu)?);
        };
        let half = if let Part::Half(half) = tensor.part { Some(half) } else { None };
        let value = tensor.part.of(read(&tensor.ours, half)?)?;
        let (found, expected) = (value.shape(), &tensors[index].shape);
        ensure!(
            found[..] == expected[..],
            Error::argument("write_quantized", format_args!("`{}` is {found:?}, expected {expected:?}", tensor.ours))
        );
        rounded(&value, tensors[index].stored).context(&tensor.ours)
    })
}

fn write_tensors(
    path: &Path,
    mut metadata: BTreeMap<String, Metadata>,
    kind: QuantType,
    tensors: &[GgufTensor],
    bytes: &dyn Fn(usize) -> Result<Vec<u8>>,
) -> Result<()> {
    metadata.insert("general.file_type".to_string(), Metadata::Int(file_type(kind)?));
    metadata.insert("general.quantization_version".to_string(), Metadata::Int(2));
    write_gguf(path, &metadata, tensors, bytes)
}

/// Returns the type of a tensor in a file whose matrices are rounded to `kind`.
fn stored_as(name: &str, shape: &[usize], kind: QuantType, tied: bool) -> Stored {
    let &[_, columns] = shape else { return Stored::F32 };
    let logits = name == if tied { "token_embd.weight" } else { "output.weight" };
    let kind = if logits && kind != QuantType::Q8_0 { QuantType::Q6K } else { kind };
    kind.for_rows_of(columns).map_or(Stored::F16, Stored::Quantized)
}

/// Returns the content of a tensor that is stored as this type.
fn rounded(tensor: &Tensor, stored: Stored) -> Result<Vec<u8>> {
    let tensor = tensor.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.contiguous()?;
    match stored {
        Stored::Quantized(kind) => kind.quantize(tensor.values::<f32>()?),
        Stored::F16 => bytes(&tensor.to_dtype(DType::F16)?),
        _ => bytes(&tensor),
    }
}

/// The values of a float tensor as they lie in files.
fn bytes(tensor: &Tensor) -> Result<Vec<u8>> {
    Ok(tensor.contiguous()?.bytes()?.to_vec())
}
