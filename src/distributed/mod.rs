//! Training by several processes: collective operations, and sums of gradients over ranks.
//!
//! A program is launched once for each rank, by `mpirun` for instance. Every rank has the whole model and a part of
//! each batch; [`DataParallel`] starts all from the same weights and sums their gradients, so that they stay equal.

mod bucket;
mod communicator;
mod data_parallel;
mod launcher;
#[cfg(feature = "mpi")]
mod mpi;
mod reducer;

#[cfg(feature = "mpi")]
pub use self::mpi::Mpi;
pub(crate) use self::{
    bucket::{Bucket, Piece},
    data_parallel::agree,
    reducer::{BUCKET, Reducer, Sums},
};
pub use self::{
    communicator::{Alone, Communicator},
    data_parallel::DataParallel,
    launcher::{Launch, Launcher},
};
