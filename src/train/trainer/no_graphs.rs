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

/// What became of a step.
pub(super) enum Enqueued<B> {
    #[expect(dead_code, reason = "no step is replayed")]
    Replayed(Pending),
    Eager(Vec<B>),
}

impl<M: TrainModel> Trainer<M> {
    pub(super) fn enqueue(&mut self, _before: Option<&Pending>) -> Result<Enqueued<M::Batch>> {
        Ok(Enqueued::Eager(Vec::new()))
    }

    pub(super) fn settle(&mut self, pending: Pending) -> Result<Option<StepReport>> {
        match pending {}
    }
}
