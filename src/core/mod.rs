//! Where values live and how gradients flow: shapes, dtypes, tensors, the tape and parameters. Knows no op.

mod display;
mod dtype;
mod gradcheck;
mod init;
mod param;
mod philox;
mod real;
mod recompute;
mod shape;
mod stack;
mod tape;
mod tensor;
mod views;

pub use dtype::{DType, Element, Readable};
pub use gradcheck::{Gradcheck, GradcheckReport, InputReport, gradcheck};
pub use init::Init;
pub use param::{Buffer, Param, ParamMap, ParamStore};
pub use philox::{Philox, philox4x32};
pub use shape::{IntoShape, MAX_RANK, Shape};
pub use tape::{
    Backward, GradSlice, Gradients, InputGrad, InputGrads, LeafId, Mode, Tape, checkpoint, discrete, record,
};
pub use tensor::Tensor;

pub(crate) use dtype::{Float, dispatch_float};
pub(crate) use param::fnv1a;
pub(crate) use real::Real;
pub(crate) use recompute::Saved;
pub(crate) use shape::{Layout, collapse, collapse_layouts};
#[cfg(feature = "cuda")]
pub(crate) use tape::is_recording;
pub(crate) use tape::{computed, dropout_stream, needs, record_beside, record_cheap, record_cheap_after};
