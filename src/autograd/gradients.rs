//! Gradients of leaves, and their accumulation.

use std::fmt;

use super::{
    rule::{InputGrad, LateSum},
    sum::accumulate,
};
use crate::{
    Error, Result,
    collect::CollectVec,
    ordered::OrderedMap,
    params::{Param, ParamMap},
    tensor::{GradSlot, LeafId, Tensor},
};

/// Gradients of the leaves that a backward pass reached.
///
/// ```
/// use x_transformers::{DType, Device, Init, ParamStore, Tape};
/// let store = ParamStore::new(0, DType::F32, &Device::Cpu);
/// let used = store.param("used", [2], Init::Constant(3.0))?;
/// store.param("forgotten", [2], Init::Constant(0.0))?;
/// let mut tape = Tape::train(0);
/// let loss = used.tensor().square()?.sum(&[])?;
/// let grads = tape.backward(&loss)?;
/// assert_eq!(grads.param(&used).unwrap().to_vec::<f32>()?, [6.0, 6.0]);
/// assert_eq!(grads.unused(&store.params()), ["forgotten"]);
/// # Ok::<(), x_transformers::Error>(())
/// ```
#[derive(Default)]
#[must_use = "gradients change nothing until an optimizer takes them"]
#[doc(alias = "GradStore")]
pub struct Gradients {
    leaves: OrderedMap<LeafId, Tensor>,
    /// Gradients that are summed up before the end of the backward pass.
    late: Vec<(LeafId, LateSum)>,
}

impl fmt::Debug for Gradients {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gradients").field("leaves", &self.leaves.len()).finish()
    }
}

impl Gradients {
    /// Returns the gradient of a leaf: a tensor from [`Tensor::requires_grad`] or [`Param::tensor`].
    pub fn get(&self, leaf: &Tensor) -> Option<&Tensor> {
        match leaf.slot() {
            GradSlot::Leaf(id) => self.leaves.get(&id),
            _ => None,
        }
    }

    /// Returns the gradient of a parameter.
    #[doc(alias = "grad")]
    pub fn param(&self, param: &Param) -> Option<&Tensor> {
        self.leaves.get(&param.leaf())
    }

    /// Returns the number of leaves with a gradient.
    pub fn len(&self) -> usize {
        self.leaves.len()
    }

    /// Returns `true` if no leaf was reached.
    pub fn is_empty(&self) -> bool {
        self.leaves.is_empty()
    }

    /// Returns the names of the parameters that received no gradient, in order.
    pub fn unused(&self, params: &ParamMap) -> Vec<String> {
        let unused = params.iter().filter(|(_, param)| !self.leaves.contains_key(&param.leaf()));
        unused.map(|(name, _)| name.to_string()).collect_vec()
    }

    /// Adds the gradients of another micro-batch.
    ///
    /// Errors: a leaf with another shape, dtype or device; nothing is added then.
    pub fn accumulate(&mut self, other: Gradients) -> Result<()> {
        for (leaf, grad) in other.leaves.iter() {
            let fits = |sum: &Tensor| {
                sum.shape() == grad.shape() && sum.dtype() == grad.dtype() && sum.device() == grad.device()
            };
            if let Some(sum) = self.leaves.get(leaf).filter(|&sum| !fits(sum)) {
                return Err(Error::shape("accumulate", format_args!("cannot add gradient {grad:?} to {sum:?}")));
            }
        }
        let mut add = |(leaf, grad)| self.contribute(leaf, InputGrad::Whole(grad));
        other.leaves.into_iter().try_for_each(&mut add)
    }

    /// Returns all gradients, in the order in which the leaves were created.
    pub fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        self.leaves.values().iter()
    }

    /// Returns all gradients, for replacing them.
    pub(crate) fn tensors_mut(&mut self) -> impl Iterator<Item = &mut Tensor> {
        self.leaves.values_mut().iter_mut()
    }

    /// Sets the gradient of a leaf.
    pub(crate) fn replace(&mut self, leaf: LeafId, grad: Tensor) {
        self.leaves.insert(leaf, grad);
    }

    /// Takes the gradient of a leaf out.
    pub(crate) fn take(&mut self, leaf: LeafId) -> Option<Tensor> {
        self.leaves.remove(&leaf)
    }

    /// Adds a contribution that [`Gradients::finish`] computes.
    pub(super) fn contribute_late(&mut self, leaf: LeafId, sum: LateSum) {
        self.late.push((leaf, sum));
    }

    /// Computes all contributions that are still sums.
    pub(super) fn finish(&mut self) -> Result<()> {
        let late = std::mem::take(&mut self.late);
        self.add_up(late)
    }

    /// Computes those of one leaf, and of others from the same partial sums.
    pub(super) fn finish_leaf(&mut self, leaf: LeafId) -> Result<()> {
        let Some((_, LateSum { partials, .. })) = self.late.iter().find(|(of, _)| *of == leaf) else { return Ok(()) };
        let partials = partials.clone();
        let late = std::mem::take(&mut self.late);
        let (now, later) =
            late.into_iter().partition(|(of, sum)| *of == leaf || sum.partials.shares_storage(&partials));
        self.late = later;
        self.add_up(now)
    }

    fn add_up(&mut self, late: Vec<(LeafId, LateSum)>) -> Result<()> {
        let (leaves, sums): (Vec<LeafId>, Vec<LateSum>) = late.into_iter().unzip();
        let Some(first) = sums.first() else { return Ok(()) };
        let values = (first.finish)(&sums)?;
        leaves.into_iter().zip(values).try_for_each(|(leaf, value)| self.contribute(leaf, InputGrad::Whole(value)))
    }

    pub(super) fn contribute(&mut self, leaf: LeafId, contribution: InputGrad) -> Result<()> {
        let mut sum = self.leaves.remove(&leaf);
        accumulate(&mut sum, contribution)?;
        if let Some(sum) = sum {
            self.leaves.insert(leaf, sum);
        }
        Ok(())
    }
}
