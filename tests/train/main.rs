//! Training and its checkpoints.

#[path = "../common/mod.rs"]
mod common;

mod checkpoint;
mod optimizers;
mod training;
