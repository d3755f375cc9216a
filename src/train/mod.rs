//! Training: data, optimizers, learning-rate schedule, moving averages, checkpoints, and the loop over all of them.

mod checkpoint;
mod classifier;
mod data;
mod dpo;
mod ema;
mod embedder;
mod grad_scaler;
mod lora;
mod masked_lm;
mod model;
mod optimizer;
mod options;
mod random;
#[cfg(feature = "cuda")]
mod recorded;
mod schedule;
mod scores;
mod trainer;

#[cfg(feature = "cuda")]
pub use self::recorded::{RecordedInfo, RecordedStep};
pub use self::{
    checkpoint::{Checkpoint, Losses, TrainingState},
    classifier::{Classifier, ClassifierConfig},
    data::{
        Batch, BatchRequest, BatchSource, ByteText, DataPrint, Examples, Group, GroupBatch, Groups, Label,
        LabelledBatch, LabelledText, LabelledTexts, Masked, MaskedBatch, Mixture, Sequence, Sequences, TokenBatch,
        TokenData, TokenFile, TokenFormat, TokenWriter,
    },
    dpo::{DpoConfig, DpoModel},
    ema::{Ema, Swapped},
    embedder::{Embedder, EmbedderConfig},
    grad_scaler::GradScaler,
    lora::{LoraConfig, LoraModel},
    masked_lm::{MaskedLm, MaskedLmConfig},
    model::TrainModel,
    optimizer::{
        Adafactor, AdafactorOptions, AdamW, AdamWOptions, AdjustLr, Lion, LionOptions, Muon, MuonOptions, Optimizer,
        OptimizerKind, OptimizerOptions, ParamGroup, Sgd, SgdOptions, StepInfo,
    },
    options::TrainOptions,
    schedule::Schedule,
    scores::{accuracy, macro_f1, spearman},
    trainer::{StepReport, Trainer},
};
