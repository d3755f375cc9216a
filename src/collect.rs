//! Lists from iterators, in one loop for each type of element. The standard `collect` is compiled anew for each iterator, half
//! a kilobyte at a time, and three times that for results.

/// Collecting where the number of elements does not matter: each costs an indirect call.
pub(crate) trait CollectVec: Iterator + Sized {
    fn collect_vec(mut self) -> Vec<Self::Item> {
        collect(self.size_hint().0, &mut || self.next())
    }

    /// Returns the values of results, or the first error.
    fn try_collect_vec<T, E>(mut self) -> Result<Vec<T>, E>
    where
        Self: Iterator<Item = Result<T, E>>,
    {
        try_collect(self.size_hint().1.unwrap_or(0), &mut || self.next())
    }
}

impl<I: Iterator> CollectVec for I {}

#[inline(never)]
fn collect<T>(count: usize, next: &mut dyn FnMut() -> Option<T>) -> Vec<T> {
    let mut values = Vec::with_capacity(count);
    while let Some(value) = next() {
        values.push(value);
    }
    values
}

#[inline(never)]
fn try_collect<T, E>(count: usize, next: &mut dyn FnMut() -> Option<Result<T, E>>) -> Result<Vec<T>, E> {
    let mut values = Vec::with_capacity(count);
    while let Some(result) = next() {
        values.push(result?);
    }
    Ok(values)
}
