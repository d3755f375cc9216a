//! The autograd tape: a list of what was computed, walked backwards once.
//!
//! The list is in execution order, so that the backward pass is a loop that pops. What an op saved is a field of its
//! node: popping frees it, and memory falls while the pass runs. Outside of a tape nothing is recorded.

use std::{
    cell::RefCell,
    collections::BTreeMap,
    fmt,
    marker::PhantomData,
    sync::atomic::{AtomicU64, Ordering},
};

use super::{
    param::{Param, ParamMap},
    philox::Philox,
    recompute::Recipe,
    shape::Shape,
    tensor::Tensor,
};
use crate::{DType, Error, Result, error::ensure, profile};

static NEXT_ID: AtomicU64 = AtomicU64::new(1);

thread_local! {
    /// The tapes of this thread, the innermost last; only `checkpoint` nests them.
    static STACK: RefCell<Vec<Recording>> = const { RefCell::new(Vec::new()) };
}

/// The identity of a leaf: a parameter, or a tensor made by [`Tensor::requires_grad`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct LeafId(u64);

impl LeafId {
    pub(super) fn new() -> Self {
        Self(NEXT_ID.fetch_add(1, Ordering::Relaxed))
    }
}

/// How a tensor takes part in differentiation.
#[derive(Clone, Copy, Debug)]
pub(super) enum GradSlot {
    Constant,
    Leaf(LeafId),
    Node { tape: u64, index: usize },
}

/// Whether dropout acts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    /// Gradients, and dropout as the model says.
    Train,
    /// Gradients without dropout.
    Grad,
}

/// One backward rule: a struct of what the op saved.
pub trait Backward {
    /// The op, for messages.
    fn name(&self) -> &'static str;

    /// The gradient of the output in, one contribution per recorded input out.
    ///
    /// `need[i]` says whether input `i` wants one. `grad` has the output's shape and dtype, any layout, and may be
    /// overwritten if it is the only handle on its storage.
    fn backward(self: Box<Self>, grad: Tensor, need: &[bool]) -> Result<Contributions>;

    /// Offers the gradient that later ops have given to the first input so far. A rule that adds it to its own in the
    /// same pass keeps it, and gives the sum of both as a whole; the others hand it back, as they do unless they say
    /// otherwise.
    fn add_to(&mut self, sum: Tensor) -> Option<Tensor> {
        Some(sum)
    }
}

/// What a backward rule gives to one input.
#[derive(Debug)]
pub enum Contribution {
    /// Nothing.
    None,
    /// A gradient of the input's shape and dtype.
    Whole(Tensor),
    /// A gradient for a part of the input, the rest being zero; saves building full-size zeros per view.
    Part {
        /// Of the whole input.
        shape: Shape,
        /// Which elements of it.
        part: Part,
        /// The gradient of the part.
        value: Tensor,
    },
}

/// The elements `start..start + len` along dimension `dim` of a tensor.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Part {
    /// The dimension, counted from 0.
    pub dim: usize,
    /// The first element.
    pub start: usize,
    /// The number of elements.
    pub len: usize,
}

/// What a backward rule returns.
#[derive(Debug)]
pub struct Contributions {
    inputs: Vec<Contribution>,
    leaves: Vec<(LeafId, Tensor)>,
}

impl Contributions {
    /// One contribution per input, in the order in which they were recorded.
    pub fn new(inputs: Vec<Contribution>) -> Self {
        Self { inputs, leaves: Vec::new() }
    }

    /// For an op with one differentiable input.
    pub fn one(grad: Tensor) -> Self {
        Self::new(vec![Contribution::Whole(grad)])
    }

    /// Whole gradients, or none where the input needs none.
    pub fn whole(grads: impl IntoIterator<Item = Option<Tensor>>) -> Self {
        Self::new(grads.into_iter().map(|grad| grad.map_or(Contribution::None, Contribution::Whole)).collect())
    }
}

struct Node {
    inputs: Vec<Input>,
    backward: Box<dyn Backward>,
    /// Of the forward pass, if a profile counts them.
    operations: f64,
}

/// Where the gradient of an input goes, and what it must look like.
struct Input {
    slot: GradSlot,
    shape: Shape,
    dtype: DType,
}

impl Input {
    fn all(tensors: &[&Tensor]) -> Vec<Self> {
        tensors.iter().map(|&x| Self { slot: x.grad, shape: *x.shape(), dtype: x.dtype() }).collect()
    }

    fn bytes(&self) -> usize {
        self.shape.elements() * self.dtype.size()
    }

    /// Refuses a gradient of another shape or dtype where it comes from, instead of where it would do harm.
    fn check(&self, op: &'static str, contribution: &Contribution) -> Result<()> {
        let (shape, value) = match contribution {
            _ if matches!(self.slot, GradSlot::Constant) => return Ok(()),
            Contribution::None => return Ok(()),
            Contribution::Whole(value) => (value.shape(), value),
            Contribution::Part { shape, value, .. } => (shape, value),
        };
        let (given, needed) = ((shape, value.dtype()), (&self.shape, self.dtype));
        ensure!(
            given == needed,
            Error::shape(
                op,
                format!("its backward gave a gradient {shape:?} {} for an input {:?} {}", given.1, needed.0, needed.1)
            )
        );
        Ok(())
    }
}

struct Recording {
    id: u64,
    nodes: Vec<Node>,
    mode: Mode,
    seed: u64,
    stream: u64,
    /// Inside the forward pass of `checkpoint`: outputs are marked as tracked, but nothing is kept.
    discard: bool,
}

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
    /// Gradients with dropout; the seed fixes every mask.
    pub fn train(seed: u64) -> Self {
        Self::start(Mode::Train, seed, 0, false)
    }

    /// Gradients without dropout.
    pub fn grad() -> Self {
        Self::start(Mode::Grad, 0, 0, false)
    }

    fn start(mode: Mode, seed: u64, stream: u64, discard: bool) -> Self {
        profile::pause();
        let id = NEXT_ID.fetch_add(1, Ordering::Relaxed);
        with_stack(|stack| stack.push(Recording { id, nodes: Vec::new(), mode, seed, stream, discard }));
        Self { id, thread: PhantomData }
    }

    /// Number of recorded ops.
    pub fn len(&self) -> usize {
        with_stack(|stack| stack.iter().find(|r| r.id == self.id).map_or(0, |r| r.nodes.len()))
    }

    /// Whether nothing is recorded.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Gradients of a tensor with one element with respect to every leaf it depends on.
    ///
    /// Errors: it has more elements ([`Error::NotScalar`]), depends on no leaf ([`Error::NotTracked`]), or this tape
    /// has run backward already ([`Error::BackwardTwice`]).
    pub fn backward(&mut self, output: &Tensor) -> Result<Gradients> {
        ensure!(output.elements() == 1, Error::NotScalar { shape: output.shape().to_vec() });
        let one = Tensor::ones(*output.shape(), output.dtype(), output.device())?;
        self.backward_with(output, &one)
    }

    /// Gradients of `sum(output ⊙ cotangent)`.
    ///
    /// Errors: as [`Tape::backward`], or a cotangent of another shape or dtype.
    pub fn backward_with(&mut self, output: &Tensor, cotangent: &Tensor) -> Result<Gradients> {
        ensure!(
            output.shape() == cotangent.shape() && output.dtype() == cotangent.dtype(),
            Error::shape(
                "backward",
                format!(
                    "the cotangent is {:?} {}, the output {:?} {}",
                    cotangent.shape(),
                    cotangent.dtype(),
                    output.shape(),
                    output.dtype()
                )
            )
        );
        self.walk(output.grad, cotangent.detach())
    }

    /// The backward pass. Takes the slot and not the output, and owns the cotangent: neither outlives its use.
    fn walk(&mut self, output: GradSlot, cotangent: Tensor) -> Result<Gradients> {
        let found = with_stack(|stack| {
            let at = stack.iter().position(|recording| recording.id == self.id)?;
            // Nothing is lost by checking first: a wrong output leaves the tape usable.
            match output {
                GradSlot::Node { tape, index } if tape == self.id => Some(Ok((stack.remove(at), Some(index)))),
                GradSlot::Leaf(_) => Some(Ok((stack.remove(at), None))),
                _ => Some(Err(Error::NotTracked)),
            }
        });
        let (recording, index) = found.ok_or(Error::BackwardTwice)??;
        let mut leaves = Gradients::default();
        let mut nodes = recording.nodes;
        let Some(last) = index else {
            if let GradSlot::Leaf(leaf) = output {
                leaves.add(leaf, cotangent)?;
            }
            return Ok(leaves);
        };
        nodes.truncate(last + 1);
        let mut grads: Vec<Option<Tensor>> = vec![None; nodes.len()];
        grads[last] = Some(cotangent);
        while let Some(Node { inputs, mut backward, operations }) = nodes.pop() {
            let Some(grad) = grads.pop().flatten() else { continue };
            let rule = profile::Rule::begin(&grad);
            let sizes = rule.as_ref().map(|_| inputs.iter().map(Input::bytes).collect::<Vec<_>>());
            let need: Vec<bool> = inputs.iter().map(|input| !matches!(input.slot, GradSlot::Constant)).collect();
            let name = backward.name();
            if let Some(&Input { slot: GradSlot::Node { index, .. }, .. }) = inputs.first() {
                grads[index] = grads[index].take().and_then(|sum| backward.add_to(sum));
            }
            let given = backward.backward(grad, &need)?;
            ensure!(
                given.inputs.len() == inputs.len(),
                Error::argument(
                    name,
                    format!("its backward gave {} contributions for {} inputs", given.inputs.len(), inputs.len())
                )
            );
            for (input, contribution) in inputs.into_iter().zip(given.inputs) {
                input.check(name, &contribution)?;
                match input.slot {
                    GradSlot::Constant => {}
                    GradSlot::Leaf(leaf) => leaves.contribute(leaf, contribution)?,
                    GradSlot::Node { index, .. } => accumulate(&mut grads[index], contribution)?,
                }
            }
            for (leaf, grad) in given.leaves {
                leaves.add(leaf, grad)?;
            }
            if let (Some(rule), Some(sizes)) = (rule, sizes) {
                rule.end(name, operations, sizes.into_iter().zip(need))?;
            }
        }
        Ok(leaves)
    }
}

impl Drop for Tape {
    fn drop(&mut self) {
        // The nodes are dropped outside of the borrow: what they saved may be anything.
        // A tape kept in a thread-local may outlive the list, which has then dropped its recording.
        let recording = STACK.try_with(|stack| {
            let mut stack = stack.borrow_mut();
            let at = stack.iter().position(|recording| recording.id == self.id)?;
            Some(stack.remove(at))
        });
        drop(recording);
    }
}

fn with_stack<R>(f: impl FnOnce(&mut Vec<Recording>) -> R) -> R {
    STACK.with(|stack| f(&mut stack.borrow_mut()))
}

/// Adds a contribution in place where the sum so far is ours alone; the first one is moved in.
fn accumulate(sum: &mut Option<Tensor>, contribution: Contribution) -> Result<()> {
    match contribution {
        Contribution::None => {}
        Contribution::Whole(value) => {
            *sum = Some(match sum.take() {
                // A rule may hand out what it saved, which need not be a constant.
                None => value.detach(),
                Some(sum) => sum.accumulate(&value)?,
            });
        }
        Contribution::Part { shape, part, value } => {
            let whole = match sum.take() {
                None => Tensor::zeros(shape, value.dtype(), value.device())?,
                Some(sum) => sum,
            };
            *sum = Some(whole.accumulate_part(part, &value)?);
        }
    }
    Ok(())
}

/// Puts an op on the tape and returns its output.
///
/// This is the only way in which a float result that depends on a tracked input comes to be. `backward` is called,
/// and so saves its activations, only if a tape is active and an input requires a gradient.
///
/// Errors: an input was recorded on another tape.
pub fn record<B: Backward + 'static>(
    op: &'static str,
    output: Tensor,
    inputs: &[&Tensor],
    backward: impl FnOnce(&Tensor) -> B,
) -> Result<Tensor> {
    let operations = if profile::active() {
        profile::computed(op, &output, inputs, with_stack(|stack| !stack.is_empty()))?
    } else {
        0.0
    };
    record_with(operations, op, output, inputs, backward)
}

/// As [`record`], for an output that an op has besides the one that it records next with this among its inputs; a profile
/// counts both as one call.
pub(crate) fn record_beside<B: Backward + 'static>(
    op: &'static str,
    output: Tensor,
    inputs: &[&Tensor],
    backward: impl FnOnce(&Tensor) -> B,
) -> Result<Tensor> {
    if profile::active() {
        profile::beside(inputs);
    }
    record_with(0.0, op, output, inputs, backward)
}

fn record_with<B: Backward + 'static>(
    operations: f64,
    op: &'static str,
    output: Tensor,
    inputs: &[&Tensor],
    backward: impl FnOnce(&Tensor) -> B,
) -> Result<Tensor> {
    let tracked = with_stack(|stack| match stack.last() {
        Some(recording) => recording.tracks(op, inputs).map(|tracked| tracked.then_some(recording.discard)),
        None => Ok(None),
    })?;
    let Some(discard) = tracked else { return Ok(output) };
    // Outside of the borrow: the closure may compute what it saves.
    let node =
        (!discard).then(|| Node { inputs: Input::all(inputs), backward: Box::new(backward(&output)), operations });
    Ok(push(output, node))
}

/// As [`record`], for an op whose output costs little next to a matrix product: those do not keep it, but call `again`,
/// which may hold what the op's own rule saves and must give the same bits.
pub(crate) fn record_cheap<B: Backward + 'static>(
    op: &'static str,
    output: Tensor,
    inputs: &[&Tensor],
    backward: impl FnOnce(&Tensor) -> B,
    again: impl Fn() -> Result<Tensor> + Send + Sync + 'static,
) -> Result<Tensor> {
    let mut kept = false;
    let mut output = record(op, output, inputs, |output| {
        kept = true;
        backward(output)
    })?;
    // Without a rule that holds the inputs, a recipe would prolong their lives.
    output.recipe = kept.then(|| Recipe::new(again));
    Ok(output)
}

/// As [`record_cheap`], for an op whose rule does not save its input: if that is computed again, so is the output.
pub(crate) fn record_cheap_after<B: Backward + 'static>(
    op: &'static str,
    output: Tensor,
    input: &Tensor,
    backward: impl FnOnce(&Tensor) -> B,
    again: impl Fn(Tensor) -> Result<Tensor> + Send + Sync + 'static,
) -> Result<Tensor> {
    match input.recipe.clone() {
        Some(recipe) => record_cheap(op, output, &[input], backward, move || again(recipe.compute()?)),
        None => record(op, output, &[input], backward),
    }
}

/// Returns the output of an op without a gradient, of which [`discrete`] has approved.
pub(crate) fn computed(op: &'static str, output: Tensor, inputs: &[&Tensor]) -> Result<Tensor> {
    if profile::active() {
        profile::computed(op, &output, inputs, with_stack(|stack| !stack.is_empty()))?;
    }
    Ok(output)
}

/// Marks an output as made by the innermost tape, which keeps the node if there is one.
fn push(output: Tensor, node: Option<Node>) -> Tensor {
    with_stack(|stack| {
        let Some(recording) = stack.last_mut() else { return output };
        let slot = GradSlot::Node { tape: recording.id, index: recording.nodes.len() };
        recording.nodes.extend(node);
        output.with_slot(slot)
    })
}

/// Which of these inputs an op must be able to differentiate; all false outside of a tape.
///
/// Errors: an input was recorded on another tape.
pub(crate) fn needs<const N: usize>(op: &'static str, inputs: [&Tensor; N]) -> Result<[bool; N]> {
    with_stack(|stack| {
        let Some(recording) = stack.last() else { return Ok([false; N]) };
        recording.tracks(op, &inputs)?;
        Ok(inputs.map(|input| !matches!(input.grad, GradSlot::Constant)))
    })
}

/// Checks that an op without a gradient is given no tensor that requires one.
///
/// Errors: [`Error::NoGradient`], or an input was recorded on another tape.
pub fn discrete(op: &'static str, inputs: &[&Tensor]) -> Result<()> {
    with_stack(|stack| {
        let Some(recording) = stack.last() else { return Ok(()) };
        ensure!(!recording.tracks(op, inputs)?, Error::NoGradient { op });
        Ok(())
    })
}

impl Recording {
    fn tracks(&self, op: &'static str, inputs: &[&Tensor]) -> Result<bool> {
        let mut tracked = false;
        for input in inputs {
            match input.grad {
                GradSlot::Constant => {}
                GradSlot::Node { tape, .. } if tape != self.id => return Err(Error::StaleTape { op }),
                _ => tracked = true,
            }
        }
        Ok(tracked)
    }
}

/// A fresh stream for a dropout mask, or `None` where dropout does not act.
pub(crate) fn dropout_stream() -> Option<Philox> {
    with_stack(|stack| {
        let recording = stack.last_mut().filter(|recording| recording.mode == Mode::Train)?;
        recording.stream += 1;
        Some(Philox::new(recording.seed, recording.stream))
    })
}

/// Runs `f` without keeping its activations; the backward pass runs it again (activation checkpointing, Chen et al.,
/// <https://arxiv.org/abs/1604.06174>).
///
/// `f` gets `inputs` back in their order and may use parameters freely. Dropout masks are the same in both runs.
///
/// Errors: those of `f`; [`Error::StaleTape`] if it captures a tensor of the outer tape instead of taking it as input.
pub fn checkpoint(f: impl Fn(&[Tensor]) -> Result<Tensor> + 'static, inputs: &[&Tensor]) -> Result<Tensor> {
    let Some((mode, seed, stream)) =
        with_stack(|stack| stack.last().map(|recording| (recording.mode, recording.seed, recording.stream)))
    else {
        let inputs: Vec<Tensor> = inputs.iter().map(|&input| input.clone()).collect();
        return f(&inputs);
    };
    let needs = inputs.iter().map(|input| needs("checkpoint", [input])).collect::<Result<Vec<_>>>()?;
    let inner: Vec<Tensor> = inputs
        .iter()
        .zip(&needs)
        .map(|(input, [need])| if *need { input.requires_grad() } else { Ok(input.detach()) })
        .collect::<Result<_>>()?;
    let (output, tracked) = {
        let tape = Tape::start(mode, seed, stream, true);
        let output = f(&inner)?;
        let tracked = match output.grad {
            GradSlot::Constant => false,
            // Captured and handed back without an op that would have refused it.
            GradSlot::Node { tape: other, .. } if other != tape.id => {
                return Err(Error::StaleTape { op: "checkpoint" });
            }
            _ => true,
        };
        let end = with_stack(|stack| stack.iter().find(|r| r.id == tape.id).map_or(stream, |r| r.stream));
        drop(tape);
        with_stack(|stack| {
            if let Some(outer) = stack.last_mut() {
                outer.stream = end;
            }
        });
        (output.detach(), tracked)
    };
    if !tracked {
        return Ok(output);
    }
    // Not through `record`: the output may be tracked by parameters alone.
    let discard = with_stack(|stack| stack.last().is_none_or(|recording| recording.discard));
    let node = (!discard).then(|| Node {
        inputs: Input::all(inputs),
        backward: Box::new(CheckpointBackward { f: Box::new(f), inputs: inner, mode, seed, stream }),
        operations: 0.0,
    });
    Ok(push(output, node))
}

/// What `checkpoint` runs twice.
type Segment = dyn Fn(&[Tensor]) -> Result<Tensor>;

struct CheckpointBackward {
    f: Box<Segment>,
    inputs: Vec<Tensor>,
    mode: Mode,
    seed: u64,
    stream: u64,
}

impl Backward for CheckpointBackward {
    fn name(&self) -> &'static str {
        "checkpoint"
    }

    fn backward(self: Box<Self>, grad: Tensor, _need: &[bool]) -> Result<Contributions> {
        let mut tape = Tape::start(self.mode, self.seed, self.stream, false);
        let output = (self.f)(&self.inputs)?.grad;
        let mut grads = tape.walk(output, grad.detach())?;
        let inputs = self
            .inputs
            .iter()
            .map(|input| match input.grad {
                GradSlot::Leaf(leaf) => grads.leaves.remove(&leaf).map_or(Contribution::None, Contribution::Whole),
                _ => Contribution::None,
            })
            .collect();
        Ok(Contributions { inputs, leaves: grads.leaves.into_iter().collect() })
    }
}

/// The gradients of the leaves that a backward pass reached.
#[derive(Default)]
pub struct Gradients {
    leaves: BTreeMap<LeafId, Tensor>,
}

impl fmt::Debug for Gradients {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gradients").field("leaves", &self.leaves.len()).finish()
    }
}

impl Gradients {
    /// The gradient of a leaf: a tensor from [`Tensor::requires_grad`] or [`Param::tensor`].
    pub fn get(&self, leaf: &Tensor) -> Option<&Tensor> {
        match leaf.grad {
            GradSlot::Leaf(id) => self.leaves.get(&id),
            _ => None,
        }
    }

    /// The gradient of a parameter.
    pub fn param(&self, param: &Param) -> Option<&Tensor> {
        self.leaves.get(&param.leaf())
    }

    /// Number of leaves with a gradient.
    pub fn len(&self) -> usize {
        self.leaves.len()
    }

    /// Whether no leaf was reached.
    pub fn is_empty(&self) -> bool {
        self.leaves.is_empty()
    }

    /// The names of the parameters that received no gradient, in order.
    pub fn unused(&self, params: &ParamMap) -> Vec<String> {
        let unused = params.iter().filter(|(_, param)| !self.leaves.contains_key(&param.leaf()));
        unused.map(|(name, _)| name.to_string()).collect()
    }

    /// Adds the gradients of another micro-batch.
    ///
    /// Errors: a leaf with another shape, dtype or device; nothing is added then.
    pub fn accumulate(&mut self, other: Gradients) -> Result<()> {
        for (leaf, grad) in &other.leaves {
            let fits = |sum: &Tensor| {
                sum.shape() == grad.shape() && sum.dtype() == grad.dtype() && sum.device() == grad.device()
            };
            if let Some(sum) = self.leaves.get(leaf).filter(|&sum| !fits(sum)) {
                return Err(Error::shape("accumulate", format!("a gradient {grad:?} cannot be added to {sum:?}")));
            }
        }
        other.leaves.into_iter().try_for_each(|(leaf, grad)| self.add(leaf, grad))
    }

    /// All gradients, in the order in which the leaves were made.
    pub fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        self.leaves.values()
    }

    /// All gradients, to be replaced.
    pub(crate) fn tensors_mut(&mut self) -> impl Iterator<Item = &mut Tensor> {
        self.leaves.values_mut()
    }

    fn add(&mut self, leaf: LeafId, grad: Tensor) -> Result<()> {
        self.contribute(leaf, Contribution::Whole(grad))
    }

    fn contribute(&mut self, leaf: LeafId, contribution: Contribution) -> Result<()> {
        let mut sum = self.leaves.remove(&leaf);
        accumulate(&mut sum, contribution)?;
        if let Some(sum) = sum {
            self.leaves.insert(leaf, sum);
        }
        Ok(())
    }
}
