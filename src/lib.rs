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

mod atomic_file;
mod autograd;
pub mod config;
pub mod device;
mod dtype;
mod error;
mod gemm;
#[cfg(feature = "cuda")]
mod graph;
mod hash;
pub mod io;
pub mod models;
pub mod nn;
pub mod ops;
mod params;
mod philox;
pub mod pretrained;
pub mod profile;
mod shape;
mod sort;
mod tensor;
pub mod train;

#[cfg(feature = "cuda")]
pub use crate::graph::Graph;
pub use crate::{
    autograd::{
        Backward, Gradcheck, GradcheckReport, Gradients, InputGrad, InputGrads, InputReport, Mode, Tape, checkpoint,
        discrete, gradcheck, record,
    },
    device::Device,
    dtype::{DType, Element, FloatElement, Readable},
    error::{Error, ErrorKind, Result},
    params::{Buffer, Init, Param, ParamMap, ParamStore},
    philox::{Philox, philox4x32},
    shape::{IntoShape, MAX_RANK, Shape},
    tensor::{GradSlice, KernelArg, LeafId, RawKernel, Tensor},
};

/// The half types of tensors, from the crate `half`.
pub use half::{bf16, f16};

/// The README's programs, compiled and run with the other examples of the documentation.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
