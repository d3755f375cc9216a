//! Training: data, optimizers, learning-rate schedule, moving averages, checkpoints, and the loop over all of them.

mod blocks;
mod captioner;
mod checkpoint;
mod classifier;
mod data;
mod divided;
mod dpo;
mod ema;
mod embedder;
mod encoder;
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
mod seq2seq;
mod sharded;
mod trainer;
mod vision;

#[cfg(feature = "cuda")]
pub use self::recorded::{RecordedInfo, RecordedStep};
pub use self::{
    captioner::{Captioner, CaptionerConfig},
    checkpoint::{Checkpoint, Losses, TrainingState},
    classifier::{Classifier, ClassifierConfig},
    data::{
        Batch, BatchRequest, BatchSource, ByteText, Caption, CaptionBatch, CaptionedImages, DataPrint, Examples, Group,
        GroupBatch, Groups, Image, ImageBatch, ImageTransform, Label, LabelledBatch, LabelledImages, LabelledText,
        LabelledTexts, Masked, MaskedBatch, Mixture, Pair, PairBatch, Pairs, Sequence, Sequences, TokenBatch,
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
    sharded::Sharded,
    trainer::{RankOptions, StepReport, Trainer},
    vision::{ImageClassifier, ImageClassifierConfig},
};
