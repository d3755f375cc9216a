//! How tasks are shared between the calling thread and the `rayon` pool.
//!
//! The thread that asks works itself, and waits for nobody who has not begun: short ops do not pay for a thread that
//! still wakes up. Each thread starts in a part of the tasks of its own, and helps in the others' when it is done.

use std::{
    any::Any,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread::{self, Thread},
};

use rayon::prelude::*;

/// Calls `body(task)` once for every task in `0..tasks`, in parallel, and returns when all of them are done.
pub(super) fn run(tasks: usize, body: &(dyn Fn(usize) + Sync)) {
    let threads = rayon::current_num_threads().min(tasks);
    if threads <= 1 {
        return (0..tasks).for_each(body);
    }
    if rayon::current_thread_index().is_some() {
        // A thread of the pool must help others while it waits.
        return (0..tasks).into_par_iter().for_each(body);
    }
    // SAFETY: the lifetime is forgotten, but no helper calls `body` after the guard below is dropped, within it.
    let body = unsafe { std::mem::transmute::<&(dyn Fn(usize) + Sync), &'static (dyn Fn(usize) + Sync)>(body) };
    let job = Arc::new(Job::new(tasks, threads, body));
    let guard = Closing(&job);
    for helper in 1..threads {
        if WAITING.fetch_add(1, Ordering::Relaxed) >= MOST_WAITING {
            WAITING.fetch_sub(1, Ordering::Relaxed);
            break;
        }
        let job = Arc::clone(&job);
        rayon::spawn(move || {
            WAITING.fetch_sub(1, Ordering::Relaxed);
            job.help(helper);
        });
    }
    job.work(0);
    drop(guard);
    let panicked = job.panicked.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).take();
    if let Some(panic) = panicked {
        resume_unwind(panic);
    }
}

/// Helpers that were asked for and have not begun. A pool that is busy with something else must not collect them.
static WAITING: AtomicUsize = AtomicUsize::new(0);
const MOST_WAITING: usize = 1024;

/// The tasks of one call.
struct Job {
    body: &'static (dyn Fn(usize) + Sync),
    parts: Box<[Part]>,
    /// Helpers at work, and [`CLOSED`] when no more may begin.
    state: AtomicUsize,
    owner: Thread,
    panicked: Mutex<Option<Box<dyn Any + Send>>>,
}

/// Tasks that one thread begins with. Alone in its cache lines: another thread's counter must not slow it down.
#[repr(align(128))]
struct Part {
    next: AtomicUsize,
    end: usize,
}

const CLOSED: usize = 1 << (usize::BITS - 1);

impl Job {
    fn new(tasks: usize, threads: usize, body: &'static (dyn Fn(usize) + Sync)) -> Self {
        let bound = |part: usize| (part as u128 * tasks as u128 / threads as u128) as usize;
        let parts = (0..threads).map(|part| Part { next: AtomicUsize::new(bound(part)), end: bound(part + 1) });
        Self {
            body,
            parts: parts.collect(),
            state: AtomicUsize::new(0),
            owner: thread::current(),
            panicked: Mutex::new(None),
        }
    }

    /// Does tasks until none is left to begin, those of one part first.
    fn work(&self, first: usize) {
        let (before, from) = self.parts.split_at(first);
        for part in from.iter().chain(before) {
            loop {
                let task = part.next.fetch_add(1, Ordering::Relaxed);
                if task >= part.end {
                    break;
                }
                (self.body)(task);
            }
        }
    }

    /// What a thread of the pool does, if there still is something to do.
    fn help(&self, part: usize) {
        let enter = |state: usize| (state & CLOSED == 0).then_some(state + 1);
        if self.state.fetch_update(Ordering::Acquire, Ordering::Relaxed, enter).is_err() {
            return;
        }
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| self.work(part))) {
            *self.panicked.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(panic);
        }
        // What the owner does next comes after what was written here.
        if self.state.fetch_sub(1, Ordering::Release) == CLOSED + 1 {
            self.owner.unpark();
        }
    }
}

/// Lets no more helpers begin when dropped, and waits for those that have: also if a task panics.
struct Closing<'a>(&'a Job);

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        let state = &self.0.state;
        state.fetch_or(CLOSED, Ordering::Relaxed);
        // They are in their last task: its end is near more often than not.
        let mut looks = 0;
        while state.load(Ordering::Acquire) != CLOSED {
            looks += 1;
            match looks {
                0..2_000 => std::hint::spin_loop(),
                2_000..2_100 => thread::yield_now(),
                _ => thread::park(),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;

    use super::*;

    /// Every task once, however many there are, from any thread, one call inside another too.
    #[test]
    fn parallel_tasks_run_once() {
        let check = |tasks: usize| {
            let counts: Vec<AtomicU32> = (0..tasks).map(|_| AtomicU32::new(0)).collect();
            run(tasks, &|task| {
                run(3, &|_| _ = counts[task].fetch_add(1, Ordering::Relaxed));
            });
            assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 3), "{tasks} tasks");
        };
        for tasks in [0, 1, 2, 3, 7, 64, 1000] {
            check(tasks);
            rayon::scope(|scope| scope.spawn(move |_| check(tasks)));
        }
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..200).for_each(|round| check(round % 20)));
            }
        });
    }

    /// A panic of any task reaches the caller, and the pool works on.
    #[test]
    fn parallel_panics_reach_the_caller() {
        for culprit in [0, 5, 63] {
            let result = catch_unwind(|| run(64, &|task| assert!(task != culprit, "task {culprit}")));
            assert!(result.is_err(), "task {culprit}");
        }
        let sum = AtomicUsize::new(0);
        run(64, &|task| _ = sum.fetch_add(task, Ordering::Relaxed));
        assert_eq!(sum.into_inner(), 64 * 63 / 2);
    }
}
