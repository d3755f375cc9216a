//! Inputs and options of a forward pass, and their checks.

use std::collections::BTreeMap;

use crate::{
    DType, Error, Result, Tensor,
    config::{BranchPlan, LayersPlan, ScoreResidual, ValueResidual},
    error::ensure,
};

/// Inputs and options of a forward pass besides its main input. All are off by default.
///
/// ```
/// use x_transformers::prelude::*;
/// let mask = Tensor::from_slice(&[true, true, false], [1, 3], &Device::Cpu)?; // the last token is padding
/// let options = ForwardOptions { mask: Some(mask), return_embeddings: true, ..Default::default() };
/// assert!(options.context.is_none());
/// # Ok::<(), x_transformers::Error>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct ForwardOptions {
    /// Padding mask, `[b, n]` Bool; `true` marks a real token. Memories always count as real.
    pub mask: Option<Tensor>,
    /// Context of cross-attention, `[b, m, dim]`.
    pub context: Option<Tensor>,
    /// Padding mask of the context, `[b, m]` Bool; `true` marks a real position.
    pub context_mask: Option<Tensor>,
    /// Attention mask of self-attention, `true` keeps: Bool, `[i, j]`, `[heads, i, j]` or `[b, heads, i, j]`, sizes of
    /// 1 broadcast. It covers memories, memory tokens and memory key/values too.
    pub attn_mask: Option<Tensor>,
    /// Memories returned by the previous segment, one `[b, memories, dim]` per self-attention, in order.
    pub mems: Option<Vec<Tensor>>,
    /// Padding masks of the memories, `[b, memories]` Bool each; `true` marks a real one. Default: all are real.
    pub mem_masks: Option<Vec<Tensor>>,
    /// Mask of the keys of self-attention, in place of `mask`, `[b, j]` Bool; `true` keeps.
    pub self_attn_kv_mask: Option<Tensor>,
    /// Added to the scores of self-attention, `[heads, i, j]` or another shape that broadcasts to `[b, heads, i, j]`.
    pub attn_bias: Option<Tensor>,
    /// Condition of adaptive norms and scales, `[b, dim_condition]` or `[b, n, dim_condition]`.
    pub condition: Option<Tensor>,
    /// Positions of the tokens, I64 `[n]` or `[b, n]`; or, for a model with a table of positions, floats that take the
    /// place of its vectors.
    pub pos: Option<Tensor>,
    /// Positions of the context, I64 `[m]` or `[b, m]`: cross-attention turns queries and keys too.
    pub context_pos: Option<Tensor>,
    /// Number of padded positions before the tokens of each row, `[b]` I64: these are no keys, and absolute positions
    /// count from the first token.
    pub seq_start_pos: Option<Tensor>,
    /// Number of first positions that all queries see, `[b]` or `[1]` I64, for a `PrefixDecoder`.
    pub prefix_attn_len: Option<Tensor>,
    /// Embeddings before those of the tokens, `[b, p, emb_dim]`.
    pub prepend_embeds: Option<Tensor>,
    /// Padding mask of `prepend_embeds`, `[b, p]` Bool; `true` marks a real one.
    pub prepend_mask: Option<Tensor>,
    /// If `true`, the output leaves out the positions of `prepend_embeds`.
    pub excise_prepend_embeds: bool,
    /// Added to the embeddings, broadcasts to `[b, n, emb_dim]`.
    pub sum_embeds: Option<Tensor>,
    /// Ids of each additional table of embeddings, `[b, n]` I64, by its name.
    pub embed_ids: BTreeMap<String, Tensor>,
    /// Number of tokens of each row, `[b]` I64, in place of a mask.
    pub lens: Option<Tensor>,
    /// Numbers of the numerical tokens, `[b, n]`; those of other tokens are ignored.
    pub numbers: Option<Tensor>,
    /// Numbers of the sublayers in the order in which this call runs them, some several times. Default: that of the
    /// plan.
    pub layers_execute_order: Option<Vec<usize>>,
    /// Number of passes through the layers of a model with `recycling`. Default: drawn in training, else the
    /// largest number of the plan.
    pub recycle_steps: Option<usize>,
    /// Number of passes through the layers of a model with `looped`. Default: that of the plan.
    pub looped_steps: Option<usize>,
    /// Factor of the z-loss of the scores of attention. Default 1e-4.
    pub attn_z_loss_weight: Option<f64>,
    /// If `true`, return the embeddings beside the logits.
    pub return_logits_and_embeddings: bool,
    /// If `true`, return the scores of all attentions after their masks.
    pub return_scores: bool,
    /// If `true`, gradients pass from new memories to the call that they come from.
    pub attached_mems: bool,
    /// Type of each token, `[b, n]` I64, for models with `num_token_types`. Default: all 0.
    pub token_types: Option<Tensor>,
    /// If `true`, return the normed hidden states instead of logits.
    pub return_embeddings: bool,
    /// If `true`, return new memories.
    pub return_mems: bool,
    /// If `true`, return the attention maps, `[b, heads, i, j]`, of self- and cross-attention in the order of the
    /// layers.
    pub return_attn: bool,
    /// If `true`, keep only the inputs of sublayers for the backward pass, which reruns each sublayer (activation
    /// checkpointing).
    pub checkpoint_layers: bool,
    /// If `true`, compute every attention from its matrix of scores, even where the fused op would suffice. For
    /// comparisons.
    pub explicit_attention: bool,
}

impl ForwardOptions {
    /// Returns an error if attention maps, embeddings or memories are requested from a call that only returns a loss or
    /// generated tokens.
    pub(crate) fn check_output_only(&self, op: &'static str) -> Result<()> {
        let asked = [
            ("return_embeddings", self.return_embeddings),
            ("return_mems", self.return_mems),
            ("return_attn", self.return_attn),
        ];
        match asked.into_iter().find(|(_, asked)| *asked) {
            Some((name, _)) => Err(Error::argument(
                op,
                format_args!("`{name}` is not supported here; call `forward` of the wrapped model"),
            )),
            None => Ok(()),
        }
    }

    /// Checks the options against an input and the layers.
    pub(super) fn check(&self, x: &Tensor, plan: &LayersPlan) -> Result<()> {
        const OP: &str = "attention layers";
        let dim = plan.dim;
        ensure!(
            x.rank() == 3 && x.shape()[2] == dim && x.dtype().is_float(),
            Error::shape(
                OP,
                format_args!("expected a float tensor [batch, n, {dim}], got {:?} {}", x.shape(), x.dtype())
            )
        );
        let (b, n) = (x.shape()[0], x.shape()[1]);
        check_mask("mask", self.mask.as_ref(), b, n)?;
        match (&self.context, plan.cross_attend) {
            (None, true) => return Err(Error::argument("context", "missing: the layers have cross-attention")),
            (Some(_), false) => {
                return Err(Error::argument("context", "requires layers with cross-attention"));
            }
            (None, false) => ensure!(
                self.context_mask.is_none(),
                Error::argument("context_mask", "requires layers with cross-attention")
            ),
            (Some(context), true) => {
                let shape = context.shape();
                let mut cross = plan.layers.iter().filter_map(|layer| match &layer.branch {
                    BranchPlan::CrossAttention(plan) => Some(plan.dim_context),
                    _ => None,
                });
                let width = cross.next().unwrap_or(dim);
                ensure!(
                    context.rank() == 3 && shape[0] == b && shape[2] == width && context.dtype() == x.dtype(),
                    Error::shape(
                        "context",
                        format_args!(
                            "expected [{b}, length, {width}] {}, got {shape:?} {}",
                            x.dtype(),
                            context.dtype()
                        )
                    )
                );
                check_mask("context_mask", self.context_mask.as_ref(), b, shape[1])?;
            }
        }
        self.check_mems(x, plan)?;
        let scores = plan
            .layers
            .iter()
            .filter_map(|layer| layer.branch.attention())
            .any(|plan| plan.residual != ScoreResidual::None || plan.value_residual != ValueResidual::None);
        ensure!(
            !(self.checkpoint_layers && (scores || self.return_attn)),
            Error::argument(
                "checkpoint_layers",
                "cannot be used with `residual_attn`, `cross_residual_attn` or `return_attn`, which need the layers' \
                 scores"
            )
        );
        let own = plan.self_attentions() > 0;
        ensure!(own || self.attn_mask.is_none(), Error::argument("attn_mask", "requires layers with self-attention"));
        Ok(())
    }

    fn check_mems(&self, x: &Tensor, plan: &LayersPlan) -> Result<()> {
        let Some(mems) = &self.mems else { return Ok(()) };
        let (expected, b, dim) = (plan.self_attentions(), x.shape()[0], plan.dim);
        ensure!(
            mems.len() == expected,
            Error::argument(
                "mems",
                format_args!("expected {expected}, one per self-attention layer, got {}", mems.len())
            )
        );
        let fits =
            |mem: &Tensor| mem.rank() == 3 && mem.shape()[0] == b && mem.shape()[2] == dim && mem.dtype() == x.dtype();
        match mems.iter().find(|mem| !fits(mem)) {
            Some(mem) => Err(Error::shape(
                "mems",
                format_args!("expected [{b}, memories, {dim}] {}, got {:?} {}", x.dtype(), mem.shape(), mem.dtype()),
            )),
            None => Ok(()),
        }
    }
}

fn check_mask(name: &'static str, mask: Option<&Tensor>, b: usize, n: usize) -> Result<()> {
    let Some(mask) = mask else { return Ok(()) };
    ensure!(
        **mask.shape() == [b, n],
        Error::shape(name, format_args!("expected [{b}, {n}], one value per token, got {:?}", mask.shape()))
    );
    ensure!(
        mask.dtype() == DType::Bool,
        Error::dtype(name, format_args!("expected bool (true marks a real token), got {}", mask.dtype()))
    );
    Ok(())
}
