//! Training, its data and its checkpoints.

#[path = "../common/mod.rs"]
mod common;

mod checkpoint;
mod folder;
mod optimizers;
mod sources;
mod token_files;
mod training;

use folder::Folder;
