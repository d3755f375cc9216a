//! Named inputs of a model of any class, and ends of what it generates.

use std::collections::BTreeMap;

use super::{EncoderDecoderOptions, GenerateOptions, RunOptions};
use crate::{
    DType, Device, Error, Result, Tensor,
    collect::CollectVec,
    config::{Call, GenerateCall},
    nn::ForwardOptions,
    ordered::ordered,
};

/// Inputs by name, each of which must be used.
pub(super) struct Inputs {
    pub tensors: BTreeMap<String, Tensor>,
    /// Device of the model, to which the tensors have been moved.
    pub device: Device,
}

impl Inputs {
    pub fn take(&mut self, name: &str) -> Option<Tensor> {
        self.tensors.remove(name)
    }

    pub fn need(&mut self, name: &str) -> Result<Tensor> {
        self.take(name).ok_or_else(|| Error::argument("inputs", format_args!("missing `{name}`")))
    }

    /// Takes `mems.0`, `mems.1`, … up to the first that is missing.
    pub fn list(&mut self, name: &str) -> Option<Vec<Tensor>> {
        let list: Vec<Tensor> = (0..).map_while(|index| self.take(&format!("{name}.{index}"))).collect_vec();
        (!list.is_empty()).then_some(list)
    }

    /// Takes all tensors of an object, by the names in it.
    pub fn object(&mut self, name: &str) -> BTreeMap<String, Tensor> {
        let prefix = format!("{name}.");
        let keys: Vec<String> = self.tensors.keys().filter(|key| key.starts_with(&prefix)).cloned().collect_vec();
        ordered(keys.into_iter().filter_map(|key| Some((key[prefix.len()..].to_string(), self.tensors.remove(&key)?))))
    }

    pub fn forward_options(&mut self, call: &Call, run: &RunOptions) -> Result<ForwardOptions> {
        let prefix = call.prefix_attn_len.map(|length| Tensor::from_vec(vec![length], [1], &self.device));
        let prefix_attn_len = match self.take("prefix_attn_len") {
            Some(given) => Some(given),
            None => prefix.transpose()?,
        };
        Ok(ForwardOptions {
            mask: self.take("mask"),
            context: self.take("context"),
            context_mask: self.take("context_mask"),
            attn_mask: self.take("attn_mask"),
            mems: self.list("mems"),
            mem_masks: self.list("mem_masks"),
            self_attn_kv_mask: self.take("self_attn_kv_mask"),
            attn_bias: self.take("attn_bias"),
            condition: self.take("condition"),
            pos: self.take("pos"),
            context_pos: self.take("context_pos"),
            seq_start_pos: self.take("seq_start_pos"),
            prefix_attn_len,
            prepend_embeds: self.take("prepend_embeds"),
            prepend_mask: self.take("prepend_mask"),
            excise_prepend_embeds: call.excise_prepend_embeds,
            sum_embeds: self.take("sum_embeds"),
            embed_ids: self.object("embed_ids"),
            lens: self.take("lens"),
            numbers: self.take("x_num"),
            layers_execute_order: call.layers_execute_order.clone(),
            recycle_steps: call.recycle_steps,
            looped_steps: call.looped_steps,
            attn_z_loss_weight: call.attn_z_loss_weight,
            return_scores: call.return_attn_z_loss,
            attached_mems: call.attached_mems,
            token_types: self.take("token_types"),
            return_embeddings: call.return_embeddings,
            return_logits_and_embeddings: call.return_logits_and_embeddings,
            return_mems: call.return_mems,
            return_attn: call.return_attn,
            checkpoint_layers: run.checkpoint_layers,
            explicit_attention: run.explicit_attention,
        })
    }

    pub fn encoder_decoder_options(&mut self, masks: [&str; 2], run: &RunOptions) -> EncoderDecoderOptions {
        EncoderDecoderOptions {
            src_mask: self.take(masks[0]),
            tgt_mask: self.take("tgt_mask"),
            src_attn_mask: self.take(masks[1]),
            src_prepend_embeds: self.take("src_prepend_embeds"),
            checkpoint_layers: run.checkpoint_layers,
            explicit_attention: run.explicit_attention,
        }
    }

    /// Takes the prompt of generation, under either version's name.
    pub fn prompt(&mut self) -> Result<Tensor> {
        match self.take("prompts") {
            Some(prompts) => Ok(prompts),
            None => self.need("start_tokens"),
        }
    }

    /// Takes prompts, `[b, t]` or a list of rows, and the numbers of their real tokens.
    pub fn prompts(&mut self) -> Result<(Tensor, Option<Vec<usize>>)> {
        let Some(rows) = self.list("prompts") else { return Ok((self.prompt()?, self.lengths()?)) };
        let rows = rows.iter().map(Tensor::to_vec::<i64>).try_collect_vec()?;
        let lengths: Vec<usize> = rows.iter().map(Vec::len).collect_vec();
        let longest = lengths.iter().copied().max().unwrap_or(0);
        let padded = rows.into_iter().flat_map(|mut row| {
            row.resize(longest, 0);
            row
        });
        let prompts = Tensor::from_vec(padded.collect_vec(), [lengths.len(), longest], &self.device)?;
        Ok((prompts, Some(lengths)))
    }

    /// Takes the numbers of real tokens in the prompt.
    fn lengths(&mut self) -> Result<Option<Vec<usize>>> {
        let Some(lengths) = self.take("prompt_lens") else { return Ok(None) };
        let lengths = lengths.to_vec::<i64>()?;
        Ok(Some(lengths.into_iter().map(|length| usize::try_from(length).unwrap_or(0)).collect_vec()))
    }

    pub fn finish(self) -> Result<()> {
        match self.tensors.into_keys().next() {
            Some(name) => Err(Error::argument("inputs", format_args!("`{name}` is not used by this call"))),
            None => Ok(()),
        }
    }
}

/// Ends of rows as in `generate` of x-transformers 0.22: once every row has the end token, possibly in its prompt, it
/// stops after the token that it has just drawn, and only then overwrites the tokens after the first end of each row.
pub(super) struct Ends {
    eos: Option<i64>,
    pad_value: i64,
    /// If `true`, rows that have ended are padded even if others have not.
    pads_open_rows: bool,
    /// First end of each row, counted from the end of its prompt; 0 for one in the prompt.
    ends: Vec<Option<usize>>,
    length: usize,
}

impl Ends {
    pub fn new(generate: &GenerateCall, start: &Tensor, vocabulary: usize, pad_value: i64) -> Result<Self> {
        let eos = generate.eos_token;
        if let Some(eos) = eos {
            GenerateOptions { eos_tokens: vec![eos], ..GenerateOptions::default() }.check(1, vocabulary)?;
        }
        let width = start.shape().last().copied().unwrap_or(0).max(1);
        let rows = if start.dtype() == DType::I64 { start.to_vec::<i64>()? } else { Vec::new() };
        let end = |row: &[i64]| eos.is_some_and(|eos| row.contains(&eos)).then_some(0);
        let ends = rows.chunks(width).map(end).collect_vec();
        Ok(Self { eos, pad_value, pads_open_rows: generate.pads_open_rows, ends, length: 0 })
    }

    /// Counts the new token of every row; returns `false` once all have ended.
    pub fn push(&mut self, tokens: &[i64]) -> bool {
        self.length += 1;
        for (end, &token) in self.ends.iter_mut().zip(tokens) {
            if end.is_none() && self.eos == Some(token) {
                *end = Some(self.length);
            }
        }
        !self.all()
    }

    pub fn all(&self) -> bool {
        self.ends.iter().all(Option::is_some)
    }

    /// Returns the new tokens, `[b, n]` or `[n]`, with those after the ends overwritten.
    pub fn pad(&self, new: Tensor) -> Result<Tensor> {
        if self.eos.is_none() || !(self.pads_open_rows || self.all()) || self.length == 0 {
            return Ok(new);
        }
        let mut tokens = new.to_vec::<i64>()?;
        for (row, end) in tokens.chunks_mut(self.length).zip(&self.ends) {
            row[end.unwrap_or(self.length)..].fill(self.pad_value);
        }
        Tensor::from_vec(tokens, *new.shape(), new.device())
    }
}
