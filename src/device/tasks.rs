//! Tasks on the threads of the `rayon` pool and on the thread that calls.
//!
//! The caller takes part from the start and waits, at the end, only for helpers that have begun: a thread outside of the
//! pool that hands its work over and sleeps loses more time than most ops of a decode step take, and a thread of the pool
//! that waited as `rayon` does would meanwhile run jobs of others, in the middle of an op: on the tape of its thread, with
//! its dropout and its profile, and below the locks that it holds. So all parallel work of the library comes through
//! [`run`], and no call of it can wait for work that is not its own.

use std::{
    any::Any,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    process,
    sync::{
        Arc, LazyLock, Mutex, OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
    thread::{self, Thread},
};

/// Calls `body(task)` once for every task in `0..tasks`.
pub(super) fn run(tasks: usize, body: &(impl Fn(usize) + Sync)) {
    run_dyn(tasks, body);
}

/// A closure behind a pointer, by the one method that is called. `dyn Fn` has that of `FnOnce` too: another copy of the
/// body of every closure.
trait Body: Sync {
    fn call(&self, task: usize);
}

impl<F: Fn(usize) + Sync> Body for F {
    fn call(&self, task: usize) {
        self(task);
    }
}

/// Not generic, so that the machinery is compiled once and not per op.
fn run_dyn(tasks: usize, body: &dyn Body) {
    match tasks {
        0 => {}
        1 => body.call(0),
        _ => with_helpers(tasks, body),
    }
}

/// Marks work whose caller waits for nobody else any more.
const CLOSED: usize = 1 << (usize::BITS - 1);

/// Helpers that were asked for and have not begun. A pool that is busy with something else must not collect them
/// without end: this many may wait for all callers outside of pools, and twice what a call asks for, for each thread
/// of a pool.
const MOST_WAITING: usize = 1024;

static OUTSIDE: LazyLock<Arc<AtomicUsize>> = LazyLock::new(Arc::default);

thread_local! {
    static INSIDE: Arc<AtomicUsize> = Arc::default();
}

/// Returns the count of waiting helpers that the present thread adds to, and its bound.
fn waiting(helpers: usize) -> (Arc<AtomicUsize>, usize) {
    match rayon::current_thread_index() {
        None => (OUTSIDE.clone(), MOST_WAITING),
        Some(_) => (INSIDE.with(Arc::clone), 2 * helpers),
    }
}

/// Returns `true` in a child of `fork`: the threads of the pool are the parent's, and the locks of the pool may be held
/// by one of them for ever.
fn forked() -> bool {
    static PROCESS: OnceLock<u32> = OnceLock::new();
    let process = process::id();
    *PROCESS.get_or_init(|| process) != process
}

/// Times that the caller looks for the end of the last tasks before it lets other threads go first, and times that it
/// does that before it sleeps: tasks end together, unless the processor of a helper is busy with something else.
const SPINS: usize = 2000;
const YIELDS: usize = 200;

/// State shared by a caller and its helpers. Helpers may come late: the state outlives the call, `body` does not.
struct Work {
    body: *const dyn Body,
    tasks: usize,
    /// Tasks that somebody has taken; more than there are once all are.
    taken: AtomicUsize,
    /// Tasks taken from the front, by the caller, and from the back: where work is cut the same way again and again,
    /// each thread finds much of its part in its own caches.
    ends: [AtomicUsize; 2],
    /// Helpers at work, and [`CLOSED`] once no more may begin.
    helpers: AtomicUsize,
    caller: Thread,
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
            unsafe { (*self.body).call(task) };
        }
    }

    /// Does tasks on a thread of the pool, unless it comes too late.
    fn help(&self) {
        // Whoever is counted before the work is closed is waited for; whoever comes later leaves body and count alone.
        let count = |helpers: usize| (helpers & CLOSED == 0).then_some(helpers + 1);
        if self.helpers.fetch_update(Ordering::Acquire, Ordering::Relaxed, count).is_err() {
            return;
        }
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| self.take_part(1))) {
            self.panic.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).get_or_insert(panic);
        }
        // The last one, and the caller waits already.
        if self.helpers.fetch_sub(1, Ordering::Release) == CLOSED + 1 {
            self.caller.unpark();
        }
    }
}

/// Ends a call when dropped, however the caller leaves it: no helper touches the body afterwards.
struct Wait<'a>(&'a Work);

impl Drop for Wait<'_> {
    fn drop(&mut self) {
        const LAST: usize = SPINS + YIELDS;
        let mut helpers = self.0.helpers.fetch_or(CLOSED, Ordering::AcqRel);
        let mut spins = 0;
        while helpers & !CLOSED != 0 {
            spins += 1;
            match spins {
                ..SPINS => std::hint::spin_loop(),
                SPINS..LAST => thread::yield_now(),
                LAST.. => thread::park(),
            }
            helpers = self.0.helpers.load(Ordering::Acquire);
        }
    }
}

fn with_helpers(tasks: usize, body: &dyn Body) {
    let helpers = rayon::current_num_threads().min(tasks) - 1;
    if helpers == 0 || forked() {
        return (0..tasks).for_each(|task| body.call(task));
    }
    let body: *const (dyn Body + '_) = body;
    // SAFETY: only the lifetime changes. `Wait` keeps the caller here until nobody uses the body any more.
    let body = unsafe { std::mem::transmute::<*const (dyn Body + '_), *const dyn Body>(body) };
    let work = Arc::new(Work {
        body,
        tasks,
        taken: AtomicUsize::new(0),
        ends: [AtomicUsize::new(0), AtomicUsize::new(0)],
        helpers: AtomicUsize::new(0),
        caller: thread::current(),
        panic: Mutex::new(None),
    });
    let wait = Wait(&work);
    let (waiting, most) = waiting(helpers);
    for _ in 0..helpers {
        if waiting.fetch_add(1, Ordering::Relaxed) >= most {
            waiting.fetch_sub(1, Ordering::Relaxed);
            break;
        }
        let (work, waiting) = (work.clone(), waiting.clone());
        rayon::spawn(move || {
            waiting.fetch_sub(1, Ordering::Relaxed);
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
    use std::{cell::Cell, sync::atomic::AtomicBool, time::Duration};

    use super::*;

    /// Each task once, from threads outside and inside of the pool, and from many at a time.
    #[test]
    fn tasks_are_run_once() {
        let once = |tasks: usize| {
            let visits: Vec<_> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
            run(tasks, &|task| {
                visits[task].fetch_add(1, Ordering::Relaxed);
            });
            assert!(visits.iter().all(|visits| visits.load(Ordering::Relaxed) == 1));
        };
        let all = || (0..300).for_each(|round| once([0, 1, 2, 3, 64, 257][round % 6]));
        all();
        rayon::scope(|_| all());
        std::thread::scope(|scope| (0..4).for_each(|_| drop(scope.spawn(all))));
    }

    /// A panic comes back to the caller, whoever had it, after everybody has left the body.
    #[test]
    fn tasks_that_panic() {
        for bad in [0, 7, 63] {
            let running = AtomicUsize::new(0);
            let result = catch_unwind(AssertUnwindSafe(|| {
                run(64, &|task| {
                    running.fetch_add(1, Ordering::SeqCst);
                    std::thread::yield_now();
                    running.fetch_sub(1, Ordering::SeqCst);
                    assert!(task != bad, "the bad one");
                });
            }));
            assert!(result.is_err() && running.load(Ordering::SeqCst) == 0);
        }
        run(4, &|_| {});
    }
    /// A thread that waits in a call, of the pool or not, does nothing else: no job of others runs below it.
    #[test]
    fn tasks_wait_for_their_own_work_only() {
        thread_local! {
            static INSIDE: Cell<bool> = const { Cell::new(false) };
        }
        let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
        let (foreign, done) = (Arc::new(AtomicUsize::new(0)), AtomicBool::new(false));
        thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    let foreign = foreign.clone();
                    pool.spawn(move || {
                        foreign.fetch_add(usize::from(INSIDE.get()), Ordering::Relaxed);
                    });
                    thread::sleep(Duration::from_micros(20));
                }
            });
            pool.install(|| {
                for _ in 0..100 {
                    INSIDE.set(true);
                    run(8, &|_| thread::sleep(Duration::from_micros(200)));
                    INSIDE.set(false);
                }
            });
            done.store(true, Ordering::Relaxed);
        });
        assert_eq!(foreign.load(Ordering::Relaxed), 0);
    }

    /// Work is done, and leaves no more behind than it may, where every thread of the pool is busy.
    #[test]
    fn tasks_of_a_busy_pool() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(4).build().unwrap();
        let busy = AtomicUsize::new(0);
        pool.scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|_| {
                    busy.fetch_add(1, Ordering::SeqCst);
                    // All threads are here, so that no helper can come before the end.
                    while busy.load(Ordering::SeqCst) < 4 {
                        std::thread::yield_now();
                    }
                    let done = AtomicUsize::new(0);
                    for _ in 0..100 {
                        run(8, &|_| {
                            done.fetch_add(1, Ordering::Relaxed);
                        });
                    }
                    assert_eq!(done.into_inner(), 800);
                    let (waiting, most) = waiting(3);
                    assert!(waiting.load(Ordering::Relaxed) <= most && most == 6);
                });
            }
        });
    }
}
