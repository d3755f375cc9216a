//! GGUF files with quantised weights, made from models.

use std::{collections::BTreeMap, path::Path};

use super::Pretrained;
use crate::{
    DType, Error, QuantType, Result, Tensor,
    error::ensure,
    io::{Format, GgufTensor, Metadata, Stored, write_gguf},
};

/// Number in `general.file_type` of a file whose matrices have a type, as llama.cpp names mixtures.
fn file_type(kind: QuantType) -> Option<i64> {
    Some(match kind {
        QuantType::Q4_0 => 2,
        QuantType::Q4_1 => 3,
        QuantType::Q8_0 => 7,
        QuantType::Q5_0 => 8,
        QuantType::Q5_1 => 9,
        QuantType::Q4K => 14,
        QuantType::Q5K => 16,
        QuantType::Q6K => 18,
        QuantType::Iq4Nl => 25,
        QuantType::Q2K | QuantType::Q3K | QuantType::Iq4Xs => return None,
    })
}

impl Pretrained {
    /// Writes the model to a GGUF file whose matrices are rounded to a type, in one step; llama.cpp reads it too.
    ///
    /// As in llama.cpp the weights of the logits, which may be the table of embeddings, are kept more precisely, as Q6_K
    /// (Q8_0 for Q8_0); rows that are not whole blocks take the type of [`QuantType::for_rows_of`], or else F16. Matrices
    /// that have their type already are copied; others are rounded anew, whatever they were rounded to before. Norms and
    /// biases stay as they are, and so do the metadata, tokenizer included.
    ///
    /// Errors: a model that is not a GGUF file; a type that [is not packed](QuantType::is_packed); weights that are not finite
    /// or cannot be read; [`ErrorKind::Io`](crate::ErrorKind::Io).
    pub fn write_quantized(&self, path: impl AsRef<Path>, kind: QuantType) -> Result<()> {
        let file = &self.file;
        ensure!(
            file.format() == Format::Gguf,
            Error::file(
                file.path(),
                "expected a GGUF file; convert the folder with llama.cpp's `convert_hf_to_gguf.py` first"
            )
        );
        let Some(number) = file_type(kind) else {
            return Err(Error::argument("write_quantized", format_args!("files are not written in {kind}")));
        };
        self.check()?;
        let mut metadata: BTreeMap<String, Metadata> = file.metadata().clone();
        metadata.insert("general.file_type".to_string(), Metadata::Int(number));
        metadata.insert("general.quantization_version".to_string(), Metadata::Int(2));
        metadata.retain(|key, _| key != "general.alignment" && !key.starts_with("split."));
        let tied = self.config.tie_embedding;
        let tensors: Vec<GgufTensor> = file
            .names()
            .filter_map(|name| Some((name, file.info(name)?)))
            .map(|(name, info)| {
                let stored = match &info.shape[..] {
                    &[_, columns] => {
                        let logits = name == if tied { "token_embd.weight" } else { "output.weight" };
                        let kind = if logits && kind != QuantType::Q8_0 { QuantType::Q6K } else { kind };
                        kind.for_rows_of(columns).map_or(Stored::F16, Stored::Quantized)
                    }
                    _ => Stored::F32,
                };
                GgufTensor { name: name.to_string(), shape: info.shape, stored }
            })
            .collect();
        write_gguf(path, &metadata, &tensors, |index| {
            let GgufTensor { name, stored, .. } = &tensors[index];
            if file.info(name).is_some_and(|info| info.stored == *stored) {
                return Ok(file.raw(name)?.bytes);
            }
            let tensor = file.tensor(name)?.to_dtype(DType::F32)?;
            let values = tensor.values::<f32>()?;
            match stored {
                Stored::Quantized(kind) => {
                    kind.quantize(values).map_err(|why| Error::file(file.path(), format_args!("`{name}`: {why}")))
                }
                Stored::F16 => bytes(&tensor.to_dtype(DType::F16)?),
                _ => bytes(&tensor),
            }
        })
    }
}

/// The values of a float tensor as they lie in files.
fn bytes(tensor: &Tensor) -> Result<Vec<u8>> {
    Ok(tensor.contiguous()?.bytes()?.to_vec())
}
