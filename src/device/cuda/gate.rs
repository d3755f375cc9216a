//! Exclusive use of a device while a graph is recorded.
//!
//! A device has one stream. While it is captured, work that any thread enqueues becomes part of the graph, a wait for
//! the stream ends the capture, and freed memory may still be needed. So every driver call that touches the stream
//! holds a [`Pass`]: a capture begins and ends only while no thread holds one, and until it ends only the recording
//! thread gets one. The calls of other threads are errors, or wait if the recording is one that they cannot know of.

use std::{
    any::Any,
    sync::{
        Mutex, PoisonError, RwLock, RwLockReadGuard,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use super::{CudaDevice, error, pool::Phase};
use crate::Result;

#[derive(Default)]
pub(super) struct Gate {
    turn: RwLock<()>,
    /// Number of the thread that records a graph, or 0.
    recorder: AtomicU64,
    /// If `true`, the stream is being captured. Written by the recording thread while `turn` is locked for writing.
    capturing: AtomicBool,
    /// If `true`, other threads wait for the end of the capture. Written by the recording thread.
    patient: AtomicBool,
    /// Garbage to drop once the capture has ended.
    later: Mutex<Vec<Box<dyn Any + Send>>>,
}

/// Permission to use the stream. Its holder must not call anything that requests another one.
pub(super) struct Pass<'a> {
    _turn: RwLockReadGuard<'a, ()>,
}

/// Longest time that a thread waits for the capture of another one, which takes as long as enqueuing its work, or for a
/// whole recording, which executes its work too. A thread that the other one waits for gets an error in the end.
const CAPTURE: Duration = Duration::from_secs(10);
const RECORDING: Duration = Duration::from_secs(120);

/// Time between two looks.
const LOOK: Duration = Duration::from_micros(100);

/// Returns the number of this thread, which is unique within the process and never reused.
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

    /// Calls `f` to begin or end the capture, while no other thread uses the stream. `f` returns whether the stream is
    /// captured afterwards.
    pub fn switch<R>(&self, f: impl FnOnce() -> (bool, R)) -> R {
        let _turn = self.turn.write().unwrap_or_else(PoisonError::into_inner);
        let (capturing, outcome) = f();
        self.capturing.store(capturing, Ordering::Relaxed);
        outcome
    }
}

impl CudaDevice {
    /// Returns permission to enqueue `what`, which becomes part of the graph if this thread records one.
    ///
    /// Errors: another thread records a graph.
    pub(super) fn enter(&self, what: &str) -> Result<Pass<'_>> {
        let mut since = None;
        loop {
            let pass = self.gate.pass();
            if !self.gate.capturing.load(Ordering::Relaxed) || self.gate.is_recorder() {
                return Ok(pass);
            }
            drop(pass);
            let waited = since.get_or_insert_with(Instant::now).elapsed();
            if waited > CAPTURE || !self.gate.patient.load(Ordering::Relaxed) {
                return Err(error(format!(
                    "cuda:{}: {what} is not possible while another thread records a graph; wait until its \
                     `Graph::capture` returns",
                    self.ordinal
                )));
            }
            thread::sleep(LOOK);
        }
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

    /// Returns `true` if work that this thread enqueues is recorded instead of run.
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

    /// Makes this thread the recording one. `patient`: waits for the recording of another thread, and lets the calls of other
    /// threads wait for this one.
    ///
    /// Errors: this or another thread is already recording.
    pub(super) fn begin_recording(&self, patient: bool) -> Result<()> {
        let begin = || self.gate.recorder.compare_exchange(0, this_thread(), Ordering::Acquire, Ordering::Relaxed);
        let (mut free, since) = (begin(), Instant::now());
        while patient && free.is_err_and(|recorder| recorder != this_thread()) && since.elapsed() < RECORDING {
            thread::sleep(LOOK);
            free = begin();
        }
        if free.is_ok() {
            self.gate.patient.store(patient, Ordering::Relaxed);
        }
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
        // Another thread may have started a capture.
        later.into_iter().for_each(|garbage| self.discard(garbage));
    }

    /// Drops a value that releases a driver resource: now, or after the current capture.
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
