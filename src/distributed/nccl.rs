//! Ranks with a GPU each, over NCCL.

use std::{
    fmt,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use super::{
    Communicator, Launch,
    communicator::{check_root, check_sizes, part_of, rows},
    meeting::{Meeting, Member},
};
use crate::{
    DType, Device, Error, Result, Tensor,
    device::{
        Gpu, GpuBuffer,
        cuda::{Collective, Comm, CudaDevice, Element, Id},
    },
    error::ensure,
};

/// Bytes that an operation on bytes moves at once, in all for all ranks.
const PIECE: usize = 4 << 20;

/// The longest timeout: 136 years.
const FOREVER: Duration = Duration::from_secs(u32::MAX as u64);

/// Time that an operation goes on after another process has ended: it may have finished its part.
const GRACE: Duration = Duration::from_secs(2);

/// Ranks that have a GPU each, over NVIDIA's NCCL (2.14 or a later 2), which is opened at run time.
///
/// Tensors of the GPU stay on it: operations are enqueued after the work so far, and waited for. Tensors of the CPU and
/// bytes pass through a small buffer of the GPU. Sums are NCCL's: their order is its own, equal from run to run of the
/// same ranks, machines and NCCL, and all ranks get the same bits. Tensors of half types are summed in f32. An
/// operation cannot be part of a [`Graph`](crate::Graph).
///
/// If a rank does not take part in an operation within the timeout, it returns an error on the others; if the process of a
/// rank ends, it does so within seconds, where the ranks have met by TCP. After an error of NCCL all further operations are
/// errors: the processes must be started anew.
///
/// ```no_run
/// use std::{sync::Arc, time::Duration};
/// use x_transformers::{
///     Device,
///     distributed::{Communicator, Launch, Nccl},
/// };
/// # fn main() -> x_transformers::Result<()> {
/// // Started by `torchrun --nproc-per-node 8 --no-python my-program`.
/// let device = Device::cuda(Launch::from_env()?.local_rank)?;
/// let ranks: Arc<dyn Communicator> = Arc::new(Nccl::new(&device, Duration::from_secs(600))?);
/// # Ok(())
/// # }
/// ```
pub struct Nccl {
    rank: usize,
    size: usize,
    timeout: Duration,
    device: Device,
    gpu: &'static CudaDevice,
    comm: Comm,
    /// Connections of ranks that have met by TCP.
    meeting: Option<Meeting>,
    /// Memory for bytes: what is sent, and what is received.
    buffer: Mutex<Option<GpuBuffer>>,
}

impl fmt::Debug for Nccl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Nccl")
            .field("rank", &self.rank)
            .field("size", &self.size)
            .field("device", &self.device)
            .finish()
    }
}

impl Nccl {
    /// Joins the ranks that a launcher has started ([`Launch::from_env`]), each with a GPU of its own.
    ///
    /// They meet at `MASTER_ADDR`, on the port after `MASTER_PORT` or that of `XT_NCCL_PORT`, where rank 0 tells the
    /// others NCCL's 128 bytes; the connections then stay open, and silent, to show that a process has ended. The ranks
    /// wait `timeout` for each other, here and in each operation.
    ///
    /// Errors: a device that is not a GPU of CUDA; no NCCL, another version than 2.14 or a later 2, or than that of
    /// rank 0; variables that are missing or wrong; a port that another program has; a rank that does not come; errors
    /// of NCCL.
    pub fn new(device: &Device, timeout: Duration) -> Result<Self> {
        let timeout = timeout.min(FOREVER);
        let Launch { rank, size, .. } = Launch::from_env()?;
        let gpu = gpu_of(device)?;
        let (version, _) = Comm::version()?;
        let me = Member { rank, size, version: version as u32, text: Comm::text };
        let (meeting, id) = match size {
            1 => (None, Comm::id(gpu)?),
            _ => Meeting::new(me, timeout, || Comm::id(gpu)).map(|(meeting, id)| (Some(meeting), id))?,
        };
        Self::join([rank, size], device, gpu, id, meeting, timeout)
    }

    /// Joins the ranks of another communicator, such as an `Mpi`, by which they get NCCL's 128 bytes.
    ///
    /// Errors: those of [`Nccl::new`] that are not about TCP; a failed transfer.
    pub fn with_ranks(device: &Device, ranks: &dyn Communicator, timeout: Duration) -> Result<Self> {
        let timeout = timeout.min(FOREVER);
        // All ranks take part in the exchange, or else some would wait for those that failed.
        let mut name = [0; 1 + size_of::<Id>()];
        let prepared = gpu_of(device).and_then(|gpu| Comm::version().map(|(version, _)| (gpu, version)));
        let made = prepared.and_then(|(gpu, version)| {
            if ranks.rank() == 0 {
                name[1..].copy_from_slice(&Comm::id(gpu)?);
            }
            Ok((gpu, version))
        });
        let version = made.as_ref().map_or(0, |(_, version)| *version);
        let mut versions = vec![0; 4 * ranks.size()];
        ranks.all_gather_bytes(&version.to_le_bytes(), &mut versions)?;
        ranks.broadcast_bytes(&mut name, 0)?;
        let (gpu, _) = made?;
        let versions = versions.chunks_exact(4).map(|bytes| i32::from_le_bytes(std::array::from_fn(|at| bytes[at])));
        if let Some((rank, other)) = versions.enumerate().find(|(_, other)| *other != version) {
            if other == 0 {
                let why = format!("rank {rank} cannot use NCCL; its own message says why");
                return Err(Error::argument("ranks", why));
            }
            let why =
                format!("rank {rank} has NCCL {}, rank {} {}", Comm::text(other), ranks.rank(), Comm::text(version));
            return Err(Error::argument("ranks", format_args!("{why}; give all ranks the same library")));
        }
        let id = std::array::from_fn(|at| name[1 + at]);
        Self::join([ranks.rank(), ranks.size()], device, gpu, id, None, timeout)
    }

    fn join(
        [rank, size]: [usize; 2],
        device: &Device,
        gpu: &'static CudaDevice,
        id: Id,
        meeting: Option<Meeting>,
        timeout: Duration,
    ) -> Result<Self> {
        let place = (rank, size, meeting.as_ref());
        let comm = Comm::join(gpu, id, [rank, size], &mut patient("joining", place, timeout))?;
        Ok(Self { rank, size, timeout, device: device.clone(), gpu, comm, meeting, buffer: Mutex::default() })
    }

    /// Returns the version of the library and where it was found.
    ///
    /// Errors: why there is none, and what to install.
    pub fn version() -> Result<String> {
        Ok(Comm::version()?.1)
    }

    /// Returns a rank whose process has ended, if the ranks have met by TCP; ranks other than 0 only know about rank 0.
    pub fn lost(&self) -> Option<usize> {
        self.meeting.as_ref().and_then(Meeting::lost)
    }

    fn patient(&self, op: &'static str) -> impl FnMut() -> Result<()> + '_ {
        patient(op, (self.rank, self.size, self.meeting.as_ref()), self.timeout)
    }

    /// Returns the tensor, contiguous, in this dtype; `None` if it is on the CPU.
    fn own(&self, op: &'static str, tensor: &Tensor, dtype: DType) -> Result<Option<Tensor>> {
        if *tensor.device() == Device::Cpu {
            return Ok(None);
        }
        ensure!(
            *tensor.device() == self.device,
            Error::device(
                op,
                format_args!("the tensor is on {}, but these ranks use {}", tensor.device(), self.device)
            )
        );
        tensor.detach().to_dtype(dtype)?.contiguous().map(Some)
    }

    /// Runs an operation of `count` elements, and returns what is received.
    fn run(
        &self,
        op: &'static str,
        what: Collective,
        sent: Tensor,
        mut received: Tensor,
        (count, element): (usize, Element),
    ) -> Result<Tensor> {
        if count == 0 {
            return Ok(received);
        }
        let places = [sent.address()?, received.address_mut()?];
        let done = self.comm.run(what, places, (count, element), &mut self.patient(op));
        if self.comm.is_stuck() {
            // What NCCL may still write to is never given to others.
            std::mem::forget((sent, received));
            return Err(done.err().unwrap_or_else(|| Error::device(op, "NCCL does not end")));
        }
        done.map(|()| received)
    }

    /// Sums tensors of the GPU, in f32 or wider.
    fn sum(&self, op: &'static str, what: Collective, tensor: &Tensor, rows: Option<usize>) -> Result<Option<Tensor>> {
        let (dtype, wide) = (tensor.dtype(), tensor.dtype().accumulator());
        let element = if wide == DType::F64 { Element::F64 } else { Element::F32 };
        let Some(sent) = self.own(op, tensor, wide)? else { return Ok(None) };
        let shape = rows.map_or(*tensor.shape(), |rows| tensor.shape().with_dim(0, rows));
        let received = Tensor::uninit(shape, wide, &self.device)?;
        let count = received.numel();
        self.run(op, what, sent, received, (count, element))?.to_dtype(dtype).map(Some)
    }

    /// Moves bytes through the buffer of the GPU: `sent` bytes up, an operation of `count`, and back `received`.
    fn through(
        &self,
        op: &'static str,
        what: Collective,
        sent: &[u8],
        received: &mut [u8],
        count: usize,
    ) -> Result<()> {
        let mut buffer = self.buffer.lock().unwrap_or_else(PoisonError::into_inner);
        let half = PIECE.max(self.size);
        if buffer.is_none() {
            *buffer = Some(GpuBuffer::new(2 * half, self.gpu)?);
        }
        let from = buffer.as_ref().map_or(crate::device::Address::NULL, GpuBuffer::address);
        let to = from.plus(half);
        self.gpu.upload(from, sent)?;
        let done = self.comm.run(what, [from, to], (count, Element::Byte), &mut self.patient(op));
        if self.comm.is_stuck() {
            std::mem::forget(buffer.take());
        }
        done?;
        self.gpu.read_back(to, received)
    }
}

fn gpu_of(device: &Device) -> Result<&'static CudaDevice> {
    CudaDevice::of(device).ok_or_else(|| Error::device("nccl", format_args!("expected a GPU of CUDA, got {device}")))
}

/// Returns a function that fails once the others have been waited for long enough, or one of them has ended.
fn patient<'a>(
    op: &'static str,
    (rank, size, meeting): (usize, usize, Option<&'a Meeting>),
    timeout: Duration,
) -> impl FnMut() -> Result<()> + 'a {
    /// Time between two looks at the connections.
    const LOOK: Duration = Duration::from_millis(100);
    let (mut last, mut waited, mut looked) = (Instant::now(), Duration::ZERO, Duration::ZERO);
    let mut ended: Option<(usize, Duration)> = None;
    move || {
        // A process that is stopped does not count the time.
        waited += last.elapsed().min(5 * LOOK);
        last = Instant::now();
        ensure!(
            waited < timeout,
            Error::device(
                op,
                format_args!(
                    "rank {rank} of {size} has waited {} s for another rank, which hangs or has died; if it is only slow, \
                     allow more time",
                    timeout.as_secs_f64()
                )
            )
        );
        if waited >= looked + LOOK {
            looked = waited;
            ended = ended.or_else(|| meeting?.lost().map(|other| (other, waited)));
        }
        match ended {
            Some((other, since)) if waited >= since + GRACE => {
                Err(Error::device(op, format_args!("the process of rank {other} of {size} has ended")))
            }
            _ => Ok(()),
        }
    }
}

impl Communicator for Nccl {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn sums_in_rank_order(&self) -> bool {
        false
    }

    fn barrier(&self) -> Result<()> {
        self.all_gather_bytes(&[0], &mut vec![0; self.size])
    }

    fn broadcast_bytes(&self, bytes: &mut [u8], root: usize) -> Result<()> {
        check_root(root, self.size)?;
        for piece in bytes.chunks_mut(PIECE) {
            let (mine, count) = (piece.to_vec(), piece.len());
            self.through("broadcast", Collective::Broadcast(root), &mine, piece, count)?;
        }
        Ok(())
    }

    fn all_gather_bytes(&self, mine: &[u8], all: &mut [u8]) -> Result<()> {
        check_sizes("all_gather", mine.len() * self.size, all.len())?;
        let step = (PIECE / self.size).max(1);
        let mut pieces = vec![0; step.min(mine.len()) * self.size];
        for start in (0..mine.len()).step_by(step) {
            let part = &mine[start..mine.len().min(start + step)];
            let pieces = &mut pieces[..part.len() * self.size];
            self.through("all_gather", Collective::AllGather, part, pieces, part.len())?;
            for (rank, piece) in pieces.chunks_exact(part.len()).enumerate() {
                all[rank * mine.len() + start..][..part.len()].copy_from_slice(piece);
            }
        }
        Ok(())
    }

    fn all_to_all_bytes(&self, sent: &[u8], received: &mut [u8]) -> Result<()> {
        check_sizes("all_to_all", sent.len(), received.len())?;
        check_sizes("all_to_all", sent.len() / self.size * self.size, sent.len())?;
        let (of_rank, step) = (sent.len() / self.size, (PIECE / self.size).max(1));
        let [mut from, mut to] = [0, 1].map(|_| vec![0; step.min(of_rank) * self.size]);
        for start in (0..of_rank).step_by(step) {
            let count = step.min(of_rank - start);
            let (from, to) = (&mut from[..count * self.size], &mut to[..count * self.size]);
            for (rank, piece) in from.chunks_exact_mut(count).enumerate() {
                piece.copy_from_slice(&sent[rank * of_rank + start..][..count]);
            }
            self.through("all_to_all", Collective::AllToAll, from, to, count)?;
            for (rank, piece) in to.chunks_exact(count).enumerate() {
                received[rank * of_rank + start..][..count].copy_from_slice(piece);
            }
        }
        Ok(())
    }

    fn broadcast(&self, tensor: &Tensor, root: usize) -> Result<Tensor> {
        check_root(root, self.size)?;
        match self.own("broadcast", tensor, tensor.dtype())? {
            None => ByBytes(self).broadcast(tensor, root),
            Some(sent) => {
                let received = sent.uninit_like()?;
                let bytes = sent.numel() * sent.dtype().size();
                self.run("broadcast", Collective::Broadcast(root), sent, received, (bytes, Element::Byte))
            }
        }
    }

    fn all_gather(&self, tensor: &Tensor) -> Result<Tensor> {
        let rows = rows("all_gather", tensor)?;
        match self.own("all_gather", tensor, tensor.dtype())? {
            None => ByBytes(self).all_gather(tensor),
            Some(sent) => {
                let shape = tensor.shape().with_dim(0, rows * self.size);
                let received = Tensor::uninit(shape, tensor.dtype(), &self.device)?;
                let bytes = sent.numel() * sent.dtype().size();
                self.run("all_gather", Collective::AllGather, sent, received, (bytes, Element::Byte))
            }
        }
    }

    fn all_to_all(&self, tensor: &Tensor) -> Result<Tensor> {
        part_of("all_to_all", tensor, self.size)?;
        match self.own("all_to_all", tensor, tensor.dtype())? {
            None => ByBytes(self).all_to_all(tensor),
            Some(sent) => {
                let received = sent.uninit_like()?;
                let bytes = sent.numel() * sent.dtype().size() / self.size;
                self.run("all_to_all", Collective::AllToAll, sent, received, (bytes, Element::Byte))
            }
        }
    }

    fn reduce_scatter(&self, tensor: &Tensor) -> Result<Tensor> {
        tensor.dtype().expect_float("reduce_scatter")?;
        let rows = part_of("reduce_scatter", tensor, self.size)?;
        let sum = self.sum("reduce_scatter", Collective::ReduceScatter, tensor, Some(rows))?;
        sum.map_or_else(|| ByBytes(self).reduce_scatter(tensor), Ok)
    }

    fn all_reduce(&self, tensor: &Tensor) -> Result<Tensor> {
        tensor.dtype().expect_float("all_reduce")?;
        let sum = self.sum("all_reduce", Collective::AllReduce, tensor, None)?;
        sum.map_or_else(|| ByBytes(self).all_reduce(tensor), Ok)
    }
}

/// The same ranks for tensors of the CPU, by the methods on bytes.
#[derive(Debug)]
struct ByBytes<'a>(&'a Nccl);

impl Communicator for ByBytes<'_> {
    fn rank(&self) -> usize {
        self.0.rank
    }

    fn size(&self) -> usize {
        self.0.size
    }

    fn barrier(&self) -> Result<()> {
        self.0.barrier()
    }

    fn broadcast_bytes(&self, bytes: &mut [u8], root: usize) -> Result<()> {
        self.0.broadcast_bytes(bytes, root)
    }

    fn all_gather_bytes(&self, mine: &[u8], all: &mut [u8]) -> Result<()> {
        self.0.all_gather_bytes(mine, all)
    }

    fn all_to_all_bytes(&self, sent: &[u8], received: &mut [u8]) -> Result<()> {
        self.0.all_to_all_bytes(sent, received)
    }
}
