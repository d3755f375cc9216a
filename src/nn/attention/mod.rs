//! Multi-head attention with all options of x-transformers.
//!
//! A call projects its operands (`projection`) and computes attention in blocks (`fused`) or from the matrix of scores
//! (`explicit`); `decode` continues sequences whose keys and values are in a cache.

mod decode;
mod explicit;
mod fused;
mod projection;

use std::sync::Arc;

use super::Linear;
use crate::{
    Buffer, DType, Error, Init, Param, ParamStore, Result, Tensor,
    config::{AttentionPlan, Temperature},
    error::{ErrorContext, ensure},
    ops::{self, Activation, PositionBias},
};
pub(super) use decode::AttentionCache;

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
    /// Scale that turns a scale norm into an l2 norm: `dim^-½`, `[1]`.
    unit: Tensor,
}

/// Inputs of attention besides the sequence; everything is optional.
#[derive(Clone, Debug, Default)]
pub struct AttentionInput {
    /// Source of keys and values, `[b, m, dim]`; the input by default.
    pub context: Option<Tensor>,
    /// Prepended unchanged to the source of keys and values, `[b, memories, dim]`.
    pub mem: Option<Tensor>,
    /// Padding mask of the queries, `[b, i]` Bool; `true` marks a real token.
    pub query_mask: Option<Tensor>,
    /// Padding mask of the keys, `[b, j]` Bool, without memory key/values; `true` marks a real token.
    pub key_mask: Option<Tensor>,
    /// Attention mask: Bool, broadcasts to `[b, heads, i, j]` including memory key/values; `true` keeps.
    pub attn_mask: Option<Tensor>,
    /// Added to the inputs of queries and keys, `[j or more, dim]`: row `k` to key `k`, the last rows of the `j` keys
    /// to the queries.
    pub sinusoids: Option<Tensor>,
    /// Added to the scores; positions count memory key/values.
    pub bias: Option<PositionBias>,
    /// Scores passed on by the previous layer, `[b, heads, i, j]`.
    pub prev: Option<Tensor>,
    /// If `true`, return the attention map.
    pub return_attn: bool,
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
}

impl Attention {
    /// Creates the planned attention. A plan with rotary embeddings needs their frequencies,
    /// [`rotary_frequencies`](super::rotary_frequencies), which the layers of a model share.
    ///
    /// Errors: an invalid plan, or rotary embeddings without frequencies.
    pub fn new(plan: &AttentionPlan, rotary: Option<&Buffer>, store: &ParamStore) -> Result<Self> {
        plan.check()?;
        ensure!(
            plan.rotary.is_none() || rotary.is_some(),
            Error::argument("attention", "the plan has rotary positions, so its frequencies are required")
        );
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
        // The gate starts almost open for any input.
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

    /// Returns the linear layers, for quantization.
    pub(super) fn linears_mut(&mut self) -> impl Iterator<Item = &mut Linear> {
        let always = [&mut self.to_q, &mut self.to_k, &mut self.to_v, &mut self.to_out];
        always.into_iter().chain(self.to_v_gate.as_mut())
    }

    /// Computes attention: `[b, i, dim] → [b, i, dim]`.
    ///
    /// Errors: shapes that do not match.
    pub fn forward(&self, x: &Tensor, input: &AttentionInput) -> Result<AttentionOutput> {
        let operands = self.operands(x, input)?;
        self.attend(x, &operands, input)
    }

    /// Computes the output for these operands, by the path that the call needs.
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

    /// Returns `Some(reason)` if this call needs the matrix of scores; otherwise the fused op computes it.
    fn needs_scores(&self, q: &Tensor, v: &Tensor, input: &AttentionInput) -> Option<&'static str> {
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
