//! Ctrl-C: once ends a run after its step or an answer after its token, twice ends the program.

use std::sync::atomic::{AtomicBool, Ordering};

static ASKED: AtomicBool = AtomicBool::new(false);
/// Ctrl-C ends the program at once: nothing can be stopped.
static IDLE: AtomicBool = AtomicBool::new(false);

/// Exit code of a program that SIGINT ended.
const KILLED: i32 = 130;

/// Listens from now on to stop answers; outside of them Ctrl-C ends the program.
pub fn listen_between_answers() {
    IDLE.store(true, Ordering::Relaxed);
    listen();
}

/// Listens from now on.
pub fn listen() {
    let asked = || {
        if IDLE.load(Ordering::Relaxed) || ASKED.swap(true, Ordering::Relaxed) {
            std::process::exit(KILLED);
        }
    };
    // Where no handler can be set, Ctrl-C ends the run at once, as it did before.
    let _ = ctrlc::set_handler(asked);
}

/// Returns `true` once Ctrl-C was pressed.
pub fn asked() -> bool {
    ASKED.load(Ordering::Relaxed)
}

/// Calls `f` with a function that returns `true` once Ctrl-C was pressed; outside of such calls it then ends the program.
pub fn while_answering<R>(f: impl FnOnce(&dyn Fn() -> bool) -> R) -> R {
    ASKED.store(false, Ordering::Relaxed);
    IDLE.store(false, Ordering::Relaxed);
    let result = f(&asked);
    IDLE.store(true, Ordering::Relaxed);
    result
}
