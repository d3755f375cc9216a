//! Training, its data and its checkpoints.

#[path = "../common/mod.rs"]
mod common;

mod checkpoint;
mod classifier;
mod folder;
mod optimizers;
mod sources;
mod token_files;
mod training;
mod tuned;

use folder::Folder;
