//! Seed of a tape: a number, or where it lies on a device while a graph is recorded.

use std::{cell::Cell, rc::Rc};

use super::{Mode, with_stack};
use crate::{
    Device, Error, Philox, Result, Tensor,
    device::{Arg, Gpu, args},
};

/// Seed of a tape.
#[derive(Clone)]
pub(super) struct Seed {
    value: u64,
    /// Seed that a recorded graph reads when it runs.
    recorded: Option<Rc<Recorded>>,
}

struct Recorded {
    /// `[1]` I64
    at: Tensor,
    /// Name of an op that drew a number on the host, which the graph would repeat.
    host: Cell<Option<&'static str>>,
}

impl Seed {
    pub fn known(value: u64) -> Self {
        Self { value, recorded: None }
    }
}

/// Random stream of a mask, of which kernels draw any element.
#[derive(Clone)]
pub(crate) struct MaskStream {
    pub random: Philox,
    /// Seed on the device, `[1]` I64, which takes the place of that of `random`.
    seed_at: Option<Tensor>,
}

impl MaskStream {
    /// Returns the kernels' argument for the place of the seed.
    ///
    /// Errors: a graph is being recorded and the seed is a number, so that each replay would draw the same mask.
    pub fn seed_at(&self, gpu: &dyn Gpu) -> Result<Arg> {
        if self.seed_at.is_none() {
            gpu.refuse_while_capturing("dropout with the seed of the recording")?;
        }
        let [at] = *args![self.seed_at.as_ref()];
        Ok(at)
    }
}

/// Returns a fresh stream for a mask of tensors on this device, or `None` where dropout does not act.
///
/// Errors: a seed that lies on another device.
pub(crate) fn mask_stream(device: &Device) -> Result<Option<MaskStream>> {
    let drawn = next(|seed, random| (random, seed.recorded.as_ref().map(|recorded| recorded.at.clone())));
    match drawn {
        Some((_, Some(at))) if at.device() != device => {
            Err(Error::device("dropout", format_args!("expected a tensor on {}, got one on {device}", at.device())))
        }
        drawn => Ok(drawn.map(|(random, seed_at)| MaskStream { random, seed_at })),
    }
}

/// Returns a fresh stream for draws of `op` on the host, or `None` where dropout does not act. A graph cannot hold them.
pub(crate) fn dropout_stream(op: &'static str) -> Option<Philox> {
    next(|seed, random| {
        if let Some(recorded) = &seed.recorded {
            recorded.host.set(Some(op));
        }
        random
    })
}

/// Calls `f` with the seed and the next stream of a training tape.
fn next<R>(f: impl FnOnce(&Seed, Philox) -> R) -> Option<R> {
    with_stack(|stack| {
        let recording = stack.last_mut().filter(|recording| recording.mode == Mode::Train)?;
        recording.stream += 1;
        Some(f(&recording.seed, Philox::new(recording.seed.value, recording.stream)))
    })
}

#[cfg(feature = "cuda")]
impl super::Tape {
    /// Starts a tape with dropout for a graph, whose masks follow from the seed that lies at `seed`, `[1]` I64, when the
    /// graph runs.
    pub(crate) fn recorded(seed: &Tensor) -> Self {
        let recorded = Some(Rc::new(Recorded { at: seed.detach(), host: Cell::new(None) }));
        Self::start(Mode::Train, Seed { value: 0, recorded }, 0, false, super::Nest::default())
    }

    /// Returns the name of an op that has drawn numbers on the host, which a graph would repeat.
    pub(crate) fn drew_on_host(&self) -> Option<&'static str> {
        with_stack(|stack| {
            let recording = &stack[self.find(stack)?];
            recording.seed.recorded.as_ref()?.host.get()
        })
    }
}
