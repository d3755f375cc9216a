//! Finds the tape that an op belongs to, given its inputs, if there is one.

use crate::{
    Error, ErrorKind, Result,
    tensor::{GradSlot, Tensor, ThreadMark},
};

/// Returns the slot of an output that is computed from `inputs` on a thread without a tape.
///
/// It depends only on the inputs and the thread, not on the concurrent state of other threads.
///
/// Errors: an input was recorded by a tape of another thread.
pub(super) fn untaped(op: &'static str, inputs: &[&Tensor]) -> Result<GradSlot> {
    let mut slot = GradSlot::Constant;
    for input in inputs {
        let here = ThreadMark::here();
        let (thread, by) = match input.slot() {
            GradSlot::Constant => continue,
            GradSlot::Node { thread, .. } if thread != here => {
                return Err(Error::new(ErrorKind::OtherThread { op, by: None }));
            }
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
        match input.slot() {
            GradSlot::Constant => {}
            GradSlot::Leaf(_) => tracked = true,
            GradSlot::Node { tape: other, .. } if other == tape => tracked = true,
            GradSlot::Node { thread, .. } if thread == ThreadMark::here() => {
                return Err(Error::new(ErrorKind::StaleTape { op }));
            }
            GradSlot::Node { .. } => return Err(Error::new(ErrorKind::OtherThread { op, by: None })),
            GradSlot::Untaped { thread, .. } if thread == ThreadMark::here() => {}
            GradSlot::Untaped { op: by, .. } => return Err(Error::new(ErrorKind::OtherThread { op, by: Some(by) })),
        }
    }
    Ok(tracked)
}
