//! Gradients: the tape, its rules and recomputation, against finite differences and PyTorch.

#[path = "../common/mod.rs"]
mod common;
#[path = "../common/levels.rs"]
mod levels;
#[path = "../common/rules.rs"]
mod rules;

mod derivatives;
mod gpt_gradients;
mod gradcheck;
mod params;
mod pytorch_inputs;
mod recompute;
mod tape;
