//! Ranks of MPI.

use std::{
    fmt,
    process::exit,
    sync::{Mutex, MutexGuard, PoisonError, TryLockError},
    thread::{self, ThreadId},
    time::Duration,
};

use mpi::{
    Threading,
    environment::{Universe, initialize_with_threading, library_version},
    topology::SimpleCommunicator,
    traits::{Communicator as _, CommunicatorCollectives as _, Root as _},
};

use super::{
    Communicator, Launch,
    communicator::{check_root, check_sizes},
};
use crate::{Error, Result, error::ensure};

/// Bytes that a call of MPI moves for a rank at most: it counts with 32 bits.
const PIECE: usize = 1 << 28;

/// Time that [`Mpi::abort`] waits for its turn.
const PATIENCE: Duration = Duration::from_secs(5);

/// All ranks of an MPI program (`MPI_COMM_WORLD`), over the MPI library that the crate was built with.
///
/// A rank that ends early ends the others: `mpirun` sees to that. The process may have one value at a time, and none
/// after it has been dropped.
pub struct Mpi {
    rank: usize,
    size: usize,
    /// Finalizes MPI when it is dropped. Threads take turns.
    universe: Mutex<Universe>,
    /// The only thread that may call MPI, if it does not allow others.
    only: Option<ThreadId>,
}

impl fmt::Debug for Mpi {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mpi").field("rank", &self.rank).field("size", &self.size).finish()
    }
}

impl Mpi {
    /// Joins the other ranks.
    ///
    /// If MPI lets no other thread call it, calls of other threads are errors, and
    /// [`takes_any_thread`](Communicator::takes_any_thread) is `false`.
    ///
    /// Errors: MPI that this process has initialised already; variables of a launcher that contradict MPI.
    pub fn new() -> Result<Self> {
        const OP: &str = "mpi";
        let launch = Launch::from_env()?;
        let (universe, threading) = initialize_with_threading(Threading::Serialized)
            .ok_or_else(|| Error::argument(OP, "MPI is initialised already; keep the first `Mpi`"))?;
        let only = (threading < Threading::Serialized).then(|| thread::current().id());
        let world = SimpleCommunicator::world();
        let [rank, size] = [world.rank(), world.size()].map(|number| number as usize);
        ensure!(
            launch.launcher.is_none() || (launch.rank, launch.size) == (rank, size),
            Error::argument(
                OP,
                format_args!(
                    "MPI says rank {rank} of {size}, the environment rank {} of {}; start the program with the launcher of \
                     the MPI library that it was built with",
                    launch.rank, launch.size
                )
            )
        );
        Ok(Self { rank, size, universe: Mutex::new(universe), only })
    }

    /// Ends all ranks at once: their launcher returns `code`.
    pub fn abort(&self, code: i32) -> ! {
        // A thread that waits for another rank has the turn until then, which may be never.
        const LOOKS: u32 = 100;
        for _ in 0..LOOKS {
            match self.universe.try_lock() {
                Ok(universe) => universe.world().abort(code),
                Err(TryLockError::Poisoned(universe)) => universe.into_inner().world().abort(code),
                Err(TryLockError::WouldBlock) => thread::sleep(PATIENCE / LOOKS),
            }
        }
        // Launchers end the others of a process that exits.
        exit(code)
    }

    /// Returns name and version of the MPI library.
    pub fn version() -> String {
        let version = library_version().unwrap_or_default();
        version.split([',', '\n', '\0']).next().unwrap_or_default().trim().to_string()
    }

    fn turn(&self) -> Result<MutexGuard<'_, Universe>> {
        ensure!(
            self.only.is_none_or(|only| only == thread::current().id()),
            Error::argument("mpi", "this MPI library lets only the thread call it that has created the `Mpi`")
        );
        Ok(self.universe.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Communicator for Mpi {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn takes_any_thread(&self) -> bool {
        self.only.is_none()
    }

    fn barrier(&self) -> Result<()> {
        self.turn()?.world().barrier();
        Ok(())
    }

    fn broadcast_bytes(&self, bytes: &mut [u8], root: usize) -> Result<()> {
        check_root(root, self.size)?;
        let turn = self.turn()?;
        let world = turn.world();
        let root = world.process_at_rank(root as i32);
        bytes.chunks_mut(PIECE).for_each(|piece| root.broadcast_into(piece));
        Ok(())
    }

    fn all_gather_bytes(&self, mine: &[u8], all: &mut [u8]) -> Result<()> {
        check_sizes("all_gather", mine.len() * self.size, all.len())?;
        let turn = self.turn()?;
        let world = turn.world();
        if mine.len() * self.size <= PIECE {
            world.all_gather_into(mine, all);
            return Ok(());
        }
        let step = (PIECE / self.size).max(1);
        let mut pieces = vec![0; step * self.size];
        for start in (0..mine.len()).step_by(step) {
            let part = &mine[start..mine.len().min(start + step)];
            let pieces = &mut pieces[..part.len() * self.size];
            world.all_gather_into(part, pieces);
            for (rank, piece) in pieces.chunks_exact(part.len()).enumerate() {
                all[rank * mine.len() + start..][..part.len()].copy_from_slice(piece);
            }
        }
        Ok(())
    }

    fn all_to_all_bytes(&self, sent: &[u8], received: &mut [u8]) -> Result<()> {
        check_sizes("all_to_all", sent.len(), received.len())?;
        check_sizes("all_to_all", sent.len() / self.size * self.size, sent.len())?;
        let turn = self.turn()?;
        let world = turn.world();
        if sent.len() <= PIECE {
            world.all_to_all_into(sent, received);
            return Ok(());
        }
        let (of_rank, step) = (sent.len() / self.size, (PIECE / self.size).max(1));
        let [mut from, mut to] = [0, 1].map(|_| vec![0; step * self.size]);
        for start in (0..of_rank).step_by(step) {
            let count = step.min(of_rank - start);
            let (from, to) = (&mut from[..count * self.size], &mut to[..count * self.size]);
            for (rank, piece) in from.chunks_exact_mut(count).enumerate() {
                piece.copy_from_slice(&sent[rank * of_rank + start..][..count]);
            }
            world.all_to_all_into(&*from, to);
            for (rank, piece) in to.chunks_exact(count).enumerate() {
                received[rank * of_rank + start..][..count].copy_from_slice(piece);
            }
        }
        Ok(())
    }
}
