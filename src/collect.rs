//! Lists from iterators, in one loop for each type of element. The standard `collect` is compiled anew for each iterator, half
//! a kilobyte at a time, and three times that for results.

/// Number of results that memory is taken for at first: the count may come from a file that does not hold as many.
const ROOM: usize = 1024;

/// Collecting where the number of elements does not matter: each costs an indirect call.
pub(crate) trait CollectVec: Iterator + Sized {
    fn collect_vec(mut self) -> Vec<Self::Item> {
        collect(self.size_hint().0, &mut self)
    }

    /// Returns the values of results, or the first error.
    fn try_collect_vec<T, E>(mut self) -> Result<Vec<T>, E>
    where
        Self: Iterator<Item = Result<T, E>>,
    {
        try_collect(self.size_hint().1.unwrap_or(0).min(ROOM), &mut self)
    }
}

impl<I: Iterator> CollectVec for I {}

/// The part of an iterator that a loop needs: a closure, or an iterator behind a pointer, has more functions.
trait Next<T> {
    fn take_next(&mut self) -> Option<T>;
}

impl<I: Iterator> Next<I::Item> for I {
    fn take_next(&mut self) -> Option<I::Item> {
        self.next()
    }
}

#[inline(never)]
fn collect<T>(count: usize, items: &mut dyn Next<T>) -> Vec<T> {
    let mut values = Vec::with_capacity(count);
    while let Some(value) = items.take_next() {
        values.push(value);
    }
    values
}

#[inline(never)]
fn try_collect<T, E>(count: usize, items: &mut dyn Next<Result<T, E>>) -> Result<Vec<T>, E> {
    let mut values = Vec::with_capacity(count);
    while let Some(result) = items.take_next() {
        values.push(result?);
    }
    Ok(values)
}
