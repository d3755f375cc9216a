//! Training, its data and its checkpoints.

#[path = "../common/mod.rs"]
mod common;

mod captions;
mod checkpoint;
mod classifier;
mod dpo;
mod embedder;
mod folder;
mod masked_lm;
mod optimizers;
mod runs;
mod seq2seq;
mod sources;
mod token_files;
mod training;
mod tuned;
mod vision;

use folder::Folder;
use runs::{off, resumed_alike};
