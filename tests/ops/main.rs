//! The ops one by one, and their building blocks: values, errors, layouts, threads.

#[path = "../common/mod.rs"]
mod common;
#[path = "../common/levels.rs"]
mod levels;

mod adamw;
mod dropout;
mod fused_ops;
mod matmul;
mod properties;
mod tensor;
