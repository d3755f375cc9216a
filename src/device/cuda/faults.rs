//! Faults that kernels report, kept apart by the threads that enqueued them: threads that share a card get their own
//! errors, and those of threads whose tensors they use.

use std::sync::{
    Mutex, PoisonError,
    atomic::{AtomicU64, AtomicUsize, Ordering},
};

use cudarc::driver::DriverError;

use super::resources::{Context, Plain};
use crate::device::faults::FAULT_WORDS;

/// Number of places in which kernels report. Threads above this number share places, and so errors.
const PLACES: usize = 64;

/// Bytes of a place.
pub(super) const PLACE: usize = FAULT_WORDS * 8;

/// Bytes of all places.
pub(super) const BYTES: usize = PLACES * PLACE;

/// Code, index and limit of a fault; all zero if there is none.
type Words = [i64; FAULT_WORDS];

const NONE: Words = [0; FAULT_WORDS];

/// Threads, as bits of their places.
#[derive(Clone, Copy, Default)]
pub(super) struct Origins(u64);

/// By place, the threads whose data its thread has used, and itself.
static USED: [AtomicU64; PLACES] = [const { AtomicU64::new(0) }; PLACES];

/// By place, the number of the thread that was the last to take it.
static TAKEN_BY: [AtomicUsize; PLACES] = [const { AtomicUsize::new(0) }; PLACES];

thread_local! {
    static NUMBER: usize = {
        static THREADS: AtomicUsize = AtomicUsize::new(0);
        let number = THREADS.fetch_add(1, Ordering::Relaxed);
        USED[number % PLACES].fetch_or(1 << (number % PLACES), Ordering::Relaxed);
        TAKEN_BY[number % PLACES].store(number, Ordering::Relaxed);
        number
    };
}

fn number_of_this_thread() -> usize {
    NUMBER.with(|number| *number)
}

fn place_of_this_thread() -> usize {
    number_of_this_thread() % PLACES
}

impl Origins {
    /// Returns this thread.
    pub fn this_thread() -> Self {
        Self(1 << place_of_this_thread())
    }

    /// Makes this thread depend on them, and on those that they depend on.
    pub fn adopt(self) {
        let place = place_of_this_thread();
        if self.0 == 1 << place {
            return;
        }
        let known = USED[place].load(Ordering::Relaxed);
        let places = (0..PLACES).filter(|place| self.0 >> place & 1 == 1);
        let all = places.fold(self.0, |all, place| all | USED[place].load(Ordering::Relaxed));
        if all & !known != 0 {
            USED[place].fetch_or(all, Ordering::Relaxed);
        }
    }
}

/// The threads that have written to a tensor's memory.
pub(super) struct Writers(AtomicU64);

impl Writers {
    /// Begins with this thread.
    pub fn new() -> Self {
        Self(AtomicU64::new(Origins::this_thread().0))
    }

    /// Makes this thread, which uses the memory, depend on them.
    pub fn read(&self) {
        Origins(self.0.load(Ordering::Relaxed)).adopt();
    }

    /// Adds this thread.
    pub fn write(&self) {
        self.0.fetch_or(Origins::this_thread().0, Ordering::Relaxed);
    }

    /// Removes all: the memory holds what any thread would have written.
    pub fn clear(&self) {
        self.0.store(0, Ordering::Relaxed);
    }
}

/// Whoever reads back: a thread, with those that it depends on.
#[derive(Clone, Copy)]
pub(super) struct Reader {
    number: usize,
    origins: u64,
}

impl Reader {
    /// Returns this thread.
    pub fn this_thread() -> Self {
        let number = number_of_this_thread();
        Self { number, origins: USED[number % PLACES].load(Ordering::Relaxed) }
    }
}

/// The places of a device, and what others have read of them.
pub(super) struct Faults {
    words: Plain,
    /// By place, a fault that another thread was the first to read, and the number of the thread that it is of.
    told: Mutex<[(usize, Words); PLACES]>,
}

impl Faults {
    /// In the context, which is current. The caller fills [`Faults::all`] with zeros.
    pub fn new(current: &Context) -> Result<Self, DriverError> {
        Ok(Self { words: Plain::new(BYTES, current)?, told: Mutex::new([(0, NONE); PLACES]) })
    }

    /// Returns the address of all places.
    pub fn all(&self) -> u64 {
        self.words.address()
    }

    /// Returns the address of this thread's place.
    pub fn address(&self) -> u64 {
        self.place(place_of_this_thread())
    }

    fn place(&self, place: usize) -> u64 {
        self.all() + (place * PLACE) as u64
    }

    /// Returns `true` if there is a place at this address.
    pub fn contains(&self, address: u64) -> bool {
        (self.all()..self.all() + BYTES as u64).contains(&address)
    }

    /// Returns the fault that a reader must hear of, given the content of all places, and the address of [`PLACE`]
    /// bytes that the caller then fills with zeros.
    pub fn find(&self, reader: Reader, bytes: &[u8]) -> (Words, Option<u64>) {
        let words = |place: usize| {
            let mut words = NONE;
            bytemuck::bytes_of_mut(&mut words).copy_from_slice(&bytes[place * PLACE..][..PLACE]);
            words
        };
        let own_place = reader.number % PLACES;
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let (thread, earlier) = std::mem::replace(&mut told[own_place], (0, NONE));
        let own = words(own_place);
        if own != NONE {
            return (own, Some(self.place(own_place)));
        }
        if earlier != NONE && thread == reader.number {
            return (earlier, None);
        }
        let others = (0..PLACES).filter(|place| reader.origins >> place & 1 == 1);
        match others.map(|place| (place, words(place))).find(|(_, words)| *words != NONE) {
            Some((place, words)) => {
                // Its own thread hears of it as well.
                told[place] = (TAKEN_BY[place].load(Ordering::Relaxed), words);
                (words, Some(self.place(place)))
            }
            None => (NONE, None),
        }
    }
}
