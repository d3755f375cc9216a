//! The random numbers of a step: a function of the seed, the step and the micro-batch, so that a resumed run draws
//! what an uninterrupted one draws without saving the state of a generator.

use crate::Philox;

/// Purpose of the numbers; each purpose has streams of its own.
#[derive(Clone, Copy)]
pub(super) enum Purpose {
    /// Offsets of the windows of a batch.
    Batch = 1,
    /// The seed of a tape, which gives the dropout masks.
    Tape = 2,
}

/// Micro-batches that a step can have.
pub(super) const MAX_MICRO: u64 = 1 << 20;

/// Steps that a run can have.
pub(super) const MAX_STEPS: u64 = 1 << 40;

/// The number of a stream: purpose, step and micro-batch in bits of their own.
pub(super) fn stream(purpose: Purpose, step: u64, micro: u64) -> u64 {
    ((purpose as u64) << 60) | ((step % MAX_STEPS) << 20) | (micro % MAX_MICRO)
}

/// The seed of the tape of a micro-batch.
pub(super) fn tape_seed(seed: u64, step: u64, micro: u64) -> u64 {
    let [high, low, ..] = Philox::new(seed, stream(Purpose::Tape, step, micro)).block(0);
    (high as u64) << 32 | low as u64
}
