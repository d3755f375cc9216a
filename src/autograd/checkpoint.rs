//! Activation checkpointing: segments that keep only their inputs and are run again in the backward pass.
//!
//! Running a segment again runs the segments inside of it too, for their outputs, and each of those is run again when the
//! walk reaches it: a segment that is `d` deep in a nest runs `d + 1` times. That is the price of keeping nothing, and small
//! where groups of layers are checkpointed. A deep nest (a recursion) would take quadratic time and one stack frame more
//! for each level, so segments below [`DEEP`] levels leave their outputs on the [`Trace`] of the nest: whoever runs the
//! segment around them again takes the outputs from there. They run twice however deep the nest is, and the backward
//! pass calls no more than [`DEEP`] segments inside of each other.

use std::{
    cell::{Cell, RefCell},
    ops::Range,
    rc::Rc,
};

use super::{
    Mode, Recording, Tape,
    belonging::{tracks, untaped},
    record::{needs, push},
    seed::Seed,
    stack,
    walk::{Input, Node, Rule},
    with_stack,
};
use crate::{
    DType, Error, ErrorKind, Result,
    collect::CollectVec,
    error::ensure,
    profile::Cost,
    shape::Shape,
    tensor::{GradSlot, LeafId, Tensor},
};

const OP: &str = "checkpoint";

/// Number of nesting levels whose segments keep only their inputs. Groups within groups of layers have two or three.
const DEEP: usize = 8;

/// Minimum number of free stack bytes for starting a segment that is [`DEEP`]: enough for the ops of one level.
const ROOM: usize = 256 << 10;

/// The function that `checkpoint` runs twice.
type Function = dyn Fn(&[Tensor]) -> Result<Tensor>;

/// Outputs of a nest's deep segments, in the order in which they started.
type Trace = Rc<RefCell<Vec<Entry>>>;

struct Entry {
    inputs: Vec<(Shape, DType)>,
    /// `None` if the segment failed: it is run again, and fails again.
    output: Option<Traced>,
    /// Number of the random stream after it.
    stream: u64,
    /// End of the entries of segments inside this one; 0 while it runs.
    end: usize,
}

/// Output on the trace.
enum Traced {
    Kept(Tensor, bool),
    /// The enclosing segment is being walked: it is not needed again.
    Taken,
}

/// Place of a recording in a nest of checkpoints.
#[derive(Clone, Default)]
pub(super) struct Nest {
    /// Number of enclosing segments, including its own.
    level: usize,
    trace: Trace,
    /// Entries to take outputs from, if this is not the first run; the start advances.
    replay: Option<Range<usize>>,
}

/// Segment on a tape.
pub(super) struct Segment {
    f: Box<Function>,
    /// Inputs as separate leaves, or constants.
    inputs: Vec<Tensor>,
    mode: Mode,
    seed: Seed,
    stream: u64,
    nest: Nest,
    /// Leaves that it uses beside its inputs.
    used: Vec<LeafId>,
}

impl Segment {
    pub fn used(&self) -> &[LeafId] {
        &self.used
    }

    pub fn leaves(&self) -> Vec<Option<LeafId>> {
        self.inputs.iter().map(|input| input.slot().leaf()).collect_vec()
    }

    /// Runs the segment with a tape. Returns the recording and the slot of the output.
    pub fn run_again(&self, grad: &Tensor) -> Result<(Recording, GradSlot)> {
        let mut tape = Tape::start(self.mode, self.seed.clone(), self.stream, false, self.nest.clone());
        let output = (self.f)(&self.inputs)?;
        let same = output.shape() == grad.shape() && output.dtype() == grad.dtype() && output.device() == grad.device();
        ensure!(same && tracks(tape.id, OP, &[&output])?, differs());
        let recording = tape.take().ok_or_else(differs)?;
        ensure!(recording.nest.replay.as_ref().is_some_and(Range::is_empty), differs());
        Ok((recording, output.slot()))
    }
}

fn differs() -> Error {
    Error::argument(
        OP,
        "the segment computed something else when it was rerun for the backward pass; it must depend only on its \
         inputs, parameters and constants",
    )
}

fn too_deep(level: usize) -> Error {
    Error::argument(
        OP,
        format_args!(
            "{level} nested checkpoints need more stack than this thread has left; nest fewer, or run on a thread with \
             a larger `stack_size` (std::thread::Builder)"
        ),
    )
}

/// Runs `f` without keeping its activations; the backward pass runs it again (activation checkpointing, Chen et al.,
/// <https://arxiv.org/abs/1604.06174>).
///
/// `f` gets `inputs` back in their order and may use parameters freely; both runs must do the same. Dropout masks are
/// the same in both runs.
///
/// Checkpoints may nest. A segment that is `d ≤ 8` deep runs `d + 1` times in all. A deeper one runs only twice, but
/// its output is kept from the forward pass until the enclosing segment is walked: a nest takes time and memory linear
/// in its depth. The backward pass needs no stack for it; the forward pass, whose recursion is the caller's, returns an
/// error before the thread's stack overflows.
///
/// Errors: those of `f`; [`ErrorKind::StaleTape`] if it captures a tensor of the outer tape instead of taking it as
/// input; [`ErrorKind::Argument`] if a nest needs more stack than the thread has.
#[doc(alias = "gradient_checkpointing")]
#[doc(alias = "activation_checkpointing")]
pub fn checkpoint(f: impl Fn(&[Tensor]) -> Result<Tensor> + 'static, inputs: &[&Tensor]) -> Result<Tensor> {
    run(Box::new(f), inputs)
}

/// Runs a segment. This is the stack frame of each level while its segment runs: not generic, and small.
fn run(f: Box<Function>, inputs: &[&Tensor]) -> Result<Tensor> {
    let Some(mut call) = Call::begin(inputs)? else { return plain(f, inputs) };
    let output = match call.answer.take() {
        Some(output) => output,
        None => {
            let tape = call.start();
            let output = f(&call.inputs);
            call.end(tape, output)?
        }
    };
    Ok(call.record(f, inputs, output))
}

/// Calls `f`: outside of a tape a checkpoint does nothing else.
fn plain(f: Box<Function>, inputs: &[&Tensor]) -> Result<Tensor> {
    thread_local! {
        static LEVEL: Cell<usize> = const { Cell::new(0) };
    }
    struct Inside(usize);
    impl Drop for Inside {
        fn drop(&mut self) {
            LEVEL.set(self.0 - 1);
        }
    }
    untaped(OP, inputs)?;
    let inside = Inside(LEVEL.get() + 1);
    LEVEL.set(inside.0);
    ensure!(inside.0 <= DEEP || stack::has(ROOM), too_deep(inside.0));
    let inputs: Vec<Tensor> = inputs.iter().map(|&input| input.clone()).collect_vec();
    f(&inputs)
}

/// One call of `checkpoint` on a tape.
struct Call {
    inputs: Vec<Tensor>,
    mode: Mode,
    seed: Seed,
    stream: u64,
    nest: Nest,
    /// Its entry on the trace, if this is the first run of a deep one.
    entry: Option<usize>,
    /// Its output on the trace.
    answer: Option<Tensor>,
    tracked: bool,
    /// Entries of the segments inside.
    inside: Range<usize>,
    /// Leaves that the run used.
    used: Vec<LeafId>,
}

impl Call {
    #[inline(never)]
    fn begin(inputs: &[&Tensor]) -> Result<Option<Box<Self>>> {
        let Some((mode, seed, stream, mut nest)) = with_stack(|stack| {
            stack
                .last()
                .map(|recording| (recording.mode, recording.seed.clone(), recording.stream, recording.nest.clone()))
        }) else {
            return Ok(None);
        };
        let inner = inputs.iter().map(|&input| {
            let [needed] = needs(OP, [input])?;
            if needed { input.requires_grad() } else { Ok(input.detach()) }
        });
        let inner: Vec<Tensor> = inner.try_collect_vec()?;
        if nest.level == 0 {
            nest.trace = Trace::default();
        }
        nest.level += 1;
        let deep = nest.level > DEEP;
        let start = nest.replay.as_ref().map_or_else(|| nest.trace.borrow().len(), |replay| replay.start);
        let mut call = Self {
            inputs: inner,
            mode,
            seed,
            stream,
            nest,
            entry: None,
            answer: None,
            tracked: false,
            inside: start..start,
            used: Vec::new(),
        };
        if deep {
            match &call.nest.replay {
                None => call.enter()?,
                Some(_) => call.look_up()?,
            }
        }
        Ok(Some(Box::new(call)))
    }

    fn signature(&self) -> Vec<(Shape, DType)> {
        self.inputs.iter().map(|input| (*input.shape(), input.dtype())).collect_vec()
    }

    /// Creates the entry of a deep segment on its first run.
    fn enter(&mut self) -> Result<()> {
        ensure!(stack::has(ROOM), too_deep(self.nest.level));
        let mut trace = self.nest.trace.borrow_mut();
        self.entry = Some(trace.len());
        trace.push(Entry { inputs: self.signature(), output: None, stream: 0, end: 0 });
        self.inside = trace.len()..trace.len();
        Ok(())
    }

    /// Takes the output of a deep segment from the trace, if it is there.
    fn look_up(&mut self) -> Result<()> {
        let Some(replay) = &mut self.nest.replay else { return Ok(()) };
        // Nodes are kept by the enclosing segment in its own second run: the output is not needed after that.
        let last = with_stack(|stack| stack.last().is_some_and(|recording| !recording.discard));
        let mut trace = self.nest.trace.borrow_mut();
        let at = replay.start;
        let entry = trace.get_mut(at).filter(|entry| at < replay.end && entry.end > at).ok_or_else(differs)?;
        ensure!(
            entry.inputs.iter().copied().eq(self.inputs.iter().map(|input| (*input.shape(), input.dtype()))),
            differs()
        );
        self.inside = at + 1..entry.end;
        match &entry.output {
            None => *replay = at + 1..entry.end,
            Some(Traced::Taken) => return Err(differs()),
            Some(Traced::Kept(output, tracked)) => {
                (self.answer, self.tracked) = (Some(output.clone()), *tracked);
                if last {
                    entry.output = Some(Traced::Taken);
                }
                let (stream, end) = (entry.stream, entry.end);
                drop(trace);
                advance(stream, Some(end));
            }
        }
        Ok(())
    }

    /// Starts the run that keeps nothing.
    #[inline(never)]
    fn start(&self) -> Tape {
        Tape::start(self.mode, self.seed.clone(), self.stream, true, self.nest.clone())
    }

    /// Ends that run.
    #[inline(never)]
    fn end(&mut self, mut tape: Tape, output: Result<Tensor>) -> Result<Tensor> {
        let mut recording = tape.take().ok_or_else(|| Error::new(ErrorKind::StaleTape { op: OP }))?;
        self.used = std::mem::take(&mut recording.used);
        let replayed = recording.nest.replay.as_ref().map(|replay| replay.start);
        let mut trace = self.nest.trace.borrow_mut();
        let len = trace.len();
        self.inside.end = replayed.unwrap_or(len);
        let entry = self.entry.and_then(|entry| trace.get_mut(entry));
        // A segment that fails leaves the random stream unchanged, but each run skips its entries.
        let output = output.and_then(|output| Ok((tracks(recording.id, OP, &[&output])?, output.into_constant())));
        let stream = output.as_ref().map_or(self.stream, |_| recording.stream);
        if let Some(entry) = entry {
            (entry.end, entry.stream) = (len, stream);
            entry.output = output.as_ref().ok().map(|(tracked, output)| Traced::Kept(output.clone(), *tracked));
        }
        drop(trace);
        advance(stream, replayed);
        let (tracked, output) = output?;
        self.tracked = tracked;
        Ok(output)
    }

    /// Puts the segment on the enclosing tape. Not through `record`: the output may be tracked only by parameters.
    #[inline(never)]
    #[expect(clippy::boxed_local, reason = "a move of the struct would take the stack that nests are short of")]
    fn record(self: Box<Self>, f: Box<Function>, inputs: &[&Tensor], output: Tensor) -> Tensor {
        if !self.tracked {
            return output;
        }
        let Self { inputs: inner, mode, seed, stream, nest, inside, mut used, .. } = *self;
        let discard = with_stack(|stack| {
            let recording = stack.last_mut().filter(|recording| recording.discard);
            recording.map(|recording| recording.used.append(&mut used)).is_some()
        });
        let nest = Nest { replay: Some(inside), ..nest };
        let node = (!discard).then(|| Node {
            inputs: Input::all(inputs),
            rule: Rule::Segment(Box::new(Segment { f, inputs: inner, mode, seed, stream, nest, used })),
            cost: Cost::NONE,
        });
        push(output, node)
    }
}

/// Advances the innermost recording past a segment.
fn advance(stream: u64, replayed: Option<usize>) {
    with_stack(|stack| {
        if let Some(recording) = stack.last_mut() {
            recording.stream = stream;
            if let (Some(replay), Some(start)) = (&mut recording.nest.replay, replayed) {
                replay.start = start;
            }
        }
    });
}
