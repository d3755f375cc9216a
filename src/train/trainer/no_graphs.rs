//! Steps of a build without graphs: all are eager.

use super::Trainer;
use crate::{
    Result,
    train::{StepReport, TrainModel},
};

/// No graph.
#[derive(Default)]
pub(super) struct Graphs;

impl Graphs {
    pub fn allow(&mut self, _allowed: bool) {}

    pub fn has_one(&self) -> bool {
        false
    }

    pub fn reasons(&self) -> &[String] {
        &[]
    }
}

/// Step that was enqueued: none.
pub(super) enum Pending {}

/// Outcome of [`Trainer::enqueue`].
pub(super) enum Enqueued<B> {
    #[expect(dead_code, reason = "no step is replayed")]
    Replayed(Pending),
    Eager(Vec<B>),
}

impl<B> Enqueued<B> {
    pub fn into_batches(self) -> Vec<B> {
        match self {
            Self::Replayed(pending) => match pending {},
            Self::Eager(batches) => batches,
        }
    }
}

/// Outcome of [`Trainer::settle`].
#[expect(dead_code, reason = "no step is pending")]
pub(super) enum Settled<B> {
    Done(StepReport),
    Again(Vec<B>),
}

impl<M: TrainModel> Trainer<M> {
    pub(super) fn enqueue(&mut self, _before: Option<&Pending>, ready: Vec<M::Batch>) -> Result<Enqueued<M::Batch>> {
        Ok(Enqueued::Eager(ready))
    }

    pub(super) fn settle(&mut self, pending: Pending) -> Result<Settled<M::Batch>> {
        match pending {}
    }

    pub(super) fn release_shared(&mut self) -> Result<()> {
        Ok(())
    }

    pub(super) fn free_graph(&mut self) -> bool {
        false
    }
}
