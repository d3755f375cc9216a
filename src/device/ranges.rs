//! Free ranges of addresses, found by their place and by their size.

/// Ranges of addresses that do not touch each other: lists in ascending order, which are short.
#[derive(Default)]
pub(super) struct Ranges {
    /// Starts and sizes.
    by_start: Vec<(usize, usize)>,
    /// Sizes and starts.
    by_size: Vec<(usize, usize)>,
    /// Of all ranges together.
    pub bytes: usize,
}

/// Number of pairs before this one.
fn before(list: &[(usize, usize)], pair: (usize, usize)) -> usize {
    list.partition_point(|at| *at < pair)
}

fn insert(list: &mut Vec<(usize, usize)>, pair: (usize, usize)) {
    list.insert(before(list, pair), pair);
}

fn remove(list: &mut Vec<(usize, usize)>, pair: (usize, usize)) {
    let at = before(list, pair);
    if list.get(at) == Some(&pair) {
        list.remove(at);
    }
}

impl Ranges {
    /// Adds a range, joined with those that it touches.
    pub fn insert(&mut self, mut start: usize, mut bytes: usize) {
        if bytes == 0 {
            return;
        }
        if let Some((before, len)) = self.ending_at(start) {
            self.remove(before);
            (start, bytes) = (before, len + bytes);
        }
        if let Some(len) = self.starting_at(start + bytes) {
            self.remove(start + bytes);
            bytes += len;
        }
        insert(&mut self.by_start, (start, bytes));
        insert(&mut self.by_size, (bytes, start));
        self.bytes += bytes;
    }

    pub fn remove(&mut self, start: usize) {
        if let Some(bytes) = self.starting_at(start) {
            remove(&mut self.by_start, (start, bytes));
            remove(&mut self.by_size, (bytes, start));
            self.bytes -= bytes;
        }
    }

    /// Returns the smallest range of at least this many bytes; of equal ones that at the lowest address.
    pub fn smallest(&self, bytes: usize) -> Option<(usize, usize)> {
        self.by_size.get(before(&self.by_size, (bytes, 0))).map(|&(len, start)| (start, len))
    }

    pub fn starting_at(&self, start: usize) -> Option<usize> {
        let &(found, len) = self.by_start.get(before(&self.by_start, (start, 0)))?;
        (found == start).then_some(len)
    }

    pub fn ending_at(&self, end: usize) -> Option<(usize, usize)> {
        let &(start, len) = self.by_start[..before(&self.by_start, (end, 0))].last()?;
        (start + len == end).then_some((start, len))
    }

    /// The range with this address.
    pub fn containing(&self, address: usize) -> Option<(usize, usize)> {
        let end = self.by_start.partition_point(|range| range.0 <= address);
        let &(start, len) = self.by_start[..end].last()?;
        (address - start < len).then_some((start, len))
    }

    pub fn iter(&self) -> impl Iterator<Item = (usize, usize)> + '_ {
        self.by_start.iter().copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_join_with_their_neighbours() {
        let mut ranges = Ranges::default();
        for (start, bytes) in [(100, 50), (200, 50), (300, 10), (0, 0)] {
            ranges.insert(start, bytes);
        }
        assert_eq!(ranges.smallest(11), Some((100, 50)));
        ranges.insert(150, 50);
        assert_eq!(ranges.iter().collect::<Vec<_>>(), [(100, 150), (300, 10)]);
        ranges.insert(250, 50);
        assert_eq!(ranges.iter().collect::<Vec<_>>(), [(100, 210)]);
        assert_eq!((ranges.bytes, ranges.smallest(211)), (210, None));
        ranges.remove(100);
        assert_eq!((ranges.bytes, ranges.by_size.len()), (0, 0));
    }
}
