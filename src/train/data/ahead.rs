//! Batches that threads prepare while a step computes.

use std::{
    collections::VecDeque,
    fmt,
    sync::{
        Arc,
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread,
};

use super::{Batch, BatchRequest, BatchSource};
use crate::{Error, Result};

/// Number of batches that each thread prepares ahead.
const DEPTH: usize = 2;

/// A source whose next batches are prepared by threads. They compute the same batches as the caller would.
pub(crate) struct Ahead<B> {
    source: Arc<dyn BatchSource<Batch = B>>,
    workers: Vec<Worker<B>>,
    /// Requests that were sent and not received yet, each to the next thread in turn.
    sent: VecDeque<BatchRequest>,
    /// Number of requests that were sent and of batches that were received.
    turns: [usize; 2],
}

/// A thread that answers requests in their order, until it cannot be reached any more.
struct Worker<B> {
    requests: SyncSender<BatchRequest>,
    batches: Receiver<Result<B>>,
}

impl<B> fmt::Debug for Ahead<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ahead").field("workers", &self.workers.len()).finish_non_exhaustive()
    }
}

impl<B: Batch> Ahead<B> {
    /// Creates a source with one thread.
    pub fn new(source: Arc<dyn BatchSource<Batch = B>>) -> Self {
        let mut ahead = Self { source, workers: Vec::new(), sent: VecDeque::new(), turns: [0; 2] };
        ahead.set_workers(1);
        ahead
    }

    /// Returns the source.
    pub fn source(&self) -> &dyn BatchSource<Batch = B> {
        &*self.source
    }

    /// Changes the number of threads; with 0 the caller computes the batches. Where no thread can be had, there are fewer.
    pub fn set_workers(&mut self, count: usize) {
        let most = if self.source.in_order() { 1 } else { usize::MAX };
        (self.sent, self.turns) = (VecDeque::new(), [0; 2]);
        self.workers = (0..count.min(most)).map_while(|_| Worker::start(self.source.clone())).collect();
    }

    /// Returns a batch, and has those prepared that will be requested next.
    pub fn batch(&mut self, request: BatchRequest, next: impl Iterator<Item = BatchRequest>) -> Result<B> {
        if self.workers.is_empty() {
            return self.source.batch(&request);
        }
        while self.sent.front().is_some_and(|sent| *sent != request) {
            // The run went another way; an error that nobody asked for does not matter.
            drop(self.receive());
        }
        let most = DEPTH * self.workers.len();
        // Those that were sent before are the first of these.
        let wanted = std::iter::once(request).chain(next).take(1 + most);
        for request in wanted.skip(self.sent.len()) {
            let worker = &self.workers[self.turns[0] % self.workers.len()];
            if worker.requests.send(request).is_err() {
                // It has ended; what it prepared before can still be received.
                break;
            }
            self.turns[0] += 1;
            self.sent.push_back(request);
        }
        if self.sent.front() == Some(&request) { self.receive() } else { Err(ended()) }
    }

    fn receive(&mut self) -> Result<B> {
        let worker = &self.workers[self.turns[1] % self.workers.len()];
        self.turns[1] += 1;
        self.sent.pop_front();
        worker.batches.recv().unwrap_or_else(|_| Err(ended()))
    }
}

/// Returns the error of a source that panicked.
fn ended() -> Error {
    Error::argument("data", "the thread that prepares batches has ended: the source panicked")
}

impl<B: Batch> Worker<B> {
    fn start(source: Arc<dyn BatchSource<Batch = B>>) -> Option<Self> {
        // A request and its answer never wait: there is room for all that are ahead.
        let (requests, asked) = sync_channel::<BatchRequest>(DEPTH + 1);
        let (answer, batches) = sync_channel(DEPTH + 1);
        let work = move || {
            while let Ok(request) = asked.recv() {
                if answer.send(source.batch(&request)).is_err() {
                    return;
                }
            }
        };
        thread::Builder::new().name("xt-data".to_string()).spawn(work).ok()?;
        Some(Self { requests, batches })
    }
}
