//! Sums of gradients over ranks.

use std::{ops::Range, sync::Arc};

use super::Communicator;
use crate::{
    DType, Device, Error, Gradients, Param, ParamMap, Result, Tensor,
    collect::CollectVec,
    error::ensure,
    hash::{FNV1A_START, fnv1a_from},
};

/// Elements that are summed together: 32 MB of f32.
const BUCKET: usize = 8 << 20;

/// A model whose copies on all ranks learn from parts of the same batches (Li et al., <https://arxiv.org/abs/2006.15704>).
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
#[derive(Debug)]
#[doc(alias = "DistributedDataParallel")]
#[doc(alias = "DDP")]
pub struct DataParallel {
    ranks: Arc<dyn Communicator>,
    params: Vec<Param>,
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
        ensure!(ranks.size() > 0, Error::argument("data_parallel", "expected at least one rank, got 0"));
        let mut prints = vec![0; 8 * ranks.size()];
        ranks.all_gather_bytes(&print.to_le_bytes(), &mut prints)?;
        let other = prints.chunks_exact(8).position(|other| other != &prints[..8]);
        ensure!(
            other.is_none(),
            Error::argument(
                "data_parallel",
                format_args!(
                    "rank {} has parameters of other names, shapes or dtypes than rank 0; give all the same config",
                    other.unwrap_or_default()
                )
            )
        );
        for tensor in state.values_mut() {
            *tensor = ranks.broadcast(tensor, 0)?;
        }
        params.load(&state)?;
        Ok(Self { ranks, params: params.unique().map(|(_, param)| param.clone()).collect_vec() })
    }

    /// Returns the ranks.
    pub fn ranks(&self) -> &Arc<dyn Communicator> {
        &self.ranks
    }

    /// Sums the gradients of the parameters over all ranks. Those of half types come back in f32.
    ///
    /// For the mean of all losses each rank divides its own by the number of ranks, or the optimizer takes this factor. A
    /// parameter that a rank's loss does not reach counts as 0 there, and has no gradient if none reaches it. With one
    /// rank, gradients stay as they are.
    ///
    /// N ranks that add the bits of one process that [accumulates](Gradients::accumulate) N batches in the order of ranks.
    ///
    /// Errors: a failed transfer; out of memory.
    pub fn reduce(&self, mut grads: Gradients) -> Result<Gradients> {
        if self.ranks.size() == 1 {
            return Ok(grads);
        }
        let mine = self.params.iter().map(|param| u8::from(grads.param(param).is_some())).collect_vec();
        let mut reached = vec![0; mine.len() * self.ranks.size()];
        self.ranks.all_gather_bytes(&mine, &mut reached)?;
        let by_any = |at: usize| reached.chunks_exact(mine.len()).any(|reached| reached[at] == 1);
        let summed = (0..self.params.len()).filter(|&at| by_any(at)).map(|at| &self.params[at]).collect_vec();
        let sizes = summed.iter().map(|param| param.tensor().numel()).collect_vec();
        for bucket in buckets(&sizes) {
            self.reduce_bucket(&summed[bucket], &mut grads)?;
        }
        Ok(grads)
    }

    fn reduce_bucket(&self, params: &[&Param], grads: &mut Gradients) -> Result<()> {
        let flat = |param: &&Param| {
            let tensor = param.tensor();
            let dtype = tensor.dtype().accumulator();
            match grads.param(param) {
                Some(grad) => grad.to_dtype(dtype)?.contiguous()?.reshape([grad.numel()]),
                None => Tensor::zeros([tensor.numel()], dtype, tensor.device()),
            }
        };
        let parts = params.iter().map(flat).collect::<Result<Vec<Tensor>>>()?;
        // Parameters of f64 beside those of f32, or on other devices, have sums of their own.
        let kind = |part: &Tensor| (part.dtype(), part.device().clone());
        let mut kinds: Vec<(DType, Device)> = Vec::new();
        for part in &parts {
            if !kinds.contains(&kind(part)) {
                kinds.push(kind(part));
            }
        }
        for of in kinds {
            let of_kind = (0..parts.len()).filter(|&at| kind(&parts[at]) == of).collect_vec();
            let sum = self.ranks.all_reduce(&Tensor::cat(&of_kind.iter().map(|&at| &parts[at]).collect_vec(), 0)?)?;
            let mut start = 0;
            for at in of_kind {
                let (param, count) = (params[at], parts[at].numel());
                let grad = sum.narrow(0, start, count)?.contiguous()?.reshape(*param.tensor().shape())?;
                grads.replace(param.leaf(), grad);
                start += count;
            }
        }
        Ok(())
    }
}

/// Returns ranges of parameters with at most [`BUCKET`] elements together, or one.
fn buckets(sizes: &[usize]) -> Vec<Range<usize>> {
    let (mut buckets, mut start, mut elements) = (Vec::new(), 0, 0);
    for (at, size) in sizes.iter().enumerate() {
        if at > start && elements + size > BUCKET {
            buckets.push(start..at);
            (start, elements) = (at, 0);
        }
        elements += size;
    }
    if start < sizes.len() {
        buckets.push(start..sizes.len());
    }
    buckets
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_full_but_hold_large_parameters_whole() {
        assert_eq!(buckets(&[]), []);
        assert_eq!(buckets(&[1, BUCKET - 1, 1, 2 * BUCKET, 3]), [0..2, 2..3, 3..4, 4..5]);
    }
}
