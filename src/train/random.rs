//! Random numbers of a step: a function of the seed, the step and the micro-batch. A resumed run draws the same
//! numbers as an uninterrupted one, without a saved generator state.

use crate::Philox;

/// Purpose of the numbers; each purpose has streams of its own.
#[derive(Clone, Copy)]
pub(super) enum Purpose {
    /// Offsets of the windows of a batch.
    Batch = 1,
    /// Seed of a tape, which determines the dropout masks.
    Tape = 2,
    /// Order of the rows of an epoch.
    Shuffle = 3,
    /// Masked tokens of a batch.
    Mask = 4,
    /// Masked tokens of a batch of the validation set.
    ValidationMask = 5,
    /// Images that are mirrored.
    Flip = 6,
}

/// Maximum number of micro-batches in a step.
pub(super) const MAX_MICRO: u64 = 1 << 20;

/// Maximum number of steps in a run.
pub(super) const MAX_STEPS: u64 = 1 << 40;

/// Returns the index of a stream: purpose, step and micro-batch in separate bits.
pub(super) fn stream(purpose: Purpose, step: u64, micro: u64) -> u64 {
    ((purpose as u64) << 60) | ((step % MAX_STEPS) << 20) | (micro % MAX_MICRO)
}

/// Returns the seed of a micro-batch's tape.
pub(super) fn tape_seed(seed: u64, step: u64, micro: u64) -> u64 {
    let [high, low, ..] = Philox::new(seed, stream(Purpose::Tape, step, micro)).block(0);
    (high as u64) << 32 | low as u64
}
