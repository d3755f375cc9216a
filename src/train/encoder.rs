//! The encoder of a task: read from its options, or from a pretrained file.

use serde_json::Value;

use crate::{
    Error, Result,
    config::{Config, TransformerWrapperConfig},
    error::ensure,
    pretrained::Pretrained,
};

/// Parses the options of an encoder.
///
/// Errors: options of another model, or illegal ones.
pub(super) fn encoder(net: &Value) -> Result<TransformerWrapperConfig> {
    match Config::from_value(net.clone())? {
        Config::TransformerWrapper(net) => Ok(net),
        _ => Err(Error::option("net", "expected a TransformerWrapper")),
    }
}

/// Returns the maximum sequence length of an encoder, `usize::MAX` without absolute positions.
pub(super) fn max_seq_len(net: &TransformerWrapperConfig) -> usize {
    if net.max_seq_len == 0 { usize::MAX } else { net.max_seq_len }
}

/// Checks that a pretrained model is an encoder.
pub(super) fn check_is_encoder(pretrained: &Pretrained) -> Result<()> {
    let family = pretrained.family();
    let why = format_args!("belongs to the {family} family, which generates text; use an encoder");
    ensure!(!family.is_causal(), Error::file(pretrained.file().path(), why));
    Ok(())
}
