//! What a model costs: floating-point operations and saved activations, from its plan.
//!
//! Counted are matrix products and attention, a multiplication and an addition each; norms, activations and sums are
//! below two percent of that for any width worth training. Causal attention is counted as the half that is computed.

use x_transformers::config::{AttentionPath, AttentionPlan, BranchPlan, FeedForwardPlan, LayerPlan, LayersPlan};

/// Sequences that are computed at once.
#[derive(Clone, Copy)]
pub struct Batch {
    /// How many.
    pub rows: usize,
    /// Their length.
    pub tokens: usize,
    /// The length of the context that cross-attention looks at.
    pub context: usize,
}

/// Totals of a part of a model.
#[derive(Clone, Copy, Default, PartialEq, Debug)]
pub struct Cost {
    /// Operations of the forward pass.
    pub forward: f64,
    /// Operations of the backward pass.
    pub backward: f64,
    /// Elements that the forward pass keeps for the backward pass.
    pub saved: f64,
}

impl Cost {
    /// Operations of a training step.
    pub fn training(&self) -> f64 {
        self.forward + self.backward
    }

    /// Adds another part.
    pub fn add(&mut self, other: Self) {
        self.forward += other.forward;
        self.backward += other.backward;
        self.saved += other.saved;
    }
}

/// The cost of attention layers.
pub fn layers(plan: &LayersPlan, batch: Batch) -> Cost {
    let mut cost = Cost::default();
    for layer in &plan.layers {
        cost.add(sublayer(layer, plan.dim, batch));
    }
    cost
}

/// A linear layer applied to `rows` vectors; the backward pass makes two products of the same size.
pub fn linear(rows: usize, inputs: usize, outputs: usize) -> Cost {
    let forward = 2.0 * rows as f64 * inputs as f64 * outputs as f64;
    Cost { forward, backward: 2.0 * forward, saved: 0.0 }
}

fn sublayer(layer: &LayerPlan, dim: usize, batch: Batch) -> Cost {
    let rows = batch.rows * batch.tokens;
    let mut cost = match &layer.branch {
        BranchPlan::SelfAttention(plan) => attention(plan, batch, batch.tokens),
        BranchPlan::CrossAttention(plan) => attention(plan, batch, batch.context),
        BranchPlan::FeedForward(plan) => feedforward(plan, rows),
    };
    // The residual stream in front, and what each norm keeps: its input, or its output in the branch.
    let norms = layer.norms.iter().flatten().count();
    cost.saved += (rows * dim * (1 + norms)) as f64;
    if layer.residual.gated {
        // A GRU cell: three gates from the branch and three from the residual.
        cost.add(linear(rows, dim, 3 * dim));
        cost.add(linear(rows, dim, 3 * dim));
        cost.saved += (6 * rows * dim) as f64;
    }
    if layer.residual.scaled {
        cost.saved += (rows * dim) as f64;
    }
    cost
}

fn attention(plan: &AttentionPlan, batch: Batch, keys: usize) -> Cost {
    let (queries, rows) = (batch.rows * batch.tokens, batch.rows * keys);
    let inner = plan.heads * plan.dim_head;
    let shared = plan.shared.unwrap_or(inner);
    let mut cost = linear(queries, plan.dim, shared);
    cost.add(linear(rows, plan.dim, shared + inner));
    cost.add(linear(queries, inner, if plan.on_attn { 2 * plan.dim } else { plan.dim }));
    if plan.gate_values {
        cost.add(linear(queries, plan.dim, inner));
    }

    let fused = plan.path() == AttentionPath::Fused;
    let seen = keys + plan.num_mem_kv;
    // Blocks beyond the diagonal are skipped by the fused path alone.
    let half = if fused && plan.causal { (keys as f64 + 1.0) / (2.0 * keys.max(1) as f64) } else { 1.0 };
    let pairs = (plan.heads * queries) as f64 * (keys as f64 * half + plan.num_mem_kv as f64);
    let (scores, sums) = (2.0 * pairs * plan.dim_qk() as f64, 2.0 * pairs * plan.dim_head as f64);
    cost.forward += scores + sums;
    // The fused path computes its scores again.
    cost.backward += 2.0 * (scores + sums) + if fused { scores } else { 0.0 };

    // Queries, keys, values, and the output, which is the input of the output projection too.
    cost.saved += (queries * (shared + inner) + rows * (shared + inner)) as f64;
    let matrix = plan.heads as f64 * queries as f64 * seen as f64;
    if fused {
        // The logarithm of each query's sum.
        cost.saved += (queries * plan.heads) as f64;
    } else {
        cost.saved += matrix;
    }
    if plan.talking_heads {
        let mix = 2.0 * plan.heads as f64 * matrix;
        cost.forward += 2.0 * mix;
        cost.backward += 4.0 * mix;
        cost.saved += 2.0 * matrix;
    }
    if plan.gate_values {
        cost.saved += (2 * queries * inner) as f64;
    }
    cost
}

fn feedforward(plan: &FeedForwardPlan, rows: usize) -> Cost {
    let hidden = if plan.glu { 2 * plan.inner } else { plan.inner };
    let mut cost = linear(rows, plan.dim, hidden);
    cost.add(linear(rows, plan.inner, plan.dim_out));
    // Before and after the activation.
    let normed = if plan.post_act_ln { plan.inner } else { 0 };
    cost.saved = (rows * (hidden + plan.inner + normed)) as f64;
    cost
}
