//! Faults that kernels report, kept apart by the threads that enqueued them: threads that share a card get their own
//! errors, and those of threads whose tensors they use.

use std::sync::{
    Mutex, MutexGuard, PoisonError,
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
#[derive(Clone, Copy)]
pub(super) struct Origins(u64);

/// By place, the threads whose data its threads have used, and themselves. It only grows, since tensors outlive threads: a
/// place that is taken again still leads to what its tensors came from.
static USED: [AtomicU64; PLACES] = [const { AtomicU64::new(0) }; PLACES];

/// The living threads of a place.
#[derive(Clone, Copy)]
struct Living {
    count: usize,
    /// Sum of their numbers.
    sum: usize,
    /// Number after that of the last thread that took the place.
    taken: usize,
}

static LIVING: Mutex<[Living; PLACES]> = Mutex::new([Living { count: 0, sum: 0, taken: 0 }; PLACES]);

fn living() -> MutexGuard<'static, [Living; PLACES]> {
    LIVING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Number of a thread and its place, which it leaves when it ends.
struct Seat {
    number: usize,
    place: usize,
}

/// Stands for any thread of a place.
const ANY: usize = usize::MAX;

impl Seat {
    /// Takes the place with the fewest threads, of several that which has not been taken for the longest.
    fn take() -> Self {
        static THREADS: AtomicUsize = AtomicUsize::new(0);
        let (mut living, number) = (living(), THREADS.fetch_add(1, Ordering::Relaxed));
        let place = (0..PLACES).min_by_key(|&place| (living[place].count, living[place].taken)).unwrap_or(0);
        let Living { count, sum, .. } = living[place];
        living[place] = Living { count: count + 1, sum: sum.wrapping_add(number), taken: number + 1 };
        USED[place].fetch_or(1 << place, Ordering::Relaxed);
        Self { number, place }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut living = living();
        let place = &mut living[self.place];
        (place.count, place.sum) = (place.count - 1, place.sum.wrapping_sub(self.number));
    }
}

thread_local! {
    static SEAT: Seat = Seat::take();
}

/// Returns number and place of this thread. While its locals are destroyed, they are those of any thread.
fn seat() -> (usize, usize) {
    SEAT.try_with(|seat| (seat.number, seat.place)).unwrap_or((ANY, 0))
}

fn place_of_this_thread() -> usize {
    seat().1
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

/// A thread that reads back, and those that it depends on.
#[derive(Clone, Copy)]
pub(super) struct Reader {
    number: usize,
    place: usize,
    origins: u64,
    /// How often each place had been cleared when the words were copied.
    cleared: [u32; PLACES],
}

/// The places of a device.
pub(super) struct Faults {
    words: Plain,
    state: Mutex<State>,
}

struct State {
    /// By place, a fault that another thread was the first to read, and the number of the thread that it is of.
    told: [(usize, Words); PLACES],
    /// How often each place was cleared.
    cleared: [u32; PLACES],
}

impl Faults {
    /// In the context, which is current. The caller fills [`Faults::all`] with zeros.
    pub fn new(current: &Context) -> Result<Self, DriverError> {
        let state = State { told: [(ANY, NONE); PLACES], cleared: [0; PLACES] };
        Ok(Self { words: Plain::new(BYTES, current)?, state: Mutex::new(state) })
    }

    /// Returns the address of all places.
    pub fn all(&self) -> u64 {
        self.words.address()
    }

    /// Returns the address of this thread's place.
    pub fn address(&self) -> u64 {
        self.address_of(place_of_this_thread())
    }

    fn address_of(&self, place: usize) -> u64 {
        self.all() + (place * PLACE) as u64
    }

    /// Returns `true` if there is a place at this address.
    pub fn contains(&self, address: u64) -> bool {
        (self.all()..self.all() + BYTES as u64).contains(&address)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns this thread, which is about to copy all places.
    pub fn reader(&self) -> Reader {
        let (number, place) = seat();
        Reader { number, place, origins: USED[place].load(Ordering::Relaxed), cleared: self.state().cleared }
    }

    /// Returns the fault that a reader must hear of, given the content of all places, and the address of [`PLACE`]
    /// bytes that the caller then fills with zeros.
    pub fn find(&self, reader: Reader, bytes: &[u8]) -> (Words, Option<u64>) {
        let words = |place: usize| {
            let mut words = NONE;
            bytemuck::bytes_of_mut(&mut words).copy_from_slice(&bytes[place * PLACE..][..PLACE]);
            words
        };
        let mut state = self.state();
        let (thread, mut earlier) = state.told[reader.place];
        if thread == reader.number || thread == ANY {
            state.told[reader.place] = (ANY, NONE);
        } else {
            earlier = NONE;
        }
        let own = words(reader.place);
        if own == NONE && earlier != NONE {
            return (earlier, None);
        }
        let others = (0..PLACES).filter(|place| reader.origins >> place & 1 == 1);
        let mut places = [reader.place].into_iter().chain(others);
        let Some(place) = places.find(|&place| words(place) != NONE) else { return (NONE, None) };
        let words = words(place);
        if state.cleared[place] != reader.cleared[place] {
            // Told and cleared since they were copied: the place may hold another fault by now.
            return (words, None);
        }
        state.cleared[place] = state.cleared[place].wrapping_add(1);
        // Its own thread hears of it as well, if it lives; of several threads of a place, one does.
        match living()[place] {
            _ if place == reader.place => {}
            Living { count: 0, .. } => {}
            Living { count: 1, sum, .. } => state.told[place] = (sum, words),
            _ => state.told[place] = (ANY, words),
        }
        (words, Some(self.address_of(place)))
    }
}
