//! Ctrl-C: once ends a run after its step, twice ends it at once.

use std::sync::atomic::{AtomicBool, Ordering};

static ASKED: AtomicBool = AtomicBool::new(false);

/// Exit code of a program that SIGINT ended.
const KILLED: i32 = 130;

/// Listens from now on.
pub fn listen() {
    let asked = || {
        if ASKED.swap(true, Ordering::Relaxed) {
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
