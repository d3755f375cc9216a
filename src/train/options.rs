//! Options of a training run.

use serde::{Deserialize, Serialize};

use super::{
    BatchRequest,
    optimizer::{
        AdafactorOptions, AdamWOptions, AdjustLr, LionOptions, MuonOptions, Optimizer, OptimizerKind, OptimizerOptions,
        ParamGroup, SgdOptions, usual_groups,
    },
    random::{MAX_MICRO, MAX_STEPS},
    schedule::Schedule,
};
use crate::{DType, Error, ParamMap, Result, error::ensure};

/// Options of a training run; saved with every checkpoint.
///
/// ```
/// use x_transformers::{DType, train::TrainOptions};
/// let options = TrainOptions { steps: 1000, lr: 3e-4, dtype: DType::BF16, ..Default::default() };
/// options.check(256)?; // the model's longest sequence
/// # Ok::<(), x_transformers::Error>(())
/// ```
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrainOptions {
    /// Number of steps, each one update of the weights. Default 300.
    pub steps: u64,
    /// Number of rows in a micro-batch. Default 8.
    pub batch_size: usize,
    /// Number of tokens that a row predicts. Default 256.
    pub seq_len: usize,
    /// Number of micro-batches per step, whose gradients are averaged. Default 1.
    pub accumulate: usize,
    /// If `true`, rows are taken in a random order, each once an epoch, instead of at random offsets. Default `false`.
    pub shuffle: bool,
    /// If `true`, attention stays within documents, which rows pack. Default `false`.
    pub document_mask: bool,
    /// If `true`, activations of layers are computed again in the backward pass instead of kept: less memory, more time, the same
    /// bits. Default `false`.
    pub recompute: bool,
    /// Peak learning rate. Default 1e-3.
    pub lr: f64,
    /// Number of warmup steps until the peak. Default 30.
    pub warmup: u64,
    /// Final learning rate as a fraction of the peak. Default 0.1.
    pub final_lr_ratio: f64,
    /// Maximum global norm of the gradients; larger ones are scaled down. Default 1.
    pub clip: f64,
    /// Optimizer. Default AdamW.
    pub optimizer: OptimizerKind,
    /// Weight decay. Default 0.01.
    pub weight_decay: f64,
    /// If `true`, all parameters decay, as in PyTorch; else only those of at least two dimensions, as in nanoGPT. Default
    /// `false`, but `true` for checkpoints written before this option.
    #[serde(default = "before_decay_all")]
    pub decay_all: bool,
    /// First β of AdamW and Lion. Default 0.9.
    pub beta1: f64,
    /// Second β of AdamW and Lion. Default 0.99.
    pub beta2: f64,
    /// ε of AdamW. Default 1e-8.
    pub eps: f64,
    /// Momentum of SGD (default 0.9) and Muon (default 0.95).
    pub momentum: Option<f64>,
    /// Parameters with a rate, a decay or betas of their own. Default none.
    pub groups: Vec<ParamGroup>,
    /// Decay of the moving average of the weights, which validation then uses. Default none.
    pub ema_decay: Option<f64>,
    /// Number of steps between validations and checkpoints in the loop around the [`Trainer`](super::Trainer), which
    /// does neither by itself; `xt train --every`. Stored here for resumed runs. Default 100.
    pub every: u64,
    /// Number of validations without a lower loss after which the loop around the trainer stops (early stopping). Default
    /// none.
    pub patience: Option<u64>,
    /// If `true`, the loop around the trainer keeps a checkpoint of the step with the lowest validation loss. Default
    /// `false`.
    pub keep_best: bool,
    /// Seed of the initial weights, the batches and the dropout masks. Default 0.
    pub seed: u64,
    /// Type of the weights and activations. Default f32. With f16 the loss is scaled; see
    /// [`GradScaler`](super::GradScaler).
    pub dtype: DType,
}

impl Default for TrainOptions {
    fn default() -> Self {
        Self {
            steps: 300,
            batch_size: 8,
            seq_len: 256,
            accumulate: 1,
            shuffle: false,
            document_mask: false,
            recompute: false,
            lr: 1e-3,
            warmup: 30,
            final_lr_ratio: 0.1,
            clip: 1.0,
            optimizer: OptimizerKind::AdamW,
            weight_decay: 0.01,
            decay_all: false,
            beta1: 0.9,
            beta2: 0.99,
            eps: 1e-8,
            momentum: None,
            groups: Vec::new(),
            ema_decay: None,
            every: 100,
            patience: None,
            keep_best: false,
            seed: 0,
            dtype: DType::F32,
        }
    }
}

impl TrainOptions {
    /// Checks every option, and `seq_len` against the model's `max_seq_len`.
    ///
    /// Errors: [`ErrorKind::Option`](crate::ErrorKind::Option) with the name, what is expected and the value.
    pub fn check(&self, max_seq_len: usize) -> Result<()> {
        let whole = |key: &str, value: u64, least: u64, most: u64| {
            ensure!(
                (least..=most).contains(&value),
                Error::option(key, format_args!("expected {least} to {most}, got {value}"))
            );
            Ok(())
        };
        whole("steps", self.steps, 0, MAX_STEPS)?;
        whole("every", self.every, 1, u64::MAX)?;
        self.patience.map_or(Ok(()), |patience| whole("patience", patience, 1, u64::MAX))?;
        whole("batch_size", self.batch_size as u64, 1, u32::MAX as u64)?;
        whole("accumulate", self.accumulate as u64, 1, MAX_MICRO)?;
        whole("seq_len", self.seq_len as u64, 1, u32::MAX as u64)?;
        ensure!(
            (1..=max_seq_len).contains(&self.seq_len),
            Error::option(
                "seq_len",
                format_args!("expected 1 to {max_seq_len} (the model's `max_seq_len`), got {}", self.seq_len)
            )
        );
        let positive = |key: &str, value: f64| {
            ensure!(
                value > 0.0 && value.is_finite(),
                Error::option(key, format_args!("expected a finite number above 0, got {value}"))
            );
            Ok(())
        };
        positive("lr", self.lr)?;
        positive("clip", self.clip)?;
        let fraction = |key: &str, value: f64| {
            ensure!((0.0..=1.0).contains(&value), Error::option(key, format_args!("expected 0 to 1, got {value}")));
            Ok(())
        };
        fraction("final_lr_ratio", self.final_lr_ratio)?;
        self.ema_decay.map_or(Ok(()), |decay| fraction("ema_decay", decay))?;
        ensure!(
            self.dtype.is_float(),
            Error::option("dtype", format_args!("expected f32, bf16, f16 or f64, got {}", self.dtype))
        );
        let has_momentum = matches!(self.optimizer, OptimizerKind::Sgd | OptimizerKind::Muon);
        ensure!(
            self.momentum.is_none() || has_momentum,
            Error::option("momentum", format_args!("{} does not have it; expected sgd or muon", self.optimizer))
        );
        self.optimizer_options().check()
    }

    /// Refuses [`document_mask`](TrainOptions::document_mask), for models whose batches have no documents.
    ///
    /// Errors: the option is set.
    pub(super) fn refuse_document_mask(&self) -> Result<()> {
        ensure!(!self.document_mask, Error::option("document_mask", "is not supported by this model"));
        Ok(())
    }

    /// Returns the request for the batch of a micro-batch of a step, for a model with a vocabulary of `num_tokens`.
    pub fn request(&self, step: u64, micro: u64, num_tokens: usize) -> BatchRequest {
        let first = step.wrapping_mul(self.accumulate as u64).wrapping_add(micro).wrapping_mul(self.batch_size as u64);
        BatchRequest {
            seed: self.seed,
            step,
            micro,
            first,
            rows: self.batch_size,
            seq_len: self.seq_len,
            num_tokens,
            shuffle: self.shuffle,
            documents: self.document_mask,
        }
    }

    /// Returns the learning-rate schedule.
    pub fn schedule(&self) -> Schedule {
        Schedule { lr: self.lr, warmup: self.warmup, steps: self.steps, final_ratio: self.final_lr_ratio }
    }

    /// Returns the hyperparameters of AdamW.
    pub fn adamw(&self) -> AdamWOptions {
        AdamWOptions { beta1: self.beta1, beta2: self.beta2, eps: self.eps, weight_decay: self.weight_decay }
    }

    /// Returns the hyperparameters of the optimizer. Muon takes steps as large as AdamW's ([`AdjustLr::MatchRmsAdamw`]),
    /// so that one rate fits both.
    pub fn optimizer_options(&self) -> OptimizerOptions {
        let &Self { beta1, beta2, weight_decay, momentum, .. } = self;
        match self.optimizer {
            OptimizerKind::AdamW => OptimizerOptions::AdamW(self.adamw()),
            OptimizerKind::Sgd => {
                let momentum = momentum.unwrap_or(0.9);
                OptimizerOptions::Sgd(SgdOptions { momentum, weight_decay, ..Default::default() })
            }
            OptimizerKind::Lion => OptimizerOptions::Lion(LionOptions { beta1, beta2, weight_decay }),
            OptimizerKind::Adafactor => {
                OptimizerOptions::Adafactor(AdafactorOptions { weight_decay, ..Default::default() })
            }
            OptimizerKind::Muon => {
                let defaults = MuonOptions::default();
                let momentum = momentum.unwrap_or(defaults.momentum);
                let (adjust_lr, adamw) = (AdjustLr::MatchRmsAdamw, self.adamw());
                OptimizerOptions::Muon(MuonOptions { momentum, weight_decay, adjust_lr, adamw, ..defaults })
            }
        }
    }

    /// Creates the optimizer of a run: with [`TrainOptions::groups`], then without decay of vectors unless
    /// [`TrainOptions::decay_all`], and with embeddings and logits left to AdamW by Muon.
    ///
    /// Errors: those of [`OptimizerOptions::build`].
    pub fn build_optimizer(&self, params: &ParamMap) -> Result<Box<dyn Optimizer>> {
        let options = self.optimizer_options();
        // First the user's, which are checked: those that follow need not match anything.
        let groups = [self.groups.clone(), usual_groups(self.optimizer, self.decay_all, params)].concat();
        options.build(&groups, params)
    }
}

/// [`TrainOptions::decay_all`] of a checkpoint that does not say.
fn before_decay_all() -> bool {
    true
}
