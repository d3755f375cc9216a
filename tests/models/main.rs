//! Models and their options.

#[path = "../common/draw.rs"]
mod draw;

mod branches;
mod options;
mod random_options;
mod wrappers;
