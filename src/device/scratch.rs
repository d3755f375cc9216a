//! Working memory of threads: what matrix products and attention pack operands and keep sums in. Each thread keeps its
//! own from one op to the next, within the limit of all memory that is kept for reuse, and until it is asked for it.

use std::{
    mem::take,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicUsize, Ordering},
    },
};

use bytemuck::Pod;

/// Users that lend memory inside of one another.
#[derive(Clone, Copy)]
pub(crate) enum User {
    Products,
    Attention,
    Rows,
}

/// Memory that is lent at a time: areas that grow to what was needed most, see [`aligned`].
pub(crate) type Areas = [Vec<u64>; 3];

/// The working memory of all threads.
pub(super) struct Scratch {
    threads: Mutex<Vec<Weak<Thread>>>,
    /// Bytes that threads have, be they kept or in use.
    bytes: AtomicUsize,
    /// Bytes that threads may have.
    room: AtomicUsize,
}

/// The working memory of one thread, by its users.
#[derive(Default)]
struct Thread([Mutex<Slot>; 3]);

#[derive(Default)]
struct Slot {
    /// None while it is in use, and after a panic there.
    areas: Option<Areas>,
    /// Bytes of it that are part of [`Scratch::bytes`].
    counted: usize,
    /// If `true`, memory in use is freed when it comes back.
    unwanted: bool,
}

static SCRATCH: Scratch =
    Scratch { threads: Mutex::new(Vec::new()), bytes: AtomicUsize::new(0), room: AtomicUsize::new(usize::MAX) };

thread_local! {
    static THREAD: Arc<Thread> = SCRATCH.register();
}

/// The working memory of this process.
pub(super) fn scratch() -> &'static Scratch {
    &SCRATCH
}

/// Lends this thread's memory, of unspecified content.
pub(crate) fn lend<R>(user: User, body: impl FnOnce(&mut Areas) -> R) -> R {
    let (thread, mut areas) = borrow(user);
    let result = body(&mut areas);
    give_back(user, thread, areas);
    result
}

fn borrow(user: User) -> (Option<Arc<Thread>>, Areas) {
    // A thread that ends has given its memory back.
    let thread = THREAD.try_with(Arc::clone).ok();
    // Taken, not borrowed: a body that lends it again finds empty areas.
    let areas = thread.as_ref().and_then(|thread| thread.slot(user).areas.take()).unwrap_or_default();
    (thread, areas)
}

fn give_back(user: User, thread: Option<Arc<Thread>>, areas: Areas) {
    if let Some(thread) = thread {
        SCRATCH.keep(&mut thread.slot(user), areas);
    }
}

/// The first elements of a growing area, aligned to a cache line, of unspecified content.
pub(crate) fn aligned<R: Pod>(area: &mut Vec<u64>, elements: usize) -> &mut [R] {
    const LINE: usize = 64;
    let words = (elements * size_of::<R>()).div_ceil(size_of::<u64>());
    let needed = words + LINE / size_of::<u64>();
    if area.len() < needed {
        // Freed first, and not copied: zeros from the system cost less.
        drop(take(area));
        *area = vec![0; needed];
    }
    let skip = area.as_ptr().align_offset(LINE).min(LINE / size_of::<u64>());
    &mut bytemuck::cast_slice_mut(&mut area[skip..skip + words])[..elements]
}

impl Thread {
    fn slot(&self, user: User) -> MutexGuard<'_, Slot> {
        self.0[user as usize].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        for slot in &mut self.0 {
            let slot = slot.get_mut().unwrap_or_else(PoisonError::into_inner);
            SCRATCH.bytes.fetch_sub(slot.counted, Ordering::Relaxed);
        }
    }
}

impl Scratch {
    fn register(&self) -> Arc<Thread> {
        let thread = Arc::new(Thread::default());
        let mut threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        threads.retain(|thread| thread.strong_count() > 0);
        threads.push(Arc::downgrade(&thread));
        thread
    }

    /// Puts memory back, or frees it if there is no room for it.
    fn keep(&self, slot: &mut Slot, areas: Areas) {
        let bytes = 8 * areas.iter().map(Vec::capacity).sum::<usize>();
        if bytes != slot.counted || slot.unwanted {
            let others = self.bytes.fetch_sub(slot.counted, Ordering::Relaxed) - slot.counted;
            slot.counted = 0;
            if take(&mut slot.unwanted) || others.saturating_add(bytes) > self.room.load(Ordering::Relaxed) {
                return;
            }
            self.bytes.fetch_add(bytes, Ordering::Relaxed);
            slot.counted = bytes;
        }
        slot.areas = Some(areas);
    }

    /// Frees what threads keep; what they are using now is freed when they end their op.
    pub fn trim(&self) {
        let threads: Vec<_> = {
            let threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
            threads.iter().filter_map(Weak::upgrade).collect()
        };
        for slot in threads.iter().flat_map(|thread| &thread.0) {
            let mut slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(areas) = slot.areas.take() {
                self.bytes.fetch_sub(slot.counted, Ordering::Relaxed);
                slot.counted = 0;
                drop(slot);
                drop(areas);
            } else {
                slot.unwanted = slot.counted > 0;
            }
        }
    }

    /// Returns the number of bytes that threads hold.
    pub fn bytes(&self) -> usize {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Sets how many bytes threads may have.
    pub fn set_room(&self, bytes: usize) {
        self.room.store(bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Memory in use is another one for each lender, and is freed when it comes back after a trim.
    #[test]
    fn scratch_is_lent_once() {
        std::thread::spawn(|| {
            let size = |areas: &mut Areas| areas.each_ref().map(Vec::len);
            lend(User::Products, |outer| {
                aligned::<f32>(&mut outer[0], 1000)[999] = 1.0;
                lend(User::Products, |inner| assert_eq!(size(inner), [0; 3]));
                lend(User::Attention, |other| assert_eq!(size(other), [0; 3]));
            });
            lend(User::Products, |areas| assert_eq!(areas[0].len(), 508));
            lend(User::Products, |areas| {
                SCRATCH.trim();
                assert_eq!(areas[0].len(), 508);
            });
            lend(User::Products, |areas| assert_eq!(size(areas), [0; 3]));
        })
        .join()
        .unwrap();
    }

    /// Growing keeps alignment and length for every type.
    #[test]
    fn scratch_is_aligned() {
        let mut area = Vec::new();
        for elements in [0, 1, 7, 1000, 3, 5000] {
            assert_eq!(aligned::<f64>(&mut area, elements).len(), elements);
            let bytes = aligned::<u16>(&mut area, elements);
            assert!(bytes.len() == elements && bytes.as_ptr().addr().is_multiple_of(64));
        }
    }
}
