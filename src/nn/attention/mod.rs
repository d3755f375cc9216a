//! Multi-head attention with all options of x-transformers.
//!
//! A call projects its operands (`projection`) and computes attention in blocks (`fused`) or from the matrix of scores
//! (`explicit`); `decode` continues sequences whose keys and values are in a cache.

mod content;
mod decode;
mod explicit;
mod fused;
mod gates;
mod joint;
mod padding;
mod projection;

use std::sync::Arc;

use super::{Linear, PolarTurn, Rotation, Turn};
use crate::{
    DType, Error, Init, Param, ParamStore, Result, Tensor,
    collect::CollectVec,
    config::{AttentionPlan, TalkingHeads, Temperature, ValueGate, ValueResidual},
    error::{ErrorContext, ensure},
    ops::{self, Activation, PositionBias},
};
use content::ContentBias;
pub(crate) use content::log_sigmoid;
pub(super) use decode::AttentionCache;
use gates::Gate;
pub(super) use padding::causal_mask;

/// Scaled dot-product attention of several heads (Vaswani et al., <https://arxiv.org/abs/1706.03762>).
///
/// One fused op computes the scores in blocks, unless an option needs the whole matrix of scores: see
/// [`AttentionPlan::needs_scores`] and [`gpu_needs_scores`](crate::ops::gpu_needs_scores). Both paths compute the same
/// function.
#[derive(Clone, Debug)]
#[doc(alias = "MultiheadAttention")]
#[doc(alias = "MHA")]
#[doc(alias = "GQA")]
pub struct Attention {
    plan: Arc<AttentionPlan>,
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    to_out: Option<Linear>,
    to_v_gate: Option<Gate>,
    to_output_gate: Option<Gate>,
    /// To the vectors that queries, and keys and values, are projected from.
    to_latents: [Option<Linear>; 2],
    /// Keys of the last heads, from the input.
    to_rotateable_k: Option<Linear>,
    content: ContentBias,
    to_v_head_gate: Option<Linear>,
    to_value_residual_mix: Option<Linear>,
    collab_mixing: Option<Param>,
    temperature: Option<LearnedTemperature>,
    /// Learned scales of normed queries and keys, `[heads, 1, d]`.
    qk_scales: Option<[Param; 2]>,
    /// Scales of the RMS norms of queries, keys and values, `[heads, 1, d]`; stored minus 1.
    rms_gammas: [Option<Param>; 3],
    memory: Option<[Param; 2]>,
    /// Mixtures of scores across heads, before and after the softmax.
    talking: [Option<Param>; 2],
    /// Mixture of scores across heads that multiplies weights.
    pre_scale: Option<Param>,
    /// Learned score of each head, `[heads]`.
    sink: Option<Param>,
    head_scale: Option<Param>,
    rotary: Option<Rotation>,
}

/// Cosine attention: queries and keys of length 1, logits divided by `max(exp(scale), 1e-2)`.
#[derive(Clone, Debug)]
struct LearnedTemperature {
    /// `[1, heads, 1, 1]`
    scale: Param,
    /// Scale that turns a scale norm into an l2 norm: `dim^-½`, `[1]`.
    unit: Tensor,
}

/// Inputs of attention besides the sequence; everything is optional.
#[derive(Clone, Debug, Default)]
pub struct AttentionInput {
    /// Source of keys and values, `[b, m, dim]`; the input by default.
    pub context: Option<Tensor>,
    /// Inputs of the branch before its norm, in place of the stream's: one, or those of queries, keys and values.
    pub branch_inputs: Vec<Tensor>,
    /// Sources of keys and of values other than the input, `[b, n, dim]`.
    pub sources: Option<[Tensor; 2]>,
    /// Prepended unchanged to the source of keys and values, `[b, memories, dim]`.
    pub mem: Option<Tensor>,
    /// Condition of the norms and scales around the branch, `[b, 1 or n, dim_condition]`.
    pub condition: Option<Tensor>,
    /// Padding mask of the queries, `[b, i]` Bool; `true` marks a real token.
    pub query_mask: Option<Tensor>,
    /// Padding mask of the keys, `[b, j]` Bool, without memory key/values; `true` marks a real token.
    pub key_mask: Option<Tensor>,
    /// Attention mask: Bool, broadcasts to `[b, heads, i, j]` including memory key/values; `true` keeps.
    pub attn_mask: Option<Tensor>,
    /// Added to the inputs of queries and keys, `[j or more, dim]`: row `k` to key `k`, the last rows of the `j` keys
    /// to the queries.
    pub sinusoids: Option<Tensor>,
    /// Added to the scores, except those of memory key/values if the plan does not count them.
    pub bias: Option<PositionBias>,
    /// Added to the scores, broadcasts to `[b, heads, i, j]` without memory key/values, whose bias is 0.
    pub dense_bias: Option<Tensor>,
    /// If `true`, `key_mask` may leave no key at all to padding's plan.
    pub keys_may_be_empty: bool,
    /// Values of the first attention of this kind, `[b, kv_heads, j, d]`, which the plan mixes into its own.
    pub value_residual: Option<Tensor>,
    /// Turns of queries and keys at explicit positions, in place of counted ones.
    pub turns: Option<[Turn; 2]>,
    /// Scores passed on by the previous layer, `[b, heads, i, j]`.
    pub prev: Option<Tensor>,
    /// Turns of polar positions.
    pub polar: Option<PolarTurn>,
    /// If `true`, return the attention map.
    pub return_attn: bool,
    /// If `true`, return the masked scores.
    pub return_scores: bool,
    /// If `true`, compute the matrix of scores even if the fused op would suffice.
    pub explicit: bool,
}

/// Output of attention.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct AttentionOutput {
    /// `[b, i, dim]`
    pub out: Tensor,
    /// Scores for the next layer, if the plan passes them on: `[b, heads, i, j]`.
    pub scores: Option<Tensor>,
    /// Weights after the softmax, if requested: `[b, heads, i, j]`.
    pub attn: Option<Tensor>,
    /// Values as projected, `[b, kv_heads, j, d]`.
    pub values: Option<Tensor>,
}

impl Attention {
    /// Creates the planned attention. A plan with rotary embeddings needs their [`Rotation`], which the layers of a
    /// model share.
    ///
    /// Errors: an invalid plan, or rotary embeddings without a rotation.
    pub fn new(plan: &AttentionPlan, rotary: Option<&Rotation>, store: &ParamStore) -> Result<Self> {
        plan.check()?;
        ensure!(
            plan.rotary.is_none() || rotary.is_some(),
            Error::argument("attention", "the plan has rotary positions, so its frequencies are required")
        );
        let (heads, dim_qk) = (plan.heads, plan.dim_qk());
        let width = heads * plan.dim_value;
        let (q_width, k_width) = (heads * plan.dim_head, plan.kv_heads * plan.dim_head);
        let (q_width, k_width) = (plan.shared.unwrap_or(q_width), plan.shared.unwrap_or(k_width));
        let kv_width = plan.kv_heads * plan.dim_value;
        let linear =
            |name: &str, dim: usize, width: usize| Linear::maybe_biased(&store.at(name), dim, width, plan.qkv_bias);
        let normal = |name: &str, shape: &[usize]| store.param(name, shape, Init::Normal(1.0));
        let per_head = |name: &str, start: f64| store.param(name, [1, heads, 1, 1], Init::Constant(start));
        let temperature = match plan.temperature {
            Temperature::Fixed(_) => None,
            Temperature::Learned(start) => Some(LearnedTemperature {
                scale: per_head("scale", start)?,
                unit: Tensor::full([1], (dim_qk as f64).powf(-0.5), store.dtype(), store.device())?,
            }),
        };
        let gate = |init: Init, bias: Option<Init>| {
            Gate::new(&store.at("to_v_gate"), [plan.dim, width, heads], plan.gate_form, init, bias).map(Some)
        };
        let output_gate =
            |form| Gate::new(&store.at("to_output_gate"), [width, width, heads], form, Init::Constant(0.0), None);
        let latent = |name: &str, dim: usize, width: Option<usize>| {
            width.map(|width| Linear::without_bias(&store.at(name), dim, width)).transpose()
        };
        let (q_source, kv_source) = (plan.latent_q.unwrap_or(plan.dim), plan.latent_kv.unwrap_or(plan.dim_context));
        let rope_width = plan.latent_rope * plan.dim_head;
        let rotating_k = || Linear::without_bias(&store.at("to_rotateable_k"), plan.dim_context, rope_width);
        let pre_scale = || identity(&store.at("attend.pre_scale_post_talking_heads"), heads);
        let (closed, open) = (Init::Constant(0.0), Init::Constant(1.0));
        let to_v_gate = match plan.gate_values {
            ValueGate::None => None,
            // Starts almost open for any input.
            ValueGate::Biased => gate(closed, Some(open))?,
            ValueGate::Sigmoid | ValueGate::Silu => gate(closed, None)?,
        };
        let head_gate =
            || Linear::with_init(&store.at("to_v_head_gate"), plan.dim, heads, closed, Some(Init::Constant(10.0)));
        let mixes_values = plan.value_residual == ValueResidual::Learned;
        let value_mix = || Linear::new(&store.at("to_value_residual_mix").at(0), plan.dim, heads);
        let (out_place, out_width) = if plan.on_attn { ("to_out.0", 2 * plan.dim) } else { ("to_out", plan.dim) };
        let to_out = || {
            let (zero, depth) = (plan.zero_init, plan.output_depth.filter(|_| !plan.on_attn));
            Linear::output_at(&store.at(out_place), [width, out_width], plan.out_bias, zero, depth)
        };
        let kv_heads = plan.kv_heads;
        let memory = || -> Result<[Param; 2]> {
            Ok([
                normal("mem_k", &[kv_heads, plan.num_mem_kv, dim_qk])?,
                normal("mem_v", &[kv_heads, plan.num_mem_kv, plan.dim_value])?,
            ])
        };
        let talking = match plan.talking_heads {
            TalkingHeads::None => [None, None],
            TalkingHeads::Matrices => ["pre_softmax_proj", "post_softmax_proj"]
                .map(|name| normal(name, &[heads, heads]).map(Some))
                .into_iter()
                .try_collect_vec()?
                .try_into()
                .unwrap_or_default(),
            TalkingHeads::Convolutions([pre, post]) => [
                pre.then(|| identity(&store.at("attend.pre_softmax_talking_heads"), heads)).transpose()?,
                post.then(|| identity(&store.at("attend.post_softmax_talking_heads"), heads)).transpose()?,
            ],
        };
        let scales = plan.qk_norm.is_some_and(|norm| norm.scales);
        let qk_scale = |name: &str, heads: usize| {
            store.param(name, [heads, 1, plan.dim_head], Init::Constant((plan.dim_head as f64).powf(0.25)))
        };
        let qk_scales = || -> Result<[Param; 2]> {
            Ok([qk_scale("qk_norm_q_scale", heads)?, qk_scale("qk_norm_k_scale", kv_heads)?])
        };
        let gamma = |at: usize, name: &str, heads: usize, dim: usize| {
            plan.rms_norms[at].then(|| store.at(name).param("gamma", [heads, 1, dim], closed)).transpose()
        };
        Ok(Self {
            to_q: linear("to_q", q_source, q_width)?,
            to_k: linear("to_k", kv_source, k_width - rope_width)?,
            to_v: linear("to_v", kv_source, kv_width)?,
            to_latents: [
                latent("to_latent_q", plan.dim, plan.latent_q)?,
                latent("to_latent_kv", plan.dim_context, plan.latent_kv)?,
            ],
            to_rotateable_k: (plan.latent_rope > 0).then(rotating_k).transpose()?,
            content: ContentBias::new(plan, store)?,
            to_output_gate: plan.output_gate.map(output_gate).transpose()?,
            pre_scale: plan.pre_scale.then(pre_scale).transpose()?,
            to_out: plan.project_out.then(to_out).transpose()?,
            to_v_gate,
            to_v_head_gate: plan.gate_heads.then(head_gate).transpose()?,
            to_value_residual_mix: mixes_values.then(value_mix).transpose()?,
            collab_mixing: plan.shared.map(|shared| normal("collab_mixing", &[heads, shared])).transpose()?,
            temperature,
            qk_scales: scales.then(qk_scales).transpose()?,
            rms_gammas: [
                gamma(0, "q_rmsnorm", heads, plan.dim_head)?,
                gamma(1, "k_rmsnorm", kv_heads, plan.dim_head)?,
                gamma(2, "value_rmsnorm", heads, plan.dim_value)?,
            ],
            memory: (plan.num_mem_kv > 0).then(memory).transpose()?,
            talking,
            sink: plan.sink.then(|| store.at("attend").param("head_attn_sink", [heads], closed)).transpose()?,
            head_scale: plan.head_scale.then(|| per_head("head_scale_params", 1.0)).transpose()?,
            rotary: rotary.cloned(),
            plan: Arc::new(plan.clone()),
        })
    }

    /// Returns the linear layers, for quantization.
    pub(super) fn linears_mut(&mut self) -> impl Iterator<Item = &mut Linear> {
        let always = [&mut self.to_q, &mut self.to_k, &mut self.to_v];
        let gates = [&mut self.to_v_gate, &mut self.to_output_gate].into_iter().flatten().flat_map(Gate::linears_mut);
        let latents = self.to_latents.iter_mut().flatten().chain(&mut self.to_rotateable_k);
        always.into_iter().chain(self.to_out.as_mut()).chain(gates).chain(latents)
    }

    /// Computes attention: `[b, i, dim] → [b, i, dim]`.
    ///
    /// Errors: shapes that do not match.
    pub fn forward(&self, x: &Tensor, input: &AttentionInput) -> Result<AttentionOutput> {
        let (operands, values) = self.operands(x, input)?;
        let input = &*self.with_content_bias(x, operands[1].dim(2)? - self.plan.prefix_len(), input)?;
        Ok(AttentionOutput { values, ..self.attend(x, &operands, input)? })
    }

    /// Computes the output for these operands, by the path that the call needs.
    fn attend(&self, x: &Tensor, [q, k, v]: &[Tensor; 3], input: &AttentionInput) -> Result<AttentionOutput> {
        let input = &*self.with_zero_key(input)?;
        check_mask(input.attn_mask.as_ref(), q, k)?;
        let empty = self.empty_rows(q, k, input)?;
        let (mut out, scores, attn) = match self.needs_scores(q, v, input) {
            None => (self.fused(q, k, v, input)?, None, None),
            Some(_) => {
                let [queries, keys] = [q.dim(2)?, k.dim(2)?];
                let bias = match &input.bias {
                    Some(bias) => {
                        let unbiased = self.unbiased_keys();
                        Some(padding::zeros_first(&bias.dense(queries, keys - unbiased, q.dtype())?, unbiased)?)
                    }
                    None => self.dense_bias(input)?,
                };
                self.explicit([q, k, v], input, bias, self.keep(q, keys, input)?)?
            }
        };
        if let Some(empty) = &empty {
            out = out.masked_fill(empty, 0.0)?;
        }
        self.merge(x, out, scores, attn, input)
    }

    /// Returns `Some(reason)` if this call needs the matrix of scores; otherwise the fused op computes it.
    fn needs_scores(&self, q: &Tensor, v: &Tensor, input: &AttentionInput) -> Option<&'static str> {
        if input.return_scores {
            return Some("the caller asked for scores");
        }
        if input.return_attn {
            return Some("the caller requested attention maps");
        }
        if input.explicit {
            return Some("the caller requested the explicit path");
        }
        if input.prev.is_some() {
            return Some("residual attention adds scores of the previous layer");
        }
        self.plan.needs_scores().or_else(|| ops::needs_scores(q, v))
    }

    /// Merges the heads' outputs into that of the layer.
    fn merge(
        &self,
        x: &Tensor,
        out: Tensor,
        scores: Option<Tensor>,
        attn: Option<Tensor>,
        input: &AttentionInput,
    ) -> Result<AttentionOutput> {
        let mut out = match self.plan.laser {
            Some(_) => floored(&out, 1e-20)?.ln()?,
            None => out,
        };
        if let Some(scale) = &self.head_scale {
            out = out.mul(&scale.tensor())?;
        }
        if let Some(gate) = &self.to_v_head_gate {
            let gate = gate.forward(x).context("to_v_head_gate")?.sigmoid()?;
            out = out.mul(&gate.transpose(1, 2)?.unsqueeze(-1)?)?;
        }
        let mut out = out.transpose(1, 2)?.flatten(2, 3)?;
        out = self.gated(x, out)?;
        if let Some(to_out) = &self.to_out {
            out = match self.plan.on_attn {
                true => to_out.gated(&out, Activation::Sigmoid),
                false => to_out.forward(&out),
            }
            .context("to_out")?;
        }
        out = out.dropout(self.plan.sublayer_dropout)?;
        let out = self.without_padding(out, input)?;
        Ok(AttentionOutput { out, scores, attn, values: None })
    }
}

/// Creates a convolution `[heads, heads, 1, 1]` that starts as the identity.
fn identity(store: &ParamStore, heads: usize) -> Result<Param> {
    let shape = [heads, heads, 1, 1];
    let weight = store.param("weight", shape, Init::Constant(0.0))?;
    let one = |index: usize| f64::from(u8::from(index / heads == index % heads));
    weight.set(Tensor::generate(shape, store.dtype(), store.device(), one)?)?;
    Ok(weight)
}

/// Replaces elements below a bound by it, without gradient.
fn floored(x: &Tensor, least: f64) -> Result<Tensor> {
    let bound = Tensor::full((), least, x.dtype(), x.device())?;
    x.detach().lt(&bound)?.where_cond(&bound, x)
}

/// Computes `bound · tanh(x / bound)`.
pub(super) fn soft_clamp(x: &Tensor, bound: f64) -> Result<Tensor> {
    x.affine(1.0 / bound, 0.0)?.tanh()?.affine(bound, 0.0)
}

/// Checks the attention mask against the shape of the scores.
fn check_mask(mask: Option<&Tensor>, q: &Tensor, k: &Tensor) -> Result<()> {
    let Some(mask) = mask else { return Ok(()) };
    let scores = [q.dim(0)?, q.dim(1)?, q.dim(2)?, k.dim(2)?];
    let fits = (2..=4).contains(&mask.rank())
        && mask.shape().iter().rev().zip(scores.iter().rev()).all(|(&mask, &scores)| mask == scores || mask == 1);
    ensure!(
        fits,
        Error::shape(
            "attn_mask",
            format_args!(
                "expected two to four dimensions that broadcast to [batch, heads, queries, keys] = {scores:?}, memories \
                 included, got {:?}",
                mask.shape()
            )
        )
    );
    ensure!(
        mask.dtype() == DType::Bool,
        Error::dtype("attn_mask", format_args!("expected bool, true where attention is allowed, got {}", mask.dtype()))
    );
    Ok(())
}
