//! Training, its data and its checkpoints.

#[path = "../common/mod.rs"]
mod common;

mod checkpoint;
mod classifier;
mod dpo;
mod embedder;
mod folder;
mod masked_lm;
mod optimizers;
mod sources;
mod token_files;
mod training;
mod tuned;

use folder::Folder;
