//! Processes of a launcher that train together: rank 0 leads, prints and writes, the others follow.

#[cfg(feature = "mpi")]
mod mpi;

use std::{
    env,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    thread::sleep,
    time::Duration,
};

#[cfg(any(feature = "cuda", not(feature = "mpi")))]
use x_transformers::distributed::Launcher;
#[cfg(feature = "cuda")]
use x_transformers::distributed::Nccl;
use x_transformers::{
    Device,
    distributed::{Communicator, Launch},
    train::{RankOptions, TrainModel, Trainer},
};

use crate::failure::{Failure, Result};

/// Rank of this process, and number of processes.
static PLACE: OnceLock<[usize; 2]> = OnceLock::new();

/// Seconds that a rank waits for the others, unless the variable says something else.
const PATIENCE: u64 = 1800;
const VARIABLE: &str = "XT_RANK_TIMEOUT";

/// The other processes.
struct Joined {
    ranks: Arc<dyn Communicator>,
    #[cfg(feature = "cuda")]
    nccl: Option<Arc<Nccl>>,
    #[cfg(feature = "mpi")]
    mpi: Option<Arc<mpi::Watched>>,
}

static JOINED: Mutex<Option<Joined>> = Mutex::new(None);

fn joined() -> MutexGuard<'static, Option<Joined>> {
    JOINED.lock().unwrap_or_else(PoisonError::into_inner)
}

fn communicator() -> Option<Arc<dyn Communicator>> {
    joined().as_ref().map(|joined| joined.ranks.clone())
}

fn barrier() -> Result<()> {
    communicator().map_or(Ok(()), |ranks| Ok(ranks.barrier()?))
}

/// Returns `true` if this process prints and writes.
pub fn is_first() -> bool {
    PLACE.get().is_none_or(|[rank, _]| *rank == 0)
}

/// Returns the number of processes of the run.
pub fn count() -> usize {
    PLACE.get().map_or(1, |[_, size]| *size)
}

/// Joins the other processes that a launcher started, if there are any: by NCCL where each has a GPU, else by MPI.
///
/// Errors: variables of launchers that are wrong or contradict each other; a launcher that this program cannot join.
pub fn join(device_name: &str) -> Result<()> {
    let launch = Launch::from_env()?;
    if launch.size > 1 {
        let patience = match env::var(VARIABLE) {
            Err(_) => PATIENCE,
            Ok(text) => text.parse().ok().filter(|&seconds| seconds > 0).ok_or_else(|| {
                Failure::new(format_args!("{VARIABLE}: expected a number of seconds above 0, got `{text}`"))
            })?,
        };
        let _ = PLACE.set([launch.rank, launch.size]);
        let met = meet(&launch, &device(device_name)?, patience)?;
        *joined() = Some(met);
    }
    Ok(())
}

fn meet(launch: &Launch, device: &Device, patience: u64) -> Result<Joined> {
    #[cfg(feature = "cuda")]
    {
        // Ranks of MPI have it to meet by; others have the address of the first.
        let by_mpi = matches!(launch.launcher, Some(Launcher::OpenMpi | Launcher::Mpich));
        let has_address = env::var_os("MASTER_ADDR").is_some();
        if *device != Device::Cpu && (!cfg!(feature = "mpi") || !by_mpi && has_address) {
            let nccl = Arc::new(Nccl::new(device, Duration::from_secs(patience))?);
            return Ok(Joined {
                ranks: nccl.clone(),
                nccl: Some(nccl),
                #[cfg(feature = "mpi")]
                mpi: None,
            });
        }
    }
    #[cfg(all(feature = "mpi", not(feature = "cuda")))]
    let _ = launch;
    #[cfg(feature = "mpi")]
    return mpi::meet(device, patience);
    #[cfg(not(feature = "mpi"))]
    {
        let by = launch.launcher.as_ref().map(Launcher::to_string).unwrap_or_default();
        let (rank, size) = (launch.rank, launch.size);
        let why = match device {
            Device::Cpu => "processes on the CPU need MPI",
            _ => "processes need MPI, or NCCL with the feature `cuda`",
        };
        let _ = patience;
        Err(Failure::new(format_args!(
            "{by} started this process as rank {rank} of {size}, but {why}, and this `xt` was built without MPI; build it with \
             `--features mpi` and start it with `mpirun`, use GPUs, or start one process"
        )))
    }
}

/// The device of an option: among GPUs, `auto` is that of the process on its machine.
pub fn device(name: &str) -> Result<Device> {
    if name != "auto" || PLACE.get().is_none() {
        return Ok(Device::parse(name)?);
    }
    // The first GPU is not even opened by processes of others.
    Device::cuda(Launch::from_env()?.local_rank).or_else(|why| match Device::best() {
        Device::Cpu => Ok(Device::Cpu),
        _ => Err(why.into()),
    })
}

/// Calls `own` on rank 0, and then `other` on the others.
pub fn first<R>(own: impl FnOnce() -> Result<R>, other: impl FnOnce() -> Result<R>) -> Result<R> {
    if is_first() {
        let result = own()?;
        barrier()?;
        return Ok(result);
    }
    barrier()?;
    other()
}

/// Has the trainer train with the other processes, and returns it on rank 0; the others return `None` once the run has
/// ended.
pub fn share<M: TrainModel>(trainer: Trainer<M>, options: RankOptions) -> Result<Option<Trainer<M>>> {
    let Some(ranks) = communicator() else {
        return match options.zero {
            0 => Ok(Some(trainer)),
            _ => Err(Failure::new(
                "`--zero` divides memory among several processes, but there is one; start them with `torchrun` or `mpirun`",
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
        Ok(()) => {
            let Some(joined) = joined().take() else { return };
            drop(joined.ranks);
            #[cfg(feature = "cuda")]
            drop(joined.nccl);
            #[cfg(feature = "mpi")]
            if let Some(mpi) = joined.mpi {
                mpi::leave(mpi);
            }
        }
        Err(Failure::ClosedPipe) => abort(),
        Err(Failure::Message(_)) => {}
    }
}

/// Ends the others, where that takes more than the end of this process.
fn abort() {
    #[cfg(feature = "mpi")]
    if let Some(Joined { mpi: Some(mpi), .. }) = &*joined() {
        mpi.abort();
    }
}

/// Returns `true` if the process of rank 0 is known to have ended.
fn first_is_gone() -> bool {
    #[cfg(feature = "cuda")]
    if let Some(Joined { nccl: Some(nccl), .. }) = &*joined() {
        return nccl.lost() == Some(0);
    }
    false
}

/// Ends all processes after a failure of this one, with a line that says why.
pub fn fail(failure: &Failure, say: impl FnOnce(&str)) {
    let Some([rank, size]) = PLACE.get() else { return say(&failure.to_string()) };
    if *rank == 0 {
        say(&failure.to_string());
    } else {
        let alone = first_is_gone();
        // Rank 0 reports errors common to all ranks, and ends this process meanwhile, or itself.
        sleep(Duration::from_secs(2));
        if alone || !first_is_gone() {
            say(&format!("rank {rank} of {size}: {failure}"));
        }
    }
    abort();
}

/// Describes the ranks.
pub fn describe() -> Vec<String> {
    let launch = match Launch::from_env() {
        Ok(Launch { launcher: Some(launcher), rank, size, .. }) => format!("rank {rank} of {size}, by {launcher}"),
        Ok(_) => "one process".to_string(),
        Err(error) => error.to_string(),
    };
    #[cfg(feature = "mpi")]
    let mpi = mpi::version();
    #[cfg(not(feature = "mpi"))]
    let mpi = "mpi: not built in (the feature `mpi` is off)";
    vec![
        format!("ranks: {launch}; {mpi}"),
        #[cfg(feature = "cuda")]
        match Nccl::version() {
            Ok(version) => format!("ranks on GPUs: {version}"),
            Err(why) => format!("ranks on GPUs: {why}"),
        },
    ]
}
