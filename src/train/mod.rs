//! Training: data, optimizers, learning-rate schedule, moving averages, checkpoints, and the loop over all of them.

mod checkpoint;
mod classifier;
mod data;
mod divided;
mod ema;
mod grad_scaler;
mod lora;
mod model;
mod optimizer;
mod options;
mod random;
#[cfg(feature = "cuda")]
mod recorded;
mod schedule;
mod scores;
mod sharded;
mod trainer;

#[cfg(feature = "cuda")]
pub use self::recorded::{RecordedInfo, RecordedStep};
pub use self::{
    checkpoint::{Checkpoint, Losses, TrainingState},
    classifier::{Classifier, ClassifierConfig},
    data::{
        Batch, BatchRequest, BatchSource, ByteText, DataPrint, Examples, Label, LabelledBatch, LabelledText,
        LabelledTexts, Mixture, Sequence, Sequences, TokenBatch, TokenData, TokenFile, TokenFormat, TokenWriter,
    },
    ema::{Ema, Swapped},
    grad_scaler::GradScaler,
    lora::{LoraConfig, LoraModel},
    model::TrainModel,
    optimizer::{
        Adafactor, AdafactorOptions, AdamW, AdamWOptions, AdjustLr, Lion, LionOptions, Muon, MuonOptions, Optimizer,
        OptimizerKind, OptimizerOptions, ParamGroup, Sgd, SgdOptions, StepInfo,
    },
    options::TrainOptions,
    schedule::Schedule,
    scores::{accuracy, macro_f1, spearman},
    sharded::Sharded,
    trainer::{RankOptions, StepReport, Trainer},
};
