//! Sums of gradients over ranks.

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

use super::{
    Communicator, Homes,
    reducer::{BUCKET, Reducer},
};
use crate::{
    Error, Gradients, ParamMap, Result,
    error::ensure,
    hash::{FNV1A_START, fnv1a_from},
};

/// A model whose copies on all ranks learn from parts of the same batches (Li et al.,
/// <https://arxiv.org/abs/2006.15704>).
///
/// ```
/// use std::sync::Arc;
/// use x_transformers::{
///     DType, Device, Init, ParamStore, Tape, Tensor,
///     distributed::{Alone, Communicator, DataParallel},
/// };
/// # fn main() -> x_transformers::Result<()> {
/// let ranks: Arc<dyn Communicator> = Arc::new(Alone); // or an `Mpi`
/// let store = ParamStore::new(0, DType::F32, &Device::Cpu);
/// let weight = store.param("weight", [2], Init::Constant(3.0))?;
/// let parallel = DataParallel::new(&store.params(), ranks.clone())?;
///
/// let mut tape = Tape::train(ranks.rank() as u64);
/// let mean_over_ranks = 1.0 / ranks.size() as f64;
/// let loss = weight.tensor().square()?.sum(&[])?.affine(mean_over_ranks, 0.0)?;
/// let grads = parallel.reduce(tape.backward(&loss)?)?; // for an optimizer
/// assert_eq!(grads.param(&weight).unwrap().to_vec::<f32>()?, [6.0, 6.0]);
/// # Ok(())
/// # }
/// ```
#[doc(alias = "DistributedDataParallel")]
#[doc(alias = "DDP")]
pub struct DataParallel {
    ranks: Arc<dyn Communicator>,
    reducer: Mutex<Reducer>,
}

impl fmt::Debug for DataParallel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DataParallel").field("ranks", &self.ranks).finish_non_exhaustive()
    }
}

impl DataParallel {
    /// Gives every rank the values that the parameters and buffers have on rank 0.
    ///
    /// Errors: ranks whose parameters have other names, shapes or dtypes; a failed transfer.
    pub fn new(params: &ParamMap, ranks: Arc<dyn Communicator>) -> Result<Self> {
        let mut print = FNV1A_START;
        let mut state = params.state_dict();
        for (name, tensor) in &state {
            print = fnv1a_from(print, format!("{name} {:?} {}\n", tensor.shape(), tensor.dtype()).as_bytes());
        }
        agree(&*ranks, print, "parameters of other names, shapes or dtypes")?;
        for tensor in state.values_mut() {
            *tensor = ranks.broadcast(tensor, 0)?;
        }
        params.load(&state)?;
        let reducer = Mutex::new(Reducer::new(params, ranks.clone(), false, BUCKET, &Homes::default())?);
        Ok(Self { ranks, reducer })
    }

    /// Returns the ranks.
    pub fn ranks(&self) -> &Arc<dyn Communicator> {
        &self.ranks
    }

    /// Sums the gradients of the parameters over all ranks. Those of half types come back in f32.
    ///
    /// For the mean of all losses each rank divides its own by the number of ranks, or the optimizer takes this factor.
    /// A parameter that a rank's loss does not reach counts as 0 there, and has no gradient if none reaches it. With
    /// one rank, gradients stay as they are.
    ///
    /// The sum has the bits of one process that [accumulates](Gradients::accumulate) the N batches in the order of ranks,
    /// if the ranks [sum in that order](Communicator::sums_in_rank_order).
    ///
    /// Errors: a failed transfer; out of memory.
    pub fn reduce(&self, mut grads: Gradients) -> Result<Gradients> {
        if self.ranks.size() == 1 {
            return Ok(grads);
        }
        let mut reducer = self.reducer.lock().unwrap_or_else(PoisonError::into_inner);
        reducer.reset();
        reducer.round(&mut grads)?;
        let sums = reducer.finish()?;
        reducer.gather(sums, &mut grads)?;
        Ok(grads)
    }
}

/// Fails unless all ranks give the same number.
pub(crate) fn agree(ranks: &dyn Communicator, print: u64, what: &str) -> Result<()> {
    ensure!(ranks.size() > 0, Error::argument("ranks", "expected at least one rank, got 0"));
    let mut prints = vec![0; 8 * ranks.size()];
    ranks.all_gather_bytes(&print.to_le_bytes(), &mut prints)?;
    let other = prints.chunks_exact(8).position(|other| other != &prints[..8]);
    let other = other.map(|rank| format!("rank {rank} has {what} than rank 0; give all the same"));
    other.map_or(Ok(()), |why| Err(Error::argument("ranks", why)))
}
