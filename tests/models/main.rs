//! Models and their options.

#[path = "../common/draw.rs"]
mod draw;

mod around;
mod branches;
mod conversion;
mod options;
mod random_options;
mod wrappers;
