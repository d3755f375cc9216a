//! Values that the backward pass recomputes instead of keeping them.
//!
//! The output of a norm or an activation is cheap to compute, its input is on the tape anyway, and the matrix product
//! after it needs it in the backward pass. Such an output carries a recipe, which the product keeps instead.
//! [`checkpoint`](crate::checkpoint) does the same for whole segments, but this needs no second matrix product.

use std::sync::{Arc, Mutex, PoisonError};

use super::Tensor;
use crate::Result;

/// Maximum number of steps of a recipe.
const STEPS: usize = 16;

/// Recomputation of a tensor, as a constant with the same bits. Clones share the result.
#[derive(Clone)]
pub(crate) struct Recompute(Arc<Shared>);

struct Shared {
    /// Number of recipes in the chain that it ends.
    steps: usize,
    compute: Box<dyn Compute>,
    /// Result, kept until the last handle is dropped: several products may need it in turn.
    value: Mutex<Option<Tensor>>,
}

/// A table of one method, while that of `dyn Fn` compiles each closure twice.
trait Compute: Send + Sync {
    fn call(&self) -> Result<Tensor>;
}

impl<F: Fn() -> Result<Tensor> + Send + Sync> Compute for F {
    fn call(&self) -> Result<Tensor> {
        self()
    }
}

impl Recompute {
    pub(crate) fn new(compute: impl Fn() -> Result<Tensor> + Send + Sync + 'static) -> Self {
        Self::after(0, compute)
    }

    fn after(steps: usize, compute: impl Fn() -> Result<Tensor> + Send + Sync + 'static) -> Self {
        Self(Arc::new(Shared { steps: steps + 1, compute: Box::new(compute), value: Mutex::new(None) }))
    }

    /// Returns `true` if another step may follow: computing a recipe and dropping it recurse through its steps.
    pub(crate) fn may_grow(&self) -> bool {
        self.0.steps < STEPS
    }

    /// Returns the recipe that applies `f` to this one's result.
    pub(crate) fn then(&self, f: impl Fn(Tensor) -> Result<Tensor> + Send + Sync + 'static) -> Self {
        let first = self.clone();
        Self::after(self.0.steps, move || f(first.compute()?))
    }

    /// Computes the result now, without sharing it.
    fn compute(&self) -> Result<Tensor> {
        self.0.compute.call()
    }

    fn value(&self) -> Result<Tensor> {
        let mut value = self.0.value.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(value) = &*value {
            return Ok(value.clone());
        }
        let computed = self.compute()?;
        Ok(value.insert(computed).clone())
    }
}

/// Tensor saved for a backward rule: its values, or how to compute them again.
#[derive(Clone)]
pub(crate) enum Saved {
    Kept(Tensor),
    Again(Recompute),
}

impl Saved {
    /// Saves the recipe, if the tensor has one; otherwise the tensor, as a constant.
    pub fn of(x: &Tensor) -> Self {
        x.recipe().cloned().map_or_else(|| Self::Kept(x.detach()), Self::Again)
    }

    /// Returns the values, as a constant.
    pub fn value(&self) -> Result<Tensor> {
        match self {
            Self::Kept(x) => Ok(x.clone()),
            Self::Again(recipe) => recipe.value(),
        }
    }
}
