//! Ranks that are threads of one process.

use std::sync::{Arc, Barrier, Mutex};

use x_transformers::{Result, distributed::Communicator};

/// State that the threads share: the bytes that each gives to the others.
#[derive(Debug)]
struct Shared {
    given: Mutex<Vec<Vec<u8>>>,
    meeting: Barrier,
}

/// A rank that is a thread.
#[derive(Debug)]
struct Thread {
    rank: usize,
    size: usize,
    shared: Arc<Shared>,
}

impl Thread {
    /// Gives bytes, takes from those of all, and waits until all have.
    fn exchange(&self, mine: &[u8], take: impl FnOnce(&[Vec<u8>])) {
        self.shared.given.lock().unwrap()[self.rank] = mine.to_vec();
        self.shared.meeting.wait();
        take(&self.shared.given.lock().unwrap());
        self.shared.meeting.wait();
    }
}

impl Communicator for Thread {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn barrier(&self) -> Result<()> {
        self.shared.meeting.wait();
        Ok(())
    }

    fn broadcast_bytes(&self, bytes: &mut [u8], root: usize) -> Result<()> {
        let mine = bytes.to_vec();
        self.exchange(&mine, |all| bytes.copy_from_slice(&all[root]));
        Ok(())
    }

    fn all_gather_bytes(&self, mine: &[u8], all: &mut [u8]) -> Result<()> {
        self.exchange(mine, |given| all.copy_from_slice(&given.concat()));
        Ok(())
    }

    fn all_to_all_bytes(&self, sent: &[u8], received: &mut [u8]) -> Result<()> {
        let part = sent.len() / self.size;
        self.exchange(sent, |given| {
            for (received, sent) in received.chunks_exact_mut(part.max(1)).zip(given) {
                received.copy_from_slice(&sent[self.rank * part..][..part]);
            }
        });
        Ok(())
    }
}

/// Runs a function as each of `size` ranks, and returns their results.
pub fn ranks<T: Send>(size: usize, run: impl Fn(Arc<dyn Communicator>) -> T + Sync) -> Vec<T> {
    let shared = Arc::new(Shared { given: Mutex::new(vec![Vec::new(); size]), meeting: Barrier::new(size) });
    let run = &run;
    std::thread::scope(|scope| {
        let start = |rank| {
            let ranks = Arc::new(Thread { rank, size, shared: shared.clone() });
            scope.spawn(move || run(ranks))
        };
        let threads: Vec<_> = (0..size).map(start).collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
    })
}
