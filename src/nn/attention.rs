//! Multi-head attention with everything that x-transformers puts into it.

use std::sync::Arc;

use super::{
    Linear, ScoreBias,
    cache::{AttentionCache, DecodeStep, Tables},
};
use crate::{
    Buffer, DType, Error, Init, Param, ParamStore, Result, Tensor,
    config::{AttentionPlan, Normalize, Temperature},
    error::{ErrorContext, ensure},
    ops::{self, Activation, AttentionSpec, DecodeSpec, PositionBias, attention, attention_decode},
};

/// Scaled dot-product attention of several heads (Vaswani et al., <https://arxiv.org/abs/1706.03762>).
///
/// The scores are computed in blocks by one fused op, unless something needs the whole matrix of them:
/// [`AttentionPlan::needs_scores`] and [`gpu_needs_scores`](crate::ops::gpu_needs_scores) say what. Both ways have one
/// meaning.
#[derive(Clone, Debug)]
pub struct Attention {
    plan: Arc<AttentionPlan>,
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    to_out: Linear,
    to_v_gate: Option<Linear>,
    collab_mixing: Option<Param>,
    temperature: Option<LearnedTemperature>,
    memory: Option<[Param; 2]>,
    talking: Option<[Param; 2]>,
    head_scale: Option<Param>,
    /// Frequencies of the rotation, `[features / 2]`.
    rotary: Option<Buffer>,
}

/// Cosine attention: queries and keys of length 1, logits divided by `max(exp(scale), 1e-2)`.
#[derive(Clone, Debug)]
struct LearnedTemperature {
    /// `[1, heads, 1, 1]`
    scale: Param,
    /// What makes a scale norm an l2 norm: `dim^-½`, `[1]`.
    unit: Tensor,
}

/// What attention is given besides its input; everything is optional.
#[derive(Clone, Debug, Default)]
pub struct AttentionInput {
    /// Keys and values come from here, `[b, m, dim]`; otherwise from the input.
    pub context: Option<Tensor>,
    /// In front of the keys and values as it is, `[b, memories, dim]`.
    pub mem: Option<Tensor>,
    /// Which queries are no padding, `[b, i]` Bool.
    pub query_mask: Option<Tensor>,
    /// Which keys are no padding, `[b, j]` Bool, without memory key/values.
    pub key_mask: Option<Tensor>,
    /// Which pairs may meet: Bool, broadcasts to `[b, heads, i, j]`, memory key/values included.
    pub attn_mask: Option<Tensor>,
    /// Added to the inputs of queries and keys, `[j or more, dim]`: row `k` to key `k`, the last rows of the `j` keys to
    /// the queries.
    pub sinusoids: Option<Tensor>,
    /// Added to the scores; positions count memory key/values.
    pub bias: Option<ScoreBias>,
    /// The scores that the previous layer handed on, `[b, heads, i, j]`.
    pub prev: Option<Tensor>,
    /// Whether the attention map is wanted.
    pub return_attn: bool,
    /// Compute the matrix of scores even if the fused op would do.
    pub explicit: bool,
}

/// What attention gives.
#[derive(Clone, Debug)]
pub struct AttentionOutput {
    /// `[b, i, dim]`
    pub out: Tensor,
    /// The scores for the next layer, if the plan hands them on: `[b, heads, i, j]`.
    pub scores: Option<Tensor>,
    /// The weights after the softmax, if they were asked for: `[b, heads, i, j]`.
    pub attn: Option<Tensor>,
}

impl Attention {
    /// As planned, with the frequencies of the rotation, if there is one.
    pub(super) fn new(plan: &AttentionPlan, rotary: Option<&Buffer>, store: &ParamStore) -> Result<Self> {
        let (heads, dim_qk) = (plan.heads, plan.dim_qk());
        let width = heads * plan.dim_head;
        let kv_width = plan.kv_heads * plan.dim_head;
        let (q_width, k_width) = (plan.shared.unwrap_or(width), plan.shared.unwrap_or(kv_width));
        let biased = |name: &str, width: usize| Linear::maybe_biased(&store.at(name), plan.dim, width, plan.qkv_bias);
        let normal = |name: &str, shape: &[usize]| store.param(name, shape, Init::Normal(1.0));
        let per_head = |name: &str, start: f64| store.param(name, [1, heads, 1, 1], Init::Constant(start));
        let pair = |on: bool, names: [&str; 2], shapes: [&[usize]; 2]| -> Result<Option<[Param; 2]>> {
            if !on {
                return Ok(None);
            }
            Ok(Some([normal(names[0], shapes[0])?, normal(names[1], shapes[1])?]))
        };
        let temperature = match plan.temperature {
            Temperature::Fixed(_) => None,
            Temperature::Learned(start) => Some(LearnedTemperature {
                scale: per_head("scale", start)?,
                unit: Tensor::full([1], (dim_qk as f64).powf(-0.5), store.dtype(), store.device())?,
            }),
        };
        // The gate starts almost open, whatever it sees.
        let gate = (Init::Constant(0.0), Some(Init::Constant(1.0)));
        let gate = || Linear::with_init(&store.at("to_v_gate"), plan.dim, width, gate.0, gate.1);
        let (out_place, out_width) = if plan.on_attn { ("to_out.0", 2 * plan.dim) } else { ("to_out", plan.dim) };
        let kv_heads = plan.kv_heads;
        let memory: [&[usize]; 2] = [&[kv_heads, plan.num_mem_kv, dim_qk], &[kv_heads, plan.num_mem_kv, plan.dim_head]];
        let mixing: [&[usize]; 2] = [&[heads, heads], &[heads, heads]];
        Ok(Self {
            to_q: biased("to_q", q_width)?,
            to_k: biased("to_k", k_width)?,
            to_v: biased("to_v", kv_width)?,
            to_out: Linear::output(&store.at(out_place), width, out_width, plan.out_bias, plan.zero_init)?,
            to_v_gate: plan.gate_values.then(gate).transpose()?,
            collab_mixing: plan.shared.map(|shared| normal("collab_mixing", &[heads, shared])).transpose()?,
            temperature,
            memory: pair(plan.num_mem_kv > 0, ["mem_k", "mem_v"], memory)?,
            talking: pair(plan.talking_heads, ["pre_softmax_proj", "post_softmax_proj"], mixing)?,
            head_scale: plan.head_scale.then(|| per_head("head_scale_params", 1.0)).transpose()?,
            rotary: rotary.cloned(),
            plan: Arc::new(plan.clone()),
        })
    }

    /// Its linear layers.
    pub(super) fn linears_mut(&mut self) -> impl Iterator<Item = &mut Linear> {
        let always = [&mut self.to_q, &mut self.to_k, &mut self.to_v, &mut self.to_out];
        always.into_iter().chain(self.to_v_gate.as_mut())
    }

    /// `[b, i, dim] → [b, i, dim]`.
    ///
    /// Errors: shapes that do not fit.
    pub fn forward(&self, x: &Tensor, input: &AttentionInput) -> Result<AttentionOutput> {
        let operands = self.operands(x, input)?;
        self.attend(x, &operands, input)
    }

    /// As [`Attention::forward`] for the next positions of sequences whose keys and values are in the cache, where those
    /// of these positions join them.
    pub(super) fn extend(
        &self,
        x: &Tensor,
        input: &AttentionInput,
        cache: &mut AttentionCache,
        tables: &Tables,
        step: &DecodeStep,
    ) -> Result<AttentionOutput> {
        if step.first {
            let operands = self.operands(x, input)?;
            let [_, k, v] = &operands;
            if input.context.is_some() {
                cache.keys_values = Some([k.contiguous()?, v.contiguous()?]);
            } else {
                let memories = input.mem.as_ref().map_or(Ok(0), |mem| mem.dim(1))?;
                cache.memories = memories;
                cache.prefix_len = memories + self.plan.num_mem_kv;
                cache.bias_by_distance =
                    self.bias_by_distance(tables.bias.as_ref(), cache.prefix_len, step.capacity, x.dtype())?;
                cache.write(&self.shared_once(k)?, v, step)?;
            }
            return self.attend(x, &operands, input);
        }
        if input.context.is_some() {
            let Some([k, v]) = &cache.keys_values else { return Err(Error::argument("cache", "is empty")) };
            let q = self.scale_queries(self.queries(&self.to_q.forward(x).context("to_q")?)?)?;
            return self.attend(x, &[q, k.clone(), v.clone()], input);
        }
        let [q, k, v] = self.new_operands(x, cache, tables, step)?;
        cache.write(&k, &v, step)?;
        drop((k, v));
        let Some([k, v]) = &cache.keys_values else { return Err(Error::argument("cache", "is empty")) };
        let why = self.plan.needs_scores().is_some() || input.explicit || input.prev.is_some();
        let (out, scores) = if why {
            let keys = step.keys(cache.prefix_len);
            let bias =
                cache.bias_by_distance.as_ref().map(|bias| step.bias(bias, cache.prefix_len, q.dtype())).transpose()?;
            let keep = step.keep(cache.prefix_len, self.plan.num_mem_kv, self.plan.max_attend_past)?;
            let [k, v] = [self.all_heads(&k.narrow(2, 0, keys)?)?, v.narrow(2, 0, keys)?];
            let (out, scores, _) = self.explicit([&q, &k, &v], input, bias, Some(keep))?;
            (out, scores)
        } else {
            if let Some(keys) = step.chunk(cache) {
                // Many rows at once: blocks of keys serve blocks of queries.
                let [k, v] = [self.all_heads(&k.narrow(2, 0, keys)?)?, v.narrow(2, 0, keys)?];
                let out = self.fused(&q, &k, &v, &AttentionInput::default())?;
                return self.merge(x, out, None, None);
            }
            let spec = DecodeSpec {
                scale: self.scale(),
                prefix_len: cache.prefix_len,
                mem_keys: self.plan.num_mem_kv,
                max_attend_past: self.plan.max_attend_past,
                key_mask: step.whole_mask.as_ref(),
                query_mask: step.mask.as_ref(),
                bias_by_distance: cache.bias_by_distance.as_ref(),
            };
            (attention_decode(&q, &self.all_heads(k)?, v, &step.device_lengths, &spec)?, None)
        };
        self.merge(x, out, scores, None)
    }

    /// What enters the scores: queries `[b, heads, i, d]`, keys and values of `j` positions.
    fn operands(&self, x: &Tensor, input: &AttentionInput) -> Result<[Tensor; 3]> {
        let [q, k, v] = self.project(x, input)?;
        let [q, k, v] = self.rotate(q, k, v)?;
        let [k, v] = self.prepend_memory(k, v)?;
        Ok([self.scale_queries(q)?, self.normalize_length(k)?, v])
    }

    /// The operands of new positions alone. Keys that all heads share are there once.
    fn new_operands(
        &self,
        x: &Tensor,
        cache: &AttentionCache,
        tables: &Tables,
        step: &DecodeStep,
    ) -> Result<[Tensor; 3]> {
        let infused = match &tables.sinusoids {
            Some(sinusoids) => {
                let positions = step.positions(cache.memories, sinusoids.dim(0)?)?;
                x.add(&sinusoids.embedding(&positions)?)?
            }
            None => x.clone(),
        };
        let q = self.to_q.forward(&infused).context("to_q")?;
        let k = self.to_k.forward(&infused).context("to_k")?;
        let mut v = self.split_heads(&self.to_v.forward(x).context("to_v")?)?;
        let mut k = if self.plan.shared.is_some() { k.unsqueeze(1)? } else { self.split_heads(&k)? };
        let mut q = self.queries(&q)?.detach();
        (k, v) = (k.detach(), v.detach());
        if let (Some(table), Some(plan)) = (&tables.rotary, &self.plan.rotary) {
            let rotate = |x: &Tensor| x.rotate_rows(table, &step.device_lengths, cache.memories);
            (q, k) = (rotate(&self.pairs_as_halves(q)?)?, rotate(&self.pairs_as_halves(k)?)?);
            v = if plan.values { rotate(&v)? } else { v };
        }
        let k = self.normalize_length(k)?;
        let k = if self.plan.num_mem_kv > 0 { self.all_heads(&k)? } else { k };
        // A tape may be there; what goes through a cache has no gradient.
        Ok([self.scale_queries(q)?.detach(), k.detach(), v.detach()])
    }

    /// The position bias by distance, `[heads, distances]`, for keys with so many in front.
    fn bias_by_distance(
        &self,
        bias: Option<&ScoreBias>,
        prefix_len: usize,
        capacity: usize,
        dtype: DType,
    ) -> Result<Option<Tensor>> {
        bias.map(|bias| bias.bias_by_distance(prefix_len, prefix_len + capacity, dtype.accumulator())).transpose()
    }

    /// Keys that all heads share, once, unless memory keys tell the heads apart.
    fn shared_once(&self, k: &Tensor) -> Result<Tensor> {
        if self.plan.shared.is_some() && self.plan.num_mem_kv == 0 { k.narrow(1, 0, 1) } else { Ok(k.clone()) }
    }

    /// Keys that all heads share, for each of them.
    fn all_heads(&self, k: &Tensor) -> Result<Tensor> {
        if self.plan.shared.is_none() || k.dim(1)? == self.plan.heads {
            return Ok(k.clone());
        }
        k.expand([k.dim(0)?, self.plan.heads, k.dim(2)?, k.dim(3)?])
    }

    /// Scores and weights of operands, and what follows.
    fn attend(&self, x: &Tensor, [q, k, v]: &[Tensor; 3], input: &AttentionInput) -> Result<AttentionOutput> {
        check_mask(input.attn_mask.as_ref(), q, k)?;
        let (out, scores, attn) = match self.needs_scores(q, v, input) {
            None => (self.fused(q, k, v, input)?, None, None),
            Some(_) => {
                let [queries, keys] = [q.dim(2)?, k.dim(2)?];
                let bias = input.bias.as_ref().map(|bias| bias.dense(queries, keys, q.dtype())).transpose()?;
                self.explicit([q, k, v], input, bias, self.keep(q, keys, input)?)?
            }
        };
        self.merge(x, out, scores, attn)
    }

    /// From the heads' outputs to that of the layer.
    fn merge(&self, x: &Tensor, out: Tensor, scores: Option<Tensor>, attn: Option<Tensor>) -> Result<AttentionOutput> {
        let out = match &self.head_scale {
            Some(scale) => out.mul(&scale.tensor())?,
            None => out,
        };
        let mut out = out.transpose(1, 2)?.flatten(2, 3)?;
        if let Some(gate) = &self.to_v_gate {
            out = out.mul(&gate.forward(x).context("to_v_gate")?.sigmoid()?)?;
        }
        let out = match self.plan.on_attn {
            true => self.to_out.gated(&out, Activation::Sigmoid),
            false => self.to_out.forward(&out),
        };
        let out = out.context("to_out")?;
        Ok(AttentionOutput { out, scores, attn })
    }

    /// Queries, keys and values of each head: `[b, heads, i, d]`, twice `[b, heads, j, d]`.
    fn project(&self, x: &Tensor, input: &AttentionInput) -> Result<[Tensor; 3]> {
        let source = input.context.as_ref().unwrap_or(x);
        let source = match &input.mem {
            Some(mem) => Tensor::cat(&[mem, source], 1).context("mems")?,
            None => source.clone(),
        };
        let (mut queries, mut keys) = (x.clone(), source.clone());
        if let Some(sinusoids) = &input.sinusoids {
            let (i, j) = (x.dim(1)?, source.dim(1)?);
            queries = queries.add(&sinusoids.narrow(0, j - i, i)?)?;
            keys = keys.add(&sinusoids.narrow(0, 0, j)?)?;
        }
        let q = self.to_q.forward(&queries).context("to_q")?;
        let k = self.to_k.forward(&keys).context("to_k")?;
        let v = self.to_v.forward(&source).context("to_v")?;
        let k = if self.collab_mixing.is_some() { self.all_heads(&k.unsqueeze(1)?)? } else { self.split_heads(&k)? };
        Ok([self.queries(&q)?, k, self.split_heads(&v)?])
    }

    /// Queries of each head, mixed from shared ones: `[b, n, width] → [b, heads, n, d]`.
    fn queries(&self, q: &Tensor) -> Result<Tensor> {
        match &self.collab_mixing {
            None => self.split_heads(q),
            Some(mixing) => q.unsqueeze(1)?.mul(&mixing.tensor().unsqueeze(1)?),
        }
    }

    /// `[b, n, heads · d] → [b, heads, n, d]`, keys and values having heads of their own.
    fn split_heads(&self, x: &Tensor) -> Result<Tensor> {
        let (b, n, width) = (x.dim(0)?, x.dim(1)?, x.dim(2)?);
        x.reshape([b, n, width / self.plan.dim_head, self.plan.dim_head])?.transpose(1, 2)
    }

    /// A key or value head for each head of queries: `[b, kv_heads, n, d] → [b, heads, n, d]`.
    fn repeat_heads(&self, x: &Tensor) -> Result<Tensor> {
        let (b, kv_heads, n, d) = (x.dim(0)?, x.dim(1)?, x.dim(2)?, x.dim(3)?);
        if kv_heads == self.plan.heads {
            return Ok(x.clone());
        }
        let group = self.plan.heads / kv_heads;
        x.unsqueeze(2)?.expand([b, kv_heads, group, n, d])?.reshape([b, self.plan.heads, n, d])
    }

    /// Features whose pairs are neighbours, in the order of `Tensor::rotary`, whose pairs are halves. Queries and keys
    /// alike, so that their products stay the same.
    fn pairs_as_halves(&self, x: Tensor) -> Result<Tensor> {
        let Some(plan) = self.plan.rotary.as_ref().filter(|plan| plan.interleaved) else { return Ok(x) };
        let (last, features) = (x.rank() - 1, plan.features());
        let axis = last as isize;
        let mut shape = x.shape().to_vec();
        shape[last] = features / 2;
        shape.push(2);
        let turned = x.narrow(-1, 0, features)?.reshape(&shape[..])?.transpose(-1, -2)?.flatten(axis, axis + 1)?;
        let rest = x.dim(-1)? - features;
        if rest == 0 { Ok(turned) } else { Tensor::cat(&[&turned, &x.narrow(-1, features, rest)?], axis) }
    }

    /// Keys count from 0, memories included; queries are the last of them.
    fn rotate(&self, q: Tensor, k: Tensor, v: Tensor) -> Result<[Tensor; 3]> {
        let (Some(frequencies), Some(plan)) = (&self.rotary, &self.plan.rotary) else { return Ok([q, k, v]) };
        let frequencies = &frequencies.tensor();
        let first = k.dim(2)? - q.dim(2)?;
        let v = if plan.values { v.rotary(frequencies, 0)? } else { v };
        let (q, k) = (self.pairs_as_halves(q)?, self.pairs_as_halves(k)?);
        Ok([q.rotary(frequencies, first)?, k.rotary(frequencies, 0)?, v])
    }

    /// Learned keys and values in front of the others.
    fn prepend_memory(&self, k: Tensor, v: Tensor) -> Result<[Tensor; 2]> {
        let Some([mem_k, mem_v]) = &self.memory else { return Ok([k, v]) };
        let batch = k.dim(0)?;
        let prepend = |memory: Tensor, x: &Tensor| {
            let shape = [batch, memory.dim(0)?, memory.dim(1)?, memory.dim(2)?];
            Tensor::cat(&[&memory.expand(shape)?, x], 2)
        };
        Ok([prepend(self.pairs_as_halves(mem_k.tensor())?, &k)?, prepend(mem_v.tensor(), &v)?])
    }

    /// With a learned temperature, queries are what is divided by it: there are fewer of them than of scores.
    fn scale_queries(&self, q: Tensor) -> Result<Tensor> {
        let Some(learned) = &self.temperature else { return Ok(q) };
        let scale = learned.scale.tensor().exp()?;
        let floor = Tensor::full((), 1e-2, scale.dtype(), scale.device())?;
        let low = scale.detach().lt(&floor)?;
        self.normalize_length(q)?.div(&low.where_cond(&floor, &scale)?)
    }

    /// Length 1 for every vector, if the temperature is learned; lengths below 1e-12 count as that.
    fn normalize_length(&self, x: Tensor) -> Result<Tensor> {
        match &self.temperature {
            Some(learned) => x.scale_norm(&learned.unit, 1e-12 * (self.plan.dim_qk() as f64).powf(-0.5)),
            None => Ok(x),
        }
    }

    /// Why this call needs the matrix of scores, or `None`: the fused op computes exactly this.
    fn needs_scores(&self, q: &Tensor, v: &Tensor, input: &AttentionInput) -> Option<&'static str> {
        if input.return_attn {
            return Some("the caller asked for attention maps");
        }
        if input.explicit {
            return Some("the caller asked for the explicit path");
        }
        if input.prev.is_some() {
            return Some("residual attention adds scores of the previous layer");
        }
        self.plan.needs_scores().or_else(|| ops::needs_scores(q, v))
    }

    /// Attention in blocks, without the matrix of scores.
    fn fused(&self, q: &Tensor, k: &Tensor, v: &Tensor, input: &AttentionInput) -> Result<Tensor> {
        let spec = AttentionSpec {
            scale: self.scale(),
            causal: self.plan.causal,
            mask: input.attn_mask.as_ref(),
            query_mask: input.query_mask.as_ref(),
            key_mask: input.key_mask.as_ref(),
            mem_keys: self.plan.num_mem_kv,
            max_attend_past: self.plan.max_attend_past,
            bias: None,
            position_bias: input.bias.as_ref().map_or(PositionBias::None, ScoreBias::fused),
            dropout: self.plan.dropout,
        };
        attention(q, k, v, &spec)
    }

    /// The constant factor of the logits.
    fn scale(&self) -> f64 {
        match self.plan.temperature {
            Temperature::Fixed(scale) => scale,
            Temperature::Learned(_) => 1.0,
        }
    }

    /// Attention from the matrix of scores. Gives the output, the scores to hand on, and the map.
    fn explicit(
        &self,
        [q, k, v]: [&Tensor; 3],
        input: &AttentionInput,
        bias: Option<Tensor>,
        keep: Option<Tensor>,
    ) -> Result<Explicit> {
        let (k, v) = (&self.repeat_heads(k)?, &self.repeat_heads(v)?);
        // The factor goes onto the queries, of which there are fewer than of scores.
        let mut scores = q.affine(self.scale(), 0.0)?.matmul(&k.transpose(-1, -2)?)?;
        if let Some(prev) = &input.prev {
            scores = scores.add(prev)?;
        }
        let handed_on = self.plan.residual.then(|| scores.clone());
        if let Some([before, _]) = &self.talking {
            scores = mix_heads(&scores, before)?;
        }
        if let Some(bias) = bias {
            scores = scores.add(&bias)?;
        }
        let lowest = Tensor::full((), scores.dtype().lowest(), scores.dtype(), scores.device())?;
        if let Some(keep) = keep {
            scores = keep.where_cond(&scores, &lowest)?;
        }
        if let Some(k) = self.plan.sparse_topk {
            scores = scores.detach().top_k_mask(k)?.where_cond(&scores, &lowest)?;
        }
        let mut weights = match self.plan.normalize {
            Normalize::Softmax => scores.softmax()?,
            Normalize::Entmax15 => scores.entmax15()?,
        };
        let attn = input.return_attn.then(|| weights.clone());
        weights = weights.dropout(self.plan.dropout)?;
        if let Some([_, after]) = &self.talking {
            weights = mix_heads(&weights, after)?;
        }
        Ok((weights.matmul(v)?, handed_on, attn))
    }

    /// Which scores stay; broadcasts to them. `None`: all.
    fn keep(&self, q: &Tensor, j: usize, input: &AttentionInput) -> Result<Option<Tensor>> {
        let (b, i) = (q.dim(0)?, q.dim(2)?);
        let device = q.device();
        let mut parts: Vec<Tensor> = Vec::new();
        if input.query_mask.is_some() || input.key_mask.is_some() {
            let seen = |size: usize| Tensor::ones([b, size], DType::Bool, device);
            let queries = input.query_mask.clone().map_or_else(|| seen(i), Ok)?;
            let keys = input.key_mask.clone().map_or_else(|| seen(j - self.plan.num_mem_kv), Ok)?;
            let pairs = queries.reshape([b, 1, i, 1])?.logical_and(&keys.reshape([b, 1, 1, keys.dim(1)?])?)?;
            let memory = Tensor::ones([b, 1, i, self.plan.num_mem_kv], DType::Bool, device)?;
            parts.push(Tensor::cat(&[&memory, &pairs], 3)?);
        }
        parts.extend(input.attn_mask.clone());
        // Query `q` stands at key `q + j − i`. Both sides are shifted so that neither is negative.
        let position = |first: usize, n: usize| Tensor::arange(first + n, device)?.narrow(0, first, n);
        if let Some(limit) = self.plan.max_attend_past {
            let limit = limit.min(i + j);
            parts.push(position(j, i)?.unsqueeze(1)?.le(&position(i + limit, j)?)?);
        }
        if self.plan.causal {
            parts.push(position(j, i)?.unsqueeze(1)?.ge(&position(i, j)?)?);
        }
        let mut parts = parts.into_iter();
        let Some(first) = parts.next() else { return Ok(None) };
        parts.try_fold(first, |keep, part| keep.logical_and(&part)).map(Some)
    }
}

/// Output, scores to hand on, attention map.
type Explicit = (Tensor, Option<Tensor>, Option<Tensor>);

/// `y[b, k, i, j] = Σ_h x[b, h, i, j] · mixing[h, k]` (Shazeer et al., <https://arxiv.org/abs/2003.02436>).
fn mix_heads(x: &Tensor, mixing: &Param) -> Result<Tensor> {
    mixing.tensor().transpose(0, 1)?.matmul(&x.flatten(2, 3)?)?.reshape(*x.shape())
}

/// Checks the mask of pairs against the scores that queries and keys will have.
fn check_mask(mask: Option<&Tensor>, q: &Tensor, k: &Tensor) -> Result<()> {
    let Some(mask) = mask else { return Ok(()) };
    let scores = [q.dim(0)?, q.dim(1)?, q.dim(2)?, k.dim(2)?];
    let fits = (2..=4).contains(&mask.rank())
        && mask.shape().iter().rev().zip(scores.iter().rev()).all(|(&mask, &scores)| mask == scores || mask == 1);
    ensure!(
        fits,
        Error::shape(
            "attn_mask",
            format!(
                "expected two to four dimensions that broadcast to [batch, heads, queries, keys] = {scores:?}, memories \
                 included, got {:?}",
                mask.shape()
            )
        )
    );
    ensure!(
        mask.dtype() == DType::Bool,
        Error::dtype("attn_mask", format!("expected bool, true where attention is allowed, got {}", mask.dtype()))
    );
    Ok(())
}
