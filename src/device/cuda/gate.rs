//! Who may use a device while a graph is recorded.
//!
//! A device has one stream. While it is captured, whatever any thread enqueues becomes part of the graph, whatever
//! waits for the stream ends the capture, and what is freed may still be needed. So every call of the driver that
//! touches the stream holds a [`Pass`]: a capture begins and ends only when nobody has one, and until it ends only the
//! thread that records gets one.

use std::{
    any::Any,
    sync::{
        Mutex, PoisonError, RwLock, RwLockReadGuard,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use super::{CudaDevice, error, pool::Phase};
use crate::Result;

#[derive(Default)]
pub(super) struct Gate {
    turn: RwLock<()>,
    /// The thread that records a graph, by its number; 0 if there is none.
    recorder: AtomicU64,
    /// If `true`, the stream is being captured. Written by the recorder with `turn` locked for writing.
    capturing: AtomicBool,
    /// Garbage to drop once the capture has ended.
    later: Mutex<Vec<Box<dyn Any + Send>>>,
}

/// Permission to use the stream. Nothing that asks for another one may be called while it is held.
pub(super) struct Pass<'a> {
    _turn: RwLockReadGuard<'a, ()>,
}

/// A number of this thread that no other thread has or had.
fn this_thread() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    thread_local! {
        static NUMBER: u64 = NEXT.fetch_add(1, Ordering::Relaxed);
    }
    NUMBER.with(|number| *number)
}

impl Gate {
    fn is_recorder(&self) -> bool {
        match self.recorder.load(Ordering::Relaxed) {
            0 => false,
            recorder => recorder == this_thread(),
        }
    }

    fn pass(&self) -> Pass<'_> {
        Pass { _turn: self.turn.read().unwrap_or_else(PoisonError::into_inner) }
    }

    /// Begins or ends the capture by `f`, while nobody else uses the stream. It is captured afterwards if `f` says so.
    pub fn switch<R>(&self, f: impl FnOnce() -> (bool, R)) -> R {
        let _turn = self.turn.write().unwrap_or_else(PoisonError::into_inner);
        let (capturing, outcome) = f();
        self.capturing.store(capturing, Ordering::Relaxed);
        outcome
    }
}

impl CudaDevice {
    /// Permission to enqueue `what`, which becomes part of the graph that this thread records, if it does.
    ///
    /// Errors: another thread records a graph.
    pub(super) fn enter(&self, what: &str) -> Result<Pass<'_>> {
        let pass = self.gate.pass();
        if self.gate.capturing.load(Ordering::Relaxed) && !self.gate.is_recorder() {
            return Err(error(format!(
                "cuda:{}: {what} is not possible while another thread records a graph; wait until its `Graph::capture` \
                 returns",
                self.ordinal
            )));
        }
        Ok(pass)
    }

    /// Like [`CudaDevice::enter`], but for work that cannot be part of a graph.
    ///
    /// Errors: this or another thread records a graph.
    pub(super) fn enter_outside(&self, what: &str) -> Result<Pass<'_>> {
        let pass = self.enter(what)?;
        if self.gate.capturing.load(Ordering::Relaxed) {
            return Err(error(format!("cuda:{}: {what} cannot be part of a graph", self.ordinal)));
        }
        Ok(pass)
    }

    /// Returns `true` if what this thread enqueues is recorded and not done.
    pub(super) fn captures(&self) -> bool {
        self.gate.capturing.load(Ordering::Relaxed) && self.gate.is_recorder()
    }

    pub(super) fn phase(&self) -> Phase {
        match (self.gate.is_recorder(), self.gate.capturing.load(Ordering::Relaxed)) {
            (false, _) => Phase::Eager,
            (true, false) => Phase::Warm,
            (true, true) => Phase::Capture,
        }
    }

    /// Makes this thread the one that records.
    ///
    /// Errors: this or another thread does already.
    pub(super) fn begin_recording(&self) -> Result<()> {
        let free = self.gate.recorder.compare_exchange(0, this_thread(), Ordering::Acquire, Ordering::Relaxed);
        free.map(drop).map_err(|recorder| {
            error(match recorder == this_thread() {
                true => "a graph cannot be recorded while recording another".into(),
                false => format!(
                    "cuda:{}: another thread records a graph; wait until its `Graph::capture` returns",
                    self.ordinal
                ),
            })
        })
    }

    pub(super) fn end_recording(&self) {
        self.gate.recorder.store(0, Ordering::Release);
        let later = std::mem::take(&mut *self.gate.later.lock().unwrap_or_else(PoisonError::into_inner));
        // Another thread may have begun a capture.
        later.into_iter().for_each(|garbage| self.discard(garbage));
    }

    /// Drops what frees something of the driver's: now, or when the present capture has ended.
    pub(super) fn discard(&self, garbage: impl Send + 'static) {
        let pass = self.gate.pass();
        if self.gate.capturing.load(Ordering::Relaxed) {
            self.gate.later.lock().unwrap_or_else(PoisonError::into_inner).push(Box::new(garbage));
        } else {
            drop(garbage);
        }
        drop(pass);
    }
}
