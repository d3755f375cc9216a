//! Options of `xt train`: the shape of the model, the steps, and the adapter.

use clap::{Args, value_parser};
use x_transformers::{
    DType,
    config::{AttentionConfig, AttentionLayersConfig},
    models::LoraOptions,
    train::{OptimizerKind, ParamGroup, TrainOptions},
};

use crate::compute::{dtypes, fraction, optimizers};

/// Defaults of a run without arguments; all other options have the library's defaults.
mod defaults {
    pub const DIM: usize = 128;
    pub const DEPTH: usize = 4;
    pub const HEADS: usize = 4;
    pub const STEPS: u64 = 600;
    /// Of the model that is trained when nothing is said about it: it has rotary positions, which a short run learns
    /// with, while learned absolute positions need thousands of steps to look further back than a byte or two.
    pub const DIM_HEAD: usize = 32;
}

/// The shape of the plain decoder.
#[derive(Args)]
pub struct ModelArgs {
    /// Model dimension of the decoder; --dim, --depth or --heads selects learned positions and heads of 64 features, in
    /// place of rotary positions and heads of 32 [default: 128]
    #[arg(long, value_name = "N", conflicts_with = "resume")]
    pub dim: Option<usize>,

    /// Number of decoder blocks, each attention and feedforward [default: 4]
    #[arg(long, value_name = "N", conflicts_with = "resume")]
    pub depth: Option<usize>,

    /// Number of attention heads per block [default: 4]
    #[arg(long, value_name = "N", conflicts_with = "resume")]
    pub heads: Option<usize>,
}

impl ModelArgs {
    pub fn layers(&self, document_mask: bool) -> AttentionLayersConfig {
        let Self { dim, depth, heads } = *self;
        let plain = AttentionLayersConfig {
            heads: heads.unwrap_or(defaults::HEADS),
            ..AttentionLayersConfig::decoder(dim.unwrap_or(defaults::DIM), depth.unwrap_or(defaults::DEPTH))
        };
        if dim.is_some() || depth.is_some() || heads.is_some() {
            return plain;
        }
        let attn = AttentionConfig { dim_head: defaults::DIM_HEAD, ..plain.attn };
        // Rotated values know where a row begins, which documents in it must not.
        AttentionLayersConfig { rotary_pos_emb: true, rotary_qk_only: document_mask, attn, ..plain }
    }
}

#[derive(Args)]
pub struct OptionArgs {
    /// Context length, in tokens [default: 256, or the config's max_seq_len if that is smaller]
    #[arg(long, value_name = "N", conflicts_with = "resume")]
    pub seq_len: Option<usize>,

    /// Number of sequences in a micro-batch
    #[arg(long, value_name = "N", default_value_t = TrainOptions::default().batch_size, conflicts_with = "resume")]
    batch_size: usize,

    /// Number of micro-batches per step, whose gradients are averaged (gradient accumulation)
    #[arg(long, value_name = "N", default_value_t = TrainOptions::default().accumulate, conflicts_with = "resume")]
    accumulate: usize,

    /// Take the windows of the data in a random order, each once an epoch, instead of at random offsets
    #[arg(long, conflicts_with = "resume")]
    shuffle: bool,

    /// Keep attention within documents, with which absolute positions begin anew; requires tokens
    #[arg(long, conflicts_with = "resume")]
    pub document_mask: bool,

    /// Compute the activations of layers again in the backward pass instead of keeping them: less memory, more time
    #[arg(long, conflicts_with = "resume")]
    recompute: bool,

    /// Number of training steps; with --resume, the new total, to which the learning rate schedule adapts [default:
    /// 600, with --resume that of the run]
    #[arg(long, value_name = "N")]
    pub steps: Option<u64>,

    /// Peak learning rate, which decays to a tenth along a cosine [default: 0.001; 0.0001 for --preset bert-base, 0.00005 for a
    /// pretrained model, 0.0002 for an adapter]
    #[arg(long, value_name = "X", conflicts_with = "resume")]
    lr: Option<f64>,

    /// Number of linear warmup steps to the peak learning rate
    #[arg(long, value_name = "N", default_value_t = TrainOptions::default().warmup, conflicts_with = "resume")]
    warmup: u64,

    /// Maximum global norm of the gradients; larger gradients are scaled down to it
    #[arg(long, value_name = "X", default_value_t = TrainOptions::default().clip, conflicts_with = "resume")]
    clip: f64,

    /// Optimizer; Muon trains the matrices of the layers, and AdamW embeddings, logits and vectors
    #[arg(long, default_value = "adamw", value_parser = optimizers(), conflicts_with = "resume")]
    optimizer: OptimizerKind,

    /// Momentum of SGD and Muon [default: 0.9 for SGD, 0.95 for Muon]
    #[arg(long, value_name = "X", conflicts_with = "resume")]
    momentum: Option<f64>,

    /// Weight decay; parameters of fewer than two dimensions, such as biases, do not decay
    #[arg(long, value_name = "X", default_value_t = TrainOptions::default().weight_decay, conflicts_with = "resume")]
    weight_decay: f64,

    /// Values of their own for parameters by their names, such as "*emb* lr=0.1 weight_decay=0": a pattern with * and ?, and lr (a
    /// factor), weight_decay, beta1, beta2 or momentum; may be repeated, and the first group counts that sets a value
    #[arg(long, value_name = "PATTERN KEY=X", value_parser = param_group, conflicts_with = "resume")]
    group: Vec<ParamGroup>,

    /// Apply weight decay to parameters of fewer than two dimensions too, as PyTorch does by default
    #[arg(long, conflicts_with = "resume")]
    decay_all: bool,

    /// Decay of an exponential moving average of the weights, from 0 to 1, for validation and samples [default: no
    /// average]
    #[arg(long, value_name = "DECAY", value_parser = fraction, conflicts_with = "resume")]
    ema: Option<f64>,

    /// Stop after N validations in a row without a lower loss, at the next checkpoint; implies --keep-best
    #[arg(long, value_name = "N", value_parser = value_parser!(u64).range(1..), conflicts_with = "resume")]
    patience: Option<u64>,

    /// Keep the checkpoint with the lowest validation loss in the folder `best`
    #[arg(long, conflicts_with = "resume")]
    keep_best: bool,

    /// Seed of the initial weights, the batches and dropout
    #[arg(long, value_name = "N", default_value_t = TrainOptions::default().seed, conflicts_with = "resume")]
    pub seed: u64,

    /// Data type of the weights and activations; with bf16 and f16 the optimizer keeps f32 weights, with f16 the loss
    /// is scaled
    #[arg(long, default_value = "f32", value_parser = dtypes([DType::F32, DType::BF16, DType::F16]), conflicts_with = "resume")]
    dtype: DType,
}

impl OptionArgs {
    /// The options of a new run of a model that predicts windows of this length, 0 meaning any; `lr` is the default rate.
    pub fn resolve(&self, max_seq_len: usize, lr: f64) -> TrainOptions {
        let defaults = TrainOptions::default();
        TrainOptions {
            steps: self.steps.unwrap_or(defaults::STEPS),
            batch_size: self.batch_size,
            // 0 means no limit.
            seq_len: self.seq_len.unwrap_or(if max_seq_len == 0 {
                defaults.seq_len
            } else {
                defaults.seq_len.min(max_seq_len)
            }),
            accumulate: self.accumulate,
            shuffle: self.shuffle,
            document_mask: self.document_mask,
            recompute: self.recompute,
            lr: self.lr.unwrap_or(lr),
            warmup: self.warmup,
            clip: self.clip,
            optimizer: self.optimizer,
            momentum: self.momentum,
            weight_decay: self.weight_decay,
            decay_all: self.decay_all,
            groups: self.group.clone(),
            ema_decay: self.ema,
            patience: self.patience,
            keep_best: self.keep_best || self.patience.is_some(),
            seed: self.seed,
            dtype: self.dtype,
            ..defaults
        }
    }
}

/// Parses a group of parameters.
fn param_group(text: &str) -> Result<ParamGroup, String> {
    let mut words = text.split_whitespace();
    let mut group = ParamGroup::new(words.next().ok_or("expected a pattern")?);
    for word in words {
        let (key, value) = word.split_once('=').ok_or_else(|| format!("expected KEY=X, got `{word}`"))?;
        let value: f64 = value.parse().map_err(|_| format!("expected a number for {key}, got `{value}`"))?;
        let place = match key {
            "lr" => &mut group.lr,
            "weight_decay" => &mut group.weight_decay,
            "beta1" => &mut group.beta1,
            "beta2" => &mut group.beta2,
            "momentum" => &mut group.momentum,
            _ => return Err(format!("expected lr, weight_decay, beta1, beta2 or momentum, got `{key}`")),
        };
        *place = Some(value);
    }
    Ok(group)
}

/// A low-rank adapter, which is trained in place of the model.
#[derive(Args)]
pub struct LoraArgs {
    /// Train a low-rank adapter of this rank and freeze the model of --from, whose quantized weights stay packed (LoRA)
    #[arg(long, value_name = "N", requires = "from", conflicts_with = "resume")]
    lora_rank: Option<usize>,

    /// Numerator of the adapter's factor, which is divided by the rank [default: twice the rank]
    #[arg(long, value_name = "X", requires = "lora_rank")]
    lora_alpha: Option<f64>,

    /// Dropout probability of the adapter's input
    #[arg(long, value_name = "P", default_value_t = 0.0, requires = "lora_rank")]
    lora_dropout: f64,

    /// Names of the linear layers that get an update, such as q_proj v_proj; all-linear is all but the logits'
    #[arg(long, value_name = "NAME", num_args = 1.., default_value = "all-linear", requires = "lora_rank")]
    lora_targets: Vec<String>,

    /// Divide the factor by the square root of the rank instead (rsLoRA)
    #[arg(long, requires = "lora_rank")]
    lora_rs: bool,

    /// Train the lengths of the rows of updated weights too (DoRA)
    #[arg(long, requires = "lora_rank")]
    dora: bool,
}

impl LoraArgs {
    /// The options of the adapter, if one is trained.
    pub fn options(&self) -> Option<LoraOptions> {
        let r = self.lora_rank?;
        Some(LoraOptions {
            r,
            lora_alpha: self.lora_alpha.unwrap_or(2.0 * r as f64),
            lora_dropout: self.lora_dropout,
            use_rslora: self.lora_rs,
            use_dora: self.dora,
            target_modules: self.lora_targets.clone(),
        })
    }
}
