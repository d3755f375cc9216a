//! Processes of a launcher that train together: rank 0 leads, prints and writes, the others follow.

use std::{sync::OnceLock, thread::sleep, time::Duration};

use x_transformers::{
    Device,
    distributed::Launch,
    train::{RankOptions, TrainModel, Trainer},
};

use crate::failure::{Failure, Result};

/// Rank of this process, and number of processes.
static PLACE: OnceLock<[usize; 2]> = OnceLock::new();

/// Returns `true` if this process prints and writes.
pub fn is_first() -> bool {
    PLACE.get().is_none_or(|[rank, _]| *rank == 0)
}

/// Joins the other processes that a launcher started, if there are any.
///
/// Errors: variables of launchers that are wrong or contradict each other; a launcher that this program cannot join.
pub fn join() -> Result<()> {
    let launch = Launch::from_env()?;
    if launch.size > 1 {
        transport::join(&launch)?;
        let _ = PLACE.set([launch.rank, launch.size]);
    }
    Ok(())
}

/// The device of an option: among GPUs, `auto` is that of the process on its machine.
pub fn device(name: &str) -> Result<Device> {
    let device = Device::parse(name)?;
    let many = PLACE.get().is_some();
    match device {
        Device::Gpu(gpu) if many && name == "auto" => {
            Ok(Device::parse(&format!("{}:{}", gpu.backend(), Launch::from_env()?.local_rank))?)
        }
        device => Ok(device),
    }
}

/// Calls `own` on rank 0, and then `other` on the others.
pub fn first<R>(own: impl FnOnce() -> Result<R>, other: impl FnOnce() -> Result<R>) -> Result<R> {
    if is_first() {
        let result = own()?;
        transport::barrier()?;
        return Ok(result);
    }
    transport::barrier()?;
    other()
}

/// Has the trainer train with the other processes, and returns it on rank 0; the others return `None` once the run has
/// ended.
pub fn share<M: TrainModel>(trainer: Trainer<M>, options: RankOptions) -> Result<Option<Trainer<M>>> {
    let Some(ranks) = transport::ranks() else {
        return match options.zero {
            0 => Ok(Some(trainer)),
            _ => Err(Failure::new(
                "`--zero` divides memory among several processes, but there is one; start them with `mpirun`",
            )),
        };
    };
    let mut trainer = trainer.with_ranks(ranks, options)?;
    if is_first() {
        return Ok(Some(trainer));
    }
    crate::interrupt::listen();
    trainer.follow(&crate::interrupt::asked)?;
    Ok(None)
}

/// Leaves the others after a run, or ends theirs if nobody reads this one's output. [`fail`] is for other failures.
pub fn leave(result: &Result<()>) {
    match result {
        Ok(()) => transport::leave(),
        Err(Failure::ClosedPipe) => transport::abort(),
        Err(Failure::Message(_)) => {}
    }
}

/// Ends all processes after a failure of this one, with a line that says why.
pub fn fail(failure: &Failure, say: impl FnOnce(&str)) {
    let Some([rank, size]) = PLACE.get() else { return say(&failure.to_string()) };
    if *rank == 0 {
        say(&failure.to_string());
    } else {
        // Rank 0 reports errors common to all ranks, and ends this process meanwhile.
        sleep(Duration::from_secs(2));
        say(&format!("rank {rank} of {size}: {failure}"));
    }
    transport::abort();
}

/// Describes the ranks.
pub fn describe() -> String {
    let launch = match Launch::from_env() {
        Ok(Launch { launcher: Some(launcher), rank, size, .. }) => format!("rank {rank} of {size}, by {launcher}"),
        Ok(_) => "one process".to_string(),
        Err(error) => error.to_string(),
    };
    format!("ranks: {launch}; {}", transport::describe())
}

#[cfg(feature = "mpi")]
mod transport {
    use std::{
        env,
        io::{Write, stderr},
        process::exit,
        sync::{
            Arc, Mutex, PoisonError,
            atomic::{AtomicU64, Ordering},
        },
        thread,
        time::Duration,
    };

    use x_transformers::distributed::{Communicator, Launch, Mpi};

    use crate::failure::{Failure, Result};

    /// Seconds that a rank waits for the others, unless the variable says something else.
    const PATIENCE: u64 = 1800;
    const VARIABLE: &str = "XT_RANK_TIMEOUT";

    static RANKS: Mutex<Option<Arc<Watched>>> = Mutex::new(None);

    /// Time between two looks at a rank that waits.
    const TICK: Duration = Duration::from_millis(250);

    /// Ranks, with counts of calls that tell if this one waits for the others.
    #[derive(Debug)]
    struct Watched {
        mpi: Mpi,
        /// Number of calls that have begun.
        begun: AtomicU64,
        /// Number of calls that have ended: below the former while one waits.
        ended: AtomicU64,
    }

    impl Watched {
        fn wait<R>(&self, call: impl FnOnce(&Mpi) -> R) -> R {
            self.begun.fetch_add(1, Ordering::Relaxed);
            let result = call(&self.mpi);
            self.ended.fetch_add(1, Ordering::Relaxed);
            result
        }
    }

    impl Communicator for Watched {
        fn rank(&self) -> usize {
            self.mpi.rank()
        }

        fn size(&self) -> usize {
            self.mpi.size()
        }

        fn takes_any_thread(&self) -> bool {
            self.mpi.takes_any_thread()
        }

        fn barrier(&self) -> x_transformers::Result<()> {
            self.wait(|mpi| mpi.barrier())
        }

        fn broadcast_bytes(&self, bytes: &mut [u8], root: usize) -> x_transformers::Result<()> {
            self.wait(|mpi| mpi.broadcast_bytes(bytes, root))
        }

        fn all_gather_bytes(&self, mine: &[u8], all: &mut [u8]) -> x_transformers::Result<()> {
            self.wait(|mpi| mpi.all_gather_bytes(mine, all))
        }

        fn all_to_all_bytes(&self, sent: &[u8], received: &mut [u8]) -> x_transformers::Result<()> {
            self.wait(|mpi| mpi.all_to_all_bytes(sent, received))
        }
    }

    pub fn join(_: &Launch) -> Result<()> {
        let patience = match env::var(VARIABLE) {
            Err(_) => PATIENCE,
            Ok(text) => text.parse().ok().filter(|&seconds| seconds > 0).ok_or_else(|| {
                Failure::new(format_args!("{VARIABLE}: expected a number of seconds above 0, got `{text}`"))
            })?,
        };
        let ranks = Arc::new(Watched { mpi: Mpi::new()?, begun: AtomicU64::new(0), ended: AtomicU64::new(0) });
        let watched = Arc::downgrade(&ranks);
        *lock() = Some(ranks);
        let watch = move || {
            // Looks while no call ends; a process that is stopped does not count the time.
            let (mut last, mut looks) = (0, 0);
            while let Some(ranks) = watched.upgrade() {
                let (rank, ended) = (ranks.rank(), ranks.ended.load(Ordering::Relaxed));
                let waits = ranks.begun.load(Ordering::Relaxed) > ended;
                drop(ranks);
                looks = if ended == last && waits { looks + 1 } else { 0 };
                last = ended;
                if TICK * looks >= Duration::from_secs(patience) {
                    // Where even standard error is closed, the exit code has to do. The launcher ends the others.
                    let _ = writeln!(
                        stderr(),
                        "xt: rank {rank} has waited {patience} s for another rank, which hangs or has died; {VARIABLE} changes \
                         the time, and `xt train --resume` continues from the last checkpoint"
                    );
                    exit(1);
                }
                thread::sleep(TICK);
            }
        };
        let watch = thread::Builder::new().name("xt-watch".to_string()).spawn(watch);
        watch.map(drop).map_err(|error| Failure::new(format_args!("cannot start a thread: {error}")))
    }

    fn lock() -> std::sync::MutexGuard<'static, Option<Arc<Watched>>> {
        RANKS.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn ranks() -> Option<Arc<dyn Communicator>> {
        lock().clone().map(|ranks| ranks as Arc<dyn Communicator>)
    }

    pub fn barrier() -> Result<()> {
        ranks().map_or(Ok(()), |ranks| Ok(ranks.barrier()?))
    }

    pub fn leave() {
        let Some(mut ranks) = lock().take() else { return };
        // The thread that watches may hold it for a moment; MPI is to end on this one.
        loop {
            match Arc::try_unwrap(ranks) {
                Ok(_) => return,
                Err(shared) => ranks = shared,
            }
            thread::sleep(Duration::from_millis(1));
        }
    }

    pub fn abort() {
        if let Some(ranks) = &*lock() {
            ranks.mpi.abort(1);
        }
    }

    pub fn describe() -> String {
        Mpi::version()
    }
}

#[cfg(not(feature = "mpi"))]
mod transport {
    use std::sync::Arc;

    use x_transformers::distributed::{Communicator, Launch, Launcher};

    use crate::failure::{Failure, Result};

    pub fn join(launch: &Launch) -> Result<()> {
        let by = launch.launcher.as_ref().map(Launcher::to_string).unwrap_or_default();
        let (rank, size) = (launch.rank, launch.size);
        Err(Failure::new(format_args!(
            "{by} started this process as rank {rank} of {size}, but this `xt` was built without MPI; build it with `--features \
             mpi`, or start one process"
        )))
    }

    pub fn ranks() -> Option<Arc<dyn Communicator>> {
        None
    }

    pub fn barrier() -> Result<()> {
        Ok(())
    }

    pub fn leave() {}

    pub fn abort() {}

    pub fn describe() -> String {
        "mpi: not built in (the feature `mpi` is off)".to_string()
    }
}
