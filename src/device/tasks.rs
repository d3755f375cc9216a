//! Tasks on the threads of the `rayon` pool and on the thread that calls, which begins at once: a thread outside of the
//! pool that hands its work over and sleeps until it is done loses more time than most ops of a decode step take.

use std::{
    any::Any,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use rayon::prelude::*;

/// Element operations up to which the caller takes part: about a millisecond. What lasts longer is the pool's, which
/// has a thread for each processor: one more would now and then wait for the processor of another.
const SHORT: usize = 32 << 20;

/// Calls `body(task)` once for every task in `0..tasks`; `cost`: element operations of one.
///
/// Not generic, so that the machinery of `rayon` is compiled once and not per op.
pub(super) fn run(tasks: usize, cost: usize, body: &(dyn Fn(usize) + Sync)) {
    match tasks {
        0 => {}
        1 => body(0),
        // A thread of the pool takes part already.
        _ if rayon::current_thread_index().is_some() || tasks.saturating_mul(cost) > SHORT => {
            (0..tasks).into_par_iter().for_each(body)
        }
        _ => with_helpers(tasks, body),
    }
}

/// Marks work whose caller waits for nobody else any more.
const CLOSED: usize = 1 << (usize::BITS - 1);

/// Helpers that were asked for and have not begun, and how many may wait: a pool that is busy with something else must not
/// collect them without end.
static WAITING: AtomicUsize = AtomicUsize::new(0);
const MOST_WAITING: usize = 1024;

/// Times that the caller looks for the end of the last tasks before it lets other threads go first.
const SPINS: usize = 2000;

/// What a caller and its helpers share. Helpers may come late: it outlives the call, `body` does not.
struct Work {
    body: *const (dyn Fn(usize) + Sync),
    tasks: usize,
    /// Tasks that somebody has taken; more than there are once all are.
    taken: AtomicUsize,
    /// Tasks taken from the front, by the caller, and from the back: where work is cut the same way again and again,
    /// each thread finds much of its part in its own caches.
    ends: [AtomicUsize; 2],
    /// Helpers at work, and [`CLOSED`].
    helpers: AtomicUsize,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

// SAFETY: the body is `Sync`; who may call it when is said in `help`.
unsafe impl Send for Work {}
// SAFETY: as above.
unsafe impl Sync for Work {}

impl Work {
    /// Does tasks until all are taken.
    fn take_part(&self, end: usize) {
        while self.taken.fetch_add(1, Ordering::Relaxed) < self.tasks {
            // Both ends together have given out no more tasks than are taken, so that they do not meet.
            let index = self.ends[end].fetch_add(1, Ordering::Relaxed);
            let task = if end == 0 { index } else { self.tasks - 1 - index };
            // SAFETY: the caller is in its call, or waits there for this helper.
            unsafe { (*self.body)(task) };
        }
    }

    /// Does tasks on a thread of the pool, unless it comes too late.
    fn help(&self) {
        // Whoever is counted before the work is closed is waited for; whoever comes later leaves the body alone.
        if self.helpers.fetch_add(1, Ordering::Acquire) & CLOSED == 0
            && let Err(panic) = catch_unwind(AssertUnwindSafe(|| self.take_part(1)))
        {
            self.panic.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).get_or_insert(panic);
        }
        self.helpers.fetch_sub(1, Ordering::Release);
    }
}

/// Ends a call when dropped, however the caller leaves it: no helper touches the body afterwards.
struct Wait<'a>(&'a Work);

impl Drop for Wait<'_> {
    fn drop(&mut self) {
        let mut helpers = self.0.helpers.fetch_or(CLOSED, Ordering::AcqRel);
        let mut spins = 0;
        while helpers & !CLOSED != 0 {
            spins += 1;
            if spins < SPINS {
                std::hint::spin_loop()
            } else {
                std::thread::yield_now()
            }
            helpers = self.0.helpers.load(Ordering::Acquire);
        }
    }
}

fn with_helpers(tasks: usize, body: &(dyn Fn(usize) + Sync)) {
    let helpers = rayon::current_num_threads().min(tasks) - 1;
    if helpers == 0 {
        return (0..tasks).for_each(body);
    }
    let body: *const (dyn Fn(usize) + Sync + '_) = body;
    // SAFETY: only the lifetime changes. `Wait` keeps the caller here until nobody uses the body any more.
    let body =
        unsafe { std::mem::transmute::<*const (dyn Fn(usize) + Sync + '_), *const (dyn Fn(usize) + Sync)>(body) };
    let work = Arc::new(Work {
        body,
        tasks,
        taken: AtomicUsize::new(0),
        ends: [AtomicUsize::new(0), AtomicUsize::new(0)],
        helpers: AtomicUsize::new(0),
        panic: Mutex::new(None),
    });
    let wait = Wait(&work);
    for _ in 0..helpers {
        if WAITING.fetch_add(1, Ordering::Relaxed) >= MOST_WAITING {
            WAITING.fetch_sub(1, Ordering::Relaxed);
            break;
        }
        let work = work.clone();
        rayon::spawn(move || {
            WAITING.fetch_sub(1, Ordering::Relaxed);
            work.help();
        });
    }
    work.take_part(0);
    drop(wait);
    let panic = work.panic.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).take();
    if let Some(panic) = panic {
        resume_unwind(panic);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each task once, from threads outside and inside of the pool, and from many at a time.
    #[test]
    fn tasks_are_run_once() {
        let once = |tasks: usize, cost: usize| {
            let visits: Vec<_> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
            run(tasks, cost, &|task| {
                visits[task].fetch_add(1, Ordering::Relaxed);
            });
            assert!(visits.iter().all(|visits| visits.load(Ordering::Relaxed) == 1));
        };
        let all = || (0..300).for_each(|round| once([0, 1, 2, 3, 64, 257][round % 6], [0, SHORT][round / 6 % 2]));
        all();
        rayon::scope(|_| all());
        std::thread::scope(|scope| (0..4).for_each(|_| drop(scope.spawn(all))));
    }

    /// A panic comes back to the caller, whoever had it, after everybody has left the body.
    #[test]
    fn tasks_that_panic() {
        for (bad, cost) in [(0, 0), (7, 0), (63, 0), (63, SHORT)] {
            let running = AtomicUsize::new(0);
            let result = catch_unwind(AssertUnwindSafe(|| {
                run(64, cost, &|task| {
                    running.fetch_add(1, Ordering::SeqCst);
                    std::thread::yield_now();
                    running.fetch_sub(1, Ordering::SeqCst);
                    assert!(task != bad, "the bad one");
                });
            }));
            assert!(result.is_err() && running.load(Ordering::SeqCst) == 0);
        }
        run(4, 0, &|_| {});
    }
}
