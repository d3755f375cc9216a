//! Training by several processes: collective operations, and sums of gradients over ranks.
//!
//! A program is launched once for each rank, by `torchrun` or `mpirun` for instance. Every rank has a part of each
//! batch and the same model: [`DataParallel`] starts all from the same weights and sums their gradients, which keeps
//! them equal. Stage 3 of ZeRO, which divides the weights too, is one of
//! [`Trainer`](crate::train::Trainer::with_ranks).

mod bucket;
mod communicator;
mod data_parallel;
mod launcher;
#[cfg(feature = "cuda")]
mod meeting;
#[cfg(feature = "mpi")]
mod mpi;
#[cfg(feature = "cuda")]
mod nccl;
mod reducer;

#[cfg(feature = "mpi")]
pub use self::mpi::Mpi;
#[cfg(feature = "cuda")]
pub use self::nccl::Nccl;
pub(crate) use self::{
    bucket::{Bucket, Homes, Piece},
    data_parallel::agree,
    reducer::{BUCKET, Gatherer, Gathering, Reducer, Sums},
};
pub use self::{
    communicator::{Alone, Communicator},
    data_parallel::DataParallel,
    launcher::{Launch, Launcher},
};
