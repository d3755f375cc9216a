//! Models in GGUF files, as llama.cpp describes them: the architectures `llama`, which Mistral's models have too, and
//! `qwen2`.

use super::{
    Described, Family,
    llama::{Sizes, places},
    names::{Names, Source, Weight},
    options::MAX_DEPTH,
    rope,
};
use crate::{
    Error, Result,
    error::ensure,
    io::{Metadata, TensorFile},
};

/// Metadata whose keys begin with the architecture.
pub(super) struct Keys<'a> {
    file: &'a TensorFile,
    architecture: &'a str,
}

impl<'a> Keys<'a> {
    pub(super) fn get(&self, key: &str) -> Option<&'a Metadata> {
        self.file.metadata().get(&self.name(key))
    }

    fn name(&self, key: &str) -> String {
        format!("{}.{key}", self.architecture)
    }

    pub(super) fn refuse(&self, key: &str, why: impl std::fmt::Display) -> Error {
        Error::file(self.file.path(), format_args!("`{}` {why}", self.name(key)))
    }

    fn wrong(&self, key: &str, expected: &str) -> Error {
        let found = self.get(key).map_or_else(|| "missing".to_string(), |found| format!("{found:?}"));
        self.refuse(key, format!("is {found}, expected {expected}"))
    }

    pub(super) fn size(&self, key: &str, default: Option<usize>) -> Result<usize> {
        let value = self.get(key).map_or(default, Metadata::as_usize).filter(|value| (1..=1 << 30).contains(value));
        value.ok_or_else(|| self.wrong(key, &format!("a number from 1 to {}", 1 << 30)))
    }

    pub(super) fn number(&self, key: &str) -> Result<Option<f64>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_f64().map(Some).ok_or_else(|| self.wrong(key, "a number"))
    }

    /// Returns a size that may be listed for each of `depth` layers and must be equal in all.
    fn uniform(&self, key: &str, depth: usize, default: Option<usize>) -> Result<usize> {
        let Some(Metadata::List(values)) = self.get(key) else { return self.size(key, default) };
        ensure!(
            values.len() == depth,
            self.refuse(key, format!("has {} values, expected {depth}, one per layer", values.len()))
        );
        let value = values.first().and_then(Metadata::as_usize).filter(|value| (1..=1 << 30).contains(value));
        match value {
            Some(value) if values.iter().all(|other| other.as_usize() == Some(value)) => Ok(value),
            _ => Err(self.refuse(key, format!("is {values:?}, expected the same value for all layers"))),
        }
    }
}

pub(super) fn of_gguf(file: &TensorFile) -> Result<(Family, Described)> {
    const ARCHITECTURE: &str = "general.architecture";
    let architecture = file.metadata().get(ARCHITECTURE).and_then(Metadata::as_str).unwrap_or("missing");
    let family = Family::of_architecture(architecture).map_err(|known| {
        let why = format!("`{ARCHITECTURE}` is {architecture}, expected {known} (llama includes Mistral)");
        Error::file(file.path(), why)
    })?;
    let keys = Keys { file, architecture };
    if keys.get("expert_count").and_then(Metadata::as_usize).is_some_and(|count| count > 0) {
        return Err(keys.refuse("expert_count", "must be 0: mixtures of experts are not supported"));
    }
    if keys.get("attention.causal").and_then(Metadata::as_bool) == Some(false) {
        return Err(keys.refuse("attention.causal", "must be true: only causal models are supported"));
    }
    let depth = keys.size("block_count", None)?;
    ensure!(
        depth <= file.names().count().min(MAX_DEPTH),
        keys.refuse(
            "block_count",
            format!("is {depth}, expected at most {MAX_DEPTH} and at most the number of tensors")
        )
    );
    let dim = keys.size("embedding_length", None)?;
    let heads = keys.uniform("attention.head_count", depth, None)?;
    let kv_heads = keys.uniform("attention.head_count_kv", depth, Some(heads))?;
    let dim_head = keys.size("attention.key_length", Some(dim / heads))?;
    for key in ["attention.value_length", "rope.dimension_count"] {
        let found = keys.size(key, Some(dim_head))?;
        ensure!(found == dim_head, keys.refuse(key, format!("is {found}, expected the head size {dim_head}")));
    }
    let table = file.info("token_embd.weight").and_then(|info| info.shape.first().copied());
    let positions = keys.size("context_length", None)?;
    let has = |name: &str| file.info(name).is_some();
    let sizes = Sizes {
        tokens: keys.size("vocab_size", table)?,
        positions,
        dim,
        depth,
        heads,
        kv_heads,
        dim_head,
        inner: keys.uniform("feed_forward_length", depth, None)?,
        eps: keys.number("attention.layer_norm_rms_epsilon")?.unwrap_or(1e-5),
        rotation: rope::of_gguf(file, &keys, positions, dim_head / 2)?,
        biases: [has("blk.0.attn_q.bias"), has("blk.0.attn_output.bias"), has("blk.0.ffn_up.bias")],
        max_attend_past: None,
        tied: !has("output.weight"),
    };
    Ok((family, (sizes.config(), names(&sizes, family))))
}

/// Names of the tensors of a model of these sizes.
pub(super) fn names(sizes: &Sizes, family: Family) -> Names {
    let mut names = Names::default();
    names.one("token_emb.weight", "token_embd.weight");
    names.one("norm.g", "output_norm.weight");
    let [qkv, out, ff] = sizes.biases;
    let parts = |bias: bool| if bias { &["weight", "bias"][..] } else { &["weight"] };
    for layer in 0..sizes.depth {
        let ([own, feed], theirs) = (places(layer), format!("blk.{layer}"));
        names.one(format!("{own}.0.0.g"), format!("{theirs}.attn_norm.weight"));
        names.one(format!("{feed}.0.0.g"), format!("{theirs}.ffn_norm.weight"));
        for (here, there, heads) in [("to_q", "attn_q", sizes.heads), ("to_k", "attn_k", sizes.kv_heads)] {
            for part in parts(qkv) {
                let name = format!("{theirs}.{there}.{part}");
                // Features that rotate together are adjacent only in files of the architecture llama.
                let theirs = if family == Family::Llama { Source::Halves(name, heads) } else { Source::One(name) };
                names.weights.push(Weight { ours: format!("{own}.1.{here}.{part}"), theirs });
            }
        }
        for part in parts(qkv) {
            names.one(format!("{own}.1.to_v.{part}"), format!("{theirs}.attn_v.{part}"));
        }
        for part in parts(out) {
            names.one(format!("{own}.1.to_out.{part}"), format!("{theirs}.attn_output.{part}"));
        }
        for part in parts(ff) {
            let gated = ["ffn_up", "ffn_gate"].map(|name| format!("{theirs}.{name}.{part}"));
            let ours = format!("{feed}.1.net.0.proj.{part}");
            names.weights.push(Weight { ours, theirs: Source::Stacked(gated) });
            names.one(format!("{feed}.1.net.3.{part}"), format!("{theirs}.ffn_down.{part}"));
        }
    }
    if !sizes.tied {
        names.one("to_logits.weight", "output.weight");
    }
    // The first is part of the config, the others are rotation tables in old files.
    names.left_out.push(rope::FREQ_FACTORS.to_string());
    names.left_out.extend((0..sizes.depth).map(|layer| format!("blk.{layer}.attn_rot_embd.")));
    names
}
