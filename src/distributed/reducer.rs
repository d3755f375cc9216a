//! Sums of gradients over ranks, a bucket at a time, by a thread of its own where that is allowed.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
        mpsc::{Receiver, Sender, SyncSender, channel, sync_channel},
    },
    thread::{Builder, JoinHandle},
};

use super::{
    Communicator,
    bucket::{Bucket, Homes},
};
use crate::{
    Device, Error, Gradients, ParamMap, Result, Tape, Tensor, autograd::LeafDone, collect::CollectVec,
    ordered::OrderedMap, tensor::LeafId,
};

/// Elements that are summed together unless told otherwise: 32 MB of f32.
pub(crate) const BUCKET: usize = 8 << 20;

/// Sums of gradients over ranks. Each rank adds its part of every bucket, to which all give theirs, in the order of
/// ranks: N ranks that add M rounds have the bits of one process that adds N · M gradients. Ranks whose sums have an
/// order of their own add up the rounds first, where there is memory for whole gradients, and then over ranks once.
pub(crate) struct Reducer {
    ranks: Arc<dyn Communicator>,
    buckets: Arc<Vec<Bucket>>,
    /// Bucket and number of each parameter's leaf.
    places: OrderedMap<LeafId, (usize, usize)>,
    /// If a gradient has come for each parameter of each bucket.
    reached: Vec<Vec<u8>>,
    /// Number of parameters of each bucket whose gradient is not complete in this round.
    missing: Vec<usize>,
    /// Buckets that were given away in this round.
    given: usize,
    /// If `true`, buckets are given away while the backward pass runs.
    eager: bool,
    /// If `true`, this rank's gradients do not count.
    mute: bool,
    adding: Adding,
}

/// Sums of a step.
pub(crate) struct Sums {
    /// This rank's part of each bucket.
    pub parts: Vec<Tensor>,
    /// If any rank has a gradient, for each parameter of each bucket.
    pub reached: Vec<Vec<bool>>,
}

/// Executor of the sums.
enum Adding {
    Caller(Adder),
    Thread(Worker),
}

impl Reducer {
    /// `overlap`: add while the backward pass runs. `most`: elements of a bucket. `homes`: parameters that are divided.
    pub fn new(
        params: &ParamMap,
        ranks: Arc<dyn Communicator>,
        overlap: bool,
        most: usize,
        homes: &Homes,
    ) -> Result<Self> {
        let buckets = Arc::new(Bucket::all(params, ranks.size(), most, homes));
        let places = buckets.iter().enumerate().flat_map(|(bucket, Bucket { params, .. })| {
            params.iter().enumerate().map(move |(at, (_, param))| (param.leaf(), (bucket, at)))
        });
        let places = places.collect();
        let of_params = |bucket: &Bucket| bucket.params.len();
        let on_cpu = buckets.iter().all(|bucket| bucket.device == Device::Cpu);
        let sums = buckets.iter().map(|_| None).collect();
        let own_order = !ranks.sums_in_rank_order();
        let adder = Adder { ranks: ranks.clone(), buckets: buckets.clone(), sums, own_order, whole: own_order };
        let adding = if overlap && on_cpu && !own_order && ranks.takes_any_thread() && ranks.size() > 1 {
            Adding::Thread(Worker::start(adder)?)
        } else {
            Adding::Caller(adder)
        };
        let reached = buckets.iter().map(|bucket| vec![0; of_params(bucket)]).collect_vec();
        let missing = buckets.iter().map(of_params).collect_vec();
        let eager = matches!(adding, Adding::Thread(_));
        Ok(Self { ranks, buckets, places, reached, missing, given: 0, eager, mute: false, adding })
    }

    /// Gives buckets away while the backward pass runs, even if the pass waits for their sums: gradients take less
    /// memory.
    pub fn eagerly(mut self) -> Self {
        if let Adding::Caller(adder) = &mut self.adding {
            adder.whole = false;
        }
        Self { eager: true, ..self }
    }

    pub fn ranks(&self) -> &Arc<dyn Communicator> {
        &self.ranks
    }

    pub fn buckets(&self) -> &Arc<Vec<Bucket>> {
        &self.buckets
    }

    /// Returns a way to gather tensors in turn with the sums.
    pub fn gatherer(&self) -> Gatherer {
        let orders = match &self.adding {
            Adding::Caller(_) => None,
            Adding::Thread(worker) => worker.orders.clone(),
        };
        Gatherer { ranks: self.ranks.clone(), orders }
    }

    /// Runs the backward pass of a round whose gradients do not count: this rank has no batch with targets, but takes part
    /// in what is exchanged during a pass.
    pub fn backward_muted(&mut self, tape: &mut Tape, output: &Tensor, cotangent: &Tensor) -> Result<()> {
        self.mute = true;
        let done = self.backward(tape, output, cotangent);
        self.mute = false;
        done
    }

    /// Runs the backward pass of a round. Buckets may be given away as soon as they are complete.
    pub fn backward(&mut self, tape: &mut Tape, output: &Tensor, cotangent: &Tensor) -> Result<()> {
        let eager = self.eager;
        let mut done = |leaf, grads: &mut Gradients| self.complete(leaf, grads);
        let done: LeafDone = &mut done;
        let mut grads = tape.backward_calling(output, cotangent, eager.then_some(done))?;
        self.round(&mut grads)
    }

    /// Notes that a gradient is complete. Buckets are given away in their order, which is that of all ranks.
    fn complete(&mut self, leaf: LeafId, grads: &mut Gradients) -> Result<()> {
        if let Some(&(bucket, _)) = self.places.get(&leaf) {
            self.missing[bucket] -= 1;
        }
        while self.missing.get(self.given) == Some(&0) {
            self.give(grads)?;
        }
        Ok(())
    }

    fn give(&mut self, grads: &mut Gradients) -> Result<()> {
        let bucket = &self.buckets[self.given];
        let mut none = Gradients::default();
        let grads = if self.mute {
            bucket.params.iter().for_each(|(_, param)| drop(grads.take(param.leaf())));
            &mut none
        } else {
            grads
        };
        for ((_, param), reached) in bucket.params.iter().zip(&mut self.reached[self.given]) {
            *reached |= u8::from(grads.param(param).is_some());
        }
        let flat = bucket.take(grads)?;
        self.given += 1;
        match &mut self.adding {
            Adding::Caller(adder) => adder.add(self.given - 1, &flat),
            Adding::Thread(worker) => worker.add(self.given - 1, flat),
        }
    }

    /// Ends a round: adds the gradients that were not given away. Every rank does as many rounds, some without
    /// gradients.
    pub fn round(&mut self, grads: &mut Gradients) -> Result<()> {
        while self.given < self.buckets.len() {
            self.give(grads)?;
        }
        self.begin();
        Ok(())
    }

    /// Begins a round: no gradient is complete, and no bucket given away.
    fn begin(&mut self) {
        self.given = 0;
        for (missing, bucket) in self.missing.iter_mut().zip(&*self.buckets) {
            *missing = bucket.params.len();
        }
    }

    /// Drops the sums of a step that failed.
    pub fn reset(&mut self) {
        // Nothing else is lost: if the thread has ended, the next bucket says so.
        drop(match &mut self.adding {
            Adding::Caller(adder) => Ok(adder.take()),
            Adding::Thread(worker) => worker.take(),
        });
        self.reached.iter_mut().for_each(|reached| reached.fill(0));
        self.begin();
    }

    /// Returns the sums of all rounds since the last call.
    pub fn finish(&mut self) -> Result<Sums> {
        let sums = match &mut self.adding {
            Adding::Caller(adder) => adder.finish()?,
            Adding::Thread(worker) => worker.take()?,
        };
        let mine = self.reached.concat();
        let mut all = vec![0; mine.len() * self.ranks.size()];
        self.ranks.all_gather_bytes(&mine, &mut all)?;
        let mut by_any = (0..mine.len()).map(|at| all[at..].iter().step_by(mine.len()).any(|&reached| reached == 1));
        let reached = self.reached.iter_mut().map(|reached| {
            let of_any = by_any.by_ref().take(reached.len()).collect_vec();
            reached.fill(0);
            of_any
        });
        let reached = reached.collect_vec();
        let none = |bucket: &Bucket| Tensor::full([bucket.len], -0.0, bucket.dtype.accumulator(), &bucket.device);
        let parts = sums.into_iter().zip(&*self.buckets).map(|(sum, bucket)| sum.map_or_else(|| none(bucket), Ok));
        Ok(Sums { parts: parts.try_collect_vec()?, reached })
    }

    /// Gathers the parts of all ranks. Gradients of half types are f32.
    pub fn gather(&self, sums: Sums, grads: &mut Gradients) -> Result<()> {
        for ((bucket, part), reached) in self.buckets.iter().zip(sums.parts).zip(&sums.reached) {
            let whole = bucket.whole(&self.ranks.all_gather(&part)?)?;
            for (((_, param), grad), _) in bucket.params.iter().zip(whole).zip(reached).filter(|(_, reached)| **reached)
            {
                grads.replace(param.leaf(), grad);
            }
        }
        Ok(())
    }
}

/// Adds parts of buckets.
struct Adder {
    ranks: Arc<dyn Communicator>,
    buckets: Arc<Vec<Bucket>>,
    sums: Vec<Option<Tensor>>,
    /// If `true`, the ranks add in an order of their own.
    own_order: bool,
    /// If `true`, sums are of whole buckets and this rank, until [`Adder::finish`].
    whole: bool,
}

impl Adder {
    fn add(&mut self, bucket: usize, flat: &Tensor) -> Result<()> {
        let len = self.buckets[bucket].len;
        if self.own_order {
            let part = if self.whole { flat.clone() } else { self.ranks.reduce_scatter(flat)? };
            self.sums[bucket] = Some(match self.sums[bucket].take() {
                None => part.to_owned_copy()?,
                Some(sum) => sum.accumulate(&part)?,
            });
            return Ok(());
        }
        let parts = self.ranks.all_to_all(flat)?;
        for rank in 0..self.ranks.size() {
            let part = parts.narrow(0, rank * len, len)?;
            self.sums[bucket] = Some(match self.sums[bucket].take() {
                None => part.to_owned_copy()?,
                Some(sum) => sum.accumulate(&part.contiguous()?)?,
            });
        }
        Ok(())
    }

    fn take(&mut self) -> Vec<Option<Tensor>> {
        self.sums.iter_mut().map(Option::take).collect_vec()
    }

    /// Returns this rank's part of the sums.
    fn finish(&mut self) -> Result<Vec<Option<Tensor>>> {
        let sums = self.take();
        if !self.whole {
            return Ok(sums);
        }
        // All ranks have done as many rounds, each with all buckets.
        let part = |sum: Option<Tensor>| sum.map(|sum| self.ranks.reduce_scatter(&sum)).transpose();
        sums.into_iter().map(part).try_collect_vec()
    }
}

/// A thread that adds in the order in which it is asked to.
struct Worker {
    /// `None` once the thread is to end.
    orders: Option<Orders>,
    thread: Option<JoinHandle<()>>,
}

/// Sender of orders to the thread.
#[derive(Clone)]
struct Orders {
    sender: SyncSender<Order>,
    /// Number of orders for which the thread waits for other ranks, now or later.
    exchanges: Arc<AtomicUsize>,
}

impl Orders {
    fn send(&self, order: Order) -> Result<()> {
        if matches!(order, Order::Gather(..) | Order::Add(..)) {
            self.exchanges.fetch_add(1, Ordering::AcqRel);
        }
        self.sender.send(order).map_err(|_| ended())
    }
}

enum Order {
    End,
    Gather(Tensor, Sender<Result<Tensor>>),
    Add(usize, Tensor),
    Take(Sender<Result<Vec<Option<Tensor>>>>),
}

impl Worker {
    fn start(mut adder: Adder) -> Result<Self> {
        // A pass that is faster than the transfers waits, instead of holding all of its gradients in the queue.
        let (sender, asked) = sync_channel(2);
        let orders = Orders { sender, exchanges: Arc::default() };
        let left = orders.exchanges.clone();
        let work = move || {
            let done = || _ = left.fetch_sub(1, Ordering::AcqRel);
            let mut failed = None;
            while let Ok(order) = asked.recv() {
                match order {
                    Order::End => break,
                    Order::Gather(part, answer) => {
                        let all = adder.ranks.all_gather(&part);
                        // Before the answer: whoever has it finds the thread idle.
                        done();
                        let _ = answer.send(all);
                    }
                    // Other ranks wait for every bucket, but there is nothing to give them any more.
                    Order::Add(bucket, flat) => {
                        failed = failed.take().or_else(|| adder.add(bucket, &flat).err());
                        done();
                    }
                    Order::Take(answer) => {
                        let sums = adder.take();
                        // Whoever asked may have gone.
                        let _ = answer.send(failed.take().map_or(Ok(sums), Err));
                    }
                }
            }
        };
        let thread = Builder::new().name("xt-ranks".to_string()).spawn(work);
        let thread = thread.map_err(|error| Error::argument("ranks", format_args!("no thread: {error}")))?;
        Ok(Self { orders: Some(orders), thread: Some(thread) })
    }

    fn send(&self, order: Order) -> Result<()> {
        self.orders.as_ref().ok_or_else(ended)?.send(order)
    }

    fn add(&self, bucket: usize, flat: Tensor) -> Result<()> {
        self.send(Order::Add(bucket, flat))
    }

    fn take(&self) -> Result<Vec<Option<Tensor>>> {
        let (answer, sums) = channel();
        self.send(Order::Take(answer))?;
        sums.recv().unwrap_or_else(|_| Err(ended()))
    }
}

/// Gathers tensors in turn with the sums of a [`Reducer`]: by its thread, if it has one.
pub(crate) struct Gatherer {
    ranks: Arc<dyn Communicator>,
    orders: Option<Orders>,
}

/// Tensor that is being gathered.
pub(crate) enum Gathering {
    Done(Tensor),
    Awaited(Receiver<Result<Tensor>>),
}

impl Gatherer {
    /// Returns `true` if [`Gatherer::start`] does not wait for the other ranks.
    pub fn is_ahead(&self) -> bool {
        self.orders.is_some()
    }

    /// Begins to gather the parts of all ranks: `[len] → [ranks · len]`.
    pub fn start(&self, part: Tensor) -> Result<Gathering> {
        let Some(orders) = &self.orders else { return self.ranks.all_gather(&part).map(Gathering::Done) };
        let (answer, all) = channel();
        orders.send(Order::Gather(part, answer))?;
        Ok(Gathering::Awaited(all))
    }
}

impl Gathering {
    /// Waits for the other ranks.
    pub fn finish(self) -> Result<Tensor> {
        match self {
            Self::Done(all) => Ok(all),
            Self::Awaited(all) => all.recv().unwrap_or_else(|_| Err(ended())),
        }
    }
}

fn ended() -> Error {
    Error::argument("ranks", "the thread that sums gradients has ended: it panicked")
}

impl Drop for Worker {
    /// Waits for the thread, which holds the ranks: those of MPI end on the thread that began them. After an error in
    /// the middle of a step other ranks may never answer it: then it is left alone, and ends with the last sender.
    fn drop(&mut self) {
        let Some(orders) = self.orders.take() else { return };
        if orders.exchanges.load(Ordering::Acquire) > 0 {
            // The queue may be full.
            let _ = orders.sender.try_send(Order::End);
            return;
        }
        // A thread that has ended by itself takes no orders.
        let _ = orders.send(Order::End);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
