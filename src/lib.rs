//! Every variant of lucidrains' x-transformers, on a tensor engine of its own.
//!
//! Three layers, one direction of knowledge:
//!
//! * [`Tensor`], [`Tape`], [`Param`]: values, gradients and names. Ops are methods of [`Tensor`] that return
//!   [`Result`]; gradients are recorded while a [`Tape`] lives, and never dropped in silence.
//! * `ops`: what can be computed, one file per op with its backward rule.
//! * [`nn`], [`models`], [`config`]: what x-transformers is, with its keyword names and PyTorch's state-dict keys.
//!
//! Around them, [`train`] has optimizers, schedules and checkpoints, [`io`] reads and writes files, and [`profile`] tells
//! where the time goes.
//!
#![doc = include_str!("../docs/guarantees.md")]
#![warn(missing_docs, missing_debug_implementations)]
#![deny(unsafe_op_in_unsafe_fn)]

pub mod config;
mod core;
pub mod device;
mod error;
pub mod io;
pub mod models;
pub mod nn;
pub mod ops;
pub mod profile;
pub mod train;

pub use crate::{
    core::{
        Backward, Buffer, DType, Element, GradSlice, Gradcheck, GradcheckReport, Gradients, Init, InputGrad,
        InputGrads, InputReport, IntoShape, LeafId, MAX_RANK, Mode, Param, ParamMap, ParamStore, Philox, Readable,
        Shape, Tape, Tensor, checkpoint, discrete, gradcheck, philox4x32, record,
    },
    device::Device,
    error::{Error, Result},
};

/// The README's programs, compiled and run with the other examples of the documentation.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
