//! Attention of the next positions of sequences to cached keys and values.

use super::{Attention, AttentionInput, AttentionOutput};
use crate::{
    DType, Error, Result, Tensor,
    collect::CollectVec,
    config::{AttentionPlan, PaddingPlan},
    error::ErrorContext,
    nn::step::{DecodeStep, Tables},
    ops::{DecodeSpec, Window, attention_decode},
};

/// Keys and values `[b, heads, prefix_len + capacity, d]`; those of a context have exactly the size of the context.
#[derive(Clone, Debug, Default)]
pub(in crate::nn) struct AttentionCache {
    pub keys_values: Option<[Tensor; 2]>,
    /// If `true`, each step writes to them in place: they belong to the sequence and not to a context.
    pub grows: bool,
    /// Number of keys before the sequence: memory key/values and memories.
    prefix_len: usize,
    /// Number of memories among them.
    memories: usize,
    /// Position bias by the distance of a key before a query, `[heads, distances]`.
    bias_by_distance: Option<Tensor>,
}

impl Attention {
    /// Computes the next positions of sequences as [`Attention::forward`] would, and adds their keys and values to the
    /// cache.
    pub(in crate::nn) fn extend(
        &self,
        x: &Tensor,
        input: &AttentionInput,
        cache: &mut AttentionCache,
        tables: &Tables,
        step: &DecodeStep,
    ) -> Result<AttentionOutput> {
        match (step.first, input.context.is_some()) {
            (true, _) => self.begin(x, input, cache, tables, step),
            (false, true) => self.extend_to_context(x, input, cache),
            (false, false) => self.extend_to_sequence(x, input, cache, tables, step),
        }
    }

    /// Computes the first positions of all sequences: a call of [`Attention::forward`] that keeps the keys and values.
    fn begin(
        &self,
        x: &Tensor,
        input: &AttentionInput,
        cache: &mut AttentionCache,
        tables: &Tables,
        step: &DecodeStep,
    ) -> Result<AttentionOutput> {
        let (operands, values) = self.operands(x, input)?;
        let [_, k, v] = &operands;
        if input.context.is_some() {
            cache.keys_values = Some([k.contiguous()?, v.contiguous()?]);
            return self.attend(x, &operands, input);
        }
        cache.memories = input.mem.as_ref().map_or(Ok(0), |mem| mem.dim(1))?;
        cache.prefix_len = cache.memories + self.plan.prefix_len();
        cache.bias_by_distance =
            tables.by_distance(cache.prefix_len, cache.prefix_len + step.capacity, x.dtype().accumulator())?;
        cache.write(&self.shared_once(k)?, v, step)?;
        Ok(AttentionOutput { values, ..self.attend(x, &operands, input)? })
    }

    /// Computes attention of new queries to a context, whose keys and values do not change.
    fn extend_to_context(&self, x: &Tensor, input: &AttentionInput, cache: &AttentionCache) -> Result<AttentionOutput> {
        let [k, v] = cache.keys_values()?;
        let q = self.norm_queries(self.queries(&self.query_projection(x)?)?)?;
        let q = self.scale_queries(q)?;
        self.attend(x, &[q, k.clone(), v.clone()], input)
    }

    /// Computes attention of new queries to the whole sequence, after appending their own keys and values.
    fn extend_to_sequence(
        &self,
        x: &Tensor,
        input: &AttentionInput,
        cache: &mut AttentionCache,
        tables: &Tables,
        step: &DecodeStep,
    ) -> Result<AttentionOutput> {
        let ([q, k, v], values) = self.new_operands(x, input, cache, tables, step)?;
        cache.write(&k, &v, step)?;
        drop((k, v));
        let [k, v] = cache.keys_values()?;
        let prefix = self.plan.prefix_len();
        // The decoding op does not know memory key/values that are seen from outside of the window.
        let exceptions = self.unbiased_keys() > 0 && self.plan.window != Window::default();
        if self.plan.needs_scores().is_some() || input.explicit || input.prev.is_some() || exceptions {
            let keys = step.keys(cache.prefix_len);
            let [k, v] = [self.all_heads(&k.narrow(2, 0, keys)?)?, v.narrow(2, 0, keys)?];
            let keep = cache.keep(step, &self.plan)?;
            let bias = cache.bias(step, &q, self.unbiased_keys())?;
            let (out, scores, _) = self.explicit([&q, &k, &v], input, bias, Some(keep))?;
            return Ok(AttentionOutput { values, ..self.merge(x, out, scores, None, input)? });
        }
        if let Some(keys) = cache.chunk(step) {
            // Many rows at once: blocks of keys are reused for blocks of queries.
            let [k, v] = [self.all_heads(&k.narrow(2, 0, keys)?)?, v.narrow(2, 0, keys)?];
            let out = self.fused(&q, &k, &v, &AttentionInput::default())?;
            return Ok(AttentionOutput { values, ..self.merge(x, out, None, None, input)? });
        }
        let bias_by_distance = cache.bias_by_distance.as_ref().map(|bias| self.grouped(bias, 0)).transpose()?;
        let sink = self.grouped_sink()?.map(|sink| sink.detach());
        let spec = DecodeSpec {
            scale: self.scale(),
            prefix_len: cache.prefix_len,
            mem_keys: prefix,
            window: self.plan.window,
            key_mask: step.whole_mask.as_ref(),
            query_mask: step.mask.as_ref().filter(|_| self.plan.padding == PaddingPlan::Queries),
            bias_by_distance: bias_by_distance.as_ref(),
            unbiased_keys: self.unbiased_keys(),
            softclamp: self.plan.softclamp,
            sink: sink.as_ref(),
        };
        let q = self.grouped(&q, 1)?;
        let out = self.ungrouped(&attention_decode(&q, &self.all_heads(k)?, v, &step.device_lengths, &spec)?)?;
        Ok(AttentionOutput { values, ..self.merge(x, out, None, None, input)? })
    }

    /// Returns the operands of only the new positions. Keys shared by all heads are stored once.
    fn new_operands(
        &self,
        x: &Tensor,
        input: &AttentionInput,
        cache: &AttentionCache,
        tables: &Tables,
        step: &DecodeStep,
    ) -> Result<([Tensor; 3], Option<Tensor>)> {
        let infused = match &tables.sinusoids {
            Some(sinusoids) => {
                let positions = step.positions(cache.memories, sinusoids.dim(0)?)?;
                x.add(&sinusoids.embedding(&positions)?)?
            }
            None => x.clone(),
        };
        let (keys, values) = match &input.sources {
            Some([keys, values]) => (keys, values),
            None => (&infused, x),
        };
        let [q, k, values] = self.linears([&infused, keys, values])?;
        let values = self.split_heads(&values, self.plan.dim_value)?;
        let mut v = self.norm_heads(self.mix_values(x, &values, input)?, 2)?;
        let k = if self.plan.shared.is_some() { k.unsqueeze(1)? } else { self.key_heads(&k, keys)? };
        let mut q = self.norm_queries(self.queries(&q)?)?.detach();
        let mut k = self.norm_keys(k)?.detach();
        v = self.exponentials(v)?.detach();
        if let (Some(table), Some(plan)) = (&tables.rotary, &self.plan.rotary) {
            let rotate = |x: &Tensor| x.rotate_rows(table, &step.device_lengths, cache.memories);
            (q, k) = (self.rotated(self.pairs_as_halves(q)?, rotate)?, self.rotated(self.pairs_as_halves(k)?, rotate)?);
            v = if plan.values { rotate(&v)? } else { v };
        }
        let k = self.normalize_length(k)?;
        let k = if self.plan.num_mem_kv > 0 { self.all_heads(&k)? } else { k };
        // There may be a tape; values that pass through a cache have no gradient.
        Ok(([self.scale_queries(q)?.detach(), k.detach(), v.detach()], Some(values)))
    }

    /// Returns keys shared by all heads once, unless memory keys differ between heads.
    fn shared_once(&self, k: &Tensor) -> Result<Tensor> {
        if self.plan.shared.is_some() && self.plan.num_mem_kv == 0 { k.narrow(1, 0, 1) } else { Ok(k.clone()) }
    }
}

impl AttentionCache {
    fn keys_values(&self) -> Result<&[Tensor; 2]> {
        self.keys_values.as_ref().ok_or_else(|| Error::argument("cache", "has no keys and values yet"))
    }

    /// Writes keys and values of a step, `[b, heads, n, d]`; those of the first step include the prefix.
    fn write(&mut self, k: &Tensor, v: &Tensor, step: &DecodeStep) -> Result<()> {
        let offset = if step.first { 0 } else { self.prefix_len };
        let room = self.prefix_len + step.capacity;
        let buffer = |x: &Tensor| Tensor::zeros([x.dim(0)?, x.dim(1)?, room, x.dim(3)?], x.dtype(), x.device());
        let [mut keys, mut values] = match self.keys_values.take() {
            Some(buffers) => buffers,
            None => [buffer(k)?, buffer(v)?],
        };
        keys.write_rows(k, &step.device_lengths, offset).context("keys")?;
        values.write_rows(v, &step.device_lengths, offset).context("values")?;
        self.keys_values = Some([keys, values]);
        self.grows = true;
        Ok(())
    }

    /// Returns the number of keys if the step is a chunk of sequences of equal length whose scores are only products:
    /// [`attention`](crate::ops::attention) computes it faster for many queries.
    fn chunk(&self, step: &DecodeStep) -> Option<usize> {
        let equal = step.lengths.iter().all(|&length| length == step.lengths[0]);
        let plain = equal && step.n >= 8 && self.bias_by_distance.is_none() && step.kept.is_none();
        (plain && step.lengths[0] + step.n <= step.capacity).then(|| step.keys(self.prefix_len))
    }

    /// Returns the mask of the step's scores, `[b, 1, n, keys]`; `true` keeps, as in the call without a cache.
    fn keep(&self, step: &DecodeStep, plan: &AttentionPlan) -> Result<Tensor> {
        let (prefix_len, keys) = (self.prefix_len, step.keys(self.prefix_len));
        let (mem_keys, masks_queries) = (plan.prefix_len(), plan.padding == PaddingPlan::Queries);
        let always = if plan.mem_kv_counted { 0 } else { mem_keys };
        let mut keep = Vec::with_capacity(step.lengths.len() * step.n * keys);
        for (row, &length) in step.lengths.iter().enumerate() {
            let kept = step.kept.as_ref().map(|kept| &kept[row]);
            let padded = |position: usize| kept.is_some_and(|kept| !kept.get(position).is_none_or(|&kept| kept));
            for i in 0..step.n {
                let position = prefix_len + length + i;
                let query_padded = masks_queries && padded(length + i);
                let first = plan.window.first_key(position as i64);
                keep.extend((0..keys).map(|key| {
                    let padding = key < mem_keys || !(query_padded || key >= prefix_len && padded(key - prefix_len));
                    padding && key <= position && (key < always || key as i64 >= first)
                }));
            }
        }
        Tensor::from_vec(keep, [step.lengths.len(), 1, step.n, keys], step.device_lengths.device())
    }

    /// Returns the position bias of the step's scores in the dtype of the queries, `[b, heads, n, keys]`; 0 for the
    /// first keys.
    fn bias(&self, step: &DecodeStep, q: &Tensor, unbiased: usize) -> Result<Option<Tensor>> {
        let Some(by_distance) = &self.bias_by_distance else { return Ok(None) };
        let (prefix_len, keys, distances) = (self.prefix_len, step.keys(self.prefix_len), by_distance.dim(1)?);
        let row = |&length: &usize| {
            let distance = move |position: usize, key: usize| position.saturating_sub(key).min(distances - 1) as i64;
            (0..step.n).flat_map(move |i| (0..keys).map(move |key| distance(prefix_len + length + i, key)))
        };
        let index: Vec<i64> = step.lengths.iter().flat_map(row).collect_vec();
        let index = Tensor::from_vec(index, [step.lengths.len(), step.n, keys], by_distance.device())?;
        let bias = by_distance.transpose(0, 1)?.embedding(&index)?.permute(&[0, 3, 1, 2])?.to_dtype(q.dtype())?;
        if unbiased == 0 {
            return Ok(Some(bias));
        }
        let biased =
            Tensor::arange(keys, q.device())?.ge(&Tensor::full((), unbiased as f64, DType::I64, q.device())?)?;
        biased.where_cond(&bias, &Tensor::zeros((), q.dtype(), q.device())?).map(Some)
    }
}
