//! `xt info`: what a model consists of and what it costs, without building it in memory.

use std::{fs, path::PathBuf};

use clap::{ArgGroup, Args, value_parser};
use indicatif::HumanCount;
use x_transformers::{
    DType, Device, Store,
    config::{Config, LayersPlan},
    models::Model,
    train::Checkpoint,
};

use crate::{
    cost::{self, Batch, Cost},
    failure::{Failure, Result, print},
    files,
    progress::{Short, bytes},
};

#[derive(Args)]
#[command(group = ArgGroup::new("model").required(true))]
pub struct InfoArgs {
    /// JSON config of a model
    #[arg(long, value_name = "FILE", group = "model")]
    config: Option<PathBuf>,

    /// Folder that `xt train` wrote
    #[arg(long, value_name = "DIR", group = "model")]
    checkpoint: Option<PathBuf>,

    /// Sequences of a training step
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = value_parser!(u32).range(1..))]
    batch_size: u32,

    /// Length of the sequences [default: the longest that the model takes]
    #[arg(long, value_name = "N", value_parser = value_parser!(u32).range(1..))]
    seq_len: Option<u32>,
}
