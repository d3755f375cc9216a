//! A tensor's place in differentiation, and the thread that its history belongs to.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::{Error, Result, Tensor};

static NEXT_ID: AtomicU64 = AtomicU64::new(1);

thread_local! {
    static THREAD: ThreadMark = ThreadMark(next_id());
}

/// Returns a number that the process has not used yet.
pub(super) fn next_id() -> u64 {
    NEXT_ID.fetch_add(1, Ordering::Relaxed)
}

/// The identity of a leaf: a parameter, or a tensor made by [`Tensor::requires_grad`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct LeafId(u64);

impl LeafId {
    pub(in crate::core) fn new() -> Self {
        Self(next_id())
    }
}

/// A thread, by a number that no later thread gets again.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::core) struct ThreadMark(u64);

impl ThreadMark {
    /// History on more than one thread: foreign to every tape.
    const SEVERAL: Self = Self(0);

    pub(super) fn here() -> Self {
        THREAD.with(|&mark| mark)
    }
}

/// How a tensor takes part in differentiation.
#[derive(Clone, Copy, Debug)]
pub(in crate::core) enum GradSlot {
    /// No gradient flows through it.
    Constant,
    Leaf(LeafId),
    /// The output of node `index` of a tape, which belongs to a thread.
    Node {
        tape: u64,
        index: usize,
        thread: ThreadMark,
    },
    /// Computed from a leaf while its thread had no tape: a constant to later tapes of that thread, which computed it
    /// before they began, and an error to tapes of other threads, which might have been meant to record it.
    Untaped {
        thread: ThreadMark,
        /// The op that first used the leaf.
        op: &'static str,
    },
}

impl GradSlot {
    /// Returns `true` if a gradient may flow into it.
    pub(super) fn is_tracked(&self) -> bool {
        matches!(self, Self::Leaf(_) | Self::Node { .. })
    }
}

/// Returns the slot of an output that is computed from `inputs` on a thread without a tape.
///
/// It follows from the inputs and the thread alone, and not from what other threads are doing at that moment.
///
/// Errors: an input was recorded by a tape of another thread.
pub(super) fn untaped(op: &'static str, inputs: &[&Tensor]) -> Result<GradSlot> {
    let mut slot = GradSlot::Constant;
    for input in inputs {
        let here = ThreadMark::here();
        let (thread, by) = match input.grad {
            GradSlot::Constant => continue,
            GradSlot::Node { thread, .. } if thread != here => return Err(Error::OtherThread { op, by: None }),
            GradSlot::Leaf(_) | GradSlot::Node { .. } => (here, op),
            GradSlot::Untaped { thread, op } => (thread, op),
        };
        slot = match slot {
            GradSlot::Untaped { thread: before, .. } if before == thread => slot,
            GradSlot::Untaped { .. } => GradSlot::Untaped { thread: ThreadMark::SEVERAL, op: by },
            _ => GradSlot::Untaped { thread, op: by },
        };
    }
    Ok(slot)
}

/// Returns `true` if the tape with this id, which is of this thread, must differentiate an op with these inputs.
///
/// Errors: an input has a history that this tape does not have.
pub(super) fn tracks(tape: u64, op: &'static str, inputs: &[&Tensor]) -> Result<bool> {
    let mut tracked = false;
    for input in inputs {
        match input.grad {
            GradSlot::Constant => {}
            GradSlot::Leaf(_) => tracked = true,
            GradSlot::Node { tape: other, .. } if other == tape => tracked = true,
            GradSlot::Node { thread, .. } if thread == ThreadMark::here() => return Err(Error::StaleTape { op }),
            GradSlot::Node { .. } => return Err(Error::OtherThread { op, by: None }),
            GradSlot::Untaped { thread, .. } if thread == ThreadMark::here() => {}
            GradSlot::Untaped { op: by, .. } => return Err(Error::OtherThread { op, by: Some(by) }),
        }
    }
    Ok(tracked)
}
