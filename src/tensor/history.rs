//! A tensor's place in differentiation, and the thread that its history belongs to.

use std::sync::atomic::{AtomicU64, Ordering};

static NEXT_ID: AtomicU64 = AtomicU64::new(1);

thread_local! {
    static THREAD: ThreadMark = ThreadMark(next_id());
}

/// Returns an id that the process has not used yet.
pub(crate) fn next_id() -> u64 {
    NEXT_ID.fetch_add(1, Ordering::Relaxed)
}

/// Identity of a leaf: a parameter, or a tensor made by [`requires_grad`](super::Tensor::requires_grad).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct LeafId(u64);

impl LeafId {
    pub(crate) fn new() -> Self {
        Self(next_id())
    }
}

/// Identity of a thread, which no later thread reuses.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct ThreadMark(u64);

impl ThreadMark {
    /// History on more than one thread: foreign to every tape.
    pub(crate) const SEVERAL: Self = Self(0);

    pub(crate) fn here() -> Self {
        THREAD.with(|&mark| mark)
    }
}

/// Role of a tensor in differentiation.
#[derive(Clone, Copy, Debug)]
pub(crate) enum GradSlot {
    /// No gradient flows through it.
    Constant,
    Leaf(LeafId),
    /// The output of node `index` of a tape, which belongs to a thread.
    Node {
        tape: u64,
        index: usize,
        thread: ThreadMark,
    },
    /// Computed from a leaf while its thread had no tape: a constant for later tapes of that thread, which started
    /// after it was computed, and an error for tapes of other threads, which may have been meant to record it.
    Untaped {
        thread: ThreadMark,
        /// The op that first used the leaf.
        op: &'static str,
    },
}

impl GradSlot {
    /// Returns `true` if a gradient may flow into it.
    pub(crate) fn is_tracked(&self) -> bool {
        matches!(self, Self::Leaf(_) | Self::Node { .. })
    }

    /// Returns the leaf, if it is one.
    pub(crate) fn leaf(&self) -> Option<LeafId> {
        match self {
            Self::Leaf(leaf) => Some(*leaf),
            _ => None,
        }
    }
}
