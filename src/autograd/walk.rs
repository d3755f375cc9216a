//! The backward pass: nodes are popped off a list, and lists of recomputed segments are stacked on it.

use super::{
    LeafDone, Recording,
    checkpoint::Segment,
    gradients::Gradients,
    rule::{Backward, InputGrad},
    sum::Sum,
};
use crate::{
    DType, Device, Error, Result,
    collect::CollectVec,
    error::ensure,
    ordered::OrderedMap,
    profile::{self, Cost},
    shape::Shape,
    tensor::{GradSlot, LeafId, Tensor},
};

/// Op on a tape.
pub(super) struct Node {
    pub inputs: Vec<Input>,
    pub rule: Rule,
    /// Cost that the op reported, if there is a profile.
    pub cost: Cost,
}

/// Rule that turns the gradient of a node's output into the gradients of its inputs.
pub(super) enum Rule {
    Op(Box<dyn Backward>),
    /// Runs the segment again, this time with a tape.
    Segment(Box<Segment>),
}

/// Destination of an input's gradient, and its required shape, dtype and device.
pub(super) struct Input {
    slot: GradSlot,
    shape: Shape,
    dtype: DType,
    device: Device,
}

impl Input {
    pub fn all(tensors: &[&Tensor]) -> Vec<Self> {
        let one = |x: &Tensor| Self {
            slot: if x.slot().is_tracked() { x.slot() } else { GradSlot::Constant },
            shape: *x.shape(),
            dtype: x.dtype(),
            device: x.device().clone(),
        };
        tensors.iter().map(|&x| one(x)).collect_vec()
    }

    fn needed(&self) -> bool {
        self.slot.is_tracked()
    }

    fn bytes(&self) -> usize {
        self.shape.numel() * self.dtype.size()
    }

    /// Rejects a gradient of another shape, dtype or device at its source instead of where it would do harm.
    fn check(&self, op: &'static str, contribution: &InputGrad) -> Result<()> {
        let (shape, value) = match contribution {
            _ if !self.needed() => return Ok(()),
            InputGrad::None => return Ok(()),
            InputGrad::Whole(value) => (value.shape(), value),
            InputGrad::Slice { shape, value, .. } => (shape, value),
        };
        self.fits(op, "backward", shape, value)
    }

    fn fits(&self, op: &'static str, rule: &str, shape: &Shape, value: &Tensor) -> Result<()> {
        let (dtype, device) = (value.dtype(), value.device());
        ensure!(
            (shape, dtype) == (&self.shape, self.dtype),
            Error::shape(
                op,
                format_args!(
                    "its {rule} returned a gradient {shape:?} {dtype} for an input {:?} {}",
                    self.shape, self.dtype
                )
            )
        );
        ensure!(
            *device == self.device,
            Error::device(
                op,
                format_args!(
                    "its {rule} returned a gradient on {device} for an input on {}; move it with `to_device`",
                    self.device
                )
            )
        );
        Ok(())
    }
}

/// List that is being walked.
struct Frame {
    nodes: Vec<Node>,
    /// Gradient of each node's output so far.
    grads: Vec<Sum>,
    /// Segment whose contents this list is.
    segment: Option<Outside>,
}

/// Segment as seen by the enclosing list.
struct Outside {
    inputs: Vec<Input>,
    /// Leaves that represented the inputs inside, for inputs that need a gradient.
    leaves: Vec<Option<LeafId>>,
    rule: Option<profile::Rule>,
}

/// Walks a recording backwards from one of its tensors.
///
/// Segments are kept on an explicit stack: a nest of any depth uses no stack of the thread.
///
/// Calls `done` with each leaf after the first of the outermost ops that use it.
pub(super) fn walk(
    recording: Recording,
    output: GradSlot,
    cotangent: Tensor,
    mut done: Option<LeafDone>,
) -> Result<Gradients> {
    let mut leaves = Gradients::default();
    let mut frames = vec![Frame::new(recording, output, cotangent, None, &mut leaves)?];
    let mut first_uses = if done.is_some() { first_uses(&frames[0].nodes) } else { Vec::new() };
    loop {
        if let (Some(done), [outermost]) = (&mut done, &frames[..]) {
            while let Some((_, leaf)) = first_uses.pop_if(|(at, _)| *at >= outermost.nodes.len()) {
                leaves.finish_leaf(leaf)?;
                done(leaf, &mut leaves)?;
            }
        }
        let Some(frame) = frames.last_mut() else { break };
        let Some(node) = frame.nodes.pop() else {
            let outside = frames.pop().and_then(|frame| frame.segment);
            if let (Some(outside), Some(frame)) = (outside, frames.last_mut()) {
                frame.close(outside, &mut leaves)?;
            }
            continue;
        };
        let Some(grad) = frame.grads.pop().map_or(Ok(None), |mut sum| sum.take())? else { continue };
        match node.rule {
            Rule::Op(rule) => frame.apply(rule, node.inputs, node.cost, grad, &mut leaves)?,
            Rule::Segment(segment) => {
                let rule = profile::Rule::begin(grad.device(), grad.shape(), grad.bytes_of_elements());
                let (inside, output) = segment.run_again(&grad)?;
                let outside = Outside { inputs: node.inputs, leaves: segment.leaves(), rule };
                frames.push(Frame::new(inside, output, grad.into_constant(), Some(outside), &mut leaves)?);
            }
        }
    }
    leaves.finish()?;
    Ok(leaves)
}

/// Returns the leaves, and for each the index of the first node that uses it, in ascending order.
fn first_uses(nodes: &[Node]) -> Vec<(usize, LeafId)> {
    let (mut seen, mut uses) = (OrderedMap::default(), Vec::new());
    for (at, node) in nodes.iter().enumerate() {
        let inside = match &node.rule {
            Rule::Segment(segment) => segment.used(),
            Rule::Op(_) => &[],
        };
        for leaf in node.inputs.iter().filter_map(|input| input.slot.leaf()).chain(inside.iter().copied()) {
            if !seen.contains_key(&leaf) {
                seen.insert(leaf, ());
                uses.push((at, leaf));
            }
        }
    }
    uses
}

impl Frame {
    fn new(
        recording: Recording,
        output: GradSlot,
        cotangent: Tensor,
        segment: Option<Outside>,
        leaves: &mut Gradients,
    ) -> Result<Self> {
        let mut nodes = recording.nodes;
        let mut grads = Vec::new();
        match output {
            GradSlot::Node { index, .. } => {
                nodes.truncate(index + 1);
                grads.resize(nodes.len(), Sum::None);
                grads[index] = Sum::Whole(cotangent);
            }
            GradSlot::Leaf(leaf) => {
                nodes.clear();
                leaves.contribute(leaf, InputGrad::Whole(cotangent))?;
            }
            GradSlot::Constant | GradSlot::Untaped { .. } => nodes.clear(),
        }
        Ok(Self { nodes, grads, segment })
    }

    /// Calls a rule and distributes the gradients that it returns.
    fn apply(
        &mut self,
        mut backward: Box<dyn Backward>,
        inputs: Vec<Input>,
        cost: Cost,
        grad: Tensor,
        leaves: &mut Gradients,
    ) -> Result<()> {
        let rule = profile::Rule::begin(grad.device(), grad.shape(), grad.bytes_of_elements());
        let sizes = rule.as_ref().map(|_| inputs.iter().map(Input::bytes).collect_vec());
        let need: Vec<bool> = inputs.iter().map(Input::needed).collect_vec();
        let name = backward.name();
        if let Some(&Input { slot: GradSlot::Node { index, .. }, .. }) = inputs.first()
            && let Some(sum) = self.grads[index].take_whole()
            && let Some(sum) = backward.accumulate_into(sum)
        {
            inputs[0].fits(name, "accumulate_into", sum.shape(), &sum)?;
            self.grads[index] = Sum::Whole(sum.into_constant());
        }
        let given = backward.backward(grad, &need)?;
        ensure!(
            given.inputs.len() == inputs.len(),
            Error::argument(
                name,
                format_args!("its backward returned {} gradients for {} inputs", given.inputs.len(), inputs.len())
            )
        );
        for (input, contribution) in inputs.iter().zip(given.inputs) {
            input.check(name, &contribution)?;
            self.give(input.slot, contribution, leaves)?;
        }
        for (at, sum) in given.late {
            let Some(input) = inputs.get(at).filter(|input| input.needed()) else { continue };
            match input.slot {
                GradSlot::Leaf(leaf) if *input.shape == [sum.columns[1]] && input.dtype == sum.dtype => {
                    leaves.contribute_late(leaf, sum);
                }
                slot => {
                    for value in (sum.finish)(std::slice::from_ref(&sum))? {
                        let contribution = InputGrad::Whole(value);
                        input.check(name, &contribution)?;
                        self.give(slot, contribution, leaves)?;
                    }
                }
            }
        }
        match (rule, sizes) {
            (Some(rule), Some(sizes)) => rule.end(name, cost, sizes.into_iter().zip(need)),
            _ => Ok(()),
        }
    }

    fn give(&mut self, to: GradSlot, contribution: InputGrad, leaves: &mut Gradients) -> Result<()> {
        match to {
            GradSlot::Leaf(leaf) => leaves.contribute(leaf, contribution),
            GradSlot::Node { index, .. } => self.grads[index].add(contribution),
            GradSlot::Constant | GradSlot::Untaped { .. } => Ok(()),
        }
    }

    /// Distributes the gradients of a segment's inputs.
    fn close(&mut self, segment: Outside, leaves: &mut Gradients) -> Result<()> {
        let sizes: Vec<_> = segment.inputs.iter().map(|input| (input.bytes(), input.needed())).collect_vec();
        for (input, leaf) in segment.inputs.into_iter().zip(segment.leaves) {
            leaf.map_or(Ok(()), |leaf| leaves.finish_leaf(leaf))?;
            if let Some(grad) = leaf.and_then(|leaf| leaves.take(leaf)) {
                let contribution = InputGrad::Whole(grad);
                input.check("checkpoint", &contribution)?;
                self.give(input.slot, contribution, leaves)?;
            }
        }
        segment.rule.map_or(Ok(()), |rule| rule.end("checkpoint", Cost::NONE, sizes.into_iter()))
    }
}
