//! What a folder of sentence-transformers says besides the encoder.

use serde_json::Value;

use super::{Pretrained, options::json};
use crate::{
    DType, Device, Error, Result,
    error::ensure,
    models::{Pooling, SentenceEncoder},
};

impl Pretrained {
    /// The same as a model that gives one vector for a text, pooled as the folder says (`1_Pooling/config.json` and
    /// `modules.json` of sentence-transformers), by the mean otherwise.
    ///
    /// Errors: those of [`Pretrained::model`], or a pooling that is not known.
    pub fn sentence_encoder(&self, dtype: DType, device: &Device) -> Result<SentenceEncoder> {
        ensure!(
            !self.family.is_causal(),
            Error::file(self.file.path(), format!("is of the family {}, which embeds no sentences", self.family))
        );
        let (pooling, normalize) = self.pooling()?;
        SentenceEncoder::new(self.model(dtype, device)?, pooling, normalize)
    }

    fn pooling(&self) -> Result<(Pooling, bool)> {
        let Some(folder) = &self.folder else { return Ok((Pooling::Mean, false)) };
        let modules = folder.join("modules.json");
        if !modules.exists() {
            return Ok((Pooling::Mean, false));
        }
        let modules = json(&modules)?;
        let kinds: Vec<&str> =
            modules.as_array().into_iter().flatten().filter_map(|module| module["type"].as_str()).collect();
        let normalize = kinds.iter().any(|kind| kind.ends_with(".Normalize"));
        let path = folder.join("1_Pooling/config.json");
        let pooling = json(&path)?;
        let on: Vec<&String> = pooling
            .as_object()
            .into_iter()
            .flatten()
            .filter(|(key, value)| key.starts_with("pooling_mode_") && **value == Value::Bool(true))
            .map(|(key, _)| key)
            .collect();
        match on.iter().map(|key| key.as_str()).collect::<Vec<_>>()[..] {
            ["pooling_mode_mean_tokens"] => Ok((Pooling::Mean, normalize)),
            ["pooling_mode_cls_token"] => Ok((Pooling::FirstToken, normalize)),
            _ => Err(Error::file(path, format!("asks for {on:?}, expected the mean or the first token"))),
        }
    }
}
