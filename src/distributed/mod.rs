//! Training by several processes: collective operations, and sums of gradients over ranks.
//!
//! A program is launched once for each rank, by `mpirun` for instance. Every rank has the whole model and a part of each
//! batch; [`DataParallel`] starts all from the same weights and sums their gradients, so that they stay equal.

mod communicator;
mod data_parallel;
mod launcher;
#[cfg(feature = "mpi")]
mod mpi;

#[cfg(feature = "mpi")]
pub use self::mpi::Mpi;
pub use self::{
    communicator::{Alone, Communicator},
    data_parallel::DataParallel,
    launcher::{Launch, Launcher},
};
