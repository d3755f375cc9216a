//! The autograd tape: a list of recorded ops, walked backwards once.
//!
//! The list is in execution order, so the backward pass is a loop that pops. An op's saved values are fields of its
//! node: popping frees them, and memory falls while the pass runs. Without a tape nothing is recorded.
//!
//! A tape belongs to its thread. A result that depends on a leaf, and that a tape of another thread may have been meant
//! to record, is marked ([`GradSlot`]) and rejected by that tape: a backward pass that succeeds returns the gradients
//! of the same program on one thread.

mod belonging;
mod checkpoint;
mod gradcheck;
mod gradients;
mod record;
mod rule;
mod seed;
mod stack;
mod sum;
mod walk;

use std::{cell::RefCell, fmt, marker::PhantomData};

use self::{
    belonging::tracks,
    checkpoint::Nest,
    seed::Seed,
    walk::{Node, walk},
};
use crate::{
    Error, ErrorKind, Result,
    error::ensure,
    profile,
    tensor::{GradSlot, LeafId, Tensor, ThreadMark, next_id},
};

#[cfg(feature = "cuda")]
pub(crate) use self::record::is_recording;
pub(crate) use self::rule::LateSum;
pub use self::{
    checkpoint::checkpoint,
    gradcheck::{Gradcheck, GradcheckReport, InputReport, gradcheck},
    gradients::Gradients,
    record::{discrete, record},
    rule::{Backward, InputGrad, InputGrads},
};
pub(crate) use self::{
    record::{computed, needs, record_beside, record_cheap, record_cheap_after},
    seed::{MaskStream, dropout_stream, mask_stream},
};

thread_local! {
    /// Tapes of this thread, innermost last; only `checkpoint` nests them.
    static STACK: RefCell<Vec<Recording>> = const { RefCell::new(Vec::new()) };
}

/// Mode of a tape: whether dropout acts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    /// Gradients, with dropout.
    Train,
    /// Gradients without dropout.
    Grad,
}

struct Recording {
    id: u64,
    thread: ThreadMark,
    nodes: Vec<Node>,
    mode: Mode,
    seed: Seed,
    stream: u64,
    /// `true` inside the forward pass of `checkpoint`: outputs are marked as tracked, but nothing is kept.
    discard: bool,
    nest: Nest,
    /// Leaves that ops of a run without nodes used: those of the segment.
    used: Vec<LeafId>,
}

/// Called with a leaf once nothing more comes to its gradient, and with all gradients so far.
pub(crate) type LeafDone<'a> = &'a mut dyn FnMut(LeafId, &mut Gradients) -> Result<()>;

/// Records the ops of this thread while it lives, for one backward pass.
///
/// ```
/// use x_transformers::{Device, Tape, Tensor};
/// # fn main() -> x_transformers::Result<()> {
/// let x = Tensor::scalar(3.0f32, &Device::Cpu)?.requires_grad()?;
/// let mut tape = Tape::grad();
/// let y = x.mul(&x)?;
/// let grads = tape.backward(&y)?;
/// assert_eq!(grads.get(&x).map(|g| g.item()).transpose()?, Some(6.0));
/// # Ok(())
/// # }
/// ```
#[must_use = "a tape records while it lives"]
#[doc(alias = "GradientTape")]
#[doc(alias = "no_grad")]
#[doc(alias = "enable_grad")]
#[doc(alias = "autograd")]
pub struct Tape {
    id: u64,
    /// A tape belongs to its thread.
    thread: PhantomData<*const ()>,
}

impl fmt::Debug for Tape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tape").field("id", &self.id).finish()
    }
}

impl Tape {
    /// Starts a tape with dropout; the seed determines every mask.
    pub fn train(seed: u64) -> Self {
        Self::start(Mode::Train, Seed::known(seed), 0, false, Nest::default())
    }

    /// Starts a tape without dropout.
    pub fn grad() -> Self {
        Self::start(Mode::Grad, Seed::known(0), 0, false, Nest::default())
    }

    fn start(mode: Mode, seed: Seed, stream: u64, discard: bool, nest: Nest) -> Self {
        profile::pause();
        let (id, thread) = (next_id(), ThreadMark::here());
        let (nodes, used) = (Vec::new(), Vec::new());
        with_stack(|stack| stack.push(Recording { id, thread, nodes, mode, seed, stream, discard, nest, used }));
        Self { id, thread: PhantomData }
    }

    /// Ends the recording and returns it, unless it has ended.
    fn take(&mut self) -> Option<Recording> {
        with_stack(|stack| self.find(stack).map(|at| stack.remove(at)))
    }

    /// Returns the index of the recording; tapes usually end before those that started earlier.
    fn find(&self, stack: &[Recording]) -> Option<usize> {
        stack.iter().rposition(|recording| recording.id == self.id)
    }

    /// Returns the number of recorded ops.
    pub fn len(&self) -> usize {
        with_stack(|stack| self.find(stack).map_or(0, |at| stack[at].nodes.len()))
    }

    /// Returns `true` if nothing is recorded.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Computes the gradients of a tensor with one element with respect to every leaf it depends on.
    ///
    /// Errors: it has more elements ([`ErrorKind::NotScalar`]), depends on no leaf ([`ErrorKind::NotTracked`]), was
    /// computed on another thread ([`ErrorKind::OtherThread`]), or this tape has already run backward
    /// ([`ErrorKind::BackwardTwice`]).
    pub fn backward(&mut self, output: &Tensor) -> Result<Gradients> {
        ensure!(output.numel() == 1, Error::new(ErrorKind::NotScalar { shape: output.shape().to_vec() }));
        let one = Tensor::one_of(*output.shape(), output.dtype(), output.device())?;
        self.backward_with(output, &one)
    }

    /// Computes the gradients of `sum(output ⊙ cotangent)`. The cotangent is treated as a constant.
    ///
    /// Errors: those of [`Tape::backward`], or a cotangent of another shape, dtype or device.
    pub fn backward_with(&mut self, output: &Tensor, cotangent: &Tensor) -> Result<Gradients> {
        self.backward_calling(output, cotangent, None)
    }

    /// Computes gradients like [`Tape::backward_with`], and calls `done` for each leaf as soon as its gradient is
    /// complete. The call may take the gradient. Leaves that the output does not depend on may be called too, others used
    /// only after the output are not.
    pub(crate) fn backward_calling(
        &mut self,
        output: &Tensor,
        cotangent: &Tensor,
        done: Option<LeafDone>,
    ) -> Result<Gradients> {
        let kind = |x: &Tensor| format!("{:?} {} on {}", x.shape(), x.dtype(), x.device());
        ensure!(
            output.shape() == cotangent.shape()
                && output.dtype() == cotangent.dtype()
                && output.device() == cotangent.device(),
            Error::shape(
                "backward",
                format_args!("the cotangent is {}, but the output is {}", kind(cotangent), kind(output))
            )
        );
        // Checked first, so that a wrong output leaves the tape usable.
        ensure!(with_stack(|stack| self.find(stack)).is_some(), Error::new(ErrorKind::BackwardTwice));
        match output.slot() {
            GradSlot::Node { tape, thread, .. } if tape != self.id && thread == ThreadMark::here() => {
                return Err(Error::new(ErrorKind::NotTracked));
            }
            _ => ensure!(tracks(self.id, "backward", &[output])?, Error::new(ErrorKind::NotTracked)),
        }
        let recording = self.take().ok_or_else(|| Error::new(ErrorKind::BackwardTwice))?;
        walk(recording, output.slot(), cotangent.detach(), done)
    }
}

impl Drop for Tape {
    fn drop(&mut self) {
        // The nodes are dropped outside of the borrow, since dropping saved values may run any code. A tape kept in a
        // thread-local may outlive the list, which has then dropped its recording.
        let recording = STACK.try_with(|stack| {
            let mut stack = stack.borrow_mut();
            self.find(&stack).map(|at| stack.remove(at))
        });
        drop(recording);
    }
}

fn with_stack<R>(f: impl FnOnce(&mut Vec<Recording>) -> R) -> R {
    STACK.with(|stack| f(&mut stack.borrow_mut()))
}
