//! Processes that meet by MPI.

use std::{
    io::{Write, stderr},
    process::exit,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

#[cfg(feature = "cuda")]
use x_transformers::distributed::Nccl;
use x_transformers::{
    Device,
    distributed::{Communicator, Mpi},
};

use super::{Joined, VARIABLE};
use crate::failure::{Failure, Result};

/// Time between two looks at a rank that waits.
const TICK: Duration = Duration::from_millis(250);

/// Ranks, with counts of calls that tell if this one waits for the others.
#[derive(Debug)]
pub struct Watched {
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

    /// Ends all processes.
    pub fn abort(&self) {
        self.mpi.abort(1);
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

/// Joins the others, and uses NCCL between them if all have it and a GPU.
pub fn meet(device: &Device, patience: u64) -> Result<Joined> {
    let mpi = watched(patience)?;
    #[cfg(feature = "cuda")]
    {
        let has_nccl = *device != Device::Cpu && Nccl::version().is_ok();
        let mut all = vec![0; mpi.size()];
        mpi.all_gather_bytes(&[u8::from(has_nccl)], &mut all)?;
        if all.iter().all(|&has| has == 1) {
            let nccl = Arc::new(Nccl::with_ranks(device, &*mpi, Duration::from_secs(patience))?);
            return Ok(Joined { ranks: nccl.clone(), nccl: Some(nccl), mpi: Some(mpi) });
        }
        if let (0, true, Some(rank)) = (mpi.rank(), *device != Device::Cpu, all.iter().position(|&has| has == 0)) {
            crate::failure::warn(format_args!(
                "rank {rank} has no GPU or no NCCL, see its `xt devices`; gradients pass through the memory of the CPU"
            ));
        }
    }
    let _ = device;
    Ok(Joined {
        ranks: mpi.clone(),
        #[cfg(feature = "cuda")]
        nccl: None,
        mpi: Some(mpi),
    })
}

fn watched(patience: u64) -> Result<Arc<Watched>> {
    let ranks = Arc::new(Watched { mpi: Mpi::new()?, begun: AtomicU64::new(0), ended: AtomicU64::new(0) });
    let watched = Arc::downgrade(&ranks);
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
    watch.map_err(|error| Failure::new(format_args!("cannot start a thread: {error}")))?;
    Ok(ranks)
}

/// Ends MPI on this thread.
pub fn leave(mut ranks: Arc<Watched>) {
    // The thread that watches may hold it for a moment.
    loop {
        match Arc::try_unwrap(ranks) {
            Ok(_) => return,
            Err(shared) => ranks = shared,
        }
        thread::sleep(Duration::from_millis(1));
    }
}

/// Returns name and version of the MPI library.
pub fn version() -> String {
    Mpi::version()
}
