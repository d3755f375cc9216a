//! Cost of a model from its plan: floating-point operations and saved activations.
//!
//! Counts matrix products and attention, with a multiplication and an addition as two operations; norms, activations
//! and sums are below 2% of that for any width worth training. Causal attention counts only the half that is computed.

use x_transformers::{
    DType, Device, Error, ErrorKind, Result,
    config::{
        AttentionPath, AttentionPlan, BranchPlan, Config, FeedForwardPlan, LayerPlan, LayersPlan, ModelPlan,
        TalkingHeads, TransformerPlan, ValueGate, VisionHead,
    },
    ops::rows_of_logits,
};

/// Requested batch size and length.
#[derive(Clone, Copy)]
pub struct Sizes {
    /// Sequences, or images.
    pub rows: usize,
    /// Their length; default the longest that the model takes.
    pub tokens: Option<usize>,
}

/// Sequences that are computed at once.
#[derive(Clone, Copy)]
pub struct Batch {
    /// Number of sequences.
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
    /// Returns the cost of a whole model and the batch that it applies to, with a context as long as the sequence;
    /// `None` if the config is not a model.
    ///
    /// Errors: the config is illegal.
    pub fn of_model(config: &Config, sizes: Sizes) -> Result<Option<(Batch, Self)>> {
        Self::of_plan(config.plan()?, sizes)
    }

    /// The same from a plan.
    ///
    /// Errors: a length that the model does not take.
    pub fn of_plan(plan: ModelPlan, sizes: Sizes) -> Result<Option<(Batch, Self)>> {
        let batch = |longest: usize| {
            /// Tokens of a model that has no longest sequence.
            const MANY: usize = 1024;
            let tokens = sizes.tokens.unwrap_or(if longest == 0 { MANY } else { longest });
            if tokens > longest && longest > 0 {
                let why = format!("expected at most `max_seq_len` ({longest}), got {tokens}");
                return Err(Error::new(ErrorKind::Option { key: "seq_len".to_string(), why }));
            }
            Ok(Batch { rows: sizes.rows, tokens, context: tokens })
        };
        Ok(match plan {
            ModelPlan::Transformer(plan) => {
                let batch = batch(plan.max_seq_len)?;
                Some((batch, transformer(&plan, batch)))
            }
            ModelPlan::Autoregressive(plan) => {
                let plan = plan.net;
                let batch = batch(plan.max_seq_len)?;
                Some((batch, language_model(&plan, batch)))
            }
            ModelPlan::EncoderDecoder(plan) => {
                let batch = batch(plan.dec.max_seq_len)?;
                let mut cost = transformer(&headless(plan.enc), batch);
                cost.add(language_model(&plan.dec, batch));
                Some((batch, cost))
            }
            ModelPlan::Continuous(plan) => {
                let (batch, dim) = (batch(plan.max_seq_len)?, plan.layers.dim);
                let rows = batch.rows * batch.tokens;
                let mut cost = layers(&plan.layers, batch);
                cost.add(linear(rows, plan.dim_in.unwrap_or(0), dim));
                cost.add(linear(rows, dim, plan.dim_out.unwrap_or(0)));
                cost.saved += (rows * 2 * dim) as f64;
                Some((batch, cost))
            }
            ModelPlan::Vision(plan) => {
                // The class token goes in front of the patches, registers after them.
                let tokens = plan.patches + usize::from(plan.class_token) + plan.registers;
                let batch = Batch { rows: sizes.rows, tokens, context: 0 };
                let (rows, dim) = (batch.rows * batch.tokens, plan.layers.dim);
                let features = plan.channels * plan.patch_size * plan.patch_size;
                let mut cost = linear(batch.rows * plan.patches, features, dim);
                cost.add(layers(&plan.layers, batch));
                cost.saved += (rows * 2 * dim) as f64;
                match &plan.head {
                    VisionHead::FeedForward(head) => cost.add(feedforward(head, batch.rows)),
                    VisionHead::Mean(Some(classes)) => cost.add(linear(batch.rows, dim, *classes)),
                    _ => {}
                }
                Some((batch, cost))
            }
            ModelPlan::Layers(plan) => {
                let batch = batch(sizes.tokens.unwrap_or(1024))?;
                Some((batch, layers(&plan, batch)))
            }
            _ => None,
        })
    }

    /// Operations that continue a prompt, if every token goes through the model once and keys and values are kept: what
    /// a step does twice does not count. `None` for what does not generate, or beyond the longest sequence.
    ///
    /// Errors: the config is illegal.
    pub fn of_generation(plan: ModelPlan, rows: usize, prompt: usize, new: usize) -> Result<Option<f64>> {
        let (encoder, decoder, start) = match plan {
            ModelPlan::Autoregressive(plan) => (None, plan.net, prompt),
            ModelPlan::EncoderDecoder(plan) => (Some(plan.enc), plan.dec, 1),
            _ => return Ok(None),
        };
        // The last token is given, but not read.
        let read = start + new.saturating_sub(1);
        if read > decoder.window() {
            return Ok(None);
        }
        let hidden = |plan: TransformerPlan, tokens: usize| {
            transformer(&headless(plan), Batch { rows, tokens, context: prompt }).forward
        };
        let logits = linear(rows * new, decoder.layers.dim, decoder.num_tokens).forward;
        Ok(Some(encoder.map_or(0.0, |plan| hidden(plan, prompt)) + hidden(decoder, read) + logits))
    }

    /// Operations of a training step.
    pub fn training(&self) -> f64 {
        self.forward + self.backward
    }

    fn add(&mut self, other: Self) {
        self.forward += other.forward;
        self.backward += other.backward;
        self.saved += other.saved;
    }
}

/// Returns the cost of a wrapper from tokens to logits, and of their cross-entropy.
fn transformer(plan: &TransformerPlan, batch: Batch) -> Cost {
    let rows = batch.rows * batch.tokens;
    let mut cost = up_to_logits(plan, batch);
    // The logits, and their gradient, which is there before anything is freed.
    cost.saved += (rows * 2 * plan.num_tokens) as f64;
    cost
}

/// Returns the cost of a wrapper from tokens to their cross-entropy, computed in blocks of rows.
fn language_model(plan: &TransformerPlan, batch: Batch) -> Cost {
    let (rows, dim) = (batch.rows * batch.tokens, plan.layers.dim);
    let mut cost = up_to_logits(plan, batch);
    let at_a_time = rows.min(rows_of_logits(plan.num_tokens, DType::F32, &Device::Cpu));
    // A block of logits, and the gradients of their input and weight, which are there before anything is freed.
    cost.saved += (at_a_time * plan.num_tokens + rows * dim + plan.num_tokens * dim) as f64;
    cost
}

/// A wrapper's operations, and what is kept before its logits.
fn up_to_logits(plan: &TransformerPlan, batch: Batch) -> Cost {
    let dim = plan.layers.dim;
    let rows = batch.rows * batch.tokens;
    let seen = Batch { tokens: batch.tokens + plan.num_memory_tokens, ..batch };
    let mut cost = layers(&plan.layers, seen);
    if plan.emb_dim != dim {
        cost.add(linear(rows, plan.emb_dim, dim));
        cost.saved += (rows * plan.emb_dim) as f64;
    }
    cost.add(linear(rows, dim, plan.num_tokens));
    // Input and output of the last norm.
    cost.saved += (rows * 2 * dim) as f64;
    cost
}

/// The cost of attention layers.
fn layers(plan: &LayersPlan, batch: Batch) -> Cost {
    let mut cost = Cost::default();
    for layer in &plan.layers {
        cost.add(sublayer(layer, plan.dim, batch));
    }
    // With all of it in use, the backward pass computes the output of the last activation again.
    let inner = plan.layers.iter().rev().find_map(|layer| match &layer.branch {
        BranchPlan::FeedForward(plan) => Some(plan.inner),
        BranchPlan::SelfAttention(_) | BranchPlan::CrossAttention(_) | BranchPlan::Custom => None,
    });
    cost.saved += (batch.rows * batch.tokens * inner.unwrap_or(0)) as f64;
    cost
}

/// The model without its head.
fn headless(mut plan: TransformerPlan) -> TransformerPlan {
    plan.num_tokens = 0;
    plan
}

/// A linear layer applied to `rows` vectors; the backward pass makes two products of the same size.
fn linear(rows: usize, inputs: usize, outputs: usize) -> Cost {
    let forward = 2.0 * rows as f64 * inputs as f64 * outputs as f64;
    Cost { forward, backward: 2.0 * forward, saved: 0.0 }
}

fn sublayer(layer: &LayerPlan, dim: usize, batch: Batch) -> Cost {
    let rows = batch.rows * batch.tokens;
    let mut cost = match &layer.branch {
        BranchPlan::SelfAttention(plan) => attention(plan, batch, batch.tokens),
        BranchPlan::CrossAttention(plan) => attention(plan, batch, batch.context),
        BranchPlan::FeedForward(plan) => feedforward(plan, rows),
        // No config has one.
        BranchPlan::Custom => Cost::default(),
    };
    // Each norm keeps its input, in front of the branch the residual stream; its output is computed again.
    let norms = layer.norms.iter().flatten().count();
    cost.saved += (rows * dim * norms.max(1)) as f64;
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
    let inner = plan.heads * plan.dim_value;
    let shared = plan.shared.unwrap_or(plan.heads * plan.dim_head);
    let values = plan.kv_heads * plan.dim_value;
    let keys_width = plan.shared.unwrap_or(plan.kv_heads * plan.dim_head);
    let mut cost = linear(queries, plan.dim, shared);
    cost.add(linear(rows, plan.dim_context, keys_width + values));
    if plan.project_out {
        cost.add(linear(queries, inner, if plan.on_attn { 2 * plan.dim } else { plan.dim }));
    }
    if plan.gate_values != ValueGate::None {
        cost.add(linear(queries, plan.dim, inner));
    }

    let fused = plan.path() == AttentionPath::Fused;
    let seen = keys + plan.num_mem_kv;
    // Blocks beyond the diagonal are skipped by the fused path alone.
    let half = if fused && plan.causal { (keys as f64 + 1.0) / (2.0 * keys.max(1) as f64) } else { 1.0 };
    let pairs = (plan.heads * queries) as f64 * (keys as f64 * half + plan.num_mem_kv as f64);
    let (scores, sums) = (2.0 * pairs * plan.dim_qk() as f64, 2.0 * pairs * plan.dim_value as f64);
    cost.forward += scores + sums;
    // The fused path computes its scores again.
    cost.backward += 2.0 * (scores + sums) + if fused { scores } else { 0.0 };

    // Queries, keys, values, and the output, which is the input of the output projection too.
    cost.saved += (queries * (shared + inner) + rows * (keys_width + values)) as f64;
    let matrix = plan.heads as f64 * queries as f64 * seen as f64;
    if fused {
        // The logarithm of each query's sum.
        cost.saved += (queries * plan.heads) as f64;
    } else {
        cost.saved += matrix;
    }
    if plan.talking_heads != TalkingHeads::None {
        let mix = 2.0 * plan.heads as f64 * matrix;
        cost.forward += 2.0 * mix;
        cost.backward += 4.0 * mix;
        cost.saved += 2.0 * matrix;
    }
    if plan.gate_values != ValueGate::None {
        cost.saved += (2 * queries * inner) as f64;
    }
    cost
}

fn feedforward(plan: &FeedForwardPlan, rows: usize) -> Cost {
    let hidden = if plan.glu { 2 * plan.inner } else { plan.inner };
    let mut cost = linear(rows, plan.dim, hidden);
    cost.add(linear(rows, plan.inner, plan.dim_out));
    // The input of the activation, and of the norm after it; their outputs are recomputed.
    let normed = if plan.norm.is_some() { plan.inner } else { 0 };
    cost.saved = (rows * (hidden + normed)) as f64;
    cost
}

/// Held by tests that measure the memory of the process.
#[cfg(test)]
pub static MEASURED: std::sync::Mutex<()> = std::sync::Mutex::new(());

#[cfg(test)]
mod tests {
    use super::{Cost, MEASURED, Sizes};
    use x_transformers::{
        DType, Device, ParamStore, Tape, Tensor,
        config::Config,
        models::{AutoregressiveWrapper, ForwardOptions},
    };

    /// Compares the estimate with the memory that a training step takes from the pool.
    #[test]
    fn estimated_memory_is_that_of_a_real_step() -> x_transformers::Result<()> {
        let _alone = MEASURED.lock();
        for layers in [
            r#""kind": "Decoder", "dim": 64, "depth": 3, "heads": 2"#,
            r#""kind": "Decoder", "dim": 96, "depth": 2, "heads": 3, "attn_dim_head": 32, "rotary_pos_emb": true"#,
            r#""kind": "Decoder", "dim": 64, "depth": 2, "heads": 4, "attn_dim_head": 32, "ff_glu": true"#,
            r#""kind": "Decoder", "dim": 64, "depth": 2, "heads": 4, "attn_dim_head": 16, "attn_talking_heads": true"#,
        ] {
            let json = format!(
                r#"{{"model": "AutoregressiveWrapper", "net": {{"num_tokens": 256, "max_seq_len": 200,
                    "attn_layers": {{{layers}}}}}}}"#
            );
            let config = Config::from_json(&json)?;
            let (batch, cost) = Cost::of_model(&config, Sizes { rows: 4, tokens: None })?.expect("a model");
            assert_eq!((batch.rows, batch.tokens), (4, 200));
            let Config::AutoregressiveWrapper(config) = config else { panic!("{config:?}") };

            let device = Device::Cpu;
            let store = ParamStore::new(0, DType::F32, &device);
            let model = AutoregressiveWrapper::new(&config, &store)?;
            let tokens = Tensor::zeros([batch.rows, batch.tokens + 1], DType::I64, &device)?;
            device.reset_peak_memory();
            let before = device.memory().live;
            let mut tape = Tape::train(0);
            let loss = model.loss(&tokens, &ForwardOptions::default())?;
            let gradients = tape.backward(&loss)?;
            let measured = (device.memory().peak - before) as f64;
            drop(gradients);
            // The gradients of the weights come while activations go.
            let estimated = 4.0 * cost.saved;
            let ratio = measured / estimated;
            assert!((0.85..1.3).contains(&ratio), "{layers}: {measured:.3e} bytes, estimated {estimated:.3e}");
        }
        Ok(())
    }
}
