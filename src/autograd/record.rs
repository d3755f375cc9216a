//! Recording: ops put themselves on the tape of their thread.

use super::{
    Recording,
    belonging::{tracks, untaped},
    rule::Backward,
    walk::{Input, Node, Rule},
    with_stack,
};
use crate::{
    Device, Error, ErrorKind, Result,
    error::ensure,
    profile::{self, Cost},
    tensor::{GradSlot, Recompute, Tensor},
};

/// Puts an op on the tape and returns its output.
///
/// Every float result that depends on a tracked input is created here. `backward` is called, and saves activations,
/// only if a tape is active and an input requires a gradient.
///
/// Errors: an input was recorded on another tape, or was computed from a leaf on another thread that had no tape.
pub fn record<B: Backward + 'static>(
    op: &'static str,
    output: Tensor,
    inputs: &[&Tensor],
    backward: impl FnOnce(&Tensor) -> B,
) -> Result<Tensor> {
    record_rule(op, output, inputs, &mut once(backward))
}

/// Returns the rule for an output, once. A table of one method, while that of `dyn FnMut` compiles each closure twice.
trait MakeRule {
    fn call(&mut self, output: &Tensor) -> Option<Box<dyn Backward>>;
}

impl<F: FnMut(&Tensor) -> Option<Box<dyn Backward>>> MakeRule for F {
    fn call(&mut self, output: &Tensor) -> Option<Box<dyn Backward>> {
        self(output)
    }
}

fn once<B: Backward + 'static>(
    backward: impl FnOnce(&Tensor) -> B,
) -> impl FnMut(&Tensor) -> Option<Box<dyn Backward>> {
    let mut backward = Some(backward);
    move |output| Some(Box::new(backward.take()?(output)))
}

/// Not generic, so that recording is compiled once and not per op.
fn record_rule(op: &'static str, output: Tensor, inputs: &[&Tensor], rule: &mut dyn MakeRule) -> Result<Tensor> {
    let cost = profiled_cost(op, &output, inputs)?;
    record_with(cost, op, output, inputs, rule)
}

fn profiled_cost(op: &'static str, output: &Tensor, inputs: &[&Tensor]) -> Result<Cost> {
    if profile::active() { profiled(op, output, inputs, with_stack(|stack| !stack.is_empty())) } else { Ok(Cost::NONE) }
}

/// Like [`record`], but for an additional output of an op, which is among the inputs of the output that it records
/// next; a profile counts both as one call.
pub(crate) fn record_beside<B: Backward + 'static>(
    op: &'static str,
    output: Tensor,
    inputs: &[&Tensor],
    backward: impl FnOnce(&Tensor) -> B,
) -> Result<Tensor> {
    if profile::active() {
        profile::beside(inputs.iter().map(|input| input.bytes_of_elements()).sum());
    }
    record_with(Cost::NONE, op, output, inputs, &mut once(backward))
}

/// Reports a finished op to the profile. A view computes nothing: the op that it is a part of ends later.
#[cold]
fn profiled(op: &'static str, output: &Tensor, inputs: &[&Tensor], recorded: bool) -> Result<Cost> {
    if inputs.iter().any(|input| input.shares_storage(output)) {
        return Ok(Cost::NONE);
    }
    let bytes = inputs.iter().map(|input| input.bytes_of_elements()).sum::<usize>() + output.bytes_of_elements();
    profile::computed(op, output.device(), *output.shape(), bytes, recorded)
}

fn record_with(
    cost: Cost,
    op: &'static str,
    output: Tensor,
    inputs: &[&Tensor],
    rule: &mut dyn MakeRule,
) -> Result<Tensor> {
    Ok(match place(op, output, inputs)? {
        Place::None(output) => output,
        Place::Tape { output, discard } => {
            // Outside of the borrow: the closure may compute the values that it saves.
            let rule = if discard { None } else { rule.call(&output) };
            put(output, inputs, rule, cost)
        }
    })
}

/// Place of an output.
#[allow(clippy::large_enum_variant)]
enum Place {
    /// Not on a tape: the output as it is returned.
    None(Tensor),
    /// On the innermost tape; if `discard`, without its rule.
    Tape { output: Tensor, discard: bool },
}

fn place(op: &'static str, output: Tensor, inputs: &[&Tensor]) -> Result<Place> {
    let tracked = with_stack(|stack| match stack.last_mut() {
        Some(recording) => {
            let tracked = tracks(recording.id, op, inputs)?;
            if recording.discard {
                recording.used.extend(inputs.iter().filter_map(|input| input.slot().leaf()));
            }
            Ok(Some(tracked.then_some(recording.discard)))
        }
        None => Ok(None),
    })?;
    Ok(match tracked {
        None => Place::None(marked(op, output, inputs)?),
        Some(None) => Place::None(output),
        Some(Some(discard)) => Place::Tape { output, discard },
    })
}

fn put(output: Tensor, inputs: &[&Tensor], rule: Option<Box<dyn Backward>>, cost: Cost) -> Tensor {
    push(output, rule.map(|rule| Node { inputs: Input::all(inputs), rule: Rule::Op(rule), cost }))
}

/// Marks an output computed without a tape with the thread that computed it.
fn marked(op: &'static str, mut output: Tensor, inputs: &[&Tensor]) -> Result<Tensor> {
    let slot = untaped(op, inputs)?;
    if output.dtype().is_float() {
        output.set_slot(slot);
    }
    Ok(output)
}

/// Like [`record`], but for an op whose output is cheap compared with a matrix product: products do not keep it but
/// call `again`, which may hold the values that the op's own rule saves and must return the same bits.
pub(crate) fn record_cheap<B: Backward + 'static>(
    op: &'static str,
    output: Tensor,
    inputs: &[&Tensor],
    backward: impl FnOnce(&Tensor) -> B,
    again: impl Fn() -> Result<Tensor> + Send + Sync + 'static,
) -> Result<Tensor> {
    with_recipe(op, output, inputs, &mut once(backward), || Recompute::new(again))
}

/// Like [`record_cheap`], but for an op whose rule does not save its input: if the input is recomputed, so is the
/// output.
pub(crate) fn record_cheap_after<B: Backward + 'static>(
    op: &'static str,
    output: Tensor,
    input: &Tensor,
    backward: impl FnOnce(&Tensor) -> B,
    again: impl Fn(Tensor) -> Result<Tensor> + Send + Sync + 'static,
) -> Result<Tensor> {
    match input.recipe().filter(|recipe| recipe.may_grow()) {
        Some(recipe) => with_recipe(op, output, &[input], &mut once(backward), || recipe.then(again)),
        None => record(op, output, &[input], backward),
    }
}

/// Bytes up to which products keep the outputs of cheap ops on a GPU: the launch takes longer than the memory is worth.
const KEPT_ON_GPU: usize = 16 << 20;

fn with_recipe(
    op: &'static str,
    output: Tensor,
    inputs: &[&Tensor],
    rule: &mut dyn MakeRule,
    recipe: impl FnOnce() -> Recompute,
) -> Result<Tensor> {
    let mut kept = false;
    let mut output = record_rule(op, output, inputs, &mut |output: &Tensor| {
        kept = true;
        rule.call(output)
    })?;
    let is_small = *output.device() != Device::Cpu && output.bytes_of_elements() <= KEPT_ON_GPU;
    // Without a rule that holds the inputs, a recipe would extend their lifetimes.
    output.set_recipe((kept && !is_small).then(recipe));
    Ok(output)
}

/// Returns the output of an op without a gradient that has passed [`discrete`].
pub(crate) fn computed(op: &'static str, output: Tensor, inputs: &[&Tensor]) -> Result<Tensor> {
    let taped = with_stack(|stack| !stack.is_empty());
    if profile::active() {
        profiled(op, &output, inputs, taped)?;
    }
    if taped { Ok(output) } else { marked(op, output, inputs) }
}

/// Marks an output as made by the innermost tape, which keeps the node if there is one.
pub(super) fn push(mut output: Tensor, node: Option<Node>) -> Tensor {
    with_stack(|stack| {
        let Some(recording) = stack.last_mut() else { return output };
        let Recording { id: tape, thread, .. } = *recording;
        output.set_slot(GradSlot::Node { tape, index: recording.nodes.len(), thread });
        recording.nodes.extend(node);
        output
    })
}

/// Returns which of these inputs an op must be able to differentiate; all `false` outside of a tape.
///
/// Errors: those of [`record`].
pub(crate) fn needs<const N: usize>(op: &'static str, inputs: [&Tensor; N]) -> Result<[bool; N]> {
    with_stack(|stack| {
        let Some(recording) = stack.last() else { return untaped(op, &inputs).map(|_| [false; N]) };
        tracks(recording.id, op, &inputs)?;
        Ok(inputs.map(|input| input.slot().is_tracked()))
    })
}

/// Checks that an op without a gradient is given no tensor that requires one.
///
/// Errors: [`ErrorKind::NoGradient`], or an input was recorded on another tape or computed from a leaf on another
/// thread.
pub fn discrete(op: &'static str, inputs: &[&Tensor]) -> Result<()> {
    with_stack(|stack| {
        let Some(recording) = stack.last() else { return untaped(op, inputs).map(drop) };
        ensure!(!tracks(recording.id, op, inputs)?, Error::new(ErrorKind::NoGradient { op }));
        Ok(())
    })
}

/// Returns `true` if a tape of this thread records.
#[cfg(feature = "cuda")]
pub(crate) fn is_recording() -> bool {
    with_stack(|stack| !stack.is_empty())
}
