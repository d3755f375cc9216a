//! Collective operations of ranks.

use std::fmt;

use crate::{Device, Error, Result, Tensor, error::ensure};

/// The processes of a run, numbered by rank, and their collective operations.
///
/// Every rank calls the same methods in the same order, with tensors of the same shape and dtype: each call waits for
/// the others. A tensor of a GPU passes through the memory of the CPU, unless an implementation says otherwise. Sums
/// are added in f32 or wider, and all ranks get the same bits: in the order of ranks those of one process that adds in
/// this order, unless an implementation [has an order of its own](Communicator::sums_in_rank_order).
///
/// An implementation moves bytes; the methods on tensors are made of that.
pub trait Communicator: fmt::Debug + Send + Sync {
    /// Returns the number of this process, from 0 to [`size`](Communicator::size) − 1.
    fn rank(&self) -> usize;

    /// Returns the number of processes, at least 1.
    fn size(&self) -> usize;

    /// Returns `true` if any thread may call the methods, one at a time: gradients are then summed while the backward
    /// pass runs. Default `true`.
    fn takes_any_thread(&self) -> bool {
        true
    }

    /// Returns `true` if sums have the bits of one process that adds in the order of ranks. Otherwise gradients are
    /// summed over micro-batches before they are over ranks. Default `true`.
    fn sums_in_rank_order(&self) -> bool {
        true
    }

    /// Waits until every rank is here.
    fn barrier(&self) -> Result<()>;

    /// Replaces the bytes by those of the rank `root`.
    fn broadcast_bytes(&self, bytes: &mut [u8], root: usize) -> Result<()>;

    /// Fills `all` with the bytes of every rank, in their order.
    fn all_gather_bytes(&self, mine: &[u8], all: &mut [u8]) -> Result<()>;

    /// Sends each rank its part of the bytes, in their order, and fills `received` with the parts for this one.
    fn all_to_all_bytes(&self, sent: &[u8], received: &mut [u8]) -> Result<()>;

    /// Returns the tensor of the rank `root`; the others give one of the same shape.
    ///
    /// Errors: a rank that does not exist; a failed transfer.
    fn broadcast(&self, tensor: &Tensor, root: usize) -> Result<Tensor> {
        check_root(root, self.size())?;
        let mut values = Tensor::uninit(*tensor.shape(), tensor.dtype(), &Device::Cpu)?;
        values.bytes_mut()?.copy_from_slice(on_cpu(tensor)?.bytes()?);
        self.broadcast_bytes(values.bytes_mut()?, root)?;
        values.to_device(tensor.device())
    }

    /// Returns the tensors of all ranks, one after another: `[n, ..] → [size · n, ..]`.
    ///
    /// Errors: a scalar; a failed transfer.
    fn all_gather(&self, tensor: &Tensor) -> Result<Tensor> {
        let rows = rows("all_gather", tensor)?;
        let shape = tensor.shape().with_dim(0, rows * self.size());
        let mut all = Tensor::uninit(shape, tensor.dtype(), &Device::Cpu)?;
        self.all_gather_bytes(on_cpu(tensor)?.bytes()?, all.bytes_mut()?)?;
        all.to_device(tensor.device())
    }

    /// Sends each rank its part of the tensor, and returns the parts for this one: `[size · n, ..] → [size · n, ..]`.
    ///
    /// Errors: a size that is not divisible by the number of ranks; a failed transfer.
    fn all_to_all(&self, tensor: &Tensor) -> Result<Tensor> {
        part_of("all_to_all", tensor, self.size())?;
        let mut received = Tensor::uninit(*tensor.shape(), tensor.dtype(), &Device::Cpu)?;
        self.all_to_all_bytes(on_cpu(tensor)?.bytes()?, received.bytes_mut()?)?;
        received.to_device(tensor.device())
    }

    /// Returns this rank's part of the sum over all ranks: `[size · n, ..] → [n, ..]`.
    ///
    /// Errors: a dtype that is not float; a size that is not divisible by the number of ranks; a failed transfer.
    fn reduce_scatter(&self, tensor: &Tensor) -> Result<Tensor> {
        tensor.dtype().expect_float("reduce_scatter")?;
        let rows = part_of("reduce_scatter", tensor, self.size())?;
        let parts = self.all_to_all(tensor)?;
        let wide = |rank: usize| parts.narrow(0, rank * rows, rows)?.to_dtype(tensor.dtype().accumulator());
        let mut sum = wide(0)?;
        for rank in 1..self.size() {
            sum = sum.add(&wide(rank)?)?;
        }
        sum.to_dtype(tensor.dtype())?.contiguous()
    }

    /// Returns the sum over all ranks.
    ///
    /// Errors: a dtype that is not float; a failed transfer.
    fn all_reduce(&self, tensor: &Tensor) -> Result<Tensor> {
        tensor.dtype().expect_float("all_reduce")?;
        let count = tensor.numel();
        let padded = count.next_multiple_of(self.size().max(1));
        let mut values = tensor.detach().contiguous()?.reshape([count])?;
        if padded > count {
            let rest = Tensor::zeros([padded - count], tensor.dtype(), tensor.device())?;
            values = Tensor::cat(&[&values, &rest], 0)?;
        }
        let sum = self.all_gather(&self.reduce_scatter(&values)?)?;
        sum.narrow(0, 0, count)?.contiguous()?.reshape(*tensor.shape())
    }
}

fn on_cpu(tensor: &Tensor) -> Result<Tensor> {
    tensor.detach().contiguous()?.to_device(&Device::Cpu)
}

pub(super) fn rows(op: &'static str, tensor: &Tensor) -> Result<usize> {
    tensor.shape().first().copied().ok_or_else(|| Error::shape(op, "expected [n, ..], got a scalar"))
}

pub(super) fn part_of(op: &'static str, tensor: &Tensor, size: usize) -> Result<usize> {
    let rows = rows(op, tensor)?;
    ensure!(
        size > 0 && rows.is_multiple_of(size),
        Error::shape(op, format_args!("expected a first size divisible by {size} ranks, got {rows}"))
    );
    Ok(rows / size)
}

/// One process, which exchanges nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Alone;

impl Communicator for Alone {
    fn rank(&self) -> usize {
        0
    }

    fn size(&self) -> usize {
        1
    }

    fn barrier(&self) -> Result<()> {
        Ok(())
    }

    fn broadcast_bytes(&self, _bytes: &mut [u8], _root: usize) -> Result<()> {
        Ok(())
    }

    fn all_gather_bytes(&self, mine: &[u8], all: &mut [u8]) -> Result<()> {
        copy("all_gather", mine, all)
    }

    fn all_to_all_bytes(&self, sent: &[u8], received: &mut [u8]) -> Result<()> {
        copy("all_to_all", sent, received)
    }
}

fn copy(op: &'static str, from: &[u8], to: &mut [u8]) -> Result<()> {
    check_sizes(op, from.len(), to.len())?;
    to.copy_from_slice(from);
    Ok(())
}

/// Fails unless the rank that all others get something from exists.
pub(super) fn check_root(root: usize, size: usize) -> Result<()> {
    ensure!(root < size, Error::argument("broadcast", format_args!("expected a rank below {size}, got {root}")));
    Ok(())
}

/// Fails unless the number of bytes received is as expected.
pub(super) fn check_sizes(op: &'static str, expected: usize, got: usize) -> Result<()> {
    ensure!(
        expected == got,
        Error::argument(op, format_args!("expected room for {expected} received bytes, got {got}"))
    );
    Ok(())
}
