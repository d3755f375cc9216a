//! Tensor operations: one file per op, or family of ops, with its backward rule next to it.
//!
//! Every op is a method of [`Tensor`](crate::Tensor). ARCHITECTURE.md lists the files to change for a new op.
//!
//! # Infinities and NaN
//!
//! Results and gradients that are NaN or infinite in PyTorch are so here too, in every dtype and on every device; the
//! documentation of an op names its exceptions. Where PyTorch overflows on the way to a finite result, the finite
//! result may be returned: half types are computed in f32 and rounded once, and norms and attention scale what would
//! overflow. Sums whose parts overflow depend on the order of summation, in PyTorch as well as here.
//! `tests/contract/extremes` compares every op with PyTorch's classes and exact values at ±0, subnormal, largest and
//! infinite numbers and NaN.

pub use attention::{
    AttentionSpec, DecodeSpec, PositionBias, Window, attention, attention_decode, attention_rung, gpu_needs_scores,
};
pub(crate) use attention::{needs_scores, relative_bucket};
pub use pointwise::{Activation, UNARY};

/// Declares the modules and the list of ops: `file: op, op; …`.
macro_rules! ops {
    ($($file:ident : $($op:ident),+;)+) => {
        $(pub(crate) mod $file;)+

        /// Names of the ops that are not rows of [`UNARY`].
        const LISTED: &[&str] = &[$($(stringify!($op)),+),+];
    };
}

/// Names of all ops; the contract suite has a case for each.
pub const NAMES: &[&str] = &{
    let mut names = [""; LISTED.len() + UNARY.len()];
    let mut at = 0;
    while at < names.len() {
        names[at] = if at < LISTED.len() { LISTED[at] } else { UNARY[at - LISTED.len()].0 };
        at += 1;
    }
    names
};

mod views;

// Not tensor ops: they update the parameters and the state of an optimizer in place.
pub(crate) mod adamw;
mod many;
pub(crate) mod momentum;
// Not recorded on a tape either: they write and read the buffers of decoding.
pub(crate) mod cache;

ops! {
    activation: add_activation;
    attention: attention, attention_decode;
    binary: add, sub, mul, div;
    compare: eq, ne, lt, le, gt, ge, logical_and, logical_or, logical_not, where_cond, masked_fill;
    copy: contiguous, to_dtype, cat;
    cross_entropy: cross_entropy;
    dropout: dropout, dropout_add;
    embedding: embedding;
    entmax: entmax15;
    glu: glu, add_glu;
    gru: gru_gate;
    linear_cross_entropy: linear_cross_entropy;
    matmul: matmul, linear;
    norm: layer_norm, clamped_rms_norm, rms_norm, scale_norm, add_layer_norm, add_clamped_rms_norm, add_rms_norm,
        add_scale_norm;
    packed: packed_linear, packed_embedding;
    pointwise: affine;
    position: relative_position_bias, sinusoid;
    reduce: sum, mean, sum_to, max, argmax;
    rotary: rotary;
    sample: sample;
    shift: shift_tokens;
    softmax: softmax;
    topk: top_k_mask;
}

pub use linear_cross_entropy::rows_of_logits;
pub use packed::PackedMatrix;
pub use sample::{SampleFilter, SampleSpec};
