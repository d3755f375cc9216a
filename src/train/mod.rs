//! Training: data, optimizers, learning-rate schedule, moving averages, checkpoints, and the loop over all of them.

mod checkpoint;
mod data;
mod ema;
mod grad_scaler;
mod model;
mod optimizer;
mod options;
mod random;
#[cfg(feature = "cuda")]
mod recorded;
mod schedule;
mod trainer;

#[cfg(feature = "cuda")]
pub use self::recorded::{RecordedInfo, RecordedStep};
pub use self::{
    checkpoint::{Checkpoint, Losses, TrainingState},
    data::{
        Batch, BatchRequest, BatchSource, ByteText, DataPrint, Mixture, Sequence, Sequences, TokenBatch, TokenData,
        TokenFile, TokenFormat, TokenWriter,
    },
    ema::{Ema, Swapped},
    grad_scaler::GradScaler,
    model::TrainModel,
    optimizer::{
        Adafactor, AdafactorOptions, AdamW, AdamWOptions, AdjustLr, Lion, LionOptions, Muon, MuonOptions, Optimizer,
        OptimizerKind, OptimizerOptions, ParamGroup, Sgd, SgdOptions, StepInfo,
    },
    options::TrainOptions,
    schedule::Schedule,
    trainer::{StepReport, Trainer},
};
